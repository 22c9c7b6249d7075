//! Reads transformers' config.json as a [`ModelInfo`], and maps its tensor names to timm's.
//!
//! Supports ViT, ViT-MAE, ViT-MSN, I-JEPA, DeiT, DINOv2 (with and without registers), DINOv3, BEiT, data2vec-vision, and the
//! vision towers of CLIP and SigLIP. Every tensor in the file must belong to the model, except for those that do not affect a Vision Transformer's
//! output ([`HARMLESS`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    Activation, Config, Error, MlpKind, ModelInfo, Origin, Pool, PreLogits, PreprocessConfig, ProblemType, RelPosBias,
    Result, Rope, RopeKind, TensorProblem,
    checkpoint::class_names as labels,
    checkpoint::timm::{pair, size},
    checkpoint::transformers::names::{BEIT, DINOV2, DINOV3, DINOV3_MODEL, Naming, POOL, TOWER, VIT},
    checkpoint::views::{Part, Views},
    weights::{TensorInfo, Weights},
};

/// Prefixes of the names of tensors that may be left over: mask tokens and decoders from pretraining, buffers, the text tower
/// of a two-tower model, and the scale and bias of the towers' similarity.
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

/// The end of the names of a buffer that may be left over, because it follows from the size of the image.
const INDEX: &str = "relative_position_index";

/// Which tensors of the file each of timm's tensors is made of.
#[derive(Debug, Default)]
pub(in crate::checkpoint) struct Names {
    recipes: BTreeMap<String, Vec<Part>>,
    /// Further prefixes of names that may be left over, in addition to [`HARMLESS`].
    ignored: Vec<String>,
    /// The prefix of the names in the vision tower.
    prefix: String,
    /// Whether the head is the projection of a two-tower model.
    projection: bool,
}

/// The families, distinguished by their tensor names and defaults.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Vit,
    Dinov2,
    Dinov3,
    Beit,
    Clip,
    Siglip,
}

impl Family {
    fn naming(self) -> &'static Naming {
        match self {
            Self::Vit => &VIT,
            Self::Dinov2 => &DINOV2,
            Self::Dinov3 => &DINOV3,
            Self::Beit => &BEIT,
            Self::Clip | Self::Siglip => &TOWER,
        }
    }
}

