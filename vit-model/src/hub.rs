//! Hugging Face repository id → a folder of local files, fetched once, checked every time.
//!
//! The cache is the one that Python's `huggingface_hub` and the `hf-hub` crate use (`HF_HOME`, `HF_HUB_CACHE`), so that
//! a model fetched by one is found by the others. A file enters it only whole: its size, and for weights the SHA-256
//! that names it, are checked before, and again whenever it is used. What is in the cache is used without asking the Hub;
//! [`Hub::pull`] asks.
//!
//! From `hf-hub` come the layout of the cache and the token's place. The requests are made here: a token must not follow
//! a redirect to another host, downloads are resumed and compared with their SHA-256, and waiting has a limit.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

mod fetch;
mod http;
mod snapshot;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::load::small_file;
use crate::{Error, Result};
use fetch::Fetch;
use http::Client;

/// What a download tells about itself; a program draws its bar from this.
pub trait Progress {
    /// A file begins: `total` bytes if that is known, of which `done` are there from an earlier attempt.
    fn start(&mut self, file: &str, total: Option<u64>, done: u64);
    /// So many more bytes have arrived.
    fn advance(&mut self, bytes: u64);
    /// The file has come, or was given up.
    fn finish(&mut self);
}

/// No progress is shown.
impl Progress for () {
    fn start(&mut self, _: &str, _: Option<u64>, _: u64) {}
    fn advance(&mut self, _: u64) {}
    fn finish(&mut self) {}
}

/// A model repository and a revision of it, both safe to be parts of a path and of a URL.
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

/// Reads `owner/name` or `owner/name@revision`, also after timm's `hf-hub:`; the revision is a branch, a tag or a commit,
/// `main` if absent.
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
                return fail("owner and name are of letters, digits, `.`, `_` and `-`");
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

/// Letters, digits, `.`, `_`, `-`; at most 128, not starting with `.` or `-`: one harmless component of a path.
fn is_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// How to reach the Hub, where the environment is not to decide.
#[derive(Clone)]
pub struct HubOptions {
    /// `https://huggingface.co` or a mirror of it.
    pub endpoint: String,
    /// The folder of the cache (`~/.cache/huggingface/hub`).
    pub cache: PathBuf,
    /// Sent to the endpoint, never to another host.
    pub token: Option<String>,
    /// Only the cache is used, no socket is opened.
    pub offline: bool,
    /// A server that is silent for so long, or sends less than 1 kB a second on average over it, is given up.
    pub patience: Duration,
}

/// Without the token.
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
    /// wrote), `HF_HUB_OFFLINE` and `HF_HUB_DOWNLOAD_TIMEOUT` (seconds, 10 if absent), as `huggingface_hub` does.
    ///
    /// # Errors
    /// No folder for the cache: there is no home directory.
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

/// `~/x` as a shell would have read it, had the variable been set by one.
fn at_home(path: PathBuf) -> PathBuf {
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

/// The Hub as this process may use it.
pub struct Hub {
    cache: Cache,
    client: Option<Client>,
}

/// A repository in the cache, all of whose files seem to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached {
    /// The repository and the revision that was asked for.
    pub id: RepoId,
    /// The folder of its files.
    pub folder: PathBuf,
    /// What they take.
    pub bytes: u64,
}

impl Hub {
    /// The Hub as the environment says, see [`HubOptions::from_env`].
    ///
    /// # Errors
    /// As [`Hub::new`].
    pub fn from_env() -> Result<Self> {
        Self::new(HubOptions::from_env()?)
    }

    /// The Hub as the options say. No connection is made yet.
    ///
    /// # Errors
    /// An endpoint that is no URL, a token that cannot be one.
    pub fn new(options: HubOptions) -> Result<Self> {
        let client = if options.offline { None } else { Some(Client::new(&options)?) };
        Ok(Self { cache: Cache::new(options.cache), client })
    }

    /// The folder with a repository's `config.json`, weights and `preprocessor_config.json`: out of the cache if they
    /// are there whole, else fetched.
    ///
    /// # Errors
    /// What the Hub answered, or why it could not be asked; nothing that is incomplete is left in the cache.
    pub fn get(&self, id: &RepoId, progress: &mut dyn Progress) -> Result<PathBuf> {
        match (self.cached(id), &self.client) {
            (Ok(Some(folder)), _) => Ok(folder),
            (Err(damage), None) => Err(damage),
            (Ok(None), None) => Err(Error::Hub(format!(
                "{id} is not in the cache ({}), and HF_HUB_OFFLINE forbids to fetch it; fetch it once without \
                 HF_HUB_OFFLINE (vit-cli pull {id}), or name a folder that holds it",
                self.cache.path().display()
            ))),
            (_, Some(_)) => self.pull(id, progress),
        }
    }

    /// As [`Hub::get`], but asks the Hub whether the revision has moved on, and fetches what is new or damaged.
    ///
    /// # Errors
    /// As [`Hub::get`].
    pub fn pull(&self, id: &RepoId, progress: &mut dyn Progress) -> Result<PathBuf> {
        let Some(client) = &self.client else {
            return Err(Error::Hub(format!("{id}: HF_HUB_OFFLINE forbids to fetch")));
        };
        let (repo, folder) = (self.repo(id), self.folder(id));
        Fetch { client, id, repo, cache: self.cache.path(), folder, commit: None, progress }.all()
    }

    /// The folder of a repository whose files are all in the cache, each of them checked.
    ///
    /// # Errors
    /// One of the files is damaged.
    pub fn cached(&self, id: &RepoId) -> Result<Option<PathBuf>> {
        let Some(snapshot) = self.snapshot(id) else { return Ok(None) };
        let Some(names) = snapshot::needed(&snapshot)? else { return Ok(None) };
        for name in &names {
            snapshot::check(&snapshot.join(name))?;
        }
        Ok(Some(snapshot))
    }

    /// The repositories in the cache that have all the files that a model needs; the files themselves are not read.
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

    /// The folder of the cache.
    pub fn cache(&self) -> &Path {
        self.cache.path()
    }

    /// The snapshot that a revision points to in the cache.
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

/// The branches and tags of a cached repository; commits that none of them names.
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
