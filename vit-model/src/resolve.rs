//! What a user calls a model, and where that model is: a file, a folder, `digits`, a short name, or a repository on the Hub.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

#[cfg(feature = "hub")]
use candle_core::{DType, Device};

use crate::checkpoint::{self, Checkpoint, OpenOptions, TextSource};
#[cfg(feature = "hub")]
use crate::hub::{Hub, KNOWN, RepoId};
use crate::{Error, ModelInfo, Result, VisionTransformer, names::Architecture};

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Location {
    /// Part of this library: [`DIGITS`](checkpoint::DIGITS).
    #[cfg(feature = "digits")]
    Digits,
    /// A file of weights, or a folder.
    Path(PathBuf),
    /// An ONNX file, which `vit_convert::open` opens.
    Onnx(PathBuf),
    /// A repository on the Hub, which may or may not be in the cache.
    #[cfg(feature = "hub")]
    Repository(RepoId),
}

impl Location {
    /// Finds a model by name. A path that exists has precedence; otherwise the name is `digits`, a short name of
    /// [`hub::KNOWN`](crate::hub::KNOWN), or a repository (`owner/name`, `owner/name@revision`). Nothing is fetched.
    ///
    /// ```
    /// use vit_model::resolve::Location;
    ///
    /// assert!(Location::of("no/such/folder").unwrap_err().to_string().contains("no such file or folder"));
    /// ```
    ///
    /// # Errors
    /// Nothing has that name, and what was probably meant.
    pub fn of(name: impl AsRef<OsStr>) -> Result<Self> {
        let name = name.as_ref();
        let path = Path::new(name);
        if let Ok(found) = path.metadata() {
            return Ok(if found.is_file() { file(path) } else { folder(path) });
        }
        if path.symlink_metadata().is_ok() {
            return Err(not_found(path, "a link to a file that does not exist".into()));
        }
        match name.to_str() {
            #[cfg(feature = "digits")]
            Some("digits") => Ok(Self::Digits),
            Some(name) if looks_like_a_path(name) => {
                Err(not_found(path, format!("no such file or folder{}", near_miss(path))))
            }
            #[cfg(feature = "hub")]
            Some(name) if name.contains('/') || KNOWN.iter().any(|known| known.name == name) => {
                Ok(Self::Repository(RepoId::named(name)?))
            }
            Some(name) => Err(not_found(path, forms(name))),
            None => Err(not_found(path, "no such file or folder".into())),
        }
    }

    /// The model's configuration and tensors; a repository that is not in the cache is fetched. Tensors are read later,
    /// when a model is built.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Hub::get`](crate::hub::Hub::get).
    pub fn open(&self) -> Result<Checkpoint> {
        self.open_with(&OpenOptions::new())
    }

    /// As [`open`](Self::open), with what the files do not say.
    ///
    /// # Errors
    /// As [`open`](Self::open), and as [`OpenOptions::open`].
    pub fn open_with(&self, options: &OpenOptions) -> Result<Checkpoint> {
        match self {
            #[cfg(feature = "digits")]
            Self::Digits => Checkpoint::from_bytes("digits", checkpoint::DIGITS),
            Self::Path(path) | Self::Onnx(path) => options.open(path),
            #[cfg(feature = "hub")]
            Self::Repository(id) => options.open(Hub::from_env()?.get(id, &mut ())?),
        }
    }

    /// The model's text tower, whether there is an image tower beside it or not; a repository that is not in the cache is
    /// fetched.
    ///
    /// # Errors
    /// As [`TextSource::open`] and [`Hub::get`](crate::hub::Hub::get); a model that has no text tower.
    pub fn text(&self) -> Result<TextSource> {
        match self {
            #[cfg(feature = "digits")]
            Self::Digits => Err(Error::unsupported("`digits` has no text tower")),
            Self::Path(path) | Self::Onnx(path) => TextSource::open(path),
            #[cfg(feature = "hub")]
            Self::Repository(id) => TextSource::open(Hub::from_env()?.get(id, &mut ())?),
        }
    }

    /// The model's configuration alone: a folder needs no weights for it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn info(&self) -> Result<ModelInfo> {
        match self {
            Self::Path(path) => checkpoint::info(path),
            _ => Ok(self.open()?.info),
        }
    }
}

impl Checkpoint {
    /// Opens a model by name: a file, a folder, `digits`, a short name such as `vit-base`, or a repository on the Hub, which
    /// is fetched unless it is in the cache. See [`Location::of`].
    ///
    /// ```
    /// let digits = vit_model::Checkpoint::resolve("digits")?;
    /// assert_eq!(digits.info.model.num_classes, 10);
    /// # Ok::<(), vit_model::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Location::of`] and [`Location::open`].
    pub fn resolve(name: impl AsRef<OsStr>) -> Result<Self> {
        Location::of(name)?.open()
    }

    /// As [`resolve`](Self::resolve), under the name that Python's libraries have for it:
    /// `Checkpoint::from_pretrained("timm/vit_small_patch14_dinov2.lvd142m")`.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    #[cfg(feature = "hub")]
    pub fn from_pretrained(name: &str) -> Result<Self> {
        Self::resolve(name)
    }
}

