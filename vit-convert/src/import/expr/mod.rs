//! The algebra: interned canonical expressions. Every constructor normalises, so every spelling of a LayerNorm, an
//! activation or attention becomes the same expression.
//!
//! Expressions of the trunk have the base axes (batch, tokens, channels); the image (batch and three more) and
//! attention scores (batch, heads, queries, keys) have four. Ids are topological: an argument's id is smaller than its
//! user's.
//!
//! What the rules rely on:
//! - scalars move outward: `s·x + c` is `s·(x + c/s)`, and an expression never contains a factor that it could pass on;
//! - `Sqrt`, `Reciprocal` and `Div` are powers; `x·x` is `x²`;
//! - a reduction keeps its base axes (the value is constant along the reduced axis), and views drop the digits;
//! - a selection of channels becomes rows of the linear that makes them; a selection of tokens stays in the view;
//! - a bias or gain is merged into a bare linear, patch embedding or norm; adding a constant distributes over a `Cat`.

mod arithmetic;
mod attention;
mod constants;
mod op;
mod scalars;
mod show;
mod table;
#[cfg(test)]
mod tests;
mod tokens;

pub use op::{Channels, Constant, Func, Head, Id, Number, Op, PoolKind};
pub use table::Exprs;
