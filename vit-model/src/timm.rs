//! timm's config.json → [`ModelInfo`]: the architecture's name, and what `model_args` overrides.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};

use crate::{
    Activation, Config, MlpKind, ModelInfo, NormKind, Pool, PreprocessConfig,
    names::{self, Architecture},
    pos_embed::{Resample, resample},
    weights::{Dtype, ReadAt, TensorInfo, Weights, candle_dtype, whole},
};

/// Arguments that change nothing once a model is trained.
const TRAINING: [&str; 12] = [
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "weight_init",
    "fix_init",
    "strict_img_size",
    "drop_block_rate",
    "pretrained",
    "features_only",
];

/// Names whose entry point sets the image size itself, whatever `pretrained_cfg` says.
const OWN_SIZE: [&str; 2] = ["_radio_", "beit3_giant_patch14_336"];

/// Reads timm's config.json, as its Hub repositories and `local-dir:` folders have it.
///
/// # Errors
/// What cannot be understood, with the key.
pub(crate) fn info(config: &Value) -> Result<ModelInfo, String> {
    let name = text(config, "architecture")?.ok_or("has no `architecture`")?;
    let Some(mut architecture) = Architecture::of(name) else {
        let why = match names::nearest(name) {
            Some(near) => format!("did you mean {near}?"),
            None => "only timm's vision_transformer.py and deit.py are".into(),
        };
        return Err(format!("`architecture` {name:?} is not known; {why}"));
    };
    let cfg = config.get("pretrained_cfg").filter(|cfg| cfg.is_object()).unwrap_or(config);
    let empty = Map::new();
    let args = match config.get("model_args") {
        None | Some(Value::Null) => &empty,
        Some(Value::Object(args)) => args,
        Some(other) => return Err(format!("`model_args` must be an object, found {other}")),
    };
    let c = &mut architecture.config;
    if let Some(size) = cfg.get("input_size").filter(|size| !size.is_null()) {
        let &[channels, h, w] = sizes(size, "input_size")?.as_slice() else {
            return Err(format!("`input_size` must be [channels, height, width], found {size}"));
        };
        c.in_chans = channels;
        if !OWN_SIZE.iter().any(|own| name.contains(own)) {
            c.img_size = [h, w];
        }
    }
    for source in [cfg, config] {
        if let Some(classes) = source.get("num_classes").filter(|n| !n.is_null()) {
            c.num_classes = size(classes, "num_classes")?;
        }
    }
    if let Some(pool) = text(config, "global_pool")? {
        c.global_pool = self::pool(pool)?;
    }
    for (key, value) in args {
        set(&mut architecture, key, value).map_err(|why| format!("`model_args.{key}` {why}"))?;
    }
    let model = architecture.derive().config;
    model.validate().map_err(|error| error.to_string())?;
    let preprocess = PreprocessConfig::from_timm(config, &model).map_err(|error| error.to_string())?;
    Ok(ModelInfo {
        vit: 1,
        labels: labels(config, &model)?,
        model,
        preprocess,
        source: [("producer".into(), "timm".into()), ("architecture".into(), name.into())].into(),
        verified: None,
    })
}

/// Architectures that read images of any size, resampling their position embeddings for each (`dynamic_img_size`).
const DYNAMIC: [&str; 4] = ["test_vit", "test_vit2", "test_vit4", "vit_intern300m_patch14_448"];
/// The image size that timm builds a model for where nothing says another.
const DEFAULT_SIZE: usize = 224;

