//! The Python module `vit_rs`. `model` is the class that answers; below it are `images` (what Python calls an image), `table`
//! (Arrow) and `errors` (exceptions with the command line's texts).

#![forbid(unsafe_code)]

mod convert;
mod errors;
mod images;
mod model;
mod table;

use pyo3::prelude::*;

/// Vision Transformers that classify and embed images, without PyTorch.
///
///     from vit_rs import Model
///     model = Model("digits")
///     vectors = model.embed(["3.png", "8.png"])  # numpy, [2, D], float32
///
/// A model is what `vit-cli` takes: a safetensors or GGUF file, a folder of timm or transformers, an ONNX file, `digits`,
/// or a repository on the Hugging Face Hub.
#[pymodule(gil_used = false)]
fn vit_rs(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<model::Model>()?;
    module.add_class::<model::Prediction>()?;
    module.add_function(wrap_pyfunction!(convert::convert, module)?)?;
    errors::add(module)
}
