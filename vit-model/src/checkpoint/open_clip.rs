//! Reads `open_clip_config.json`, and the state dict of OpenAI's CLIP, as a [`ModelInfo`] of the vision tower.

use serde_json::Value;

use super::{
    stored::Stored,
    timm::{pair, size},
};
use crate::{
    Activation, Config, CropMode, Error, Interpolation, ModelInfo, Origin, Pool, PreprocessConfig, Result,
    names::Architecture,
};

/// The mean and standard deviation of OpenAI's CLIP, which are open_clip's defaults.
const MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

/// Switches of open_clip's tower that change it into something else than timm's CLIP models.
const OTHERS: [&str; 7] =
    ["attentional_pool", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"];

/// What `open_clip_config.json` describes. `stored` says what only the tensors say: whether there is a projection.
///
/// # Errors
/// The key that cannot be used, and why.
pub(super) fn info(document: &Value, stored: Option<&Stored>) -> Result<ModelInfo> {
    let fail = |why: String| Error::config(why);
    let get = |value: &'_ Value, key: &str| value.get(key).filter(|value| !value.is_null()).cloned();
    let config = get(document, "model_cfg").ok_or_else(|| fail("has no `model_cfg`".into()))?;
    let tower = get(&config, "vision_cfg").ok_or_else(|| fail("has no `model_cfg.vision_cfg`".into()))?;
    let number = |from: &Value, key: &str, default: usize| match get(from, key) {
        Some(value) => size(&value, key).map_err(fail),
        None => Ok(default),
    };
    let embed_dim = number(&config, "embed_dim", 0)?;
    let flag = |from: &Value, key: &str| match get(from, key) {
        None => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| fail(format!("`{key}` must be true or false, found {value}"))),
    };
    let text = |key: &str, default: &str| match get(&tower, key) {
        None => Ok(default.to_owned()),
        Some(Value::String(text)) => Ok(text),
        Some(value) => Err(fail(format!("`{key}` must be a name, found {value}"))),
    };
    let image = get(&tower, "image_size").map_or(Ok([224, 224]), |value| pair(&value)).map_err(fail)?;
    let unsupported = |what: String| Err(Error::unsupported(format!("`vision_cfg.{what}`")));
    let name = text("timm_model_name", "")?;
    let model = if name.is_empty() {
        if get(&tower, "layers").is_some_and(|layers| layers.is_array()) {
            return unsupported(
                "layers` is a list: the tower is a ResNet, and only Vision Transformers are read; `".into(),
            );
        }
        for key in OTHERS {
            if get(&tower, key).is_some_and(|value| value != Value::Bool(false)) {
                return unsupported(key.into());
            }
        }
        if let Some(kind) = get(&tower, "block_type").filter(|kind| kind != "default") {
            return unsupported(format!("block_type` {kind}: `"));
        }
        let (width, head) = (number(&tower, "width", 768)?, number(&tower, "head_width", 64)?);
        let depth = number(&tower, "layers", 12)?;
        let patch = get(&tower, "patch_size").map_or(Ok([16, 16]), |value| pair(&value)).map_err(fail)?;
        let heads = width.checked_div(head).unwrap_or(0);
        let ratio = get(&tower, "mlp_ratio").map_or(Ok(4.0), |value| {
            let good = value.as_f64().filter(|ratio| *ratio > 0.0 && *ratio < 1024.0);
            good.ok_or_else(|| fail(format!("`mlp_ratio` must be a positive number, found {value}")))
        })?;
        let last = flag(&tower, "final_ln_after_pool")?;
        #[allow(clippy::as_conversions)] // rounded down, as Python's `int` does; `validate` bounds it
        let hidden = (width as f64 * ratio) as usize;
        let mut model = Config {
            mlp_hidden: hidden,
            ln_eps: epsilon(&tower)?,
            act: activation(&config, &tower)?,
            patch_bias: false,
            pre_norm: !flag(&tower, "no_ln_pre")?,
            layer_scale: get(&tower, "ls_init_value").is_some(),
            num_classes: embed_dim,
            head_bias: false,
            ..Config::vit(image, patch, width, depth, heads)
        };
        model.global_pool = match text("pool_type", "tok")?.as_str() {
            "tok" => Pool::Token,
            "avg" => Pool::Avg,
            "none" => Pool::None,
            other => return unsupported(format!("pool_type` {other:?}: `")),
        };
        model.fc_norm = last && model.global_pool == Pool::Avg;
        if model.global_pool == Pool::None && last {
            return unsupported("final_ln_after_pool".into());
        }
        model
    } else {
        trunk(&name, &tower, embed_dim, stored, &text)?
    };
    model.validate()?;
    let preprocess = preprocess(document.get("preprocess_cfg").unwrap_or(&Value::Null), &model)?;
    let architecture = if name.is_empty() { "CLIP" } else { name.as_str() };
    let source = Origin::new().with_producer("open_clip").with_architecture(architecture);
    let projects = model.num_classes > 0;
    Ok(ModelInfo::new(model, preprocess).from_source(source).with_projection(projects))
}

