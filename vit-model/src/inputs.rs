//! Opens the files that a run reads, and remembers which they are, so that no output replaces one of them.
//!
//! Every reader of a file opens it here and every writer asks here, so a new command or format is covered without code of its
//! own. A library may well write a model over the file that it came from, so files are remembered only after a program has
//! called [`protect`].

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::{
    collections::HashSet,
    fs::{self, File, Metadata},
    io::{self, Read as _},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{Error, Result};

/// What tells two files apart, whatever their names: device and inode. Windows has a path without links instead.
#[cfg(unix)]
type Identity = (u64, u64);
#[cfg(not(unix))]
type Identity = std::path::PathBuf;

/// The files of this run.
#[derive(Default)]
struct Run {
    inputs: HashSet<Identity>,
    outputs: HashSet<Identity>,
}

static RUN: Mutex<Option<Run>> = Mutex::new(None);

fn run() -> MutexGuard<'static, Option<Run>> {
    RUN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// To be called once when a program starts: from now on every file that is opened for reading counts as an input, as does the
/// file that standard input is redirected from.
pub fn protect() {
    let mut run = run();
    let inputs = &mut run.get_or_insert_default().inputs;
    #[cfg(unix)]
    {
        use std::os::fd::AsFd as _;
        if let Ok(stdin) = io::stdin().as_fd().try_clone_to_owned()
            && let Ok(meta) = File::from(stdin).metadata()
            && meta.is_file()
        {
            inputs.insert(identity(&meta));
        }
    }
    #[cfg(not(unix))]
    let _ = inputs;
}

/// Whether a program has called [`protect`].
pub(crate) fn protected() -> bool {
    run().is_some()
}

#[cfg(unix)]
fn identity(meta: &Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt as _;
    (meta.dev(), meta.ino())
}

/// The identity of what a path leads to, if that is there.
fn identity_of(path: &Path) -> Option<Identity> {
    #[cfg(unix)]
    return fs::metadata(path).ok().map(|meta| identity(&meta));
    #[cfg(not(unix))]
    fs::canonicalize(path).ok()
}

/// Counts a file as an input although it is not opened yet, or not in this run: another file of the same model, for example.
pub fn expect(path: &Path) {
    let mut run = run();
    if let Some(run) = run.as_mut()
        && let Some(identity) = identity_of(path).filter(|_| path.is_file())
    {
        run.inputs.insert(identity);
    }
}

/// Why a file must not be replaced, if it must not.
pub(crate) fn refusal(path: &Path) -> Option<&'static str> {
    let run = run();
    let (run, identity) = (run.as_ref()?, identity_of(path)?);
    if run.inputs.contains(&identity) {
        Some("is the input itself, or another file of it; name another output")
    } else if run.outputs.contains(&identity) {
        Some("was just written as another output of this run; name a second file")
    } else {
        None
    }
}

/// Counts a file as an output: another one must not replace it in the same run.
pub(crate) fn written(path: &Path) {
    if let Some(run) = run().as_mut()
        && let Some(identity) = identity_of(path)
    {
        run.outputs.insert(identity);
    }
}

/// Opens a regular file for reading.
///
/// # Errors
/// It cannot be opened, or is a folder, a device or a pipe. A name that turns into a pipe at the last moment does not block.
pub fn open(path: &Path) -> Result<(File, Metadata)> {
    let regular = |meta: &Metadata| {
        if meta.is_dir() {
            Err(Error::file(path, "is a folder, not a regular file"))
        } else if meta.is_file() {
            Ok(())
        } else {
            Err(Error::file(path, "is not a regular file"))
        }
    };
    // a look before opening, because opening a device can have effects; and one after, because the name may lead to another file
    regular(&fs::metadata(path).map_err(Error::io(path))?)?;
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    }
    let file = options.open(path).map_err(Error::io(path))?;
    let meta = file.metadata().map_err(Error::io(path))?;
    regular(&meta)?;
    if let Some(run) = run().as_mut() {
        #[cfg(unix)]
        run.inputs.insert(identity(&meta));
        #[cfg(not(unix))]
        run.inputs.extend(identity_of(path));
    }
    Ok((file, meta))
}

/// Whether an open file still is what it was when it was opened, as far as its length and its modification time tell.
///
/// # Errors
/// It is not, or the system cannot say.
pub(crate) fn unchanged(file: &File, opened: &Metadata) -> io::Result<()> {
    let now = file.metadata()?;
    // not every system records times
    let written = matches!((now.modified(), opened.modified()), (Ok(now), Ok(then)) if now != then);
    if written || now.len() != opened.len() {
        return Err(io::Error::other("was written to while it was read; read it again when it is complete"));
    }
    Ok(())
}

/// A whole regular file of at most so many bytes. Of a longer one it returns one byte more than that.
///
/// # Errors
/// As [`open`]; it cannot be read, or was written to meanwhile.
pub fn read(path: &Path, most: usize) -> Result<Vec<u8>> {
    let (file, meta) = open(path)?;
    let mut bytes = Vec::new();
    (&file)
        .take(u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1))
        .read_to_end(&mut bytes)
        .and_then(|_| unchanged(&file, &meta))
        .map_err(Error::io(path))?;
    Ok(bytes)
}
