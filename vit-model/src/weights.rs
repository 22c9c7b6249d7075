//! The source of a model's tensors: one or more safetensors files, a GGUF file, or an importer that computes them on demand.

use std::collections::BTreeMap;

/// The element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE 754 double precision.
    F64,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The name in a safetensors header: `F32`, `F16`, `BF16` or `F64`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F64 => "F64",
        }
    }
}

/// Values in a block of ggml's Q8_0.
pub const Q8_0_BLOCK: usize = 32;
/// Bytes in a block of Q8_0: a scale in f16 and 32 signed bytes that it multiplies.
pub const Q8_0_BLOCK_BYTES: usize = 34;

/// The type and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// The element type.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// A tensor of a type and a shape.
    pub fn new(dtype: Dtype, shape: Vec<usize>) -> Self {
        Self { dtype, shape }
    }
}

/// Fills a slice with a tensor's bytes, starting at the given offset in bytes.
pub type ReadAt<'a> = Box<dyn Fn(usize, &mut [u8]) -> crate::Result<()> + 'a>;

/// Named tensors that are read one at a time, so that a model's weights are never in memory twice.
///
/// Names are timm's. Several threads may read at once, which the CPU engine does when it packs weights.
pub trait Weights: Send + Sync {
    /// The type and shape of every tensor, by name.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo>;

    /// Reads the elements of one tensor: little-endian and row-major. Implementations return as many bytes as the tensor's
    /// [`TensorInfo`] implies, and only finite values.
    fn read(&self, name: &str) -> crate::Result<Vec<u8>>;

    /// Returns a function that reads the same bytes piece by piece, in any order. A tensor that is stored in a file unchanged
    /// can be read this way without having all of it in memory.
    fn stretches(&self, name: &str) -> crate::Result<ReadAt<'_>> {
        Ok(whole(name, self.read(name)?))
    }

    /// Whether a tensor is stored in blocks of Q8_0 (see [`gguf`](crate::checkpoint::gguf)). If so, [`read`](Self::read)
    /// dequantises it to f32.
    fn is_q8_0(&self, _name: &str) -> bool {
        false
    }

    /// Reads the stored blocks of a Q8_0 tensor. Every scale is finite.
    fn read_q8_0(&self, name: &str) -> crate::Result<Vec<u8>> {
        Err(crate::Error::tensor(name, "is not stored in Q8_0"))
    }

    /// Reads the elements of one tensor and converts them to f32.
    fn read_f32(&self, name: &str) -> crate::Result<Vec<f32>> {
        let info = self.tensors().get(name).ok_or_else(|| crate::Error::missing(name))?;
        Ok(widen(info.dtype, &self.read(name)?))
    }
}

/// A [`ReadAt`] for a tensor that is in memory.
pub(crate) fn whole<'a>(name: &str, bytes: Vec<u8>) -> ReadAt<'a> {
    let name = name.to_owned();
    Box::new(move |at, out| {
        let stretch = at.checked_add(out.len()).and_then(|end| bytes.get(at..end));
        out.copy_from_slice(stretch.ok_or_else(|| too_short(&name, bytes.len()))?);
        Ok(())
    })
}

/// The error for reading beyond a tensor's end.
pub(crate) fn too_short(name: &str, len: usize) -> crate::Error {
    crate::Error::tensor(name, format!("holds {len} bytes, fewer than its shape says"))
}

/// Hides that tensors are quantised, so that readers get dequantised f32.
pub(crate) struct Dequantised<'a>(pub &'a dyn Weights);

impl Weights for Dequantised<'_> {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        self.0.tensors()
    }

    fn read(&self, name: &str) -> crate::Result<Vec<u8>> {
        self.0.read(name)
    }
}

/// The corresponding type in candle.
pub(crate) fn candle_dtype(dtype: Dtype) -> candle_core::DType {
    match dtype {
        Dtype::F32 => candle_core::DType::F32,
        Dtype::F16 => candle_core::DType::F16,
        Dtype::Bf16 => candle_core::DType::BF16,
        Dtype::F64 => candle_core::DType::F64,
    }
}

/// Converts little-endian elements to f32. Only f64 is rounded; the other conversions are exact.
pub fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::Bf16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F64 => bytes
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32)
            .collect(),
    }
}

/// Rejects NaN and infinities, because a model with such weights has no meaningful output.
///
/// # Errors
/// If there is such an element. The error names the tensor and the index of the first one.
pub fn check_finite(name: &str, dtype: Dtype, bytes: &[u8]) -> crate::Result<()> {
    // checks whole blocks without a branch per element, so that checking costs little compared to reading
    fn first<const W: usize>(bytes: &[u8], bad: impl Fn([u8; W]) -> bool) -> Option<usize> {
        let cells = bytes.as_chunks::<W>().0;
        let block = cells.chunks(256).position(|block| block.iter().fold(false, |any, &c| any | bad(c)))?;
        cells.iter().enumerate().skip(block * 256).find(|&(_, &c)| bad(c)).map(|(i, _)| i)
    }
    // infinities and NaN are the values whose exponent bits are all ones
    let bad = match dtype {
        Dtype::F32 => first(bytes, |b: [u8; 4]| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F16 => first(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Dtype::Bf16 => first(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::F64 => first(bytes, |b: [u8; 8]| u64::from_le_bytes(b) >> 52 & 0x7ff == 0x7ff),
    };
    match bad {
        None => Ok(()),
        Some(at) => Err(crate::Error::problem(
            name,
            crate::TensorProblem::NotFinite,
            format!(
                "element {at} is not a finite number (NaN or infinite): the file is damaged, or the training went wrong"
            ),
        )),
    }
}
