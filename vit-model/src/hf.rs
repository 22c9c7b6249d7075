//! transformers' config.json and tensor names → [`ModelInfo`] and timm's names.
//!
//! ViT, ViT-MAE, ViT-MSN, I-JEPA, DeiT, DINOv2 (with registers too), CLIP's and SigLIP's vision towers. Every tensor of
//! the file must have its place, but for those that a Vision Transformer's answers do not depend on ([`HARMLESS`]).

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    Activation, BlockKind, Config, Error, MlpKind, ModelInfo, NormKind, Pool, PreLogits, PreprocessConfig, Result,
    timm::{pair, size},
    weights::{Dtype, ReadAt, TensorInfo, Weights, whole, widen},
};

/// Tensors that may be left over, by the beginning of their name: mask tokens and decoders of pretraining, buffers, the
/// other tower of a two-tower model, and what scales the two towers' product.
const HARMLESS: [&str; 8] = [
    "text_model.",
    "text_projection.",
    "logit_scale",
    "logit_bias",
    "decoder.",
    "mask_token",
    "embeddings.mask_token",
    "embeddings.position_ids",
];

/// How a tensor of ours is made of tensors of the file.
#[derive(Clone, Debug)]
enum Recipe {
    /// As it is; another shape with as many elements is reshaped.
    Take(String),
    /// One below the other: q, k and v as one.
    Stack(Vec<String>),
    /// Rows of a tensor: from, count.
    Rows(String, usize, usize),
    /// The class token with its position added, where timm's positions cover the patches only.
    ClassPlusPosition { class: String, positions: String },
}

/// What each tensor of ours is made of.
#[derive(Debug, Default)]
pub(crate) struct Names {
    recipes: BTreeMap<String, Recipe>,
    /// Beginnings of names that may be left over, beside [`HARMLESS`].
    ignored: Vec<String>,
    /// Before the names of the tower.
    prefix: String,
}

/// The families, by how their tensors are called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Vit,
    Dinov2,
    Clip,
    Siglip,
}

