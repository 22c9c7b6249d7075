//! `/v1/embeddings` and `/v1/models`, as OpenAI's SDKs and Infinity's clients speak.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State as Shared;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::super::call::Call;
use super::super::fault::Fault;
use super::super::picture::Picture;
use super::super::state::State;
use super::native::vector;
use super::{all, each};

pub fn routes() -> Router<Arc<State>> {
    let embeddings = || post(async |state, call| embeddings(state, call).await.unwrap_or_else(Fault::openai));
    Router::new()
        .route("/v1/embeddings", embeddings())
        .route("/embeddings", embeddings())
        .route("/v1/models", get(models))
        .route("/models", get(models))
        .route("/v1/models/{*model}", get(model))
}

async fn models(Shared(state): Shared<Arc<State>>) -> Json<Value> {
    let data: Vec<Value> = state.models.names().iter().map(|name| listed(name)).collect();
    Json(json!({"object": "list", "data": data}))
}

async fn model(Shared(state): Shared<Arc<State>>, axum::extract::Path(name): axum::extract::Path<String>) -> Response {
    match state.models.get(Some(&name)) {
        Ok(model) => Json(listed(&model.name)).into_response(),
        Err(fault) => fault.openai(),
    }
}

fn listed(name: &str) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    json!({"id": name, "object": "model", "created": now, "owned_by": "vit-cli"})
}

async fn embeddings(Shared(state): Shared<Arc<State>>, call: Call) -> Result<Response, Fault> {
    let body = call.json()?;
    let text = |key: &str| match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(other) => Err(Fault::request(format!("`{key}` must be a text, found {other}"))),
    };
    let model = state.models.get(text("model")?)?;
    let base64 = match text("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(Fault::request(format!("`encoding_format` must be float or base64, found {other:?}")));
        }
    };
    let width = model.predictor.embedding_len();
    if let Some(asked) = body.get("dimensions").filter(|asked| !asked.is_null())
        && asked.as_u64() != Some(width as u64)
    {
        return Err(Fault::request(format!(
            "`dimensions` must be {width}: this model was not trained to have its vectors shortened"
        )));
    }
    let input = body.get("input").ok_or_else(|| Fault::request("the request has no `input`"))?;
    if text("modality")?.is_some_and(|modality| modality != "image") || is_text(input) {
        return Err(Fault::input(format!(
            "the model `{}` embeds pictures: send base64, data URIs or URLs as `input`, with `\"modality\": \"image\"`",
            model.name
        )));
    }
    let pictures = Picture::list(input)?;
    if pictures.is_empty() || pictures.len() > state.client_batch {
        return Err(Fault::request(format!(
            "`input` must have 1 to {} pictures, found {}",
            state.client_batch,
            pictures.len()
        )));
    }
    let count = pictures.len();
    let vectors = all(each(pictures, |picture| vector(&state, model, picture)).await)?;
    let encode = |vector: Vec<f32>| {
        if base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
            json!(STANDARD.encode(bytes))
        } else {
            json!(vector)
        }
    };
    let data = vectors.into_iter().enumerate();
    let data: Vec<Value> =
        data.map(|(i, vector)| json!({"object": "embedding", "index": i, "embedding": encode(vector)})).collect();
    // OpenAI counts tokens; a picture is one
    let usage = json!({"prompt_tokens": count, "total_tokens": count});
    Ok(Json(json!({"object": "list", "data": data, "model": model.name, "usage": usage})).into_response())
}

/// Whether an input is words rather than a picture.
fn is_text(input: &Value) -> bool {
    let words =
        |value: &Value| value.as_str().is_some_and(|text| text.trim().contains(' ') && !text.starts_with("data:"));
    match input {
        Value::Array(many) => many.iter().any(words),
        one => words(one),
    }
}
