//! Fetches a repository. Each file is downloaded next to its destination, verified, and then renamed into place. Interrupted
//! downloads are resumed.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::CacheRepo;
use sha2::{Digest as _, Sha256};

use super::http::{Body, Client, Meta, Waits};
use super::snapshot;
use super::{Progress, RepoId, is_name};
use crate::files::{CONFIG, FORMS, OPEN_CLIP, PROCESSORS, TEXT_FILES, TOKENIZER, small_file};
use crate::{Error, Result, checkpoint, limits};

/// An interrupted download of at least this many bytes is kept for the next run. A smaller one is deleted, because fetching it
/// again costs little.
const MIN_KEPT: u64 = 1 << 20;

/// The size of the largest JSON file to fetch, which is that of the largest one that can be read.
fn max_json() -> u64 {
    u64::try_from(limits::JSON_BYTES).unwrap_or(u64::MAX)
}

/// The state while fetching one repository.
pub(super) struct Fetch<'a> {
    pub client: &'a Client,
    pub id: &'a RepoId,
    pub repo: CacheRepo,
    /// The folder of the whole cache; `folder` is the repository's folder in it.
    pub cache: &'a Path,
    pub folder: PathBuf,
    /// The commit that the first response named.
    pub commit: Option<String>,
    pub progress: &'a mut dyn Progress,
}

/// Why a download failed.
enum Cut {
    /// Trying again cannot help.
    Final(Error),
    /// The connection was lost, so trying again may fetch the rest.
    Broken(Error),
}

impl From<Error> for Cut {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl Fetch<'_> {
    /// Fetches all files that a model needs. The revision points to the snapshot only after all of them are complete.
    pub fn all(&mut self) -> Result<PathBuf> {
        let config = match self.file(CONFIG, max_json())? {
            None => self.file(OPEN_CLIP, max_json())?,
            found => found,
        };
        let Some(config) = config else {
            return Err(Error::Hub(format!(
                "{}: 404 Not Found: {} does not exist, or has no {CONFIG} and is not a timm, transformers or open_clip model",
                self.url(CONFIG),
                self.id
            )));
        };
        let snapshot = config.parent().map(Path::to_path_buf).unwrap_or_default();
        if config.file_name().is_some_and(|name| name == CONFIG) && snapshot::wants_processor(&config) {
            for name in PROCESSORS {
                if self.file_or_marker(name, max_json(), &snapshot)? {
                    break;
                }
            }
        }
        // reject unsupported architectures before fetching their weights
        if config.file_name().is_none_or(|name| name != CONFIG) || !checkpoint::is_text_tower(&snapshot)? {
            checkpoint::info(&snapshot)?;
        }
        self.texts(&snapshot)?;
        self.weights()?;
        if let Some(commit) = self.commit.as_ref().filter(|commit| **commit != self.id.revision) {
            let reference = self.folder.join("refs").join(&self.id.revision);
            create_parent(&reference)?;
            replace(&reference, |temporary| fs::write(temporary, commit))?;
        }
        Ok(snapshot)
    }

    /// Fetches what the tokeniser of a model with a text tower is made of, as far as the snapshot lacks it.
    fn texts(&mut self, snapshot: &Path) -> Result<()> {
        for file in TEXT_FILES {
            // asked each time, because a tokenizer.json makes others redundant
            if !snapshot::texts_to_fetch(snapshot).contains(&file) {
                continue;
            }
            let limit = u64::try_from(limits::TOKENIZER_BYTES).unwrap_or(u64::MAX);
            let limit = if file == TOKENIZER { limit } else { max_json() };
            self.file_or_marker(file, limit, snapshot)?;
        }
        Ok(())
    }

