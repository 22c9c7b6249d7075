//! What an evaluation says: on a terminal, as JSON, and as a folder of tables and pictures.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};
use vit_model::metrics::{Evaluation, Paired, Scores};

use super::run::{Mistake, Run};
use crate::args::EvalArgs;
use crate::output::{cell, csv, escape, json_pretty, name, short, show};
use crate::sheet::{self, Entry};
use crate::{draw, save};

/// Classes that a terminal lists; of more, the worst.
const LISTED: usize = 30;

/// Most classes whose matrix fits on a terminal.
const MATRIX: usize = 12;

/// Confusions that a terminal lists.
const CONFUSIONS: usize = 8;

/// Mistakes on the contact sheet.
const ON_SHEET: usize = 100;

/// An evaluation, ready to be shown.
pub struct Report<'a> {
    args: &'a EvalArgs,
    labels: &'a [String],
    evaluation: Evaluation,
    mistakes: Vec<Mistake>,
    failed: usize,
    per_second: f64,
    compared: Option<Compared>,
}

/// Another model on the same images.
pub struct Compared {
    pub name: String,
    pub top1: f64,
    pub per_second: f64,
    pub paired: Paired,
}

impl<'a> Report<'a> {
    pub fn new(args: &'a EvalArgs, labels: &'a [String], run: Run, compared: Option<Compared>) -> Self {
        let (evaluation, per_second) = (run.tally.evaluation(), run.per_second());
        Self { args, labels, evaluation, failed: run.failed(), mistakes: run.mistakes, per_second, compared }
    }

    fn label(&self, class: usize) -> String {
        self.labels.get(class).map_or_else(|| class.to_string(), |label| escape(label))
    }

    /// Classes that occur, as the truth or as an answer.
    fn occurring(&self) -> Vec<(usize, &Scores)> {
        self.evaluation.classes.iter().enumerate().filter(|(_, s)| s.support + s.predicted > 0).collect()
    }

    pub fn text(&self) -> String {
        let e = &self.evaluation;
        let percent = |share: f64| format!("{:.2} %", share * 100.0);
        let mut out =
            format!("{} images, {} classes, {:.1} images/s", e.images, self.occurring().len(), self.per_second);
        if self.failed > 0 {
            let _ = write!(out, ", {} not read", self.failed);
        }
        let (low, high) = e.top1_interval;
        let _ = write!(
            out,
            "\n\ntop-1              {:>9}  (95 %: {} to {})\ntop-5              {:>9}\nlog loss           {:>9.4}\n\
             calibration error  {:>9}\n\n",
            percent(e.top1),
            percent(low),
            percent(high),
            percent(e.top5),
            e.log_loss,
            percent(e.calibration_error)
        );
        out += &self.classes();
        out += &self.matrix();
        if let Some(compared) = &self.compared {
            out += &self.comparison(compared);
        }
        out
    }

    /// The table of classes: scikit-learn's `classification_report(digits=4)`.
    fn classes(&self) -> String {
        let mut classes = self.occurring();
        let all = classes.len();
        if all > LISTED {
            classes.sort_by(|(_, a), (_, b)| a.f1.total_cmp(&b.f1));
            classes.truncate(LISTED);
        }
        let mut table = table(&["class", "precision", "recall", "f1", "images"]);
        let row = |name: String, s: &Scores| {
            let numbers = [s.precision, s.recall, s.f1].map(|value| format!("{value:.4}"));
            [name].into_iter().chain(numbers).chain([s.support.to_string()]).collect::<Vec<_>>()
        };
        for (class, scores) in classes {
            table.add_row(row(self.label(class), scores));
        }
        table.add_row(row("macro average".into(), &self.evaluation.macro_average));
        table.add_row(row("weighted average".into(), &self.evaluation.weighted_average));
        let rest = if all > LISTED {
            format!("(the worst {LISTED} of {all} classes; --json has all)\n")
        } else {
            String::new()
        };
        format!("{}\n{rest}\n", table.trim_fmt())
    }

