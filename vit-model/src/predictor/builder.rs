//! How a model is to be opened.

use super::backend::{Kernel, Loading, Runtime};
use crate::device::Device;
#[cfg(feature = "image")]
use crate::image::Orientation;
use crate::precision::Precision;

/// How a [`Predictor`](super::Predictor) is to run; made by [`Predictor::builder`](super::Predictor::builder).
#[derive(Clone, Debug, Default)]
#[must_use = "a builder does nothing until it opens a model"]
pub struct Builder {
    pub(super) device: Device,
    pub(super) precision: Precision,
    pub(super) threads: Option<usize>,
    pub(super) runtime: Runtime,
    pub(super) loading: Loading,
    pub(super) kernel: Option<Kernel>,
    #[cfg(feature = "image")]
    pub(super) orientation: Orientation,
}

impl Builder {
    /// Where to run; the default is [`Device::Auto`].
    pub fn device(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// How exactly to compute; the default is [`Precision::Auto`].
    pub fn precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// CPU threads, for the model and for reading images ahead. The default is the physical cores that this process may
    /// use.
    pub fn threads(self, threads: usize) -> Self {
        Self { threads: Some(threads.max(1)), ..self }
    }

    /// What runs the model on a CPU; the default is [`Runtime::Auto`].
    pub fn runtime(self, runtime: Runtime) -> Self {
        Self { runtime, ..self }
    }

    /// What the CPU engine does with the weights; the default is [`Loading::Held`].
    pub fn loading(self, loading: Loading) -> Self {
        Self { loading, ..self }
    }

    /// The CPU engine's kernel. The default is what the environment variable `VIT_CPU` names, and without that the fastest
    /// that this CPU has.
    pub fn kernel(self, kernel: Kernel) -> Self {
        Self { kernel: Some(kernel), ..self }
    }

    /// Whether images are turned upright as their EXIF says; the default is [`Orientation::Exif`].
    #[cfg(feature = "image")]
    pub fn orientation(self, orientation: Orientation) -> Self {
        Self { orientation, ..self }
    }
}
