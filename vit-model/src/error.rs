//! The one error type of this crate: what happened, where, what was expected and what was found.

use std::path::{Path, PathBuf};

/// The result of everything fallible here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model, an image or a request could not be used. Match the variant to tell kinds of failure apart.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder of a model could not be read or written: it does not exist, permission is denied, the disk is full.
    #[error("{}: {source}", path.display())]
    #[non_exhaustive]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A model's file exists but is not what it should be: damaged, of another format, or without a configuration.
    #[error("{}: {why}", path.display())]
    #[non_exhaustive]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found.
        why: String,
    },
    /// A model's tensor cannot be used.
    #[error("{}tensor `{name}`: {why}", place(path.as_deref()))]
    #[non_exhaustive]
    Tensor {
        /// The model's file or folder, if there is one.
        path: Option<PathBuf>,
        /// timm's name, or the file's own.
        name: String,
        /// What is wrong, to be matched.
        problem: TensorProblem,
        /// What was expected, what was found.
        why: String,
    },
    /// A configuration that no model can have.
    #[error("{}config: {why}", place(path.as_deref()))]
    #[non_exhaustive]
    Config {
        /// The model's file or folder, if there is one.
        path: Option<PathBuf>,
        /// The field, what was expected, what was found.
        why: String,
    },
    /// An image that could not be read, decoded or preprocessed.
    #[error("{}{why}", path.as_ref().map_or_else(|| "image: ".into(), |path| format!("{}: ", path.display())))]
    #[non_exhaustive]
    Image {
        /// The image's file, if it has one.
        path: Option<PathBuf>,
        /// What was expected, what was found.
        why: String,
        /// What the system said, if the file could not be read.
        source: Option<std::io::Error>,
    },
    /// An input other than an image that does not fit the model: a tensor of another shape, a block that does not exist.
    #[error("input: {0}")]
    Input(String),
    /// The model ran, but no answer can be made from its output: a logit or a feature is not finite.
    #[error("{0}")]
    Output(String),
    /// A model, a switch or a precision that this build or machine cannot run, or a question that this model cannot answer.
    #[error("{}not supported: {why}", place(path.as_deref()))]
    #[non_exhaustive]
    Unsupported {
        /// The model's file or folder, if there is one.
        path: Option<PathBuf>,
        /// What is not supported, and what is.
        why: String,
    },
    /// A device that this build does not support or that this machine does not have.
    #[error("device {device}: {why}")]
    #[non_exhaustive]
    Device {
        /// The device that was asked for, as `Device` displays it.
        device: String,
        /// Why it cannot be used.
        why: String,
    },
    /// The system has not enough memory.
    #[error("not enough memory for {what}, {bytes} bytes")]
    #[non_exhaustive]
    Memory {
        /// What it is needed for.
        what: String,
        /// How much could not be had in one piece.
        bytes: usize,
    },
    /// The Hub, or the connection to it.
    #[error("hub: {0}")]
    Hub(String),
    /// candle failed. Sizes are checked beforehand, so this is a lack of memory or a failing device.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// What is wrong with a tensor of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TensorProblem {
    /// The architecture has it, the checkpoint does not.
    Missing,
    /// The checkpoint has it, the architecture does not.
    LeftOver,
    /// Its shape or size is not the one that the architecture implies.
    Shape,
    /// It holds NaN or infinity.
    NotFinite,
    /// Anything else: its stored form cannot be read as what is needed.
    Other,
}

/// `path: `, if there is a path.
fn place(path: Option<&Path>) -> String {
    path.map(|path| format!("{}: ", path.display())).unwrap_or_default()
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

    /// A tensor that cannot be used for a reason other than those below.
    pub fn tensor(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self::problem(name, TensorProblem::Other, why)
    }

    /// A tensor that a checkpoint lacks.
    pub fn missing(name: impl Into<String>) -> Self {
        Self::problem(name, TensorProblem::Missing, "missing")
    }

    /// A tensor that cannot be used, by what is wrong with it.
    pub fn problem(name: impl Into<String>, problem: TensorProblem, why: impl Into<String>) -> Self {
        Self::Tensor { path: None, name: name.into(), problem, why: why.into() }
    }

    /// A configuration that no model can have.
    pub fn config(why: impl Into<String>) -> Self {
        Self::Config { path: None, why: why.into() }
    }

    /// An image that cannot be used.
    pub fn image(why: impl Into<String>) -> Self {
        Self::Image { path: None, why: why.into(), source: None }
    }

    /// Something that this build, machine or model cannot do.
    pub fn unsupported(why: impl Into<String>) -> Self {
        Self::Unsupported { path: None, why: why.into() }
    }

    /// A device that cannot be used.
    pub fn device(device: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Device { device: device.into(), why: why.into() }
    }

    /// The file or folder that this error is about, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Io { path, .. } | Self::File { path, .. } => Some(path),
            Self::Tensor { path, .. }
            | Self::Config { path, .. }
            | Self::Image { path, .. }
            | Self::Unsupported { path, .. } => path.as_deref(),
            Self::Input(_)
            | Self::Output(_)
            | Self::Device { .. }
            | Self::Memory { .. }
            | Self::Hub(_)
            | Self::Candle(_) => None,
        }
    }

    /// Names the file, unless the error names one already. The kind of the error stays what it is, except that one which
    /// has no room for a path becomes [`File`](Self::File).
    #[must_use]
    pub fn within(mut self, path: &Path) -> Self {
        match &mut self {
            Self::Tensor { path: own, .. }
            | Self::Config { path: own, .. }
            | Self::Image { path: own, .. }
            | Self::Unsupported { path: own, .. } => {
                own.get_or_insert_with(|| path.into());
                self
            }
            Self::Io { .. } | Self::File { .. } => self,
            Self::Input(_)
            | Self::Output(_)
            | Self::Device { .. }
            | Self::Memory { .. }
            | Self::Hub(_)
            | Self::Candle(_) => Self::file(path, self.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, TensorProblem};

    #[test]
    fn a_path_is_named_once_and_leaves_the_kind() {
        for (error, text) in [
            (Error::missing("head.bias"), "a/b: tensor `head.bias`: missing"),
            (Error::config("`depth` is 0"), "a/b: config: `depth` is 0"),
            (Error::image("truncated"), "a/b: truncated"),
            (Error::unsupported("swin"), "a/b: not supported: swin"),
            (Error::file("a/b", "damaged"), "a/b: damaged"),
            (Error::Input("2 images".into()), "a/b: input: 2 images"),
        ] {
            let kind = std::mem::discriminant(&error);
            let has_no_room = matches!(error, Error::Input(_));
            let error = error.within("a/b".as_ref()).within("c".as_ref());
            assert_eq!(error.to_string(), text);
            assert_eq!(error.path(), Some("a/b".as_ref()));
            assert!(has_no_room || std::mem::discriminant(&error) == kind, "{error}");
        }
        assert_eq!(Error::image("truncated").to_string(), "image: truncated");
        let missing = Error::missing("x");
        assert!(matches!(missing, Error::Tensor { problem: TensorProblem::Missing, path: None, .. }));
    }
}
