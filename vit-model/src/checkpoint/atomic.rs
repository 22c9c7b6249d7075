//! An output file appears whole or not at all: written without a name or to a sibling temporary, synced, renamed; nothing
//! left after a failure or a signal.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{Error, Result, inputs};

/// The temporary files that are being written. [`abandon`] removes them.
static TEMPORARIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes what is being written, for a program that was told to stop. It must end while it holds what is returned: until then
/// no other thread gives a file its name.
#[must_use]
pub fn abandon() -> impl Drop {
    let mut list = temporaries();
    for path in list.drain(..) {
        let _ = fs::remove_file(path);
    }
    list
}

fn temporaries() -> MutexGuard<'static, Vec<PathBuf>> {
    TEMPORARIES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes `path` through `fill`, which gets an empty file. A link is followed; its target is replaced.
///
/// # Errors
/// `path` is one of `own` (however it is spelled), an input of this run, a folder or a device; or writing failed, and then a file that was
/// there before is unchanged.
pub fn file<E: From<Error>>(
    path: &Path,
    own: &[impl AsRef<Path>],
    fill: impl FnOnce(&File) -> Result<(), E>,
) -> Result<(), E> {
    let target = destination(path, own)?;
    let (file, named) = create_beside(&target).map_err(Error::io(path))?;
    fill(&file).and_then(|()| {
        file.sync_all().map_err(Error::io(path))?;
        let temporary = named.map_or_else(|| name_beside(&file, &target), Ok).map_err(Error::io(path))?;
        // once more, because `fill` may have opened further inputs
        let target = destination(path, own)?;
        fs::rename(temporary.path(), &target).map_err(Error::io(path))?;
        temporary.keep();
        inputs::written(&target);
        Ok(())
    })?;
    // the file is whole and in place; not every system can sync a folder
    if let Some(folder) = target.parent() {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
    }
    Ok(())
}

/// Where the bytes go: through a link to its target. Refuses folders, devices and the inputs.
fn destination<P: AsRef<Path>>(path: &Path, own: &[P]) -> Result<PathBuf> {
    if path.file_name().is_none() {
        return Err(Error::file(path, "is not the name of a file"));
    }
    let Ok(link) = fs::symlink_metadata(path) else {
        return Ok(path.into());
    };
    let target = if link.is_symlink() { fs::canonicalize(path).map_err(Error::io(path))? } else { path.into() };
    let kind = fs::metadata(&target).map_err(Error::io(path))?.file_type();
    if kind.is_dir() {
        return Err(Error::file(path, "is a folder; name a file"));
    }
    if !kind.is_file() {
        return Err(Error::file(path, "is not a regular file, and will not be replaced by one"));
    }
    if let Some(input) = own.iter().map(AsRef::as_ref).find(|input| same_file(&target, input)) {
        let why = format!("is the input {} itself; name another output", input.display());
        return Err(Error::file(path, why));
    }
    match inputs::refusal(&target) {
        Some(why) => Err(Error::file(path, why)),
        None => Ok(target),
    }
}

/// Refuses outputs that could not be written at the end, before the work for them begins: a folder, a device, a file that
/// was read or [is expected](crate::inputs::expect) to be, or the same file twice.
///
/// # Errors
/// The first of these.
pub fn check(outputs: &[&Path]) -> Result<()> {
    let mut places: Vec<PathBuf> = Vec::new();
    for path in outputs {
        let target = destination::<&Path>(path, &[])?;
        // a file that does not exist yet is known by its name in its folder
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = fs::canonicalize(folder).or_else(|_| std::path::absolute(folder)).map_err(Error::io(*path))?;
        let place = target.file_name().map_or_else(|| target.clone(), |name| folder.join(name));
        if places.iter().any(|other| *other == place || same_file(other, &place)) {
            return Err(Error::file(*path, "is named as an output twice; name a second file"));
        }
        places.push(place);
    }
    Ok(())
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

/// A file that is removed when it goes out of scope, or when the program is interrupted.
struct Temporary(Option<PathBuf>);

impl Temporary {
    fn path(&self) -> &Path {
        self.0.as_deref().unwrap_or(Path::new(""))
    }

    /// It has become the output.
    fn keep(mut self) {
        if let Some(path) = self.0.take() {
            temporaries().retain(|other| *other != path);
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            temporaries().retain(|other| *other != path);
            let _ = fs::remove_file(path);
        }
    }
}

/// A new file in the target's folder, with the mode that the umask gives: without a name where the system can make one so,
/// since nothing is left of that however the program ends; else under a temporary one.
fn create_beside(target: &Path) -> io::Result<(File, Option<Temporary>)> {
    #[cfg(target_os = "linux")]
    if let Some(file) = nameless::create(target) {
        return Ok((file, None));
    }
    let create = |path: &Path| OpenOptions::new().write(true).create_new(true).open(path);
    temporary_beside(target, create).map(|(temporary, file)| (file, Some(temporary)))
}

/// A temporary name for a file that has none.
fn name_beside(file: &File, target: &Path) -> io::Result<Temporary> {
    #[cfg(target_os = "linux")]
    return temporary_beside(target, |path| nameless::name(file, path)).map(|(temporary, ())| temporary);
    #[cfg(not(target_os = "linux"))]
    Err(io::Error::other(format!("{file:?} for {} has no name", target.display())))
}

/// Files without a name.
#[cfg(target_os = "linux")]
mod nameless {
    use std::{fs::File, io, os::fd::AsRawFd as _, path::Path};

    use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};

    /// None where the file system has no such files, or where they could not be named later.
    pub fn create(target: &Path) -> Option<File> {
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = open(folder, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o666)).ok()?;
        let file = File::from(file);
        Path::new(&link(&file)).symlink_metadata().is_ok().then_some(file)
    }

    pub fn name(file: &File, path: &Path) -> io::Result<()> {
        Ok(linkat(CWD, link(file), CWD, path, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Where the system shows an open file.
    fn link(file: &File) -> String {
        format!("/proc/self/fd/{}", file.as_raw_fd())
    }
}

/// A name beside the target that `make` could make a file of.
fn temporary_beside<T>(target: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(Temporary, T)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = target.file_name().unwrap_or_default();
    loop {
        // a long name must not become too long by its ending
        let mut temporary = OsString::from(".");
        temporary.push(if name.len() < 200 { name } else { "output".as_ref() });
        temporary.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let temporary = target.with_file_name(temporary);
        // held over the creation: a signal in between must find the name
        let mut list = temporaries();
        match make(&temporary) {
            Ok(made) => {
                list.push(temporary.clone());
                drop(list);
                return Ok((Temporary(Some(temporary)), made));
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::arithmetic_side_effects, clippy::as_conversions)]
mod tests {
    use super::*;

    #[test]
    fn what_is_being_written_has_no_name_where_the_system_can_do_without() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let names = || fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        #[cfg(target_os = "linux")]
        let nameless = nameless::create(&path).is_some();
        #[cfg(not(target_os = "linux"))]
        let nameless = false;
        for text in ["first", "second"] {
            let before = names();
            file::<Error>(&path, &[] as &[&Path], |mut file| {
                io::Write::write_all(&mut file, text.as_bytes()).map_err(Error::io(&path))?;
                assert_eq!(names().len(), before.len() + usize::from(!nameless));
                Ok(())
            })
            .unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(names(), ["out"]);
        }
        // and where it cannot
        let (temporary, _) = temporary_beside(&path, |path| File::create_new(path)).unwrap();
        assert_eq!(names().len(), 2);
        drop(temporary);
        assert_eq!(names(), ["out"]);
    }
}
