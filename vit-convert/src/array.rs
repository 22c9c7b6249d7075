//! Constants as views of stored elements: laid out, cut and combined without reading them, read once when they are written.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;

use crate::axes::{self, BROADCAST, Digit, Dim, Pick};
use crate::graph::{DType, Tensor, ValueId};

/// Constants up to this many elements are computed while importing; larger ones are only laid out.
pub const FOLD_LIMIT: usize = 1 << 22;

/// Combined constants may nest this deep (a sum of a product of a concatenation …).
const DEPTH_LIMIT: usize = 12;

/// Where the elements of an [`Array`] come from.
#[derive(Debug)]
pub enum Source {
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
        /// What stands for 0.
        zero: Option<Array>,
    },
    /// Rows side by side with codes of few bits, in blocks that share a scale (`com.microsoft.MatMulNBits`).
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
    /// `[n, ⌈blocks * bits / 8⌉]` bytes, or floats `[n * blocks]`; absent: the middle code.
    pub zeros: Option<Array>,
}

/// A constant: a view of a source's elements.
#[derive(Clone, Debug)]
pub struct Array {
    source: Arc<Source>,
    offset: usize,
    dims: Vec<Dim>,
    /// The element type that the graph sees; a cast between float types does not touch what is stored.
    pub dtype: DType,
}

impl PartialEq for Array {
    fn eq(&self, other: &Self) -> bool {
        self.offset == other.offset && self.dims == other.dims && self.source.same(&other.source)
    }
}

impl Eq for Array {}

impl Hash for Array {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.offset, &self.dims).hash(state);
        match &*self.source {
            Source::Stored { tensor, .. } | Source::Computed(tensor) => (tensor.data.len(), tensor.dtype).hash(state),
            other => std::mem::discriminant(other).hash(state),
        }
    }
}

/// Small constants are the same when their bytes are; large ones when they are the same stretch of the file.
const COMPARE_BYTES: usize = 1 << 12;

