//! Finds the state dict in what a trainer saved: the whole object, or what is under a key such as `model`.

use std::collections::BTreeMap;

use super::value::{Id, Tensor, Value, Values};

/// Keys that hold a state dict, the preferred ones first: those of timm's `load_state_dict` in its order, then those of
/// DeepSpeed, DINO, I-JEPA and others.
const KEYS: [&str; 16] = [
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "module",
    "teacher",
    "target_encoder",
    "model_state_dict",
    "model_state",
    "ema",
    "net",
    "network",
    "params",
    "weights",
    "backbone",
    "encoder",
];

/// How many dictionaries are inside of each other at most.
const DEPTH: usize = 4;

/// The state dict that was chosen.
pub(super) struct Chosen<'a> {
    pub tensors: BTreeMap<String, &'a Tensor>,
    /// Its key, with a dot between one dictionary and the next.
    pub key: Option<String>,
    /// Other keys that hold as many tensors.
    pub besides: Vec<String>,
}

/// Finds the state dict. `wanted` is the key that the user names.
pub(super) fn state_dict<'a>(values: &'a Values, root: Id, wanted: Option<&str>) -> Result<Chosen<'a>, String> {
    let counts = Counts::new(values);
    let mut at = root;
    let mut path: Vec<&str> = Vec::new();
    let mut besides = Vec::new();
    for _ in 0..DEPTH {
        let inside = counts.candidates(values, at);
        let names = || inside.iter().map(|(key, _)| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        let chosen = match wanted.filter(|_| path.is_empty()) {
            Some(key) => match inside.iter().find(|(name, _)| *name == key) {
                Some(found) => Some(found),
                // it may be the prefix of names, which is looked for later
                None if inside.is_empty() => None,
                None => return Err(format!("has no state dict under the key {key:?}; it has {}", names())),
            },
            None => match KEYS.iter().find_map(|key| inside.iter().find(|(name, _)| name == key)) {
                Some(found) => Some(found),
                // a state dict of its own comes before dictionaries that nobody knows
                None if !direct(values, at).is_empty() => None,
                None => match inside.as_slice() {
                    [] => None,
                    [only] => Some(only),
                    _ => {
                        return Err(format!(
                            "holds several dictionaries of tensors, {}: say which one is the model (--state-dict KEY)",
                            names()
                        ));
                    }
                },
            },
        };
        let Some(&(key, id)) = chosen else { break };
        if wanted.is_none() || !path.is_empty() {
            let size = counts.of(id);
            let alike =
                inside.iter().filter(|(name, other)| *name != key && counts.of(*other).saturating_mul(2) >= size);
            besides.extend(alike.map(|(name, _)| (*name).to_owned()));
        }
        path.push(key);
        at = id;
    }
    let mut tensors = BTreeMap::new();
    match values.get(at) {
        Value::Object { .. } => module(values, at, &mut tensors),
        _ => tensors.extend(direct(values, at)),
    }
    if tensors.is_empty() {
        return Err("holds no state dict: no dictionary of named tensors was found".into());
    }
    Ok(Chosen { tensors, key: (!path.is_empty()).then(|| path.join(".")), besides })
}

/// The tensors of a dictionary by name. Of a name that is there twice, the last counts, as in Python.
fn direct(values: &Values, id: Id) -> BTreeMap<String, &Tensor> {
    let Value::Dict(entries) = values.get(id) else { return BTreeMap::new() };
    let mut tensors = BTreeMap::new();
    for &(key, value) in entries {
        let Some(name) = values.text(key) else { continue };
        match values.get(value) {
            Value::Tensor(tensor) => drop(tensors.insert(name.to_owned(), tensor)),
            _ => drop(tensors.remove(name)),
        }
    }
    tensors
}

/// How many tensors each value has under names, counted once, because a value may be mentioned any number of times.
/// Optimisers number their tensors, so they have none.
struct Counts {
    direct: Vec<usize>,
    /// Whether a dictionary has tensors one step further.
    nested: Vec<bool>,
}

impl Counts {
    fn new(values: &Values) -> Self {
        let named = |entries: &[(Id, Id)]| {
            let is = |&&(key, value): &&(Id, Id)| {
                values.text(key).is_some() && matches!(values.get(value), Value::Tensor(_))
            };
            entries.iter().filter(is).count()
        };
        let direct = values.0.iter().map(|value| if let Value::Dict(entries) = value { named(entries) } else { 0 });
        let mut counts = Self { direct: direct.collect(), nested: Vec::new() };
        let further = |entries: &[(Id, Id)]| {
            entries.iter().any(|&(key, value)| values.text(key).is_some() && counts.of(value) > 0)
        };
        counts.nested =
            values.0.iter().map(|value| matches!(value, Value::Dict(entries) if further(entries))).collect();
        counts
    }

    fn of(&self, id: Id) -> usize {
        usize::try_from(id.0).ok().and_then(|at| self.direct.get(at)).copied().unwrap_or(0)
    }

    /// The entries of a dictionary that hold tensors, directly or one step further.
    fn candidates<'a>(&self, values: &'a Values, id: Id) -> Vec<(&'a str, Id)> {
        let Value::Dict(entries) = values.get(id) else { return Vec::new() };
        let nested = |id: Id| usize::try_from(id.0).ok().and_then(|at| self.nested.get(at)).copied().unwrap_or(false);
        let mut found: BTreeMap<&str, Id> = BTreeMap::new();
        for &(key, value) in entries {
            let Some(name) = values.text(key) else { continue };
            found.remove(name);
            if self.of(value) > 0 || nested(value) {
                found.insert(name, value);
            }
        }
        found.into_iter().collect()
    }
}

/// The tensors of a TorchScript module and of the modules in it, under the names that its state dict would have.
fn module<'a>(values: &'a Values, root: Id, tensors: &mut BTreeMap<String, &'a Tensor>) {
    // modules may be inside of themselves, or of many others; no real network comes near these bounds
    const MOST: usize = 1 << 20;
    const NAME: usize = 512;
    let mut todo = vec![(String::new(), root)];
    let mut seen = 0usize;
    while let Some((prefix, id)) = todo.pop() {
        let Value::Object { state: Some(state) } = values.get(id) else { continue };
        let Value::Dict(entries) = values.get(*state) else { continue };
        for &(key, value) in entries {
            seen = seen.saturating_add(1);
            let Some(name) = values.text(key) else { continue };
            if seen > MOST || prefix.len().saturating_add(name.len()) > NAME {
                continue;
            }
            match values.get(value) {
                Value::Tensor(tensor) => drop(tensors.insert(format!("{prefix}{name}"), tensor)),
                Value::Object { .. } => todo.push((format!("{prefix}{name}."), value)),
                _ => {}
            }
        }
    }
}
