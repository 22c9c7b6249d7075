//! What the files beside an ONNX file say about it: optimum and transformers.js put a `config.json` and a
//! `preprocessor_config.json` there, or a folder above.

use std::path::{Path, PathBuf};

use serde_json::Value;
use vit_model::{Config, PreprocessConfig, inputs, labels, limits};

use crate::{Error, Result};

/// What was found.
#[derive(Default)]
pub struct Neighbours {
    pub preprocess: Option<PreprocessConfig>,
    pub labels: Option<Vec<String>>,
    /// Which files were used.
    pub used: Vec<&'static str>,
}

/// Looks beside a file, and above a folder called `onnx`.
///
/// # Errors
/// A processor that cannot be read: its preprocessing would be another than the one that is used without it.
pub fn of(path: &Path, model: &Config) -> Result<Neighbours> {
    let mut found = Neighbours::default();
    let Some(config) = beside(path, "config.json") else { return Ok(found) };
    let Some(parsed) = read(&config).filter(|parsed| parsed.get("model_type").is_some_and(Value::is_string)) else {
        return Ok(found); // some other program's configuration
    };
    let model_type = parsed.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if let Some(file) = beside(path, "preprocessor_config.json") {
        let wrong =
            |why: String| Error::graph(format!("{}: {why}; --preprocess says what to use instead", file.display()));
        let processor = read(&file).ok_or_else(|| wrong("is not JSON".into()))?;
        let preprocess = PreprocessConfig::from_hf(&processor, model_type, model).map_err(|e| wrong(e.to_string()))?;
        found.preprocess = Some(preprocess);
        found.used.push("preprocess: that of preprocessor_config.json beside the ONNX file");
    }
    let names = parsed.get("id2label").map(|map| labels::parse(map.to_string().as_bytes()));
    if let Some(Ok(names)) = names
        && names.len() == model.num_classes
    {
        found.labels = Some(names);
        found.used.push("labels: those of config.json beside the ONNX file");
    }
    Ok(found)
}

fn beside(path: &Path, name: &str) -> Option<PathBuf> {
    let folder = path.parent()?;
    let above = folder.file_name().filter(|folder| *folder == "onnx").and_then(|_| folder.parent());
    [Some(folder), above].into_iter().flatten().map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// JSON of a usual size.
fn read(file: &Path) -> Option<Value> {
    let bytes = inputs::read(file, limits::JSON_BYTES).ok().filter(|bytes| bytes.len() <= limits::JSON_BYTES)?;
    serde_json::from_slice(&bytes).ok()
}
