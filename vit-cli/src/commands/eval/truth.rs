//! The class of each image, from the name of its folder or from a table.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use vit_model::image::{Files, files};
use vit_model::inputs;

use crate::output::show;
use crate::sources::Source;

/// Columns of a table that contain the file, in order of preference.
const FILE_COLUMNS: [&str; 6] = ["file", "path", "image", "filename", "file_name", "image_path"];

/// Columns of a table that contain the class.
const CLASS_COLUMNS: [&str; 5] = ["label", "class", "target", "category", "class_name"];

/// Images whose class is known.
#[derive(Debug)]
pub struct Truth {
    from: From,
    /// The class's name in the source → the class of the model.
    classes: BTreeMap<String, usize>,
    /// What is assumed about the classes, for the user.
    pub assumed: Option<String>,
}

#[derive(Debug)]
enum From {
    /// A folder for each class.
    Folders(PathBuf),
    /// A table, whose paths begin at its own folder.
    Table { path: PathBuf, file: usize, class: usize },
}

impl Truth {
    /// Finds out what `source` is and which of the model's `count` classes its names are.
    pub fn open(source: &Path, names: &[String], named: bool) -> anyhow::Result<Self> {
        let (from, found) = if source.is_dir() { folders(source)? } else { table(source)? };
        let (classes, assumed) = assign(&found, names, named).with_context(|| show(source))?;
        Ok(Self { from, classes, assumed })
    }

    /// The names of the classes in `source`, sorted: what a model with two towers is asked to tell apart.
    pub fn names(source: &Path) -> anyhow::Result<Vec<String>> {
        Ok(if source.is_dir() { folders(source)? } else { table(source)? }.1)
    }

    /// The images and their classes, in order.
    pub fn images(&self) -> anyhow::Result<Images<'_>> {
        let rest = match &self.from {
            From::Folders(root) => Rest::Folders {
                waiting: self.classes.iter().map(|(name, &class)| (root.join(name), class)).collect(),
                open: None,
            },
            From::Table { path, file, class } => {
                let folder = path.parent().unwrap_or_else(|| Path::new("")).to_owned();
                Rest::Rows { rows: reader(path)?.into_records(), folder, file: *file, class: *class }
            }
        };
        Ok(Images { truth: self, rest })
    }
}

/// The images of a [`Truth`].
pub struct Images<'t> {
    truth: &'t Truth,
    rest: Rest,
}

enum Rest {
    Folders { waiting: VecDeque<(PathBuf, usize)>, open: Option<(Files, usize)> },
    Rows { rows: csv::StringRecordsIntoIter<std::fs::File>, folder: PathBuf, file: usize, class: usize },
}

impl Iterator for Images<'_> {
    type Item = (Source, usize);

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.rest {
            Rest::Folders { waiting, open } => loop {
                if let Some((files, class)) = open
                    && let Some(file) = files.next()
                {
                    return Some((Source::found(file), *class));
                }
                let (folder, class) = waiting.pop_front()?;
                *open = Some((files(folder), class));
            },
            Rest::Rows { rows, folder, file, class } => {
                let row = match rows.next()? {
                    Ok(row) => row,
                    Err(error) => return Some((Source::Bad(folder.clone(), error.to_string()), 0)),
                };
                let path = folder.join(row.get(*file).unwrap_or_default());
                // every name was looked up when the table was opened
                match self.truth.classes.get(row.get(*class).unwrap_or_default().trim()) {
                    Some(&class) => Some((Source::File(path), class)),
                    None => Some((Source::Bad(path, "its class appeared while the table was read".into()), 0)),
                }
            }
        }
    }
}

fn folders(root: &Path) -> anyhow::Result<(From, Vec<String>)> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root).with_context(|| show(root))? {
        let entry = entry.with_context(|| show(root))?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") || !entry.path().is_dir() {
            continue;
        }
        let Some(name) = name.to_str() else { bail!("{}: the name of a class has to be UTF-8", show(entry.path())) };
        names.push(name.to_owned());
    }
    names.sort();
    if names.is_empty() {
        bail!("{}: a folder for each class is expected, or a CSV file with the columns file and label", show(root));
    }
    Ok((From::Folders(root.into()), names))
}

fn reader(path: &Path) -> anyhow::Result<csv::Reader<std::fs::File>> {
    let (file, _) = inputs::open(path)?;
    let tabs = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tsv"));
    Ok(csv::ReaderBuilder::new().delimiter(if tabs { b'\t' } else { b',' }).from_reader(file))
}

