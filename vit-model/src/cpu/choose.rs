//! Chooses the kernel for an instruction set and a precision.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::int8::tiled;
#[cfg(target_arch = "x86_64")]
use super::int8::{mixed::Mixed, vnni::Vnni};
use super::isa::Isa;
use super::kernel::Kernel;
use super::multiply::{F32, Widened};
use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::{Error, Precision, Result};

/// A kernel, with the instruction set and the precision that it really has.
pub(super) type Chosen = (Box<dyn Kernel>, Isa, Precision);

/// The precisions in which kernels of an instruction set really compute on this CPU.
pub fn precisions(isa: Isa) -> Vec<Precision> {
    let all = [Precision::F32, Precision::Bf16x3, Precision::Bf16, Precision::Int8];
    let runs = |precision: &Precision| matches!(choose(isa, *precision), Ok((_, there, has)) if there == isa && has == *precision);
    all.into_iter().filter(runs).collect()
}

/// The kernel for an instruction set and a precision.
///
/// # Errors
/// The CPU lacks the instruction set, or the engine the precision.
pub(super) fn choose(isa: Isa, precision: Precision) -> Result<Chosen> {
    let lost = || Error::unsupported(format!("this CPU has no {isa}"));
    let no_bytes = || {
        Error::unsupported(format!(
            "precision int8 needs a CPU that multiplies bytes, in AMX tiles or with AVX-512's VNNI; {isa} has none"
        ))
    };
    if matches!(precision, Precision::F16 | Precision::Q8_0) {
        let why = format!("precision {precision} on a CPU; it has f32, bf16x3, bf16 and int8");
        return Err(Error::unsupported(why));
    }
    Ok(match isa {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Isa::Amx => {
            let amx = amx::Amx::detect().ok_or_else(lost)?;
            match precision {
                Precision::F32 => return choose(Isa::Avx512, precision),
                Precision::Bf16 => (Box::new(amx::Tiled::<amx::Registers, false>::new(amx)), isa, precision),
                Precision::Int8 => match amx.bytes() {
                    Some(bytes) => {
                        let floats = amx::Tiled::<amx::Registers, false>::new(amx);
                        let integers = tiled::Tiled::<amx::Registers>::new(bytes);
                        (Box::new(Mixed { floats, integers }), isa, precision)
                    }
                    None => return choose(Isa::Avx512, precision),
                },
                _ => (Box::new(amx::Tiled::<amx::Registers, true>::new(amx)), isa, Precision::Bf16x3),
            }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            let avx512 = avx512::Avx512::<false>::detect().ok_or_else(lost)?;
            if precision == Precision::Int8 {
                let integers = Vnni::detect().ok_or_else(no_bytes)?;
                let kernel: Box<dyn Kernel> = match avx512::Dot::detect() {
                    Some(dot) => Box::new(Mixed { floats: avx512::Bf16(dot), integers }),
                    None => Box::new(Mixed { floats: Widened(avx512), integers }),
                };
                return Ok((kernel, isa, precision));
            }
            match (precision, avx512::Dot::detect()) {
                (Precision::Bf16, Some(dot)) => (Box::new(avx512::Bf16(dot)), isa, Precision::Bf16),
                (Precision::Bf16, None) => (Box::new(Widened(avx512)), isa, Precision::Bf16),
                (Precision::Bf16x3, Some(dot)) => (Box::new(avx512::Bf16x3(dot)), isa, Precision::Bf16x3),
                _ => (Box::new(F32(avx512)), isa, Precision::F32),
            }
        }
        _ if precision == Precision::Int8 => return Err(no_bytes()),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            let avx2 = avx2::Avx2::detect().ok_or_else(lost)?;
            match precision {
                Precision::Bf16 => (Box::new(Widened(avx2)), isa, Precision::Bf16),
                _ => (Box::new(F32(avx2)), isa, Precision::F32),
            }
        }
        Isa::Portable => match precision {
            Precision::Bf16 => (Box::new(Widened(Portable)), isa, Precision::Bf16),
            _ => (Box::new(F32(Portable)), isa, Precision::F32),
        },
        #[allow(unreachable_patterns)] // on x86-64 Linux every variant is named above
        _ => return Err(lost()),
    })
}
