//! Output files: bytes through [`vit_convert::save`] (whole or not at all), and tensors of f32 as safetensors.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context as _;

use crate::output::show;

/// Writes `path` through `fill`, whole or not at all. None of `inputs` may be the same file, however it is spelled.
pub fn file(
    path: &Path,
    inputs: &[&Path],
    fill: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    vit_convert::save::file(path, inputs, |file| {
        let mut buffered = BufWriter::with_capacity(256 << 10, file);
        fill(&mut buffered).and_then(|()| Ok(buffered.flush()?)).with_context(|| show(path))
    })
}

/// A tensor of f32 for [`safetensors`].
pub struct F32<'a> {
    pub name: &'a str,
    pub shape: Vec<usize>,
    pub values: &'a [f32],
}

/// Writes a safetensors file of f32 tensors, sorted by name; the same input gives the same bytes.
pub fn safetensors(
    path: &Path,
    inputs: &[&Path],
    tensors: &[F32<'_>],
    metadata: &[(&str, String)],
) -> anyhow::Result<()> {
    let mut sorted: Vec<&F32<'_>> = tensors.iter().collect();
    sorted.sort_by_key(|t| t.name);
    let mut header = serde_json::Map::new();
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.clone().into()));
    let metadata: serde_json::Map<String, serde_json::Value> =
        [("format".into(), "pt".into())].into_iter().chain(metadata).collect();
    header.insert("__metadata__".into(), metadata.into());
    let mut offset = 0;
    for tensor in &sorted {
        let end = offset + tensor.values.len() * 4;
        let entry = serde_json::json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end] });
        header.insert(tensor.name.into(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    file(path, inputs, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for tensor in &sorted {
            for values in tensor.values.chunks(16 << 10) {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                out.write_all(&bytes)?;
            }
        }
        Ok(())
    })
}