/// Reads transformers' config.json and preprocessor_config.json. If the file's tensors are given, also maps their names to
/// timm's. Without them, only the preprocessing and the sizes are right, because config.json does not tell whether the model
/// has a head.
pub(in crate::checkpoint) fn info(
    config: &Value,
    processor: Option<&Value>,
    tensors: Option<&BTreeMap<String, TensorInfo>>,
) -> Result<(ModelInfo, Names)> {
    let fail = |why: String| Error::config(why);
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let architecture = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).unwrap_or_default();
    let family = match model_type {
        "vit" | "vit_mae" | "vit_msn" | "ijepa" | "deit" => Family::Vit,
        "dinov2" | "dinov2_with_registers" => Family::Dinov2,
        "dinov3_vit" => Family::Dinov3,
        "beit" | "data2vec-vision" => Family::Beit,
        "clip" | "clip_vision_model" => Family::Clip,
        "siglip" | "siglip_vision_model" => Family::Siglip,
        other => {
            let why = match other {
                "siglip2" | "siglip2_vision_model" => {
                    "images of any size in one batch (NaFlex) are not supported; SigLIP 2 of a fixed resolution is"
                }
                "swin" | "swinv2" | "pvt" | "mobilevit" | "levit" | "cvt" => "it is not a plain Vision Transformer",
                _ => {
                    "vit, vit_mae, vit_msn, ijepa, deit, dinov2, dinov2_with_registers, dinov3_vit, beit, data2vec-vision, clip and siglip are read"
                }
            };
            return Err(Error::unsupported(format!("`model_type` {other:?}: {why}")));
        }
    };
    // two-tower models have a separate configuration for the vision tower
    let own = match config.get("vision_config").filter(|v| v.is_object()) {
        Some(tower) => tower,
        None => config,
    };
    let get = Getter(own);
    let dino3 = family == Family::Dinov3;
    let dim = get.number("hidden_size", if dino3 { 384 } else { 768 })?;
    let depth = get.number("num_hidden_layers", 12)?;
    let (eps, act, patch) = match family {
        Family::Vit | Family::Beit => (1e-12, "gelu", 16),
        Family::Dinov3 => (1e-5, "gelu", 16),
        Family::Dinov2 => (1e-6, "gelu", if model_type == "dinov2" { 14 } else { 16 }),
        Family::Clip => (1e-5, "quick_gelu", 32),
        Family::Siglip => (1e-6, "gelu_pytorch_tanh", 16),
    };
    let swiglu = family == Family::Dinov2 && get.flag("use_swiglu_ffn", false)?;
    let mlp_hidden = match family {
        Family::Dinov2 => {
            let hidden = scaled(dim, get.real("mlp_ratio", 4.0)?);
            // like transformers: two thirds, rounded up to a multiple of 8, and twice that for gate and value
            if swiglu { (hidden.saturating_mul(2) / 3).div_ceil(8).saturating_mul(16) } else { hidden }
        }
        _ => get.number("intermediate_size", if dino3 { 1536 } else { 3072 })?,
    };
    let registers = match model_type {
        "dinov2_with_registers" => get.number("num_register_tokens", 4)?,
        "dinov3_vit" => get.number("num_register_tokens", 0)?,
        _ => 0,
    };
    let teacher = architecture == "DeiTForImageClassificationWithTeacher";
    let (img_size, patch_size) =
        (get.pair("image_size", if model_type == "dinov2" { 518 } else { 224 })?, get.pair("patch_size", patch)?);
    let num_heads = get.number("num_attention_heads", if dino3 { 6 } else { 12 })?;
    let mut model = Config {
        in_chans: get.number("num_channels", 3)?,
        num_classes: 0,
        mlp_hidden,
        mlp: if swiglu { MlpKind::SwigluPacked } else { MlpKind::Mlp },
        act: if swiglu { Activation::Silu } else { activation(get.text("hidden_act", act)?)? },
        ln_eps: get.real("layer_norm_eps", eps)?,
        patch_bias: family != Family::Clip,
        qkv_bias: get.flag("qkv_bias", true)?,
        class_token: model_type != "ijepa" && family != Family::Siglip,
        dist_token: teacher,
        // without a distillation head, no head reads DeiT's distillation token, so it is the same as a register
        reg_tokens: registers.saturating_add(usize::from(model_type == "deit" && !teacher)),
        // transformers' position embeddings include the class token but not the registers; in timm they include neither, so
        // the class token's position is added to the class token
        no_embed_class: registers > 0 && !dino3,
        pre_norm: family == Family::Clip,
        layer_scale: family == Family::Dinov2,
        global_pool: match model_type {
            "ijepa" => Pool::Avg,
            _ if family == Family::Siglip => Pool::Map,
            _ => Pool::Token,
        },
        ..Config::vit(img_size, patch_size, dim, depth, num_heads)
    };
    match family {
        Family::Dinov3 => dinov3(&get, &mut model)?,
        Family::Beit => beit(&get, &mut model)?,
        _ => {}
    }
    match architecture {
        "Dinov2ForImageClassification" | "Dinov2WithRegistersForImageClassification" => {
            model.global_pool = Pool::TokenAvg;
        }
        "SiglipForImageClassification" => model.global_pool = Pool::Avg,
        // its head reads the mean of the patches, without the last norm
        "CLIPForImageClassification" => (model.global_pool, model.final_norm) = (Pool::Avg, false),
        _ if family == Family::Siglip && !get.flag("vision_use_head", true)? => model.global_pool = Pool::None,
        _ => {}
    }
    // the names of the blocks are made from the depth
    model.validate()?;
    let names = match tensors {
        Some(tensors) => Names::new(family, model_type, tensors, &mut model).map_err(fail)?,
        None => Names::default(),
    };
    if let Some(pooler) = &model.pre_logits {
        let act = get.text("pooler_act", "tanh")?;
        if act != "tanh" {
            return Err(Error::unsupported(format!("`pooler_act` {act:?}; tanh is read")));
        }
        let size = get.number("pooler_output_size", dim)?;
        if size != pooler.size && size != 0 {
            return Err(fail(format!("`pooler_output_size` is {size}, and the weights have {}", pooler.size)));
        }
    }
    model.validate()?;
    let absent = Value::Object(serde_json::Map::new());
    let preprocess = PreprocessConfig::from_hf(processor.unwrap_or(&absent), model_type, &model)?;
    let source = Origin::new().with_producer("transformers").with_architecture(architecture);
    let info = ModelInfo::new(model, preprocess).from_source(source).with_projection(names.projection);
    let mut info = info.with_problem_type(problem_type(config)?);
    if processor.is_none() {
        info = info
            .assuming_preprocess("the folder has no preprocessor_config.json, so the defaults of its class are taken");
    }
    if names.has_classifier() {
        let (labels, note) = labels::by_number("id2label", config.get("id2label"), info.model.num_classes)?;
        info = info.with_labels(labels);
        if let Some(note) = note {
            info = info.assuming(note);
        }
    }
    Ok((info, names))
}

