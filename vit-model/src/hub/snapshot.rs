//! A snapshot in the cache: which files a model needs, and whether they are whole.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::is_name;
pub(super) use crate::folder::{INDEX, WEIGHTS};
use crate::load::small_file;
use crate::{Error, Result, json, limits};

pub(super) const CONFIG: &str = "config.json";
pub(super) const PROCESSOR: &str = "preprocessor_config.json";

/// The names of the files that a snapshot must have; `None`: one is missing.
pub(super) fn needed(snapshot: &Path) -> Result<Option<Vec<String>>> {
    let config = snapshot.join(CONFIG);
    if !config.is_file() {
        return Ok(None);
    }
    let mut names = vec![CONFIG.to_owned()];
    if snapshot.join(PROCESSOR).is_file() {
        names.push(PROCESSOR.into());
    } else if wants_processor(&config) && !absent_marker(snapshot, PROCESSOR).is_some_and(|m| m.is_file()) {
        return Ok(None); // another program has fetched this without it
    }
    let index = snapshot.join(INDEX);
    if snapshot.join(WEIGHTS).is_file() {
        names.push(WEIGHTS.into());
    } else if index.is_file() {
        let shards = shards(&small_file(&index)?, &index.display().to_string())?;
        if !shards.iter().all(|s| snapshot.join(s).is_file()) {
            return Ok(None);
        }
        names.push(INDEX.into());
        names.extend(shards);
    } else {
        return Ok(None);
    }
    Ok(Some(names))
}

/// A Hugging Face config is accompanied by a processor; timm's config says it all itself.
pub(super) fn wants_processor(config: &Path) -> bool {
    let parsed = small_file(config).ok().and_then(|bytes| json::parse(&bytes).ok());
    parsed.is_some_and(|c| c.get("architecture").is_none())
}

/// Where Python's cache notes that a file does not exist in a commit.
pub(super) fn absent_marker(snapshot: &Path, file: &str) -> Option<PathBuf> {
    let commit = snapshot.file_name()?;
    Some(snapshot.parent()?.parent()?.join(".no_exist").join(commit).join(file))
}

/// The files that an index spreads the weights over, each in the repository's top folder.
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
            Some(file) if is_name(file) && file.ends_with(".safetensors") => shards.insert(file.to_owned()),
            _ => return fail(format!("{file} is not the name of a safetensors file")),
        };
    }
    if shards.is_empty() || shards.len() > limits::FETCHED_SHARDS {
        return fail(format!("weights in {} files, 1 to {} are possible", shards.len(), limits::FETCHED_SHARDS));
    }
    Ok(shards.into_iter().collect())
}

/// A cached file is whole: a blob that came through LFS is named by its SHA-256; any other is at least not empty.
pub(super) fn check(pointer: &Path) -> Result<()> {
    let blob = pointer.canonicalize().map_err(Error::io(pointer))?;
    let damaged = |why: &str| {
        Err(Error::file(pointer, format!("is damaged in the cache: {why}; without HF_HUB_OFFLINE it is fetched again")))
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
        return damaged("its SHA-256 is not the one that it was published with");
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

/// Hashes a reader to its end; how many bytes that were.
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
