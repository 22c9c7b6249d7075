//! Turns a Hugging Face repository id into a folder of local files, which are downloaded once and verified every time.
//!
//! The cache is shared with Python's `huggingface_hub` and the `hf-hub` crate (`HF_HOME`, `HF_HUB_CACHE`), so each of them finds
//! what the others downloaded. Before a file enters the cache, and again whenever it is used, its size is checked, and for
//! weights also the SHA-256 that is the file's name. [`Hub::get`] does not contact the Hub if the cache has all files;
//! [`Hub::pull`] always does.
//!
//! The crate `hf-hub` provides the layout of the cache and the location of the token. The requests are implemented here, because
//! the token must not follow a redirect to another host, downloads have to be resumed and compared with their SHA-256, and every
//! wait needs a time limit.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

mod fetch;
mod http;
mod known;
mod snapshot;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::files::small_file;
use crate::{Error, Result};

pub use known::{KNOWN, Known};

use fetch::Fetch;
use http::Client;

/// Receives the progress of downloads, for example to draw a progress bar.
pub trait Progress {
    /// A download starts. The file has `total` bytes, if that is known, and an earlier attempt received `done` of them.
    fn start(&mut self, file: &str, total: Option<u64>, done: u64);
    /// This many more bytes have arrived.
    fn advance(&mut self, bytes: u64);
    /// The download succeeded or failed.
    fn finish(&mut self);
}

/// Ignores progress.
impl Progress for () {
    fn start(&mut self, _: &str, _: Option<u64>, _: u64) {}
    fn advance(&mut self, _: u64) {}
    fn finish(&mut self) {}
}

/// The name and revision of a model repository. Both are safe to use in paths and URLs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RepoId {
    name: String,
    revision: String,
}

impl RepoId {
    /// `owner/name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.name.clone(), RepoType::Model, self.revision.clone())
    }
}

/// Parses `owner/name` or `owner/name@revision`, optionally after timm's `hf-hub:`. The revision is a branch, tag or commit;
/// the default is `main`.
impl FromStr for RepoId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let fail = |why: &str| {
            let shown: String = text.chars().take(100).collect();
            let like = "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k or google/vit-base-patch16-224@main";
            Err(Error::Hub(format!("{shown:?} is not a repository id like {like}: {why}")))
        };
        let bare = text.strip_prefix("hf-hub:").or_else(|| text.strip_prefix("hf_hub:")).unwrap_or(text);
        let (name, revision) = bare.split_once('@').unwrap_or((bare, "main"));
        let Some((owner, model)) = name.split_once('/') else { return fail("there is no `/`") };
        for part in [owner, model] {
            if !is_name(part) || part.contains("..") || part.contains("--") || part.ends_with(['.', '-']) {
                return fail("owner and name consist of letters, digits, `.`, `_` and `-`");
            }
        }
        if revision.len() > 255 || !revision.split('/').all(|part| is_name(part) && !part.ends_with('.')) {
            return fail("a revision is a branch, a tag or a commit");
        }
        Ok(Self { name: name.into(), revision: revision.into() })
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// Whether a text is safe as one component of a path: at most 128 letters, digits, `.`, `_` and `-`, and neither `.` nor `-`
/// first.
fn is_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// How to reach the Hub. [`from_env`](Self::from_env) reads the usual environment variables.
#[derive(Clone)]
#[non_exhaustive]
pub struct HubOptions {
    /// The URL of the Hub (`https://huggingface.co`) or of a mirror.
    pub endpoint: String,
    /// The folder of the cache (`~/.cache/huggingface/hub`).
    pub cache: PathBuf,
    /// The access token. It is sent to the endpoint and never to another host.
    pub token: Option<String>,
    /// Use only the cache and open no connection.
    pub offline: bool,
    /// The time after which a download is given up if the server sends nothing, or less than 1 kB per second on average.
    pub patience: Duration,
}

/// Does not show the token.
impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoint, cache, token, offline, patience } = self;
        let token = token.as_ref().map(|_| "…");
        f.debug_struct("HubOptions")
            .field("endpoint", endpoint)
            .field("cache", cache)
            .field("token", &token)
            .field("offline", offline)
            .field("patience", patience)
            .finish()
    }
}

