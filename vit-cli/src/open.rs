//! A model, opened as the options of the command line say.

use std::ffi::OsStr;
use std::path::Path;

use vit_model::predictor::{Builder, Loading, Runtime};
use vit_model::{ModelInfo, Precision, Predictor};

use crate::args::RunArgs;
use crate::output::show;
use crate::{complain, model};

/// How to run, as the command line says.
pub fn builder(run: RunArgs) -> Builder {
    let mut builder = Predictor::builder().device(run.device).precision(run.precision);
    if run.modules {
        builder = builder.runtime(Runtime::Modules);
    }
    if let Some(threads) = run.threads.map(usize::from) {
        builder = builder.threads(threads);
    }
    builder
}

/// Whether the weights are held: not for a model that answers once.
pub fn loading(once: bool) -> Loading {
    if once { Loading::Streamed } else { Loading::Held }
}

/// A model, ready to run.
pub fn predictor(model: &OsStr, builder: Builder, verbose: bool) -> anyhow::Result<Predictor> {
    predictor_for(model, builder, verbose, |_| {})
}

/// As [`predictor()`], with a look at the document before the model is built.
pub fn predictor_for(
    model: &OsStr,
    builder: Builder,
    verbose: bool,
    fit: impl FnOnce(&mut ModelInfo),
) -> anyhow::Result<Predictor> {
    let mut checkpoint = model::checkpoint(model)?;
    fit(&mut checkpoint.info);
    let predictor = builder.checkpoint(&checkpoint).map_err(|error| named(model, error))?;
    let backend = predictor.backend();
    if let Some(why) = &backend.no_gpu {
        complain(&format!("{why}; running on the CPU"));
    }
    if verbose {
        for remark in checkpoint.remarks() {
            complain(&format!("{}: {remark}", show(model)));
        }
        let mut why = backend.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        if backend.quantised && backend.precision != Precision::Q8_0 {
            why += " from weights in q8_0";
        }
        complain(&format!(
            "{} runs on {} in {} with {} threads{why}",
            show(model),
            backend.kernel,
            backend.precision,
            backend.threads
        ));
    }
    Ok(predictor)
}

/// Says what the model's files leave open and what is assumed instead, because it changes answers.
pub fn state_assumptions(info: &ModelInfo) {
    for assumed in info.source.assumed() {
        complain(&format!("note: assumed: {assumed}"));
    }
}

/// The error, with the model's name unless it has that already or is about the device.
pub fn named(model: &OsStr, error: vit_model::Error) -> anyhow::Error {
    let plain = Path::new(model).display().to_string();
    match error {
        // "device cuda: why", so with two dashes it names the flag
        vit_model::Error::Device { .. } => anyhow::anyhow!("--{error}"),
        error if error.to_string().contains(&plain) => error.into(),
        error => anyhow::Error::new(error).context(show(model)),
    }
}
