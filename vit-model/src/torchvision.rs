//! A state dict of torchvision's `VisionTransformer` → [`Checkpoint`]: all but the heads is read from names and shapes.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    Config, Error, ModelInfo, PreLogits, PreprocessConfig, Resize, Result,
    hf::{Names, Renamed},
    load::Checkpoint,
    names::Architecture,
    safetensors::Safetensors,
    weights::{TensorInfo, Weights},
};

type Tensors = BTreeMap<String, TensorInfo>;

/// Whether tensors are called as torchvision calls them.
pub(crate) fn is(tensors: &Tensors) -> bool {
    ["conv_proj.weight", "encoder.pos_embedding", "encoder.ln.weight"].iter().all(|name| tensors.contains_key(*name))
}

/// Reads a state dict; `num_heads` is needed where the width is none of torchvision's own models'.
pub(crate) fn open(file: Safetensors, num_heads: Option<usize>) -> Result<Checkpoint> {
    let path = file.path().to_owned();
    if let Some(other) = file.others().first() {
        return Err(Error::file(path, format!("tensor `{other}` is left over: not a tensor of weights")));
    }
    let info = info(file.tensors(), num_heads).map_err(|error| error.within(&path))?;
    let names = names(file.tensors(), &info.model);
    let weights = Renamed::new(Arc::new(file), names, &info.model).map_err(|error| error.within(&path))?;
    Checkpoint::new(info, Arc::new(weights)).map_err(|error| error.within(&path))
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
        return fail("encoder.pos_embedding", format!("{patches} patches are no square, as torchvision's are"));
    }
    let num_heads = match (num_heads, embed_dim) {
        (Some(heads), _) => heads,
        (None, 768) => 12,
        (None, 1024 | 1280) => 16,
        (None, _) => {
            return Err(Error::Unsupported(format!(
                "a state dict of torchvision's, {embed_dim} wide: its models are 768, 1024 and 1280 wide, and how many \
                 heads another has is not in its tensors; say so (vit-convert --num-heads N, load::torchvision)"
            )));
        }
    };
    let layer = |i: usize, name: &str| format!("encoder.layers.encoder_layer_{i}.{name}");
    let depth = (0..tensors.len()).take_while(|i| tensors.contains_key(&layer(*i, "ln_1.weight"))).count();
    let hidden = MLP.iter().find_map(|[fc1, _]| rows(&layer(0, &format!("{fc1}.weight"))));
    let plain = Architecture::of("vit_base_patch16_224").map(|plain| plain.config);
    let Some(plain) = plain else { return Err(Error::Config("the plain ViT has no name".into())) };
    let model = Config {
        img_size: [side.saturating_mul(ph), side.saturating_mul(pw)],
        patch_size: [ph, pw],
        in_chans,
        num_classes: rows("heads.head.weight").unwrap_or(0),
        embed_dim,
        depth,
        num_heads,
        mlp_hidden: hidden.unwrap_or(0),
        pre_logits: rows("heads.pre_logits.weight").map(|size| PreLogits { size, act: "tanh".into() }),
        ..plain
    };
    model.validate()?;
    Ok(ModelInfo {
        vit: 1,
        preprocess: preprocess(&model),
        model,
        labels: None,
        source: [("producer".into(), "torchvision".into())].into(),
        verified: None,
    })
}

/// As `ViT_*_Weights.IMAGENET1K_V1` say for 224 pixels, and `IMAGENET1K_SWAG_E2E_V1` for more.
fn preprocess(model: &Config) -> PreprocessConfig {
    let side = model.img_size[0];
    let (edge, interpolation) = match (model.embed_dim, model.patch_size[0], side) {
        (1024, 16, 224) => (242, "bilinear"),
        (_, _, 224) => (256, "bilinear"),
        _ => (side, "bicubic"),
    };
    let (mean, std) = match model.in_chans {
        3 => (vec![0.485, 0.456, 0.406], vec![0.229, 0.224, 0.225]),
        n => (vec![0.5; n], vec![0.5; n]),
    };
    PreprocessConfig {
        interpolation: interpolation.into(),
        crop_pct: 1.0,
        mean,
        std,
        resize: Some(Resize::ShortestEdge(edge)),
        torchvision: true,
        ..PreprocessConfig::for_config(model)
    }
}

/// The two layers of the MLP: today's names, and those of the published files.
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
