//! `eval`: how good a model is on images whose class is known, and whether another is better.

mod report;
mod run;
mod truth;

use anyhow::bail;
use vit_model::metrics::Paired;
use vit_model::{Predictor, ProblemType};

use crate::args::EvalArgs;
use crate::commands::predict::labels;
use crate::output::{Stdout, json_pretty, show};
use crate::{Outcome, complain, open};
use report::{Compared, Report};
use run::{Classifier, Run};
use truth::Truth;

pub fn run(args: &EvalArgs, verbose: bool) -> anyhow::Result<Outcome> {
    let orientation = crate::args::orientation(args.no_exif);
    let open = |model, options| -> anyhow::Result<Predictor> {
        let predictor = open::predictor(model, open::builder(options).orientation(orientation), verbose)?;
        check(model, &predictor)?;
        open::state_assumptions(predictor.info());
        Ok(predictor)
    };
    let first = open(&args.model, args.run)?;
    let words = labels(&args.words)?;
    let first = Classifier::new(&first, words, &args.words.templates, &args.source)
        .map_err(|error| error.context(show(&args.model)))?;
    let truth = Truth::open(&args.source, &first.names, first.named)?;
    if let Some(assumed) = &truth.assumed {
        complain(&format!("note: assumed: {assumed}"));
    }
    let evaluated = Run::of(&first, &args.model, &truth, args)?;
    if evaluated.images() == 0 {
        bail!("{}: no image could be read", show(&args.source));
    }
    let mut compared = None;
    if args.compare.is_some() || args.compare_precision.is_some() {
        let model = args.compare.as_ref().unwrap_or(&args.model);
        let mut options = args.run;
        options.precision = args.compare_precision.unwrap_or(options.precision);
        let second = open(model, options)?;
        let second = Classifier::new(&second, labels(&args.words)?, &args.words.templates, &args.source)
            .map_err(|error| error.context(show(model)))?;
        // the classes of the second model may have another order
        let truth = Truth::open(&args.source, &second.names, second.named)?;
        let run = Run::of(&second, model, &truth, args)?;
        let pairs = || evaluated.right.iter().zip(&run.right).filter_map(|pair| Some(((*pair.0)?, (*pair.1)?)));
        let count = |which: (bool, bool)| pairs().filter(|&pair| pair == which).count() as u64;
        let paired = Paired::new(pairs().count() as u64, count((true, false)), count((false, true)));
        let name = match (&args.compare, args.compare_precision) {
            (Some(model), None) => show(model),
            (None, Some(precision)) => precision.to_string(),
            (model, precision) => {
                format!("{} in {}", show(model.clone().unwrap_or_default()), precision.unwrap_or_default())
            }
        };
        compared = Some(Compared { name, top1: run.tally.evaluation().top1, per_second: run.per_second(), paired });
    }
    let outcome = if evaluated.failed() == 0 { Outcome::Good } else { Outcome::Failed };
    let report = Report::new(args, &first.names, evaluated, compared);
    if let Some(folder) = &args.output {
        report.write(folder, args)?;
    }
    let mut out = Stdout::new();
    if args.json {
        out.line(&json_pretty(&report.json())?)?;
    } else {
        out.write(&report.text())?;
    }
    out.flush()?;
    Ok(outcome)
}

/// Refuses a model that does not say one class.
fn check(model: &std::ffi::OsStr, predictor: &Predictor) -> anyhow::Result<()> {
    if predictor.is_two_tower() {
        return Ok(());
    }
    if predictor.config().num_classes == 0 {
        bail!("{}: this model has no head and names no classes", show(model));
    }
    match predictor.info().problem_type {
        ProblemType::Regression => bail!("{}: this model predicts values, not classes", show(model)),
        ProblemType::MultiLabel => {
            bail!("{}: this model gives an image several labels; one class is expected", show(model))
        }
        _ => Ok(()),
    }
}
