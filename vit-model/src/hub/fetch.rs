//! Fetching a repository: each file beside its place, checked, then moved there; what was cut is taken up again.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::CacheRepo;
use sha2::{Digest as _, Sha256};

use super::http::{Body, Client, Meta, Waits};
use super::snapshot::{self, CONFIG, INDEX, PROCESSOR, WEIGHTS};
use super::{Progress, RepoId, is_name};
use crate::load::{self, small_file};
use crate::{Error, Result, limits};

/// An interrupted download of at least this many bytes is kept for the next run; a smaller one is not worth the file.
const MIN_KEPT: u64 = 1 << 20;

/// Largest JSON file that is fetched: what is read at all.
fn max_json() -> u64 {
    u64::try_from(limits::JSON_BYTES).unwrap_or(u64::MAX)
}

/// The fetching of one repository.
pub(super) struct Fetch<'a> {
    pub client: &'a Client,
    pub id: &'a RepoId,
    pub repo: CacheRepo,
    /// The whole cache, and the repository's folder in it.
    pub cache: &'a Path,
    pub folder: PathBuf,
    /// Known from the first answer on.
    pub commit: Option<String>,
    pub progress: &'a mut dyn Progress,
}

/// How a download ended that did not end well.
enum Cut {
    /// For good.
    Final(Error),
    /// The connection broke; the rest may still come.
    Broken(Error),
}

impl From<Error> for Cut {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl Fetch<'_> {
    /// Fetches what is needed; only when all is there does the revision point to it.
    pub fn all(&mut self) -> Result<PathBuf> {
        let Some(config) = self.file(CONFIG, max_json())? else {
            return Err(Error::Hub(format!(
                "{}: 404 Not Found: {} does not exist, or has no {CONFIG} and is not a model of timm or transformers",
                self.url(CONFIG),
                self.id
            )));
        };
        let snapshot = config.parent().map(Path::to_path_buf).unwrap_or_default();
        if snapshot::wants_processor(&config)
            && self.file(PROCESSOR, max_json())?.is_none()
            && let Some(marker) = snapshot::absent_marker(&snapshot, PROCESSOR)
        {
            create_parent(&marker)?;
            File::create(&marker).map_err(Error::io(&marker))?;
        }
        // an architecture that cannot be run is refused before its weights are fetched
        load::info(&snapshot)?;
        if self.file(WEIGHTS, limits::FETCHED_BYTES)?.is_none() {
            let Some(index) = self.file(INDEX, max_json())? else {
                return Err(Error::Hub(format!(
                    "{}: has neither {WEIGHTS} nor {INDEX} (pickled weights are not read; the owner, or the Hub's \
                     conversion bot, can add safetensors)",
                    self.id
                )));
            };
            for shard in snapshot::shards(&small_file(&index)?, &self.url(INDEX))? {
                if self.file(&shard, limits::FETCHED_BYTES)?.is_none() {
                    let url = self.url(&shard);
                    return Err(Error::Hub(format!("{url}: 404 Not Found, though {INDEX} names it")));
                }
            }
        }
        if let Some(commit) = self.commit.as_ref().filter(|commit| **commit != self.id.revision) {
            let reference = self.folder.join("refs").join(&self.id.revision);
            create_parent(&reference)?;
            replace(&reference, |temporary| fs::write(temporary, commit))?;
        }
        Ok(snapshot)
    }

    fn url(&self, file: &str) -> String {
        let revision = self.id.revision.replace('/', "%2F");
        format!("{}/{}/resolve/{revision}/{file}", self.client.endpoint(), self.id.name)
    }

