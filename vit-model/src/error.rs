//! The one error type of this crate: what happened, where, what was expected and what was found.

use std::path::PathBuf;

/// The result of everything fallible here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model, an image or a request could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is there, but is not what it should be.
    #[error("{}: {why}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found.
        why: String,
    },
    /// A configuration that no model can have.
    #[error("config: {0}")]
    Config(String),
    /// A tensor that is missing, left over, of the wrong shape or not finite.
    #[error("tensor `{name}`: {why}")]
    Tensor {
        /// timm's name, or the file's own.
        name: String,
        /// What was expected, what was found.
        why: String,
    },
    /// An input whose shape does not fit the model.
    #[error("input: {0}")]
    Input(String),
    /// An image that could not be read or preprocessed.
    #[error("image: {0}")]
    Image(String),
    /// A model, a switch or a device that this build or machine cannot run.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The Hub, or the way to it.
    #[error("hub: {0}")]
    Hub(String),
    /// candle failed; with sizes checked beforehand this is a lack of memory or of a device.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// An I/O error with its path.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// A file that is not what it should be.
    pub fn file(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::File { path: path.into(), why: why.into() }
    }

    /// A tensor that does not fit.
    pub fn tensor(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), why: why.into() }
    }

    /// Names the file, unless the error does already.
    #[must_use]
    pub fn within(self, path: &std::path::Path) -> Self {
        match self {
            Self::Io { .. } | Self::File { .. } => self,
            other => Self::File { path: path.into(), why: other.to_string() },
        }
    }
}