/// A tower of timm's, which open_clip builds with the name's own size.
fn trunk(
    name: &str,
    tower: &Value,
    embed_dim: usize,
    stored: Option<&Stored>,
    text: &dyn Fn(&str, &str) -> Result<String>,
) -> Result<Config> {
    let Some(architecture) = Architecture::of(name) else {
        return Err(Error::unsupported(format!(
            "`timm_model_name` {name:?}: only timm's vision_transformer.py and deit.py are"
        )));
    };
    let mut model = architecture.config;
    let projection = text("timm_proj", "linear")?;
    model.global_pool = match text("timm_pool", "avg")?.as_str() {
        // an empty pool leaves the network's own, if a projection follows
        "" if matches!(projection.as_str(), "linear" | "mlp") => model.global_pool,
        "" => Pool::None,
        "token" | "tok" => Pool::Token,
        "avg" => Pool::Avg,
        "map" => Pool::Map,
        "max" => Pool::Max,
        "avgmax" => Pool::Avgmax,
        other => return Err(Error::unsupported(format!("`timm_pool` {other:?}"))),
    };
    model.num_classes = match projection.as_str() {
        "none" => 0,
        "linear" | "" => embed_dim,
        other => return Err(Error::unsupported(format!("`timm_proj` {other:?}"))),
    };
    let has_bias = || {
        let tensors = stored.map(|stored| stored.weights.tensors());
        tensors.is_some_and(|all| all.contains_key("visual.head.proj.bias"))
    };
    model.head_bias =
        projection.is_empty() || tower.get("timm_proj_bias").and_then(Value::as_bool) == Some(true) || has_bias();
    Ok(model)
}

/// ε of the norms.
fn epsilon(tower: &Value) -> Result<f64> {
    let Some(kwargs) = tower.get("norm_kwargs").filter(|kwargs| !kwargs.is_null()) else { return Ok(1e-5) };
    let known = kwargs.as_object().is_some_and(|kwargs| kwargs.keys().all(|key| key == "eps"));
    let eps = if known { kwargs.get("eps").map_or(Some(1e-5), Value::as_f64) } else { None };
    eps.ok_or_else(|| Error::unsupported(format!("`vision_cfg.norm_kwargs` {kwargs}")))
}

fn activation(config: &Value, tower: &Value) -> Result<Activation> {
    let quick = config.get("quick_gelu").and_then(Value::as_bool) == Some(true);
    let kwargs = tower.get("act_kwargs").filter(|kwargs| !kwargs.is_null());
    let tanh = kwargs.and_then(|kwargs| kwargs.get("approximate")).and_then(Value::as_str);
    match (quick, kwargs.and_then(Value::as_object), tanh) {
        (true, None, _) => Ok(Activation::QuickGelu),
        (false, None, _) => Ok(Activation::Gelu),
        (false, Some(map), Some("none")) if map.len() == 1 => Ok(Activation::Gelu),
        (false, Some(map), Some("tanh")) if map.len() == 1 => Ok(Activation::GeluTanh),
        _ => Err(Error::unsupported(format!("`vision_cfg.act_kwargs` {}", kwargs.unwrap_or(&Value::Null)))),
    }
}

