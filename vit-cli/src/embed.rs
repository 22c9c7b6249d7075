//! `embed`: images as feature vectors.

use anyhow::bail;
use serde_json::json;

use crate::args::{EmbedArgs, EmbedFormat};
use crate::images::Source;
use crate::output::{Stdout, json_line, show};
use crate::predict::{Ask, answer_all};
use crate::{Outcome, model, save};

/// Takes the vector of an input, or why it has none.
type Write<'a> = dyn FnMut(&Source, Result<&[f32], &str>) -> anyhow::Result<()> + 'a;

pub fn run(args: &EmbedArgs, verbose: bool) -> anyhow::Result<Outcome> {
    if args.format == EmbedFormat::Safetensors && args.output.is_none() {
        bail!("--format safetensors is binary: name a file with --output");
    }
    let predictor = model::predictor(&args.model, args.run, args.images.single(), verbose)?;
    let embed = |write: &mut Write<'_>| {
        answer_all(&args.model, &predictor, &args.images, Ask::PreLogits, |source, answer| match answer {
            Ok(features) => match vector(features, args.normalize) {
                Ok(vector) => write(source, Ok(&vector)).map(|()| None),
                Err(why) => write(source, Err(why)).map(|()| Some(why.into())),
            },
            Err(error) => {
                let why = format!("{error:#}");
                write(source, Err(&why)).map(|()| Some(why))
            }
        })
    };
    match (args.format, &args.output) {
        (EmbedFormat::Safetensors, Some(path)) => {
            let (mut files, mut vectors, mut width) = (Vec::new(), Vec::new(), 0);
            let outcome = embed(&mut |source, vector| {
                if let Ok(vector) = vector {
                    files.push(source.name().to_string_lossy().into_owned());
                    vectors.extend_from_slice(vector);
                    width = vector.len();
                }
                Ok(())
            })?;
            let tensor = save::F32 { name: "embeddings", shape: vec![files.len(), width], values: &vectors };
            save::safetensors(path, &inputs(args), &[tensor], &[("files", serde_json::to_string(&files)?)])?;
            Ok(outcome)
        }
        (format, Some(path)) => {
            let mut outcome = Outcome::Good;
            save::file(path, &inputs(args), |out| {
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

fn inputs(args: &EmbedArgs) -> Vec<&std::path::Path> {
    let given = args.images.files.iter().map(std::path::Path::new);
    given.chain([std::path::Path::new(&args.model)]).collect()
}

/// The features, divided by their length if asked to.
fn vector(features: &[f32], normalize: bool) -> Result<Vec<f32>, &'static str> {
    if !features.iter().all(|f| f.is_finite()) {
        return Err("the model answers values that are not finite");
    }
    let length = features.iter().map(|&f| f64::from(f) * f64::from(f)).sum::<f64>().sqrt();
    if normalize && length > 0.0 {
        return Ok(features.iter().map(|&f| (f64::from(f) / length) as f32).collect());
    }
    Ok(features.to_vec())
}

/// Records as text.
struct Text {
    format: EmbedFormat,
    records: usize,
    header: bool,
}

impl Text {
    fn new(format: EmbedFormat) -> Self {
        Self { format, records: 0, header: false }
    }

    fn record(&mut self, source: &Source, vector: Result<&[f32], &str>) -> anyhow::Result<String> {
        let file = source.name().to_string_lossy();
        self.records += 1;
        if self.format == EmbedFormat::Csv {
            return self.csv(&show(source.name()), vector);
        }
        let record = json_line(&match vector {
            Ok(vector) => json!({ "file": file, "embedding": vector }),
            Err(why) => json!({ "file": file, "error": crate::output::escape(why) }),
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
        let mut rows = csv::Writer::from_writer(Vec::new());
        if !std::mem::replace(&mut self.header, true) {
            let columns = (0..vector.len()).map(|i| i.to_string());
            rows.write_record(["file".to_owned()].into_iter().chain(columns))?;
        }
        let values = vector.iter().map(f32::to_string);
        rows.write_record([name.to_owned()].into_iter().chain(values))?;
        let rows = rows.into_inner().map_err(|e| anyhow::anyhow!("{e}"))?;
        Ok(String::from_utf8_lossy(&rows).into_owned())
    }

    fn end(&self) -> &'static str {
        match (self.format, self.records) {
            (EmbedFormat::Json, 0) => "[]\n",
            (EmbedFormat::Json, _) => "\n]\n",
            _ => "",
        }
    }
}
