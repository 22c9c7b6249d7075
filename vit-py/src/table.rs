//! Batches of Arrow: a column of images in, the columns `embedding` and `error` out.

use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray as _;
use arrow_array::{Array, ArrayRef, FixedSizeListArray, Float32Array, RecordBatch, StringArray, StructArray};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3_arrow::{PyRecordBatch, PyTable};
use vit_model::Error as Cause;

use crate::errors;
use crate::images::View;

/// Adds both columns to whatever has the Arrow C data interface. `embed` turns images into vectors of `width` values.
pub fn embed<'py>(
    batch: &Bound<'py, PyAny>,
    column: &str,
    width: usize,
    embed: impl Fn(&[View<'_>]) -> PyResult<Vec<Result<Vec<f32>, Cause>>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = batch.py();
    let module = batch.get_type().module()?;
    let pyarrow = module.to_string().split('.').next() == Some("pyarrow");
    let run = |batches: &[RecordBatch], schema: &SchemaRef| {
        let schema = widened(schema, width)?;
        let columns = batches.iter().map(|batch| images(batch, column)).collect::<PyResult<Vec<_>>>()?;
        let views: Vec<_> = columns.iter().flatten().copied().collect();
        let answers = embed(&views)?;
        let mut answers = answers.into_iter().zip(&views);
        let mut out = Vec::with_capacity(batches.len());
        for batch in batches {
            let mut values = Vec::with_capacity(batch.num_rows() * width);
            let mut texts = Vec::with_capacity(batch.num_rows());
            for (answer, view) in answers.by_ref().take(batch.num_rows()) {
                match answer {
                    Ok(vector) => {
                        values.extend_from_slice(&vector);
                        texts.push(None);
                    }
                    Err(error) => {
                        values.resize(values.len() + width, f32::NAN);
                        texts.push(Some(errors::record(view.name(), &error)));
                    }
                }
            }
            // no row is null, because pyarrow cannot read null lists of a fixed size back from Parquet
            let list = FixedSizeListArray::try_new(item(), length(width)?, Arc::new(Float32Array::from(values)), None);
            let mut columns = batch.columns().to_vec();
            columns.push(Arc::new(list.map_err(bad)?));
            columns.push(Arc::new(StringArray::from(texts)));
            out.push(RecordBatch::try_new(schema.clone(), columns).map_err(bad)?);
        }
        Ok::<_, PyErr>((out, schema))
    };
    if batch.hasattr("__arrow_c_array__")? {
        let batch = batch.extract::<PyRecordBatch>()?.into_inner();
        let (mut done, _) = run(std::slice::from_ref(&batch), &batch.schema())?;
        let done = done.pop().ok_or_else(|| PyValueError::new_err("an empty batch"))?;
        let done = PyRecordBatch::new(done);
        return if pyarrow { done.into_pyarrow(py) } else { Ok(Bound::new(py, done)?.into_any()) };
    }
    if batch.hasattr("__arrow_c_stream__")? {
        let (batches, schema) = batch.extract::<PyTable>()?.into_inner();
        let (done, schema) = run(&batches, &schema)?;
        let done = PyTable::try_new(done, schema)?;
        return if pyarrow { done.into_pyarrow(py) } else { Ok(Bound::new(py, done)?.into_any()) };
    }
    let kind = batch.get_type().name()?;
    Err(PyTypeError::new_err(format!("a batch has the Arrow C data interface (__arrow_c_array__); found {kind}")))
}

fn bad(error: ArrowError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

fn item() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::Float32, false))
}

fn length(width: usize) -> PyResult<i32> {
    i32::try_from(width).map_err(|_| PyValueError::new_err(format!("vectors of {width} values are too long for Arrow")))
}

/// The schema with both columns at its end.
fn widened(schema: &Schema, width: usize) -> PyResult<SchemaRef> {
    let mut fields: Vec<_> = schema.fields().iter().cloned().collect();
    for name in ["embedding", "error"] {
        if fields.iter().any(|field| field.name() == name) {
            return Err(PyValueError::new_err(format!("the batch already has a column {name:?}; rename or drop it")));
        }
    }
    fields.push(Arc::new(Field::new("embedding", DataType::FixedSizeList(item(), length(width)?), false)));
    fields.push(Arc::new(Field::new("error", DataType::Utf8, true)));
    Ok(Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone())))
}

/// The images of a batch, one for each row. Nothing is copied.
fn images<'a>(batch: &'a RecordBatch, column: &str) -> PyResult<Vec<View<'a>>> {
    let Some(array) = batch.column_by_name(column) else {
        let schema = batch.schema();
        let names: Vec<_> = schema.fields().iter().map(|field| format!("{:?}", field.name())).collect();
        let names = names.join(", ");
        return Err(PyValueError::new_err(format!("the batch has no column {column:?}; its columns are {names}")));
    };
    views(array).ok_or_else(|| {
        PyTypeError::new_err(format!(
            "column {column:?}: images are paths (string), encoded files (binary) or structs {{bytes, path}}; found {}",
            array.data_type()
        ))
    })
}

fn views(array: &ArrayRef) -> Option<Vec<View<'_>>> {
    fn paths<'a>(all: impl Iterator<Item = Option<&'a str>>) -> Vec<View<'a>> {
        all.map(|path| path.map_or(View::Missing, |path| View::Path(Path::new(path)))).collect()
    }
    fn files<'a>(all: impl Iterator<Item = Option<&'a [u8]>>) -> Vec<View<'a>> {
        all.map(|bytes| bytes.map_or(View::Missing, View::Bytes)).collect()
    }
    Some(match array.data_type() {
        DataType::Utf8 => paths(array.as_string::<i32>().iter()),
        DataType::LargeUtf8 => paths(array.as_string::<i64>().iter()),
        DataType::Utf8View => paths(array.as_string_view().iter()),
        DataType::Binary => files(array.as_binary::<i32>().iter()),
        DataType::LargeBinary => files(array.as_binary::<i64>().iter()),
        DataType::BinaryView => files(array.as_binary_view().iter()),
        DataType::Struct(_) => pairs(array.as_struct())?,
        _ => return None,
    })
}

/// Structs {bytes, path} of Hugging Face datasets: the path is read only where there are no bytes.
fn pairs(array: &StructArray) -> Option<Vec<View<'_>>> {
    let column = |name: &str| array.column_by_name(name).map(views);
    let (bytes, paths) = match (column("bytes"), column("path")) {
        (Some(bytes), Some(paths)) => (bytes?, Some(paths?)),
        (Some(bytes), None) => (bytes?, None),
        (None, Some(paths)) => (paths?, None),
        (None, None) => return None,
    };
    let one = |row: usize| match bytes.get(row) {
        _ if array.is_null(row) => View::Missing,
        Some(View::Missing) | None => paths.as_ref().and_then(|paths| paths.get(row)).copied().unwrap_or(View::Missing),
        Some(view) => *view,
    };
    Some((0..array.len()).map(one).collect())
}
