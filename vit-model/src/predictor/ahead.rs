//! Answers for any number of inputs: the next ones are read and preprocessed while the model runs.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::{iter, mem, thread, vec};

use rayon::prelude::*;

use super::input::Input;
use super::loaded::Loaded;
use super::modules::{Wanted, thread_pool};
use super::one::{answered, embedding};
use crate::Result;
use crate::cpu::Output;
use crate::labels::Prediction;

/// Images of a run of the model, unless something else is asked for.
const BATCH: usize = 8;

/// The classes of each input; made by [`Predictor::classify_all`](super::Predictor::classify_all).
#[must_use = "iterators do nothing until they are asked for an item"]
pub struct ClassifyAll<'p, I> {
    ahead: Ahead<'p, I>,
    k: usize,
}

impl<'p, I: Iterator> ClassifyAll<'p, I> {
    pub(super) fn new(model: &'p Loaded, inputs: I, k: usize) -> Self {
        Self { ahead: Ahead::new(model, inputs, Wanted::Logits, true), k }
    }

    /// How many images the model runs at once. Twice as many are in memory as tensors.
    pub fn batch(mut self, images: usize) -> Self {
        self.ahead.batch = images.max(1);
        self
    }
}

impl<'a, I: Iterator<Item: Into<Input<'a>>>> Iterator for ClassifyAll<'_, I> {
    type Item = Result<Vec<Prediction>>;

    fn next(&mut self) -> Option<Self::Item> {
        let (model, k) = (self.ahead.model, self.k);
        let named = |(logits, pixels)| model.predictions(logits, k).map_err(|error| model.blamed(error, pixels));
        Some(self.ahead.next()?.and_then(named))
    }
}

impl<'a, I: Iterator<Item: Into<Input<'a>>>> iter::FusedIterator for ClassifyAll<'_, I> {}

/// The embedding of each input; made by [`Predictor::embed_all`](super::Predictor::embed_all).
#[must_use = "iterators do nothing until they are asked for an item"]
pub struct EmbedAll<'p, I> {
    ahead: Ahead<'p, I>,
    normalize: bool,
}

impl<'p, I: Iterator> EmbedAll<'p, I> {
    pub(super) fn new(model: &'p Loaded, inputs: I) -> Self {
        Self { ahead: Ahead::new(model, inputs, model.embedding_wanted(), false), normalize: false }
    }

    /// Takes what the head reads, of a two-tower model as well, whose embeddings are projected otherwise.
    pub fn pooled(mut self) -> Self {
        self.ahead.wanted = Wanted::Head;
        self
    }

    /// How many images the model runs at once. Twice as many are in memory as tensors.
    pub fn batch(mut self, images: usize) -> Self {
        self.ahead.batch = images.max(1);
        self
    }

    /// Divides each vector by its length, so that a product of two is their cosine similarity.
    pub fn normalize(mut self) -> Self {
        self.normalize = true;
        self
    }
}

impl<'a, I: Iterator<Item: Into<Input<'a>>>> Iterator for EmbedAll<'_, I> {
    type Item = Result<Vec<f32>>;

    fn next(&mut self) -> Option<Self::Item> {
        let normalize = self.normalize;
        let model = self.ahead.model;
        let scaled = |(features, pixels)| embedding(features, normalize).map_err(|error| model.blamed(error, pixels));
        Some(self.ahead.next()?.and_then(scaled))
    }
}

impl<'a, I: Iterator<Item: Into<Input<'a>>>> iter::FusedIterator for EmbedAll<'_, I> {}

/// Inputs on their way through the model, a batch at a time.
///
/// While the model runs a batch, a thread prepares the next one; nothing is kept of a batch that was answered. The iterator
/// is asked for inputs on the caller's thread, so it need be neither `Send` nor `'static`.
struct Ahead<'p, I> {
    model: &'p Loaded,
    /// `None` after the last input, and after an error of the model.
    inputs: Option<I>,
    batch: usize,
    wanted: Wanted,
    /// Whether the answers are to be classes, which not every model has.
    classes: bool,
    /// Prepared, but not yet answered.
    prepared: Batch,
    /// Memory of a batch that was answered, for the next.
    spare: Vec<f32>,
    /// The model's answers, in rows, to those inputs of `results` that are good.
    output: Output,
    results: vec::IntoIter<Result<()>>,
    row: usize,
    /// Only if the number of threads was set; otherwise images are prepared in rayon's global pool.
    pool: Option<rayon::ThreadPool>,
}

/// Inputs that were prepared together.
#[derive(Default)]
struct Batch {
    /// Whether each input could be prepared, in order.
    results: Vec<Result<()>>,
    /// Those that could, one after the other.
    pixels: Vec<f32>,
    good: usize,
}

