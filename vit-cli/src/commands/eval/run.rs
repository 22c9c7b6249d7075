//! A model's answers for every image, counted as they come.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};
use std::ffi::OsStr;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use vit_model::labels::Prediction;
use vit_model::metrics::Tally;
use vit_model::predictor::{Input, ZeroShot};
use vit_model::{Error, Predictor, Result};

use super::truth::Truth;
use crate::args::EvalArgs;
use crate::sources::{Source, progress_bar};
use crate::{complain, open};

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
        inputs: impl Iterator<Item = Result<Input<'static>>> + 'a,
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
    /// Images that could not be read.
    pub failed: usize,
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
        let (mut right, mut worst, mut failed) = (Vec::new(), BinaryHeap::new(), 0);
        let waiting: Rc<RefCell<VecDeque<(Source, usize)>>> = Rc::default();
        let queue = waiting.clone();
        let inputs = truth.images()?.map(move |(source, class)| {
            let input = source.input();
            queue.borrow_mut().push_back((source, class));
            input
        });
        let progress = progress_bar();
        let start = Instant::now();
        for answer in classifier.classify_all(inputs, args.batch.into()) {
            let next = waiting.borrow_mut().pop_front();
            match (answer, next) {
                (Ok(predictions), Some((source, truth))) => {
                    tally.add(truth, &predictions)?;
                    let Some(best) = predictions.first() else { continue };
                    right.push(Some(best.class == truth));
                    if best.class != truth {
                        let of_truth = predictions.iter().find(|p| p.class == truth).map_or(0.0, |p| p.probability);
                        let (answer, confidence) = (best.class, best.probability);
                        worst.push(Least(Mistake { source, truth, answer, confidence, of_truth }, right.len()));
                        if worst.len() > args.mistakes as usize {
                            worst.pop();
                        }
                    }
                }
                (Err(error @ (Error::Image { .. } | Error::Output(_))), Some((source, _))) => {
                    progress.suspend(|| complain(&source.name_once(&error.to_string())));
                    right.push(None);
                    failed += 1;
                }
                (Err(error), _) => return Err(open::named(model, error)),
                (Ok(_), None) => break,
            }
            progress.inc(1);
        }
        progress.finish_and_clear();
        let mistakes = worst.into_sorted_vec().into_iter().map(|Least(mistake, _)| mistake).collect();
        Ok(Self { tally, right, mistakes, failed, took: start.elapsed() })
    }

    /// Images that were classified.
    pub fn images(&self) -> usize {
        self.right.len() - self.failed
    }

    /// Images per second, reading and preparing included.
    pub fn per_second(&self) -> f64 {
        self.right.len() as f64 / self.took.as_secs_f64().max(1e-9)
    }
}
