//! Measures how much `--dtype q8` changes a model's outputs.

use vit_model::predictor::{Output, Wanted};
use vit_model::{Checkpoint, Distance, Verification};

use crate::{Error, Result, verify};

/// How much quantised weights change a model's outputs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Moved {
    /// Largest difference of a logit, or of a pre-logits feature if the model has no head.
    pub max_abs: f64,
    /// The same, relative to the largest magnitude of the unquantised model's outputs.
    pub max_rel: f64,
    /// The number of images whose best class stays the same, and of images tried. `None` if the model has fewer than two
    /// classes.
    pub top1: Option<(usize, usize)>,
    /// Images tried.
    pub inputs: usize,
}

impl Moved {
    /// Adds this result to the verification record of the written file.
    pub fn record(&self, verified: Option<Verification>) -> Verification {
        let far = Distance::new(self.max_abs, self.max_rel);
        verified.unwrap_or_default().with_q8_0(far, self.inputs, self.top1)
    }
}

impl std::fmt::Display for Moved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} inputs, answers move by at most {:.1e}, {:.1e} relative",
            self.inputs, self.max_abs, self.max_rel
        )?;
        match self.top1 {
            Some((same, of)) => write!(f, "; the best class stays on {same} of {of}"),
            None => Ok(()),
        }
    }
}

/// A checkpoint with its matrices in Q8_0. With `measure`, also how far that moves the answers, which its document records.
///
/// # Errors
/// As [`moved`].
pub fn quantise(checkpoint: &Checkpoint, measure: bool) -> Result<(Checkpoint, Option<Moved>)> {
    let moved = measure.then(|| moved(checkpoint)).transpose()?;
    let mut quantised = checkpoint.quantised();
    if let Some(moved) = &moved {
        quantised.info.verified = Some(moved.record(quantised.info.verified.take()));
    }
    Ok((quantised, moved))
}

/// Runs a model with its original and then with quantised weights, both in f32.
///
/// # Errors
/// If the weights cannot be read or run, or an output is not finite.
fn moved(checkpoint: &Checkpoint) -> Result<Moved> {
    let info = checkpoint.info();
    let (pixels, inputs) = verify::images(&info.model)?;
    let answers = |checkpoint: &Checkpoint| -> Result<Vec<f32>> {
        let model = verify::exact(verify::is_large(&info.model)).checkpoint(checkpoint)?;
        let mut output = Output::default();
        model.forward_into(&pixels, inputs, Wanted::Logits, &mut output)?;
        Ok(output.logits.unwrap_or(output.pre_logits))
    };
    let (own, quantised) = (answers(checkpoint)?, answers(&checkpoint.quantised())?);
    if let Some(bad) = own.iter().chain(&quantised).find(|v| !v.is_finite()) {
        return Err(Error::graph(format!("the model answers {bad}")));
    }
    let far = |a: &f32, b: &f32| f64::from((a - b).abs());
    let max_abs = own.iter().zip(&quantised).map(|(a, b)| far(a, b)).fold(0.0, f64::max);
    let scale = own.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(f64::from(v.abs())));
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(class, _)| class);
    let top1 = (info.model.num_classes > 1).then(|| {
        let rows = own.chunks(info.model.num_classes).zip(quantised.chunks(info.model.num_classes));
        let of = rows.len();
        (rows.filter(|(a, b)| best(a) == best(b)).count(), of)
    });
    Ok(Moved { max_abs, max_rel: max_abs / scale, top1, inputs })
}