/// The switches of DINOv3.
fn dinov3(get: &Getter<'_>, model: &mut Config) -> Result<()> {
    let [query, key, value, proj, mlp] =
        [("query_bias", true), ("key_bias", false), ("value_bias", true), ("proj_bias", true), ("mlp_bias", true)]
            .map(|(name, default)| get.flag(name, default));
    let (query, key, value, proj, mlp) = (query?, key?, value?, proj?, mlp?);
    if query != value || (key && !query) || proj != mlp {
        return Err(Error::unsupported(
            "`query_bias` and `value_bias` must be equal, `key_bias` not without them, `proj_bias` and `mlp_bias` equal",
        ));
    }
    (model.qkv_bias, model.no_k_bias, model.proj_bias) = (query, query && !key, proj);
    if get.flag("use_gated_mlp", false)? {
        model.mlp = MlpKind::Swiglu;
    }
    (model.pos_embed, model.layer_scale) = (false, true);
    let rope = Rope::new(RopeKind::Centred, get.real("rope_theta", 100.0)?);
    model.rope = Some(Rope { rotate_half: true, ..rope });
    Ok(())
}

/// The switches of BEiT and data2vec-vision.
fn beit(get: &Getter<'_>, model: &mut Config) -> Result<()> {
    let (own, shared) =
        (get.flag("use_relative_position_bias", false)?, get.flag("use_shared_relative_position_bias", false)?);
    model.rel_pos_bias = match (own, shared) {
        (false, false) => RelPosBias::None,
        (true, false) => RelPosBias::Blocks,
        (false, true) => RelPosBias::Shared,
        (true, true) => {
            return Err(Error::unsupported("relative position biases of each block and shared ones at once"));
        }
    };
    // transformers reads the table's sides in the wrong order, which shows in tables that are not square
    let [rows, columns] = model.grid();
    if model.rel_pos_bias != RelPosBias::None && rows != columns {
        return Err(Error::unsupported(format!(
            "relative position biases for {rows}×{columns} patches, only for as many rows as columns"
        )));
    }
    model.no_k_bias = true;
    model.pos_embed = get.flag("use_absolute_position_embeddings", false)?;
    model.layer_scale =
        get.get("layer_scale_init_value").is_none_or(|value| value.as_f64().is_some_and(|value| value > 0.0));
    if get.flag("use_mean_pooling", true)? {
        (model.global_pool, model.fc_norm) = (Pool::Avg, true);
    }
    Ok(())
}

/// What the logits mean.
fn problem_type(config: &Value) -> Result<ProblemType> {
    match config.get("problem_type") {
        None | Some(Value::Null) => Ok(ProblemType::SingleLabel),
        Some(given) => serde_json::from_value(given.clone()).map_err(|_| {
            Error::unsupported(format!(
                "`problem_type` {given}: single_label_classification, multi_label_classification and regression are known"
            ))
        }),
    }
}

pub(super) fn activation(name: &str) -> Result<Activation> {
    Ok(match name {
        "gelu" => Activation::Gelu,
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Activation::GeluTanh,
        "quick_gelu" => Activation::QuickGelu,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        other => return Err(Error::unsupported(format!("`hidden_act` {other:?}"))),
    })
}

/// Reads typed fields, with a default for absent ones.
pub(super) struct Getter<'a>(pub &'a Value);

