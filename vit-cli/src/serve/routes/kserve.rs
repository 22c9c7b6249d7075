//! The Open Inference Protocol (KServe v2, Triton): tensors in, tensors out, in JSON or with the binary extension.
//!
//! A model has two possible inputs: `pixel_values`, `[B, C, H, W]` f32 as its preprocessing makes them, or `image`, `[B]`
//! of encoded pictures (BYTES). Outputs: `logits`, `pre_logits` (what the head reads) and `features` (the tokens after the
//! last norm).

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State as Shared};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use vit_model::predictor::Wanted;

use super::super::batch::Answer;
use super::super::call::Call;
use super::super::fault::Fault;
use super::super::models::Model;
use super::super::picture::Picture;
use super::super::state::State;
use super::{all, each};

/// How many bytes of a body are JSON; binary tensors follow.
const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

pub fn routes() -> Router<Arc<State>> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/models/{model}", get(metadata))
        .route("/v2/models/{model}/ready", get(ready))
        .route("/v2/models/{model}/infer", post(infer))
        .route("/v2/models/{model}/versions/{version}", get(metadata))
        .route("/v2/models/{model}/versions/{version}/ready", get(ready))
        .route("/v2/models/{model}/versions/{version}/infer", post(infer))
}

/// The model of a path. Each has one version, so that which is asked for makes no difference.
#[derive(Deserialize)]
struct Named {
    model: String,
}

async fn server() -> Json<Value> {
    let version = env!("CARGO_PKG_VERSION");
    Json(json!({"name": "vit-cli", "version": version, "extensions": ["binary_tensor_data"]}))
}

async fn metadata(Shared(state): Shared<Arc<State>>, Path(Named { model }): Path<Named>) -> Result<Json<Value>, Fault> {
    let model = state.models.get(Some(&model))?;
    let [c, h, w] = model.input();
    let shapes = model.predictor.shapes(1);
    let open = |shape: &[usize]| {
        let mut shape: Vec<i64> = shape.iter().map(|&n| i64::try_from(n).unwrap_or(i64::MAX)).collect();
        shape.iter_mut().take(1).for_each(|batch| *batch = -1);
        shape
    };
    let output = |name: &str, shape: &[usize]| json!({"name": name, "datatype": "FP32", "shape": open(shape)});
    let mut outputs = vec![output("pre_logits", &shapes.pre_logits), output("features", &shapes.features)];
    if let Some(shape) = &shapes.logits {
        outputs.insert(0, output("logits", shape));
    }
    Ok(Json(json!({
        "name": model.name,
        "versions": ["1"],
        "platform": "vit-cli",
        "inputs": [
            {"name": "pixel_values", "datatype": "FP32", "shape": [-1, c, h, w]},
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": outputs,
    })))
}

async fn ready(Shared(state): Shared<Arc<State>>, Path(Named { model }): Path<Named>) -> Result<StatusCode, Fault> {
    state.models.get(Some(&model))?;
    Ok(if state.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE })
}

async fn infer(
    Shared(state): Shared<Arc<State>>,
    Path(Named { model: name }): Path<Named>,
    call: Call,
) -> Result<Response, Fault> {
    let model = state.models.get(Some(&name))?;
    let (request, binary) = split(&call)?;
    let given = request["inputs"].as_array().map(Vec::as_slice).unwrap_or_default();
    let [input] = given else {
        return Err(Fault::request(format!(
            "`inputs` must be one tensor, `pixel_values` or `image`, found {}",
            given.len()
        )));
    };
    let asked = Asked::of(&request, model)?;
    let answers = match Tensor::of(input, &binary)? {
        Tensor::Floats(shape, values) => {
            let [c, h, w] = model.input();
            let batch = match shape.as_slice() {
                &[batch, a, b, d] if [a, b, d] == [c, h, w] && batch > 0 => batch,
                found => {
                    return Err(Fault::input(format!("`pixel_values` must be [B, {c}, {h}, {w}], found {found:?}")));
                }
            };
            within(&state, batch)?;
            if values.len() != batch * c * h * w || !values.iter().all(|v| v.is_finite()) {
                return Err(Fault::input("`pixel_values` must hold as many finite numbers as its shape says"));
            }
            let images: Vec<Vec<f32>> = values.chunks(c * h * w).map(<[f32]>::to_vec).collect();
            let ask = images.into_iter().map(|pixels| state.ask_tensor(model, pixels, asked.wanted));
            all(futures_util::future::join_all(ask).await)?
        }
        Tensor::Pictures(pictures) => {
            within(&state, pictures.len())?;
            all(each(pictures, |picture| state.ask(model, picture, asked.wanted)).await)?
        }
    };
    respond(model, &request, &asked, &answers)
}

fn within(state: &State, images: usize) -> Result<(), Fault> {
    if images == 0 || images > state.client_batch {
        let limit = state.client_batch;
        return Err(Fault::request(format!("a request must have 1 to {limit} images, found {images}")));
    }
    Ok(())
}

/// The JSON of a request, and the bytes behind it.
fn split(call: &Call) -> Result<(Value, Bytes), Fault> {
    let length = match call.headers().get(HEADER_LENGTH) {
        None => call.bytes.len(),
        Some(text) => {
            text.to_str().ok().and_then(|text| text.parse().ok()).filter(|&n| n <= call.bytes.len()).ok_or_else(
                || {
                    Fault::request(
                        "Inference-Header-Content-Length must be the length of the JSON at the start of the body",
                    )
                },
            )?
        }
    };
    let request: Value = serde_json::from_slice(&call.bytes.slice(..length))
        .map_err(|e| Fault::request(format!("the request is not JSON: {e}")))?;
    Ok((request, call.bytes.slice(length..)))
}

