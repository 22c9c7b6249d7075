//! Why a graph could not be evaluated, with the node or the value.

/// Why a graph could not be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A node that ONNX Runtime would refuse too, or an operator that has no rule here.
    #[error("node `{node}` ({op}): {why}")]
    Node {
        /// The node's name.
        node: String,
        /// Its operator, with the domain unless that is `ai.onnx`.
        op: String,
        /// What it needs and what it has.
        why: String,
    },
    /// A value that nothing makes, or that does not fit what is declared.
    #[error("value `{name}`: {why}")]
    Value {
        /// The value's name.
        name: String,
        /// What was expected and what was found.
        why: String,
    },
}
