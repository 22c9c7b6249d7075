//! The images that a command was given: files, folders and stdin, in order, and their answers.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use indicatif::{ProgressBar, ProgressStyle};
use vit_model::image::{Files, Image, ImageOptions, Orientation, files};
use vit_model::predictor::Input;
use vit_model::{Error, Result};

use crate::args::ImageArgs;
use crate::output::show;
use crate::{Outcome, complain, open};

/// Most bytes of an image on stdin.
const MAX_STDIN: u64 = 1 << 30;

/// Bytes that say whether stdin is an image.
const START: u64 = 512;

/// One input, or why there is none.
#[derive(Clone, Debug)]
pub enum Source {
    Stdin,
    File(PathBuf),
    /// A folder that cannot be listed, or that holds no image.
    Bad(PathBuf, String),
}

impl Source {
    /// An image by its name on the command line.
    pub fn of(name: &OsStr) -> Self {
        if name == "-" { Self::Stdin } else { Self::File(name.into()) }
    }

    /// What a folder contains.
    pub fn found(file: Result<PathBuf>) -> Self {
        file.map_or_else(
            |error| {
                let path = error.path().unwrap_or_else(|| Path::new("")).to_owned();
                let why = error.to_string();
                let why = why.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&why).to_owned();
                Self::Bad(path, why)
            },
            Self::File,
        )
    }

    /// The name as it was given or found.
    pub fn name(&self) -> &OsStr {
        match self {
            Self::Stdin => OsStr::new("-"),
            Self::File(path) | Self::Bad(path, _) => path.as_os_str(),
        }
    }

    /// The input for the library; stdin is read here.
    pub fn input(&self) -> Result<Input<'static>> {
        let bad = |why: String| Error::image(why).within(self.name().as_ref());
        match self {
            Self::File(path) => Ok(path.clone().into()),
            Self::Bad(_, why) => Err(bad(why.clone())),
            Self::Stdin => {
                let (mut bytes, mut stdin) = (Vec::new(), std::io::stdin().lock());
                let unread = |error: std::io::Error| bad(format!("standard input: {error}"));
                // what is no image need not end
                (&mut stdin).take(START).read_to_end(&mut bytes).map_err(unread)?;
                if bytes.len() as u64 == START {
                    Image::check_start(&bytes).map_err(|error| error.within(self.name().as_ref()))?;
                }
                stdin.take(MAX_STDIN + 1 - bytes.len() as u64).read_to_end(&mut bytes).map_err(unread)?;
                if bytes.len() as u64 > MAX_STDIN {
                    return Err(bad(format!("over {MAX_STDIN} bytes on standard input")));
                }
                Ok(bytes.into())
            }
        }
    }

    /// The decoded image. The error names the input.
    pub fn image(&self, orientation: Orientation) -> anyhow::Result<Image> {
        let image = self.input().and_then(|input| input.into_image(&ImageOptions::new().orientation(orientation)));
        self.named(image.map(std::borrow::Cow::into_owned))
    }

    /// A result whose error names the input.
    pub fn named<T>(&self, result: Result<T>) -> anyhow::Result<T> {
        result.map_err(|error| anyhow::anyhow!("{}", self.name_once(&error.to_string())))
    }

    /// `NAME: why`, unless the reason begins with the name already.
    fn name_once(&self, why: &str) -> String {
        let name = show(self.name());
        let plain = Path::new(self.name()).display().to_string();
        if why.starts_with(&format!("{name}: ")) {
            return why.into();
        }
        let why = why.strip_prefix(&format!("{plain}: ")).unwrap_or(why);
        format!("{name}: {why}")
    }
}

/// The inputs in the order given; folders are listed when their turn comes.
struct Sources {
    given: std::vec::IntoIter<OsString>,
    stdin_read: bool,
    folder: Option<Files>,
}

impl Sources {
    fn new(given: Vec<OsString>) -> Self {
        Self { given: given.into_iter(), stdin_read: false, folder: None }
    }
}

impl Iterator for Sources {
    type Item = Source;

    fn next(&mut self) -> Option<Source> {
        loop {
            if let Some(folder) = &mut self.folder {
                match folder.next() {
                    Some(found) => return Some(Source::found(found)),
                    None => self.folder = None,
                }
            }
            match Source::of(&self.given.next()?) {
                Source::Stdin if std::mem::replace(&mut self.stdin_read, true) => {
                    return Some(Source::Bad("-".into(), "stdin holds one image, and was read already".into()));
                }
                Source::File(path) if path.is_dir() => self.folder = Some(files(path)),
                source => return Some(source),
            }
        }
    }
}

