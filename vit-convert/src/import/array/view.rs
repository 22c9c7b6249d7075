//! A constant: a view, by digits, of elements that are stored or computed, and reading those elements.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;

use super::gather::{gathered, round};
use crate::import::axes::{self, BROADCAST, Dim, Pick};
use crate::onnx::graph::{DType, Tensor, ValueId};

/// Constants of up to this many elements are computed during the import. Larger ones are only viewed, because they are
/// weights.
pub const FOLD_LIMIT: usize = 1 << 22;

/// Combined constants may nest this deep (a sum of a product of a concatenation …).
const DEPTH_LIMIT: usize = 12;

/// Where the elements of an [`Array`] come from.
#[derive(Debug)]
pub enum Origin {
    /// A constant of the file.
    Stored {
        /// The initializer, or the output of the `Constant` node.
        value: ValueId,
        /// Its elements.
        tensor: Tensor,
    },
    /// Computed while importing.
    Computed(Tensor),
    /// `(codes - zero) * scale`, all of one shape.
    Dequantised {
        /// Integers.
        codes: Array,
        /// Factors.
        scale: Array,
        /// The zero point.
        zero: Option<Array>,
    },
    /// Rows of codes of a few bits each, in blocks that share a scale (`com.microsoft.MatMulNBits`).
    Blocks(Blocks),
    /// Element by element, of one shape.
    Product(Array, Array),
    /// Element by element, of one shape.
    Sum(Array, Array),
    /// Joined along the first dimension.
    Concat(Vec<Array>),
    /// `bias[o] + Σ weight[o, c, …] · shift[c]`: a bias that takes in what a patch embedding adds to the pixels.
    Shifted {
        /// `[out, in, …]`
        weight: Array,
        /// One value for each input channel.
        shift: Vec<f64>,
        /// `[out]`
        bias: Option<Array>,
    },
}

/// The operands of `com.microsoft.MatMulNBits`.
#[derive(Debug)]
pub struct Blocks {
    /// Output channels.
    pub n: usize,
    /// Input channels.
    pub k: usize,
    /// Bits of a code: 2, 4 or 8.
    pub bits: usize,
    /// Codes that share a scale.
    pub block: usize,
    /// `[n, blocks, block * bits / 8]` bytes, the low bits first.
    pub codes: Array,
    /// `[n * blocks]`
    pub scales: Array,
    /// `[n, ⌈blocks * bits / 8⌉]` bytes, or floats `[n * blocks]`. The middle code if absent.
    pub zeros: Option<Array>,
}

/// A constant: a view of the elements of its origin.
#[derive(Clone, Debug)]
pub struct Array {
    pub(super) origin: Arc<Origin>,
    pub(super) offset: usize,
    pub(super) dims: Vec<Dim>,
    /// The element type in the graph. A cast between float types changes only this, not what is stored.
    pub dtype: DType,
}

impl PartialEq for Array {
    fn eq(&self, other: &Self) -> bool {
        self.offset == other.offset && self.dims == other.dims && self.origin.same(&other.origin)
    }
}

impl Eq for Array {}

impl Hash for Array {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.offset, &self.dims).hash(state);
        match &*self.origin {
            Origin::Stored { tensor, .. } | Origin::Computed(tensor) => (tensor.data.len(), tensor.dtype).hash(state),
            other => std::mem::discriminant(other).hash(state),
        }
    }
}

/// Constants of up to this many bytes are compared by value. Larger ones are equal if they are the same range of the
/// file.
const COMPARE_BYTES: usize = 1 << 12;

impl Origin {
    pub(super) fn same(self: &Arc<Self>, other: &Arc<Self>) -> bool {
        if Arc::ptr_eq(self, other) {
            return true;
        }
        match (&**self, &**other) {
            (
                Self::Stored { tensor: a, .. } | Self::Computed(a),
                Self::Stored { tensor: b, .. } | Self::Computed(b),
            ) => {
                a.dtype == b.dtype
                    && a.data.len() == b.data.len()
                    && (a.data.same_place(&b.data) || (a.data.len() <= COMPARE_BYTES && a.data == b.data))
            }
            (Self::Dequantised { codes: a, scale: s, zero: z }, Self::Dequantised { codes: b, scale: t, zero: y }) => {
                a == b && s == t && z == y
            }
            (Self::Product(a, b) | Self::Sum(a, b), Self::Product(c, d) | Self::Sum(c, d)) => {
                std::mem::discriminant(&**self) == std::mem::discriminant(&**other) && a == c && b == d
            }
            (Self::Concat(a), Self::Concat(b)) => a == b,
            _ => false,
        }
    }

