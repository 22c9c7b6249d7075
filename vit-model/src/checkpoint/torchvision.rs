//! Opens a state dict of torchvision's `VisionTransformer` as a [`Checkpoint`]. Names and shapes determine everything except
//! the number of heads.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    Config, Error, Interpolation, ModelInfo, Origin, PreLogits, PreprocessConfig, Resize, Result,
    checkpoint::model::Checkpoint, checkpoint::stored::Stored, checkpoint::transformers::Names, weights::TensorInfo,
};

type Tensors = BTreeMap<String, TensorInfo>;

/// Whether the tensors have torchvision's names.
pub(crate) fn is(tensors: &Tensors) -> bool {
    ["conv_proj.weight", "encoder.pos_embedding", "encoder.ln.weight"].iter().all(|name| tensors.contains_key(*name))
}

/// Opens a state dict. `num_heads` is needed if the width is not one that torchvision's own models have.
pub(crate) fn open(stored: &Stored, num_heads: Option<usize>) -> Result<Checkpoint> {
    let path = &stored.path;
    if let Some(other) = stored.others.first() {
        return Err(Error::file(path, format!("tensor `{other}` is left over: not a tensor of weights")));
    }
    let info = info(stored.weights.tensors(), num_heads).map_err(|error| error.within(path))?;
    let names = names(stored.weights.tensors(), &info.model);
    let weights = names.views(&stored.weights, &info.model).map_err(|error| error.within(path))?;
    Checkpoint::new(info, Arc::new(weights)).map_err(|error| error.within(path))
}

fn info(tensors: &Tensors, num_heads: Option<usize>) -> Result<ModelInfo> {
    let shape = |name: &str| tensors.get(name).map(|info| info.shape.as_slice());
    let rows = |name: &str| shape(name).and_then(|shape| shape.first()).copied();
    let fail = |name: &str, why: String| Err(Error::tensor(name, why));
    let Some(&[embed_dim, in_chans, ph, pw]) = shape("conv_proj.weight") else {
        return fail("conv_proj.weight", "must have four dimensions: width, channels, height, width of a patch".into());
    };
    let Some(&[1, tokens, _]) = shape("encoder.pos_embedding") else {
        return fail("encoder.pos_embedding", "must be [1, tokens, width]".into());
    };
    let patches = tokens.saturating_sub(1);
    let side = patches.isqrt();
    if side.checked_mul(side) != Some(patches) {
        return fail("encoder.pos_embedding", format!("{patches} patches do not make a square, as torchvision's do"));
    }
    let num_heads = match (num_heads, embed_dim) {
        (Some(heads), _) => heads,
        (None, 768) => 12,
        (None, 1024 | 1280) => 16,
        (None, _) => {
            return Err(Error::unsupported(format!(
                "a torchvision state dict of width {embed_dim}: torchvision's own models have width 768, 1024 or 1280, and \
                 the tensors of others do not tell their number of heads; give it (vit-convert --num-heads N, \
                 checkpoint::torchvision)"
            )));
        }
    };
    let layer = |i: usize, name: &str| format!("encoder.layers.encoder_layer_{i}.{name}");
    let depth = (0..tensors.len()).take_while(|i| tensors.contains_key(&layer(*i, "ln_1.weight"))).count();
    let hidden = MLP.iter().find_map(|[fc1, _]| rows(&layer(0, &format!("{fc1}.weight"))));
    let model = Config {
        in_chans,
        num_classes: rows("heads.head.weight").unwrap_or(0),
        mlp_hidden: hidden.unwrap_or(0),
        pre_logits: rows("heads.pre_logits.weight").map(PreLogits::tanh),
        ..Config::vit([side.saturating_mul(ph), side.saturating_mul(pw)], [ph, pw], embed_dim, depth, num_heads)
    };
    model.validate()?;
    let preprocess = preprocess(&model);
    Ok(ModelInfo::new(model, preprocess).from_source(Origin::new().with_producer("torchvision")))
}

/// The preprocessing of `ViT_*_Weights.IMAGENET1K_V1` for 224 pixels, and of `IMAGENET1K_SWAG_E2E_V1` for other sizes.
fn preprocess(model: &Config) -> PreprocessConfig {
    let side = model.img_size[0];
    let (edge, interpolation) = match (model.embed_dim, model.patch_size[0], side) {
        (1024, 16, 224) => (242, Interpolation::Bilinear),
        (_, _, 224) => (256, Interpolation::Bilinear),
        _ => (side, Interpolation::Bicubic),
    };
    let (mean, std) = match model.in_chans {
        3 => (vec![0.485, 0.456, 0.406], vec![0.229, 0.224, 0.225]),
        n => (vec![0.5; n], vec![0.5; n]),
    };
    PreprocessConfig {
        interpolation,
        crop_pct: 1.0,
        mean,
        std,
        resize: Some(Resize::ShortestEdge(edge)),
        torchvision: true,
        ..PreprocessConfig::for_config(model)
    }
}

/// The names of the MLP's two layers: the current ones, and those in the published files.
const MLP: [[&str; 2]; 2] = [["mlp.0", "mlp.3"], ["mlp.linear_1", "mlp.linear_2"]];

fn names(tensors: &Tensors, model: &Config) -> Names {
    let mut names = Names::default();
    names.take("cls_token", "class_token");
    names.take("pos_embed", "encoder.pos_embedding");
    names.linear("patch_embed.proj", "conv_proj", true);
    names.linear("norm", "encoder.ln", true);
    for i in 0..model.depth {
        let (ours, theirs) = (format!("blocks.{i}"), format!("encoder.layers.encoder_layer_{i}"));
        for end in ["weight", "bias"] {
            names.take(&format!("{ours}.attn.qkv.{end}"), &format!("{theirs}.self_attention.in_proj_{end}"));
        }
        let is_there = |[fc1, _]: &&[&str; 2]| tensors.contains_key(&format!("{theirs}.{fc1}.weight"));
        let [fc1, fc2] = MLP.iter().find(is_there).copied().unwrap_or(MLP[0]);
        let parts = [
            ("norm1", "ln_1"),
            ("attn.proj", "self_attention.out_proj"),
            ("norm2", "ln_2"),
            ("mlp.fc1", fc1),
            ("mlp.fc2", fc2),
        ];
        for (name, theirs_name) in parts {
            names.linear(&format!("{ours}.{name}"), &format!("{theirs}.{theirs_name}"), true);
        }
    }
    if model.pre_logits.is_some() {
        names.linear("pre_logits.fc", "heads.pre_logits", true);
    }
    if model.num_classes > 0 {
        names.linear("head", "heads.head", true);
    }
    names
}
