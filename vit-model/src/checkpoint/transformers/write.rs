//! A model → a folder that transformers opens: its names for the tensors, `config.json` and `preprocessor_config.json`.
//!
//! transformers has a class per family and few switches, so a model is written only where one of them computes the same:
//! ViT, DeiT with both heads, DINOv2 (with registers too), CLIP's and SigLIP's vision towers.

// the numbers are those of a `Config` that `validate` has bounded, and the JSON that is indexed was made here
#![allow(clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    Activation, Config, CropMode, Error, Interpolation, MlpKind, ModelInfo, Pool, PreprocessConfig, Resize, Result,
    Weights,
};
use serde_json::{Map, Value, json};

use crate::layers::parameters;

use super::names::{DINOV2, Naming, POOL, TOWER, VIT};
use crate::checkpoint::views::{Part, Views};
use crate::checkpoint::written::Folder;

/// The classes, by how they name their tensors.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Vit,
    Deit,
    Dinov2,
    Registers,
    Clip,
    Siglip,
}

impl Family {
    fn naming(self) -> &'static Naming {
        match self {
            Self::Vit | Self::Deit => &VIT,
            Self::Dinov2 | Self::Registers => &DINOV2,
            Self::Clip | Self::Siglip => &TOWER,
        }
    }
}

/// What goes into the folder.
///
/// # Errors
/// A model that no class of transformers computes, with the switches that stand in the way, and a preprocessing that
/// none of its processors does.
pub(in crate::checkpoint) fn folder(info: &ModelInfo, weights: &Arc<dyn Weights>) -> Result<Folder> {
    let (info, weights) = &biased(info, weights)?;
    let c = &info.model;
    let family = family(c)?;
    let writer = Writer { c, family, to: Views::new(weights.clone()), prefix: prefix(c, family) };
    let weights: Arc<dyn Weights> = Arc::new(writer.tensors()?);
    let mut notes = Vec::new();
    let processor = processor(&info.preprocess, &mut notes)?;
    let files = vec![("config.json", config(info, family)), ("preprocessor_config.json", processor)];
    Ok(Folder { info: None, weights, files, notes })
}

/// The same function with every bias that the classes of transformers always have: those that the model lacks are zero.
fn biased(info: &ModelInfo, weights: &Arc<dyn Weights>) -> Result<(ModelInfo, Arc<dyn Weights>)> {
    let mut info = info.clone();
    let c = &mut info.model;
    c.proj_bias = true;
    if c.pre_norm || !c.class_token {
        c.qkv_bias = true; // the towers of CLIP and SigLIP have no switch for it
    }
    if !c.pre_norm {
        // CLIP has neither
        (c.patch_bias, c.head_bias) = (true, true);
    }
    let mut to = Views::all(weights.clone());
    for (name, shape) in parameters(c)? {
        if name.rsplit('.').next() == Some("bias") && !to.has(&name) {
            let len = shape.iter().product();
            to.add(name, shape, vec![Part::Zeros(len)]);
        }
    }
    Ok((info, Arc::new(to)))
}