    fn depth(&self) -> usize {
        let of = |list: &[&Array]| list.iter().map(|a| a.origin.depth()).max().unwrap_or(0) + 1;
        match self {
            Self::Stored { .. } | Self::Computed(_) => 0,
            Self::Dequantised { codes, scale, zero } => {
                zero.iter().chain([codes, scale]).map(|a| a.origin.depth()).max().unwrap_or(0) + 1
            }
            Self::Blocks(b) => of(&[&b.codes, &b.scales]),
            Self::Product(a, b) | Self::Sum(a, b) => of(&[a, b]),
            Self::Concat(parts) => parts.iter().map(|a| a.origin.depth()).max().unwrap_or(0) + 1,
            Self::Shifted { weight, bias, .. } => {
                bias.iter().chain([weight]).map(|a| a.origin.depth()).max().unwrap_or(0) + 1
            }
        }
    }

    /// The type of the elements that reading gives.
    fn stored_dtype(&self) -> DType {
        match self {
            Self::Stored { tensor, .. } | Self::Computed(tensor) => tensor.dtype,
            Self::Concat(parts) => {
                let first = parts.first().map_or(DType::F32, Array::stored_dtype);
                if parts.iter().all(|p| p.stored_dtype() == first) { first } else { DType::F32 }
            }
            _ => DType::F32,
        }
    }

    /// Every element, row-major, in the stored type.
    fn read(&self) -> Bytes {
        let floats =
            |list: Vec<f32>| -> Bytes { list.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into() };
        match self {
            Self::Stored { tensor, .. } | Self::Computed(tensor) => tensor.data.read(),
            Self::Dequantised { codes, scale, zero } => {
                let (codes, scale) = (codes.f64s(), scale.f64s());
                floats(match zero.as_ref().map(Array::f64s) {
                    Some(zero) => codes.iter().zip(&scale).zip(&zero).map(|((c, s), z)| ((c - z) * s) as f32).collect(),
                    None => codes.iter().zip(&scale).map(|(c, s)| (c * s) as f32).collect(),
                })
            }
            Self::Blocks(b) => floats(b.read()),
            Self::Product(a, b) => floats(a.f64s().iter().zip(b.f64s()).map(|(x, y)| (x * y) as f32).collect()),
            Self::Sum(a, b) => floats(a.f64s().iter().zip(b.f64s()).map(|(x, y)| (x + y) as f32).collect()),
            Self::Concat(parts) => {
                let dtype = self.stored_dtype();
                let mut out = Vec::new();
                for part in parts {
                    if part.stored_dtype() == dtype {
                        out.extend_from_slice(&part.bytes());
                    } else {
                        out.extend(part.f64s().into_iter().flat_map(|v| (v as f32).to_le_bytes()));
                    }
                }
                out.into()
            }
            Self::Shifted { weight, shift, bias } => {
                let rows = weight.dim(0).max(1);
                let values = weight.f64s();
                let per_row = values.len() / rows;
                let per_channel = (per_row / shift.len().max(1)).max(1);
                let bias = bias.as_ref().map(Array::f64s);
                floats(
                    (0..rows)
                        .map(|o| {
                            let row = &values[o * per_row..(o + 1) * per_row];
                            let sum: f64 =
                                row.chunks(per_channel).zip(shift).map(|(w, s)| w.iter().sum::<f64>() * s).sum();
                            (sum + bias.as_ref().and_then(|b| b.get(o)).copied().unwrap_or(0.0)) as f32
                        })
                        .collect(),
                )
            }
        }
    }
}

