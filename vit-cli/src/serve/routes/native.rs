//! `/predict`, `/embed` and `/explain`, for curl and for the page.

use std::sync::Arc;

use axum::extract::State as Shared;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{ExtendedColorType, ImageEncoder as _, codecs::png::PngEncoder};
use serde_json::{Value, json};
use vit_model::image::Image;
use vit_model::labels::Prediction;
use vit_model::predictor::Wanted;

use super::super::call::Call;
use super::super::fault::Fault;
use super::super::models::Model;
use super::super::picture::Picture;
use super::super::state::State;
use super::each;
use crate::output::prediction;

pub fn routes() -> Router<Arc<State>> {
    Router::new().route("/predict", post(predict)).route("/embed", post(embed)).route("/explain", post(explain))
}

async fn predict(Shared(state): Shared<Arc<State>>, call: Call) -> Result<Response, Fault> {
    let model = state.models.get(call.query("model").as_deref())?;
    let top = call.number("top_k", 5)?;
    let answers = each(call.pictures(&state).await?, |picture| classify(&state, model, picture, top)).await;
    respond(
        model,
        answers,
        |predictions| json!({"predictions": predictions.iter().map(prediction).collect::<Vec<_>>()}),
    )
}

async fn embed(Shared(state): Shared<Arc<State>>, call: Call) -> Result<Response, Fault> {
    let model = state.models.get(call.query("model").as_deref())?;
    let answers = each(call.pictures(&state).await?, |picture| vector(&state, model, picture)).await;
    respond(model, answers, |embedding| json!({"embedding": embedding}))
}

/// The attention that each patch gets from the class token: rolled out over the blocks, and of every head of every block.
async fn explain(Shared(state): Shared<Arc<State>>, call: Call) -> Result<Response, Fault> {
    let model = state.models.get(call.query("model").as_deref())?.clone();
    let mut pictures = call.pictures(&state).await?;
    let (Some(picture), true) = (pictures.pop(), pictures.is_empty()) else {
        return Err(Fault::request("/explain answers for one picture"));
    };
    let image = state.decode(picture).await?;
    let answer = state.work(move || explained(&model, &image)).await?;
    Ok(Json(answer).into_response())
}

fn explained(model: &Model, image: &Image) -> Result<Value, Fault> {
    let maps = model.predictor.attention(image)?;
    let round = |values: Vec<f32>| values.into_iter().map(|v| (v * 1e5).round() / 1e5).collect::<Vec<_>>();
    let mut blocks = Vec::new();
    for map in &maps {
        let [heads, _, _] = map.shape();
        let of_head = |head| -> vit_model::Result<_> { Ok(round(maps.per_patch(map.head(head).unwrap_or_default())?)) };
        let heads = (0..heads).map(of_head).collect::<Result<Vec<_>, _>>()?;
        blocks.push(json!({"name": map.name(), "block": map.block(), "heads": heads}));
    }
    // models whose attention does not sum to one have no rollout
    let rollout = maps.rollout().and_then(|rollout| maps.per_patch(&rollout)).ok().map(round);
    let seen = seen(model, image)?;
    Ok(json!({"model": model.name, "grid": maps.grid(), "rollout": rollout, "blocks": blocks, "seen": seen}))
}

/// The picture as the model sees it, resized and cropped, as a data URI, so that a page can lay the map over it exactly.
fn seen(model: &Model, image: &Image) -> Result<String, Fault> {
    let [channels, height, width] = model.input();
    let pixels = model.predictor.preprocess()?.resize_and_crop(image)?;
    let side = |n: usize| u32::try_from(n).map_err(Fault::internal);
    let colour = if channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let mut png = Vec::new();
    PngEncoder::new(&mut png).write_image(&pixels, side(width)?, side(height)?, colour).map_err(Fault::internal)?;
    Ok(format!("data:image/png;base64,{}", STANDARD.encode(png)))
}

/// The `top` most probable classes of a picture.
pub(super) async fn classify(
    state: &State,
    model: &Arc<Model>,
    picture: Picture,
    top: usize,
) -> Result<Vec<Prediction>, Fault> {
    let answer = state.ask(model, picture, Wanted::Logits).await?;
    model.predictions(&answer, top)
}

/// The embedding of a picture.
pub(super) async fn vector(state: &State, model: &Arc<Model>, picture: Picture) -> Result<Vec<f32>, Fault> {
    let answer = state.ask(model, picture, Wanted::Head).await?;
    model.embedding(&answer)
}

/// A record per picture; one that failed has an `error`. If all failed, the request did.
fn respond<T>(model: &Model, answers: Vec<Result<T, Fault>>, show: impl Fn(T) -> Value) -> Result<Response, Fault> {
    if let Some(Err(first)) = answers.first()
        && answers.iter().all(Result::is_err)
    {
        return Err(first.clone());
    }
    let record = |answer| match answer {
        Ok(answer) => show(answer),
        Err(Fault { why, .. }) => json!({"error": why}),
    };
    let results: Vec<Value> = answers.into_iter().map(record).collect();
    Ok(Json(json!({"model": model.name, "results": results})).into_response())
}
