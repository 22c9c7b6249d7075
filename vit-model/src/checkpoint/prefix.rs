//! Takes the names of wrappers off tensor names: `module.` of DataParallel, `_orig_mod.` of compiled models, and others.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    stored::Stored,
    views::{Part, Views},
};
use crate::{Error, Result};

/// Modules that wrap a network as a whole.
const WRAPPERS: [&str; 13] = [
    "module.",
    "_orig_mod.",
    "model.",
    "backbone.",
    "encoder.",
    "teacher.",
    "student.",
    "net.",
    "network.",
    "ema.",
    "_forward_module.",
    "base_model.",
    "timm_model.",
];

/// Takes off every wrapper that all tensors are in. `key` names one of several networks, if the file has more than one.
///
/// # Errors
/// If the file holds several networks, none of which is named.
pub(super) fn unwrap(stored: &mut Stored, key: Option<&str>) -> Result<()> {
    let mut prefix = String::new();
    if let Some(key) = key.filter(|_| !stored.keyed) {
        prefix = format!("{key}.");
        if !stored.weights.tensors().keys().any(|name| name.starts_with(&prefix)) {
            return Err(Error::file(&stored.path, format!("has nothing under the key {key:?}")));
        }
    }
    let inside = |prefix: &str| {
        let names = stored.weights.tensors().keys();
        names.filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect::<Vec<_>>()
    };
    let mut names = inside(&prefix);
    while let Some(wrapper) =
        WRAPPERS.iter().find(|wrapper| !names.is_empty() && names.iter().all(|name| name.starts_with(**wrapper)))
    {
        prefix.push_str(wrapper);
        names = inside(&prefix);
    }
    if let Some(networks) = several(&names) {
        return Err(Error::file(
            &stored.path,
            format!(
                "holds more than one network: {}. Say which one with --state-dict, as in --state-dict {}",
                networks.iter().map(|name| format!("`{name}.`")).collect::<Vec<_>>().join(" and "),
                networks.last().copied().unwrap_or_default()
            ),
        ));
    }
    if !prefix.is_empty() {
        stored.remarks.push(format!("the prefix `{prefix}` was taken off the names of the tensors"));
        let mut views = Views::new(stored.weights.clone());
        for name in names {
            let theirs = format!("{prefix}{name}");
            let shape = views.shape_of(&theirs).unwrap_or_default();
            views.add(name, shape, vec![Part::All(theirs)]);
        }
        stored.weights = Arc::new(views);
        let others = stored.others.iter().filter_map(|name| name.strip_prefix(&prefix)).map(str::to_owned);
        stored.others = others.collect();
    }
    Ok(())
}

/// The first parts of the names, if under each of them are tensors of the same names.
fn several(names: &[String]) -> Option<Vec<&str>> {
    const FEWEST: usize = 4;
    let mut networks: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in names {
        let (first, rest) = name.split_once('.')?;
        networks.entry(first).or_default().push(rest);
    }
    let mut all = networks.values();
    let first = all.next()?;
    let alike = networks.len() > 1 && first.len() >= FEWEST && all.all(|rest| rest == first);
    alike.then(|| networks.into_keys().collect())
}