/// The weights as timm sees them. A model of dynamic size whose configuration fixes no size is built for 224 pixels: the
/// position embeddings are resampled to that grid when they are loaded, and from there to each image's.
pub(crate) fn loaded(weights: Arc<dyn Weights>, config: &Value, model: &Config) -> crate::Result<Arc<dyn Weights>> {
    let args = config.get("model_args");
    let cfg = config.get("pretrained_cfg").unwrap_or(config);
    let is_true = |value: Option<&Value>| value.and_then(Value::as_bool) == Some(true);
    let name = config.get("architecture").and_then(Value::as_str).unwrap_or_default();
    let dynamic = match args.and_then(|args| args.get("dynamic_img_size")) {
        Some(dynamic) => dynamic == &Value::Bool(true),
        None => DYNAMIC.contains(&name.split('.').next().unwrap_or_default()),
    };
    let sized = args.is_some_and(|args| args.get("img_size").is_some_and(|size| !size.is_null()));
    let built = Config { img_size: [DEFAULT_SIZE; 2], ..model.clone() };
    if !dynamic || sized || is_true(cfg.get("fixed_input_size")) || built.grid() == model.grid() || !model.pos_embed {
        return Ok(weights);
    }
    built.validate()?;
    // where the table is missing or of another shape, the check of all names and shapes says so
    let expected = [1, model.pos_embed_len(), model.embed_dim];
    let Some(info) = weights.tensors().get("pos_embed").filter(|info| info.shape == expected) else {
        return Ok(weights);
    };
    let (here, there, prefix) = (model.grid(), built.grid(), model.pos_embed_prefix());
    let bytes = weights.read("pos_embed")?;
    let table = Tensor::from_raw_buffer(&bytes, candle_dtype(info.dtype), &expected, &Device::Cpu)?;
    let table = resample(&table, prefix, here, there, Resample::Bicubic)?; // rounded to the stored type, as timm does
    let table = resample(&table.to_dtype(DType::F32)?, prefix, there, here, Resample::Bicubic)?;
    let mut tensors = weights.tensors().clone();
    tensors.insert("pos_embed".into(), TensorInfo { dtype: Dtype::F32, shape: expected.to_vec() });
    let pos_embed = table.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect();
    Ok(Arc::new(Detour { weights, tensors, pos_embed }))
}

/// Weights with other position embeddings.
struct Detour {
    weights: Arc<dyn Weights>,
    tensors: BTreeMap<String, TensorInfo>,
    pos_embed: Vec<u8>,
}

impl Weights for Detour {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> crate::Result<Vec<u8>> {
        if name == "pos_embed" { Ok(self.pos_embed.clone()) } else { self.weights.read(name) }
    }

    fn stretches(&self, name: &str) -> crate::Result<ReadAt<'_>> {
        if name == "pos_embed" { Ok(whole(name, self.pos_embed.clone())) } else { self.weights.stretches(name) }
    }
}

/// One argument of timm's `VisionTransformer`.
fn set(architecture: &mut Architecture, key: &str, value: &Value) -> Result<(), String> {
    let c = &mut architecture.config;
    let flag = || value.as_bool().ok_or_else(|| format!("must be true or false, found {value}"));
    let number = || size(value, key).map_err(|_| format!("must be a whole number, found {value}"));
    let name = || value.as_str().ok_or_else(|| format!("must be a name, found {value}"));
    match key {
        "img_size" => c.img_size = pair(value)?,
        "patch_size" => c.patch_size = pair(value)?,
        "in_chans" => c.in_chans = number()?,
        "num_classes" => c.num_classes = number()?,
        "embed_dim" => c.embed_dim = number()?,
        "depth" => c.depth = number()?,
        "num_heads" => c.num_heads = number()?,
        "reg_tokens" => c.reg_tokens = number()?,
        "mlp_ratio" => {
            let ratio = value.as_f64().filter(|ratio| *ratio > 0.0 && *ratio < 1024.0);
            architecture.mlp_ratio = ratio.ok_or_else(|| format!("must be a positive number, found {value}"))?;
        }
        "global_pool" => c.global_pool = pool(name()?)?,
        "qkv_bias" => c.qkv_bias = flag()?,
        "proj_bias" => c.proj_bias = flag()?,
        "qk_norm" => c.qk_norm = flag()?,
        "scale_attn_norm" => c.scale_attn_norm = flag()?,
        "scale_mlp_norm" => c.scale_mlp_norm = flag()?,
        "class_token" => c.class_token = flag()?,
        "no_embed_class" => c.no_embed_class = flag()?,
        "pool_include_prefix" => c.pool_include_prefix = flag()?,
        "pre_norm" => c.pre_norm = flag()?,
        "final_norm" => c.final_norm = flag()?,
        "fc_norm" => architecture.fc_norm = if value.is_null() { None } else { Some(flag()?) },
        "init_values" => c.layer_scale = !value.is_null(),
        "pos_embed" => {
            c.pos_embed = match name()? {
                "learn" | "" => true,
                "none" => false,
                other => return Err(format!("{other:?} is not supported")),
            }
        }
        "act_layer" => c.act = activation(name()?)?,
        "norm_layer" => c.norm = norm(name()?)?,
        "attn_layer" => {
            c.diff_attn = match name()? {
                "" => false,
                "diff" => true,
                other => return Err(format!("{other:?} is not supported")),
            }
        }
        "mlp_layer" => {
            c.mlp = match name()? {
                "mlp" => MlpKind::Mlp,
                "swiglu" => MlpKind::Swiglu,
                "swiglupacked" => MlpKind::SwigluPacked,
                other => return Err(format!("{other:?} is not supported")),
            }
        }
        // how an input of another size is met: here every size may be set
        "dynamic_img_size" | "dynamic_img_pad" => drop(flag()?),
        _ if TRAINING.contains(&key) || value.is_null() => {}
        _ => return Err(format!("is not known (value {value})")),
    }
    Ok(())
}

