//! Where a model runs.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The first GPU that this build supports and this machine has, and the CPU otherwise. This is the only choice that
    /// falls back; [`Backend`](crate::predictor::Backend) reports what was chosen and why.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this number, counted from 0 among those that `CUDA_VISIBLE_DEVICES` shows. Needs the feature
    /// `cuda`.
    Cuda(usize),
    /// The Apple GPU of this number. Needs the feature `metal`.
    Metal(usize),
}

impl Device {
    /// candle's handle of this device, for tensors and modules of one's own.
    ///
    /// # Errors
    /// [`Error::Device`] if this build does not support the device or the machine does not have it. [`Auto`](Self::Auto)
    /// never fails.
    pub fn to_candle(self) -> Result<candle_core::Device> {
        self.probe().map(|(device, _)| device)
    }

    /// As [`to_candle`](Self::to_candle), and the reason if [`Auto`](Self::Auto) could not use a GPU that this build
    /// supports.
    pub(crate) fn probe(self) -> Result<(candle_core::Device, Option<String>)> {
        let cuda = |ordinal| candle_core::Device::new_cuda(ordinal).map_err(|error| first_line(&error));
        let metal = |ordinal| candle_core::Device::new_metal(ordinal).map_err(|error| first_line(&error));
        let refuse = |why: String| Err(Error::device(self.to_string(), why));
        let found = match self {
            Self::Cpu => return Ok((candle_core::Device::Cpu, None)),
            Self::Cuda(_) if !cfg!(feature = "cuda") => {
                return refuse("this program was built without CUDA (cargo build --features cuda)".into());
            }
            Self::Metal(_) if !cfg!(feature = "metal") => {
                return refuse("this program was built without Metal (cargo build --features metal)".into());
            }
            Self::Cuda(ordinal) => cuda(ordinal).map_err(|why| {
                format!(
                    "no usable CUDA device: {why}. It takes an NVIDIA GPU, its driver, and a CUDA_VISIBLE_DEVICES that does \
                     not hide it; the device `cpu` needs none, and `auto` uses a GPU only if there is one"
                )
            }),
            Self::Metal(ordinal) => metal(ordinal).map_err(|why| format!("no usable Metal device: {why}")),
            // `candle_core::utils::cuda_is_available` only says how candle was built, so the device itself is tried
            Self::Auto => {
                let found = match () {
                    () if cfg!(feature = "cuda") => cuda(0),
                    () if cfg!(feature = "metal") => metal(0),
                    () => return Ok((candle_core::Device::Cpu, None)),
                };
                return Ok(match found {
                    Ok(device) => (device, None),
                    Err(why) => (candle_core::Device::Cpu, Some(format!("no GPU ({why})"))),
                });
            }
        };
        found.map_or_else(refuse, |device| Ok((device, None)))
    }
}

/// With `RUST_BACKTRACE` candle's errors have a backtrace below their first line.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Metal(0) => f.write_str("metal"),
            Self::Metal(ordinal) => write!(f, "metal:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// `auto`, `cpu`, `cuda` or `metal`; a GPU may be followed by its number, as in `cuda:1`.
    fn from_str(name: &str) -> Result<Self> {
        let (kind, ordinal) = name.split_once(':').unwrap_or((name, "0"));
        match (kind, ordinal.parse()) {
            ("auto", _) if kind == name => Ok(Self::Auto),
            ("cpu", _) if kind == name => Ok(Self::Cpu),
            ("cuda", Ok(ordinal)) => Ok(Self::Cuda(ordinal)),
            ("metal", Ok(ordinal)) => Ok(Self::Metal(ordinal)),
            _ => Err(Error::Device {
                device: name.into(),
                why: "there is no such device: choose auto, cpu, cuda or metal, or a GPU by its number, as in cuda:1"
                    .into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Device;
    use crate::Error;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for device in [Device::Auto, Device::Cpu, Device::Cuda(0), Device::Cuda(3), Device::Metal(0), Device::Metal(1)]
        {
            assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
        }
        for name in ["", "gpu", "cpu:1", "cuda:x", "cuda:-1"] {
            assert!(matches!(name.parse::<Device>(), Err(Error::Device { device, .. }) if device == name), "{name}");
        }
    }

    #[test]
    fn only_auto_falls_back() {
        assert!(Device::Auto.to_candle().is_ok() && Device::Cpu.to_candle().unwrap().is_cpu());
        if !cfg!(feature = "cuda") {
            let error = Device::Cuda(0).to_candle().unwrap_err();
            assert!(error.to_string().contains("built without CUDA"), "{error}");
        }
        if !cfg!(feature = "metal") {
            assert!(matches!(Device::Metal(1).to_candle(), Err(Error::Device { device, .. }) if device == "metal:1"));
        }
    }
}
