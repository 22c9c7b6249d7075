//! What Python calls an image: a path, an encoded file in memory, an array of pixels, a picture of PIL.

use std::path::{Path, PathBuf};

use numpy::{PyArrayDescrMethods, PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyByteArray, PyBytes, PyMemoryView, PyString};
use vit_model::image::Image;
use vit_model::predictor::Input;

/// An image as Python holds it. Nothing of its pixels is copied here.
pub enum Held<'py> {
    Path(PathBuf),
    Bytes(PyBackedBytes),
    Pixels(PyReadonlyArrayDyn<'py, u8>),
}

/// An image without ties to the interpreter, so that it can be read while the interpreter does something else.
#[derive(Clone, Copy)]
pub enum View<'a> {
    Path(&'a Path),
    Bytes(&'a [u8]),
    Pixels([usize; 3], &'a [u8]),
    Missing,
}

impl<'a> View<'a> {
    /// The name of the file, if the image is one.
    pub fn name(self) -> Option<&'a Path> {
        match self {
            Self::Path(path) => Some(path),
            _ => None,
        }
    }
}

impl<'a> From<View<'a>> for Input<'a> {
    fn from(view: View<'a>) -> Self {
        match view {
            View::Path(path) => path.into(),
            View::Bytes(bytes) => bytes.into(),
            View::Pixels(shape, pixels) => Image::from_pixels(shape, pixels).into(),
            View::Missing => vit_model::Result::<&Path>::Err(vit_model::Error::image("the value is null")).into(),
        }
    }
}

impl<'py> Held<'py> {
    /// Recognises one image.
    pub fn of(image: &Bound<'py, PyAny>) -> PyResult<Self> {
        if image.is_instance_of::<PyBytes>() || image.is_instance_of::<PyByteArray>() {
            return Ok(Self::Bytes(image.extract()?));
        }
        if image.is_instance_of::<PyMemoryView>() {
            return Ok(Self::Bytes(image.call_method0("tobytes")?.extract()?));
        }
        if image.is_instance_of::<PyString>() || image.hasattr("__fspath__")? {
            return Ok(Self::Path(image.extract()?));
        }
        if let Ok(array) = image.cast::<PyUntypedArray>() {
            return Self::array(array.as_any());
        }
        let py = image.py();
        if image.hasattr("convert")? && image.hasattr("mode")? {
            // PIL: what is in memory already has its final mode, if that is RGB
            let rgb = image.call_method1("convert", ("RGB",))?;
            return Self::array(&py.import("numpy")?.call_method1("asarray", (rgb,))?);
        }
        if image.hasattr("__array__")? {
            return Self::array(&py.import("numpy")?.call_method1("asarray", (image,))?);
        }
        let kind = image.get_type().name()?;
        Err(PyTypeError::new_err(format!(
            "an image is a path, bytes, a PIL.Image, or an array [H, W, 3] of uint8; found {kind}"
        )))
    }

    fn array(array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = array.cast::<PyUntypedArray>()?;
        let shape = array.shape();
        let fits = matches!(shape, [_, _] | [_, _, 1 | 3 | 4]);
        if !fits || !array.dtype().is_equiv_to(&numpy::dtype::<u8>(array.py())) {
            return Err(PyTypeError::new_err(format!(
                "an array of pixels is [H, W, 3] of uint8 (or [H, W], or [H, W, 4]); found {shape:?} of {}",
                array.dtype()
            )));
        }
        // only an array with gaps is copied
        let plain = array.py().import("numpy")?.call_method1("ascontiguousarray", (array,))?;
        Ok(Self::Pixels(plain.extract::<PyReadonlyArrayDyn<'py, u8>>()?))
    }

    /// The image without ties to the interpreter.
    pub fn view(&self) -> PyResult<View<'_>> {
        Ok(match self {
            Self::Path(path) => View::Path(path),
            Self::Bytes(bytes) => View::Bytes(bytes),
            Self::Pixels(array) => {
                let shape = match *array.shape() {
                    [h, w] => [h, w, 1],
                    [h, w, c] => [h, w, c],
                    _ => [0, 0, 0],
                };
                View::Pixels(shape, array.as_slice()?)
            }
        })
    }
}

/// Recognises many images: a list, a tuple, any iterable, or an array `[N, H, W, 3]`.
pub fn all<'py>(images: &Bound<'py, PyAny>) -> PyResult<Vec<Held<'py>>> {
    let one =
        images.is_instance_of::<PyString>() || images.is_instance_of::<PyBytes>() || images.hasattr("__fspath__")?;
    if one || images.hasattr("mode")? {
        return Err(PyTypeError::new_err("a list of images is expected; for one image write [image]"));
    }
    images.try_iter()?.map(|image| Held::of(&image?)).collect()
}
