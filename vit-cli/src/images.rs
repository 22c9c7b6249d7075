//! The images that a command was given: files, folders and stdin, in order, prepared ahead while the model runs.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rayon::prelude::*;

/// What is an image inside a folder; a file that is named is read whatever it is called.
const EXTENSIONS: &[&str] = &[
    "png", "apng", "jpg", "jpeg", "jpe", "jfif", "bmp", "gif", "webp", "tif", "tiff", "pnm", "pbm", "pgm", "ppm", "pam",
];

/// One input, or why there is none.
#[derive(Clone, Debug)]
pub enum Source {
    Stdin,
    File(PathBuf),
    /// A folder that cannot be listed, or that holds no image.
    Bad(PathBuf, String),
}

impl Source {
    /// The name as it was given or found.
    pub fn name(&self) -> &OsStr {
        match self {
            Self::Stdin => OsStr::new("-"),
            Self::File(path) | Self::Bad(path, _) => path.as_os_str(),
        }
    }
}

/// The inputs in the order given; folders are listed when their turn comes, sorted, hidden files left out.
pub struct Sources {
    given: std::vec::IntoIter<OsString>,
    stdin_read: bool,
    /// Folders being walked: what is left of each, the innermost last.
    open: Vec<std::vec::IntoIter<PathBuf>>,
    /// The folder given, until an image was found in it.
    barren: Option<PathBuf>,
}

/// Folders inside folders beyond this are not followed (a loop of links has no end).
const MAX_DEPTH: usize = 64;

impl Sources {
    pub fn new(given: Vec<OsString>) -> Self {
        Self { given: given.into_iter(), stdin_read: false, open: Vec::new(), barren: None }
    }

    fn enter(&mut self, folder: &Path) -> Result<(), Source> {
        let bad = |why: String| Source::Bad(folder.into(), why);
        if self.open.len() >= MAX_DEPTH {
            return Err(bad(format!("more than {MAX_DEPTH} folders deep")));
        }
        let entries = fs::read_dir(folder).map_err(|e| bad(e.to_string()))?;
        let mut paths = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| bad(e.to_string()))?;
            if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                paths.push(entry.path());
            }
        }
        paths.sort();
        self.open.push(paths.into_iter());
        Ok(())
    }
}

impl Iterator for Sources {
    type Item = Source;

    fn next(&mut self) -> Option<Source> {
        loop {
            if let Some(folder) = self.open.last_mut() {
                let Some(path) = folder.next() else {
                    self.open.pop();
                    if self.open.is_empty()
                        && let Some(barren) = self.barren.take()
                    {
                        return Some(Source::Bad(
                            barren,
                            format!("no image in this folder ({})", EXTENSIONS.join(", ")),
                        ));
                    }
                    continue;
                };
                // links to folders are not followed: they may lead back up
                let kind = fs::symlink_metadata(&path).map(|m| m.file_type());
                if kind.is_ok_and(|k| k.is_dir()) {
                    if let Err(bad) = self.enter(&path) {
                        return Some(bad);
                    }
                } else if path.extension().and_then(OsStr::to_str).is_some_and(is_image_extension) && !path.is_dir() {
                    self.barren = None;
                    return Some(Source::File(path));
                }
                continue;
            }
            let given = self.given.next()?;
            if given == "-" {
                if std::mem::replace(&mut self.stdin_read, true) {
                    return Some(Source::Bad("-".into(), "stdin holds one image, and was read already".into()));
                }
                return Some(Source::Stdin);
            }
            let path = PathBuf::from(given);
            if !path.is_dir() {
                return Some(Source::File(path));
            }
            self.barren = Some(path.clone());
            if let Err(bad) = self.enter(&path) {
                self.barren = None;
                return Some(bad);
            }
        }
    }
}

fn is_image_extension(extension: &str) -> bool {
    EXTENSIONS.iter().any(|e| e.eq_ignore_ascii_case(extension))
}

/// Inputs that were prepared together.
pub struct Batch {
    /// Every input, in order, and why it could not be prepared.
    pub inputs: Vec<(Source, anyhow::Result<()>)>,
    /// What the others became, one after the other.
    pub values: Vec<f32>,
    /// How many others there are.
    pub good: usize,
}

