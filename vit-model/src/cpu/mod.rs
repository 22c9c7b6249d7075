//! The CPU engine: weights are packed once for this CPU, and a pass allocates nothing.
//!
//! Files from top to bottom; each imports only from those below it. [`engine`] is what the rest of the crate calls. [`pass`]
//! runs the phases of one forward pass over the activations of [`workspace`]. [`net`] is the packed model, read by
//! [`packing`]. [`choose`] picks a [`kernel`], which does the work of [`linear`], [`attention`], [`norm`] and [`copy`]. These are
//! written once over [`multiply`], which [`amx`], [`avx512`], [`avx2`], [`portable`] and [`int8`] implement. At the bottom,
//! [`simd`] is an instruction set, [`tiles`] and [`shape`] describe memory, and [`threads`] shares out units of work.
//!
//! This folder has the crate's only unsafe code.

#![allow(unsafe_code)]
// generic code must be inlined into the function that enables the instruction set, or it is compiled without it
#![allow(clippy::inline_always)]
// vector code names dozens of intrinsics
#![allow(clippy::wildcard_imports)]
// buffers are aligned to cache lines, and everything that is not a whole line is accessed unaligned
#![allow(clippy::cast_ptr_alignment)]
// the links above are for readers of the source
#![allow(rustdoc::private_intra_doc_links)]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[doc(hidden)]
pub mod bench;
mod buffer;
mod choose;
mod copy;
mod cores;
mod engine;
#[cfg(target_arch = "x86_64")]
mod erf;
mod int8;
mod isa;
mod kernel;
mod linear;
mod math;
mod multiply;
mod net;
mod norm;
mod packed;
mod packing;
mod panel;
mod pass;
mod portable;
mod product;
#[cfg(target_arch = "x86_64")]
mod registers;
mod scale;
mod shape;
mod simd;
mod tensors;
#[cfg(test)]
mod tests;
mod threads;
mod tiles;
mod workspace;

pub use choose::precisions;
pub use cores::{available as hardware_threads, physical_cores};
pub use engine::{Engine, EngineOptions, Output};
pub use isa::Isa;
