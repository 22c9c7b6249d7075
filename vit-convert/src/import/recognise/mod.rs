//! A canonical expression → the parts of a ViT, from the output down to the image. What does not fit is refused.

mod attention;
mod block;
mod embedding;
mod finder;
mod head;
mod mlp;
mod pooling;
#[cfg(test)]
mod tests;
mod trunk;

use std::collections::{BTreeMap, HashMap};

use vit_model::config::{Activation, Config, Pool, PreLogits};

use finder::Finder;
pub use finder::{Fit, Refusal};

use crate::import::array::Array;
use crate::import::eval::{View, Walk};
use crate::import::expr::{Channels, Exprs, Head, Id, Op};
use finder::refuse;

/// The parts of a ViT, found in one output of a graph.
#[derive(Debug)]
pub struct Parts {
    /// The architecture.
    pub config: Config,
    /// Tensors under timm's names.
    pub tensors: BTreeMap<String, Array>,
    /// Where the channels of the image are.
    pub channels: Channels,
    /// What the graph does to a pixel before the patch embedding: `(scale, shift)` for each channel; empty for nothing.
    pub pixels: Vec<(f64, f64)>,
    /// The activations on top of the logits, from below.
    pub heads: Vec<Head>,
    /// Expression → the module that it belongs to.
    pub owners: HashMap<Id, String>,
    /// The activation of every MLP, and where it is.
    pub acts: Vec<(Activation, Id)>,
    /// What was read from where: what, and the expression.
    pub evidence: Vec<(String, Id)>,
    /// Why a tensor differs from what is stored.
    pub rounded: Vec<String>,
    /// The output's expression, with the activations on top.
    pub top: Id,
    /// The answer below the activations, and its tokens that are read.
    pub core: Id,
    /// `(first, count)`: the tokens of `core` that are read, if that is a part of them.
    pub sel: Option<(usize, usize)>,
}

/// Finds the parts of a ViT in an output. `half`: the file holds numbers of 16 bits.
pub fn recognise(walk: &Walk<'_>, view: &View, half: bool) -> Fit<Parts> {
    let bytes = *walk.x.op(walk.image) == Op::Raw;
    parts(&walk.x, view, half, bytes)
}

/// As [`recognise`], in expressions over floats or (`bytes`) pixels of 8 bits.
fn parts(x: &Exprs, view: &View, half: bool, bytes: bool) -> Fit<Parts> {
    let mut finder = Finder::new(x, half);
    let (heads, core) = finder.activations(view)?;
    let e = core;
    let top = finder.classifier(e, view.sel)?;
    let pooling = finder.pooling(&top)?;
    let trunk = finder.trunk(pooling.below)?;
    let facts = &trunk.facts;
    let pre_norm = finder.is_norm(trunk.below);
    let mut e = trunk.below;
    if pre_norm {
        finder.norm(e, "norm_pre", false)?;
        e = finder.arg(e);
    }
    let embedding = finder.embedding(e)?;
    let patches = finder.patches(embedding.patch)?;
    let prefix = embedding.prefix();
    if let Some((first, count)) = pooling.range
        && (first, count) != (prefix, patches.count)
    {
        let (to, end) = (first + count, prefix + patches.count);
        return refuse(view.e, format!("tokens {first} to {to} are pooled, the patches are {prefix} to {end}"));
    }
    if matches!(pooling.pool, Pool::Token | Pool::TokenAvg) && prefix == 0 {
        return refuse(view.e, "the first token is read as a class token, and it is a patch");
    }
    if top.dist.is_some() && prefix != 2 {
        let why = format!(
            "two heads need a class and a distillation token, the graph has {prefix} tokens before the patches"
        );
        return refuse(view.e, why);
    }
    let no_embed_class = finder.positions(&embedding, top.dist.is_some())?;
    finder.patch(embedding.patch, bytes)?;
    if let Some(map) = &pooling.map {
        finder.map_tensors(map, facts)?;
    }
    if let Some(e) = pooling.fc_norm {
        finder.norm(e, "fc_norm", false)?;
    }
    if let Some(e) = pooling.final_norm {
        finder.norm(e, "norm", false)?;
    }
    finder.classifier_tensors(&top, pooling.turned)?;
    let (eps, act) = agreed(&finder, view.e)?;
    let mut config =
        Config::vit(patches.img_size, patches.patch_size, finder.width(trunk.below), trunk.depth, facts.heads);
    config.in_chans = patches.in_chans;
    config.num_classes = top.head.map_or(0, |e| finder.width(e));
    config.mlp_hidden = facts.hidden;
    config.mlp = facts.mlp;
    config.act = act;
    config.ln_eps = eps;
    config.patch_bias = finder.tensors.contains_key("patch_embed.proj.bias");
    config.qkv_bias = trunk.biases.qkv;
    config.proj_bias = trunk.biases.proj;
    config.qk_norm = facts.qk_norm;
    config.class_token = prefix > 0;
    config.dist_token = top.dist.is_some();
    config.reg_tokens = if top.dist.is_some() { 0 } else { prefix.saturating_sub(1) };
    config.no_embed_class = no_embed_class;
    config.pos_embed = embedding.pos.is_some();
    config.pre_norm = pre_norm;
    config.final_norm = pooling.final_norm.is_some() || pooling.fc_norm.is_some();
    config.fc_norm = pooling.fc_norm.is_some();
    config.layer_scale = facts.layer_scale;
    config.global_pool = pooling.pool;
    config.pre_logits = top.pre_logits.map(|e| PreLogits::tanh(finder.width(e)));
    config.head_bias = top.head.iter().chain(&top.dist).any(|&e| finder.has_bias(e));
    finder.fill_biases(&config).map_err(|e| Refusal { at: Some(view.e), why: e.to_string() })?;
    let Finder { tensors, owners, acts, evidence, rounded, .. } = finder;
    let (channels, pixels) = (patches.channels, patches.pixels);
    let (top, sel) = (view.e, view.sel);
    Ok(Parts { config, tensors, channels, pixels, heads, owners, acts, evidence, rounded, top, core, sel })
}

/// The epsilon of all norms and the activation of all MLPs: timm has one of each for a model.
fn agreed(finder: &Finder<'_>, output: Id) -> Fit<(f64, Activation)> {
    if finder.eps.len() > 1 {
        let list: Vec<String> = finder.eps.keys().map(|&b| format!("{:e}", f64::from_bits(b))).collect();
        let at = finder.eps.values().max().copied().unwrap_or(output);
        return refuse(at, format!("the norms differ in epsilon: {}", list.join(", ")));
    }
    let (Some(&eps), Some(&(act, _))) = (finder.eps.keys().next(), finder.acts.first()) else {
        return refuse(output, "a model without norms");
    };
    if let Some((other, at)) = finder.acts.iter().find(|a| a.0 != act) {
        return refuse(*at, format!("the activations differ: {act:?} and {other:?}"));
    }
    Ok((f64::from_bits(eps), act))
}
