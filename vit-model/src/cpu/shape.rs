//! How matrices are laid out in memory: weights in panels, activations in tiles, both in the order in which a product reads them.
//!
//! Everything is cut along K into *chunks* of 64 bytes per row: 16 values in f32, 32 in bf16, 64 in int8. The left side of a
//! product is cut into tiles of rows, `[tile][chunk][row][64 bytes]`; the right side into panels of columns,
//! `[panel][chunk][run][16][column of the run]`. In bf16 pairs along K are adjacent, and in int8 groups of four, because the
//! dot-product instructions read them so. Padding is zero.

/// Bytes of a row in a chunk.
pub(crate) const CHUNK_BYTES: usize = 64;

/// The elements of the two sides of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Elements {
    /// f32 on both sides.
    F32,
    /// Weights in bf16, which are widened to f32 before the product; activations in f32.
    Widened,
    /// bf16 on both sides.
    Bf16,
    /// bf16 twice on both sides: the rounded value, and the rounding error.
    Bf16x3,
    /// Bytes on both sides, with a scale for each row of activations and each column of weights.
    Int8,
}

impl Elements {
    /// Values of a row in a chunk of activations.
    pub(crate) const fn chunk(self) -> usize {
        match self {
            Self::F32 | Self::Widened => 16,
            Self::Bf16 | Self::Bf16x3 => 32,
            Self::Int8 => 64,
        }
    }

    /// Whether activations are rounded to bf16 or coarser.
    pub(crate) const fn rounds(self) -> bool {
        matches!(self, Self::Bf16 | Self::Int8)
    }

    /// Planes of activations: the values, and with bf16x3 their rounding errors.
    pub(crate) const fn planes(self) -> usize {
        if matches!(self, Self::Bf16x3) { 2 } else { 1 }
    }

    /// Bytes of one column of one chunk of weights.
    pub(crate) const fn column_bytes(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::Int8 => 64,
            Self::Widened => 32,
            Self::Bf16x3 => 128,
        }
    }
}

/// The shape of tiles and panels that a kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) elements: Elements,
    /// Rows of a tile of activations.
    pub(crate) tile: usize,
    /// Columns of a panel of weights.
    pub(crate) cols: usize,
    /// Adjacent columns in a panel.
    pub(crate) run: usize,
}

impl Shape {
    /// Whether a layer whose weights have the shape `linear` can write activations of this shape: integers are read, but never
    /// written, by a layer.
    pub(crate) fn is_written_by(self, linear: Self) -> bool {
        self.tile == linear.tile && (linear.elements == Elements::Int8 || self.elements == linear.elements)
    }

    /// Bytes of a panel of `chunks` chunks.
    pub(crate) const fn panel_bytes(self, chunks: usize) -> usize {
        chunks * self.cols * self.elements.column_bytes()
    }
}