/// Reads transformers' config.json (and preprocessor_config.json); with the file's tensors, also says where each of ours
/// is found. Without them, only preprocessing and sizes are right: a head is not known of.
pub(crate) fn info(
    config: &Value,
    processor: Option<&Value>,
    tensors: Option<&BTreeMap<String, TensorInfo>>,
) -> Result<(ModelInfo, Names)> {
    let fail = |why: String| Error::Config(why);
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let architecture = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).unwrap_or_default();
    let family = match model_type {
        "vit" | "vit_mae" | "vit_msn" | "ijepa" | "deit" => Family::Vit,
        "dinov2" | "dinov2_with_registers" => Family::Dinov2,
        "clip" | "clip_vision_model" => Family::Clip,
        "siglip" | "siglip_vision_model" => Family::Siglip,
        other => {
            let why = match other {
                "beit" | "data2vec-vision" => "it has relative position biases, which are not supported",
                "dinov3_vit" | "eva" | "eva02" => "it has rotary positions, which are not supported",
                "swin" | "swinv2" | "pvt" | "mobilevit" | "levit" | "cvt" => "it is no plain Vision Transformer",
                _ => "vit, vit_mae, vit_msn, ijepa, deit, dinov2, dinov2_with_registers, clip and siglip are read",
            };
            return Err(Error::Unsupported(format!("`model_type` {other:?}: {why}")));
        }
    };
    // two-tower models keep the vision tower's configuration apart
    let own = match config.get("vision_config").filter(|v| v.is_object()) {
        Some(tower) => tower,
        None => config,
    };
    let get = Getter(own);
    let dim = get.number("hidden_size", 768)?;
    let depth = get.number("num_hidden_layers", 12)?;
    let (eps, act, patch) = match family {
        Family::Vit => (1e-12, "gelu", 16),
        Family::Dinov2 => (1e-6, "gelu", if model_type == "dinov2" { 14 } else { 16 }),
        Family::Clip => (1e-5, "quick_gelu", 32),
        Family::Siglip => (1e-6, "gelu_pytorch_tanh", 16),
    };
    let swiglu = family == Family::Dinov2 && get.flag("use_swiglu_ffn", false)?;
    let mlp_hidden = match family {
        Family::Dinov2 => {
            let hidden = scaled(dim, get.real("mlp_ratio", 4.0)?);
            // as transformers rounds it: two thirds, up to a multiple of 8, then gate and value
            if swiglu { (hidden.saturating_mul(2) / 3).div_ceil(8).saturating_mul(16) } else { hidden }
        }
        _ => get.number("intermediate_size", 3072)?,
    };
    let registers = match model_type {
        "dinov2_with_registers" => get.number("num_register_tokens", 4)?,
        _ => 0,
    };
    let teacher = architecture == "DeiTForImageClassificationWithTeacher";
    let mut model = Config {
        img_size: get.pair("image_size", if model_type == "dinov2" { 518 } else { 224 })?,
        patch_size: get.pair("patch_size", patch)?,
        in_chans: get.number("num_channels", 3)?,
        num_classes: 0,
        embed_dim: dim,
        depth,
        num_heads: get.number("num_attention_heads", 12)?,
        mlp_hidden,
        mlp: if swiglu { MlpKind::SwigluPacked } else { MlpKind::Mlp },
        act: if swiglu { Activation::Silu } else { activation(get.text("hidden_act", act)?)? },
        ln_eps: get.real("layer_norm_eps", eps)?,
        patch_bias: family != Family::Clip,
        qkv_bias: get.flag("qkv_bias", true)?,
        proj_bias: true,
        qk_norm: false,
        class_token: model_type != "ijepa" && family != Family::Siglip,
        dist_token: teacher,
        // without a teacher's head, DeiT's distillation token goes along unread, as a register does
        reg_tokens: registers.saturating_add(usize::from(model_type == "deit" && !teacher)),
        // transformers' positions cover the class token and not the registers; timm's then cover neither
        no_embed_class: registers > 0,
        pos_embed: true,
        pre_norm: family == Family::Clip,
        final_norm: true,
        fc_norm: false,
        layer_scale: family == Family::Dinov2,
        global_pool: match model_type {
            "ijepa" => Pool::Avg,
            _ if family == Family::Siglip => Pool::Map,
            _ => Pool::Token,
        },
        pre_logits: None,
        head_bias: true,
        norm: NormKind::LayerNorm,
        patch_norm: false,
        scale_attn_norm: false,
        scale_mlp_norm: false,
        block: BlockKind::Standard,
        diff_attn: false,
        pool_include_prefix: false,
    };
    match architecture {
        "Dinov2ForImageClassification" | "Dinov2WithRegistersForImageClassification" => {
            model.global_pool = Pool::TokenAvg;
        }
        "SiglipForImageClassification" => model.global_pool = Pool::Avg,
        "CLIPForImageClassification" => {
            return Err(Error::Unsupported(format!(
                "`architectures` {architecture}: its head reads tokens without the last norm"
            )));
        }
        _ if family == Family::Siglip && !get.flag("vision_use_head", true)? => model.global_pool = Pool::None,
        _ => {}
    }
    let names = match tensors {
        Some(tensors) => Names::new(family, model_type, tensors, &mut model).map_err(fail)?,
        None => Names::default(),
    };
    model.validate()?;
    let processor = processor.unwrap_or(&Value::Null);
    let preprocess = if processor.is_null() {
        PreprocessConfig::for_config(&model)
    } else {
        PreprocessConfig::from_hf(processor, model_type, &model)?
    };
    let labels = if model.num_classes > 0 { labels(config, model.num_classes)? } else { None };
    let source = [("producer".into(), "transformers".into()), ("architecture".into(), architecture.into())];
    Ok((ModelInfo { vit: 1, model, preprocess, labels, source: source.into(), verified: None }, names))
}

