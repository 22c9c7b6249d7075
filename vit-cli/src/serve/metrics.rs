//! What an operator watches, in the format of Prometheus.

use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Which part of a request took the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Stage {
    /// Decoding and preprocessing the picture.
    Prepare,
    /// Waiting for the model.
    Queue,
    /// Running the batch.
    Model,
    /// All of the request, from its last byte to the first byte of the answer.
    Total,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByStage {
    stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByRoute {
    route: String,
    status: u16,
}

type Times = Family<ByStage, Histogram, fn() -> Histogram>;

/// All counters of the server.
pub struct Metrics {
    registry: Registry,
    requests: Family<ByRoute, Counter>,
    images: Counter,
    rejected: Counter,
    seconds: Times,
    batches: Histogram,
    /// Requests that are being answered.
    pub in_flight: Gauge,
    /// Connections that are open.
    pub connections: Gauge,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("vit");
        // from a millisecond to half a minute
        let seconds = Times::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 16)));
        let batches = Histogram::new(exponential_buckets(1.0, 2.0, 9));
        let (requests, images, rejected) = (Family::default(), Counter::default(), Counter::default());
        let (in_flight, connections) = (Gauge::default(), Gauge::default());
        registry.register("requests", "Answers, by route and status", requests.clone());
        registry.register("images", "Images that the models ran", images.clone());
        registry.register("rejected", "Requests refused because of too many others", rejected.clone());
        registry.register_with_unit("stage", "Time by stage", Unit::Seconds, seconds.clone());
        registry.register("batch_size", "Images per run of a model", batches.clone());
        registry.register("in_flight", "Requests that are being answered", in_flight.clone());
        registry.register("connections", "Open connections", connections.clone());
        Self { registry, requests, images, rejected, seconds, batches, in_flight, connections }
    }

    pub fn answered(&self, route: String, status: u16, time: Duration) {
        self.requests.get_or_create(&ByRoute { route, status }).inc();
        if status == 429 {
            self.rejected.inc();
        }
        self.took(Stage::Total, time);
    }

    pub fn took(&self, stage: Stage, time: Duration) {
        self.seconds.get_or_create(&ByStage { stage }).observe(time.as_secs_f64());
    }

    pub fn waited(&self, time: Duration) {
        self.took(Stage::Queue, time);
    }

    pub fn ran(&self, images: usize, time: Duration) {
        self.images.inc_by(images as u64);
        self.batches.observe(images as f64);
        self.took(Stage::Model, time);
    }

    /// The text that `/metrics` gives.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // writing to a string cannot fail
        let _ = encode(&mut text, &self.registry);
        text
    }
}