    /// Adds one file to the snapshot, or the marker that the repository has none. Returns whether it has it.
    fn file_or_marker(&mut self, file: &str, limit: u64, snapshot: &Path) -> Result<bool> {
        if self.file(file, limit)?.is_some() {
            return Ok(true);
        }
        if let Some(marker) = snapshot::absent_marker(snapshot, file) {
            create_parent(&marker)?;
            File::create(&marker).map_err(Error::io(&marker))?;
        }
        Ok(false)
    }

    /// Fetches the weights in the first form that the repository has.
    fn weights(&mut self) -> Result<()> {
        for [file, index_name] in FORMS {
            if self.file(file, limits::FETCHED_BYTES)?.is_some() {
                return Ok(());
            }
            let Some(index) = self.file(index_name, max_json())? else { continue };
            for shard in snapshot::shards(&small_file(&index)?, &self.url(index_name))? {
                if self.file(&shard, limits::FETCHED_BYTES)?.is_none() {
                    let url = self.url(&shard);
                    return Err(Error::Hub(format!("{url}: 404 Not Found, though {index_name} names it")));
                }
            }
            return Ok(());
        }
        let files = FORMS.map(|[file, _]| file).join(", ");
        Err(Error::Hub(format!("{}: has no weights under a usual name ({files})", self.id)))
    }

    fn url(&self, file: &str) -> String {
        let revision = self.id.revision.replace('/', "%2F");
        format!("{}/{}/resolve/{revision}/{file}", self.client.endpoint(), self.id.name)
    }

    /// Adds one file to the snapshot, fetching it if necessary. Returns `None` if the repository has no such file.
    fn file(&mut self, file: &str, limit: u64) -> Result<Option<PathBuf>> {
        let url = self.url(file);
        let Some(meta) = self.client.head(&url)? else { return Ok(None) };
        if !is_name(&meta.etag) {
            return Err(Error::Hub(format!("{url}: refused, its ETag {:?} cannot name a file", meta.etag)));
        }
        if !is_name(&meta.commit) {
            return Err(Error::Hub(format!("{url}: refused, its X-Repo-Commit {:?} is not a commit", meta.commit)));
        }
        if let Some(size) = meta.size.filter(|size| *size > limit) {
            return Err(Error::Hub(format!("{url}: {size} bytes, but at most {limit} are fetched")));
        }
        match &self.commit {
            Some(commit) if *commit != meta.commit => {
                return Err(Error::Hub(format!("{}: changed while it was being fetched; try again", self.id)));
            }
            _ => self.commit = Some(meta.commit.clone()),
        }

        let blob = self.repo.blob_path(&meta.etag);
        if !is_whole(&blob, &meta)? {
            self.blob(file, &url, &meta, &blob, limit)?;
        }
        let pointer = self.repo.pointer_path(&meta.commit).join(file);
        create_parent(&pointer)?;
        let target = Path::new("..").join("..").join("blobs").join(&meta.etag);
        if fs::read_link(&pointer).ok().as_deref() != Some(&target) || !pointer.is_file() {
            replace(&pointer, |temporary| link(&target, &blob, temporary))?;
        }
        Ok(Some(pointer))
    }