/// Class names by index; `LABEL_0` and so on are transformers' own when nobody named them.
fn labels(config: &Value, classes: usize) -> Result<Option<Vec<String>>> {
    let fail = |why: String| Error::Config(why);
    let Some(map) = config.get("id2label").filter(|map| !map.is_null()) else { return Ok(None) };
    let map = map.as_object().ok_or_else(|| fail("`id2label` must be an object".into()))?;
    if map.len() != classes {
        return Err(fail(format!("`id2label` has {} names, the head {classes} classes", map.len())));
    }
    let mut labels = vec![None; classes];
    for (id, name) in map {
        let name = name.as_str().ok_or_else(|| fail(format!("`id2label` of {id:?} must be a name, found {name}")))?;
        let slot = id.parse().ok().and_then(|id: usize| labels.get_mut(id));
        match slot
            .ok_or_else(|| fail(format!("`id2label` has the class {id:?}, expected one of {classes} from 0 on")))?
        {
            Some(_) => return Err(fail(format!("`id2label` has the class {id:?} twice"))),
            slot => *slot = Some(name.to_owned()),
        }
    }
    Ok(labels.into_iter().collect())
}

fn activation(name: &str) -> Result<Activation> {
    Ok(match name {
        "gelu" => Activation::Gelu,
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Activation::GeluTanh,
        "quick_gelu" => Activation::QuickGelu,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        other => return Err(Error::Unsupported(format!("`hidden_act` {other:?}"))),
    })
}

/// Typed fields with transformers' defaults.
struct Getter<'a>(&'a Value);

impl<'a> Getter<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str, default: usize) -> Result<usize> {
        self.get(key).map_or(Ok(default), |value| size(value, key).map_err(Error::Config))
    }

    fn pair(&self, key: &str, default: usize) -> Result<[usize; 2]> {
        let fail = |why| Error::Config(format!("`{key}` {why}"));
        self.get(key).map_or(Ok([default; 2]), |value| pair(value).map_err(fail))
    }

    fn real(&self, key: &str, default: f64) -> Result<f64> {
        let fail = |value| Error::Config(format!("`{key}` must be a positive number, found {value}"));
        let good = |value: &f64| *value > 0.0 && *value < 1e6;
        self.get(key).map_or(Ok(default), |value| value.as_f64().filter(good).ok_or_else(|| fail(value)))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let fail = |value| Error::Config(format!("`{key}` must be true or false, found {value}"));
        self.get(key).map_or(Ok(default), |value| value.as_bool().ok_or_else(|| fail(value)))
    }

    fn text(&self, key: &str, default: &'a str) -> Result<&'a str> {
        let fail = |value| Error::Config(format!("`{key}` must be a name, found {value}"));
        self.get(key).map_or(Ok(default), |value| value.as_str().ok_or_else(|| fail(value)))
    }
}

