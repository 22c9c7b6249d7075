//! Which kernels this CPU has, which one is asked for, and how many threads there should be.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// A family of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Any CPU.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512, with its dot products in bf16 and in bytes where the CPU has them.
    Avx512,
    /// AMX tiles for bf16 and bytes, AVX-512 for the rest.
    Amx,
}

impl Isa {
    /// Every family, fastest first.
    pub const ALL: [Self; 4] = [Self::Amx, Self::Avx512, Self::Avx2, Self::Portable];

    /// As `VIT_CPU` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// Whether this CPU, and this build, has it.
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => super::avx2::Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => super::avx512::Avx512::<false>::detect().is_some(),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx => super::amx::Amx::detect().is_some(),
            #[allow(unreachable_patterns)] // on x86-64 Linux all are named above
            _ => false,
        }
    }

    /// The one that `VIT_CPU` asks for, or else the fastest there is.
    ///
    /// # Errors
    /// A `VIT_CPU` that is not a name, or that this CPU lacks.
    pub fn choose() -> Result<Self> {
        match std::env::var("VIT_CPU") {
            Ok(name) if !name.is_empty() => name.parse::<Self>()?.check(),
            Err(std::env::VarError::NotUnicode(name)) => {
                Err(Error::Unsupported(format!("VIT_CPU={}: choose amx, avx512, avx2 or portable", name.display())))
            }
            _ => Ok(Self::ALL.into_iter().find(|isa| isa.available()).unwrap_or(Self::Portable)),
        }
    }

    /// Itself, where this CPU has it.
    ///
    /// # Errors
    /// A CPU that lacks it.
    pub fn check(self) -> Result<Self> {
        if self.available() {
            return Ok(self);
        }
        let there: Vec<_> = Self::ALL.into_iter().filter(|isa| isa.available()).map(Self::name).collect();
        Err(Error::Unsupported(format!("this CPU has no {self}; it has {}", there.join(", "))))
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
            .ok_or_else(|| Error::Unsupported(format!("VIT_CPU={name}: choose amx, avx512, avx2 or portable")))
    }
}

/// Physical cores that this process may run on: the default number of threads.
pub fn physical_cores() -> usize {
    let allowed = available();
    #[cfg(target_os = "linux")]
    if let Some(cores) = linux_cores() {
        return cores.clamp(1, allowed);
    }
    allowed
}

/// Hardware threads that this process may use (affinity and, on Linux, the control group's quota).
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Cores among the allowed hardware threads: those whose first sibling they are.
#[cfg(target_os = "linux")]
fn linux_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let cpus = parse_list(list)?;
    let mut cores = std::collections::BTreeSet::new();
    for cpu in cpus {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        cores.insert(std::fs::read_to_string(path).ok()?.trim().to_owned());
    }
    Some(cores.len())
}

/// `0-3,8` → 0, 1, 2, 3, 8.
#[cfg(target_os = "linux")]
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last.saturating_sub(first) > 1 << 16 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
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
    fn there_is_always_a_kernel_and_a_core() {
        assert!(Isa::Portable.available());
        assert!((1..=available()).contains(&physical_cores()));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn cpu_lists() {
        assert_eq!(parse_list("\t0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_list("x"), None);
        assert_eq!(parse_list("0-99999999999"), None);
    }
}
