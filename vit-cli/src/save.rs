//! Writing an output file whole or not at all: a sibling temporary, synced, renamed; nothing left after a failure or a signal.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, bail};

use crate::output::show;

/// The temporary that is being written; the handler of SIGINT removes it.
static TEMPORARY: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Removes what an interrupted run was writing.
pub fn abandon() {
    if let Ok(mut temporary) = TEMPORARY.try_lock()
        && let Some(path) = temporary.take()
    {
        let _ = fs::remove_file(path);
    }
}

/// Writes `path` through `fill`. None of `inputs` may be the same file, however it is spelled.
pub fn file(
    path: &Path,
    inputs: &[&Path],
    fill: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let target = destination(path, inputs)?;
    let (temporary, mut file) = create_beside(&target).with_context(|| show(path))?;
    *lock() = Some(temporary.clone());
    let written = write_and_sync(&mut file, fill)
        .and_then(|()| fs::rename(&temporary, &target).map_err(anyhow::Error::new))
        .with_context(|| show(path));
    *lock() = None;
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    } else if let Some(folder) = target.parent() {
        // the file is whole and in place; not every system can sync a folder
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
    }
    written
}

fn lock() -> std::sync::MutexGuard<'static, Option<PathBuf>> {
    TEMPORARY.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write_and_sync(file: &mut File, fill: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut buffered = BufWriter::with_capacity(256 << 10, &mut *file);
    fill(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    Ok(file.sync_all()?)
}

/// Where the bytes go: through a link to its target. Refuses folders, devices and the inputs.
fn destination(path: &Path, inputs: &[&Path]) -> anyhow::Result<PathBuf> {
    if path.file_name().is_none() {
        bail!("{}: not the name of a file", show(path));
    }
    let Ok(link) = fs::symlink_metadata(path) else {
        return Ok(path.into());
    };
    let target = if link.is_symlink() { fs::canonicalize(path).with_context(|| show(path))? } else { path.into() };
    let kind = fs::metadata(&target).with_context(|| show(path))?.file_type();
    if kind.is_dir() {
        bail!("{}: this is a folder; name a file", show(path));
    }
    if !kind.is_file() {
        bail!("{}: not a regular file, and will not be replaced by one", show(path));
    }
    let real = fs::canonicalize(&target).with_context(|| show(path))?;
    for input in inputs {
        if same_file(&real, input) {
            bail!("{}: this is also the input {}; name another output", show(path), show(input));
        }
    }
    Ok(target)
}

#[cfg(unix)]
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn same_file(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// A new file beside the target, with the mode that the umask gives.
fn create_beside(target: &Path) -> io::Result<(PathBuf, File)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = target.file_name().unwrap_or_default();
    loop {
        let mut temporary = std::ffi::OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let temporary = target.with_file_name(temporary);
        match OpenOptions::new().write(true).create_new(true).open(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
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