impl Names {
    /// Finds the tower in a file, notes where each tensor comes from, and reads off what only the tensors tell: the head.
    fn new(
        family: Family,
        model_type: &str,
        tensors: &BTreeMap<String, TensorInfo>,
        model: &mut Config,
    ) -> Result<Self, String> {
        let patch = match family {
            Family::Vit | Family::Dinov2 => "embeddings.patch_embeddings.projection",
            Family::Clip | Family::Siglip => "embeddings.patch_embedding",
        };
        let end = format!("{patch}.weight");
        let mut prefixes = tensors.keys().filter_map(|name| name.strip_suffix(&end));
        let prefix = match (prefixes.next(), prefixes.next()) {
            (Some(prefix), None) => prefix.to_owned(),
            (None, _) => return Err(format!("the weights hold no `{end}`: they are not of a {model_type}")),
            (Some(_), Some(_)) => return Err(format!("the weights hold more than one `{end}`")),
        };
        let mut names = Self { prefix, ..Self::default() };
        let rows = |name: &str| tensors.get(name).and_then(|info| info.shape.first().copied()).unwrap_or(0);
        let has = |name: &str| tensors.contains_key(name);

        names.linear("patch_embed.proj", patch, model.patch_bias);
        match family {
            Family::Vit | Family::Dinov2 => names.embeddings(model, model_type),
            Family::Clip | Family::Siglip => {
                if family == Family::Clip {
                    names.take("cls_token", "embeddings.class_embedding");
                    names.linear("norm_pre", "pre_layrnorm", true);
                }
                names.take("pos_embed", "embeddings.position_embedding.weight");
            }
        }
        for i in 0..model.depth {
            names.block(family, i, model);
        }
        let last = if matches!(family, Family::Vit | Family::Dinov2) { "layernorm" } else { "post_layernorm" };
        names.linear("norm", last, true);

        // heads stand outside the tower: no prefix
        let own = |names: &mut Self, ours: &str, theirs: &str, bias: bool| {
            for end in if bias { &["weight", "bias"][..] } else { &["weight"] } {
                names.recipes.insert(format!("{ours}.{end}"), Recipe::Take(format!("{theirs}.{end}")));
            }
        };
        if model.dist_token {
            model.num_classes = rows("cls_classifier.weight");
            own(&mut names, "head", "cls_classifier", true);
            own(&mut names, "head_dist", "distillation_classifier", true);
        } else if has("classifier.weight") {
            model.num_classes = rows("classifier.weight");
            own(&mut names, "head", "classifier", true);
        } else if has("visual_projection.weight") {
            model.num_classes = rows("visual_projection.weight");
            model.head_bias = false;
            own(&mut names, "head", "visual_projection", false);
        }
        let pooler = format!("{}pooler.dense.weight", names.prefix);
        if family == Family::Vit && has(&pooler) {
            if model.num_classes == 0 && matches!(model.global_pool, Pool::Token) {
                model.pre_logits = Some(PreLogits { size: rows(&pooler), act: "tanh".into() });
                names.linear("pre_logits.fc", "pooler.dense", true);
            } else {
                names.ignored.push(format!("{}pooler.", names.prefix));
            }
        }
        if family == Family::Siglip {
            if model.global_pool == Pool::Map {
                names.attention_pool(model.embed_dim);
            } else {
                names.ignored.push(format!("{}head.", names.prefix));
            }
        }
        Ok(names)
    }

