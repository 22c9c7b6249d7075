//! `models`: lists the checkpoints that have a short name, and the contents of the cache.

use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;
use vit_model::hub::{Cached, Hub, KNOWN};

use crate::args::ModelsArgs;
use crate::output::{Stdout, escape, json_pretty, name, show};

pub fn run(args: &ModelsArgs) -> anyhow::Result<()> {
    let hub = Hub::from_env()?;
    let cached = hub.list();
    let mut out = Stdout::new();
    out.write(&if args.json { json_pretty(&report(&hub, &cached))? + "\n" } else { tables(&hub, &cached) })?;
    out.flush()
}

fn report(hub: &Hub, cached: &[Cached]) -> serde_json::Value {
    let known = KNOWN.map(|known| {
        let in_cache = size(cached, known.repository).is_some();
        json!({ "name": known.name, "repository": known.repository, "what": known.about, "cached": in_cache })
    });
    let cached = cached.iter().map(|c| {
        let (repository, revision) = (c.id.name(), c.id.revision());
        json!({ "repository": repository, "revision": revision, "folder": name(&c.folder), "bytes": c.bytes })
    });
    json!({ "known": known, "cache": name(hub.cache()), "cached": cached.collect::<Vec<_>>() })
}

/// The size in bytes of a repository in the cache, at any revision.
fn size(cached: &[Cached], repository: &str) -> Option<u64> {
    cached.iter().find(|c| c.id.name() == repository).map(|c| c.bytes)
}

fn tables(hub: &Hub, cached: &[Cached]) -> String {
    let megabytes = |bytes: u64| format!("{} MB", bytes.div_ceil(1_000_000));
    let mut known = Table::new();
    known.load_style(presets::NOTHING).set_header(["name", "repository", "what", "cached"]);
    for row in KNOWN {
        let size = size(cached, row.repository).map_or_else(String::new, megabytes);
        known.add_row([row.name, row.repository, row.about, &size]);
    }
    let mut text = format!("{}\n\n", known.trim_fmt());
    let others: Vec<_> = cached.iter().filter(|c| KNOWN.iter().all(|known| known.repository != c.id.name())).collect();
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
