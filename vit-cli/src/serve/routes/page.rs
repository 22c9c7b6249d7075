//! The page for people, and the description of the API for programs: files that are part of the program.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::response::{Html, IntoResponse};
use axum::routing::get;

use super::super::openapi;
use super::super::state::State;

/// Nothing but this page's own scripts and styles runs or loads, whatever a file name or a label contains.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; \
                      media-src 'self' blob:; connect-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub fn routes() -> Router<Arc<State>> {
    Router::new()
        .route("/", get(async || page(include_str!("../page.html"))))
        .route("/docs", get(async || page(include_str!("../docs.html"))))
        .route("/openapi.json", get(async || ([(header::CONTENT_TYPE, "application/json")], openapi::DOCUMENT)))
        .route("/favicon.ico", get(async || axum::http::StatusCode::NO_CONTENT))
}

fn page(html: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")], Html(html))
}
