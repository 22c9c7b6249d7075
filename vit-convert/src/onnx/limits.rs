//! Limits on what a file may declare, checked before anything is allocated.

/// Operator sets that are understood.
pub const OPSETS: std::ops::RangeInclusive<i64> = 7..=28;
/// Protobuf fields in all: a message costs up to 100 times its two bytes once it is decoded.
pub const FIELDS: usize = 4_000_000;
/// Messages within messages; an `If` within an `If` takes three.
pub const MESSAGE_DEPTH: usize = 64;
/// Bodies and function calls within one another.
pub const NESTING: usize = 24;
/// Nodes, with every function inlined.
pub const NODES: usize = 1 << 18;
/// Inputs, outputs and attribute elements of all nodes, with every function inlined.
pub const NODE_PARTS: usize = 1 << 22;
/// Bytes of all names of values and nodes, with every function inlined.
pub const NAME_BYTES: usize = 1 << 26;
/// Bytes of everything that is no tensor, as it is stored.
pub const GRAPH_BYTES: u64 = 1 << 28;
/// Dimensions of a tensor.
pub const RANK: usize = 32;
/// Files that hold external data.
pub const DATA_FILES: usize = 8192;