impl Blocks {
    fn read(&self) -> Vec<f32> {
        let blocks = self.k.div_ceil(self.block);
        let codes = self.codes.bytes();
        let scales = self.scales.f64s();
        let mask = ((1u16 << self.bits) - 1) as u8;
        let per_byte = 8 / self.bits;
        let packed = self.zeros.as_ref().filter(|z| !z.dtype.is_float()).map(Array::bytes);
        let float = self.zeros.as_ref().filter(|z| z.dtype.is_float()).map(Array::f64s);
        let zero_row = blocks.div_ceil(per_byte);
        let code_block = self.block / per_byte;
        let at = |bytes: &[u8], i: usize| bytes.get(i).copied().unwrap_or(0);
        let mut out = Vec::with_capacity(self.n * self.k);
        for row in 0..self.n {
            for i in 0..self.k {
                let (b, j) = (i / self.block, i % self.block);
                let code =
                    at(&codes, (row * blocks + b) * code_block + j / per_byte) >> ((j % per_byte) * self.bits) & mask;
                let zero = match (&packed, &float) {
                    (Some(z), _) => {
                        f64::from(at(z, row * zero_row + b / per_byte) >> ((b % per_byte) * self.bits) & mask)
                    }
                    (None, Some(z)) => z.get(row * blocks + b).copied().unwrap_or(0.0),
                    (None, None) => f64::from(1u16 << (self.bits - 1)),
                };
                let scale = scales.get(row * blocks + b).copied().unwrap_or(f64::NAN);
                out.push(((f64::from(code) - zero) * scale) as f32);
            }
        }
        out
    }
}

impl Array {
    /// A whole constant of the file.
    pub fn stored(value: ValueId, tensor: Tensor) -> Self {
        let dims = tensor.dims.clone();
        let dtype = tensor.dtype;
        Self::of(Origin::Stored { value, tensor }, &dims, dtype)
    }

    /// All elements of a source, row-major.
    fn of(origin: Origin, dims: &[usize], dtype: DType) -> Self {
        let mut stride = 1usize;
        let mut out = vec![Dim::new(); dims.len()];
        for (dim, &n) in out.iter_mut().zip(dims).rev() {
            *dim = axes::strided(0, stride, n);
            stride = stride.saturating_mul(n);
        }
        Self { origin: Arc::new(origin), offset: 0, dims: out, dtype }
    }

    pub(super) fn nested(origin: Origin, dims: &[usize]) -> Result<Self, String> {
        if origin.depth() > DEPTH_LIMIT {
            return Err(format!("a constant made of constants, nested over {DEPTH_LIMIT} deep"));
        }
        let dtype = origin.stored_dtype();
        Ok(Self::of(origin, dims, dtype))
    }

