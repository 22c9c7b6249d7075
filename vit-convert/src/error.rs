//! The error type of this crate. A message says what happened, in which file and at which node, and what to do about it.

use std::path::{Path, PathBuf};

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model was not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file exists but cannot be used.
    #[error("{}: {why}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        why: String,
    },
    /// The graph as a whole cannot be used.
    #[error("{0}")]
    Graph(String),
    /// A node cannot be used.
    #[error("node `{node}` ({op}): {why}")]
    Node {
        /// The node's name in the file, or `op#index` if it has none.
        node: String,
        /// Its operator, with the domain unless that is ONNX's own.
        op: String,
        /// What was expected and what was found.
        why: String,
    },
    /// A constant in the file, or a tensor of the model, cannot be used.
    #[error("tensor `{name}`: {why}")]
    Tensor {
        /// Its name in the file.
        name: String,
        /// What was expected and what was found.
        why: String,
    },
    /// The converted model does not compute what the graph computes.
    #[error("verification failed: {0}")]
    Verify(#[from] crate::verify::error::Error),
    /// Another error, with the file that caused it.
    #[error("{}: {source}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// The error.
        source: Box<Error>,
    },
    /// An error from `vit_model`.
    #[error(transparent)]
    Model(#[from] vit_model::Error),
}

impl Error {
    /// Returns a function that adds `path` to an I/O error.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// A file that exists but cannot be used.
    pub fn file(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::File { path: path.into(), why: why.into() }
    }

    /// A graph that cannot be used.
    pub fn graph(why: impl Into<String>) -> Self {
        Self::Graph(why.into())
    }

    /// A tensor that cannot be used.
    pub fn tensor(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), why: why.into() }
    }

    /// Adds the file to the error, unless it already names one.
    #[must_use]
    pub fn at(self, path: &Path) -> Self {
        match self {
            Self::Io { .. } | Self::File { .. } | Self::In { .. } => self,
            Self::Model(error) if error.path().is_some() => Self::Model(error),
            other => Self::In { path: path.into(), source: Box::new(other) },
        }
    }
}