/// The family that computes what the model does.
fn family(c: &Config) -> Result<Family> {
    let plain = c.later_switches().is_empty() && !c.qk_norm && c.proj_bias && c.pos_embed && c.final_norm;
    let head = c.num_classes > 0;
    // after one token is selected, `norm` and `fc_norm` are the same
    let norm_first = !c.fc_norm || matches!(c.global_pool, Pool::Token);
    let square = c.img_size[0] == c.img_size[1] && c.patch_size[0] == c.patch_size[1];
    let vit = c.patch_bias && !c.pre_norm && !c.layer_scale && c.reg_tokens == 0 && c.mlp == MlpKind::Mlp;
    let dino = c.patch_bias && !c.pre_norm && c.layer_scale && c.class_token && !c.dist_token && c.pre_logits.is_none();
    let dino_pool = matches!((c.global_pool, head), (Pool::Token, false) | (Pool::TokenAvg, true));
    let biased = c.head_bias || !head;
    let token = c.global_pool == Pool::Token;
    if plain && norm_first {
        if vit && c.class_token && !c.dist_token && token && biased && (c.pre_logits.is_none() || !head) {
            return Ok(Family::Vit);
        }
        if vit && c.class_token && c.dist_token && token && head && biased && c.pre_logits.is_none() {
            return Ok(Family::Deit);
        }
        if dino && dino_pool && biased && ratio(c).is_some() {
            return Ok(if c.reg_tokens == 0 { Family::Dinov2 } else { Family::Registers });
        }
        let tower = !c.dist_token && c.reg_tokens == 0 && c.mlp == MlpKind::Mlp && c.qkv_bias && square;
        let clip = c.class_token && c.pre_norm && !c.patch_bias && !c.layer_scale && token && c.pre_logits.is_none();
        if tower && clip && !(head && c.head_bias) {
            return Ok(Family::Clip);
        }
        let siglip = !c.class_token && c.patch_bias && !c.pre_norm && !c.layer_scale && c.pre_logits.is_none();
        let pooled = (c.global_pool == Pool::Map && !head) || (c.global_pool == Pool::Avg && head && c.head_bias);
        if tower && siglip && pooled {
            return Ok(Family::Siglip);
        }
    }
    let has = [
        (!plain || !norm_first, "its norms or wiring"),
        (c.layer_scale, "LayerScale"),
        (c.pre_norm, "a norm before the blocks"),
        (c.reg_tokens > 0, "registers"),
        (!c.class_token, "no class token"),
        (c.mlp != MlpKind::Mlp, "a gated MLP"),
        (c.pre_logits.is_some(), "a linear and tanh before the head"),
        (head && !c.head_bias, "a head without bias"),
        (!square, "patches or images that are not square"),
        (!token, "its pooling"),
    ];
    let has: Vec<&str> = has.into_iter().filter_map(|(is, what)| is.then_some(what)).collect();
    Err(Error::unsupported(format!(
        "--to hf: no class of transformers (ViT, DeiT, DINOv2, CLIP, SigLIP) computes this model, with {}; --to timm or a .safetensors file holds it",
        has.join(", ")
    )))
}

/// DINOv2's whole-number `mlp_ratio`, from which transformers computes the width of the MLP.
fn ratio(c: &Config) -> Option<usize> {
    let (ratio, hidden) = match (c.mlp, c.act) {
        (MlpKind::Mlp, _) => (c.mlp_hidden / c.embed_dim, None),
        (MlpKind::SwigluPacked, Activation::Silu) => (0, Some(c.mlp_hidden)),
        (MlpKind::Swiglu, Activation::Silu) => (0, Some(c.mlp_hidden.checked_mul(2)?)),
        _ => return None,
    };
    match hidden {
        None => (c.embed_dim.checked_mul(ratio)? == c.mlp_hidden && ratio > 0).then_some(ratio),
        // two thirds, up to a multiple of 8, gate and value
        Some(hidden) => (1..=16).find(|r| {
            c.embed_dim.saturating_mul(*r).saturating_mul(2) / 3 != 0 && {
                let third = c.embed_dim.saturating_mul(*r).saturating_mul(2) / 3;
                third.div_ceil(8).saturating_mul(16) == hidden
            }
        }),
    }
}

fn prefix(c: &Config, family: Family) -> &'static str {
    match family {
        Family::Vit if c.num_classes > 0 => "vit.",
        Family::Dinov2 if c.num_classes > 0 => "dinov2.",
        Family::Registers if c.num_classes > 0 => "dinov2_with_registers.",
        Family::Deit => "deit.",
        Family::Clip | Family::Siglip => "vision_model.",
        _ => "",
    }
}

struct Writer<'a> {
    c: &'a Config,
    family: Family,
    to: Views,
    prefix: &'static str,
}

