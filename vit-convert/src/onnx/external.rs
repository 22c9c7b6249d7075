//! Tensors in files beside the model: only regular files within the model's own folder, and exactly as many bytes as needed.

use std::{
    cell::RefCell,
    collections::HashMap,
    fs::{self, File},
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;

use super::{limits, proto, tensor::Failure};
use crate::{Error, map};

/// The folder of a model, and the data files opened so far.
pub struct Folder {
    /// Where the model's path says it lies: locations are relative to it.
    base: PathBuf,
    /// Folders, links resolved, that data may lie in: that of the path, and that of the file which the path leads to (a
    /// cache keeps links to its files in one folder, and the files side by side in another).
    allowed: Vec<PathBuf>,
    /// The model itself, links resolved.
    model: PathBuf,
    files: RefCell<HashMap<String, Bytes>>,
}

impl Folder {
    /// The folder of the model at `path`.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let base = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let model = fs::canonicalize(path).map_err(Error::io(path))?;
        let mut allowed = vec![fs::canonicalize(&base).map_err(Error::io(&base))?];
        allowed.extend(model.parent().map(Path::to_owned));
        Ok(Self { base, allowed, model, files: RefCell::default() })
    }

    /// The bytes that the entries of `external_data` describe, `size` of them.
    pub fn read(&self, entries: &[proto::StringStringEntryProto], size: usize) -> Result<Bytes, Failure> {
        let entry = |key: &str| {
            let mut found = entries.iter().filter(|e| e.key == key);
            let first = found.next();
            if found.next().is_some() {
                Err(format!("gives its external `{key}` twice"))
            } else {
                Ok(first.map(|e| e.value.as_str()))
            }
        };
        let number = |key: &str| match entry(key)? {
            None => Ok(None),
            Some(text) => match text.trim().parse::<usize>() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(format!("has the external {key} `{text}`, which is no size")),
            },
        };
        let location =
            entry("location")?.ok_or_else(|| "is declared external, and does not say in which file".to_owned())?;
        let offset = number("offset")?.unwrap_or(0);
        if let Some(length) = number("length")?.filter(|&length| length != size) {
            return Err(format!("needs {size} bytes, its external length is {length}").into());
        }
        let file = self.open(location)?;
        let end = offset.checked_add(size).filter(|&end| end <= file.len());
        let end = end.ok_or_else(|| {
            format!(
                "needs {size} bytes from byte {offset} of `{location}`, which has {} bytes (was it copied completely?)",
                file.len()
            )
        })?;
        Ok(file.slice(offset..end))
    }

    /// The bytes of a data file.
    fn open(&self, location: &str) -> Result<Bytes, Failure> {
        if let Some(file) = self.files.borrow().get(location) {
            return Ok(file.clone());
        }
        let refuse = |why: &str| Failure::Why(format!("has its data in `{location}`, {why}"));
        let relative = Path::new(location);
        let inside = relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        let portable = !location.contains(['\0', '\\', ':']);
        if location.is_empty() || !inside || !portable {
            return Err(refuse("which is no relative path (with `/`) within the model's folder"));
        }
        if self.files.borrow().len() >= limits::DATA_FILES {
            return Err(format!("is in one of more than {} external files", limits::DATA_FILES).into());
        }
        let path = self.base.join(relative);
        let canonical = fs::canonicalize(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                refuse(&format!("which is missing: put that file into {}", self.base.display()))
            }
            _ => Failure::Error(Error::Io { path: path.clone(), source: error }),
        })?;
        if !self.allowed.iter().any(|folder| canonical.starts_with(folder)) {
            return Err(refuse("a link that leads out of the model's folder"));
        }
        if canonical == self.model {
            return Err(refuse("the model's own file"));
        }
        // looked at before it is opened, because opening a pipe waits; and again after, because it may have been exchanged
        let meta = fs::metadata(&canonical).map_err(|e| Failure::Error(Error::io(&path)(e)))?;
        if !meta.is_file() {
            return Err(refuse("which is not a regular file"));
        }
        let file = File::open(&canonical).map_err(|e| Failure::Error(Error::io(&path)(e)))?;
        let meta = file.metadata().map_err(|e| Failure::Error(Error::io(&path)(e)))?;
        if !meta.is_file() {
            return Err(refuse("which is not a regular file"));
        }
        if links(&meta) > 1 {
            return Err(refuse(
                "a file with another hard link, which may lie outside the model's folder: put a copy in its place",
            ));
        }
        let bytes = map::bytes(&file).map_err(|e| Failure::Error(Error::io(&path)(e)))?;
        self.files.borrow_mut().insert(location.to_owned(), bytes.clone());
        Ok(bytes)
    }
}

/// Hard links to a file.
#[cfg(unix)]
fn links(meta: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::nlink(meta)
}

/// Hard links to a file: not known here.
#[cfg(not(unix))]
fn links(_meta: &fs::Metadata) -> u64 {
    1
}
