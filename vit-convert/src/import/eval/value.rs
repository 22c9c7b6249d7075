//! What an edge of the graph carries while it is walked, and the result of a rule.

use std::rc::Rc;

use crate::import::array::Array;
use crate::import::axes::{self, Dim};
use crate::import::expr::Id;

/// The result of a rule, or why it does not fit.
pub(crate) type Rule<T = Vec<Value>> = std::result::Result<T, String>;

/// Fails a rule, with a reason, unless a condition holds.
macro_rules! need {
    ($cond:expr, $($why:tt)+) => {
        if !$cond {
            return Err(format!($($why)+));
        }
    };
}
pub(crate) use need;

/// A view of an expression: for each dimension of the tensor its digits over the base axes.
#[derive(Clone, Debug)]
pub struct View {
    /// The base.
    pub e: Id,
    /// Digits over its axes.
    pub dims: Vec<Dim>,
    /// `(start, len)`: these tokens of the base alone; digits of axis 1 count inside of them.
    pub sel: Option<(usize, usize)>,
}

impl View {
    /// The sizes of the dimensions.
    pub fn shape(&self) -> Vec<usize> {
        axes::shape(&self.dims)
    }

    /// The same, laid out otherwise.
    pub fn with(&self, dims: Vec<Dim>) -> Self {
        Self { e: self.e, dims, sel: self.sel }
    }

    /// Another expression of the same layout.
    pub fn of(&self, e: Id) -> Self {
        Self { e, dims: self.dims.clone(), sel: self.sel }
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }
}

/// A constant.
#[derive(Clone, Debug)]
pub struct Const {
    /// Its elements.
    pub array: Array,
    /// The two parameters whose sum it is, if the graph adds them.
    pub terms: Option<Rc<(Array, Array)>>,
}

/// What an edge of the graph carries.
#[derive(Clone, Debug, Default)]
pub enum Value {
    /// An optional input or output that is absent.
    #[default]
    None,
    /// Known elements.
    Const(Const),
    /// A canonical expression, laid out.
    View(View),
    /// A sequence.
    Seq(Rc<Vec<Value>>),
    /// The run-time factor or zero point of a quantised activation.
    Factor(Factor),
    /// Not understood; the number of the obstacle.
    Opaque(u32),
}

impl From<Array> for Value {
    fn from(array: Array) -> Self {
        Self::Const(Const { array, terms: None })
    }
}

impl From<View> for Value {
    fn from(view: View) -> Self {
        Self::View(view)
    }
}

impl Value {
    /// The sizes of the dimensions.
    pub(crate) fn shape(&self) -> Rule<Vec<usize>> {
        match self {
            Self::Const(c) => Ok(c.array.shape()),
            Self::View(v) => Ok(v.shape()),
            Self::Factor(f) => Ok(f.shape()),
            Self::None => Err("an input is missing".into()),
            Self::Seq(_) => Err("a sequence where a tensor belongs".into()),
            Self::Opaque(_) => Err("an operand that is not understood".into()),
        }
    }

    /// A constant.
    pub(crate) fn array(&self, what: &str) -> Rule<&Array> {
        match self {
            Self::Const(c) => Ok(&c.array),
            Self::None => Err(format!("{what} is missing")),
            _ => Err(format!("{what} is computed from the image")),
        }
    }

    /// An activation.
    pub(crate) fn view(&self, what: &str) -> Rule<&View> {
        match self {
            Self::View(v) => Ok(v),
            Self::None => Err(format!("{what} is missing")),
            _ => Err(format!("{what} does not depend on the image")),
        }
    }

    /// A short list of integers.
    pub(crate) fn ints(&self, what: &str) -> Rule<Vec<i64>> {
        let a = self.array(what)?;
        need!(!a.dtype.is_float(), "{what} is not a list of integers");
        need!(a.len() <= 1 << 16, "{what} has {} elements", a.len());
        Ok(a.i64s())
    }

    pub(crate) fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

/// What `DynamicQuantizeLinear` computes at run time: the factor of an activation (times a constant), or its zero
/// point.
#[derive(Clone, Debug)]
pub struct Factor {
    /// The activation.
    pub of: Id,
    /// A constant times the factor; `None` for the zero point.
    pub times: Option<Array>,
}

impl Factor {
    /// As a tensor.
    fn shape(&self) -> Vec<usize> {
        self.times.as_ref().map_or_else(Vec::new, Array::shape)
    }
}

/// An axis that may be negative, within a rank.
pub(crate) fn axis_in(axis: i64, rank: usize) -> Rule<usize> {
    let at = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(at).ok().filter(|&a| a < rank).ok_or_else(|| format!("axis {axis} of a tensor of rank {rank}"))
}