/// Sources on their way to the library, each with what the command knows of it. They wait in a queue for their answers, which
/// come in the same order; the library reads ahead by two batches, so the queue stays short.
pub struct Inputs<'s, K> {
    sources: Box<dyn Iterator<Item = (Source, K)> + 's>,
    waiting: Rc<RefCell<VecDeque<(Source, K)>>>,
}

impl<K> Iterator for Inputs<'_, K> {
    type Item = Result<Input<'static>>;

    fn next(&mut self) -> Option<Self::Item> {
        let (source, known) = self.sources.next()?;
        let input = source.input();
        self.waiting.borrow_mut().push_back((source, known));
        Some(input)
    }
}

/// Asks the library about every image of the command line, as [`answer_each`] does.
pub fn answer_all<T, A: Iterator<Item = Result<T>>>(
    model: &OsStr,
    args: &ImageArgs,
    ask: impl FnOnce(Inputs<'static, ()>) -> A,
    mut write: impl FnMut(&Source, std::result::Result<T, &str>) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let sources = Sources::new(args.files.clone()).map(|source| (source, ()));
    answer_each(model, sources, ask, |source, (), answer| write(&source, answer))
}

/// Asks the library about every image, and hands each answer, or why there is none, to `write`, in order. Failures are also
/// reported on stderr.
pub fn answer_each<'s, K: 's, T, A: Iterator<Item = Result<T>>>(
    model: &OsStr,
    sources: impl Iterator<Item = (Source, K)> + 's,
    ask: impl FnOnce(Inputs<'s, K>) -> A,
    mut write: impl FnMut(Source, K, std::result::Result<T, &str>) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let waiting = Rc::new(RefCell::new(VecDeque::new()));
    let answers = ask(Inputs { sources: Box::new(sources), waiting: waiting.clone() });
    let progress = progress_bar();
    let mut outcome = Outcome::Good;
    for answer in answers {
        let next = waiting.borrow_mut().pop_front();
        match (answer, next) {
            (Ok(answer), Some((source, known))) => write(source, known, Ok(answer))?,
            (Err(error @ (Error::Image { .. } | Error::Output(_))), Some((source, known))) => {
                let why = error.to_string();
                let named = source.name_once(&why);
                // a record of an image repeats its name in the reason, as stderr does
                let why = if matches!(error, Error::Image { .. }) { &named } else { &why };
                write(source, known, Err(why))?;
                progress.suspend(|| complain(&named));
                outcome = Outcome::Failed;
            }
            // a model whose weights are read as they are needed may turn out to be damaged here
            (Err(error), _) => return Err(open::named(model, error)),
            (Ok(_), None) => break,
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(outcome)
}

/// A count of images on stderr, if that is a terminal and the answers go elsewhere.
fn progress_bar() -> ProgressBar {
    if std::io::stderr().is_terminal() && !std::io::stdout().is_terminal() {
        ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{pos} images, {per_sec}").unwrap_or_else(
            |_| {
                ProgressStyle::default_spinner() // the template is a constant and right
            },
        ))
    } else {
        ProgressBar::hidden()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn inputs_come_in_the_order_given_and_bad_ones_are_named() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("photos")).unwrap();
        fs::create_dir_all(at("empty")).unwrap();
        for name in ["photos/b.PNG", "photos/a.jpg", "photos/notes.txt"] {
            fs::write(at(name), "").unwrap();
        }
        let given = [at("empty"), at("photos"), at("photos/notes.txt"), "-".into(), "-".into()];
        let given: Vec<OsString> = given.into_iter().map(Into::into).collect();
        let names: Vec<String> = Sources::new(given)
            .map(|s| {
                let bad = if matches!(s, Source::Bad(..)) { "!" } else { "" };
                let name = Path::new(s.name());
                bad.to_owned() + name.strip_prefix(root.path()).unwrap_or(name).to_str().unwrap()
            })
            .collect();
        assert_eq!(names, ["!empty", "photos/a.jpg", "photos/b.PNG", "photos/notes.txt", "-", "!-"]);
    }
}