    /// Makes one file of the repository present in the snapshot, unless the repository has none of that name.
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
            return Err(Error::Hub(format!("{url}: {size} bytes, at most {limit} are fetched")));
        }
        match &self.commit {
            Some(commit) if *commit != meta.commit => {
                return Err(Error::Hub(format!("{}: has changed while it was fetched, try again", self.id)));
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

    /// Fetches a blob beside its place, checks it and moves it there, while no other process does.
    fn blob(&mut self, file: &str, url: &str, meta: &Meta, blob: &Path, limit: u64) -> Result<()> {
        // the first answer comes before the first file, so that a refusal leaves nothing behind
        let partial = with_suffix(blob, ".incomplete");
        let offset = resume_at(&partial, meta);
        let mut body = self.client.get(url, offset, meta.size)?;
        create_parent(blob)?;
        let lock = self.lock(url, meta, &partial)?;
        if is_whole(blob, meta)? {
            return Ok(()); // by the process that was waited for
        }
        // without locks, a name of our own keeps two processes apart
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
                        waits = Waits::default(); // it gets on
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
                    let _ = fs::remove_file(&partial); // the first error is the one to tell
                }
                Err(error)
            }
        }
    }

    /// A body into the file and, with what the file holds before it, into the hash.
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
            return Err(Error::Hub(format!("{url}: {total} bytes, at most {limit} are fetched")).into());
        }
        let disk = |e: io::Error| Error::Hub(format!("{url}: cannot write to the cache: {e}"));
        let mut hash = Sha256::new();
        output.seek(SeekFrom::Start(0)).map_err(disk)?;
        *done = snapshot::hash_into(&mut hash, (&mut *output).take(body.offset)).map_err(disk)?;
        if *done != body.offset {
            return Err(Error::Hub(format!("{url}: the partial download has changed, try again")).into());
        }
        output.set_len(*done).map_err(disk)?;

        self.progress.start(file, total, *done);
        let copied = self.copy(&url, &mut body, output, &mut hash, done, total.unwrap_or(limit));
        self.progress.finish();
        copied?;
        match total {
            Some(total) if total != *done => {
                Err(Cut::Broken(Error::Hub(format!("{url}: {done} bytes came, {total} were announced"))))
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
                    let error = Error::Hub(format!("{url}: broken off after {done} bytes: {e}"));
                    return Err(if silent { Cut::Final(error) } else { Cut::Broken(error) });
                }
            };
            let bytes = u64::try_from(n).unwrap_or(u64::MAX);
            if done.saturating_add(bytes) > most {
                return Err(Error::Hub(format!("{url}: more came than the {most} bytes that were announced")).into());
            }
            if !pace.keeps_up(bytes) {
                return Err(
                    Error::Hub(format!("{url}: given up after {done} bytes: less than 1 kB a second arrives")).into()
                );
            }
            let part = buffer.get(..n).unwrap_or_default();
            output.write_all(part).map_err(|e| Error::Hub(format!("{url}: cannot write to the cache: {e}")))?;
            hash.update(part);
            *done = done.saturating_add(bytes);
            self.progress.advance(bytes);
        }
    }

    /// The last look before a download becomes a blob.
    fn accept(&self, url: &str, meta: &Meta, hash: Sha256, output: &File, partial: &Path) -> Result<()> {
        let digest = snapshot::hex(hash);
        if snapshot::is_sha256(&meta.etag) && digest != meta.etag {
            fs::remove_file(partial).map_err(Error::io(partial))?;
            return Err(Error::Hub(format!(
                "{url}: the SHA-256 of what came is {digest}, announced was {}",
                meta.etag
            )));
        }
        output.sync_all().map_err(Error::io(partial))
    }

    /// The lock that Python's `huggingface_hub` takes, too. Waits for another process as long as that one gets on.
    /// `None`: the file system has no locks.
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
            // the other may be in its last retries
            if since.elapsed() > self.client.patience().saturating_mul(3) {
                return Err(Error::Hub(format!(
                    "{url}: another process is fetching it, and does not get on; try again"
                )));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Where a download may go on: only where what was put together from two attempts can be verified as a whole.
fn resume_at(partial: &Path, meta: &Meta) -> u64 {
    let there = if snapshot::is_sha256(&meta.etag) { fs::metadata(partial).map_or(0, |m| m.len()) } else { 0 };
    if meta.size.is_some_and(|size| there < size) { there } else { 0 }
}

/// Whether a blob is in the cache with the right size and, if that is its name, the right SHA-256.
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

/// Makes a file or link under a name of its own and moves it over `path`, so that no reader sees a half one.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    let thread = format!("{:?}", std::thread::current().id());
    let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
    let temporary = with_suffix(path, &format!(".{}-{thread}.tmp", std::process::id()));
    let _ = fs::remove_file(&temporary); // of an earlier process of the same number
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

/// Links need a privilege on Windows: without it the file is copied, as Python's cache does.
#[cfg(not(unix))]
fn link(_target: &Path, blob: &Path, at: &Path) -> io::Result<()> {
    fs::hard_link(blob, at).or_else(|_| fs::copy(blob, at).map(|_| ()))
}