    /// Downloads a blob next to its destination, verifies it and renames it. A lock keeps other processes from doing the same.
    fn blob(&mut self, file: &str, url: &str, meta: &Meta, blob: &Path, limit: u64) -> Result<()> {
        // send the first request before creating any file, so that a refusal leaves nothing behind
        let partial = with_suffix(blob, ".incomplete");
        let offset = resume_at(&partial, meta);
        let mut body = self.client.get(url, offset, meta.size)?;
        create_parent(blob)?;
        let lock = self.lock(url, meta, &partial)?;
        if is_whole(blob, meta)? {
            return Ok(()); // another process fetched it while this one waited for the lock
        }
        // if the file system has no locks, each process uses its own file name
        let partial =
            if lock.is_some() { partial } else { with_suffix(blob, &format!(".{}.incomplete", std::process::id())) };
        if body.offset != resume_at(&partial, meta) && body.offset > 0 {
            body = self.client.get(url, resume_at(&partial, meta), meta.size)?;
        }
        let open = File::options().create(true).read(true).write(true).truncate(false).open(&partial);
        let mut output = open.map_err(Error::io(&partial))?;

        let (mut done, mut waits) = (0, Waits::default());
        let result = loop {
            let from = body.offset;
            match self.receive(file, meta, body, &mut output, &mut done, limit) {
                Ok(hash) => break self.accept(url, meta, hash, &output, &partial),
                Err(Cut::Final(error)) => break Err(error),
                Err(Cut::Broken(error)) => {
                    if done >= from.saturating_add(MIN_KEPT) {
                        waits = Waits::default(); // the download makes progress
                    }
                    let Some(wait) = waits.next(None) else { break Err(error) };
                    std::thread::sleep(wait);
                    match self.client.get(url, if snapshot::is_sha256(&meta.etag) { done } else { 0 }, meta.size) {
                        Ok(rest) => body = rest,
                        Err(error) => break Err(error),
                    }
                }
            }
        };
        drop(output);
        match result {
            Ok(()) => fs::rename(&partial, blob).map_err(Error::io(blob)),
            Err(error) => {
                let keep = snapshot::is_sha256(&meta.etag) && lock.is_some() && done >= MIN_KEPT;
                if !keep {
                    let _ = fs::remove_file(&partial); // report the first error, not this one
                }
                Err(error)
            }
        }
    }

    /// Writes a response body to the file, after the part that an earlier attempt wrote. Returns the hash of the whole file.
    fn receive(
        &mut self,
        file: &str,
        meta: &Meta,
        mut body: Body,
        output: &mut File,
        done: &mut u64,
        limit: u64,
    ) -> Result<Sha256, Cut> {
        let url = self.url(file);
        let total = meta.size.or(body.total);
        if let Some(total) = total.filter(|total| *total > limit) {
            return Err(Error::Hub(format!("{url}: {total} bytes, but at most {limit} are fetched")).into());
        }
        let disk = |e: io::Error| Error::Hub(format!("{url}: cannot write to the cache: {e}"));
        let mut hash = Sha256::new();
        output.seek(SeekFrom::Start(0)).map_err(disk)?;
        *done = snapshot::hash_into(&mut hash, (&mut *output).take(body.offset)).map_err(disk)?;
        if *done != body.offset {
            return Err(Error::Hub(format!("{url}: the partial download changed; try again")).into());
        }
        output.set_len(*done).map_err(disk)?;

        self.progress.start(file, total, *done);
        let copied = self.copy(&url, &mut body, output, &mut hash, done, total.unwrap_or(limit));
        self.progress.finish();
        copied?;
        match total {
            Some(total) if total != *done => {
                Err(Cut::Broken(Error::Hub(format!("{url}: received {done} bytes, but {total} were announced"))))
            }
            _ => Ok(hash),
        }
    }

