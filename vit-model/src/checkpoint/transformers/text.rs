//! Reads the text towers of transformers' CLIP and SigLIP: config.json as a [`TextConfig`], and tensors under our names.

use std::{collections::BTreeMap, collections::BTreeSet, sync::Arc};

use serde_json::Value;

use crate::{
    Error, Result, TensorProblem,
    checkpoint::described::Described,
    checkpoint::transformers::names::TOWER,
    checkpoint::transformers::read::{Getter, activation},
    checkpoint::views::{Part, Views},
    text::{Similarity, TextConfig, TextPool},
    weights::{TensorInfo, Weights},
};

/// The table of token embeddings, after the tower's prefix.
const TOKENS: &str = "embeddings.token_embedding.weight";

/// Whether config.json describes a model with a text tower, and the weights have one.
pub(in crate::checkpoint) fn is(config: &Value, tensors: &BTreeMap<String, TensorInfo>) -> bool {
    family(config).is_some() && tensors.keys().any(|name| name.ends_with(TOKENS))
}

/// Whether config.json alone leaves open that the model has a text tower.
#[cfg(feature = "hub")]
pub(crate) fn may_have_texts(config: &Value) -> bool {
    family(config).is_some()
}

/// Whether config.json describes a text tower without images.
#[cfg(feature = "hub")]
pub(in crate::checkpoint) fn is_alone(config: &Value) -> bool {
    family(config).is_some_and(|(_, alone)| alone)
}

/// CLIP or SigLIP, and whether the text tower is all there is.
fn family(config: &Value) -> Option<(Similarity, bool)> {
    match config.get("model_type").and_then(Value::as_str)? {
        "clip" => Some((Similarity::Softmax, false)),
        "clip_text_model" => Some((Similarity::Softmax, true)),
        "siglip" | "siglip2" => Some((Similarity::Sigmoid, false)),
        "siglip_text_model" | "siglip2_text_model" => Some((Similarity::Sigmoid, true)),
        _ => None,
    }
}

/// Reads the configuration and finds the tensors.
pub(in crate::checkpoint) fn describe(config: &Value, weights: &Arc<dyn Weights>) -> Result<Described> {
    let tensors = weights.tensors();
    let (similarity, alone) = family(config).ok_or_else(|| Error::config("describes no text tower"))?;
    let clip = similarity == Similarity::Softmax;
    // older files may say it in `text_config_dict`, which has precedence in transformers
    let nested =
        ["text_config_dict", "text_config"].into_iter().find_map(|key| config.get(key).filter(|v| v.is_object()));
    let own = Getter(nested.unwrap_or(config));
    let dim = own.number("hidden_size", if clip { 512 } else { 768 })?;
    let default_act = if clip { "quick_gelu" } else { "gelu_pytorch_tanh" };
    let eos = own.number("eos_token_id", 49407)?;

    let mut prefixes = tensors.keys().filter_map(|name| name.strip_suffix(TOKENS));
    let prefix = match (prefixes.next(), prefixes.next()) {
        (Some(prefix), None) => prefix.to_owned(),
        (None, _) => return Err(Error::missing(TOKENS)),
        (Some(_), Some(_)) => return Err(Error::config(format!("the weights hold more than one `{TOKENS}`"))),
    };
    // CLIP's projection does not have the tower's prefix, SigLIP's does
    let head = if clip { "text_projection".to_owned() } else { format!("{prefix}head") };
    let shape = |name: &str| tensors.get(name).map(|info| info.shape.clone());
    let projection = shape(&format!("{head}.weight")).and_then(|shape| shape.first().copied());
    let model = TextConfig {
        vocab_size: own.number("vocab_size", if clip { 49408 } else { 32000 })?,
        context_length: own.number("max_position_embeddings", if clip { 77 } else { 64 })?,
        embed_dim: dim,
        depth: own.number("num_hidden_layers", 12)?,
        num_heads: own.number("num_attention_heads", if clip { 8 } else { 12 })?,
        mlp_hidden: own.number("intermediate_size", if clip { 2048 } else { 3072 })?,
        act: activation(own.text("hidden_act", default_act)?)?,
        ln_eps: own.real("layer_norm_eps", if clip { 1e-5 } else { 1e-6 })?,
        causal: clip,
        pool: match (clip, u32::try_from(eos)) {
            (false, _) => TextPool::Last,
            // files from before the right id was stored, see `CLIPTextTransformer.forward`
            (true, Ok(2)) => TextPool::LargestId,
            (true, Ok(eos)) => TextPool::FirstOf(eos),
            (true, Err(_)) => return Err(Error::config(format!("`eos_token_id` {eos} is no token"))),
        },
        projection,
        projection_bias: !clip,
        similarity,
    };
    model.validate()?;
    let pad = own.number("pad_token_id", 1)?;
    Ok(Described {
        weights: views(&prefix, &head, &model, weights, alone)?,
        config: model,
        pad: u32::try_from(pad).ok(),
        alone,
    })
}

/// The tensors under our names. Checks that each exists, that its shape fits, and that none of the tower is left over.
fn views(prefix: &str, head: &str, model: &TextConfig, weights: &Arc<dyn Weights>, alone: bool) -> Result<Views> {
    let found = weights.tensors();
    let mut used = BTreeSet::new();
    let mut views = Views::new(weights.clone());
    for (ours, shape) in model.parameters() {
        let theirs = parts(&ours, prefix, head);
        for name in &theirs {
            let info = found.get(name).ok_or_else(|| Error::missing(name))?;
            let mut expected = shape.clone();
            if let Some(rows) = expected.first_mut() {
                *rows = rows.checked_div(theirs.len()).unwrap_or(0);
            }
            if info.shape != expected {
                return Err(Error::problem(
                    name,
                    TensorProblem::Shape,
                    format!("expected the shape {expected:?}, found {:?}", info.shape),
                ));
            }
            used.insert(name.clone());
        }
        views.add(ours, shape, theirs.into_iter().map(Part::All).collect());
    }
    // beside an image tower, what does not have this tower's prefix belongs to that one
    let harmless = |name: &str| name.ends_with("position_ids") || name.starts_with("logit_");
    let ours = |name: &str| alone || (!prefix.is_empty() && name.starts_with(prefix));
    match found.keys().find(|name| ours(name) && !harmless(name) && !used.contains(*name)) {
        Some(name) => Err(Error::problem(
            name,
            TensorProblem::LeftOver,
            "left over: the text tower that config.json describes has no such tensor",
        )),
        None => Ok(views),
    }
}

/// The names in the file of one of our tensors.
fn parts(ours: &str, prefix: &str, head: &str) -> Vec<String> {
    let own = |name: String| vec![format!("{prefix}{name}")];
    if ours == "token_embed.weight" {
        return own(TOKENS.into());
    }
    if ours == "pos_embed" {
        return own(TOWER.positions.into());
    }
    let (layer, end) = ours.rsplit_once('.').unwrap_or((ours, ""));
    match layer {
        "norm" => return own(format!("final_layer_norm.{end}")),
        "head" => return vec![format!("{head}.{end}")],
        _ => {}
    }
    let block = layer.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
    let Some((i, layer)) = block else { return own(ours.into()) };
    let at = |name: &str| format!("{prefix}{}.{i}.{name}.{end}", TOWER.layers);
    if layer == "attn.qkv" {
        return TOWER.qkv.iter().map(|name| at(name)).collect();
    }
    let theirs = TOWER.block.iter().find(|(ours, _)| *ours == layer).map_or(layer, |(_, theirs)| theirs);
    vec![at(theirs)]
}