    /// What was taken for what: the matrix if it fits, and the most frequent confusions.
    fn matrix(&self) -> String {
        let confusion = &self.evaluation.confusion;
        let classes: Vec<usize> = self.occurring().into_iter().map(|(class, _)| class).collect();
        let mut out = String::new();
        if classes.len() <= MATRIX {
            let heads: Vec<String> = classes.iter().map(|&c| short(&self.label(c), 8)).collect();
            let heads: Vec<&str> = ["true ↓  answer →"].into_iter().chain(heads.iter().map(String::as_str)).collect();
            let mut table = table(&heads);
            for &truth in &classes {
                let count = |&predicted: &usize| match confusion.get(truth, predicted) {
                    0 => "·".to_owned(),
                    count => count.to_string(),
                };
                table.add_row([self.label(truth)].into_iter().chain(classes.iter().map(count)));
            }
            let _ = write!(out, "{}\n\n", table.trim_fmt());
        }
        let mut confused: Vec<(u64, usize, usize)> = Vec::new();
        for &truth in &classes {
            for &answer in classes.iter().filter(|&&answer| answer != truth) {
                let count = confusion.get(truth, answer);
                if count > 0 {
                    confused.push((count, truth, answer));
                }
            }
        }
        confused.sort_by(|a, b| b.0.cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        for &(count, truth, answer) in confused.iter().take(CONFUSIONS) {
            let of = self.evaluation.classes[truth].support;
            let _ = writeln!(out, "{} taken for {}: {count} of {of}", self.label(truth), self.label(answer));
        }
        if confused.len() > CONFUSIONS {
            let _ = writeln!(out, "and {} other confusions", confused.len() - CONFUSIONS);
        }
        out
    }

    fn comparison(&self, compared: &Compared) -> String {
        let paired = &compared.paired;
        let points = |share: f64| format!("{:+.2}", share * 100.0);
        let verdict = if paired.p_value < 0.05 { "the two differ" } else { "these images do not show a difference" };
        format!(
            "\n{}: top-1 {:.2} %, {} points (95 %: {} to {}), {:.1} images/s, {:.2} times as fast\n\
             only the first is right: {}; only the second: {}; McNemar p = {:.3}: {verdict}\n",
            compared.name,
            compared.top1 * 100.0,
            points(paired.difference),
            points(paired.interval.0),
            points(paired.interval.1),
            compared.per_second,
            compared.per_second / self.per_second,
            paired.only_first,
            paired.only_second,
            paired.p_value,
        )
    }

    pub fn json(&self) -> Value {
        let e = &self.evaluation;
        let scores =
            |s: &Scores| json!({"precision": s.precision, "recall": s.recall, "f1": s.f1, "images": s.support});
        let classes: Vec<Value> = (self.occurring().into_iter())
            .map(|(class, s)| {
                let mut row = json!({"class": class, "label": self.labels.get(class)});
                if let (Value::Object(row), Value::Object(scores)) = (&mut row, scores(s)) {
                    row.extend(scores);
                }
                row
            })
            .collect();
        let bins: Vec<Value> = (e.bins.iter())
            .map(|b| json!({"from": b.from, "to": b.to, "images": b.images, "confidence": b.confidence, "accuracy": b.accuracy}))
            .collect();
        let mut document = json!({
            "source": name(&self.args.source),
            "model": name(&self.args.model),
            "images": e.images,
            "failed": self.failed,
            "images_per_s": self.per_second,
            "top1": e.top1,
            "top1_interval": [e.top1_interval.0, e.top1_interval.1],
            "top5": e.top5,
            "log_loss": e.log_loss,
            "calibration_error": e.calibration_error,
            "classes": classes,
            "macro_average": scores(&e.macro_average),
            "weighted_average": scores(&e.weighted_average),
            "bins": bins,
        });
        if let (Some(c), Value::Object(document)) = (&self.compared, &mut document) {
            let p = &c.paired;
            document.insert(
                "compared".into(),
                json!({
                    "name": c.name, "top1": c.top1, "images_per_s": c.per_second, "difference": p.difference,
                    "interval": [p.interval.0, p.interval.1], "only_first": p.only_first, "only_second": p.only_second,
                    "p_value": p.p_value,
                }),
            );
        }
        document
    }

    /// Writes the folder: tables, pictures and a contact sheet.
    pub fn write(&self, folder: &Path, args: &EvalArgs) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| show(folder))?;
        let file = |name: &str, content: &[u8]| save::file(&folder.join(name), |out| Ok(out.write_all(content)?));
        let e = &self.evaluation;
        file("results.json", (json_pretty(&self.json())? + "\n").as_bytes())?;
        file("classes.csv", self.classes_csv()?.as_bytes())?;
        file("confusion_matrix.csv", self.confusion_csv()?.as_bytes())?;
        file("confusion_matrix.png", &draw::confusion(&e.confusion, self.labels, false)?)?;
        file("confusion_matrix_normalized.png", &draw::confusion(&e.confusion, self.labels, true)?)?;
        file("reliability.png", &draw::reliability(e)?)?;
        file("mistakes.csv", self.mistakes_csv()?.as_bytes())?;
        let entry = |m: &Mistake| Entry {
            source: m.source.clone(),
            lines: vec![
                format!("{} {:.1} %", self.label(m.answer), m.confidence * 100.0),
                format!("is {} ({:.1} %)", self.label(m.truth), m.of_truth * 100.0),
            ],
        };
        let entries: Vec<Entry> = self.mistakes.iter().take(ON_SHEET).map(entry).collect();
        let wrong = e.images - (e.top1 * e.images as f64).round() as u64;
        let note =
            format!("{wrong} of {} images were classified wrongly; the worst {} are shown.", e.images, entries.len());
        let orientation = crate::args::orientation(args.no_exif);
        file("mistakes.html", sheet::html("Mistakes", &note, &entries, orientation).as_bytes())?;
        crate::complain(&format!("written: {}", show(folder)));
        Ok(())
    }

    fn classes_csv(&self) -> anyhow::Result<String> {
        csv(|rows| {
            rows.write_record(["class", "label", "precision", "recall", "f1", "images", "predicted"])?;
            for (class, s) in self.occurring() {
                let label = self.labels.get(class).cloned().unwrap_or_default();
                let numbers = [s.precision, s.recall, s.f1].map(|value| value.to_string());
                let counts = [s.support, s.predicted].map(|count| count.to_string());
                rows.write_record([class.to_string(), label].into_iter().chain(numbers).chain(counts))?;
            }
            Ok(())
        })
    }

    fn confusion_csv(&self) -> anyhow::Result<String> {
        let classes = 0..self.evaluation.confusion.classes();
        let label = |class: usize| self.labels.get(class).cloned().unwrap_or_else(|| class.to_string());
        csv(|rows| {
            rows.write_record(["true class".to_owned()].into_iter().chain(classes.clone().map(label)))?;
            for truth in classes.clone() {
                let counts = classes.clone().map(|answer| self.evaluation.confusion.get(truth, answer).to_string());
                rows.write_record([label(truth)].into_iter().chain(counts))?;
            }
            Ok(())
        })
    }

    fn mistakes_csv(&self) -> anyhow::Result<String> {
        csv(|rows| {
            rows.write_record(["file", "label", "answer", "probability", "probability_of_label"])?;
            for m in &self.mistakes {
                let labels = [m.truth, m.answer].map(|class| self.label(class));
                let numbers = [m.confidence, m.of_truth].map(|p| p.to_string());
                rows.write_record([cell(m.source.name())].into_iter().chain(labels).chain(numbers))?;
            }
            Ok(())
        })
    }
}

/// A table without lines, whose numbers are on the right.
fn table(heads: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(heads);
    for column in table.column_iter_mut() {
        let alignment = if column.index == 0 { CellAlignment::Left } else { CellAlignment::Right };
        column.set_padding((0, 2)).set_cell_alignment(alignment);
    }
    table
}
