//! `similar`: what an index contains that looks like an image, or that a text describes.

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use vit_model::candle::Device;
use vit_model::similar::Index;

use crate::args::{SimilarArgs, SimilarFormat, orientation};
use crate::output::{Stdout, csv, json_line, recovered, show};
use crate::sheet::{self, Entry};
use crate::sources::Source;
use crate::{complain, model, open, save};

/// Images on a contact sheet.
const ON_SHEET: usize = 1000;

/// The cosine from which two images count as the same.
const DUPLICATES: f32 = 0.95;

pub fn run(args: &SimilarArgs, verbose: bool) -> anyhow::Result<()> {
    let index = Index::open(&args.index)?;
    let found = if args.duplicates { duplicates(args, &index)? } else { nearest(args, &index, verbose)? };
    if let Some(path) = &args.html {
        let title = match (&args.query, &args.text) {
            (Some(query), _) => format!("Similar to {}", show(query)),
            (None, Some(text)) => format!("Similar to “{text}”"),
            (None, None) => format!("Duplicates in {}", show(&args.index)),
        };
        let page = sheet(&title, &found, args);
        save::file(path, |out| Ok(out.write_all(page.as_bytes())?))?;
        complain(&format!("written: {}", show(path)));
    }
    print(args.format, &found)
}

/// Something of the index, and how similar it is to the query or to something else in the index.
struct Found<'i> {
    name: &'i str,
    other: Option<&'i str>,
    similarity: f32,
}

fn duplicates<'i>(args: &SimilarArgs, index: &'i Index) -> anyhow::Result<Vec<Found<'i>>> {
    let pairs = index.duplicates(args.threshold.unwrap_or(DUPLICATES))?;
    let found = |(a, b, similarity)| Found { name: index.name(a), other: Some(index.name(b)), similarity };
    Ok(pairs.into_iter().map(found).collect())
}

fn nearest<'i>(args: &SimilarArgs, index: &'i Index, verbose: bool) -> anyhow::Result<Vec<Found<'i>>> {
    let named = index.metadata().get("model").map(|model| recovered(model));
    let Some(name) = args.model.clone().or(named) else {
        bail!("{}: the index does not say which model made it; name it with --model", show(&args.index));
    };
    let query = match (&args.text, &args.query) {
        (Some(text), _) => {
            let tower = model::text(&name)?.load(&Device::Cpu).map_err(|error| open::named(&name, error))?;
            tower.embed(&[text])?.pop().unwrap_or_default()
        }
        (None, Some(image)) => {
            let builder = open::builder(args.run).loading(open::loading(true)).orientation(orientation(args.no_exif));
            let predictor = open::predictor(&name, builder, verbose).with_context(|| {
                format!("the model that made {}; --model names it where it is now", show(&args.index))
            })?;
            open::state_assumptions(predictor.info());
            let source = Source::of(image);
            let mut vectors = predictor.embed_all([source.input()]);
            if index.metadata().get("layer").is_some_and(|layer| layer == "pooled") {
                vectors = vectors.pooled();
            }
            let vector = vectors.next().context("the model gives no embedding")?;
            source.named(vector)?
        }
        (None, None) => bail!("name an image, or a text with --text"),
    };
    if query.len() != index.embedding_len() {
        bail!(
            "{}: vectors of {} values, but {} gives {}; name the model that made the index with --model",
            show(&args.index),
            index.embedding_len(),
            show(&name),
            query.len()
        );
    }
    let hits = index.search(&query, args.top as usize)?.into_iter();
    let near = hits.filter(|hit| args.threshold.is_none_or(|threshold| hit.similarity >= threshold));
    Ok(near.map(|hit| Found { name: index.name(hit.row), other: None, similarity: hit.similarity }).collect())
}

fn print(format: SimilarFormat, found: &[Found<'_>]) -> anyhow::Result<()> {
    let mut out = Stdout::new();
    let record = |found: &Found<'_>| -> Value {
        match found.other {
            Some(other) => json!({"file": found.name, "other": other, "similarity": found.similarity}),
            None => json!({"file": found.name, "similarity": found.similarity}),
        }
    };
    match format {
        SimilarFormat::Text => {
            for found in found {
                let other = found.other.map(|other| format!("  {}", show(other))).unwrap_or_default();
                out.line(&format!("{:>7.4}  {}{other}", found.similarity, show(found.name)))?;
            }
        }
        SimilarFormat::Json => {
            let records: Vec<String> =
                found.iter().map(|found| json_line(&record(found))).collect::<anyhow::Result<_>>()?;
            out.line(&if records.is_empty() { "[]".into() } else { format!("[\n  {}\n]", records.join(",\n  ")) })?;
        }
        SimilarFormat::Jsonl => {
            for found in found {
                out.line(&json_line(&record(found))?)?;
            }
        }
        SimilarFormat::Csv => {
            let pairs = found.iter().any(|found| found.other.is_some());
            out.write(&csv(|rows| {
                rows.write_record(if pairs { &["file", "other", "similarity"][..] } else { &["file", "similarity"] })?;
                for found in found {
                    let names = [Some(found.name), found.other].into_iter().flatten().map(str::to_owned);
                    rows.write_record(names.chain([found.similarity.to_string()]))?;
                }
                Ok(())
            })?)?;
        }
    }
    out.flush()
}

/// The page; images whose file is not there any more are named.
fn sheet(title: &str, found: &[Found<'_>], args: &SimilarArgs) -> String {
    let mut entries = Vec::new();
    for found in found {
        let lines = vec![format!("{:.4}", found.similarity)];
        for name in [Some(found.name), found.other].into_iter().flatten() {
            entries.push(Entry { source: Source::of(&recovered(name)), lines: lines.clone() });
        }
    }
    let all = entries.len();
    entries.truncate(ON_SHEET);
    let note = if all > entries.len() {
        format!("The first {} of {all} images; the others are in the list.", entries.len())
    } else {
        format!("{all} images of {}", show(&args.index))
    };
    sheet::html(title, &note, &entries, orientation(args.no_exif))
}
