//! Checks a snapshot in the cache: which files a model needs, and whether they are complete and undamaged.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::is_name;
use crate::files::{
    ADDED_TOKENS, CONFIG, FORMS, MERGES, OPEN_CLIP, PROCESSORS, TEXT_FILES, TOKENIZER, VOCAB, small_file,
};
use crate::{Error, Result, checkpoint, json, limits};

/// The names of the files that a snapshot must have, or `None` if one is missing.
pub(super) fn needed(snapshot: &Path) -> Result<Option<Vec<String>>> {
    let Some(described) = [CONFIG, OPEN_CLIP].into_iter().find(|name| snapshot.join(name).is_file()) else {
        return Ok(None);
    };
    let config = snapshot.join(described);
    let mut names = vec![described.to_owned()];
    if let Some(name) = PROCESSORS.into_iter().find(|name| snapshot.join(name).is_file()) {
        names.push(name.into());
    } else {
        let absent = |name| absent_marker(snapshot, name).is_some_and(|marker| marker.is_file());
        if described == CONFIG && wants_processor(&config) && !PROCESSORS.into_iter().all(absent) {
            return Ok(None); // another program fetched this snapshot without the processor
        }
    }
    // the others are optional, because images need none of them
    names.extend(TEXT_FILES.into_iter().filter(|file| snapshot.join(file).is_file()).map(str::to_owned));
    for [file, index_name] in FORMS {
        let index = snapshot.join(index_name);
        if snapshot.join(file).is_file() {
            names.push(file.into());
            return Ok(Some(names));
        }
        if index.is_file() {
            let shards = shards(&small_file(&index)?, &index.display().to_string())?;
            if !shards.iter().all(|s| snapshot.join(s).is_file()) {
                return Ok(None);
            }
            names.push(index_name.into());
            names.extend(shards);
            return Ok(Some(names));
        }
    }
    Ok(None)
}

/// Whether a model may have a processor file. transformers' models do; timm's config.json contains the preprocessing.
pub(super) fn wants_processor(config: &Path) -> bool {
    let parsed = small_file(config).ok().and_then(|bytes| json::parse(&bytes).ok());
    parsed.is_some_and(|c| c.get("architecture").is_none())
}

/// The files of a tokeniser that a snapshot may still lack: those that are neither there nor known not to exist. A model
/// without a text tower lacks none.
pub(super) fn texts_to_fetch(snapshot: &Path) -> Vec<&'static str> {
    let config = small_file(&snapshot.join(CONFIG)).ok().and_then(|bytes| json::parse(&bytes).ok());
    if !config.is_some_and(|config| checkpoint::may_have_texts(&config)) {
        return Vec::new();
    }
    let there = |file: &str| snapshot.join(file).is_file();
    let known = |file: &str| there(file) || absent_marker(snapshot, file).is_some_and(|marker| marker.is_file());
    let redundant = |file: &str| there(TOKENIZER) && [VOCAB, MERGES, ADDED_TOKENS].contains(&file);
    TEXT_FILES.into_iter().filter(|file| !known(file) && !redundant(file)).collect()
}

/// The marker that Python's `huggingface_hub` creates if a file does not exist in a commit.
pub(super) fn absent_marker(snapshot: &Path, file: &str) -> Option<PathBuf> {
    let commit = snapshot.file_name()?;
    Some(snapshot.parent()?.parent()?.join(".no_exist").join(commit).join(file))
}

/// The weight files that an index lists, all of them in the repository's top folder.
pub(super) fn shards(index: &[u8], name: &str) -> Result<Vec<String>> {
    let fail = |why: String| Err(Error::Hub(format!("{name}: {why}")));
    let parsed = match json::parse(index) {
        Ok(parsed) => parsed,
        Err(why) => return fail(why),
    };
    let Some(map) = parsed.get("weight_map").and_then(|m| m.as_object()) else {
        return fail("has no `weight_map`".into());
    };
    let mut shards = std::collections::BTreeSet::new();
    for file in map.values() {
        match file.as_str() {
            Some(file) if is_name(file) && [".safetensors", ".bin"].iter().any(|end| file.ends_with(end)) => {
                shards.insert(file.to_owned())
            }
            _ => return fail(format!("{file} is not the name of a safetensors or .bin file")),
        };
    }
    if shards.is_empty() || shards.len() > limits::FETCHED_SHARDS {
        return fail(format!("lists {} weight files, but 1 to {} are allowed", shards.len(), limits::FETCHED_SHARDS));
    }
    Ok(shards.into_iter().collect())
}

/// Checks that a cached file is complete. The name of a blob from LFS is its SHA-256, which is compared with the content; any
/// other blob must only not be empty, because nothing is known about its content.
pub(super) fn check(pointer: &Path) -> Result<()> {
    let blob = pointer.canonicalize().map_err(Error::io(pointer))?;
    let damaged = |why: &str| {
        Err(Error::file(pointer, format!("is damaged in the cache: {why}; unset HF_HUB_OFFLINE to fetch it again")))
    };
    let found = blob.metadata().map_err(Error::io(&blob))?;
    if !found.is_file() {
        return damaged("not a regular file");
    }
    if found.len() == 0 {
        return damaged("an empty file");
    }
    let name = blob.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if is_sha256(name) && sha256_of(&blob)? != name {
        return damaged("its SHA-256 differs from the published one");
    }
    Ok(())
}

pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

pub(super) fn sha256_of(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let file = File::open(path).map_err(Error::io(path))?;
    hash_into(&mut hash, file).map_err(Error::io(path))?;
    Ok(hex(hash))
}

/// Hashes a reader to its end and returns the number of bytes.
pub(super) fn hash_into(hash: &mut Sha256, mut file: impl Read) -> std::io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0_u64;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(total);
        }
        hash.update(buffer.get(..n).unwrap_or_default());
        total = total.saturating_add(u64::try_from(n).unwrap_or_default());
    }
}

pub(super) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
