//! Requests run together: while the model runs one batch, the next one gathers.
//!
//! There is no fixed wait: at low load an image runs alone at once, and under load a batch is whatever has arrived while the
//! previous one ran.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use vit_model::predictor::{Output, Wanted};
use vit_model::{Error, Predictor};

use super::fault::Fault;
use super::metrics::Metrics;

/// What the model answers for one image, row-major.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub logits: Option<Vec<f32>>,
    /// What the head reads.
    pub pre_logits: Vec<f32>,
    /// The tokens after the last norm; empty unless everything was wanted.
    pub features: Vec<f32>,
}

struct Job {
    /// `[C, H, W]`, normalised.
    pixels: Vec<f32>,
    wanted: Wanted,
    since: Instant,
    reply: oneshot::Sender<Result<Answer, Fault>>,
}

/// Where images wait for their turn.
pub struct Queue {
    sender: mpsc::Sender<Job>,
}

impl Queue {
    /// Starts the thread that runs the model.
    pub fn new(model: Arc<Predictor>, waiting: usize, batch: usize, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(waiting.max(1));
        std::thread::Builder::new()
            .name("model".into())
            .spawn(move || run(&model, receiver, batch.max(1), &metrics))?;
        Ok(Self { sender })
    }

    /// Runs an image, together with others that wait. If the caller goes away, the image leaves the queue.
    pub async fn ask(&self, pixels: Vec<f32>, wanted: Wanted) -> Result<Answer, Fault> {
        let (reply, answer) = oneshot::channel();
        let job = Job { pixels, wanted, since: Instant::now(), reply };
        let gone = || Fault::internal("the thread that runs the model has ended");
        self.sender.send(job).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

fn run(model: &Predictor, mut receiver: mpsc::Receiver<Job>, batch: usize, metrics: &Metrics) {
    let (mut pixels, mut output) = (Vec::new(), Output::default());
    while let Some(first) = receiver.blocking_recv() {
        let mut jobs = vec![first];
        while jobs.len() < batch
            && let Ok(job) = receiver.try_recv()
        {
            jobs.push(job);
        }
        // nobody waits for these any more
        jobs.retain(|job| !job.reply.is_closed());
        if jobs.is_empty() {
            continue;
        }
        let started = Instant::now();
        pixels.clear();
        for job in &jobs {
            pixels.extend_from_slice(&job.pixels);
            metrics.waited(started - job.since);
        }
        let wanted = widest(&jobs);
        let (count, memory, out) = (jobs.len(), &pixels, &mut output);
        // a panic would end the thread and with it the service of this model
        let ran = catch_unwind(AssertUnwindSafe(|| model.forward_into(memory, count, wanted, out)));
        // an answer that is not finite is refused for its own image alone
        if count > 1 && matches!(ran, Ok(Err(Error::Output(_)))) {
            for job in jobs {
                let ran =
                    catch_unwind(AssertUnwindSafe(|| model.forward_into(&job.pixels, 1, job.wanted, &mut output)));
                let ran = ran.unwrap_or_else(|_| Err(Error::Output("the model panicked; please report this".into())));
                let answer = ran.map_err(Fault::from).map(|()| answer(&output, &job, 0, 1));
                let _ = job.reply.send(answer);
            }
            continue;
        }
        let ran = match ran {
            Ok(ran) => ran.map_err(Fault::from),
            Err(_) => Err(Fault::internal("the model panicked; please report this")),
        };
        metrics.ran(count, started.elapsed());
        for (i, job) in jobs.into_iter().enumerate() {
            let answer = ran.clone().map(|()| answer(&output, &job, i, count));
            // a caller that has gone needs no answer
            let _ = job.reply.send(answer);
        }
    }
}

/// The answer to the image `i` of `count`.
fn answer(output: &Output, job: &Job, i: usize, count: usize) -> Answer {
    let row = |values: &[f32]| values.chunks(values.len() / count).nth(i).unwrap_or_default().to_vec();
    let some = |values: &[f32]| if values.is_empty() { vec![] } else { row(values) };
    Answer {
        logits: output.logits.as_deref().map(some),
        pre_logits: some(&output.pre_logits),
        features: if job.wanted == Wanted::All { some(&output.features) } else { vec![] },
    }
}

/// The most that any of the images wants.
fn widest(jobs: &[Job]) -> Wanted {
    let any = |wanted| jobs.iter().any(|job| job.wanted == wanted);
    if any(Wanted::All) {
        Wanted::All
    } else if any(Wanted::Head) {
        Wanted::Head
    } else {
        Wanted::Logits
    }
}
