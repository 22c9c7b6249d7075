//! Constants as views of stored elements. They are transposed, cut and combined without being read, and read once when
//! they are written.

mod combine;
mod gather;
#[cfg(test)]
mod tests;
mod view;

pub use gather::round;
pub use view::{Array, Blocks, FOLD_LIMIT, Origin};
