//! `/health`, `/info` and `/metrics`: for balancers and for people who run the server. They need no key, because balancers
//! have none; `/info` and `/metrics` tell nothing about requests' contents.

use std::sync::Arc;

use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::super::state::State;

pub fn routes() -> Router<Arc<State>> {
    Router::new()
        .route("/health", get(ready))
        .route("/v2/health/live", get(async || StatusCode::OK))
        .route("/v2/health/ready", get(ready))
        .route("/info", get(info))
        .route("/metrics", get(metrics))
}

async fn ready(Shared(state): Shared<Arc<State>>) -> StatusCode {
    if state.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn info(Shared(state): Shared<Arc<State>>) -> Json<Value> {
    let models: Vec<Value> = state.models.iter().map(|model| model.info()).collect();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "models": models,
        "max_client_batch_size": state.client_batch,
        "payload_limit": state.payload_limit,
        "key": state.key.is_some(),
        "urls": state.fetcher.is_some(),
    }))
}

async fn metrics(Shared(state): Shared<Arc<State>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], state.metrics.text())
}
