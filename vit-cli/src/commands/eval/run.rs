//! A model's answers for every image, counted as they come.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};

use vit_model::labels::Prediction;
use vit_model::metrics::Tally;
use vit_model::predictor::ZeroShot;
use vit_model::{Predictor, Result};

use super::truth::Truth;
use crate::args::EvalArgs;
use crate::complain;
use crate::sources::{Inputs, Source, answer_each};

/// A model with its classes: its own, or words.
pub struct Classifier<'p> {
    predictor: &'p Predictor,
    words: Option<ZeroShot<'p>>,
    /// The name of each class, or its number.
    pub names: Vec<String>,
    /// Whether these are names.
    pub named: bool,
}

impl<'p> Classifier<'p> {
    /// The classes are `labels`, if there are any; those of the source, if the model has none of its own; or the model's.
    pub fn new(
        predictor: &'p Predictor,
        labels: Option<Vec<String>>,
        templates: &[String],
        source: &Path,
    ) -> anyhow::Result<Self> {
        let labels = match labels {
            None if predictor.is_two_tower() => {
                complain("note: assumed: the classes are called as in the source; --labels-file says otherwise");
                Some(Truth::names(source)?.iter().map(|name| name.replace('_', " ")).collect())
            }
            labels => labels,
        };
        if let Some(names) = labels {
            let words = predictor.zero_shot(&names, templates)?;
            return Ok(Self { predictor, words: Some(words), names, named: true });
        }
        let named = predictor.labels().is_some();
        let count = predictor.config().num_classes;
        let names = match predictor.labels() {
            Some(names) => names.to_vec(),
            None => (0..count).map(|class| class.to_string()).collect(),
        };
        Ok(Self { predictor, words: None, names, named })
    }

    fn classify_all<'a>(
        &'a self,
        inputs: Inputs<'a, usize>,
        batch: usize,
    ) -> Box<dyn Iterator<Item = Result<Vec<Prediction>>> + 'a> {
        let all = self.names.len();
        match &self.words {
            Some(words) => Box::new(words.classify_all(inputs, all).batch(batch)),
            None => Box::new(self.predictor.classify_all(inputs, all).batch(batch)),
        }
    }
}

/// What a model made of every image.
pub struct Run {
    pub tally: Tally,
    /// Whether each image was classified rightly, in order; `None` if it could not be read.
    pub right: Vec<Option<bool>>,
    /// The worst mistakes, the worst first.
    pub mistakes: Vec<Mistake>,
    took: Duration,
}

/// An image that was taken for another class.
#[derive(Clone, Debug)]
pub struct Mistake {
    pub source: Source,
    pub truth: usize,
    pub answer: usize,
    /// The probability of the answer.
    pub confidence: f32,
    /// The probability of the true class.
    pub of_truth: f32,
}

impl Mistake {
    /// How much more probable the wrong class seemed.
    fn badness(&self) -> f32 {
        self.confidence - self.of_truth
    }
}

/// Ordered so that the least bad one is the first to leave a heap.
struct Least(Mistake, usize);

impl Ord for Least {
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.badness().total_cmp(&self.0.badness()).then(self.1.cmp(&other.1))
    }
}

impl PartialOrd for Least {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Least {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Least {}

impl Run {
    /// Classifies every image of `truth`.
    pub fn of(classifier: &Classifier<'_>, model: &OsStr, truth: &Truth, args: &EvalArgs) -> anyhow::Result<Self> {
        let mut tally = Tally::new(classifier.names.len())?;
        let (mut right, mut worst) = (Vec::new(), BinaryHeap::new());
        let start = Instant::now();
        let ask = |inputs| classifier.classify_all(inputs, args.batch.into());
        answer_each(model, truth.images()?, ask, |source, truth, answer| {
            let Ok(predictions) = answer else {
                right.push(None);
                return Ok(());
            };
            tally.add(truth, &predictions)?;
            let Some(best) = predictions.first() else { return Ok(()) };
            right.push(Some(best.class == truth));
            if best.class != truth {
                let of_truth = predictions.iter().find(|p| p.class == truth).map_or(0.0, |p| p.probability);
                let (answer, confidence) = (best.class, best.probability);
                worst.push(Least(Mistake { source, truth, answer, confidence, of_truth }, right.len()));
                if worst.len() > args.mistakes as usize {
                    worst.pop();
                }
            }
            Ok(())
        })?;
        let mistakes = worst.into_sorted_vec().into_iter().map(|Least(mistake, _)| mistake).collect();
        Ok(Self { tally, right, mistakes, took: start.elapsed() })
    }

    /// Images that were classified.
    pub fn images(&self) -> usize {
        self.right.iter().flatten().count()
    }

    /// Images that could not be read, or for which the model has no answer.
    pub fn failed(&self) -> usize {
        self.right.len() - self.images()
    }

    /// Images per second, reading and preparing included.
    pub fn per_second(&self) -> f64 {
        self.right.len() as f64 / self.took.as_secs_f64().max(1e-9)
    }
}
