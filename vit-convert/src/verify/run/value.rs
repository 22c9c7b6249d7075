//! Concrete values: three storages for fifteen element types, read and laid out anew.

use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use super::broadcast::broadcast_strides;
use super::shape::{Res, count, position, strides};
use crate::onnx::graph::{DType, Tensor};

/// Elements of a constant that a thread reads at once.
const READ_AT_ONCE: usize = 1 << 18;

/// A tensor (or a sequence of them) with its ONNX type.
#[derive(Clone, Debug)]
pub struct Value {
    /// Element type.
    pub dtype: DType,
    /// Shape; of a sequence, its length.
    pub dims: Vec<usize>,
    /// Elements, row-major.
    pub data: Data,
}

/// Elements. f16 and bf16 are stored as f32, every integer type and bool as i64.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum Data {
    F32(Arc<Vec<f32>>),
    F64(Arc<Vec<f64>>),
    Int(Arc<Vec<i64>>),
    Sequence(Arc<Vec<Value>>),
}

/// Is this an element type of real numbers?
pub fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::Bf16 | DType::F64)
}

impl Value {
    /// Real numbers of a type that is kept as f32.
    pub fn f32(dims: Vec<usize>, data: Vec<f32>) -> Self {
        Self { dtype: DType::F32, dims, data: Data::F32(Arc::new(data)) }
    }

    /// Doubles.
    pub fn f64(dims: Vec<usize>, data: Vec<f64>) -> Self {
        Self { dtype: DType::F64, dims, data: Data::F64(Arc::new(data)) }
    }

    /// Integers or booleans.
    pub fn int(dtype: DType, dims: Vec<usize>, data: Vec<i64>) -> Self {
        Self { dtype, dims, data: Data::Int(Arc::new(data)) }
    }

    /// A list of i64, as shapes are given.
    pub fn ints(data: Vec<i64>) -> Self {
        Self::int(DType::I64, vec![data.len()], data)
    }

    /// A scalar of a type; the number is rounded to it.
    pub fn scalar(dtype: DType, x: f64) -> Self {
        Self::reals(dtype, vec![], vec![x])
    }

    /// Numbers of any type, given as doubles, rounded (floats) or truncated (integers) to it.
    pub fn reals(dtype: DType, dims: Vec<usize>, data: Vec<f64>) -> Self {
        let data = match dtype {
            DType::F64 => Data::F64(Arc::new(data)),
            DType::F32 | DType::F16 | DType::Bf16 => Data::F32(Arc::new(data.iter().map(|&x| x as f32).collect())),
            _ => Data::Int(Arc::new(data.iter().map(|&x| x as i64).collect())),
        };
        Self { dtype, dims, data }.rounded()
    }

    /// A sequence of tensors.
    pub fn sequence(items: Vec<Value>) -> Self {
        let dtype = items.first().map_or(DType::F32, |v| v.dtype);
        Self { dtype, dims: vec![items.len()], data: Data::Sequence(Arc::new(items)) }
    }

    /// A constant of the file.
    pub fn read(tensor: &Tensor) -> Res<Self> {
        let n = count(&tensor.dims)?;
        if cfg!(target_endian = "little") && tensor.dtype == DType::F32 && tensor.data.len() == n * size_of::<f32>() {
            // the usual case for weights: no conversion is needed
            let mut data = vec![0f32; n];
            data.par_chunks_mut(READ_AT_ONCE).enumerate().for_each(|(i, part)| {
                tensor.data.copy(i * READ_AT_ONCE * size_of::<f32>(), bytemuck::cast_slice_mut(part));
            });
            return Ok(Self::f32(tensor.dims.clone(), data));
        }
        tensor.data.look(0..tensor.data.len(), |bytes| Self::decode(tensor, bytes, n))
    }

