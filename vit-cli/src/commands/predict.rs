//! `predict`: names the classes of images, in the order in which they were given.

use anyhow::bail;
use serde_json::{Value, json};
use vit_model::ProblemType;
use vit_model::labels::Prediction;
use vit_model::text::DEFAULT_TEMPLATE;

use crate::args::{PredictArgs, PredictFormat, WordArgs};
use crate::output::{Stdout, cell, csv, escape, json_line, line, name, prediction, python_3, show};
use crate::sources::{Source, answer_all};
use crate::{Outcome, complain, open};

pub fn run(args: &PredictArgs, verbose: bool) -> anyhow::Result<Outcome> {
    let loading = open::loading(args.images.single());
    let builder = open::builder(args.run).loading(loading).orientation(args.images.orientation());
    let predictor = open::predictor(&args.model, builder, verbose)?;
    let top = match args.format {
        PredictFormat::Seed => usize::MAX,
        _ => args.top as usize,
    };
    open::state_assumptions(predictor.info());
    let regression = predictor.info().problem_type == ProblemType::Regression;
    let mut printer = Printer::new(args.format, args.images.files.len() > 1, regression);
    if let Some(labels) = labels(&args.words)? {
        if args.words.templates.is_empty() {
            complain(&format!("note: no --template is given; {DEFAULT_TEMPLATE:?} is used"));
        }
        let classes = predictor.zero_shot(&labels, &args.words.templates);
        let classes = classes.map_err(|error| open::named(&args.model, error))?;
        let ask = |inputs| classes.classify_all(inputs, top).batch(args.images.batch.into());
        let outcome = answer_all(&args.model, &args.images, ask, |source, answer| {
            printer.record(source, answer.as_deref().map_err(|why| *why))
        })?;
        printer.finish()?;
        return Ok(outcome);
    }
    if predictor.is_two_tower() {
        bail!(
            "{}: this model compares images with texts, and its projection is not a list of classes; name the classes with \
             --labels \"cat,dog\" or --labels-file, or see `vit-cli embed`",
            show(&args.model)
        );
    }
    if predictor.config().num_classes == 0 {
        bail!("{}: this model has no head and names no classes; `vit-cli embed` gives its features", show(&args.model));
    }
    if predictor.shapes(1).logits.is_some_and(|shape| shape.len() != 2) {
        bail!("{}: this model's head answers per token, not per image; see `vit-cli forward`", show(&args.model));
    }
    if predictor.labels().is_none() {
        complain("note: the model names no classes, so they are called by their number");
    }
    let ask = |inputs| predictor.classify_all(inputs, top).batch(args.images.batch.into());
    let outcome = answer_all(&args.model, &args.images, ask, |source, answer| {
        printer.record(source, answer.as_deref().map_err(|why| *why))
    })?;
    printer.finish()?;
    Ok(outcome)
}

/// The classes in words, if the command line names any.
pub fn labels(args: &WordArgs) -> anyhow::Result<Option<Vec<String>>> {
    if let Some(path) = &args.labels_file {
        return Ok(Some(vit_model::labels::read(path)?));
    }
    if args.labels.is_empty() {
        if !args.templates.is_empty() {
            bail!("--template needs --labels or --labels-file");
        }
        return Ok(None);
    }
    Ok(Some(args.labels.iter().map(|label| label.trim().to_owned()).collect()))
}

/// Prints records in one of the formats.
struct Printer {
    out: Stdout,
    format: PredictFormat,
    /// Name the file above the seed's lines.
    many: bool,
    /// The model predicts values, not classes.
    regression: bool,
    records: usize,
}

impl Printer {
    fn new(format: PredictFormat, many: bool, regression: bool) -> Self {
        Self { out: Stdout::new(), format, many, regression, records: 0 }
    }

    fn record(&mut self, source: &Source, answer: Result<&[Prediction], &str>) -> anyhow::Result<()> {
        match self.format {
            PredictFormat::Text => {
                if let Ok(predictions) = &answer {
                    self.out.line(&line(source.name()))?;
                    for p in *predictions {
                        let label = escape(&p.label);
                        self.out.line(&if self.regression {
                            format!("  {:>9.4}  {label}", p.logit)
                        } else {
                            format!("  {:>7.3} %  {label}", p.probability * 100.0)
                        })?;
                    }
                }
            }
            PredictFormat::Seed => {
                if let Ok(predictions) = &answer {
                    let many = self.many || self.records > 0;
                    self.seed(many.then(|| line(source.name())).as_ref(), predictions)?;
                }
            }
            PredictFormat::Jsonl => self.out.line(&json_line(&json_record(source, &answer))?)?,
            PredictFormat::Json => {
                self.out.write(if self.records == 0 { "[\n  " } else { ",\n  " })?;
                self.out.write(&json_line(&json_record(source, &answer))?)?;
            }
            PredictFormat::Csv => {
                let name = cell(source.name());
                if self.records == 0 {
                    let number = if self.regression { "value" } else { "probability" };
                    self.csv(&["file", "rank", "class", "label", number, "error"])?;
                }
                match answer {
                    Ok(predictions) => {
                        for (rank, p) in predictions.iter().enumerate() {
                            let [rank, class] = [rank + 1, p.class].map(|n| n.to_string());
                            let number = if self.regression { p.logit } else { p.probability };
                            let row = [&name, &rank, &class, &escape(&p.label), &number.to_string(), ""];
                            self.csv(&row)?;
                        }
                    }
                    Err(why) => self.csv(&[&name, "", "", "", "", &escape(why)])?,
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
            let (what, number) = if self.regression { ("value", p.logit) } else { ("prob", p.probability) };
            self.out.line(&format!("class: {:10}   {what}: {}", escape(&p.label), python_3(number.into())))?;
        }
        Ok(())
    }

    fn csv(&mut self, fields: &[&str]) -> anyhow::Result<()> {
        self.out.write(&csv(|rows| rows.write_record(fields))?)
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        if self.format == PredictFormat::Json {
            self.out.write(if self.records == 0 { "[]\n" } else { "\n]\n" })?;
        }
        self.out.flush()
    }
}

fn json_record(source: &Source, answer: &Result<&[Prediction], &str>) -> Value {
    let file = name(source.name());
    match answer {
        Ok(predictions) => {
            let predictions: Vec<Value> = predictions.iter().map(prediction).collect();
            json!({ "file": file, "predictions": predictions })
        }
        Err(why) => json!({ "file": file, "error": escape(why) }),
    }
}
