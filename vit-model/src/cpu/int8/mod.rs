//! Integers in the blocks' linear layers, and floats in everything else.
//!
//! Weights are signed bytes with a scale for each output. Activations are unsigned bytes with a scale and a zero point for each
//! row, which is known once the row is complete. They are unsigned because GELU's output is never below −0.17, which would
//! waste half of a signed byte. Sums are exact in 32 bits, and are converted to f32 when the bias is added.
//!
//! `x86` has what such kernels share; `tiled` multiplies in AMX tiles, `vnni` in vectors.

#[cfg(target_arch = "x86_64")]
pub(crate) mod mixed;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod tiled;
#[cfg(target_arch = "x86_64")]
pub(crate) mod vnni;
#[cfg(target_arch = "x86_64")]
mod x86;
