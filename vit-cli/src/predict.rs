//! `predict`: names the classes of images, in the order in which they were given.

use std::ffi::OsStr;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use vit_model::Predictor;
use vit_model::image::Image;
use vit_model::labels::Prediction;
use vit_model::predictor::Output;

use crate::args::{ImageArgs, PredictArgs, PredictFormat};
use crate::images::{Source, Sources, pipeline};
use crate::output::{Stdout, escape, json_line, python_3, show};
use crate::{Outcome, complain, model};

/// Most bytes of an image on stdin.
const MAX_STDIN: u64 = 1 << 30;

pub fn run(args: &PredictArgs, verbose: bool) -> anyhow::Result<Outcome> {
    let predictor = model::predictor(&args.model, args.run, args.images.single(), verbose)?;
    if predictor.config().num_classes == 0 {
        bail!("{}: this model has no head and names no classes; `vit-cli embed` gives its features", show(&args.model));
    }
    if predictor.shapes(1)[0].len() != 2 {
        bail!("{}: this model's head answers per token, not per image; see `vit-cli forward`", show(&args.model));
    }
    let top = match args.format {
        PredictFormat::Seed => usize::MAX,
        _ => args.top as usize,
    };
    let mut printer = Printer::new(args.format, args.images.files.len() > 1);
    let outcome = answer_all(&args.model, &predictor, &args.images, Ask::Logits, |name, result| {
        let result = result.and_then(|logits| Ok(predictor.classify(logits, top)?));
        let failed = result.as_ref().err().map(|e| format!("{e:#}"));
        printer.record(name, result.as_deref().map_err(|e| format!("{e:#}")))?;
        Ok(failed)
    })?;
    printer.finish()?;
    Ok(outcome)
}

/// What of a model's answer is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// `[num_classes]`.
    Logits,
    /// What the head reads.
    PreLogits,
}

/// Runs every image through the model while the next ones are read, and hands each answer or failure to `each`, in order.
/// `each` returns why an answer is a failure nonetheless; failures are also said on stderr.
pub fn answer_all(
    path: &OsStr,
    predictor: &Predictor,
    args: &ImageArgs,
    ask: Ask,
    mut each: impl FnMut(&Source, anyhow::Result<&[f32]>) -> anyhow::Result<Option<String>>,
) -> anyhow::Result<Outcome> {
    let exif = !args.no_exif;
    let prepare = |source: &Source, pixels: &mut [f32]| {
        let image = read_image(source, exif)?;
        named(source, predictor.preprocess().and_then(|preprocess| preprocess.apply_into(&image, pixels)))
    };
    let (config, mut output) = (predictor.config(), Output::default());
    let image = config.in_chans * config.img_size[0] * config.img_size[1];
    // a model whose weights are read as they are needed may turn out to be damaged here
    let broken = |error| model::named(path, error);
    let progress = progress_bar();
    let mut outcome = Outcome::Good;
    pipeline(Sources::new(args.files.clone()), usize::from(args.batch), image, prepare, |batch| {
        let answers = match ask {
            _ if batch.good == 0 => &mut Vec::new(),
            Ask::Logits => {
                let logits = output.logits.get_or_insert_default();
                predictor.logits_into(&batch.values, batch.good, logits).map_err(broken)?;
                logits
            }
            Ask::PreLogits => {
                predictor.forward_head_into(&batch.values, batch.good, &mut output).map_err(broken)?;
                &mut output.pre_logits
            }
        };
        let mut answers = answers.chunks_exact(answers.len().checked_div(batch.good).unwrap_or(1).max(1));
        for (source, result) in batch.inputs {
            let answer = result.and_then(|()| {
                answers.next().ok_or_else(|| anyhow::anyhow!("{}: the model gave no answer", show(source.name())))
            });
            if let Some(why) = each(&source, answer)? {
                outcome = Outcome::Failed;
                progress.suspend(|| complain(&name_once(&source, &why)));
            }
            progress.inc(1);
        }
        Ok(batch.values)
    })?;
    progress.finish_and_clear();
    Ok(outcome)
}

/// A count of images on stderr, where that is a terminal and the answers go elsewhere.
fn progress_bar() -> ProgressBar {
    use std::io::IsTerminal as _;
    if std::io::stderr().is_terminal() && !std::io::stdout().is_terminal() {
        ProgressBar::new_spinner().with_style(
            indicatif::ProgressStyle::with_template("{pos} images, {per_sec}").unwrap_or_else(|_| {
                indicatif::ProgressStyle::default_spinner() // the template is a constant and right
            }),
        )
    } else {
        ProgressBar::hidden()
    }
}

