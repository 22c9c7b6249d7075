//! The names of original repositories (OpenAI's CLIP, `open_clip`, DINO, DINOv2, MAE, DeiT III, AIMv2) → timm's names, as the
//! `checkpoint_filter_fn` of timm's vision_transformer.py maps them.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    stored::Stored,
    views::{Part, Views},
};
use crate::{Config, Result, layers::parameters};

/// Parts of a training checkpoint that no Vision Transformer's output depends on: mask tokens, the decoder of MAE, and the
/// heads of DINO, DINOv2 and their students.
const PRETRAINING: [&str; 12] = [
    "mask_token",
    "decoder_",
    "decoder.",
    "dino_head.",
    "ibot_head.",
    "head.mlp.",
    "head.last_layer.",
    "projectors.",
    "dino_loss.",
    "ibot_patch_loss.",
    "logit_scale",
    "logit_bias",
];

/// Integers that original repositories store beside the weights.
const NUMBERS: [&str; 5] = ["input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask"];

/// Whether the tensors are those of OpenAI's CLIP or of `open_clip`'s own tower.
pub(super) fn is_clip(stored: &Stored) -> bool {
    let has = |name: &str| stored.weights.tensors().contains_key(name);
    has("visual.conv1.weight") && has("visual.class_embedding")
}

/// Whether the tensors are those of an `open_clip` model with a tower of timm's.
pub(super) fn is_trunk(stored: &Stored) -> bool {
    stored.weights.tensors().contains_key("visual.trunk.patch_embed.proj.weight")
}

/// Gives the tensors timm's names. What has no place keeps its name, so that it is found to be left over.
pub(super) fn timm_names(stored: &mut Stored, model: &Config) -> Result<()> {
    let expected = parameters(model)?;
    stored.others.retain(|name| !NUMBERS.iter().any(|number| name == number || name.ends_with(&format!(".{number}"))));
    if expected.keys().all(|name| stored.weights.tensors().contains_key(name))
        && stored.weights.tensors().len() == expected.len()
    {
        return Ok(());
    }
    let found = stored.weights.tensors();
    let has = |name: &str| found.contains_key(name);
    let (clip, trunk) = (is_clip(stored), is_trunk(stored));
    // a tower, whose neighbours are another tower or heads
    let tower = ["visual.trunk.", "visual.", "backbone.", ""].into_iter().find(|prefix| match *prefix {
        "visual.trunk." => trunk,
        "visual." => clip,
        prefix => {
            has(&format!("{prefix}patch_embed.proj.weight"))
                || has(&format!("{prefix}preprocessor.patchifier.proj.weight"))
        }
    });
    let tower = tower.unwrap_or_default();
    let aim = has(&format!("{tower}preprocessor.patchifier.proj.weight"));
    let mut views = Views::new(stored.weights.clone());
    let mut dropped = Vec::new();
    let mut renamed = false;
    let shape_of = |name: &str| found.get(name).map(|info| info.shape.clone()).unwrap_or_default();
    for name in found.keys() {
        let bare = match name.strip_prefix(tower) {
            Some(bare) => bare,
            // the projection of open_clip's wrapper is the head
            None if trunk && name.starts_with("visual.head.proj.") && model.num_classes > 0 => {
                let ours = name.replace("visual.head.proj.", "head.");
                views.add(ours, shape_of(name), vec![Part::All(name.clone())]);
                continue;
            }
            None if trunk || clip => continue, // the text tower
            // a head beside the backbone
            None => name,
        };
        let ours = match bare.strip_prefix("ln_post.") {
            // the last norm, which open_clip can apply after pooling
            Some(end) if clip && model.fc_norm => format!("fc_norm.{end}"),
            _ if clip => clip_name(bare),
            _ => own_name(bare, aim),
        };
        let shape = shape_of(name);
        if ours == "head.weight" && clip {
            if let [rows, columns] = *shape
                && model.num_classes > 0
            {
                views.add(ours, vec![columns, rows], vec![Part::Transposed(name.clone(), rows, columns)]);
            }
            continue;
        }
        let known = expected.get(&ours);
        if known.is_none() && PRETRAINING.iter().any(|start| bare.starts_with(start)) {
            dropped.push(name.clone());
            continue;
        }
        // tokens and positions without leading axes, and a patch embedding that is a linear layer
        let count = |shape: &[usize]| shape.iter().fold(1usize, |n, &d| n.saturating_mul(d));
        let reshapes = ours == "cls_token" || ours == "pos_embed" || ours == "patch_embed.proj.weight";
        let shape = match known {
            Some(known) if reshapes && count(known) == count(&shape) => known.clone(),
            _ if clip && ours == "pos_embed" => [&[1], shape.as_slice()].concat(),
            _ => shape,
        };
        renamed |= ours != *name;
        views.add(ours, shape, vec![Part::All(name.clone())]);
    }
    if clip && model.head_bias && model.num_classes > 0 {
        views.add("head.bias", vec![model.num_classes], vec![Part::Zeros(model.num_classes)]);
    }
    if trunk && model.head_bias && model.num_classes > 0 && !views.has("head.bias") {
        views.add("head.bias", vec![model.num_classes], vec![Part::Zeros(model.num_classes)]);
    }
    registers(&mut views, tower, &expected, model);
    if clip {
        stored.remarks.push("tensors with the names of OpenAI's CLIP were given timm's".into());
    } else if renamed {
        stored.remarks.push("tensors with the names of their original repository were given timm's".into());
    }
    if !dropped.is_empty() {
        let more = match dropped.len().saturating_sub(1) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let first = dropped.first().map_or("", String::as_str);
        stored.remarks.push(format!("`{first}`{more} only matter in training and were left out"));
    }
    stored.weights = Arc::new(views);
    Ok(())
}