impl Writer<'_> {
    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.to.shape_of(name).ok_or_else(|| Error::tensor(name, "missing"))
    }

    /// A tensor as it is.
    fn take(&mut self, theirs: &str, ours: &str) -> Result<()> {
        let shape = self.shape(ours)?;
        self.put(theirs, shape, vec![Part::All(ours.to_owned())]);
        Ok(())
    }

    /// Weight and bias.
    fn pair(&mut self, theirs: &str, ours: &str) -> Result<()> {
        for end in ["weight", "bias"] {
            self.take(&format!("{theirs}.{end}"), &format!("{ours}.{end}"))?;
        }
        Ok(())
    }

    fn put(&mut self, theirs: &str, shape: Vec<usize>, parts: Vec<Part>) {
        let name = format!("{}{theirs}", self.prefix);
        self.to.add(name, shape, parts);
    }

    /// Weight and bias outside the tower.
    fn head(&mut self, theirs: &str, ours: &str, bias: bool) -> Result<()> {
        for end in if bias { &["weight", "bias"][..] } else { &["weight"] } {
            let ours = format!("{ours}.{end}");
            let shape = self.shape(&ours)?;
            self.to.add(format!("{theirs}.{end}"), shape, vec![Part::All(ours)]);
        }
        Ok(())
    }

    fn tensors(mut self) -> Result<Views> {
        let c = self.c;
        self.embeddings()?;
        for block in 0..c.depth {
            self.block(block)?;
        }
        let norm = if c.fc_norm { "fc_norm" } else { "norm" };
        self.pair(self.family.naming().norm, norm)?;
        match self.family {
            Family::Deit => {
                self.head("cls_classifier", "head", true)?;
                self.head("distillation_classifier", "head_dist", true)?;
            }
            Family::Clip if c.num_classes > 0 => self.head("visual_projection", "head", false)?,
            _ if c.num_classes > 0 => self.head("classifier", "head", true)?,
            _ => {}
        }
        if c.pre_logits.is_some() {
            self.pair("pooler.dense", "pre_logits.fc")?;
        }
        if c.global_pool == Pool::Map {
            self.attention_pool()?;
        }
        Ok(self.to)
    }

    fn embeddings(&mut self) -> Result<()> {
        let (c, d) = (self.c, self.c.embed_dim);
        let two_towers = matches!(self.family, Family::Clip | Family::Siglip);
        let Naming { patch, positions, .. } = self.family.naming();
        self.take(&format!("{patch}.weight"), "patch_embed.proj.weight")?;
        if c.patch_bias {
            self.take(&format!("{patch}.bias"), "patch_embed.proj.bias")?;
        }
        match self.family {
            Family::Siglip => {}
            Family::Clip => {
                self.put("embeddings.class_embedding", vec![d], vec![Part::All("cls_token".into())]);
                self.pair("pre_layrnorm", "norm_pre")?;
            }
            _ => self.take("embeddings.cls_token", "cls_token")?,
        }
        if c.dist_token {
            self.take("embeddings.distillation_token", "dist_token")?;
        }
        if self.family == Family::Registers {
            self.take("embeddings.register_tokens", "reg_token")?;
        }
        if matches!(self.family, Family::Dinov2 | Family::Registers) {
            // pretraining's, which no answer depends on
            self.put("embeddings.mask_token", vec![1, d], vec![Part::Zeros(d)]);
        }
        // positions cover every token but the registers; a token without one gets zeros
        let all = self.shape("pos_embed")?.iter().rev().nth(1).copied().unwrap_or(0);
        let prefix = c.num_prefix_tokens();
        let covered = prefix.saturating_sub(c.reg_tokens);
        let parts = match (c.no_embed_class, c.reg_tokens) {
            (true, _) => vec![Part::Zeros(covered.saturating_mul(d)), Part::All("pos_embed".into())],
            (false, 0) => vec![Part::All("pos_embed".into())],
            (false, _) => {
                return Err(Error::unsupported(
                    "--to hf: the registers have positions, which transformers' DINOv2 does not give them; --to timm holds them",
                ));
            }
        };
        let rows = c.num_patches().saturating_add(covered);
        if !c.no_embed_class && all != rows {
            return Err(Error::tensor("pos_embed", format!("has {all} rows, {rows} are expected")));
        }
        self.put(positions, if two_towers { vec![rows, d] } else { vec![1, rows, d] }, parts);
        Ok(())
    }

    fn block(&mut self, at: usize) -> Result<()> {
        let (c, d) = (self.c, self.c.embed_dim);
        let naming = self.family.naming();
        let (ours, layer) = (format!("blocks.{at}"), format!("{}.{at}", naming.layers));
        let [fc1, fc2] = naming.mlp(c.mlp);
        for (part, theirs) in naming.qkv.into_iter().enumerate() {
            for end in if c.qkv_bias { &["weight", "bias"][..] } else { &["weight"] } {
                let shape = if *end == "weight" { vec![d, d] } else { vec![d] };
                let rows = Part::Rows(format!("{ours}.attn.qkv.{end}"), part.saturating_mul(d), d, d.saturating_mul(3));
                self.put(&format!("{layer}.{theirs}.{end}"), shape, vec![rows]);
            }
        }
        for (name, theirs) in naming.block.into_iter().chain([("mlp.fc2", fc2)]) {
            self.pair(&format!("{layer}.{theirs}"), &format!("{ours}.{name}"))?;
        }
        if c.mlp == MlpKind::Swiglu {
            for end in ["weight", "bias"] {
                let halves = ["fc1_g", "fc1_x"].map(|half| format!("{ours}.mlp.{half}.{end}"));
                let mut shape = self.shape(&halves[0])?;
                if let Some(rows) = shape.first_mut() {
                    *rows = rows.saturating_mul(2);
                }
                self.put(&format!("{layer}.{fc1}.{end}"), shape, halves.map(Part::All).to_vec());
            }
        } else {
            self.pair(&format!("{layer}.{fc1}"), &format!("{ours}.mlp.fc1"))?;
        }
        if c.layer_scale {
            for (name, theirs) in naming.scales {
                self.take(&format!("{layer}.{theirs}"), &format!("{ours}.{name}"))?;
            }
        }
        Ok(())
    }

    /// SigLIP's head: q, k and v in one projection.
    fn attention_pool(&mut self) -> Result<()> {
        let d = self.c.embed_dim;
        self.put("head.probe", vec![1, 1, d], vec![Part::All("attn_pool.latent".into())]);
        for (end, shape) in [("weight", vec![d.saturating_mul(3), d]), ("bias", vec![d.saturating_mul(3)])] {
            let parts = ["q", "kv"].map(|part| Part::All(format!("attn_pool.{part}.{end}"))).to_vec();
            self.put(&format!("head.attention.in_proj_{end}"), shape, parts);
        }
        for (ours, theirs) in POOL {
            self.pair(theirs, ours)?;
        }
        Ok(())
    }
}

