//! The tasks of Hugging Face's `InferenceClient` and `@huggingface/inference`: a picture's raw bytes, or
//! `{"inputs": …, "parameters": …}`.
//!
//! A client that is given this server's address as its model posts to `/`, without saying which task it wants. There, a
//! model with classes classifies and another one gives its features.

use std::sync::Arc;

use axum::extract::{Path, State as Shared};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::call::Call;
use super::super::fault::Fault;
use super::super::models::Model;
use super::super::state::State;
use super::native::{classify, vector};
use super::{all, each};

/// Labels of one request: each is run through the text tower.
const MAX_LABELS: usize = 1000;

pub fn routes() -> Router<Arc<State>> {
    // the task that a route is for
    let task = |task: &'static str| post(move |state, call| answer(state, Path(Asked::task(task)), call));
    Router::new()
        .route("/", post(|state, call| answer(state, Path(Asked::default()), call)))
        .route("/models/{*model}", post(answer))
        .route("/image-classification", task("image-classification"))
        .route("/zero-shot-image-classification", task("zero-shot-image-classification"))
        .route("/feature-extraction", task("feature-extraction"))
        .route("/image-feature-extraction", task("feature-extraction"))
        .route("/pipeline/{task}", post(answer))
        .route("/pipeline/{task}/{*model}", post(answer))
}

/// What a path says.
#[derive(Default, Deserialize)]
struct Asked {
    task: Option<String>,
    model: Option<String>,
}

impl Asked {
    fn task(task: &str) -> Self {
        Self { task: Some(task.to_owned()), model: None }
    }
}

async fn answer(Shared(state): Shared<Arc<State>>, Path(asked): Path<Asked>, call: Call) -> Result<Response, Fault> {
    run(&state, state.models.get(asked.model.as_deref())?, &call, asked.task.as_deref()).await
}

async fn run(state: &Arc<State>, model: &Arc<Model>, call: &Call, task: Option<&str>) -> Result<Response, Fault> {
    let json = if call.content_type() == "application/json" { call.json()? } else { &Value::Null };
    let parameters = &json["parameters"];
    let task = match task {
        Some(task) => task,
        None if !parameters["candidate_labels"].is_null() => "zero-shot-image-classification",
        None if model.classes() > 0 => "image-classification",
        None => "feature-extraction",
    };
    let pictures = call.pictures(state).await?;
    // a list of pictures gets a list of answers, and one picture its own
    let many = json["inputs"].is_array();
    let answers: Vec<Value> = match task {
        "image-classification" => {
            let top = match &parameters["top_k"] {
                Value::Null => 5,
                given => given.as_u64().filter(|k| *k > 0).and_then(|k| usize::try_from(k).ok()).ok_or_else(|| {
                    Fault::request(format!("`parameters.top_k` must be a whole number from 1, found {given}"))
                })?,
            };
            let apply = match parameters["function_to_apply"].as_str() {
                None | Some("softmax") => false,
                Some("none") => true,
                Some(other) => {
                    return Err(Fault::request(format!(
                        "`function_to_apply` must be softmax or none, found {other:?}"
                    )));
                }
            };
            let answers = all(each(pictures, |picture| classify(state, model, picture, top)).await)?;
            let score = |p: &vit_model::labels::Prediction| {
                if apply || p.probability.is_nan() { p.logit } else { p.probability }
            };
            answers
                .iter()
                .map(|classes| classes.iter().map(|p| json!({"label": p.label, "score": score(p)})).collect())
                .collect()
        }
        "feature-extraction" | "image-feature-extraction" => {
            let vectors = all(each(pictures, |picture| vector(state, model, picture)).await)?;
            vectors.into_iter().map(|vector| json!(vector)).collect()
        }
        "zero-shot-image-classification" => {
            let texts = |value: &Value| -> Vec<String> {
                let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
                list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            };
            let labels = texts(&parameters["candidate_labels"]);
            if labels.is_empty() || labels.len() > MAX_LABELS {
                let found = labels.len();
                return Err(Fault::request(format!(
                    "`candidate_labels` must be 1 to {MAX_LABELS} texts, found {found}"
                )));
            }
            let template = parameters["hypothesis_template"].as_str();
            let templates: Vec<String> = template.into_iter().map(str::to_owned).collect();
            let mut answers = Vec::new();
            for picture in pictures {
                let image = state.decode(picture).await?;
                let (model, labels, templates) = (model.clone(), labels.clone(), templates.clone());
                let found = state.work(move || model.zero_shot(&image, &labels, &templates)).await?;
                answers.push(found.iter().map(|p| json!({"label": p.label, "score": p.probability})).collect());
            }
            answers
        }
        other => {
            return Err(Fault::request(format!(
                "the task {other:?} is none of image-classification, zero-shot-image-classification, feature-extraction"
            )));
        }
    };
    let answer = if many { Value::Array(answers) } else { answers.into_iter().next().unwrap_or_default() };
    Ok(Json(answer).into_response())
}