/// In DINOv2 with registers, the first row of the positions belongs to the class token, and timm adds it to that.
fn registers(views: &mut Views, tower: &str, expected: &BTreeMap<String, Vec<usize>>, model: &Config) {
    let class = format!("{tower}cls_token");
    let positions = format!("{tower}pos_embed");
    if !views.has("register_tokens") || model.reg_tokens == 0 || !model.no_embed_class {
        return;
    }
    let (Some(tokens), Some(rows)) = (views.shape_of(&format!("{tower}register_tokens")), views.shape_of(&positions))
    else {
        return;
    };
    let &[one, all, width] = rows.as_slice() else { return };
    let (Some(patches), Some(class_shape)) = (all.checked_sub(1), expected.get("cls_token")) else { return };
    views.remove("register_tokens");
    views.add("reg_token", tokens, vec![Part::All(format!("{tower}register_tokens"))]);
    views.add("pos_embed", vec![one, patches, width], vec![Part::Rows(positions.clone(), 1, patches, all)]);
    views.add("cls_token", class_shape.clone(), vec![Part::ClassPlusPosition { class, positions }]);
}

/// timm's name for one of OpenAI's, without the tower's prefix.
fn clip_name(name: &str) -> String {
    match name {
        "proj" => return "head.weight".into(),
        "class_embedding" => return "cls_token".into(),
        "positional_embedding" => return "pos_embed".into(),
        _ => {}
    }
    const SWAPS: [(&str, &str); 9] = [
        ("conv1.", "patch_embed.proj."),
        ("transformer.resblocks.", "blocks."),
        ("ln_pre.", "norm_pre."),
        ("ln_post.", "norm."),
        ("ln_", "norm"),
        ("in_proj_", "qkv."),
        ("out_proj.", "proj."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
    ];
    SWAPS.iter().fold(name.replace("ls_", "ls"), |name, (theirs, ours)| name.replace(theirs, ours))
}

/// timm's name for one of DINOv2, DeiT III or AIMv2.
fn own_name(name: &str, aim: bool) -> String {
    if aim {
        const SWAPS: [(&str, &str); 8] = [
            ("norm_1", "norm1"),
            ("norm_2", "norm2"),
            ("preprocessor.patchifier.", "patch_embed."),
            ("preprocessor.pos_embed", "pos_embed"),
            ("post_trunk_norm.", "norm."),
            ("trunk.", ""),
            ("mlp.fc1", "mlp.fc1_g"),
            ("mlp.fc3", "mlp.fc1_x"),
        ];
        return SWAPS.iter().fold(name.to_owned(), |name, (theirs, ours)| name.replace(theirs, ours));
    }
    let Some(rest) = name.strip_prefix("blocks.") else { return name.to_owned() };
    let mut parts: Vec<&str> = rest.split('.').collect();
    // DINOv2 trains with chunks of blocks: `blocks.1.7.norm1` is block 7
    let number =
        |part: Option<&&str>| part.is_some_and(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    if number(parts.first()) && number(parts.get(1)) {
        parts.remove(0);
    }
    let rest = parts.join(".");
    let rest = rest.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.");
    let rest = rest.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma");
    format!("blocks.{rest}")
}
