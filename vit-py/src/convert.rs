//! The function `convert`.

use std::path::PathBuf;

use pyo3::prelude::*;
use vit_convert::{Options, Verify};
use vit_model::Format;

use crate::errors;

/// Converts an ONNX file to a safetensors file that this module, timm's names and vit-cli understand.
///
/// The graph and the converted model run on the same inputs, and nothing is written unless they agree.
///
/// Args:
///     input: the ONNX file.
///     output: the file to write. A name that ends in .gguf stores the matrices in Q8_0; a folder, or a name that ends in /,
///         becomes a folder that timm opens.
///     labels: the names of the classes.
///     preprocess: how images are preprocessed: "imagenet", "inception", "clip", or "mean=0.5,std=0.5,…".
///     img_size: (height, width), if the file leaves it open.
///     verify: whether to run and compare both.
///
/// Returns:
///     What the file does not say and was assumed, and what the target computes differently: a list of sentences.
#[pyfunction]
#[pyo3(signature = (input, output, *, labels = None, preprocess = None, img_size = None, verify = true))]
pub fn convert(
    py: Python<'_>,
    input: PathBuf,
    output: PathBuf,
    labels: Option<Vec<String>>,
    preprocess: Option<&str>,
    img_size: Option<(usize, usize)>,
    verify: bool,
) -> PyResult<Vec<String>> {
    let fail = |error: vit_convert::Error| errors::of_conversion(&error);
    let mut options = Options::new().verify(if verify { Verify::Run } else { Verify::Skip });
    if let Some(labels) = labels {
        options = options.labels(labels);
    }
    if let Some(text) = preprocess {
        options = options.preprocess(vit_convert::preprocess(text).map_err(fail)?);
    }
    if let Some((height, width)) = img_size {
        options = options.img_size([height, width]);
    }
    let folder = output.as_os_str().as_encoded_bytes().ends_with(b"/") || output.is_dir();
    let gguf = !folder && output.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    py.detach(|| {
        let mut model = vit_convert::convert(&input, &options).map_err(fail)?;
        if gguf {
            model.quantise().map_err(fail)?;
        }
        let format = match (folder, gguf) {
            (true, _) => Format::Timm,
            (_, true) => Format::Gguf,
            _ => Format::Safetensors,
        };
        let mut notes = model.imported().assumed.clone();
        notes.extend(model.save(&output, format).map_err(fail)?);
        Ok(notes)
    })
}