impl HubOptions {
    /// Reads `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` (or `HF_TOKEN_PATH`, the file that `hf auth login`
    /// writes), `HF_HUB_OFFLINE` and `HF_HUB_DOWNLOAD_TIMEOUT` (in seconds, 10 by default), like `huggingface_hub`.
    ///
    /// # Errors
    /// If there is no folder for the cache because there is no home directory.
    pub fn from_env() -> Result<Self> {
        let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(|v| at_home(v.into()));
        let text = |name: &str| std::env::var(name).ok().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let yes = |name: &str| {
            text(name).is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true"))
        };
        let home = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|c| c.join("huggingface")))
            .or_else(|| std::env::home_dir().map(|h| h.join(".cache").join("huggingface")));
        let cache = folder("HF_HUB_CACHE").or_else(|| home.as_ref().map(|h| h.join("hub")));
        let Some(cache) = cache else {
            return Err(Error::Hub("no home directory for the cache: set HF_HOME to a folder".into()));
        };
        let login = match folder("HF_TOKEN_PATH") {
            Some(file) => std::fs::read_to_string(file).ok().map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            None => home.and_then(|h| Cache::new(h.join("hub")).token()),
        };
        let seconds = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|v| v.parse().ok()).filter(|s| (1..=3600).contains(s));
        Ok(Self {
            endpoint: text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            token: text("HF_TOKEN").or(login),
            cache,
            offline: yes("HF_HUB_OFFLINE") || (text("HF_HUB_OFFLINE").is_none() && yes("TRANSFORMERS_OFFLINE")),
            patience: Duration::from_secs(seconds.unwrap_or(10)),
        })
    }
}

/// Expands `~/`, which a shell does only if it is not quoted.
fn at_home(path: PathBuf) -> PathBuf {
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

/// A client of the Hub, with a cache.
pub struct Hub {
    cache: Cache,
    client: Option<Client>,
}

/// A repository in the cache that has all the files that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cached {
    /// The repository and the revision.
    pub id: RepoId,
    /// The folder that contains its files.
    pub folder: PathBuf,
    /// The total size of the files.
    pub bytes: u64,
}

impl Hub {
    /// A client with the options from the environment; see [`HubOptions::from_env`].
    ///
    /// # Errors
    /// As [`HubOptions::from_env`] and [`Hub::new`].
    pub fn from_env() -> Result<Self> {
        Self::new(HubOptions::from_env()?)
    }

    /// A client with these options. This does not open a connection.
    ///
    /// # Errors
    /// If the endpoint is not an http or https URL, or the token contains characters that are not allowed in one.
    pub fn new(options: HubOptions) -> Result<Self> {
        let client = if options.offline { None } else { Some(Client::new(&options)?) };
        Ok(Self { cache: Cache::new(options.cache), client })
    }

    /// The folder with a repository's `config.json`, weights and `preprocessor_config.json`. Uses the cache if all of them are
    /// there and undamaged, and fetches them otherwise.
    ///
    /// # Errors
    /// If the Hub refuses or cannot be reached, or the repository cannot be used. No snapshot in the cache is ever incomplete.
    pub fn get(&self, id: &RepoId, progress: &mut dyn Progress) -> Result<PathBuf> {
        match (self.cached(id), &self.client) {
            (Ok(Some(folder)), _) => Ok(folder),
            (Err(damage), None) => Err(damage),
            (Ok(None), None) => Err(Error::Hub(format!(
                "{id} is not in the cache ({}), and HF_HUB_OFFLINE forbids fetching it; fetch it once without \
                 HF_HUB_OFFLINE (vit-cli pull {id}), or name a folder that contains it",
                self.cache.path().display()
            ))),
            (_, Some(_)) => self.pull(id, progress),
        }
    }