/// open_clip resizes with Pillow, as timm does.
fn preprocess(config: &Value, model: &Config) -> Result<PreprocessConfig> {
    let fail = |key: &str, value: &Value| Err(Error::config(format!("`preprocess_cfg.{key}` cannot be {value}")));
    let get = |key: &str| config.get(key).filter(|value| !value.is_null());
    let numbers = |key: &str, default: [f64; 3]| match get(key) {
        None => Ok(default.to_vec()),
        Some(value) => match value.as_array().map(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<_>>>()) {
            Some(Some(list)) if list.len() == 3 => Ok(list),
            _ => fail(key, value).map(|()| Vec::new()),
        },
    };
    let interpolation = match get("interpolation") {
        None => Interpolation::Bicubic,
        Some(value) => match value.as_str() {
            Some("bicubic" | "random") => Interpolation::Bicubic,
            Some("bilinear") => Interpolation::Bilinear,
            _ => return fail("interpolation", value).map(|()| PreprocessConfig::for_config(model)),
        },
    };
    let crop_mode = match get("resize_mode") {
        None => CropMode::Center,
        Some(value) => match value.as_str() {
            Some("shortest") => CropMode::Center,
            Some("squash") => CropMode::Squash,
            _ => {
                return Err(Error::unsupported(format!(
                    "`preprocess_cfg.resize_mode` {value}: shortest and squash are read"
                )));
            }
        },
    };
    let config = PreprocessConfig {
        interpolation,
        crop_pct: 1.0,
        crop_mode,
        mean: numbers("mean", MEAN)?,
        std: numbers("std", STD)?,
        ..PreprocessConfig::for_config(model)
    };
    config.validate()?;
    Ok(config)
}

/// OpenAI's own models, as its loader reads them: every size is in the tensors, heads are 64 wide, and GELU is the quick one.
/// Only its files hold `input_resolution`, so others that have its names are not taken for its.
pub(super) fn openai(stored: &Stored) -> Result<ModelInfo> {
    let shape = |name: &str| stored.weights.tensors().get(name).map(|info| info.shape.as_slice());
    if !stored.others.iter().any(|name| name == "input_resolution") && !stored.script {
        return Err(Error::file(
            &stored.path,
            "has the tensor names of OpenAI's CLIP, but the number of heads and the kind of GELU are not in it: put its \
             open_clip_config.json beside it, or name one of timm's architectures with --arch, such as vit_base_patch16_clip_224",
        ));
    }
    let damaged =
        |name: &str| Error::tensor(name, "has not the shape that it has in OpenAI's CLIP").within(&stored.path);
    let Some(&[width, channels, ph, pw]) = shape("visual.conv1.weight") else {
        return Err(damaged("visual.conv1.weight"));
    };
    let Some(&[tokens, _]) = shape("visual.positional_embedding") else {
        return Err(damaged("visual.positional_embedding"));
    };
    let Some(&[_, classes]) = shape("visual.proj") else { return Err(damaged("visual.proj")) };
    let side = tokens.saturating_sub(1).isqrt();
    let block = |i: usize| format!("visual.transformer.resblocks.{i}.attn.in_proj_weight");
    let depth = (0..stored.weights.tensors().len()).take_while(|i| shape(&block(*i)).is_some()).count();
    let hidden = shape("visual.transformer.resblocks.0.mlp.c_fc.weight").and_then(|shape| shape.first()).copied();
    let model = Config {
        in_chans: channels,
        num_classes: classes,
        head_bias: false,
        mlp_hidden: hidden.unwrap_or(0),
        act: Activation::QuickGelu,
        ln_eps: 1e-5,
        patch_bias: false,
        pre_norm: true,
        ..Config::vit([side.saturating_mul(ph), side.saturating_mul(pw)], [ph, pw], width, depth, width / 64)
    };
    model.validate().map_err(|error| error.within(&stored.path))?;
    let preprocess = preprocess(&Value::Null, &model)?;
    let source = Origin::new().with_producer("openai").with_architecture("CLIP");
    Ok(ModelInfo::new(model, preprocess).from_source(source).with_projection(true))
}