fn config(info: &ModelInfo, family: Family) -> Value {
    let c = &info.model;
    let head = c.num_classes > 0;
    let (model_type, architecture) = match family {
        Family::Vit => ("vit", if head { "ViTForImageClassification" } else { "ViTModel" }),
        Family::Deit => ("deit", "DeiTForImageClassificationWithTeacher"),
        Family::Dinov2 => ("dinov2", if head { "Dinov2ForImageClassification" } else { "Dinov2Model" }),
        Family::Registers => (
            "dinov2_with_registers",
            if head { "Dinov2WithRegistersForImageClassification" } else { "Dinov2WithRegistersModel" },
        ),
        Family::Clip => ("clip_vision_model", if head { "CLIPVisionModelWithProjection" } else { "CLIPVisionModel" }),
        Family::Siglip if head => ("siglip", "SiglipForImageClassification"),
        Family::Siglip => ("siglip_vision_model", "SiglipVisionModel"),
    };
    let side = |[h, w]: [usize; 2]| if h == w { json!(h) } else { json!([h, w]) };
    let act = match c.act {
        Activation::GeluTanh => json!("gelu_pytorch_tanh"),
        // transformers and timm share the other names
        other => json!(other),
    };
    let mut tower = json!({
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "hidden_act": act,
        "layer_norm_eps": c.ln_eps,
        "image_size": side(c.img_size),
        "patch_size": side(c.patch_size),
        "num_channels": c.in_chans,
        "attention_dropout": 0.0,
    });
    match family {
        Family::Dinov2 | Family::Registers => {
            tower["mlp_ratio"] = json!(ratio(c));
            tower["use_swiglu_ffn"] = json!(c.mlp != MlpKind::Mlp);
            tower["qkv_bias"] = json!(c.qkv_bias);
            if c.mlp != MlpKind::Mlp {
                tower["hidden_act"] = json!("gelu");
            }
            if family == Family::Registers {
                tower["num_register_tokens"] = json!(c.reg_tokens);
            }
        }
        _ => tower["intermediate_size"] = json!(c.mlp_hidden),
    }
    match family {
        Family::Vit | Family::Deit => tower["qkv_bias"] = json!(c.qkv_bias),
        Family::Clip if head => tower["projection_dim"] = json!(c.num_classes),
        _ => {}
    }
    if let Some(pre) = &c.pre_logits {
        tower["pooler_output_size"] = json!(pre.size);
        tower["pooler_act"] = json!(pre.act);
    }
    let mut doc = if model_type == "siglip" {
        tower["model_type"] = json!("siglip_vision_model");
        tower["vision_use_head"] = json!(false);
        json!({ "vision_config": tower })
    } else {
        tower
    };
    doc["architectures"] = json!([architecture]);
    doc["model_type"] = json!(model_type);
    if head && family != Family::Clip {
        let number = |k: usize| format!("LABEL_{k}");
        let labels: Vec<String> = info.labels.clone().unwrap_or_else(|| (0..c.num_classes).map(number).collect());
        let id2label: Map<String, Value> = labels.iter().enumerate().map(|(k, l)| (k.to_string(), json!(l))).collect();
        let label2id: BTreeMap<&String, usize> = labels.iter().enumerate().map(|(k, l)| (l, k)).collect();
        doc["id2label"] = Value::Object(id2label);
        doc["label2id"] = json!(label2id);
    }
    doc
}

