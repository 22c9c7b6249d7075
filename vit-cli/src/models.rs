//! `models`: checkpoints that are worth knowing by a short name, and what the cache holds.

use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;
use vit_model::hub::{Cached, Hub};

use crate::args::ModelsArgs;
use crate::output::{Stdout, escape, json_pretty, show};

/// Short name, repository, what it is for. One of each size and family that this project's tests cover the format of.
const KNOWN: [(&str, &str, &str); 20] = [
    ("vit-tiny", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "1000 classes, 6 M parameters"),
    ("vit-small", "timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "1000 classes, 22 M"),
    ("vit-base", "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "1000 classes, 87 M"),
    ("vit-large", "timm/vit_large_patch16_224.augreg_in21k_ft_in1k", "1000 classes, 304 M"),
    ("vit-base-google", "google/vit-base-patch16-224", "1000 classes, 87 M, transformers' format"),
    ("vit-base-in21k", "timm/vit_base_patch16_224.augreg_in21k", "21843 classes, 103 M, to fine-tune"),
    ("deit-tiny", "timm/deit_tiny_patch16_224.fb_in1k", "1000 classes, 6 M"),
    ("deit-small", "timm/deit_small_patch16_224.fb_in1k", "1000 classes, 22 M"),
    ("deit-base-distilled", "facebook/deit-base-distilled-patch16-224", "1000 classes, 87 M, two heads"),
    ("deit3-base", "timm/deit3_base_patch16_224.fb_in22k_ft_in1k", "1000 classes, 87 M"),
    ("dinov2-small", "timm/vit_small_patch14_dinov2.lvd142m", "features, 22 M, 518 px"),
    ("dinov2-base", "timm/vit_base_patch14_dinov2.lvd142m", "features, 87 M, 518 px"),
    ("dinov2-base-hf", "facebook/dinov2-base", "features, 87 M, transformers' format"),
    ("dinov2-reg-base", "timm/vit_base_patch14_reg4_dinov2.lvd142m", "features with clean attention maps, 87 M"),
    ("dinov2-reg-small-hf", "facebook/dinov2-with-registers-small", "features with clean attention maps, 22 M"),
    ("clip-base32", "openai/clip-vit-base-patch32", "CLIP's image tower, 88 M"),
    ("clip-base16", "openai/clip-vit-base-patch16", "CLIP's image tower, 86 M"),
    ("siglip-base", "google/siglip-base-patch16-224", "SigLIP's image tower, 93 M"),
    ("siglip-so400m", "google/siglip-so400m-patch14-384", "SigLIP's image tower, 428 M, 384 px"),
    ("mae-base", "facebook/vit-mae-base", "MAE's encoder, features to fine-tune, 86 M"),
];

/// The repository of a short name.
pub fn repository(short: &str) -> Option<&'static str> {
    KNOWN.iter().find(|(name, ..)| *name == short).map(|(_, id, _)| *id)
}

pub fn run(args: &ModelsArgs) -> anyhow::Result<()> {
    let hub = Hub::from_env()?;
    let cached = hub.list();
    let mut out = Stdout::new();
    out.write(&if args.json { json_pretty(&report(&hub, &cached))? + "\n" } else { tables(&hub, &cached) })?;
    out.flush()
}

fn report(hub: &Hub, cached: &[Cached]) -> serde_json::Value {
    let known = KNOWN.map(|(name, repository, what)| {
        json!({ "name": name, "repository": repository, "what": what, "cached": size(cached, repository).is_some() })
    });
    let cached = cached.iter().map(|c| {
        let (repository, revision) = (c.id.name(), c.id.revision());
        json!({ "repository": repository, "revision": revision, "folder": c.folder.to_string_lossy(), "bytes": c.bytes })
    });
    json!({ "known": known, "cache": hub.cache().to_string_lossy(), "cached": cached.collect::<Vec<_>>() })
}

/// Bytes of a repository in the cache, at any revision.
fn size(cached: &[Cached], repository: &str) -> Option<u64> {
    cached.iter().find(|c| c.id.name() == repository).map(|c| c.bytes)
}

fn tables(hub: &Hub, cached: &[Cached]) -> String {
    let megabytes = |bytes: u64| format!("{} MB", bytes.div_ceil(1_000_000));
    let mut known = Table::new();
    known.load_style(presets::NOTHING).set_header(["name", "repository", "what", "cached"]);
    for (name, repository, what) in KNOWN {
        known.add_row([name, repository, what, &size(cached, repository).map_or_else(String::new, megabytes)]);
    }
    let mut text = format!("{}\n\n", known.trim_fmt());
    let others: Vec<_> = cached.iter().filter(|c| KNOWN.iter().all(|(_, id, _)| *id != c.id.name())).collect();
    if others.is_empty() {
        text.push_str(&format!("Nothing else is in the cache, {}\n", show(hub.cache())));
    } else {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(["also in the cache", "revision", "size"]);
        if let Some(column) = table.column_mut(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for c in others {
            table.add_row([escape(c.id.name()), escape(c.id.revision()), megabytes(c.bytes)]);
        }
        text.push_str(&format!("{}\n\n{}\n", table.trim_fmt(), show(hub.cache())));
    }
    text
}