/// The image of an input, upright unless `exif` is off. The error names the input.
pub fn read_image(source: &Source, exif: bool) -> anyhow::Result<Image> {
    match source {
        Source::Stdin => {
            let mut bytes = Vec::new();
            let read = std::io::stdin().lock().take(MAX_STDIN + 1).read_to_end(&mut bytes);
            read.context("-: standard input")?;
            if bytes.len() as u64 > MAX_STDIN {
                bail!("-: over {MAX_STDIN} bytes on standard input");
            }
            named(source, Image::decode(&bytes, exif))
        }
        Source::File(path) => named(source, Image::open(path, exif)),
        Source::Bad(path, why) => bail!("{}: {why}", show(path)),
    }
}

/// A result whose error names the input.
pub fn named<T>(source: &Source, result: vit_model::Result<T>) -> anyhow::Result<T> {
    result.map_err(|e| anyhow::anyhow!("{}", name_once(source, &e.to_string())))
}

/// `NAME: why`, but for a reason that begins with the name already.
fn name_once(source: &Source, why: &str) -> String {
    let name = show(source.name());
    let plain = Path::new(source.name()).display().to_string();
    if why.starts_with(&format!("{name}: ")) {
        return why.into();
    }
    let why = why.strip_prefix(&format!("{plain}: ")).unwrap_or(why);
    format!("{name}: {why}")
}

/// Prints records in one of the formats.
struct Printer {
    out: Stdout,
    format: PredictFormat,
    /// Name the file above the seed's lines.
    many: bool,
    records: usize,
}

impl Printer {
    fn new(format: PredictFormat, many: bool) -> Self {
        Self { out: Stdout::new(), format, many, records: 0 }
    }

    fn record(&mut self, source: &Source, answer: Result<&[Prediction], String>) -> anyhow::Result<()> {
        let name = show(source.name());
        match self.format {
            PredictFormat::Text => {
                if let Ok(predictions) = &answer {
                    self.out.line(&name)?;
                    for p in *predictions {
                        self.out.line(&format!("  {:>7.3} %  {}", p.probability * 100.0, escape(&p.label)))?;
                    }
                }
            }
            PredictFormat::Seed => {
                if let Ok(predictions) = &answer {
                    let many = self.many || self.records > 0;
                    self.seed(many.then_some(&name), predictions)?;
                }
            }
            PredictFormat::Jsonl => self.out.line(&json_line(&json_record(source, &answer))?)?,
            PredictFormat::Json => {
                self.out.write(if self.records == 0 { "[\n  " } else { ",\n  " })?;
                self.out.write(&json_line(&json_record(source, &answer))?)?;
            }
            PredictFormat::Csv => {
                if self.records == 0 {
                    self.csv(&["file", "rank", "class", "label", "probability", "error"])?;
                }
                match answer {
                    Ok(predictions) => {
                        for (rank, p) in predictions.iter().enumerate() {
                            let [rank, class] = [rank + 1, p.class].map(|n| n.to_string());
                            let row = [&name, &rank, &class, &escape(&p.label), &p.probability.to_string(), ""];
                            self.csv(&row)?;
                        }
                    }
                    Err(why) => self.csv(&[&name, "", "", "", "", &escape(&why)])?,
                }
            }
        }
        self.records += 1;
        // a reader of a slow run sees each answer when it is there
        self.out.flush()
    }

    /// The lines that the seed's own script prints, in class order.
    fn seed(&mut self, name: Option<&String>, predictions: &[Prediction]) -> anyhow::Result<()> {
        if let Some(name) = name {
            self.out.line(name)?;
        }
        let mut by_class: Vec<&Prediction> = predictions.iter().collect();
        by_class.sort_by_key(|p| p.class);
        for p in by_class {
            self.out.line(&format!("class: {:10}   prob: {}", escape(&p.label), python_3(p.probability.into())))?;
        }
        Ok(())
    }

    fn csv(&mut self, fields: &[&str]) -> anyhow::Result<()> {
        let mut row = csv::Writer::from_writer(Vec::new());
        row.write_record(fields)?;
        let row = row.into_inner().map_err(|e| anyhow::anyhow!("{e}"))?;
        self.out.write(&String::from_utf8_lossy(&row))
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        if self.format == PredictFormat::Json {
            self.out.write(if self.records == 0 { "[]\n" } else { "\n]\n" })?;
        }
        self.out.flush()
    }
}

fn json_record(source: &Source, answer: &Result<&[Prediction], String>) -> Value {
    let file = source.name().to_string_lossy();
    match answer {
        Ok(predictions) => {
            let predictions: Vec<Value> = predictions
                .iter()
                .map(|p| json!({ "class": p.class, "label": p.label, "probability": p.probability, "logit": p.logit }))
                .collect();
            json!({ "file": file, "predictions": predictions })
        }
        Err(why) => json!({ "file": file, "error": escape(why) }),
    }
}
