//! `embed`: images as feature vectors.

use anyhow::bail;
use serde_json::json;
use vit_model::candle::Device;
use vit_model::text::normalized;

use crate::args::{EmbedArgs, EmbedFormat, Layer};
use crate::output::{Stdout, cell, csv, json_line, name};
use crate::sources::{Source, answer_all};
use crate::{Outcome, model, open, save};

/// Takes the vector of an input, or why it has none.
type Write<'a> = dyn FnMut(&Source, Result<&[f32], &str>) -> anyhow::Result<()> + 'a;

pub fn run(args: &EmbedArgs, verbose: bool) -> anyhow::Result<Outcome> {
    if args.format == EmbedFormat::Safetensors && args.output.is_none() {
        bail!("--format safetensors is binary: name a file with --output");
    }
    if !args.text.is_empty() {
        return texts(args);
    }
    let loading = open::loading(args.images.single());
    let builder = open::builder(args.run).loading(loading).orientation(args.images.orientation());
    let predictor = open::predictor(&args.model, builder, verbose)?;
    open::state_assumptions(predictor.info());
    if let Some(path) = &args.output {
        save::check(path, &args.images.files)?;
    }
    let embed = |write: &mut Write<'_>| {
        let ask = |inputs| {
            let all = predictor.embed_all(inputs).batch(args.images.batch.into());
            let all = if args.layer == Layer::Pooled { all.pooled() } else { all };
            if args.normalize { all.normalize() } else { all }
        };
        answer_all(&args.model, &args.images, ask, |source, answer| {
            write(source, answer.as_deref().map_err(|why| *why))
        })
    };
    match (args.format, &args.output) {
        (EmbedFormat::Safetensors, Some(path)) => {
            let (mut files, mut vectors, mut width) = (Vec::new(), Vec::new(), 0);
            let outcome = embed(&mut |source, vector| {
                if let Ok(vector) = vector {
                    files.push(name(source.name()));
                    vectors.extend_from_slice(vector);
                    width = vector.len();
                }
                Ok(())
            })?;
            let tensor = save::Array::f32("embeddings", [files.len(), width], &vectors);
            let mut metadata = origin(args);
            metadata.push(("files", serde_json::to_string(&files)?));
            save::safetensors(path, &[tensor], &metadata)?;
            Ok(outcome)
        }
        (format, Some(path)) => {
            let mut outcome = Outcome::Good;
            save::file(path, |out| {
                let mut text = Text::new(format);
                outcome = embed(&mut |source, vector| Ok(out.write_all(text.record(source, vector)?.as_bytes())?))?;
                Ok(out.write_all(text.end().as_bytes())?)
            })?;
            Ok(outcome)
        }
        (format, None) => {
            let (mut out, mut text) = (Stdout::new(), Text::new(format));
            let outcome = embed(&mut |source, vector| {
                out.write(&text.record(source, vector)?)?;
                out.flush()
            })?;
            out.write(text.end())?;
            out.flush()?;
            Ok(outcome)
        }
    }
}

/// The texts on the command line, by the model's text tower.
fn texts(args: &EmbedArgs) -> anyhow::Result<Outcome> {
    let model = model::text(&args.model)?.load(&Device::Cpu).map_err(|error| open::named(&args.model, error))?;
    let mut vectors = model.embed(&args.text)?;
    if args.normalize {
        vectors = vectors.iter().map(|vector| normalized(vector)).collect();
    }
    if let (EmbedFormat::Safetensors, Some(path)) = (args.format, &args.output) {
        let (width, values) = (vectors.first().map_or(0, Vec::len), vectors.concat());
        let tensor = save::Array::f32("embeddings", [vectors.len(), width], &values);
        let mut metadata = origin(args);
        metadata.push(("texts", serde_json::to_string(&args.text)?));
        save::safetensors(path, &[tensor], &metadata)?;
        return Ok(Outcome::Good);
    }
    let mut text = Text { key: "text", ..Text::new(args.format) };
    let mut all = String::new();
    for (name, vector) in args.text.iter().zip(&vectors) {
        all += &text.row(name, name, Ok(vector))?;
    }
    all += text.end();
    if let Some(path) = &args.output {
        save::file(path, |out| Ok(out.write_all(all.as_bytes())?))?;
    } else {
        let mut out = Stdout::new();
        out.write(&all)?;
        out.flush()?;
    }
    Ok(Outcome::Good)
}

/// Where vectors come from, so that `similar` can ask the same model.
fn origin(args: &EmbedArgs) -> Vec<(&'static str, String)> {
    let layer = if args.layer == Layer::Pooled { "pooled" } else { "embedding" };
    vec![("layer", layer.into()), ("model", name(&args.model))]
}

/// Records as text.
struct Text {
    /// What a record's name is the name of.
    key: &'static str,
    format: EmbedFormat,
    records: usize,
    header: bool,
}

impl Text {
    fn new(format: EmbedFormat) -> Self {
        Self { key: "file", format, records: 0, header: false }
    }

    fn record(&mut self, source: &Source, vector: Result<&[f32], &str>) -> anyhow::Result<String> {
        self.row(&name(source.name()), &cell(source.name()), vector)
    }

    /// A record of something that is called `name` in JSON and `shown` in CSV.
    fn row(&mut self, name: &str, shown: &str, vector: Result<&[f32], &str>) -> anyhow::Result<String> {
        self.records += 1;
        if self.format == EmbedFormat::Csv {
            return self.csv(shown, vector);
        }
        let key = self.key;
        let record = json_line(&match vector {
            Ok(vector) => json!({ key: name, "embedding": vector }),
            Err(why) => json!({ key: name, "error": crate::output::escape(why) }),
        })?;
        Ok(match (self.format, self.records) {
            (EmbedFormat::Json, 1) => format!("[\n  {record}"),
            (EmbedFormat::Json, _) => format!(",\n  {record}"),
            _ => record + "\n",
        })
    }

    /// `file,0,1,…`; a failed image has no row here, stderr names it.
    fn csv(&mut self, name: &str, vector: Result<&[f32], &str>) -> anyhow::Result<String> {
        let Ok(vector) = vector else { return Ok(String::new()) };
        let header = !std::mem::replace(&mut self.header, true);
        csv(|rows| {
            if header {
                let columns = (0..vector.len()).map(|i| i.to_string());
                rows.write_record([self.key.to_owned()].into_iter().chain(columns))?;
            }
            let values = vector.iter().map(f32::to_string);
            rows.write_record([name.to_owned()].into_iter().chain(values))
        })
    }

    fn end(&self) -> &'static str {
        match (self.format, self.records) {
            (EmbedFormat::Json, 0) => "[]\n",
            (EmbedFormat::Json, _) => "\n]\n",
            _ => "",
        }
    }
}
