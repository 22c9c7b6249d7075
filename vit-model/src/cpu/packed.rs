//! A linear layer's weights, packed in panels.

use super::buffer::Buffer;
use super::shape::{Elements, Shape};

/// The weights of a linear layer: `y = W x + b`.
#[derive(Debug)]
pub(crate) struct PackedLinear {
    form: Form,
    panels: Buffer,
    /// A bias for every column; in int8 then a scale for every column, then the sum of every column's weights.
    bias: Buffer,
}

/// The form of a packed layer: layers of the same form can share memory one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    /// Outputs, without the columns of padding.
    pub(crate) n: usize,
    /// Inputs.
    pub(crate) k: usize,
    /// Each panel's first half is a gate, its second the values that it gates.
    pub(crate) gated: bool,
    pub(crate) shape: Shape,
}

impl PackedLinear {
    /// Allocates zeroed memory of this form, or reuses that of another layer of the same form. Packing overwrites the old
    /// contents, and the padding is still zero.
    pub(crate) fn of_form(form: Form, into: Option<Self>) -> Self {
        into.filter(|old| old.form == form).unwrap_or_else(|| {
            let columns = form.n.next_multiple_of(form.shape.cols);
            let parts = if form.shape.elements == Elements::Int8 { 3 } else { 1 };
            let chunks = form.k.div_ceil(form.shape.elements.chunk());
            Self {
                form,
                panels: Buffer::new(columns / form.shape.cols * form.shape.panel_bytes(chunks)),
                bias: Buffer::new(columns * size_of::<f32>() * parts),
            }
        })
    }

    /// The row of the weights that a column contains, if it is not padding.
    pub(crate) fn output(&self, column: usize) -> Option<usize> {
        let Form { n, gated, shape, .. } = self.form;
        if !gated {
            return (column < n).then_some(column);
        }
        let (half, outputs) = (shape.cols / 2, n / 2);
        let (panel, at) = (column / shape.cols, column % shape.cols);
        let output = panel * half + at % half;
        (output < outputs).then_some(if at < half { output } else { outputs + output })
    }

    /// Outputs, without the columns of padding.
    pub(crate) fn n(&self) -> usize {
        self.form.n
    }

    /// Inputs.
    pub(crate) fn k(&self) -> usize {
        self.form.k
    }

    /// Whether each panel's first half is a gate, and its second the values that it gates.
    pub(crate) fn gated(&self) -> bool {
        self.form.gated
    }

    pub(crate) fn shape(&self) -> Shape {
        self.form.shape
    }

    /// Number of panels.
    pub(crate) fn count(&self) -> usize {
        self.form.n.div_ceil(self.form.shape.cols)
    }

    /// Chunks of a panel.
    pub(crate) fn chunks(&self) -> usize {
        self.form.k.div_ceil(self.form.shape.elements.chunk())
    }

    /// Columns that a job writes for each row, including the padding of the last panel.
    pub(crate) fn width(&self) -> usize {
        self.padded() / if self.form.gated { 2 } else { 1 }
    }

    /// The address of a chunk of a panel. The memory lives as long as `self`.
    pub(crate) fn panel(&self, panel: usize, chunk: usize) -> *mut u8 {
        self.panels.ptr().wrapping_add(self.form.shape.panel_bytes(panel * self.chunks() + chunk))
    }

    /// The address of the biases of a panel's columns, which are zero if the layer has none.
    pub(crate) fn bias(&self, panel: usize) -> *mut f32 {
        self.bias.ptr().cast::<f32>().wrapping_add(panel * self.form.shape.cols)
    }

    /// Columns including padding. In int8 a column's scale is this far behind its bias, and its sum as far behind that.
    #[inline(always)]
    pub(crate) fn padded(&self) -> usize {
        self.count() * self.form.shape.cols
    }

    /// Bytes of the packed copy.
    pub(crate) fn bytes(&self) -> usize {
        self.panels.len() + self.bias.len()
    }
}
