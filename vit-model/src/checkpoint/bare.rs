//! A state dict without a configuration: the architecture is named by the user, or is the only one of timm's that has these
//! tensors.

use std::collections::BTreeMap;

use super::{original, stored::Stored};
use crate::{
    Config, Error, ModelInfo, Origin, PreprocessConfig, Result,
    layers::parameters,
    names::{self, Architecture},
    weights::TensorInfo,
};

/// Gives the state dict timm's names and finds its document. `arch` is the name of an architecture, if the user gave one.
///
/// # Errors
/// If no architecture has these tensors, or if several have and none was named.
pub(super) fn info(stored: &mut Stored, arch: Option<&str>) -> Result<ModelInfo> {
    let path = stored.path.clone();
    let named = match arch {
        Some(name) => {
            let Some(architecture) = Architecture::of(name) else {
                let near = names::nearest(name).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
                return Err(Error::unsupported(format!(
                    "the architecture {name:?}: timm's vision_transformer.py and deit.py have none{near}"
                )));
            };
            Some((name, architecture))
        }
        None => None,
    };
    let (name, model) = match named {
        Some((name, architecture)) => (name, sized(architecture.config, stored)),
        None => guessed(stored)?,
    };
    original::timm_names(stored, &model).map_err(|error| error.within(&path))?;
    let preprocess = PreprocessConfig::for_config(&model);
    let source = Origin::new().with_producer("timm").with_architecture(name);
    let mut info = ModelInfo::new(model, preprocess).from_source(source);
    if arch.is_none() {
        info = info.assuming(format!(
            "architecture: {name} (the file does not say; of timm's names, only those of this network have its tensors; --arch \
             names another)"
        ));
    }
    Ok(info.assuming_preprocess("the file does not say; a config.json beside it or vit-convert --preprocess does"))
}

/// The only architecture whose tensors these are. Names that mean the same configuration count once.
fn guessed(stored: &Stored) -> Result<(&'static str, Config)> {
    let mut fits: Vec<(&'static str, Config)> = Vec::new();
    // of two names for the same network, that of vision_transformer.py is told
    let mut all = names::all();
    all.sort_by_key(|name| !name.starts_with("vit_"));
    for name in all {
        let Some(architecture) = Architecture::of(name) else { continue };
        let model = sized(architecture.config, stored);
        if fits.iter().any(|(_, other)| *other == model) || !may_fit(&model, stored) {
            continue;
        }
        let mut tried = stored.again();
        if original::timm_names(&mut tried, &model).is_ok() && fit(&model, tried.weights.tensors()) {
            fits.push((name, model));
        }
    }
    match fits.as_slice() {
        [] => Err(Error::file(
            &stored.path,
            "carries no configuration, and its tensors are not those of one of timm's architectures in their usual size. Put \
             the model's config.json beside it, or name the architecture with --arch",
        )),
        [one] => Ok(one.clone()),
        several => {
            let names: Vec<&str> = several.iter().map(|(name, _)| *name).take(8).collect();
            Err(Error::file(
                &stored.path,
                format!(
                    "carries no configuration, and {} of timm's architectures have its tensors: {}{}. Name the right one with \
                     --arch",
                    several.len(),
                    names.join(", "),
                    if several.len() > names.len() { ", …" } else { "" }
                ),
            ))
        }
    }
}

/// Whether the depth and the width are those of the file, which excludes almost every name without mapping tensors.
fn may_fit(model: &Config, stored: &Stored) -> bool {
    let block = |i: usize| {
        stored.weights.tensors().keys().any(|name| {
            name.contains(&format!("blocks.{i}.")) && !name.starts_with("decoder") && !name.starts_with("transformer.")
        })
    };
    let width = stored.weights.tensors().iter().find(|(name, _)| {
        name.ends_with("patch_embed.proj.weight")
            || name.ends_with("visual.conv1.weight")
            || name.ends_with("patchifier.proj.weight")
    });
    width.and_then(|(_, info)| info.shape.first()) == Some(&model.embed_dim)
        && block(model.depth.saturating_sub(1))
        && !block(model.depth)
}

fn fit(model: &Config, tensors: &BTreeMap<String, TensorInfo>) -> bool {
    parameters(model).is_ok_and(|expected| {
        expected.len() == tensors.len()
            && expected.iter().all(|(name, shape)| tensors.get(name).is_some_and(|info| info.shape == *shape))
    })
}

/// The architecture with the classes, channels and image size of the file, which a name does not fix.
fn sized(mut model: Config, stored: &Stored) -> Config {
    let tensors = stored.weights.tensors();
    let found = |ends: &[&str]| {
        let is = |name: &&String| {
            ends.iter().any(|end| name.strip_suffix(end).is_some_and(|start| start.is_empty() || start.ends_with('.')))
                && !name.starts_with("decoder")
        };
        tensors.iter().find(|(name, _)| is(name)).map(|(_, info)| info.shape.as_slice())
    };
    model.num_classes = match (found(&["head.weight", "visual.head.proj.weight"]), tensors.get("visual.proj")) {
        (Some([classes, _]), _) => *classes,
        (_, Some(TensorInfo { shape, .. })) => shape.get(1).copied().unwrap_or(0),
        _ => 0,
    };
    if let Some([_, channels, _, _]) = found(&["patch_embed.proj.weight", "conv1.weight"]) {
        model.in_chans = *channels;
    }
    let rows = found(&["pos_embed", "visual.positional_embedding"]).and_then(|shape| shape.iter().rev().nth(1));
    let registers = found(&["register_tokens"]).is_some() && model.no_embed_class;
    if let Some(rows) = rows {
        let prefix = if registers { 1 } else { model.pos_embed_prefix() };
        let patches = rows.saturating_sub(prefix);
        let side = patches.isqrt();
        if patches != model.num_patches() && side.checked_mul(side) == Some(patches) {
            let [h, w] = model.patch_size;
            model.img_size = [side.saturating_mul(h), side.saturating_mul(w)];
        }
    }
    model
}
