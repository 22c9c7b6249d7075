//! A request with its body, and the pictures in it: the body itself, the files of a form, or fields of JSON.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::{HeaderMap, StatusCode, header, request::Parts};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, TryAcquireError};

use super::fault::Fault;
use super::picture::Picture;
use super::state::State;

/// How long a client may take to send a body.
const BODY_PATIENCE: Duration = Duration::from_secs(30);

/// A request with its body, which has its share of the server's budgets until it is dropped.
pub struct Call {
    pub parts: Parts,
    pub bytes: Bytes,
    /// The body as JSON, once it was asked for: bodies are large, and several readers ask.
    parsed: OnceLock<Value>,
    _permits: (OwnedSemaphorePermit, Vec<OwnedSemaphorePermit>),
}

impl Call {
    pub fn headers(&self) -> &HeaderMap {
        &self.parts.headers
    }

    /// The type of the body, without its parameters, in small letters.
    pub fn content_type(&self) -> String {
        let value = self.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<&Value, Fault> {
        if let Some(parsed) = self.parsed.get() {
            return Ok(parsed);
        }
        let parsed =
            serde_json::from_slice(&self.bytes).map_err(|e| Fault::request(format!("the body is not JSON: {e}")))?;
        Ok(self.parsed.get_or_init(|| parsed))
    }

    /// The value of a query parameter.
    pub fn query(&self, name: &str) -> Option<String> {
        let query = self.parts.uri.query()?;
        form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }

    /// A whole number from the query.
    pub fn number(&self, name: &str, default: usize) -> Result<usize, Fault> {
        match self.query(name) {
            None => Ok(default),
            Some(text) => match text.parse() {
                Ok(number) if number > 0 => Ok(number),
                _ => Err(Fault::request(format!("`{name}` must be a whole number from 1, found {text:?}"))),
            },
        }
    }

    /// The pictures of the body: the files of a form; the fields `image`, `images` or `inputs` of JSON; or the body itself.
    pub async fn pictures(&self, state: &Arc<State>) -> Result<Vec<Picture>, Fault> {
        let pictures = match self.content_type().as_str() {
            "multipart/form-data" => self.form(state).await?,
            "application/json" => {
                let json = self.json()?;
                let found = ["image", "images", "inputs"].iter().find_map(|key| json.get(key));
                let found =
                    found.ok_or_else(|| Fault::request("JSON has its picture under `image`, `images` or `inputs`"))?;
                Picture::list(found)?
            }
            _ if self.bytes.is_empty() => vec![],
            _ => vec![Picture::Bytes(self.bytes.clone())],
        };
        if pictures.is_empty() {
            return Err(Fault::request(
                "the request has no picture: send its bytes, a form with a file, or JSON with base64",
            ));
        }
        if pictures.len() > state.client_batch {
            let (found, limit) = (pictures.len(), state.client_batch);
            return Err(Fault::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("{found} pictures in a request, at most {limit} are answered (--max-client-batch-size)"),
            ));
        }
        Ok(pictures)
    }

    async fn form(&self, state: &Arc<State>) -> Result<Vec<Picture>, Fault> {
        let bad = |e: &dyn std::fmt::Display| Fault::request(format!("the form cannot be read: {e}"));
        let request = Request::from_parts(self.parts.clone(), Body::from(self.bytes.clone()));
        let mut form = Multipart::from_request(request, state).await.map_err(|e| bad(&e))?;
        let mut pictures = Vec::new();
        while let Some(field) = form.next_field().await.map_err(|e| bad(&e))? {
            let named =
                field.name().is_some_and(|name| matches!(name, "image" | "images" | "file" | "files" | "image[]"));
            if field.file_name().is_none() && !named {
                continue;
            }
            pictures.push(Picture::Bytes(field.bytes().await.map_err(|e| bad(&e))?));
        }
        Ok(pictures)
    }
}

impl FromRequest<Arc<State>> for Call {
    type Rejection = Fault;

    async fn from_request(request: Request, state: &Arc<State>) -> Result<Self, Fault> {
        let (parts, body) = request.into_parts();
        let large = || {
            let limit = state.payload_limit;
            Fault::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body is larger than {limit} bytes (--payload-limit)"),
            )
        };
        let declared = parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if declared.is_some_and(|length| length > state.payload_limit as u64) {
            return Err(large());
        }
        // the body is read before the request takes its place among those that are answered, so that slow clients cannot
        // keep others out; what they have sent counts against a budget of bytes
        let mut held = Vec::new();
        let read = async {
            let (mut body, mut bytes) = (body, Vec::new());
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| Fault::request(format!("the body ends early: {e}")))?;
                let Ok(data) = frame.into_data() else { continue };
                if bytes.len().saturating_add(data.len()) > state.payload_limit {
                    return Err(large());
                }
                let permits = u32::try_from(data.len()).unwrap_or(u32::MAX);
                held.push(state.bodies.clone().try_acquire_many_owned(permits).map_err(|_| Fault::busy())?);
                bytes.extend_from_slice(&data);
            }
            Ok(Bytes::from(bytes))
        };
        let slow = |_| Fault::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive");
        let bytes = tokio::time::timeout(BODY_PATIENCE, read).await.map_err(slow)??;
        let permit = match state.requests.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(TryAcquireError::NoPermits | TryAcquireError::Closed) => return Err(Fault::busy()),
        };
        Ok(Self { parts, bytes, parsed: OnceLock::new(), _permits: (permit, held) })
    }
}
