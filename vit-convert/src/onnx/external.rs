//! Tensors in files beside the model. Only regular files in the model's folder are read, and only as many bytes as
//! needed.

use std::{
    cell::{Ref, RefCell},
    collections::HashMap,
    fs,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use super::{limits, proto, skeleton};
use crate::{
    Error,
    onnx::stored::{Data, StoredFile, wide},
};

/// The elements of a tensor: bytes in memory, or a range of one of the model's files.
pub enum Elements {
    Here(Bytes),
    Stretch(proto::Stretch),
}

/// Why a tensor is refused: a reason that still needs the tensor's name, or a complete error.
pub enum Failure {
    Why(String),
    Error(Error),
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self::Why(why)
    }
}

/// The files of a model: its own, then those of external data.
#[derive(Clone, Default)]
pub struct Files(Vec<Arc<StoredFile>>);

impl Files {
    /// The elements of a stretch.
    pub fn data(&self, stretch: &proto::Stretch) -> Option<Data> {
        let file = self.0.get(usize::try_from(stretch.file).ok()?)?.clone();
        Some(Data::File { file, offset: stretch.offset, len: usize::try_from(stretch.len).ok()? })
    }

    /// All of them.
    pub fn list(self) -> Vec<Arc<StoredFile>> {
        self.0
    }
}

/// The folder of a model, and the data files opened so far.
pub struct Folder {
    /// The folder of the model's path, to which locations are relative.
    base: PathBuf,
    /// The folders that may contain data, with links resolved: that of the path, and that of the file which the path
    /// links to, because a cache keeps links in one folder and the files in another.
    allowed: Vec<PathBuf>,
    /// The model itself, links resolved.
    model: PathBuf,
    /// Index of a data file in `files`.
    opened: RefCell<HashMap<String, u32>>,
    files: RefCell<Files>,
}

impl Folder {
    /// The folder of the model at `path`.
    pub fn of(path: &Path, file: Arc<StoredFile>) -> Result<Self, Error> {
        let base = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let model = fs::canonicalize(path).map_err(Error::io(path))?;
        let mut allowed = vec![fs::canonicalize(&base).map_err(Error::io(&base))?];
        allowed.extend(model.parent().map(Path::to_owned));
        let files = RefCell::new(Files(vec![file]));
        Ok(Self { base, allowed, model, opened: RefCell::default(), files })
    }

    /// The files opened so far.
    pub fn files(&self) -> Ref<'_, Files> {
        self.files.borrow()
    }

    /// The `size` bytes that the entries of `external_data` describe.
    pub fn find(&self, entries: &[proto::StringStringEntryProto], size: usize) -> Result<Elements, Failure> {
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
        let offset = wide(number("offset")?.unwrap_or(0));
        if let Some(length) = number("length")?.filter(|&length| length != size) {
            return Err(format!("needs {size} bytes, its external length is {length}").into());
        }
        let index = self.open(location)?;
        let stretch = proto::Stretch { offset, len: wide(size), file: index };
        let data = self.files().data(&stretch).ok_or_else(|| format!("has its data in `{location}`, not opened"))?;
        let Data::File { file, .. } = &data else { return Err("is in no file".to_owned().into()) };
        if offset.checked_add(wide(size)).is_none_or(|end| end > file.len()) {
            let why = format!(
                "needs {size} bytes from byte {offset} of `{location}`, which has {} bytes (was it copied completely?)",
                file.len()
            );
            return Err(why.into());
        }
        if size > skeleton::IN_MEMORY {
            return Ok(Elements::Stretch(stretch));
        }
        let bytes = data.read();
        data.check().map_err(Failure::Error)?;
        Ok(Elements::Here(bytes))
    }

    /// The index of a data file.
    fn open(&self, location: &str) -> Result<u32, Failure> {
        if let Some(&index) = self.opened.borrow().get(location) {
            return Ok(index);
        }
        let refuse = |why: &str| Failure::Why(format!("has its data in `{location}`, {why}"));
        let relative = Path::new(location);
        let inside = relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        let portable = !location.contains(['\0', '\\', ':']);
        if location.is_empty() || !inside || !portable {
            return Err(refuse("which is no relative path (with `/`) within the model's folder"));
        }
        if self.opened.borrow().len() >= limits::DATA_FILES {
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
        let file = StoredFile::open(&canonical).map_err(|error| match error {
            Error::Model(vit_model::Error::File { why, .. }) => refuse(&format!("which {why}")),
            error => Failure::Error(error),
        })?;
        if links(file.opened()) > 1 {
            return Err(refuse(
                "a file with another hard link, which may lie outside the model's folder: put a copy in its place",
            ));
        }
        let files = &mut self.files.borrow_mut().0;
        let index = u32::try_from(files.len()).unwrap_or(u32::MAX);
        files.push(Arc::new(file));
        self.opened.borrow_mut().insert(location.to_owned(), index);
        Ok(index)
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