/// The processor that does what `preprocess` says: an exact resize, one with a crop, or the shorter edge with a crop.
fn processor(p: &PreprocessConfig, notes: &mut Vec<String>) -> Result<Value> {
    let [_, h, w] = p.input_size;
    let filter = Interpolation::ALL.iter().position(|filter| *filter == p.interpolation);
    let scaled = |side: usize| (side as f64 / p.crop_pct).floor() as usize;
    let resize = match (p.resize, p.crop_mode) {
        (Some(resize), _) => resize,
        (None, CropMode::Center) if h == w => Resize::ShortestEdge(scaled(h)),
        (None, CropMode::Squash) => Resize::Exact([scaled(h), scaled(w)]),
        (None, mode) => {
            notes.push(format!(
                "preprocessor_config.json: no processor of transformers does crop_mode {mode} to {h}×{w}; this one resizes to it exactly"
            ));
            Resize::Exact([h, w])
        }
    };
    let size = |h: usize, w: usize| json!({ "height": h, "width": w });
    let (class, to, crop) = match resize {
        Resize::Exact([a, b]) if [a, b] == [h, w] => ("ViTImageProcessor", size(h, w), None),
        Resize::Exact([a, b]) => ("DeiTImageProcessor", size(a, b), Some(size(h, w))),
        Resize::ShortestEdge(edge) => ("CLIPImageProcessor", json!({ "shortest_edge": edge }), Some(size(h, w))),
        other => return Err(Error::unsupported(format!("--to hf: no processor of transformers resizes as {other:?}"))),
    };
    let mut doc = json!({
        "image_processor_type": class,
        "do_resize": true,
        "size": to,
        "resample": filter,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": p.mean,
        "image_std": p.std,
    });
    if let Some(crop) = crop {
        doc["do_center_crop"] = json!(true);
        doc["crop_size"] = crop;
    }
    Ok(doc)
}
