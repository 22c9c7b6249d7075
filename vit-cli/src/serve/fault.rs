//! An answer that says no: an HTTP status, and a sentence that says what to do.

use std::fmt;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::output::message;

/// A refusal.
#[derive(Clone, Debug)]
pub struct Fault {
    pub status: StatusCode,
    pub why: String,
}

impl Fault {
    pub fn new(status: StatusCode, why: impl fmt::Display) -> Self {
        Self { status, why: message(&why.to_string()) }
    }

    /// A request that is not understood.
    pub fn request(why: impl fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, why)
    }

    /// A request that is understood, with a picture or an option that cannot be used.
    pub fn input(why: impl fmt::Display) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, why)
    }

    /// More requests than the server takes at once.
    pub fn busy() -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "the server is at its limit of concurrent requests; try again later")
    }

    /// Something that is not the client's fault.
    pub fn internal(why: impl fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, why)
    }

    /// The machine-readable kind, as TEI and OpenAI name them.
    pub fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found",
            StatusCode::TOO_MANY_REQUESTS => "overloaded",
            StatusCode::SERVICE_UNAVAILABLE => "unavailable",
            status if status.is_server_error() => "backend",
            _ => "invalid_request_error",
        }
    }

    /// The response in OpenAI's form: `{"error": {"message", "type", "code"}}`.
    pub fn openai(self) -> Response {
        let body =
            json!({"error": {"message": self.why, "type": self.kind(), "param": null, "code": self.status.as_u16()}});
        self.respond(Json(body))
    }

    fn respond(self, body: impl IntoResponse) -> Response {
        let mut response = (self.status, body).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS || self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let body = json!({"error": self.why, "error_type": self.kind()});
        self.respond(Json(body))
    }
}

impl From<vit_model::Error> for Fault {
    fn from(error: vit_model::Error) -> Self {
        use vit_model::Error as E;
        match &error {
            E::Image { .. } | E::Input(_) | E::Unsupported { .. } => Self::input(&error),
            _ => Self::internal(&error),
        }
    }
}
