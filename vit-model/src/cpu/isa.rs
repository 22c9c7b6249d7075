//! The families of kernels: which of them this CPU has, and which one the user asks for.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// An instruction set that the CPU engine has kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, for any CPU.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512, with its dot products in bf16 and int8 if the CPU has them.
    Avx512,
    /// AMX tiles for bf16 and int8, AVX-512 for the rest.
    Amx,
}

impl Isa {
    /// Every instruction set, fastest first.
    pub const ALL: [Self; 4] = [Self::Amx, Self::Avx512, Self::Avx2, Self::Portable];

    /// The name that `VIT_CPU` accepts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// Whether this CPU and this build support it.
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => super::avx2::Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => super::avx512::Avx512::<false>::detect().is_some(),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx => super::amx::Amx::detect().is_some(),
            #[allow(unreachable_patterns)] // on x86-64 Linux every variant is named above
            _ => false,
        }
    }

    /// The instruction set that the environment variable `VIT_CPU` names, or the fastest that is available.
    ///
    /// # Errors
    /// `VIT_CPU` is not a name, or names an instruction set that this CPU lacks.
    pub fn choose() -> Result<Self> {
        match std::env::var("VIT_CPU") {
            Ok(name) if !name.is_empty() => name.parse::<Self>()?.check(),
            Err(std::env::VarError::NotUnicode(name)) => {
                Err(Error::unsupported(format!("VIT_CPU={}: choose amx, avx512, avx2 or portable", name.display())))
            }
            _ => Ok(Self::ALL.into_iter().find(|isa| isa.available()).unwrap_or(Self::Portable)),
        }
    }

    /// Itself, if it is available.
    ///
    /// # Errors
    /// This CPU lacks it.
    pub fn check(self) -> Result<Self> {
        if self.available() {
            return Ok(self);
        }
        let there: Vec<_> = Self::ALL.into_iter().filter(|isa| isa.available()).map(Self::name).collect();
        Err(Error::unsupported(format!("this CPU has no {self}; it has {}", there.join(", "))))
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let same = |isa: &Self| isa.name() == name;
        Self::ALL
            .into_iter()
            .find(same)
            .ok_or_else(|| Error::unsupported(format!("VIT_CPU={name}: choose amx, avx512, avx2 or portable")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse::<Isa>().unwrap(), isa);
        }
        let error = "sse".parse::<Isa>().unwrap_err().to_string();
        assert!(error.contains("amx, avx512, avx2 or portable"), "{error}");
    }

    #[test]
    fn there_is_always_a_kernel() {
        assert!(Isa::Portable.available());
    }
}
