//! Reads the document in the files that this project writes.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{
    checksum::{self, Checksum, Checksums},
    model::Checkpoint,
    safetensors::Safetensors,
};
use crate::{Error, ModelInfo, Result, json};

/// Opens a safetensors file that this project wrote.
pub(super) fn ours(mut file: Safetensors) -> Result<Checkpoint> {
    let path = file.path().to_owned();
    let (info, checksums) = document(&path, file.metadata())?;
    if let Some(other) = file.others().first() {
        return Err(Error::file(&path, format!("tensor `{other}` is left over: not a tensor of weights")));
    }
    if let Some(checksums) = checksums {
        file.expect(checksums);
    }
    Checkpoint::new(info, Arc::new(file)).map_err(|error| error.within(&path))
}

/// Reads the document, and the checksums in it, from the metadata strings of a file that this project wrote.
pub(super) fn document(path: &Path, strings: &BTreeMap<String, String>) -> Result<(ModelInfo, Option<Checksums>)> {
    let Some(text) = strings.get("config") else {
        return Err(Error::file(
            path,
            "carries no configuration, so it was not written by vit-convert. If it came with a config.json, open the folder that contains both",
        ));
    };
    let fail = |why: String| Error::file(path, format!("its configuration {why}"));
    let mut value = json::parse(text.as_bytes()).map_err(fail)?;
    if let Some(version) = value.get("vit").filter(|version| **version != 1) {
        return Err(fail(format!("is of version {version}, but this program reads version 1: update the program")));
    }
    let understood = |error| fail(format!("cannot be understood: {error}"));
    let checksums = value.as_object_mut().and_then(|document| document.remove(checksum::KEY));
    let checksums: Option<Checksums> = checksums.map(serde_json::from_value).transpose().map_err(understood)?;
    let info: ModelInfo = serde_json::from_value(value).map_err(understood)?;
    if let Some(expected) = checksums.as_ref().map(|checksums| checksums.model) {
        // validate first, because an invalid value makes a more helpful message than a wrong checksum
        info.validate().map_err(|error| fail(format!("is impossible: {error}")))?;
        let found = Checksum::of_model(&info.model);
        if found != expected {
            return Err(fail(format!(
                "holds another `model` than was written: its checksum is {found}, expected {expected}. The file was damaged \
                 or edited; convert or fetch it again (if you edited it on purpose, remove `{}`)",
                checksum::KEY
            )));
        }
    }
    Ok((info, checksums))
}
