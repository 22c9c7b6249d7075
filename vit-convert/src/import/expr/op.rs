//! What an expression can be: its operation, with the constants that belong to it.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use vit_model::config::Activation;

use crate::import::array::Array;

/// Index of an expression.
pub type Id = u32;

/// A constant inside of an expression.
pub type Constant = Arc<Array>;

/// A number inside of an expression, compared by its bits.
#[derive(Clone, Copy, Debug)]
pub struct Number(pub f64);

impl PartialEq for Number {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl Eq for Number {}

impl Hash for Number {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}

/// Where the channels of the image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channels {
    /// `[batch, channels, height, width]`
    First,
    /// `[batch, height, width, channels]`
    Last,
}

impl Channels {
    /// The base axes of channels, height and width.
    pub fn axes(self) -> [u8; 3] {
        match self {
            Self::First => [1, 2, 3],
            Self::Last => [3, 1, 2],
        }
    }
}

/// Functions that are no activation by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Func {
    Erf,
    Tanh,
    Sigmoid,
    Exp,
    Log,
}

/// An operation on top of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Head {
    Softmax,
    LogSoftmax,
    Sigmoid,
    ArgMax,
    TopK,
    /// Divided by its Euclidean length.
    Unit,
}

/// How tokens are pooled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum PoolKind {
    Mean,
    Max,
}

/// What an expression computes from its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// The image, axes as in the file.
    Input,
    /// The image as integers, before the cast.
    Raw,
    /// `Conv(scale·x + shift)` with stride = kernel, as tokens: weight `[out, in, h, w]`, bias `[out]`.
    Patch {
        /// `[out, in, h, w]`
        weight: Constant,
        /// `[out]`
        bias: Option<Constant>,
        /// Rows and columns of patches.
        grid: [usize; 2],
        /// Where the image's channels are.
        channels: Channels,
        /// What is done to a pixel before: `(scale, shift)` for each channel; empty for nothing.
        pixels: Vec<(Number, Number)>,
    },
    /// A parameter as tokens: `[1 or batch, tokens, channels]`.
    Param(Constant),
    /// Concatenated tokens.
    Cat,
    /// The channels of single tokens, one behind the other.
    Beside,
    /// `shape[1]` tokens from `start`.
    Sel {
        /// The first token.
        start: usize,
    },
    /// `x Wᵀ + b`: weight `[out, in]`, bias `[out]`.
    Linear {
        /// `[out, in]`
        weight: Constant,
        /// `[out]`
        bias: Option<Constant>,
    },
    /// A linear over quantised channels, still without the factor of its input.
    IntLinear {
        /// Integers `[out, in]`.
        codes: Constant,
        /// The zero point.
        zero: Option<Constant>,
    },
    /// A patch embedding over quantised pixels, still without the factor of its input.
    IntPatch {
        /// Integers `[out, in, h, w]`.
        codes: Constant,
        /// The zero point.
        zero: Option<Constant>,
    },
    /// LayerNorm over each group of channels.
    Norm {
        /// The number added to the variance.
        eps: Number,
        /// `[group]`
        gain: Option<Constant>,
        /// `[group]`
        bias: Option<Constant>,
        /// Channels that are normed together.
        group: usize,
    },
    /// `q kᵀ` per head, unscaled.
    Scores {
        /// The number of heads.
        heads: usize,
    },
    /// Softmax over the last axis.
    Softmax,
    /// `softmax(scale · q kᵀ) v` per head.
    Attn {
        /// The number of heads.
        heads: usize,
        /// The factor of the scores.
        scale: Number,
    },
    /// The sum of two.
    Add,
    /// The product of two.
    Mul,
    /// Plus a number.
    AddS(Number),
    /// Times a number.
    Scale(Number),
    /// To a power.
    Pow(Number),
    /// Plus a constant over the base axes (size 1 along axes that it does not depend on).
    AddC(Constant),
    /// Times a constant over the base axes (size 1 along axes that it does not depend on).
    MulC(Constant),
    /// The mean of each group along an axis, in every position of the group.
    Mean {
        /// The base axis.
        axis: u8,
        /// Positions of a group.
        group: usize,
    },
    /// The maximum along an axis, in every position.
    Max {
        /// The base axis.
        axis: u8,
    },
    /// `x - mean(x)` over each group of channels.
    Centred {
        /// Channels of a group.
        group: usize,
    },
    /// One token from many.
    Pool {
        /// How.
        kind: PoolKind,
        /// The first token.
        lo: usize,
        /// How many.
        n: usize,
    },
    /// An activation of the family.
    Act(Activation),
    /// A function.
    Func(Func),
    /// True where the argument is NaN.
    IsNan,
    /// On top of logits.
    Out(Head),
}

/// An expression.
#[derive(Clone, Debug)]
pub struct Expr {
    /// What it computes.
    pub op: Op,
    /// From what.
    pub args: Vec<Id>,
    /// Sizes of the base axes.
    pub shape: Vec<usize>,
    /// The node that was being evaluated when it was made first.
    pub born: u32,
}