    fn decode(tensor: &Tensor, b: &[u8], n: usize) -> Res<Self> {
        let ints = |size: usize, read: fn(&[u8]) -> i64| b.chunks_exact(size).map(read).collect::<Vec<_>>();
        let nibble = |signed: bool| {
            let halves = b.iter().flat_map(|&x| [x & 15, x >> 4]).take(n);
            halves.map(|x| if signed && x > 7 { x as i64 - 16 } else { x as i64 }).collect::<Vec<_>>()
        };
        let data = match tensor.dtype {
            DType::F32 => Data::F32(Arc::new(b.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect())),
            DType::F16 => {
                Data::F32(Arc::new(b.as_chunks().0.iter().map(|&x| f16::from_le_bytes(x).to_f32()).collect()))
            }
            DType::Bf16 => {
                Data::F32(Arc::new(b.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect()))
            }
            DType::F64 => Data::F64(Arc::new(b.as_chunks().0.iter().map(|&x| f64::from_le_bytes(x)).collect())),
            dtype => Data::Int(Arc::new(match dtype {
                DType::U8 => ints(1, |b| b[0] as i64),
                DType::I8 => ints(1, |b| b[0] as i8 as i64),
                DType::Bool => ints(1, |b| i64::from(b[0] != 0)),
                DType::U16 => ints(2, |b| u16::from_le_bytes([b[0], b[1]]) as i64),
                DType::I16 => ints(2, |b| i16::from_le_bytes([b[0], b[1]]) as i64),
                DType::U32 => ints(4, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as i64),
                DType::I32 => ints(4, |b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as i64),
                DType::U4 => nibble(false),
                DType::I4 => nibble(true),
                _ => ints(8, |b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])),
            })),
        };
        let value = Self { dtype: tensor.dtype, dims: tensor.dims.clone(), data };
        if value.len() == n {
            Ok(value)
        } else {
            Err(format!("a constant of shape {:?} has {} elements", tensor.dims, value.len()))
        }
    }

    /// Stored elements.
    pub fn len(&self) -> usize {
        match &self.data {
            Data::F32(x) => x.len(),
            Data::F64(x) => x.len(),
            Data::Int(x) => x.len(),
            Data::Sequence(x) => x.len(),
        }
    }

    /// Has it no elements?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(x) => x.len() * 4,
            Data::F64(x) => x.len() * 8,
            Data::Int(x) => x.len() * 8,
            Data::Sequence(x) => x.iter().map(Value::bytes).sum(),
        }
    }

    /// The same elements under another shape of as many.
    pub fn with_dims(mut self, dims: Vec<usize>) -> Res<Self> {
        if count(&dims)? != self.len() || matches!(self.data, Data::Sequence(_)) {
            return Err(format!("{:?} cannot be reshaped to {dims:?}", self.dims));
        }
        self.dims = dims;
        Ok(self)
    }

    /// The value as its type can hold it: f16 and bf16 rounded, integers wrapped.
    #[must_use]
    pub fn rounded(mut self) -> Self {
        fn each<T: Copy + Send + Sync>(x: &mut Arc<Vec<T>>, f: impl Fn(T) -> T + Sync) {
            Arc::make_mut(x).par_iter_mut().with_min_len(1 << 14).for_each(|x| *x = f(*x));
        }
        match (&mut self.data, self.dtype) {
            (Data::F32(x), DType::F16) => each(x, |x| f16::from_f32(x).to_f32()),
            (Data::F32(x), DType::Bf16) => each(x, |x| bf16::from_f32(x).to_f32()),
            (Data::Int(x), dtype) if !matches!(dtype, DType::I64 | DType::U64) => each(x, |x| wrap(dtype, x)),
            _ => {}
        }
        self
    }

    /// The value for ideal arithmetic: halves become f32.
    #[must_use]
    pub fn ideal(mut self) -> Self {
        if matches!(self.dtype, DType::F16 | DType::Bf16) {
            self.dtype = DType::F32;
        }
        self
    }

    /// Integers of ideal arithmetic may have fractions: the two storages of an integer type, brought to one.
    #[must_use]
    pub fn like(self, other: &Value) -> Self {
        match (&self.data, &other.data) {
            (Data::Int(x), Data::F64(_)) if !is_float(self.dtype) => {
                let wide = x.iter().map(|&x| x as f64).collect();
                Self { data: Data::F64(Arc::new(wide)), ..self }
            }
            _ => self,
        }
    }

    /// Every element as a double.
    pub fn to_f64(&self) -> Res<Vec<f64>> {
        Ok(match &self.data {
            Data::F32(x) => x.iter().map(|&x| x as f64).collect(),
            Data::F64(x) => x.to_vec(),
            Data::Int(x) => x.iter().map(|&x| x as f64).collect(),
            Data::Sequence(_) => return Err("needs a tensor, found a sequence".into()),
        })
    }

    /// Every element as f32.
    pub fn to_f32(&self) -> Res<Vec<f32>> {
        Ok(match &self.data {
            Data::F32(x) => x.to_vec(),
            Data::F64(x) => x.iter().map(|&x| x as f32).collect(),
            Data::Int(x) => x.iter().map(|&x| x as f32).collect(),
            Data::Sequence(_) => return Err("needs a tensor, found a sequence".into()),
        })
    }

    /// The elements of an integer or boolean tensor.
    pub fn as_ints(&self) -> Res<&[i64]> {
        match &self.data {
            Data::Int(x) => Ok(x),
            _ => Err(format!("needs integers, found {:?}", self.dtype)),
        }
    }

    /// The one element of a tensor, as a double.
    pub fn one(&self) -> Res<f64> {
        match self.to_f64()?.as_slice() {
            [x] => Ok(*x),
            _ => Err(format!("needs one element, found shape {:?}", self.dims)),
        }
    }

    /// The one element of an integer tensor.
    pub fn one_int(&self) -> Res<i64> {
        match self.as_ints()? {
            [x] => Ok(*x),
            _ => Err(format!("needs one integer, found shape {:?}", self.dims)),
        }
    }

    /// Are its elements real numbers?
    pub fn is_real(&self) -> bool {
        is_float(self.dtype)
    }

    /// Rank, for tensors.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// An axis attribute made a position: −1 is the last one.
    pub fn axis(&self, axis: i64) -> Res<usize> {
        position(axis, self.rank())
    }

    /// Elements by position in this value: `pick[i]` becomes element `i` of the result.
    pub fn pick(&self, dims: Vec<usize>, pick: &(impl Fn(usize) -> usize + Sync)) -> Res<Self> {
        let n = count(&dims)?;
        fn take<T: Copy + Send + Sync>(x: &[T], n: usize, pick: &(impl Fn(usize) -> usize + Sync)) -> Vec<T> {
            (0..n).into_par_iter().with_min_len(1 << 14).map(|i| x[pick(i)]).collect()
        }
        let data = match &self.data {
            Data::F32(x) => Data::F32(Arc::new(take(x, n, pick))),
            Data::F64(x) => Data::F64(Arc::new(take(x, n, pick))),
            Data::Int(x) => Data::Int(Arc::new(take(x, n, pick))),
            Data::Sequence(_) => return Err("needs a tensor, found a sequence".into()),
        };
        Ok(Self { dtype: self.dtype, dims, data })
    }

    /// A view by strides, made contiguous: element `[i, j, …]` is element `offset + i·strides[0] + …` of this value.
    ///
    /// The caller's strides must stay inside: each op computes them from checked dimensions.
    pub fn strided(&self, dims: Vec<usize>, strides: &[isize], offset: usize) -> Res<Self> {
        count(&dims)?;
        fn copy<T: Copy + Send + Sync + Default>(x: &[T], dims: &[usize], strides: &[isize], offset: usize) -> Vec<T> {
            let mut out = vec![T::default(); dims.iter().product()];
            if out.is_empty() {
                return out;
            }
            let (&inner, outer) = dims.split_last().unwrap_or((&1, &[]));
            let step = strides.last().copied().unwrap_or(0);
            let rows = (1usize << 14).div_ceil(inner);
            out.par_chunks_mut(inner * rows).enumerate().for_each(|(chunk, out)| {
                for (r, row) in out.chunks_mut(inner).enumerate() {
                    let mut rest = chunk * rows + r;
                    let mut at = offset as isize;
                    for (d, s) in outer.iter().zip(strides).rev() {
                        at += (rest % d) as isize * s;
                        rest /= d;
                    }
                    match step {
                        1 => row.copy_from_slice(&x[at as usize..at as usize + inner]),
                        0 => row.fill(x[at as usize]),
                        _ => row.iter_mut().enumerate().for_each(|(i, y)| *y = x[(at + i as isize * step) as usize]),
                    }
                }
            });
            out
        }
        let data = match &self.data {
            Data::F32(x) => Data::F32(Arc::new(copy(x, &dims, strides, offset))),
            Data::F64(x) => Data::F64(Arc::new(copy(x, &dims, strides, offset))),
            Data::Int(x) => Data::Int(Arc::new(copy(x, &dims, strides, offset))),
            Data::Sequence(_) => return Err("needs a tensor, found a sequence".into()),
        };
        Ok(Self { dtype: self.dtype, dims, data })
    }

    /// Broadcast to a shape that this one fits.
    pub fn broadcast(&self, dims: &[usize]) -> Res<Self> {
        if self.dims == dims {
            return Ok(self.clone());
        }
        let strides = broadcast_strides(&self.dims, dims)?;
        self.strided(dims.to_vec(), &strides, 0)
    }

    /// Axes reordered: axis `i` of the result is axis `perm[i]` of this.
    pub fn permute(&self, perm: &[usize]) -> Res<Self> {
        let own = strides(&self.dims);
        let mut seen = vec![false; self.rank()];
        for &p in perm {
            match seen.get_mut(p) {
                Some(s) if !*s => *s = true,
                _ => return Err(format!("{perm:?} is no permutation of {} axes", self.rank())),
            }
        }
        if perm.len() != self.rank() {
            return Err(format!("{perm:?} is no permutation of {} axes", self.rank()));
        }
        let dims = perm.iter().map(|&p| self.dims[p]).collect();
        let strides: Vec<_> = perm.iter().map(|&p| own[p]).collect();
        self.strided(dims, &strides, 0)
    }
}

/// An integer as the type holds it.
pub fn wrap(dtype: DType, x: i64) -> i64 {
    match dtype {
        DType::U8 => x as u8 as i64,
        DType::I8 => x as i8 as i64,
        DType::U16 => x as u16 as i64,
        DType::I16 => x as i16 as i64,
        DType::U32 => x as u32 as i64,
        DType::I32 => x as i32 as i64,
        DType::Bool => i64::from(x != 0),
        DType::U4 => x & 15,
        DType::I4 => ((x & 15) ^ 8) - 8,
        _ => x,
    }
}

/// The range of a quantised type.
pub fn range(dtype: DType) -> Res<(f64, f64)> {
    Ok(match dtype {
        DType::U8 => (0., 255.),
        DType::I8 => (-128., 127.),
        DType::U16 => (0., 65535.),
        DType::I16 => (-32768., 32767.),
        DType::U4 => (0., 15.),
        DType::I4 => (-8., 7.),
        DType::I32 => (i32::MIN as f64, i32::MAX as f64),
        _ => return Err(format!("{dtype:?} is no quantised type")),
    })
}
