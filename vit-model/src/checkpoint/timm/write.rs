//! A model → a folder that `timm.create_model("local-dir:…", pretrained=True)` opens: timm's tensors and `config.json`.
//!
//! timm builds a model from an architecture's name and arguments that override it. Classes cannot be arguments, so the name
//! is chosen for what only a class says (ε, packed SwiGLU, distillation), and every other switch is spelled out.

// the numbers are those of a `Config` that `validate` has bounded, and the JSON that is indexed was made here
#![allow(clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::sync::Arc;

use crate::{Activation, Config, CropMode, Error, MlpKind, ModelInfo, Pool, Result, Weights};
use serde_json::{Value, json};

use crate::checkpoint::views::{Part, Views};
use crate::checkpoint::written::Folder;

/// What goes into the folder.
///
/// # Errors
/// A model that timm has no arguments for; the error says which switch, and to write a `.safetensors` file instead.
pub(in crate::checkpoint) fn folder(info: &ModelInfo, weights: &Arc<dyn Weights>) -> Result<Folder> {
    let mut notes = Vec::new();
    let (info, weights) = rewritten(info, weights)?;
    let c = &info.model;
    let architecture = architecture(c, &mut notes)?;
    let p = &info.preprocess;
    if p.resize.is_some() {
        notes.push("config.json: timm has no such resize; crop_pct and crop_mode stand in for it".into());
    }
    let mut config = json!({
        "architecture": architecture,
        "num_classes": c.num_classes,
        "num_features": c.embed_dim,
        "global_pool": c.global_pool,
        "model_args": arguments(c),
        "pretrained_cfg": {
            "tag": "",
            "custom_load": false,
            "input_size": p.input_size,
            "fixed_input_size": true,
            "interpolation": p.interpolation,
            "crop_pct": p.crop_pct,
            "crop_mode": if p.crop_mode == CropMode::None { CropMode::Center } else { p.crop_mode },
            "mean": p.mean,
            "std": p.std,
            "num_classes": c.num_classes,
            "pool_size": null,
            "first_conv": "patch_embed.proj",
            "classifier": if c.dist_token { json!(["head", "head_dist"]) } else { json!("head") },
        },
    });
    if let Some(labels) = &info.labels {
        config["label_names"] = json!(labels);
    }
    Ok(Folder { info: Some(info), weights, files: vec![("config.json", config)], notes })
}

/// The same function, spelled as timm spells it: a bias that timm always has is zero, and gate and value are one linear.
fn rewritten(info: &ModelInfo, weights: &Arc<dyn Weights>) -> Result<(ModelInfo, Arc<dyn Weights>)> {
    let mut info = info.clone();
    let mut to = Views::all(weights.clone());
    let mut changed = false;
    let c = &mut info.model;
    let missing = |name: &str| Error::tensor(name, "missing");
    if c.num_classes > 0 && !c.head_bias {
        to.add("head.bias", vec![c.num_classes], vec![Part::Zeros(c.num_classes)]);
        (c.head_bias, changed) = (true, true);
    }
    if !c.patch_bias && !c.pre_norm {
        to.add("patch_embed.proj.bias", vec![c.embed_dim], vec![Part::Zeros(c.embed_dim)]);
        (c.patch_bias, changed) = (true, true);
    }
    if c.mlp == MlpKind::Swiglu {
        for block in 0..c.depth {
            let name = |part: &str, end: &str| format!("blocks.{block}.mlp.{part}.{end}");
            for end in ["weight", "bias"] {
                let (gate, value) = (name("fc1_g", end), name("fc1_x", end));
                let mut shape = to.shape_of(&gate).ok_or_else(|| missing(&gate))?;
                if let Some(rows) = shape.first_mut() {
                    *rows = rows.saturating_mul(2);
                }
                to.add(name("fc1", end), shape, vec![Part::All(gate.clone()), Part::All(value.clone())]);
                to.remove(&gate);
                to.remove(&value);
            }
        }
        c.mlp = MlpKind::SwigluPacked;
        c.mlp_hidden = c.mlp_hidden.saturating_mul(2);
        changed = true;
    }
    Ok((info, if changed { Arc::new(to) } else { weights.clone() }))
}

/// The name whose class has what arguments cannot say.
fn architecture(c: &Config, notes: &mut Vec<String>) -> Result<&'static str> {
    let refuse = |what: &str| {
        Err(Error::unsupported(format!(
            "timm has no Vision Transformer with {what}: write a .safetensors file, which this toolkit reads, instead of a folder"
        )))
    };
    if c.pre_logits.is_some() {
        return refuse("a linear and tanh before the head");
    }
    if c.global_pool == Pool::TokenAvg {
        return refuse("a head over the class token and the mean of the others (--to hf writes DINOv2's)");
    }
    if c.pre_norm && c.patch_bias {
        return refuse("a norm before the blocks and a bias in the patch embedding");
    }
    if c.later_switches().iter().any(|switch| switch != "pool_include_prefix") {
        return refuse("this wiring and an architecture of another size");
    }
    let near = |eps: f64| (c.ln_eps / eps - 1.0).abs() < 0.05;
    let name = match (c.mlp, c.dist_token) {
        (MlpKind::Mlp, false) if near(1e-5) => return Ok("vit_base_patch16_clip_224"),
        (MlpKind::Mlp, false) => "vit_base_patch16_224",
        (MlpKind::Mlp, true) => "deit_base_distilled_patch16_224",
        (MlpKind::SwigluPacked, false) if c.act == Activation::Silu => "vit_giant_patch14_dinov2",
        _ => return refuse("this MLP"),
    };
    if c.ln_eps > 1.05e-6 {
        return refuse(&format!("an ε of {:e}", c.ln_eps));
    }
    if !near(1e-6) {
        notes.push(format!("config.json: timm computes with an ε of 1e-6, model.safetensors keeps {:e}", c.ln_eps));
    }
    Ok(name)
}

/// Every argument of timm's `VisionTransformer`.
fn arguments(c: &Config) -> Value {
    let ratio = c.mlp_hidden as f64 / c.embed_dim as f64;
    // timm rounds the product down
    let exact = (c.embed_dim as f64 * ratio) as usize == c.mlp_hidden;
    let ratio = if exact { ratio } else { (c.mlp_hidden as f64 + 0.5) / c.embed_dim as f64 };
    let mut args = json!({
        "img_size": c.img_size,
        "patch_size": c.patch_size,
        "in_chans": c.in_chans,
        "embed_dim": c.embed_dim,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "mlp_ratio": ratio,
        "qkv_bias": c.qkv_bias,
        "qk_norm": c.qk_norm,
        "proj_bias": c.proj_bias,
        "init_values": if c.layer_scale { json!(1e-5) } else { Value::Null },
        "class_token": c.class_token,
        "pos_embed": if c.pos_embed { "learn" } else { "none" },
        "no_embed_class": c.no_embed_class,
        "reg_tokens": c.reg_tokens,
        "pre_norm": c.pre_norm,
        "final_norm": c.final_norm,
        "fc_norm": c.fc_norm,
        "global_pool": c.global_pool,
        "pool_include_prefix": c.pool_include_prefix,
    });
    // the name that packed SwiGLU needs brings its activation along, as a class
    if c.mlp == MlpKind::Mlp {
        args["act_layer"] = json!(c.act);
    }
    args
}
