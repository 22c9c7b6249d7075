//! Tensors: every encoding of the elements becomes little-endian bytes, whose length must match type and shape.

use bytes::Bytes;

use super::{
    external::{Elements, Failure, Files, Folder},
    limits, proto,
};
use crate::{
    Error, Result,
    onnx::graph::{DType, Tensor},
    onnx::stored::{Data, wide},
};

/// `data_location`: in another file.
const EXTERNAL: i32 = 1;

/// Checks a tensor and moves its elements to `raw_data` or `stretch`, so that [`get`] is cheap. The other fields are
/// emptied.
pub fn normalise(tensor: &mut proto::TensorProto, folder: &Folder) -> Result<()> {
    elements(tensor, folder).map_err(|why| match why {
        Failure::Why(why) => Error::tensor(tensor.name.clone(), why),
        Failure::Error(error) => error,
    })
}

/// A tensor that went through [`normalise`].
pub fn get(tensor: &proto::TensorProto, files: &Files) -> Result<Tensor> {
    let unread = || Error::tensor(tensor.name.clone(), "was not read");
    let dtype = DType::from_onnx(tensor.data_type).ok_or_else(unread)?;
    let dims = dims(&tensor.dims).map_err(|why| Error::tensor(tensor.name.clone(), why))?;
    let data = match &tensor.stretch {
        None => tensor.raw_data.clone().ok_or_else(unread)?.into(),
        Some(stretch) => files.data(stretch).ok_or_else(unread)?,
    };
    Ok(Tensor { dtype, dims, data })
}

fn elements(tensor: &mut proto::TensorProto, folder: &Folder) -> Result<(), Failure> {
    let dtype = DType::from_onnx(tensor.data_type)
        .ok_or_else(|| format!("element type {} cannot be read", type_name(tensor.data_type)))?;
    if tensor.segment.is_some() {
        return Err("is stored in segments, which nothing defines".to_owned().into());
    }
    let dims = dims(&tensor.dims)?;
    let count = dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
    let size = count.and_then(|n| dtype.bytes(n));
    let (Some(count), Some(size)) = (count, size) else {
        return Err(format!("dimensions {dims:?} are larger than any memory").into());
    };
    let typed = [
        ("float_data", !tensor.float_data.is_empty()),
        ("int32_data", !tensor.int32_data.is_empty()),
        ("int64_data", !tensor.int64_data.is_empty()),
        ("double_data", !tensor.double_data.is_empty()),
        ("uint64_data", !tensor.uint64_data.is_empty()),
        ("string_data", !tensor.string_data.is_empty()),
    ];
    let mut places: Vec<&str> = typed.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
    // some writers set an empty raw_data beside the field that counts
    let stretch = tensor.stretch.take().filter(|stretch| stretch.len > 0);
    if stretch.is_some() || tensor.raw_data.as_ref().is_some_and(|raw| !raw.is_empty()) {
        places.push("raw_data");
    }
    let external = match tensor.data_location {
        0 => false,
        EXTERNAL => true,
        other => return Err(format!("data_location {other} is unknown").into()),
    };
    let data = if external {
        if !places.is_empty() {
            return Err(format!("is declared external, and has {} too", places.join(", ")).into());
        }
        folder.find(&tensor.external_data, size)?
    } else {
        if places.len() > 1 {
            return Err(format!("has its elements in more than one place: {}", places.join(", ")).into());
        }
        let found = places.first().copied().unwrap_or("raw_data");
        let fits = found == "raw_data" || found == field_of(dtype);
        if !fits {
            return Err(format!("of type {dtype:?} has its elements in {found}, not in {}", field_of(dtype)).into());
        }
        match stretch {
            Some(stretch) => Elements::Stretch(stretch),
            None if found == "raw_data" => Elements::Here(tensor.raw_data.take().unwrap_or_default()),
            None => Elements::Here(typed_data(tensor, dtype, count)?),
        }
    };
    let len = match &data {
        Elements::Here(bytes) => wide(bytes.len()),
        Elements::Stretch(stretch) => stretch.len,
    };
    if len != wide(size) {
        let shape = if dims.is_empty() { "a scalar".to_owned() } else { format!("shape {dims:?}") };
        return Err(format!("of type {dtype:?} and {shape} needs {size} bytes, found {len}").into());
    }
    let bools = match &data {
        _ if dtype != DType::Bool => Data::Memory(Bytes::new()),
        Elements::Here(bytes) => bytes.clone().into(),
        Elements::Stretch(stretch) => folder.files().data(stretch).ok_or_else(|| "is in no file".to_owned())?,
    };
    if bools.read().iter().any(|&b| b > 1) {
        return Err("has booleans other than 0 and 1".to_owned().into());
    }
    tensor.external_data = Vec::new();
    tensor.data_location = 0;
    match data {
        Elements::Here(bytes) => tensor.raw_data = Some(bytes),
        Elements::Stretch(stretch) => tensor.stretch = Some(stretch),
    }
    Ok(())
}

