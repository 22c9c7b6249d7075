//! The images in a folder.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::vec;

use crate::{Error, Result};

/// What counts as an image inside a folder, by its extension. A file that is named is read whatever it is called.
const EXTENSIONS: &[&str] = &[
    "png", "apng", "jpg", "jpeg", "jpe", "jfif", "bmp", "gif", "webp", "tif", "tiff", "pnm", "pbm", "pgm", "ppm", "pam",
];

/// Folders are followed this deep.
const MAX_DEPTH: usize = 64;

/// The images in a folder and in the folders inside it, sorted, hidden files left out. They are listed as they are asked
/// for. Links to folders are not followed.
///
/// What cannot be listed is an error in its place, as is a folder without any image; both can be passed on to
/// [`Predictor::classify_all`](crate::Predictor::classify_all) as they are.
///
/// ```
/// let model = vit_model::Predictor::open("../weights/digits/model.safetensors")?;
/// for best in model.classify_all(vit_model::image::files("../weights/digits/samples"), 1) {
///     println!("{}", best?[0].label);
/// }
/// # Ok::<(), vit_model::Error>(())
/// ```
pub fn files(folder: impl AsRef<Path>) -> Files {
    let folder = folder.as_ref().to_owned();
    Files { folder: folder.clone(), start: Some(folder), open: Vec::new(), found: false }
}

/// The images in a folder; made by [`files`].
#[derive(Debug)]
pub struct Files {
    folder: PathBuf,
    /// The folder, until it is entered.
    start: Option<PathBuf>,
    /// What is left of each folder that is open, the innermost last.
    open: Vec<vec::IntoIter<PathBuf>>,
    found: bool,
}

impl Files {
    fn enter(&mut self, folder: &Path) -> Result<()> {
        let bad = |why: String, source| Error::Image { path: Some(folder.into()), why, source };
        if self.open.len() >= MAX_DEPTH {
            return Err(bad(format!("more than {MAX_DEPTH} folders deep"), None));
        }
        let unread = |error: std::io::Error| bad(error.to_string(), Some(error));
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).map_err(unread)? {
            let entry = entry.map_err(unread)?;
            if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                paths.push(entry.path());
            }
        }
        paths.sort();
        self.open.push(paths.into_iter());
        Ok(())
    }
}

impl Iterator for Files {
    type Item = Result<PathBuf>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(folder) = self.start.take()
            && let Err(error) = self.enter(&folder)
        {
            self.found = true; // there is nothing more to say about it
            return Some(Err(error));
        }
        while let Some(folder) = self.open.last_mut() {
            let Some(path) = folder.next() else {
                self.open.pop();
                continue;
            };
            // links to folders are not followed, because they may lead back up
            let kind = fs::symlink_metadata(&path).map(|meta| meta.file_type());
            if kind.is_ok_and(|kind| kind.is_dir()) {
                if let Err(error) = self.enter(&path) {
                    return Some(Err(error));
                }
            } else if path.extension().and_then(OsStr::to_str).is_some_and(is_image) && !path.is_dir() {
                self.found = true;
                return Some(Ok(path));
            }
        }
        if std::mem::replace(&mut self.found, true) {
            return None;
        }
        let why = format!("no image in this folder ({})", EXTENSIONS.join(", "));
        Some(Err(Error::image(why).within(&self.folder)))
    }
}

fn is_image(extension: &str) -> bool {
    EXTENSIONS.iter().any(|known| known.eq_ignore_ascii_case(extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_walked_in_order_and_barren_ones_named() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("photos/inner")).unwrap();
        fs::create_dir_all(at("empty")).unwrap();
        for name in ["photos/b.PNG", "photos/a.jpg", "photos/notes.txt", "photos/.hidden.png", "photos/inner/c.webp"] {
            fs::write(at(name), "").unwrap();
        }
        #[cfg(unix)]
        std::os::unix::fs::symlink(at("photos"), at("photos/inner/loop.png")).unwrap();
        let names = |folder: &str| -> Vec<String> {
            files(at(folder))
                .map(|file| match file {
                    Ok(path) => path.strip_prefix(root.path()).unwrap().to_str().unwrap().to_owned(),
                    Err(error) => {
                        assert_eq!(error.path(), Some(at(folder).as_path()));
                        "!".into()
                    }
                })
                .collect()
        };
        assert_eq!(names("photos"), ["photos/a.jpg", "photos/b.PNG", "photos/inner/c.webp"]);
        assert_eq!(names("empty"), ["!"]);
        assert_eq!(names("missing"), ["!"]);
    }
}
