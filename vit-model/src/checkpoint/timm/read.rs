//! Reads timm's config.json as a [`ModelInfo`]: the architecture's name, and what `model_args` overrides.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};

use crate::{
    Activation, BlockKind, Config, MlpKind, ModelInfo, NormKind, Origin, Pool, PreprocessConfig, RelPosBias, Rope,
    RopeKind,
    checkpoint::class_names::{Named, by_number},
    checkpoint::resized::{grid_of_biases, note, replaced, square_grid, with_positions},
    imagenet::{self, Subset, is_synset},
    names::{self, Architecture, Class},
    vit::pos_embed::{Resample, resample},
    weights::{Weights, candle_dtype},
};

/// Arguments that have no effect at inference.
const TRAINING: [&str; 16] = [
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
    "head_init_scale",
    "rope_shift_coords",
    "rope_jitter_coords",
    "rope_rescale_coords",
];

/// Parts of the names of architectures whose entry point sets the image size itself and ignores `pretrained_cfg`.
const OWN_SIZE: [&str; 8] = [
    "_radio_",
    "beit3_giant_patch14_336",
    "eva02_",
    "_sapiens2",
    "_rope_reg",
    "beit_base_patch16_384",
    "beit_large_patch16_384",
    "beit_large_patch16_512",
];

/// Arguments of `Eva` that are read before the others, because the others change what they switch on.
const FIRST: [&str; 4] = ["use_rot_pos_emb", "qkv_bias", "depth", "num_heads"];

/// Whether a config.json is timm's: one without transformers' `model_type`, or of a timm model that transformers' Trainer
/// saved.
pub(in crate::checkpoint) fn describes(config: &Value) -> bool {
    match config.get("model_type") {
        None => true,
        Some(kind) => kind == "timm_wrapper",
    }
}