impl Batch {
    /// Prepares the inputs in parallel, each into `width` values; the memory is used again.
    fn prepare(
        sources: Vec<Source>,
        width: usize,
        mut values: Vec<f32>,
        prepare: &(impl Fn(&Source, &mut [f32]) -> anyhow::Result<()> + Sync),
    ) -> Self {
        values.resize(sources.len() * width, 0.0);
        let inputs: Vec<_> = (sources.into_par_iter().zip(values.par_chunks_exact_mut(width)))
            .map(|(source, values)| {
                let result = prepare(&source, values);
                (source, result)
            })
            .collect();
        let mut good = 0;
        for (i, _) in inputs.iter().enumerate().filter(|(_, (_, result))| result.is_ok()) {
            if i > good {
                values.copy_within(i * width..(i + 1) * width, good * width);
            }
            good += 1;
        }
        values.truncate(good * width);
        Self { inputs, values, good }
    }
}

/// Prepares batches of inputs on a thread of its own, in parallel within a batch, while `consume` works on the batch before.
///
/// At most three batches exist at a time, in memory that is used again, however many inputs there are.
pub fn pipeline(
    sources: Sources,
    batch: usize,
    width: usize,
    prepare: impl Fn(&Source, &mut [f32]) -> anyhow::Result<()> + Send + Sync,
    mut consume: impl FnMut(Batch) -> anyhow::Result<Vec<f32>>,
) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::sync_channel(1);
        let (give_back, used) = mpsc::channel();
        scope.spawn(move || {
            let mut sources = sources;
            loop {
                let chunk: Vec<Source> = sources.by_ref().take(batch).collect();
                if chunk.is_empty() {
                    break;
                }
                let memory = used.try_recv().unwrap_or_default();
                if send.send(Batch::prepare(chunk, width, memory, &prepare)).is_err() {
                    break; // the consumer has failed, and says so itself
                }
            }
        });
        for batch in receive {
            let _ = give_back.send(consume(batch)?); // after the last batch nobody wants it
        }
        Ok(())
    })
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
        let given = [at("empty"), at("photos"), at("photos/notes.txt"), "-".into(), "-".into()];
        let given: Vec<OsString> = given.into_iter().map(Into::into).collect();
        let names: Vec<String> = Sources::new(given)
            .map(|s| {
                let bad = if matches!(s, Source::Bad(..)) { "!" } else { "" };
                let name = Path::new(s.name());
                bad.to_owned() + name.strip_prefix(root.path()).unwrap_or(name).to_str().unwrap()
            })
            .collect();
        assert_eq!(
            names,
            ["!empty", "photos/a.jpg", "photos/b.PNG", "photos/inner/c.webp", "photos/notes.txt", "-", "!-"]
        );
    }

    #[test]
    fn order_is_kept_bad_inputs_are_left_out_and_an_error_stops_the_pipeline() {
        let given: Vec<OsString> = (0..100).map(|i| i.to_string().into()).collect();
        let prepare = |source: &Source, values: &mut [f32]| {
            let number: f32 = source.name().to_str().unwrap().parse()?;
            anyhow::ensure!(number % 5.0 != 2.0, "no good");
            values.copy_from_slice(&[number, -number]);
            Ok(())
        };
        let (mut seen, mut good) = (Vec::new(), Vec::new());
        pipeline(Sources::new(given.clone()), 7, 2, prepare, |batch| {
            assert!(batch.inputs.len() <= 7);
            assert_eq!(batch.values.len(), 2 * batch.good);
            assert_eq!(batch.inputs.iter().filter(|(_, result)| result.is_ok()).count(), batch.good);
            seen.extend(batch.inputs.into_iter().map(|(source, _)| source.name().to_owned()));
            good.extend_from_slice(&batch.values);
            Ok(batch.values)
        })
        .unwrap();
        assert_eq!(seen, given);
        let expected = (0..100u8).filter(|n| n % 5 != 2).flat_map(|n| [f32::from(n), -f32::from(n)]);
        assert_eq!(good, expected.collect::<Vec<_>>());
        let stopped = pipeline(Sources::new(given.clone()), 7, 2, prepare, |_| anyhow::bail!("enough"));
        assert_eq!(stopped.unwrap_err().to_string(), "enough");
    }
}
