//! Every route, by the client that it is for.

mod huggingface;
mod kserve;
mod native;
mod openai;
mod operators;
mod page;

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Request, State as Shared};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use subtle::ConstantTimeEq as _;

use super::fault::Fault;
use super::picture::Picture;
use super::state::State;

/// All routes, with authentication and metrics around them.
pub fn router(state: Arc<State>) -> Router {
    Router::new()
        .merge(native::routes())
        .merge(openai::routes())
        .merge(huggingface::routes())
        .merge(kserve::routes())
        .layer(from_fn_with_state(state.clone(), authenticate))
        .merge(operators::routes())
        .merge(page::routes())
        .fallback(|| async { Fault::new(StatusCode::NOT_FOUND, "there is nothing here; see /docs") })
        .method_not_allowed_fallback(|| async {
            Fault::new(StatusCode::METHOD_NOT_ALLOWED, "this route takes another method; see /docs")
        })
        .layer(from_fn_with_state(state.clone(), observe))
        .with_state(state)
}

/// Asks for the key, if the operator set one.
async fn authenticate(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    if let Some(key) = &state.key {
        let given = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
        // a comparison that stops at the first difference tells how much of a guess is right
        if !bool::from(given.ct_eq(key.as_bytes())) {
            let why = "this server asks for a key: send `Authorization: Bearer KEY`";
            return Fault::new(StatusCode::UNAUTHORIZED, why).into_response();
        }
    }
    next.run(request).await
}

/// Counts, logs, and passes on the ids that tie this request to the caller's others.
async fn observe(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    const ID: HeaderName = HeaderName::from_static("x-request-id");
    const TRACE: HeaderName = HeaderName::from_static("traceparent");
    let route = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str).to_owned();
    let method = request.method().clone();
    let trace = request.headers().get(TRACE).cloned();
    let id = request.headers().get(ID).cloned().unwrap_or_else(|| HeaderValue::from(request_id()));
    let started = Instant::now();
    state.metrics.in_flight.inc();
    // dropped with the request if the client goes away
    let _left = Left(&state);
    let mut response = next.run(request).await;
    let (took, status) = (started.elapsed(), response.status().as_u16());
    state.metrics.answered(route.clone(), status, took);
    if state.json_logs {
        let trace = trace.as_ref().and_then(|trace| trace.to_str().ok());
        let line = serde_json::json!({
            "method": method.as_str(), "route": route, "status": status, "ms": took.as_secs_f64() * 1e3,
            "request_id": id.to_str().ok(), "traceparent": trace,
        });
        eprintln!("{line}");
    }
    response.headers_mut().insert(ID, id);
    if let Some(trace) = trace {
        response.headers_mut().insert(TRACE, trace);
    }
    response
}

/// Counts a request that is no longer being answered.
struct Left<'a>(&'a State);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.0.metrics.in_flight.dec();
    }
}

/// A number that no other request of this process has.
fn request_id() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Answers every picture of a request at once; one that fails does not stop the others.
async fn each<T, F>(pictures: Vec<Picture>, answer: impl Fn(Picture) -> F) -> Vec<Result<T, Fault>>
where
    F: Future<Output = Result<T, Fault>>,
{
    futures_util::future::join_all(pictures.into_iter().map(answer)).await
}

/// Answers of which all must be good.
fn all<T>(answers: Vec<Result<T, Fault>>) -> Result<Vec<T>, Fault> {
    answers.into_iter().collect()
}