    fn copy(
        &mut self,
        url: &str,
        body: &mut Body,
        output: &mut File,
        hash: &mut Sha256,
        done: &mut u64,
        most: u64,
    ) -> Result<(), Cut> {
        let mut buffer = vec![0; 256 << 10];
        let mut pace = self.client.pace();
        loop {
            let n = match body.reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    let silent = matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
                        || e.to_string().contains("timeout");
                    let error = Error::Hub(format!("{url}: interrupted after {done} bytes: {e}"));
                    return Err(if silent { Cut::Final(error) } else { Cut::Broken(error) });
                }
            };
            let bytes = u64::try_from(n).unwrap_or(u64::MAX);
            if done.saturating_add(bytes) > most {
                return Err(
                    Error::Hub(format!("{url}: received more than the {most} bytes that were announced")).into()
                );
            }
            if !pace.keeps_up(bytes) {
                return Err(Error::Hub(format!(
                    "{url}: gave up after {done} bytes, because less than 1 kB a second arrives"
                ))
                .into());
            }
            let part = buffer.get(..n).unwrap_or_default();
            output.write_all(part).map_err(|e| Error::Hub(format!("{url}: cannot write to the cache: {e}")))?;
            hash.update(part);
            *done = done.saturating_add(bytes);
            self.progress.advance(bytes);
        }
    }

    /// Verifies a complete download.
    fn accept(&self, url: &str, meta: &Meta, hash: Sha256, output: &File, partial: &Path) -> Result<()> {
        let digest = snapshot::hex(hash);
        if snapshot::is_sha256(&meta.etag) && digest != meta.etag {
            fs::remove_file(partial).map_err(Error::io(partial))?;
            return Err(Error::Hub(format!(
                "{url}: the SHA-256 of the received file is {digest}, but {} was announced",
                meta.etag
            )));
        }
        output.sync_all().map_err(Error::io(partial))
    }

    /// Takes the lock that Python's `huggingface_hub` also uses. Waits for another process as long as it makes progress.
    /// Returns `None` if the file system does not support locks.
    fn lock(&self, url: &str, meta: &Meta, partial: &Path) -> Result<Option<File>> {
        let name = self.folder.file_name().unwrap_or_default();
        let path = self.cache.join(".locks").join(name).join(format!("{}.lock", meta.etag));
        create_parent(&path)?;
        let open = File::options().create(true).write(true).truncate(false).open(&path);
        let lock = open.map_err(Error::io(&path))?;
        let size = || fs::metadata(partial).map_or(0, |m| m.len());
        let (mut since, mut seen) = (Instant::now(), size());
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Some(lock)),
                Err(TryLockError::Error(_)) => return Ok(None),
                Err(TryLockError::WouldBlock) => {}
            }
            if size() != seen {
                (since, seen) = (Instant::now(), size());
            }
            // wait longer than one patience, because the other process may be retrying
            if since.elapsed() > self.client.patience().saturating_mul(3) {
                return Err(Error::Hub(format!(
                    "{url}: another process is fetching it and makes no progress; try again"
                )));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The offset from which to resume a download. It is 0 unless a SHA-256 can verify the file that two attempts make.
fn resume_at(partial: &Path, meta: &Meta) -> u64 {
    let there = if snapshot::is_sha256(&meta.etag) { fs::metadata(partial).map_or(0, |m| m.len()) } else { 0 };
    if meta.size.is_some_and(|size| there < size) { there } else { 0 }
}

/// Whether a blob is in the cache with the right size and, if its name is a SHA-256, with that SHA-256.
fn is_whole(blob: &Path, meta: &Meta) -> Result<bool> {
    let Ok(found) = fs::metadata(blob) else { return Ok(false) };
    if !found.is_file() || meta.size.is_some_and(|size| size != found.len()) {
        return Ok(false);
    }
    if snapshot::is_sha256(&meta.etag) {
        return Ok(snapshot::sha256_of(blob)? == meta.etag);
    }
    Ok(meta.size.is_some())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io(parent))
}

/// Makes a file or link with a temporary name and renames it to `path`, so that no reader sees an incomplete one.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    let thread = format!("{:?}", std::thread::current().id());
    let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
    let temporary = with_suffix(path, &format!(".{}-{thread}.tmp", std::process::id()));
    let _ = fs::remove_file(&temporary); // left by an earlier process with the same id
    let made = make(&temporary).and_then(|()| fs::rename(&temporary, path));
    if made.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    made.map_err(Error::io(path))
}

#[cfg(unix)]
fn link(target: &Path, _blob: &Path, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, at)
}

/// Symbolic links need a privilege on Windows, so this makes a hard link, or copies the file if that fails.
#[cfg(not(unix))]
fn link(_target: &Path, blob: &Path, at: &Path) -> io::Result<()> {
    fs::hard_link(blob, at).or_else(|_| fs::copy(blob, at).map(|_| ()))
}
