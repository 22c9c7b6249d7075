//! What every request shares: the models, and the budgets that keep one request from stopping the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::Semaphore;
use vit_model::image::Image;
use vit_model::predictor::Wanted;

use super::batch::Answer;
use super::fault::Fault;
use super::fetch::Fetcher;
use super::metrics::{Metrics, Stage};
use super::models::{Model, Models};
use super::picture::Picture;
use crate::args::ServeArgs;

/// Bytes of request bodies in memory at once, as a multiple of the largest body.
const BODIES: usize = 16;

pub struct State {
    pub models: Models,
    pub metrics: Arc<Metrics>,
    pub threads: usize,
    /// Requests that are answered at once; one more gets 429.
    pub requests: Arc<Semaphore>,
    /// Bytes of bodies in memory.
    pub bodies: Arc<Semaphore>,
    /// Pictures that are decoded at once.
    decoders: Arc<Semaphore>,
    /// Images that are in memory as tensors.
    tensors: Semaphore,
    pub payload_limit: usize,
    pub client_batch: usize,
    pub key: Option<String>,
    pub fetcher: Option<Fetcher>,
    pub json_logs: bool,
    ready: AtomicBool,
}

impl State {
    pub fn new(args: &ServeArgs, verbose: bool) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new());
        let models = Models::load(args, verbose, &metrics)?;
        let threads = models.iter().map(|model| model.predictor.backend().threads).max().unwrap_or(1).max(1);
        let requests = usize::from(args.max_concurrent_requests);
        Ok(Self {
            models,
            metrics,
            threads,
            requests: Arc::new(Semaphore::new(requests)),
            bodies: Arc::new(Semaphore::new(args.payload_limit.saturating_mul(BODIES).min(Semaphore::MAX_PERMITS))),
            decoders: Arc::new(Semaphore::new(threads)),
            tensors: Semaphore::new(usize::from(args.max_batch).saturating_mul(4).max(threads)),
            payload_limit: args.payload_limit,
            client_batch: args.max_client_batch_size.into(),
            key: args.api_key.clone(),
            fetcher: args.allow_url.then(|| Fetcher::new(args.payload_limit)),
            json_logs: args.json_logs,
            ready: AtomicBool::new(true),
        })
    }

    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// From now on, balancers are told to send requests elsewhere.
    pub fn drain(&self) {
        self.ready.store(false, Ordering::Relaxed);
    }

    /// A decoded picture. Decoding runs on a thread of its own; as many run at once as the models have threads.
    pub async fn decode(&self, picture: Picture) -> Result<Image, Fault> {
        let bytes = match picture {
            Picture::Bytes(bytes) => bytes,
            Picture::Url(url) => match &self.fetcher {
                Some(fetcher) => fetcher.get(url).await?,
                None => {
                    return Err(Fault::input(
                        "this server does not fetch URLs: send the picture itself (an operator can allow it with --allow-url)",
                    ));
                }
            },
        };
        self.work(move || Ok(Image::decode(&bytes)?)).await
    }

    /// What the model answers for a picture.
    pub async fn ask(&self, model: &Arc<Model>, picture: Picture, wanted: Wanted) -> Result<Answer, Fault> {
        let closed = |_| Fault::internal("the server is closing");
        let _held = self.tensors.acquire().await.map_err(closed)?;
        let image = self.decode(picture).await?;
        let reader = model.clone();
        let pixels = self.work(move || reader.pixels(&image)).await?;
        model.queue.ask(pixels, wanted).await
    }

    /// As [`ask`](Self::ask), for an image that is a tensor already.
    pub async fn ask_tensor(&self, model: &Arc<Model>, pixels: Vec<f32>, wanted: Wanted) -> Result<Answer, Fault> {
        let closed = |_| Fault::internal("the server is closing");
        let _held = self.tensors.acquire().await.map_err(closed)?;
        model.queue.ask(pixels, wanted).await
    }

    /// Runs something that computes, beside the threads that answer requests.
    pub async fn work<T: Send + 'static>(
        &self,
        run: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let closed = |_| Fault::internal("the server is closing");
        let held = self.decoders.clone().acquire_owned().await.map_err(closed)?;
        let metrics = self.metrics.clone();
        let done = tokio::task::spawn_blocking(move || {
            // held until the work is done, even if the client has gone
            let _held = held;
            let started = Instant::now();
            let done = run();
            metrics.took(Stage::Prepare, started.elapsed());
            done
        });
        done.await.unwrap_or_else(|_| Err(Fault::internal("decoding panicked; please report the picture")))
    }
}