fn table(path: &Path) -> anyhow::Result<(From, Vec<String>)> {
    let mut rows = reader(path)?;
    let header = rows.headers().with_context(|| show(path))?.clone();
    let column = |names: &[&str]| {
        names.iter().find_map(|name| header.iter().position(|column| column.trim().eq_ignore_ascii_case(name)))
    };
    let (Some(file), Some(class)) = (column(&FILE_COLUMNS), column(&CLASS_COLUMNS)) else {
        bail!(
            "{}: a column `file` and a column `label` are expected, found {}",
            show(path),
            show(header.iter().collect::<Vec<_>>().join(", "))
        );
    };
    let mut names = std::collections::BTreeSet::new();
    for row in rows.records() {
        let row = row.with_context(|| show(path))?;
        names.insert(row.get(class).unwrap_or_default().trim().to_owned());
    }
    Ok((From::Table { path: path.into(), file, class }, names.into_iter().collect()))
}

/// What classes are called in the source → the model's class.
type Assigned = (BTreeMap<String, usize>, Option<String>);

/// Finds the model's class for each name: by its label, whatever the case and the separators; by its number; or, if no name
/// fits and there are as many as classes, in sorted order, as torchvision's `ImageFolder` numbers them.
fn assign(found: &[String], names: &[String], named: bool) -> anyhow::Result<Assigned> {
    let plain = |name: &str| name.trim().to_lowercase().replace(['_', '-'], " ");
    let mut by_label: BTreeMap<String, Option<usize>> = BTreeMap::new();
    if named {
        for (class, name) in names.iter().enumerate() {
            // two classes with one name cannot be told apart by it
            by_label.entry(plain(name)).and_modify(|class| *class = None).or_insert(Some(class));
        }
    }
    let label = |name: &String| {
        let mut exact = names.iter().enumerate().filter(|(_, label)| named && *label == name).map(|(class, _)| class);
        by_label.get(&plain(name)).copied().flatten().or(match (exact.next(), exact.next()) {
            (class, None) => class,
            _ => None,
        })
    };
    let number = |name: &String| name.parse::<usize>().ok().filter(|&class| class < names.len());
    let all = |class: &dyn Fn(&String) -> Option<usize>| -> Option<BTreeMap<String, usize>> {
        found.iter().map(|name| Some((name.clone(), class(name)?))).collect()
    };
    if let Some(classes) = all(&label) {
        return Ok((classes, None));
    }
    if let Some(classes) = all(&number) {
        return Ok((classes, named.then(|| "the names are numbers of classes".into())));
    }
    if !found.iter().any(|name| label(name).is_some()) && found.len() == names.len() {
        let classes = found.iter().cloned().zip(0..).collect();
        let why = if named { "none of them is a label of the model" } else { "the model names none" };
        return Ok((classes, Some(format!("classes are numbered in the order of their names, because {why}"))));
    }
    let unknown: Vec<&str> = found.iter().filter(|name| label(name).is_none()).map(String::as_str).collect();
    let first = show(unknown.iter().take(3).copied().collect::<Vec<_>>().join(", "));
    let more = if unknown.len() > 3 { format!(" and {} more", unknown.len() - 3) } else { String::new() };
    let known = show(names.iter().take(5).cloned().collect::<Vec<_>>().join(", "));
    let known =
        if named { format!("the model's classes are {known}, …") } else { "the model names no classes".into() };
    bail!("{first}{more}: not among the {} classes of the model ({known})", names.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(found: &[&str], names: &[&str], named: bool) -> anyhow::Result<(Vec<usize>, bool)> {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let (classes, assumed) = assign(&owned(found), &owned(names), named)?;
        Ok((found.iter().map(|&name| classes[name]).collect(), assumed.is_some()))
    }

    #[test]
    fn classes_are_found_by_label_number_or_order() {
        let names = ["sports car", "Cat", "dog"];
        assert_eq!(of(&["cat", "sports_car"], &names, true).unwrap(), (vec![1, 0], false));
        assert_eq!(of(&["0", "2"], &["0", "1", "2"], false).unwrap(), (vec![0, 2], false));
        // not its label, but its number, which is said
        assert_eq!(of(&["2", "0"], &names, true).unwrap(), (vec![2, 0], true));
        assert_eq!(of(&["n01", "n02", "n03"], &names, true).unwrap(), (vec![0, 1, 2], true));
        assert_eq!(of(&["a", "b", "c"], &["0", "1", "2"], false).unwrap(), (vec![0, 1, 2], true));
    }

    #[test]
    fn classes_that_the_model_does_not_have_are_refused() {
        let error = of(&["cat", "horse"], &["cat", "dog"], true).unwrap_err().to_string();
        assert!(error.starts_with("horse: not among the 2 classes"), "{error}");
        assert!(of(&["cat"], &["0", "1"], false).is_err());
        // names that differ in their case alone are told apart by it
        assert_eq!(of(&["Polish", "polish"], &["polish", "Polish"], true).unwrap(), (vec![1, 0], false));
        // a name that two classes share says nothing
        assert!(of(&["crane"], &["crane", "crane", "dog"], true).is_err());
    }
}