impl Source {
    fn same(self: &Arc<Self>, other: &Arc<Self>) -> bool {
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
        let of = |list: &[&Array]| list.iter().map(|a| a.source.depth()).max().unwrap_or(0) + 1;
        match self {
            Self::Stored { .. } | Self::Computed(_) => 0,
            Self::Dequantised { codes, scale, zero } => {
                zero.iter().chain([codes, scale]).map(|a| a.source.depth()).max().unwrap_or(0) + 1
            }
            Self::Blocks(b) => of(&[&b.codes, &b.scales]),
            Self::Product(a, b) | Self::Sum(a, b) => of(&[a, b]),
            Self::Concat(parts) => parts.iter().map(|a| a.source.depth()).max().unwrap_or(0) + 1,
            Self::Shifted { weight, bias, .. } => {
                bias.iter().chain([weight]).map(|a| a.source.depth()).max().unwrap_or(0) + 1
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
        Self::of(Source::Stored { value, tensor }, &dims, dtype)
    }

    /// All elements of a source, row-major.
    fn of(source: Source, dims: &[usize], dtype: DType) -> Self {
        let mut stride = 1usize;
        let mut out = vec![Dim::new(); dims.len()];
        for (dim, &n) in out.iter_mut().zip(dims).rev() {
            *dim = axes::strided(0, stride, n);
            stride = stride.saturating_mul(n);
        }
        Self { source: Arc::new(source), offset: 0, dims: out, dtype }
    }

    fn nested(source: Source, dims: &[usize]) -> Result<Self, String> {
        if source.depth() > DEPTH_LIMIT {
            return Err(format!("a constant made of constants, nested over {DEPTH_LIMIT} deep"));
        }
        let dtype = source.stored_dtype();
        Ok(Self::of(source, dims, dtype))
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
        Self::of(Source::Computed(tensor), dims, dtype)
    }

    /// Computed floats, rounded to `dtype` but kept as f32 (f64 where that is asked for).
    pub fn floats(dtype: DType, dims: &[usize], values: &[f64]) -> Self {
        let (stored, data): (_, Vec<u8>) = if dtype == DType::F64 {
            (DType::F64, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        } else {
            (DType::F32, values.iter().flat_map(|&v| round(dtype, v).to_le_bytes()).collect())
        };
        let tensor = Tensor { dtype: stored, dims: dims.to_vec(), data: data.into() };
        Self::of(Source::Computed(tensor), dims, dtype)
    }

    /// One float.
    pub fn scalar(value: f64) -> Self {
        Self::floats(DType::F64, &[], &[value])
    }

    /// `(codes - zero) * scale`, broadcast to one shape.
    pub fn dequantised(codes: Self, scale: &Self, zero: Option<&Self>) -> Result<Self, String> {
        let dims = codes.shape();
        let zero = zero.map(|z| z.expand(&dims).ok_or("the zero point does not fit")).transpose()?;
        let scale = scale.expand(&dims).ok_or("the scale does not fit")?;
        Self::nested(Source::Dequantised { codes, scale, zero }, &dims)
    }

    /// `com.microsoft.MatMulNBits`'s weight as `[n, k]`.
    pub fn blocks(blocks: Blocks) -> Result<Self, String> {
        let dims = [blocks.n, blocks.k];
        Self::nested(Source::Blocks(blocks), &dims)
    }

    /// Times another, which broadcasts to this one's shape.
    pub fn times(&self, other: &Self) -> Result<Self, String> {
        let dims = self.shape();
        let other = other.expand(&dims).ok_or("the factor does not fit")?;
        Self::nested(Source::Product(self.clone(), other), &dims)
    }

    /// The sum of two of one shape.
    pub fn plus(&self, other: &Self) -> Result<Self, String> {
        let dims = self.shape();
        let other = other.expand(&dims).ok_or("the summand does not fit")?;
        Self::nested(Source::Sum(self.clone(), other), &dims)
    }

    /// `bias + Σ weight · shift` for each output channel.
    pub fn shifted(weight: Self, shift: Vec<f64>, bias: Option<Self>) -> Result<Self, String> {
        let dims = [weight.dim(0)];
        Self::nested(Source::Shifted { weight, shift, bias }, &dims)
    }

    /// Joined along a dimension; the other dimensions are equal.
    pub fn concat(parts: &[Self], dim: usize) -> Result<Self, String> {
        let (Some(first), true) = (parts.first(), parts.len() <= 1 << 16) else { return Err("nothing to join".into()) };
        let shape = first.shape();
        for part in parts {
            let other = part.shape();
            if other.len() != shape.len() || (0..shape.len()).any(|i| i != dim && other[i] != shape[i]) {
                return Err(format!("constants of shapes {shape:?} and {other:?} do not join along axis {dim}"));
            }
        }
        if let Some(whole) = Self::neighbours(parts, dim) {
            return Ok(whole);
        }
        let mut order: Vec<usize> = (0..shape.len()).collect();
        order.swap(0, dim);
        let turned: Vec<Self> = parts.iter().map(|p| p.transpose(&order)).filter(|p| !p.is_empty()).collect();
        let Some(front) = turned.first() else { return Ok(first.clone()) };
        let mut dims = front.shape();
        dims[0] = turned.iter().try_fold(0usize, |n, p| n.checked_add(p.dim(0))).ok_or("too large")?;
        let dtype = first.dtype;
        let mut out = Self::nested(Source::Concat(turned), &dims)?;
        out.dtype = dtype;
        Ok(out.transpose(&order))
    }

    /// Parts that lie one behind the other in one source are one view again.
    fn neighbours(parts: &[Self], dim: usize) -> Option<Self> {
        let mut whole = parts.first()?.clone();
        for part in &parts[1..] {
            if !whole.source.same(&part.source) || part.dtype != whole.dtype {
                return None;
            }
            let (n, m) = (whole.dim(dim), part.dim(dim));
            let stride = match (whole.dims[dim].as_slice(), part.dims[dim].as_slice()) {
                ([d], []) => (d.axis == 0).then_some(d.stride)?,
                ([d], [e]) => (d.axis == 0 && e.axis == 0 && d.stride == e.stride).then_some(d.stride)?,
                ([], rest) => {
                    let step = part.offset.checked_sub(whole.offset)?;
                    (step > 0 && rest.iter().all(|e| e.axis == 0 && e.stride == step) && rest.len() <= 1)
                        .then_some(step)?
                }
                _ => return None,
            };
            let others = (0..whole.dims.len()).all(|i| i == dim || whole.dims[i] == part.dims[i]);
            if !others || part.offset != whole.offset.checked_add(stride.checked_mul(n)?)? {
                return None;
            }
            whole.dims[dim] = axes::strided(0, stride, n.checked_add(m)?);
        }
        Some(whole)
    }

    /// The other lies right behind this one in the same constant of the file.
    pub fn is_followed_by(&self, other: &Self) -> bool {
        Self::neighbours(&[self.clone(), other.clone()], 0).is_some()
    }

    /// Both read the same constant of the file.
    pub fn shares(&self, other: &Self) -> bool {
        matches!(*self.source, Source::Stored { .. }) && self.source.same(&other.source)
    }

    /// Where the elements are in their source: what must not depend on the batch.
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

    /// Size of a dimension; 1 for those that are not there.
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
        self.source.stored_dtype()
    }

    /// Where the elements come from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The same constant, with other dimensions over its elements.
    fn with(&self, dims: Vec<Dim>) -> Self {
        Self { dims, ..self.clone() }
    }

    /// Dimensions in another order.
    #[must_use]
    pub fn transpose(&self, perm: &[usize]) -> Self {
        self.with(perm.iter().map(|&p| self.dims.get(p).cloned().unwrap_or_default()).collect())
    }

    /// Dimensions re-cut; a small constant is copied where its digits cannot be.
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

    /// Broadcasts to a shape. `None` where it does not fit.
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

    /// The same values, row-major in memory of their own; for small constants.
    fn copy(&self) -> Self {
        let dims = self.shape();
        let data = Bytes::from(self.bytes());
        let stored = match self.stored_dtype() {
            DType::U4 => DType::U8,
            DType::I4 => DType::I8,
            other => other,
        };
        let tensor = Tensor { dtype: stored, dims: dims.clone(), data: data.into() };
        Self::of(Source::Computed(tensor), &dims, self.dtype)
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
        match &*self.source {
            Source::Stored { tensor, .. } if tensor.dtype.bits() >= 8 => {
                // of a large constant only the part that is looked at
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

    /// What was read of it is what its file held when that was opened.
    ///
    /// # Errors
    /// The file has changed.
    pub fn check(&self) -> crate::Result<()> {
        let mut todo = vec![self];
        while let Some(array) = todo.pop() {
            match array.source() {
                Source::Stored { tensor, .. } | Source::Computed(tensor) => tensor.data.check()?,
                Source::Dequantised { codes, scale, zero } => todo.extend(zero.iter().chain([codes, scale])),
                Source::Blocks(b) => todo.extend(b.zeros.iter().chain([&b.codes, &b.scales])),
                Source::Product(a, b) | Source::Sum(a, b) => todo.extend([a, b]),
                Source::Concat(parts) => todo.extend(parts),
                Source::Shifted { weight, bias, .. } => todo.extend(bias.iter().chain([weight])),
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

    /// The elements, each stored one once: what a broadcast repeats is left out.
    pub fn distinct(&self) -> Self {
        self.with(self.dims.iter().map(|d| d.iter().filter(|d| d.axis != BROADCAST).copied().collect()).collect())
    }

    /// Every element is the same number, and that is it. Looks at small constants only.
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

    /// A dimension whose positions all hold the same is made one of size 1; looks at small constants only.
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

/// Rounds to what a type can hold.
pub fn round(dtype: DType, value: f64) -> f32 {
    match dtype {
        DType::F16 => half::f16::from_f64(value).to_f32(),
        DType::Bf16 => half::bf16::from_f64(value).to_f32(),
        _ => value as f32,
    }
}

/// Elements of a type that the digits enumerate from `offset`; those of 4 bits become bytes.
fn gathered(dtype: DType, all: &[u8], offset: usize, digits: &[Digit]) -> Vec<u8> {
    match dtype {
        t @ (DType::U4 | DType::I4) => {
            let wide: Vec<u8> = all.iter().flat_map(|&b| [b & 15, b >> 4]).collect();
            let mut out = gather::<1>(&wide, offset, digits);
            if t == DType::I4 {
                out.iter_mut().for_each(|b| *b = ((*b << 4) as i8 >> 4) as u8);
            }
            out
        }
        t => match t.bits() {
            8 => gather::<1>(all, offset, digits),
            16 => gather::<2>(all, offset, digits),
            32 => gather::<4>(all, offset, digits),
            _ => gather::<8>(all, offset, digits),
        },
    }
}

/// Elements of `W` bytes that the digits enumerate from `offset`; an index outside reads as zeros, which the reader of
/// the file has made impossible.
fn gather<const W: usize>(src: &[u8], offset: usize, digits: &[Digit]) -> Vec<u8> {
    let count: usize = digits.iter().map(|d| d.size).product();
    let mut out = vec![0u8; count * W];
    if count == 0 {
        return out;
    }
    let src = src.as_chunks::<W>().0;
    let out_elems = out.as_chunks_mut::<W>().0;
    // the digits and what one step of each means in the output
    let mut loops: Vec<(usize, usize, usize)> = Vec::with_capacity(digits.len()); // (size, source step, output step)
    let mut step = 1;
    for d in digits.iter().rev() {
        loops.push((d.size, d.stride, step));
        step *= d.size;
    }
    // innermost: the output's fastest digit and, if another one, the source's fastest digit
    let inner = if loops.is_empty() { (1, 1, 1) } else { loops.remove(0) };
    let other = if inner.1 == 1 { None } else { loops.iter().position(|l| l.1 == 1) };
    let across = other.map_or((1, 0, 0), |k| loops.remove(k));
    let mut count = vec![0usize; loops.len()];
    let (mut from, mut to) = (offset, 0usize);
    loop {
        tile(src, out_elems, from, to, inner, across);
        // the next position of the outer digits
        let mut k = 0;
        loop {
            if k == loops.len() {
                return out;
            }
            let (size, s, o) = loops[k];
            count[k] += 1;
            from += s;
            to += o;
            if count[k] < size {
                break;
            }
            from -= s * size;
            to -= o * size;
            count[k] = 0;
            k += 1;
        }
    }
}

/// A transposition goes through rectangles that stay in the first cache: so many of the output's neighbours …
const DOWN: usize = 64;
/// … and so many of the source's, which are read at once: where rows are a multiple of a page apart, no cache keeps a
/// line of each until its next element is wanted.
const ALONG: usize = 32;

/// Copies a plane: `inner` is the output's fastest digit, `across` the source's.
fn tile<const W: usize>(
    src: &[[u8; W]],
    out: &mut [[u8; W]],
    from: usize,
    to: usize,
    (n, step, _): (usize, usize, usize),
    (m, across, out_across): (usize, usize, usize),
) {
    if m == 1 {
        let (Some(row), Some(column)) = (out.get_mut(to..to + n), src.get(from..)) else { return };
        match step {
            0 => row.fill(column.first().copied().unwrap_or([0; W])),
            1 => column.get(..n).into_iter().for_each(|column| row.copy_from_slice(column)),
            _ => row.iter_mut().zip(column.iter().step_by(step)).for_each(|(cell, v)| *cell = *v),
        }
        return;
    }
    debug_assert_eq!(across, 1);
    let mut held = [[[0u8; W]; ALONG]; DOWN];
    for j0 in (0..m).step_by(ALONG) {
        let columns = ALONG.min(m - j0);
        for i0 in (0..n).step_by(DOWN) {
            let rows = DOWN.min(n - i0);
            for (i, line) in held.iter_mut().enumerate().take(rows) {
                let Some(all) = src.get(from + (i0 + i) * step + j0..) else { return };
                match all.first_chunk::<ALONG>() {
                    Some(whole) if columns == ALONG => *line = *whole,
                    _ => line.iter_mut().zip(all).take(columns).for_each(|(cell, v)| *cell = *v),
                }
            }
            for j in 0..columns {
                let at = to + (j0 + j) * out_across + i0;
                let Some(row) = out.get_mut(at..at + rows) else { return };
                row.iter_mut().zip(&held).for_each(|(cell, line)| *cell = line[j]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iota(dims: &[usize]) -> Array {
        let n: usize = dims.iter().product();
        Array::floats(DType::F32, dims, &(0..n).map(|v| v as f64).collect::<Vec<_>>())
    }

    /// The slow definition.
    fn naive(a: &Array) -> Vec<f64> {
        let all: Vec<f64> = match a.source() {
            Source::Computed(t) => {
                t.data.read().as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect()
            }
            _ => panic!(),
        };
        let mut at = vec![a.offset];
        for d in a.dims.iter().flatten() {
            at = at.iter().flat_map(|p| (0..d.size).map(move |i| p + i * d.stride)).collect();
        }
        at.iter().map(|&p| all[p]).collect()
    }

    #[test]
    fn reading_follows_the_digits() {
        let a = iota(&[70, 6, 45]);
        for perm in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let t = a.transpose(&perm);
            assert_eq!(t.f64s(), naive(&t), "{perm:?}");
            let part = t.pick(1, &Pick::steps(1, 2, 2)).unwrap();
            assert_eq!(part.f64s(), naive(&part), "{perm:?}");
        }
        let wide = iota(&[3]).reshape(&[3, 1]).unwrap().expand(&[2, 3, 4]).unwrap();
        assert_eq!(wide.f64s(), [0., 0., 0., 0., 1., 1., 1., 1., 2., 2., 2., 2.].repeat(2));
    }

    #[test]
    fn concat_finds_neighbours_again() {
        let a = iota(&[9, 4]);
        let parts: Vec<Array> = (0..3).map(|i| a.pick(0, &Pick::range(i * 3, 3)).unwrap()).collect();
        assert_eq!(Array::concat(&parts, 0).unwrap(), a);
        let other = [parts[2].clone(), parts[0].clone()];
        let joined = Array::concat(&other, 0).unwrap();
        assert_eq!(joined.f64s(), [&naive(&parts[2])[..], &naive(&parts[0])[..]].concat());
        let columns: Vec<Array> = [1, 0].iter().map(|&i| a.pick(1, &Pick::range(i, 1)).unwrap()).collect();
        assert_eq!(
            Array::concat(&columns, 1).unwrap().f64s(),
            (0..9).flat_map(|i| [i as f64 * 4. + 1., i as f64 * 4.]).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_dimension_collapses_only_where_it_repeats() {
        let a = Array::floats(DType::F32, &[2, 3], &[1., 2., 3., 1., 2., 3.]);
        assert_eq!(a.collapse(0).unwrap().f64s(), [1., 2., 3.]);
        assert!(a.collapse(1).is_none());
        let b = Array::floats(DType::F32, &[2, 2], &[1., 2., 1., 2.000001]);
        assert!(b.collapse(0).is_none());
    }
}