impl VisionTransformer {
    /// The model of a repository on the Hub, or whatever else [`Checkpoint::resolve`] takes.
    ///
    /// # Errors
    /// As [`Checkpoint::resolve`] and [`VisionTransformer::from_weights`].
    #[cfg(feature = "hub")]
    pub fn from_pretrained(name: &str, dtype: DType, device: &Device) -> Result<Self> {
        Checkpoint::resolve(name)?.model(dtype, device)
    }
}

fn not_found(path: &Path, why: String) -> Error {
    Error::io(path)(io::Error::new(io::ErrorKind::NotFound, why))
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|e| extensions.iter().any(|known| e.eq_ignore_ascii_case(known)))
}

fn file(path: &Path) -> Location {
    if has_extension(path, &["onnx"]) { Location::Onnx(path.into()) } else { Location::Path(path.into()) }
}

/// If a folder contains `model.onnx` and no checkpoint, the user most likely means that file.
fn folder(path: &Path) -> Location {
    let has = |name: &str| path.join(name).exists();
    if path.is_dir() && !has("config.json") && !has("model.safetensors") && has("model.onnx") {
        return Location::Onnx(path.join("model.onnx"));
    }
    Location::Path(path.into())
}

fn looks_like_a_path(name: &str) -> bool {
    name.starts_with(['/', '.', '~', '\\'])
        || name.ends_with('/')
        || name.matches('/').count() > 1
        || name.contains(['\\', '\n', '\0'])
        || has_extension(Path::new(name), &["safetensors", "onnx", "json", "pt", "pth", "bin", "ckpt", "tar", "gguf"])
}

/// `; did you mean …?` if there is a file of almost that name.
fn near_miss(path: &Path) -> String {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return String::new(),
    };
    if !parent.is_dir() {
        return format!(" (nor is there a folder {})", parent.display());
    }
    for extension in ["safetensors", "onnx", "gguf"] {
        let candidate = path.with_extension(extension);
        if candidate != path && candidate.is_file() {
            return format!("; did you mean {}?", candidate.display());
        }
    }
    String::new()
}

fn forms(name: &str) -> String {
    let hint = match Architecture::of(name) {
        Some(_) => format!("; it is an architecture, whose weights are in timm/{name} on the Hub"),
        None => String::new(),
    };
    format!(
        "neither a file nor a folder{hint}. A model is a .safetensors or .gguf file of vit-convert's, a folder with weights \
         and config.json, a file of weights beside its config.json (.safetensors, .bin, .pth, .pt, .ckpt), an .onnx file, \
         `digits`, or a repository on the Hub (owner/name, or a short name that `vit-cli models` lists)"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What `Location::of` says of a name that it refuses.
    fn refusal(name: impl AsRef<OsStr>) -> String {
        Location::of(name).unwrap_err().to_string()
    }

    #[test]
    fn paths_that_exist_have_precedence_and_say_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(Location::of(folder.path()).unwrap(), Location::Path(folder.path().into()));
        std::fs::write(at("model.onnx"), [8, 7, 18, 7, b'p', b'y', b't', b'o', b'r', b'c', b'h']).unwrap();
        assert_eq!(Location::of(folder.path()).unwrap(), Location::Onnx(at("model.onnx")));
        let said = Checkpoint::resolve(at("model.onnx")).unwrap_err().to_string();
        let end = "model.onnx: is an ONNX file: open it with `vit_convert::open(path)` and `Predictor::from_checkpoint`, or convert it with vit-convert";
        assert!(said.ends_with(end), "{said}");
        // the contents are enough
        std::fs::rename(at("model.onnx"), at("exported")).unwrap();
        let said = Checkpoint::resolve(at("exported")).unwrap_err().to_string();
        assert!(
            said.ends_with("exported: is an ONNX file: open it with `vit_convert::open(path)` and `Predictor::from_checkpoint`, or convert it with vit-convert")
        );

        std::fs::write(at("model.gguf"), "").unwrap();
        assert!(refusal(at("model.safetensors")).contains("; did you mean"));
        std::fs::write(at("weights.PTH"), "").unwrap();
        assert_eq!(Location::of(at("weights.PTH")).unwrap(), Location::Path(at("weights.PTH")));
        assert!(refusal(at("sub/model.gguf")).contains("nor is there a folder"));
    }

    #[cfg(feature = "hub")]
    #[test]
    fn names_that_are_no_paths_are_repositories() {
        let id = |text: &str| Location::Repository(text.parse().unwrap());
        assert_eq!(Location::of("google/vit-base-patch16-224@v1").unwrap(), id("google/vit-base-patch16-224@v1"));
        assert_eq!(Location::of("dinov2-base-hf").unwrap(), id("facebook/dinov2-base"));
        assert!(refusal("vit_base_patch16_224").contains("an architecture, whose weights are in timm/vit_base"));
        assert!(refusal("some/thing/else").contains("no such file or folder"));
        assert!(
            matches!(Location::of("nonsense").unwrap_err(), Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
        );
    }
}