    fn their(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// A tensor as it is.
    pub(crate) fn take(&mut self, ours: &str, theirs: &str) {
        self.recipes.insert(ours.to_owned(), Recipe::Take(self.their(theirs)));
    }

    /// Weight, and bias if there is one.
    pub(crate) fn linear(&mut self, ours: &str, theirs: &str, bias: bool) {
        self.take(&format!("{ours}.weight"), &format!("{theirs}.weight"));
        if bias {
            self.take(&format!("{ours}.bias"), &format!("{theirs}.bias"));
        }
    }

    fn embeddings(&mut self, model: &Config, model_type: &str) {
        let positions = "embeddings.position_embeddings";
        if model.class_token {
            self.take("cls_token", "embeddings.cls_token");
        }
        if model_type == "deit" {
            let ours = if model.dist_token { "dist_token" } else { "reg_token" };
            self.take(ours, "embeddings.distillation_token");
        }
        if model.no_embed_class {
            self.take("reg_token", "embeddings.register_tokens");
            let (class, positions) = (self.their("embeddings.cls_token"), self.their(positions));
            self.recipes.insert("pos_embed".into(), Recipe::Rows(positions.clone(), 1, model.num_patches()));
            self.recipes.insert("cls_token".into(), Recipe::ClassPlusPosition { class, positions });
        } else {
            self.take("pos_embed", positions);
        }
    }

    fn block(&mut self, family: Family, i: usize, model: &Config) {
        let ours = format!("blocks.{i}");
        let (layer, qkv, proj, [norm1, norm2], [fc1, fc2]) = match family {
            Family::Vit => (
                format!("encoder.layer.{i}"),
                ["query", "key", "value"].map(|part| format!("attention.attention.{part}")),
                "attention.output.dense",
                ["layernorm_before", "layernorm_after"],
                ["intermediate.dense", "output.dense"],
            ),
            Family::Dinov2 => (
                format!("encoder.layer.{i}"),
                ["query", "key", "value"].map(|part| format!("attention.attention.{part}")),
                "attention.output.dense",
                ["norm1", "norm2"],
                if model.mlp == MlpKind::Mlp { ["mlp.fc1", "mlp.fc2"] } else { ["mlp.weights_in", "mlp.weights_out"] },
            ),
            Family::Clip | Family::Siglip => (
                format!("encoder.layers.{i}"),
                ["q", "k", "v"].map(|part| format!("self_attn.{part}_proj")),
                "self_attn.out_proj",
                ["layer_norm1", "layer_norm2"],
                ["mlp.fc1", "mlp.fc2"],
            ),
        };
        for end in if model.qkv_bias { &["weight", "bias"][..] } else { &["weight"] } {
            let parts = qkv.iter().map(|part| self.their(&format!("{layer}.{part}.{end}"))).collect();
            self.recipes.insert(format!("{ours}.attn.qkv.{end}"), Recipe::Stack(parts));
        }
        for (name, theirs) in
            [("norm1", norm1), ("attn.proj", proj), ("norm2", norm2), ("mlp.fc1", fc1), ("mlp.fc2", fc2)]
        {
            self.linear(&format!("{ours}.{name}"), &format!("{layer}.{theirs}"), true);
        }
        if model.layer_scale {
            for n in 1..=2 {
                self.take(&format!("{ours}.ls{n}.gamma"), &format!("{layer}.layer_scale{n}.lambda1"));
            }
        }
    }

    /// SigLIP's head: q, k and v in one projection, of which timm keeps q apart.
    fn attention_pool(&mut self, dim: usize) {
        self.take("attn_pool.latent", "head.probe");
        for (end, theirs) in [("weight", "head.attention.in_proj_weight"), ("bias", "head.attention.in_proj_bias")] {
            let theirs = self.their(theirs);
            self.recipes.insert(format!("attn_pool.q.{end}"), Recipe::Rows(theirs.clone(), 0, dim));
            self.recipes.insert(format!("attn_pool.kv.{end}"), Recipe::Rows(theirs, dim, dim.saturating_mul(2)));
        }
        self.linear("attn_pool.proj", "head.attention.out_proj", true);
        self.linear("attn_pool.norm", "head.layernorm", true);
        self.linear("attn_pool.mlp.fc1", "head.mlp.fc1", true);
        self.linear("attn_pool.mlp.fc2", "head.mlp.fc2", true);
    }
}

/// A file under transformers' names, seen under timm's.
pub(crate) struct Renamed {
    inner: Arc<dyn Weights>,
    recipes: BTreeMap<String, Recipe>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Renamed {
    /// Checks that every tensor is there, that the shapes fit, and that none is left over.
    pub(crate) fn new(inner: Arc<dyn Weights>, names: Names, model: &Config) -> Result<Self> {
        let found = inner.tensors();
        let expected = crate::load::parameters(model)?;
        let mut used = BTreeSet::new();
        let mut tensors = BTreeMap::new();
        for (name, recipe) in &names.recipes {
            let parts: Vec<&String> = match recipe {
                Recipe::Take(part) | Recipe::Rows(part, ..) => vec![part],
                Recipe::Stack(parts) => parts.iter().collect(),
                Recipe::ClassPlusPosition { class, positions } => vec![class, positions],
            };
            let mut infos = Vec::with_capacity(parts.len());
            for part in parts {
                used.insert(part.as_str());
                infos.push((part, found.get(part).ok_or_else(|| Error::tensor(part, "missing"))?));
            }
            let Some(shape) = expected.get(name) else { continue };
            let (count, row) = (product(shape), product(shape.get(1..).unwrap_or_default()));
            let elements = |info: &TensorInfo| product(&info.shape);
            let Some(&(part, first)) = infos.first() else { continue };
            let fits = match recipe {
                // a leading axis of 1 may be left out; everything else must be the same
                Recipe::Take(_) => squeezed(&first.shape) == squeezed(shape),
                Recipe::Stack(_) => {
                    let rows = shape.first().copied().unwrap_or(0) / 3;
                    infos.iter().all(|(_, info)| {
                        info.shape.first() == Some(&rows) && elements(info) == rows.saturating_mul(row)
                    }) && infos.iter().all(|(_, info)| info.dtype == first.dtype)
                }
                Recipe::Rows(_, from, rows) => {
                    let theirs = match &first.shape[..] {
                        [1, rest @ ..] if rest.len() == 2 => rest,
                        all => all,
                    };
                    let there = [from.saturating_add(*rows), rows.saturating_mul(3)];
                    product(theirs.get(1..).unwrap_or_default()).saturating_mul(*rows) == count
                        && theirs.first().is_some_and(|n| *n == there[0] || *from == 0 && *n == there[1])
                }
                Recipe::ClassPlusPosition { .. } => {
                    let fits =
                        |positions: &TensorInfo| positions.shape.last() == shape.last() && elements(positions) >= count;
                    elements(first) == count && infos.get(1).is_some_and(|(_, positions)| fits(positions))
                }
            };
            if !fits {
                return Err(Error::tensor(
                    part,
                    format!("has the shape {:?}, which does not fit timm's `{name}` {shape:?}", first.shape),
                ));
            }
            let dtype = match recipe {
                Recipe::ClassPlusPosition { .. } => Dtype::F32,
                _ => first.dtype,
            };
            tensors.insert(name.clone(), TensorInfo { dtype, shape: shape.clone() });
        }
        let harmless = |name: &str| {
            let bare = name.strip_prefix(names.prefix.as_str()).unwrap_or(name);
            HARMLESS.iter().any(|start| name.starts_with(start) || bare.starts_with(start))
                || names.ignored.iter().any(|start| name.starts_with(start.as_str()))
        };
        if let Some(name) = found.keys().find(|name| !used.contains(name.as_str()) && !harmless(name)) {
            return Err(Error::tensor(name, "left over: it has no place in the model that config.json describes"));
        }
        Ok(Self { recipes: names.recipes, tensors, inner })
    }
}

/// A shape without its leading ones.
fn squeezed(shape: &[usize]) -> &[usize] {
    let ones = shape.iter().take_while(|&&n| n == 1).count();
    shape.get(ones..).unwrap_or_default()
}

/// Elements of a shape: a file may have a dimension of 0 before ones whose product no number holds.
fn product(shape: &[usize]) -> usize {
    shape.iter().fold(1, |n, &d| n.saturating_mul(d))
}

/// A width times a ratio, rounded down as Python's `int` does.
#[allow(clippy::as_conversions)] // out of range it is the largest number, which no configuration may have
fn scaled(width: usize, ratio: f64) -> usize {
    (width as f64 * ratio) as usize
}

impl Weights for Renamed {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let missing = || Error::tensor(name, "missing");
        match self.recipes.get(name).ok_or_else(missing)? {
            Recipe::Take(part) => self.inner.read(part),
            Recipe::Stack(parts) => {
                let mut out = Vec::new();
                for part in parts {
                    out.extend(self.inner.read(part)?);
                }
                Ok(out)
            }
            Recipe::Rows(part, from, rows) => {
                let info = self.tensors.get(name).ok_or_else(missing)?;
                let len = product(&info.shape).saturating_mul(info.dtype.size());
                let start = len.checked_div(*rows).unwrap_or(0).saturating_mul(*from);
                let bytes = self.inner.read(part)?;
                bytes.get(start..start.saturating_add(len)).map(<[u8]>::to_vec).ok_or_else(missing)
            }
            Recipe::ClassPlusPosition { class, positions } => {
                let f32s = |part: &str| {
                    let dtype = self.inner.tensors().get(part).map_or(Dtype::F32, |info| info.dtype);
                    self.inner.read(part).map(|bytes| widen(dtype, &bytes))
                };
                let (class, positions) = (f32s(class)?, f32s(positions)?);
                Ok(class.iter().zip(&positions).flat_map(|(c, p)| (c + p).to_le_bytes()).collect())
            }
        }
    }

    fn stretches(&self, name: &str) -> Result<ReadAt<'_>> {
        match self.recipes.get(name) {
            Some(Recipe::Take(part)) => self.inner.stretches(part),
            _ => Ok(whole(name, self.read(name)?)),
        }
    }
}