impl<'a> Getter<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub fn number(&self, key: &str, default: usize) -> Result<usize> {
        self.get(key).map_or(Ok(default), |value| size(value, key).map_err(Error::config))
    }

    fn pair(&self, key: &str, default: usize) -> Result<[usize; 2]> {
        let fail = |why| Error::config(format!("`{key}` {why}"));
        self.get(key).map_or(Ok([default; 2]), |value| pair(value).map_err(fail))
    }

    pub fn real(&self, key: &str, default: f64) -> Result<f64> {
        let fail = |value| Error::config(format!("`{key}` must be a positive number, found {value}"));
        let good = |value: &f64| *value > 0.0 && *value < 1e6;
        self.get(key).map_or(Ok(default), |value| value.as_f64().filter(good).ok_or_else(|| fail(value)))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let fail = |value| Error::config(format!("`{key}` must be true or false, found {value}"));
        self.get(key).map_or(Ok(default), |value| value.as_bool().ok_or_else(|| fail(value)))
    }

    pub fn text(&self, key: &str, default: &'a str) -> Result<&'a str> {
        let fail = |value| Error::config(format!("`{key}` must be a name, found {value}"));
        self.get(key).map_or(Ok(default), |value| value.as_str().ok_or_else(|| fail(value)))
    }
}