    /// Computed integers.
    pub fn ints(dtype: DType, dims: &[usize], values: &[i64]) -> Self {
        let data: Vec<u8> = match dtype {
            DType::Bool | DType::U8 | DType::I8 => values.iter().map(|&v| v as u8).collect(),
            DType::U16 | DType::I16 => values.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect(),
            DType::I32 | DType::U32 => values.iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let dtype = if matches!(dtype, DType::U4 | DType::I4) { DType::I64 } else { dtype };
        let tensor = Tensor { dtype, dims: dims.to_vec(), data: data.into() };
        Self::of(Origin::Computed(tensor), dims, dtype)
    }

    /// Computed floats, rounded to `dtype` but stored as f32 (f64 if `dtype` is).
    pub fn floats(dtype: DType, dims: &[usize], values: &[f64]) -> Self {
        let (stored, data): (_, Vec<u8>) = if dtype == DType::F64 {
            (DType::F64, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        } else {
            (DType::F32, values.iter().flat_map(|&v| round(dtype, v).to_le_bytes()).collect())
        };
        let tensor = Tensor { dtype: stored, dims: dims.to_vec(), data: data.into() };
        Self::of(Origin::Computed(tensor), dims, dtype)
    }

    /// One float.
    pub fn scalar(value: f64) -> Self {
        Self::floats(DType::F64, &[], &[value])
    }

    /// Both read the same constant of the file.
    pub fn shares(&self, other: &Self) -> bool {
        matches!(*self.origin, Origin::Stored { .. }) && self.origin.same(&other.origin)
    }

    /// The position of the elements in their origin, which must not depend on the batch.
    pub fn place(&self) -> (usize, &[Dim]) {
        (self.offset, &self.dims)
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> Vec<usize> {
        axes::shape(&self.dims)
    }

    /// Digits of the dimensions.
    pub fn dims(&self) -> &[Dim] {
        &self.dims
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// The size of a dimension, 1 beyond the last.
    pub fn dim(&self, k: usize) -> usize {
        self.dims.get(k).map_or(1, |d| axes::size(d))
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().flatten().fold(1usize, |n, d| n.saturating_mul(d.size))
    }

    /// Without any element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements as they are stored, and read.
    pub fn stored_dtype(&self) -> DType {
        self.origin.stored_dtype()
    }

    /// Where the elements come from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The same constant, with other dimensions over its elements.
    pub(super) fn with(&self, dims: Vec<Dim>) -> Self {
        Self { dims, ..self.clone() }
    }

    /// Dimensions in another order.
    #[must_use]
    pub fn transpose(&self, perm: &[usize]) -> Self {
        self.with(perm.iter().map(|&p| self.dims.get(p).cloned().unwrap_or_default()).collect())
    }

    /// The same elements in other dimensions. A small constant is copied if its digits cannot be re-cut.
    pub fn reshape(&self, target: &[usize]) -> Option<Self> {
        if let Some(dims) = axes::regroup(&self.dims, target) {
            return Some(self.with(dims));
        }
        let count = target.iter().try_fold(1usize, |n, &t| n.checked_mul(t))?;
        if count != self.len() || count > FOLD_LIMIT {
            return None;
        }
        let copy = self.copy();
        Some(copy.with(axes::regroup(&copy.dims, target)?))
    }

    /// Dimensions given as digits over the elements of this array's dimensions, which the caller has re-cut.
    #[must_use]
    pub fn relaid(&self, dims: Vec<Dim>) -> Self {
        self.with(dims)
    }

    /// Broadcasts to a shape; `None` if it does not fit.
    pub fn expand(&self, shape: &[usize]) -> Option<Self> {
        if self.rank() > shape.len() {
            return None;
        }
        let mut dims = axes::pad(&self.dims, shape.len());
        for (dim, &n) in dims.iter_mut().zip(shape) {
            match axes::size(dim) {
                m if m == n => {}
                1 => *dim = axes::broadcast(n),
                _ => return None,
            }
        }
        Some(self.with(dims))
    }

    /// Some positions of a dimension.
    pub fn pick(&self, dim: usize, pick: &Pick) -> Option<Self> {
        let digits = self.dims.get(dim)?;
        let n = axes::size(digits);
        if pick.is_identity(n) {
            return Some(self.clone());
        }
        if pick.is_empty() || n == 0 {
            let mut out = self.clone();
            out.dims[dim] = axes::broadcast(pick.len());
            return pick.is_empty().then_some(out);
        }
        if let Some((at, digits)) = pick.through(digits) {
            let mut out = self.clone();
            out.offset = out.offset.checked_add(at)?;
            out.dims[dim] = digits;
            return Some(out);
        }
        if self.len() > FOLD_LIMIT {
            return None;
        }
        let copy = self.copy();
        let (at, digits) = pick.through(copy.dims.get(dim)?)?;
        let mut out = copy;
        out.offset = out.offset.checked_add(at)?;
        out.dims[dim] = digits;
        Some(out)
    }

    /// A row-major copy, for small constants.
    fn copy(&self) -> Self {
        let dims = self.shape();
        let data = Bytes::from(self.bytes());
        let stored = match self.stored_dtype() {
            DType::U4 => DType::U8,
            DType::I4 => DType::I8,
            other => other,
        };
        let tensor = Tensor { dtype: stored, dims: dims.clone(), data: data.into() };
        Self::of(Origin::Computed(tensor), &dims, self.dtype)
    }

    /// Digits of all elements, most significant first.
    fn flat(&self) -> Dim {
        axes::join(&axes::digits(&self.dims))
    }

    /// The elements in their stored type, row-major (4-bit integers as bytes).
    pub fn bytes(&self) -> Vec<u8> {
        let digits = self.flat();
        let (dtype, in_order) = (self.stored_dtype(), matches!(&digits[..], [d] if d.stride == 1));
        let len = digits.iter().map(|d| d.size).product::<usize>() * (dtype.bits() / 8);
        match &*self.origin {
            Origin::Stored { tensor, .. } if tensor.dtype.bits() >= 8 => {
                // of a large constant, only the part that the view covers is read
                let size = tensor.dtype.bits() / 8;
                let last = digits
                    .iter()
                    .fold(self.offset, |at, d| at.saturating_add(d.size.saturating_sub(1).saturating_mul(d.stride)));
                let range = self.offset.saturating_mul(size)..last.saturating_add(1).saturating_mul(size);
                if in_order && range.len() == len {
                    return tensor.data.range(range).into();
                }
                tensor.data.look(range, |all| gathered(dtype, all, 0, &digits))
            }
            other => {
                let all = other.read();
                if in_order && dtype.bits() >= 8 && self.offset == 0 && all.len() == len {
                    return all.into();
                }
                gathered(dtype, &all, self.offset, &digits)
            }
        }
    }

    /// Checks that the file still holds what it held when it was opened.
    ///
    /// # Errors
    /// The file has changed.
    pub fn check(&self) -> crate::Result<()> {
        let mut todo = vec![self];
        while let Some(array) = todo.pop() {
            match array.origin() {
                Origin::Stored { tensor, .. } | Origin::Computed(tensor) => tensor.data.check()?,
                Origin::Dequantised { codes, scale, zero } => todo.extend(zero.iter().chain([codes, scale])),
                Origin::Blocks(b) => todo.extend(b.zeros.iter().chain([&b.codes, &b.scales])),
                Origin::Product(a, b) | Origin::Sum(a, b) => todo.extend([a, b]),
                Origin::Concat(parts) => todo.extend(parts),
                Origin::Shifted { weight, bias, .. } => todo.extend(bias.iter().chain([weight])),
            }
        }
        Ok(())
    }

    /// The elements as f64, row-major; of any type.
    pub fn f64s(&self) -> Vec<f64> {
        let b = self.bytes();
        match self.stored_dtype() {
            DType::F32 => b.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
            DType::F64 => b.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
            DType::F16 => b.as_chunks().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f64()).collect(),
            DType::Bf16 => b.as_chunks().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f64()).collect(),
            _ => self.i64s().into_iter().map(|v| v as f64).collect(),
        }
    }

    /// The elements of an integer or boolean constant, row-major.
    pub fn i64s(&self) -> Vec<i64> {
        let b = self.bytes();
        match self.stored_dtype() {
            DType::U8 | DType::U4 => b.iter().map(|&v| i64::from(v)).collect(),
            DType::Bool => b.iter().map(|&v| i64::from(v != 0)).collect(),
            DType::I8 | DType::I4 => b.iter().map(|&v| i64::from(v as i8)).collect(),
            DType::U16 => b.as_chunks().0.iter().map(|&b| i64::from(u16::from_le_bytes(b))).collect(),
            DType::I16 => b.as_chunks().0.iter().map(|&b| i64::from(i16::from_le_bytes(b))).collect(),
            DType::I32 => b.as_chunks().0.iter().map(|&b| i64::from(i32::from_le_bytes(b))).collect(),
            DType::U32 => b.as_chunks().0.iter().map(|&b| i64::from(u32::from_le_bytes(b))).collect(),
            DType::I64 | DType::U64 => b.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
            _ => self.f64s().into_iter().map(|v| v as i64).collect(),
        }
    }

    /// The elements without the repetitions that broadcasting makes.
    pub fn distinct(&self) -> Self {
        self.with(self.dims.iter().map(|d| d.iter().filter(|d| d.axis != BROADCAST).copied().collect()).collect())
    }

    /// The value of all elements, if they are equal. Reads small constants only.
    pub fn uniform(&self) -> Option<f64> {
        let seen = self.distinct();
        if seen.is_empty() || seen.len() > FOLD_LIMIT {
            return None;
        }
        let values = seen.f64s();
        values.iter().all(|v| *v == values[0]).then(|| values[0])
    }

    /// The one element.
    pub fn one(&self) -> Option<f64> {
        (self.len() == 1).then(|| self.f64s()[0])
    }

    /// Reduces a dimension whose positions are all equal to size 1. Reads small constants only.
    #[must_use]
    pub fn collapse(&self, dim: usize) -> Option<Self> {
        let first = self.pick(dim, &Pick::range(0, 1))?;
        let n = self.dim(dim);
        if n == 1 || self.dims[dim].iter().all(|d| d.axis == BROADCAST) {
            return Some(first);
        }
        let seen = self.distinct();
        if seen.len() > FOLD_LIMIT {
            return None;
        }
        let one = first.bytes();
        (1..n).all(|i| self.pick(dim, &Pick::range(i, 1)).is_some_and(|other| other.bytes() == one)).then_some(first)
    }
}