fn dims(dims: &[i64]) -> Result<Vec<usize>, String> {
    if dims.len() > limits::RANK {
        return Err(format!("has {} dimensions, at most {} are supported", dims.len(), limits::RANK));
    }
    let checked: Option<_> = dims.iter().map(|&d| usize::try_from(d).ok()).collect();
    checked.ok_or_else(|| format!("has impossible dimensions {dims:?}"))
}

/// The typed field that holds elements of a type.
fn field_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float_data",
        DType::F64 => "double_data",
        DType::I64 => "int64_data",
        DType::U32 | DType::U64 => "uint64_data",
        _ => "int32_data",
    }
}

/// The elements of the typed field, which is emptied.
fn typed_data(tensor: &mut proto::TensorProto, dtype: DType, count: usize) -> Result<Bytes, String> {
    // two 4-bit elements share an entry
    let entries = if dtype.bits() == 4 { count.div_ceil(2) } else { count };
    let check = |found: usize| {
        if found == entries {
            Ok(())
        } else {
            Err(format!("needs {entries} entries in {}, found {found}", field_of(dtype)))
        }
    };
    let range = |value: &dyn std::fmt::Display| format!("holds {value}, which is no {dtype:?}");
    let ints = std::mem::take(&mut tensor.int32_data);
    Ok(match dtype {
        DType::F32 => {
            check(tensor.float_data.len())?;
            little_endian(std::mem::take(&mut tensor.float_data), f32::to_le_bytes)
        }
        DType::F64 => {
            check(tensor.double_data.len())?;
            little_endian(std::mem::take(&mut tensor.double_data), f64::to_le_bytes)
        }
        DType::I64 => {
            check(tensor.int64_data.len())?;
            little_endian(std::mem::take(&mut tensor.int64_data), i64::to_le_bytes)
        }
        DType::U64 => {
            check(tensor.uint64_data.len())?;
            little_endian(std::mem::take(&mut tensor.uint64_data), u64::to_le_bytes)
        }
        DType::U32 => {
            check(tensor.uint64_data.len())?;
            narrow(&std::mem::take(&mut tensor.uint64_data), |v| u32::try_from(v).ok().map(u32::to_le_bytes), &range)?
        }
        DType::I32 => {
            check(ints.len())?;
            little_endian(ints, i32::to_le_bytes)
        }
        DType::U8 | DType::Bool | DType::U4 => {
            check(ints.len())?;
            narrow(&ints, |v| u8::try_from(v).ok().map(u8::to_le_bytes), &range)?
        }
        // packed pairs of 4 bits are written as -128..127 by some, as 0..255 by others
        DType::I4 => {
            check(ints.len())?;
            let byte = |v| u8::try_from(v).ok().or_else(|| i8::try_from(v).ok().map(i8::cast_unsigned));
            narrow(&ints, |v| byte(v).map(u8::to_le_bytes), &range)?
        }
        DType::I8 => {
            check(ints.len())?;
            narrow(&ints, |v| i8::try_from(v).ok().map(i8::to_le_bytes), &range)?
        }
        DType::I16 => {
            check(ints.len())?;
            narrow(&ints, |v| i16::try_from(v).ok().map(i16::to_le_bytes), &range)?
        }
        DType::U16 | DType::F16 | DType::Bf16 => {
            check(ints.len())?;
            narrow(&ints, |v| u16::try_from(v).ok().map(u16::to_le_bytes), &range)?
        }
    })
}

/// Elements as bytes, without a copy on a little-endian machine.
fn little_endian<T: bytemuck::Pod + Send, const N: usize>(values: Vec<T>, bytes: impl Fn(T) -> [u8; N]) -> Bytes {
    struct Owner<T>(Vec<T>);
    impl<T: bytemuck::Pod> AsRef<[u8]> for Owner<T> {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
    if cfg!(target_endian = "little") {
        return Bytes::from_owner(Owner(values));
    }
    values.into_iter().flat_map(bytes).collect()
}

/// Elements as bytes of a narrower type; refuses what does not fit.
fn narrow<T: Copy + std::fmt::Display, const N: usize>(
    values: &[T],
    bytes: impl Fn(T) -> Option<[u8; N]>,
    range: &dyn Fn(&dyn std::fmt::Display) -> String,
) -> Result<Bytes, String> {
    let mut out = Vec::with_capacity(values.len().saturating_mul(N));
    for &value in values {
        out.extend_from_slice(&bytes(value).ok_or_else(|| range(&value))?);
    }
    Ok(out.into())
}

/// ONNX's name of an element type that is not read.
fn type_name(number: i32) -> String {
    match number {
        0 => "UNDEFINED".into(),
        8 => "STRING".into(),
        14 => "COMPLEX64".into(),
        15 => "COMPLEX128".into(),
        17 => "FLOAT8E4M3FN".into(),
        18 => "FLOAT8E4M3FNUZ".into(),
        19 => "FLOAT8E5M2".into(),
        20 => "FLOAT8E5M2FNUZ".into(),
        23 => "FLOAT4E2M1".into(),
        24 => "FLOAT8E8M0".into(),
        25 => "UINT2".into(),
        26 => "INT2".into(),
        27 => "FLOAT6E2M3".into(),
        28 => "FLOAT6E3M2".into(),
        other => other.to_string(),
    }
}