impl Batch {
    /// Prepares inputs in parallel.
    fn prepare(model: &Loaded, inputs: Vec<Input<'_>>, mut pixels: Vec<f32>) -> Self {
        let width = model.image_len();
        pixels.resize(inputs.len() * width, 0.0);
        let results: Vec<_> = (inputs.into_par_iter().zip(pixels.par_chunks_exact_mut(width)))
            .map(|(input, pixels)| model.read_into(input, pixels))
            .collect();
        let mut good = 0;
        for (i, _) in results.iter().enumerate().filter(|(_, result)| result.is_ok()) {
            if i > good {
                pixels.copy_within(i * width..(i + 1) * width, good * width);
            }
            good += 1;
        }
        pixels.truncate(good * width);
        Self { results, pixels, good }
    }
}

impl<'p, I: Iterator> Ahead<'p, I> {
    fn new(model: &'p Loaded, inputs: I, wanted: Wanted, classes: bool) -> Self {
        Self {
            model,
            inputs: Some(inputs),
            batch: BATCH,
            wanted,
            classes,
            prepared: Batch::default(),
            spare: Vec::new(),
            output: Output::default(),
            results: Vec::new().into_iter(),
            row: 0,
            pool: model.threads.and_then(|threads| thread_pool(threads).ok()),
        }
    }

    /// The model's answer to the next input and that input's pixels, or why there is none.
    fn next<'s, 'a>(&'s mut self) -> Option<Result<(&'s [f32], &'s [f32])>>
    where
        I::Item: Into<Input<'a>>,
    {
        while self.results.len() == 0 {
            if let Err(error) = self.advance()? {
                self.inputs = None;
                self.prepared = Batch::default();
                return Some(Err(error));
            }
        }
        let result = self.results.next()?;
        Some(result.map(|()| {
            let values = answered(&self.output, self.wanted);
            let width = match self.wanted {
                Wanted::Logits => self.model.config().num_classes,
                _ => self.model.shapes(1).pre_logits.iter().product(),
            };
            self.row += 1;
            let row = |all: &'s [f32], width| all.get((self.row - 1) * width..self.row * width).unwrap_or_default();
            (row(values, width), row(&self.spare, self.model.image_len()))
        }))
    }

    /// Runs the next batch, and prepares the one after it meanwhile. `None` after the last.
    fn advance<'a>(&mut self) -> Option<Result<()>>
    where
        I::Item: Into<Input<'a>>,
    {
        let model = self.model;
        if self.prepared.results.is_empty() {
            let inputs = self.pull();
            if inputs.is_empty() {
                return None;
            }
            if self.classes
                && let Err(error) = model.check_head()
            {
                return Some(Err(error));
            }
            let memory = mem::take(&mut self.spare);
            self.prepared = within(self.pool.as_ref(), || Batch::prepare(model, inputs, memory));
        }
        let batch = mem::take(&mut self.prepared);
        let (inputs, memory) = (self.pull(), mem::take(&mut self.spare));
        let (pool, wanted, output) = (self.pool.as_ref(), self.wanted, &mut self.output);
        let none_left = inputs.is_empty();
        let next = Mutex::new(Some((inputs, memory)));
        let prepare = || {
            let (inputs, memory) = next.lock().unwrap_or_else(PoisonError::into_inner).take()?;
            Some(within(pool, || Batch::prepare(model, inputs, memory)))
        };
        let ran = thread::scope(|scope| {
            // if no thread can be started, the next batch is prepared after this one has run
            let ahead = (!none_left).then(|| thread::Builder::new().spawn_scoped(scope, prepare));
            let ran = match batch.good {
                0 => Ok(()),
                good => model.forward_into(&batch.pixels, good, wanted, output),
            };
            let prepared = match ahead {
                Some(Ok(ahead)) => ahead.join().unwrap_or_else(|panic| resume_unwind(panic)),
                Some(Err(_)) => prepare(),
                None => None,
            };
            self.prepared = prepared.unwrap_or_default();
            ran
        });
        self.spare = batch.pixels;
        self.results = batch.results.into_iter();
        self.row = 0;
        if ran.is_err() {
            self.results = Vec::new().into_iter();
        }
        Some(ran)
    }

    /// The inputs of a batch; none after the last.
    fn pull<'a>(&mut self) -> Vec<Input<'a>>
    where
        I::Item: Into<Input<'a>>,
    {
        let Some(inputs) = &mut self.inputs else { return Vec::new() };
        let batch: Vec<_> = inputs.by_ref().take(self.batch).map(Into::into).collect();
        if batch.len() < self.batch {
            self.inputs = None;
        }
        batch
    }
}

/// Runs in a pool, if there is one.
fn within<T: Send>(pool: Option<&rayon::ThreadPool>, run: impl FnOnce() -> T + Send) -> T {
    match pool {
        Some(pool) => pool.install(run),
        None => run(),
    }
}