    /// Like [`Hub::get`], but asks the Hub whether the revision has changed, and fetches files that are new or damaged.
    ///
    /// # Errors
    /// As [`Hub::get`].
    pub fn pull(&self, id: &RepoId, progress: &mut dyn Progress) -> Result<PathBuf> {
        let Some(client) = &self.client else {
            return Err(Error::Hub(format!("{id}: HF_HUB_OFFLINE forbids fetching")));
        };
        let (repo, folder) = (self.repo(id), self.folder(id));
        Fetch { client, id, repo, cache: self.cache.path(), folder, commit: None, progress }.all()
    }

    /// The folder of a repository if all its files are in the cache. Verifies each of them.
    ///
    /// # Errors
    /// If a file is damaged.
    pub fn cached(&self, id: &RepoId) -> Result<Option<PathBuf>> {
        let Some(snapshot) = self.snapshot(id) else { return Ok(None) };
        let Some(names) = snapshot::needed(&snapshot)? else { return Ok(None) };
        for name in &names {
            snapshot::check(&snapshot.join(name))?;
        }
        Ok(Some(snapshot))
    }

    /// The repositories in the cache that have all the files that a model needs. Does not verify the files.
    pub fn list(&self) -> Vec<Cached> {
        let folders = std::fs::read_dir(self.cache.path()).into_iter().flatten().flatten();
        let names = folders.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> =
            names.filter_map(|name| Some(name.strip_prefix("models--")?.replacen("--", "/", 1))).collect();
        names.sort();
        let mut found = Vec::new();
        for name in names {
            let Ok(main) = name.parse::<RepoId>() else { continue };
            for revision in revisions(&self.folder(&main)) {
                let id = RepoId { revision, ..main.clone() };
                let Some(folder) = self.snapshot(&id) else { continue };
                let Ok(Some(files)) = snapshot::needed(&folder) else { continue };
                let sizes = files.iter().map(|f| folder.join(f).metadata().map_or(0, |m| m.len()));
                let bytes = sizes.fold(0, u64::saturating_add);
                found.push(Cached { id, folder, bytes });
            }
        }
        found
    }

    /// How long the Hub takes to answer, whatever it says.
    ///
    /// # Errors
    /// Why it cannot be reached, or that `HF_HUB_OFFLINE` forbids it.
    pub fn reach(&self) -> Result<Duration> {
        match &self.client {
            Some(client) => client.reach(),
            None => Err(Error::Hub("HF_HUB_OFFLINE forbids connections".into())),
        }
    }

    /// The folder of the cache.
    pub fn cache(&self) -> &Path {
        self.cache.path()
    }

    /// The folder of the snapshot that a revision points to, if it is in the cache.
    fn snapshot(&self, id: &RepoId) -> Option<PathBuf> {
        let reference = self.folder(id).join("refs").join(&id.revision);
        let commit = match small_file(&reference) {
            Ok(text) => String::from_utf8(text).ok()?.trim().to_owned(),
            Err(_) => id.revision.clone(),
        };
        let snapshot = is_name(&commit).then(|| self.repo(id).pointer_path(&commit))?;
        snapshot.is_dir().then_some(snapshot)
    }

    fn repo(&self, id: &RepoId) -> CacheRepo {
        self.cache.repo(id.repo())
    }

    fn folder(&self, id: &RepoId) -> PathBuf {
        self.cache.path().join(id.repo().folder_name())
    }
}

/// The branches and tags of a cached repository, and the commits that none of them points to.
fn revisions(folder: &Path) -> Vec<String> {
    let names = |of: &str| {
        let entries = std::fs::read_dir(folder.join(of)).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| is_name(name)).collect();
        names.sort();
        names
    };
    let mut revisions: Vec<String> =
        names("refs").into_iter().filter(|r| folder.join("refs").join(r).is_file()).collect();
    let commit = |r: &String| small_file(&folder.join("refs").join(r)).ok().and_then(|t| String::from_utf8(t).ok());
    let named: Vec<String> = revisions.iter().filter_map(commit).map(|c| c.trim().to_owned()).collect();
    revisions.extend(names("snapshots").into_iter().filter(|c| !named.contains(c)));
    revisions
}
