//! Where a model's tensors come from: a safetensors or GGUF file, several of them, or an importer that makes them on demand.

use std::collections::BTreeMap;

/// The element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 single.
    F32,
    /// IEEE 754 half.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE 754 double.
    F64,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The name in a safetensors header: `F32`, `F16`, `BF16`, `F64`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F64 => "F64",
        }
    }
}

/// What a tensor is, without its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The element type.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
}

/// Fills memory with a tensor's bytes, from one of them on.
pub type ReadAt<'a> = Box<dyn Fn(usize, &mut [u8]) -> crate::Result<()> + 'a>;

/// Named tensors, read one at a time, so that a model's weights never stand in memory twice.
///
/// Names are timm's. Reading is from `&self` and may happen on several threads at once: the CPU engine packs that way.
pub trait Weights: Send + Sync {
    /// Name → type and shape, of every tensor.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo>;

    /// The elements of one tensor, little-endian, row-major; as many bytes as its `TensorInfo` says, and all of them finite.
    fn read(&self, name: &str) -> crate::Result<Vec<u8>>;

    /// The same bytes, read a stretch at a time and in any order by the function that is returned: a tensor that lies in a
    /// file as it is need not stand in memory whole.
    fn stretches(&self, name: &str) -> crate::Result<ReadAt<'_>> {
        Ok(whole(name, self.read(name)?))
    }

    /// Whether a tensor is stored in blocks of Q8_0 (see [`gguf`](crate::gguf)); [`read`](Self::read) then gives the f32
    /// that they stand for.
    fn is_q8_0(&self, _name: &str) -> bool {
        false
    }

    /// The blocks of such a tensor as they are stored, every scale finite.
    fn read_q8_0(&self, name: &str) -> crate::Result<Vec<u8>> {
        Err(crate::Error::tensor(name, "is not stored in Q8_0"))
    }

    /// The elements of one tensor, widened to f32.
    fn read_f32(&self, name: &str) -> crate::Result<Vec<f32>> {
        let info = self.tensors().get(name).ok_or_else(|| crate::Error::tensor(name, "missing"))?;
        Ok(widen(info.dtype, &self.read(name)?))
    }
}

/// The stretches of a tensor that is in memory.
pub(crate) fn whole<'a>(name: &str, bytes: Vec<u8>) -> ReadAt<'a> {
    let name = name.to_owned();
    Box::new(move |at, out| {
        let stretch = at.checked_add(out.len()).and_then(|end| bytes.get(at..end));
        out.copy_from_slice(stretch.ok_or_else(|| too_short(&name, bytes.len()))?);
        Ok(())
    })
}

/// A tensor that was asked for more bytes than it has.
pub(crate) fn too_short(name: &str, len: usize) -> crate::Error {
    crate::Error::tensor(name, format!("holds {len} bytes, fewer than its shape says"))
}

/// Weights whose quantised tensors are seen as the f32 that they stand for only.
pub(crate) struct Dequantised<'a>(pub &'a dyn Weights);

impl Weights for Dequantised<'_> {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        self.0.tensors()
    }

    fn read(&self, name: &str) -> crate::Result<Vec<u8>> {
        self.0.read(name)
    }
}

/// candle's name of a stored type.
pub(crate) fn candle_dtype(dtype: Dtype) -> candle_core::DType {
    match dtype {
        Dtype::F32 => candle_core::DType::F32,
        Dtype::F16 => candle_core::DType::F16,
        Dtype::Bf16 => candle_core::DType::BF16,
        Dtype::F64 => candle_core::DType::F64,
    }
}

/// Little-endian elements → f32, exact but for f64, which is rounded.
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

/// Refuses NaN and infinities: such weights make every answer NaN, and none of them meaningful.
///
/// # Errors
/// The tensor's name, and the index of the first such element.
pub fn check_finite(name: &str, dtype: Dtype, bytes: &[u8]) -> crate::Result<()> {
    // whole blocks without a branch per element, so that the check costs little beside the reading
    fn first<const W: usize>(bytes: &[u8], bad: impl Fn([u8; W]) -> bool) -> Option<usize> {
        let cells = bytes.as_chunks::<W>().0;
        let block = cells.chunks(256).position(|block| block.iter().fold(false, |any, &c| any | bad(c)))?;
        cells.iter().enumerate().skip(block * 256).find(|&(_, &c)| bad(c)).map(|(i, _)| i)
    }
    // an exponent of all ones: infinite, or not a number
    let bad = match dtype {
        Dtype::F32 => first(bytes, |b: [u8; 4]| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F16 => first(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Dtype::Bf16 => first(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::F64 => first(bytes, |b: [u8; 8]| u64::from_le_bytes(b) >> 52 & 0x7ff == 0x7ff),
    };
    match bad {
        None => Ok(()),
        Some(at) => Err(crate::Error::tensor(
            name,
            format!(
                "element {at} is not a finite number (NaN or infinite): the file is damaged, or the training went wrong"
            ),
        )),
    }
}
