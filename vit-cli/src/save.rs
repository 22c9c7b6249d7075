//! Writes output files atomically, with file names in errors that are safe to print.

use std::ffi::OsStr;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context as _;

use vit_model::checkpoint::{Values, atomic};
use vit_model::image::files;
use vit_model::inputs;

use crate::output::show;

/// Refuses, before the work begins, an output that would replace a file which this run has read or is going to read: `images`
/// are the inputs that the command line names, folders among them.
pub fn check(path: &Path, images: &[impl AsRef<OsStr>]) -> anyhow::Result<()> {
    // a file that does not exist replaces nothing, so folders need not be listed
    if path.exists() {
        for image in images.iter().map(|image| Path::new(image)) {
            if image.is_dir() {
                files(image).flatten().for_each(|file| inputs::expect(&file));
            } else {
                inputs::expect(image);
            }
        }
    }
    Ok(atomic::check(&[path])?)
}

/// Writes `path` with `fill`. The file appears only when it is complete. It must not be a file that this run reads, even
/// through another path.
pub fn file(path: &Path, fill: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>) -> anyhow::Result<()> {
    atomic::file(path, &[] as &[&Path], |file| {
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
pub fn safetensors(path: &Path, tensors: &[Array<'_>], metadata: &[(&str, String)]) -> anyhow::Result<()> {
    let tensors: Vec<_> = tensors.iter().map(|t| (t.name, &*t.shape, t.values)).collect();
    Ok(vit_model::checkpoint::save_tensors(path, &tensors, metadata, &[] as &[&Path])?)
}