impl Names {
    /// Finds the vision tower in a file and maps its names. Also sets the fields of `model` that only the tensors determine,
    /// which are those of the head.
    fn new(
        family: Family,
        model_type: &str,
        tensors: &BTreeMap<String, TensorInfo>,
        model: &mut Config,
    ) -> Result<Self, String> {
        let mut naming = family.naming();
        let end = format!("{}.weight", naming.patch);
        let mut prefixes = tensors.keys().filter_map(|name| name.strip_suffix(&end));
        let prefix = match (prefixes.next(), prefixes.next()) {
            (Some(prefix), None) => prefix.to_owned(),
            (None, _) => {
                return Err(format!("the weights hold no `{end}`, so they are not those of a {model_type} model"));
            }
            (Some(_), Some(_)) => return Err(format!("the weights hold more than one `{end}`")),
        };
        let mut names = Self { prefix, ..Self::default() };
        let rows = |name: &str| tensors.get(name).and_then(|info| info.shape.first().copied()).unwrap_or(0);
        let has = |name: &str| tensors.contains_key(name);

        let newer = format!("{}{}.0.norm1.weight", names.prefix, DINOV3_MODEL.layers);
        if family == Family::Dinov3 && has(&newer) {
            naming = &DINOV3_MODEL;
        }
        names.linear("patch_embed.proj", naming.patch, model.patch_bias);
        match family {
            Family::Vit | Family::Dinov2 | Family::Dinov3 | Family::Beit => names.embeddings(model, model_type),
            Family::Clip | Family::Siglip => {
                if family == Family::Clip {
                    names.take("cls_token", "embeddings.class_embedding");
                    names.linear("norm_pre", "pre_layrnorm", true);
                }
                names.take("pos_embed", naming.positions);
            }
        }
        for i in 0..model.depth {
            names.block(naming, i, model);
        }
        if model.rel_pos_bias == RelPosBias::Shared {
            let table = "relative_position_bias.relative_position_bias_table";
            names.take("rel_pos_bias.relative_position_bias_table", &format!("encoder.{table}"));
        }
        if model.final_norm && model.fc_norm {
            names.linear("fc_norm", "pooler.layernorm", true);
        } else if model.final_norm {
            names.linear("norm", naming.norm, true);
        } else {
            names.ignored.push(format!("{}{}.", names.prefix, naming.norm));
        }

        // the names of heads do not have the tower's prefix
        let own = |names: &mut Self, ours: &str, theirs: &str, bias: bool| {
            for end in if bias { &["weight", "bias"][..] } else { &["weight"] } {
                names.recipes.insert(format!("{ours}.{end}"), vec![Part::All(format!("{theirs}.{end}"))]);
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
            names.projection = true;
            own(&mut names, "head", "visual_projection", false);
        }
        let pooler = format!("{}pooler.dense.weight", names.prefix);
        if family == Family::Vit && has(&pooler) {
            if model.num_classes == 0 && matches!(model.global_pool, Pool::Token) {
                model.pre_logits = Some(PreLogits::tanh(rows(&pooler)));
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

    /// Whether the head tells classes apart, rather than projecting into a space that another tower shares.
    fn has_classifier(&self) -> bool {
        let head = self.recipes.get("head.weight").and_then(|parts| parts.first());
        matches!(head, Some(Part::All(name)) if name.ends_with("classifier.weight"))
    }

    fn their(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Maps one tensor.
    pub(in crate::checkpoint) fn take(&mut self, ours: &str, theirs: &str) {
        self.recipes.insert(ours.to_owned(), vec![Part::All(self.their(theirs))]);
    }

    /// Maps a weight, and a bias if there is one.
    pub(in crate::checkpoint) fn linear(&mut self, ours: &str, theirs: &str, bias: bool) {
        self.take(&format!("{ours}.weight"), &format!("{theirs}.weight"));
        if bias {
            self.take(&format!("{ours}.bias"), &format!("{theirs}.bias"));
        }
    }

    fn embeddings(&mut self, model: &Config, model_type: &str) {
        let positions = VIT.positions;
        if model.class_token {
            self.take("cls_token", "embeddings.cls_token");
        }
        if model_type == "deit" {
            let ours = if model.dist_token { "dist_token" } else { "reg_token" };
            self.take(ours, "embeddings.distillation_token");
        }
        if model.rope.is_some() && model.reg_tokens > 0 {
            self.take("reg_token", "embeddings.register_tokens");
        }
        if !model.pos_embed {
            return;
        }
        if model.no_embed_class {
            self.take("reg_token", "embeddings.register_tokens");
            let patches = model.num_patches();
            let (class, positions) = (self.their("embeddings.cls_token"), self.their(positions));
            self.recipes
                .insert("pos_embed".into(), vec![Part::Rows(positions.clone(), 1, patches, patches.saturating_add(1))]);
            self.recipes.insert("cls_token".into(), vec![Part::ClassPlusPosition { class, positions }]);
        } else {
            self.take("pos_embed", positions);
        }
    }

    fn block(&mut self, naming: &Naming, i: usize, model: &Config) {
        let (ours, layer) = (format!("blocks.{i}"), format!("{}.{i}", naming.layers));
        let joint = model.qkv_bias && !model.no_k_bias;
        for end in if joint { &["weight", "bias"][..] } else { &["weight"] } {
            let parts = naming.qkv.iter().map(|part| Part::All(self.their(&format!("{layer}.{part}.{end}")))).collect();
            self.recipes.insert(format!("{ours}.attn.qkv.{end}"), parts);
        }
        if model.qkv_bias && model.no_k_bias {
            let [q, _, v] = naming.qkv;
            self.take(&format!("{ours}.attn.q_bias"), &format!("{layer}.{q}.bias"));
            self.take(&format!("{ours}.attn.v_bias"), &format!("{layer}.{v}.bias"));
        }
        if model.rel_pos_bias == RelPosBias::Blocks {
            let table = "attention.attention.relative_position_bias.relative_position_bias_table";
            self.take(&format!("{ours}.attn.relative_position_bias_table"), &format!("{layer}.{table}"));
        }
        let [fc1, fc2] = naming.mlp(model.mlp);
        let value = if model.mlp == MlpKind::Swiglu { "mlp.fc1_x" } else { "mlp.fc1" };
        for (name, theirs) in naming.block.into_iter().chain([(value, fc1), ("mlp.fc2", fc2)]) {
            let bias = model.proj_bias || name.starts_with("norm");
            self.linear(&format!("{ours}.{name}"), &format!("{layer}.{theirs}"), bias);
        }
        if model.mlp == MlpKind::Swiglu {
            self.linear(&format!("{ours}.mlp.fc1_g"), &format!("{layer}.mlp.gate_proj"), model.proj_bias);
        }
        for (name, theirs) in naming.scales.into_iter().filter(|_| model.layer_scale) {
            self.take(&format!("{ours}.{name}"), &format!("{layer}.{theirs}"));
        }
    }

    /// Maps SigLIP's pooling head. transformers has q, k and v in one projection; timm has q separately.
    fn attention_pool(&mut self, dim: usize) {
        self.take("attn_pool.latent", "head.probe");
        let all = dim.saturating_mul(3);
        for (end, theirs) in [("weight", "head.attention.in_proj_weight"), ("bias", "head.attention.in_proj_bias")] {
            let theirs = self.their(theirs);
            self.recipes.insert(format!("attn_pool.q.{end}"), vec![Part::Rows(theirs.clone(), 0, dim, all)]);
            self.recipes
                .insert(format!("attn_pool.kv.{end}"), vec![Part::Rows(theirs, dim, dim.saturating_mul(2), all)]);
        }
        for (ours, theirs) in POOL {
            self.linear(ours, theirs, true);
        }
    }
}

impl Names {
    /// The tensors with timm's names. Checks that each exists, that its shape fits, and that none is left over.
    pub(in crate::checkpoint) fn views(self, inner: &Arc<dyn Weights>, model: &Config) -> Result<Views> {
        let found = inner.tensors();
        let expected = crate::layers::parameters(model)?;
        let mut used = BTreeSet::new();
        let mut views = Views::new(inner.clone());
        for (name, recipe) in &self.recipes {
            let parts: Vec<&String> = recipe.iter().flat_map(Part::names).collect();
            let mut infos = Vec::with_capacity(parts.len());
            for part in parts {
                used.insert(part.as_str());
                infos.push((part, found.get(part).ok_or_else(|| Error::missing(part))?));
            }
            let Some(shape) = expected.get(name) else { continue };
            let (count, row) = (product(shape), product(shape.get(1..).unwrap_or_default()));
            let elements = |info: &TensorInfo| product(&info.shape);
            let Some(&(part, first)) = infos.first() else { continue };
            let fits = match recipe.as_slice() {
                // leading axes of 1 may be missing; all others must be equal
                [Part::All(_)] => squeezed(&first.shape) == squeezed(shape),
                [Part::Rows(_, _, rows, all)] => {
                    let theirs = match &first.shape[..] {
                        [1, rest @ ..] if rest.len() == 2 => rest,
                        all => all,
                    };
                    product(theirs.get(1..).unwrap_or_default()).saturating_mul(*rows) == count
                        && theirs.first() == Some(all)
                }
                [Part::ClassPlusPosition { .. }] => {
                    let fits =
                        |positions: &TensorInfo| positions.shape.last() == shape.last() && elements(positions) >= count;
                    elements(first) == count && infos.get(1).is_some_and(|(_, positions)| fits(positions))
                }
                stacked => {
                    let rows = shape.first().and_then(|rows| rows.checked_div(stacked.len())).unwrap_or(0);
                    infos.iter().all(|(_, info)| {
                        info.shape.first() == Some(&rows)
                            && elements(info) == rows.saturating_mul(row)
                            && info.dtype == first.dtype
                    })
                }
            };
            if !fits {
                return Err(Error::problem(
                    part,
                    TensorProblem::Shape,
                    format!("has the shape {:?}, which does not fit timm's `{name}` {shape:?}", first.shape),
                ));
            }
            views.add(name, shape.clone(), recipe.clone());
        }
        let harmless = |name: &str| {
            let bare = name.strip_prefix(self.prefix.as_str()).unwrap_or(name);
            bare.ends_with(INDEX)
                || HARMLESS.iter().any(|start| name.starts_with(start) || bare.starts_with(start))
                || self.ignored.iter().any(|start| name.starts_with(start.as_str()))
        };
        if let Some(name) = found.keys().find(|name| !used.contains(name.as_str()) && !harmless(name)) {
            return Err(Error::problem(
                name,
                TensorProblem::LeftOver,
                "left over: the model that config.json describes has no such tensor",
            ));
        }
        Ok(views)
    }
}

/// A shape without its leading ones.
fn squeezed(shape: &[usize]) -> &[usize] {
    let ones = shape.iter().take_while(|&&n| n == 1).count();
    shape.get(ones..).unwrap_or_default()
}

/// The number of elements. Saturates, because the product of a malformed file's dimensions can overflow.
fn product(shape: &[usize]) -> usize {
    shape.iter().fold(1, |n, &d| n.saturating_mul(d))
}

/// Multiplies a width by a ratio and rounds down, like Python's `int`.
#[allow(clippy::as_conversions)] // saturates if out of range, and `Config::validate` rejects such sizes
fn scaled(width: usize, ratio: f64) -> usize {
    (width as f64 * ratio) as usize
}