enum Tensor {
    Floats(Vec<usize>, Vec<f32>),
    Pictures(Vec<Picture>),
}

impl Tensor {
    fn of(input: &Value, binary: &Bytes) -> Result<Self, Fault> {
        let bad = |why: &str| Fault::input(format!("input `{}`: {why}", input["name"].as_str().unwrap_or("?")));
        let shape: Option<Vec<usize>> =
            input["shape"].as_array().and_then(|dims| dims.iter().map(|d| usize::try_from(d.as_u64()?).ok()).collect());
        let shape = shape.ok_or_else(|| bad("has no `shape`"))?;
        let raw = match &input["parameters"]["binary_data_size"] {
            Value::Null => None,
            size => {
                let size = size.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n <= binary.len());
                Some(
                    binary.slice(..size.ok_or_else(|| bad("`binary_data_size` is larger than what follows the JSON"))?),
                )
            }
        };
        match (input["datatype"].as_str(), raw) {
            (Some("FP32"), Some(raw)) => {
                let (values, rest) = raw.as_chunks::<4>();
                if !rest.is_empty() {
                    return Err(bad("its bytes are not a multiple of four"));
                }
                Ok(Self::Floats(shape, values.iter().map(|b| f32::from_le_bytes(*b)).collect()))
            }
            (Some("FP32"), None) => {
                let mut values = Vec::new();
                flatten(&input["data"], &mut values).ok_or_else(|| bad("`data` must be numbers"))?;
                Ok(Self::Floats(shape, values))
            }
            (Some("BYTES"), Some(raw)) => {
                let (mut rest, mut pictures) = (raw, Vec::new());
                while let Some(&length) = rest.first_chunk::<4>() {
                    let end = usize::try_from(u32::from_le_bytes(length)).ok().and_then(|n| n.checked_add(4));
                    let end =
                        end.filter(|&end| end <= rest.len()).ok_or_else(|| bad("an element ends behind the body"))?;
                    pictures.push(Picture::Bytes(rest.slice(4..end)));
                    rest = rest.slice(end..);
                }
                Ok(Self::Pictures(pictures))
            }
            (Some("BYTES"), None) => Ok(Self::Pictures(Picture::list(&input["data"])?)),
            (found, _) => Err(bad(&format!("the datatype must be FP32 or BYTES, found {}", found.unwrap_or("none")))),
        }
    }
}

/// Numbers, nested or not, in row-major order.
fn flatten(value: &Value, out: &mut Vec<f32>) -> Option<()> {
    match value {
        Value::Array(many) => many.iter().try_for_each(|value| flatten(value, out)),
        // f32 is what the tensor holds
        one => {
            out.push(one.as_f64()? as f32);
            Some(())
        }
    }
}

/// The outputs that a request asks for.
struct Asked {
    names: Vec<(String, bool)>,
    wanted: Wanted,
}

impl Asked {
    fn of(request: &Value, model: &Model) -> Result<Self, Fault> {
        let all_binary = request["parameters"]["binary_data_output"].as_bool().unwrap_or(false);
        let has_head = model.classes() > 0;
        let mut names = Vec::new();
        for output in request["outputs"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let name = output["name"].as_str().unwrap_or_default();
            if !(matches!(name, "pre_logits" | "features") || name == "logits" && has_head) {
                return Err(Fault::input(format!("the model `{}` has no output {name:?}", model.name)));
            }
            names.push((name.to_owned(), output["parameters"]["binary_data"].as_bool().unwrap_or(all_binary)));
        }
        if names.is_empty() {
            names.push((if has_head { "logits" } else { "pre_logits" }.into(), all_binary));
        }
        let asks = |name: &str| names.iter().any(|(asked, _)| asked == name);
        let wanted = if asks("features") {
            Wanted::All
        } else if asks("pre_logits") {
            Wanted::Head
        } else {
            Wanted::Logits
        };
        Ok(Self { names, wanted })
    }
}

fn respond(model: &Model, request: &Value, asked: &Asked, answers: &[Answer]) -> Result<Response, Fault> {
    let shapes = model.predictor.shapes(answers.len());
    let (mut outputs, mut binary) = (Vec::new(), Vec::new());
    for (name, raw) in &asked.names {
        let shape = match name.as_str() {
            "logits" => shapes.logits.clone().unwrap_or_default(),
            "features" => shapes.features.clone(),
            _ => shapes.pre_logits.clone(),
        };
        let values = answers.iter().flat_map(|answer| match name.as_str() {
            "logits" => answer.logits.as_deref().unwrap_or_default(),
            "features" => &answer.features,
            _ => &answer.pre_logits,
        });
        let mut output = json!({"name": name, "datatype": "FP32", "shape": shape});
        if *raw {
            let start = binary.len();
            binary.extend(values.flat_map(|value| value.to_le_bytes()));
            output["parameters"] = json!({"binary_data_size": binary.len() - start});
        } else {
            output["data"] = values.copied().collect();
        }
        outputs.push(output);
    }
    let mut answer = json!({"model_name": model.name, "model_version": "1", "outputs": outputs});
    if let Some(id) = request["id"].as_str() {
        answer["id"] = id.into();
    }
    if binary.is_empty() {
        return Ok(Json(answer).into_response());
    }
    let mut body = serde_json::to_vec(&answer).map_err(Fault::internal)?;
    let length = HeaderValue::from(body.len());
    body.extend(binary);
    let kind = HeaderValue::from_static("application/octet-stream");
    Ok(([(HEADER_LENGTH, length), (header::CONTENT_TYPE, kind)], body).into_response())
}