fn activation(name: &str) -> Result<Activation, String> {
    Ok(match name {
        "gelu" => Activation::Gelu,
        "gelu_tanh" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "quick_gelu" => Activation::QuickGelu,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        other => return Err(format!("{other:?} is not supported")),
    })
}

fn norm(name: &str) -> Result<NormKind, String> {
    Ok(match name {
        "layernorm" => NormKind::LayerNorm,
        "rmsnorm" => NormKind::RmsNorm,
        other => return Err(format!("{other:?} is not supported")),
    })
}

fn pool(name: &str) -> Result<Pool, String> {
    Ok(match name {
        "" => Pool::None,
        "token" => Pool::Token,
        "avg" => Pool::Avg,
        "max" => Pool::Max,
        "avgmax" => Pool::Avgmax,
        "map" => Pool::Map,
        other => return Err(format!("`global_pool` {other:?} is not known")),
    })
}

fn labels(config: &Value, model: &Config) -> Result<Option<Vec<String>>, String> {
    let names = match config.get("label_names") {
        None | Some(Value::Null) => return Ok(None),
        Some(names) => names,
    };
    let list = names.as_array().and_then(|list| list.iter().map(|n| n.as_str().map(str::to_owned)).collect());
    let list: Vec<String> = list.ok_or_else(|| format!("`label_names` must be a list of names, found {names}"))?;
    if list.len() != model.num_classes {
        return Err(format!("`label_names` has {} names, the model {} classes", list.len(), model.num_classes));
    }
    // ImageNet's names are synset numbers in some repositories, with the words beside them
    let words = config.get("label_descriptions").and_then(Value::as_object);
    let word = |name: String| match words.and_then(|words| words.get(&name)?.as_str()) {
        Some(word) if is_synset(&name) => word.split(',').next().unwrap_or(word).trim().to_owned(),
        _ => name,
    };
    Ok(Some(list.into_iter().map(word).collect()))
}

/// `n01440764`
fn is_synset(name: &str) -> bool {
    name.len() == 9 && name.strip_prefix('n').is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
}

fn text<'a>(config: &'a Value, key: &str) -> Result<Option<&'a str>, String> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(format!("`{key}` must be a name, found {other}")),
    }
}

/// A whole number of at most 32 bits.
pub(crate) fn size(value: &Value, key: &str) -> Result<usize, String> {
    let number = value.as_u64().and_then(|n| u32::try_from(n).ok()).and_then(|n| usize::try_from(n).ok());
    number.ok_or_else(|| format!("`{key}` must be a whole number, found {value}"))
}

fn sizes(value: &Value, key: &str) -> Result<Vec<usize>, String> {
    let list = value.as_array().ok_or_else(|| format!("`{key}` must be a list of whole numbers, found {value}"))?;
    list.iter().map(|n| size(n, key)).collect()
}

/// One number for height and width, or both.
pub(crate) fn pair(value: &Value) -> Result<[usize; 2], String> {
    if value.is_u64() {
        let side = size(value, "size")?;
        return Ok([side, side]);
    }
    match *sizes(value, "size")?.as_slice() {
        [side] => Ok([side, side]),
        [h, w] => Ok([h, w]),
        _ => Err(format!("must be a size or [height, width], found {value}")),
    }
}
