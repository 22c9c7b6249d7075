//! Writes output files atomically, with file names in errors that are safe to print.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context as _;

use vit_model::checkpoint::Values;

use crate::output::show;

/// Writes `path` with `fill`. The file appears only when it is complete. It must not be the same file as any of `inputs`, even
/// through another path.
pub fn file(
    path: &Path,
    inputs: &[&Path],
    fill: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    vit_model::checkpoint::atomic::file(path, inputs, |file| {
        let mut buffered = BufWriter::with_capacity(256 << 10, file);
        fill(&mut buffered).and_then(|()| Ok(buffered.flush()?)).with_context(|| show(path))
    })
}

/// A tensor for [`safetensors`].
pub struct Array<'a> {
    pub name: &'a str,
    pub shape: Vec<usize>,
    pub values: Values<'a>,
}

impl<'a> Array<'a> {
    /// A tensor of f32.
    pub fn f32(name: &'a str, shape: impl Into<Vec<usize>>, values: &'a [f32]) -> Self {
        Self { name, shape: shape.into(), values: Values::F32(values) }
    }
}

/// Writes a safetensors file. The same input gives the same bytes.
pub fn safetensors(
    path: &Path,
    inputs: &[&Path],
    tensors: &[Array<'_>],
    metadata: &[(&str, String)],
) -> anyhow::Result<()> {
    let tensors: Vec<_> = tensors.iter().map(|t| (t.name, &*t.shape, t.values)).collect();
    Ok(vit_model::checkpoint::save_tensors(path, &tensors, metadata, inputs)?)
}
