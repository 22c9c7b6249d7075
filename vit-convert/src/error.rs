//! The one error type of this crate: what happened, in which file, at which node, and what to do about it.

use std::path::{Path, PathBuf};

/// The result of everything fallible here.
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
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is there, but is not what it should be.
    #[error("{}: {why}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found, what to do.
        why: String,
    },
    /// The graph as a whole cannot be used.
    #[error("{0}")]
    Graph(String),
    /// A node that cannot be used.
    #[error("node `{node}` ({op}): {why}")]
    Node {
        /// The file's name for it, or `op#index` where it has none.
        node: String,
        /// Its operator, with the domain where that is not ONNX's own.
        op: String,
        /// What was expected, what was found.
        why: String,
    },
    /// A constant of the file, or a tensor of the model, that cannot be used.
    #[error("tensor `{name}`: {why}")]
    Tensor {
        /// The file's name for it.
        name: String,
        /// What was expected, what was found.
        why: String,
    },
    /// The converted model does not compute what the file computes.
    #[error("verification failed: {0}")]
    Verify(#[from] crate::verify::Error),
    /// An error with the file that it happened in.
    #[error("{}: {source}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: Box<Error>,
    },
    /// An error of the model's library.
    #[error(transparent)]
    Model(#[from] vit_model::Error),
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

    /// A graph that cannot be used.
    pub fn graph(why: impl Into<String>) -> Self {
        Self::Graph(why.into())
    }

    /// A node that cannot be used.
    pub fn node(node: &crate::graph::Node, why: impl Into<String>) -> Self {
        Self::Node { node: node.name.clone(), op: node.operator(), why: why.into() }
    }

    /// A tensor that cannot be used.
    pub fn tensor(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), why: why.into() }
    }

    /// Names the file, unless the error does already.
    #[must_use]
    pub fn at(self, path: &Path) -> Self {
        match self {
            Self::Io { .. } | Self::File { .. } | Self::In { .. } => self,
            Self::Model(vit_model::Error::Io { .. } | vit_model::Error::File { .. }) => self,
            other => Self::In { path: path.into(), source: Box::new(other) },
        }
    }
}