/// Reads timm's config.json, as in its Hub repositories and `local-dir:` folders.
///
/// # Errors
/// The key that cannot be used, and why.
pub(in crate::checkpoint) fn info(config: &Value) -> Result<ModelInfo, String> {
    let name = text(config, "architecture")?.ok_or("has no `architecture`")?;
    let Some(mut architecture) = Architecture::of(name) else {
        let why = match names::nearest(name) {
            Some(near) => format!("did you mean {near}?"),
            None => "only timm's vision_transformer.py, deit.py, eva.py and beit.py are".into(),
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
    // `use_rot_pos_emb` and the kind of attention decide what the others change
    let (first, others): (Vec<_>, Vec<_>) = args.iter().partition(|(key, _)| FIRST.contains(&key.as_str()));
    for (key, value) in first.into_iter().chain(others) {
        set(&mut architecture, key, value).map_err(|why| format!("`model_args.{key}` {why}"))?;
    }
    let architecture = architecture.derive();
    if let Class::Eva(eva) = architecture.class
        && architecture.config.fc_norm
        && eva.post_norm == Some(true)
    {
        return Err("`model_args` sets a norm before and one after the pooling, which is not supported".into());
    }
    let mut model = architecture.config;
    if model.kv_heads.iter().all(|heads| *heads == model.num_heads) && model.kv_heads.len() == model.depth {
        model.kv_heads = Vec::new();
    }
    model.validate().map_err(|error| error.to_string())?;
    let preprocess = PreprocessConfig::from_timm(config, &model).map_err(|error| error.to_string())?;
    let (labels, note) = labels(config, &model)?;
    let source = Origin::new().with_producer("timm").with_architecture(name);
    let ignored = ignored_pool(config, model.global_pool)?;
    let info = ModelInfo::new(model, preprocess).with_labels(labels).from_source(source);
    let info = ignored.into_iter().fold(info, ModelInfo::assuming);
    Ok(match note {
        Some(note) => info.assuming(note),
        None => info,
    })
}

/// What is said of a `global_pool` beside the architecture: timm writes it, but builds the model from the architecture and
/// `model_args` alone.
fn ignored_pool(config: &Value, built: Pool) -> Result<Option<String>, String> {
    let Some(written) = text(config, "global_pool")? else { return Ok(None) };
    let differs = pool(written)? != built;
    Ok(differs.then(|| {
        format!(
            "global_pool: that of the architecture and `model_args`; timm ignores {written:?} at the top of config.json"
        )
    }))
}

/// Architectures that accept images of any size, because they resample their position embeddings for each
/// (`dynamic_img_size`).
const DYNAMIC: [&str; 4] = ["test_vit", "test_vit2", "test_vit4", "vit_intern300m_patch14_448"];
/// The image size that timm builds a model for if nothing sets another.
const DEFAULT_SIZE: usize = 224;

/// The weights as timm uses them. timm builds a model of dynamic size for 224 pixels if its configuration does not fix a size.
/// It resamples the position embeddings to that grid when it loads them, and from that grid to each image's.
pub(in crate::checkpoint) fn loaded(
    weights: Arc<dyn Weights>,
    config: &Value,
    info: &mut ModelInfo,
) -> crate::Result<Arc<dyn Weights>> {
    let model = &info.model;
    // a table of another size is resampled when timm loads it, from the square that its length says
    if model.pos_embed
        && let Some(found) = weights.tensors().get("pos_embed")
        && let &[1, tokens, width] = found.shape.as_slice()
        && width == model.embed_dim
        && tokens != model.pos_embed_len()
        && let Some(from) = square_grid(tokens, model.pos_embed_prefix())
    {
        let weights = with_positions(weights, from, model, Resample::of(info))?;
        *info = info.clone().assuming(note(from, &info.model));
        return Ok(weights);
    }
    if let Some(from) = grid_of_biases(weights.as_ref(), model) {
        let weights = with_positions(weights, from, model, Resample::of(info))?;
        *info = info.clone().assuming(note(from, &info.model));
        return Ok(weights);
    }
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
    // if the table is missing or has another shape, `Checkpoint::new` reports it when it checks all names and shapes
    let expected = [1, model.pos_embed_len(), model.embed_dim];
    let Some(stored) = weights.tensors().get("pos_embed").filter(|stored| stored.shape == expected) else {
        return Ok(weights);
    };
    let (here, there, prefix) = (model.grid(), built.grid(), model.pos_embed_prefix());
    let bytes = weights.read("pos_embed")?;
    let table = Tensor::from_raw_buffer(&bytes, candle_dtype(stored.dtype), &expected, &Device::Cpu)?;
    let table = resample(&table, prefix, here, there, Resample::Bicubic)?; // rounded to the stored type, as timm does
    let table = resample(&table.to_dtype(DType::F32)?, prefix, there, here, Resample::Bicubic)?;
    replaced(weights, &table)
}

/// Applies one argument of the architecture's class.
fn set(architecture: &mut Architecture, key: &str, value: &Value) -> Result<(), String> {
    match architecture.class {
        Class::Vit => set_vit(architecture, key, value),
        Class::Eva(_) | Class::Beit { .. } => set_eva(architecture, key, value),
    }
}

/// Applies one argument of timm's `Eva` or `Beit`.
fn set_eva(architecture: &mut Architecture, key: &str, value: &Value) -> Result<(), String> {
    let Architecture { config: c, class, .. } = architecture;
    let flag = || value.as_bool().ok_or_else(|| format!("must be true or false, found {value}"));
    let number = || size(value, key).map_err(|_| format!("must be a whole number, found {value}"));
    let real = || value.as_f64().ok_or_else(|| format!("must be a number, found {value}"));
    let name = || value.as_str().ok_or_else(|| format!("must be a name, found {value}"));
    let optional = || if value.is_null() { Ok(None) } else { flag().map(Some) };
    // switched on without a kind, rotary positions are those of timm's default arguments
    let rope = c.rope.unwrap_or_else(|| Rope::new(RopeKind::Axial, 10000.0));
    let mut with_rope = |change: &mut dyn FnMut(&mut Rope)| c.rope.iter_mut().for_each(change);
    match (key, class) {
        ("rope_type", Class::Eva(_)) => {
            let kind = match name()? {
                "cat" => RopeKind::Axial,
                "dinov3" => RopeKind::Centred,
                "mixed" => RopeKind::Mixed,
                other => return Err(format!("{other:?} is not supported")),
            };
            with_rope(&mut |rope| rope.kind = kind);
        }
        ("rope_temperature", Class::Eva(_)) => {
            let temperature = real()?;
            with_rope(&mut |rope| rope.temperature = temperature);
        }
        ("rope_grid_offset", Class::Eva(_)) => {
            let offset = real()?;
            with_rope(&mut |rope| rope.grid_offset = offset);
        }
        ("rope_grid_indexing", Class::Eva(_)) => {
            let column_first = match name()? {
                "ij" => false,
                "xy" => true,
                other => return Err(format!("{other:?} is not supported")),
            };
            with_rope(&mut |rope| rope.column_first = column_first);
        }
        ("rope_rotate_half", Class::Eva(_)) => {
            let half = flag()?;
            with_rope(&mut |rope| rope.rotate_half = half);
        }
        ("ref_feat_shape", Class::Eva(_)) => {
            let grid = if value.is_null() { None } else { Some(pair(value)?) };
            with_rope(&mut |rope| rope.ref_grid = grid);
        }
        ("use_rot_pos_emb", Class::Eva(_)) => c.rope = flag()?.then_some(rope),
        ("use_abs_pos_emb", _) => c.pos_embed = flag()?,
        ("use_fc_norm", _) => architecture.fc_norm = optional()?,
        ("use_post_transformer_norm", Class::Eva(eva)) => eva.post_norm = optional()?,
        ("use_pre_transformer_norm", Class::Eva(_)) => c.pre_norm = flag()?,
        ("use_post_norm", Class::Eva(_)) => c.block = if flag()? { BlockKind::ResPost } else { BlockKind::Standard },
        ("swiglu_mlp", Class::Eva(eva)) => eva.swiglu = flag()?,
        ("swiglu_mlp", Class::Beit { swiglu }) => *swiglu = flag()?,
        ("swiglu_align_to", Class::Eva(eva)) => eva.align = number()?.min(1 << 20),
        ("scale_mlp", _) => c.scale_mlp_norm = flag()?,
        ("scale_attn_inner", Class::Eva(_)) => c.scale_attn_norm = flag()?,
        ("num_reg_tokens", Class::Eva(_)) => c.reg_tokens = number()?,
        ("attn_type", Class::Eva(_)) => {
            c.no_k_bias = match name()? {
                "eva" => c.qkv_bias,
                "rope" => false,
                other => return Err(format!("{other:?} is not supported")),
            }
        }
        ("qkv_fused", Class::Eva(_)) => c.split_qkv = !flag()?,
        ("qkv_bias", _) => {
            // EvaAttention and BEiT's attention have no bias of k; AttentionRope, which has one, is a class that the name brings
            let attention_rope = c.qkv_bias && !c.no_k_bias;
            c.qkv_bias = flag()?;
            c.no_k_bias = c.qkv_bias && !attention_rope;
        }
        ("num_kv_heads", Class::Eva(_)) => {
            c.kv_heads = match value {
                Value::Null => Vec::new(),
                Value::Number(_) => vec![number()?; c.depth.min(1024)],
                _ => sizes(value, key)?,
            }
        }
        ("attn_only_layer_scale", Class::Eva(_)) => c.attn_only_scale = flag()?,
        ("attn_pool_num_heads", Class::Eva(eva)) => {
            let ratio = eva.pool.map_or(architecture.mlp_ratio, |(_, ratio)| ratio);
            eva.pool = if value.is_null() { None } else { Some((number()?, ratio)) };
        }
        ("attn_pool_mlp_ratio", Class::Eva(eva)) => {
            let heads = eva.pool.map_or(c.num_heads, |(heads, _)| heads);
            eva.pool = if value.is_null() { None } else { Some((heads, real()?)) };
        }
        ("use_rel_pos_bias", Class::Beit { .. }) => {
            c.rel_pos_bias = match (flag()?, c.rel_pos_bias) {
                (true, _) => RelPosBias::Blocks,
                (false, RelPosBias::Blocks) => RelPosBias::None,
                (false, other) => other,
            }
        }
        ("use_shared_rel_pos_bias", Class::Beit { .. }) => {
            c.rel_pos_bias = match (flag()?, c.rel_pos_bias) {
                (true, _) => RelPosBias::Shared,
                (false, RelPosBias::Shared) => RelPosBias::None,
                (false, other) => other,
            }
        }
        // the same in every class
        (
            "img_size" | "patch_size" | "in_chans" | "num_classes" | "embed_dim" | "depth" | "num_heads" | "mlp_ratio"
            | "global_pool" | "qk_norm" | "class_token" | "no_embed_class" | "init_values" | "norm_layer"
            | "dynamic_img_size" | "dynamic_img_pad",
            _,
        ) => return set_vit(architecture, key, value),
        _ if TRAINING.contains(&key) || value.is_null() => {}
        _ => return Err(format!("is not known (value {value})")),
    }
    Ok(())
}

/// Applies one argument of timm's `VisionTransformer`.
fn set_vit(architecture: &mut Architecture, key: &str, value: &Value) -> Result<(), String> {
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
        // null and "" are timm's own defaults, not those of the architecture
        "act_layer" if value.is_null() || *value == "" => c.act = Activation::Gelu,
        "act_layer" => c.act = activation(name()?)?,
        "norm_layer" => {
            c.norm = if value.is_null() { NormKind::LayerNorm } else { norm(name()?)? };
            // the architecture's own ε belongs to the norm that this one replaces
            c.ln_eps = NORM_EPS;
        }
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
        // these only say what timm does with an input of another size; this project can set any size
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

/// ε of timm's LayerNorm and RMSNorm if nothing else sets one.
const NORM_EPS: f64 = 1e-6;

fn norm(name: &str) -> Result<NormKind, String> {
    // as timm looks them up
    Ok(match name.replace('_', "").to_lowercase().as_str() {
        "" | "layernorm" => NormKind::LayerNorm,
        "rmsnorm" => NormKind::RmsNorm,
        _ => return Err(format!("{name:?} is not supported")),
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

fn labels(config: &Value, model: &Config) -> Result<Named, String> {
    if model.num_classes == 0 {
        return Ok((None, None));
    }
    // the Trainer of transformers writes its own key
    let key = if config.get("label_names").is_some_and(|names| !names.is_null()) { "label_names" } else { "id2label" };
    let (list, note) = by_number(key, config.get(key), model.num_classes).map_err(|e| e.to_string())?;
    let Some(list) = list else { return Ok(by_tag(config, model.num_classes)) };
    if let (None, Some(words)) = (config.get("label_descriptions"), imagenet::words(&list)) {
        return Ok((Some(words), note));
    }
    // in some repositories, ImageNet's labels are synset numbers, and `label_descriptions` has the words
    let words = config.get("label_descriptions").and_then(Value::as_object);
    let word = |name: String| match words.and_then(|words| words.get(&name)?.as_str()) {
        Some(word) if is_synset(&name) => word.split(',').next().unwrap_or(word).trim().to_owned(),
        _ => name,
    };
    Ok((Some(list.into_iter().map(word).collect()), note))
}

/// The class names of the subset of ImageNet that timm's tag names, as most of timm's own repositories name no classes.
fn by_tag(config: &Value, classes: usize) -> Named {
    // old repositories have the keys of `pretrained_cfg` beside the others
    let cfg = config.get("pretrained_cfg").filter(|cfg| cfg.is_object()).unwrap_or(config);
    let tag = cfg.get("tag").and_then(Value::as_str);
    match tag.and_then(|tag| Some((tag, Subset::of_tag(tag, classes)?))) {
        Some((tag, subset)) => {
            let note = format!(
                "labels: the configuration names no classes; those of {} are used, which the tag `{tag}` names",
                subset.name
            );
            (Some(subset.labels()), Some(note))
        }
        None => (None, None),
    }
}

fn text<'a>(config: &'a Value, key: &str) -> Result<Option<&'a str>, String> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(format!("`{key}` must be a name, found {other}")),
    }
}

/// Reads a whole number of at most 32 bits.
pub(in crate::checkpoint) fn size(value: &Value, key: &str) -> Result<usize, String> {
    let number = value.as_u64().and_then(|n| u32::try_from(n).ok()).and_then(|n| usize::try_from(n).ok());
    number.ok_or_else(|| format!("`{key}` must be a whole number, found {value}"))
}

fn sizes(value: &Value, key: &str) -> Result<Vec<usize>, String> {
    let list = value.as_array().ok_or_else(|| format!("`{key}` must be a list of whole numbers, found {value}"))?;
    list.iter().map(|n| size(n, key)).collect()
}

/// Reads `[height, width]`, or one number for both.
pub(in crate::checkpoint) fn pair(value: &Value) -> Result<[usize; 2], String> {
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
