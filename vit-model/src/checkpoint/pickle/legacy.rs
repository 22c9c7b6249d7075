//! The format of PyTorch before 1.6: five pickles one after the other, then the storages.

use std::collections::BTreeMap;

use super::{
    Container,
    machine::{self, Pickled, Trouble},
    value::{Value, Values},
};
use crate::{checkpoint::safetensors::Source, limits};

/// The bytes of the number that each file begins with: a pickle of protocol 2 to 5, with or without a frame.
const MAGIC: &[u8] = &[0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// Reads the pickles and finds the storages behind them.
pub(super) fn container(source: &Source, len: usize) -> Result<Container, String> {
    // the pickles' length is not written anywhere
    let mut size = (1usize << 20).min(len);
    loop {
        let mut bytes = vec![0; size];
        source.read_exact_at(&mut bytes, 0).map_err(|error| error.to_string())?;
        match pickles(&bytes) {
            Ok((object, keys, end)) => return storages(source, len, object, &keys, end),
            Err(Trouble::Refused(why)) => return Err(why),
            Err(Trouble::Ends) if size == len => return Err("ends too early (was the file copied completely?)".into()),
            Err(Trouble::Ends) if size >= limits::PICKLE_BYTES => {
                return Err(format!(
                    "has a pickle of more than {} bytes, which no checkpoint has",
                    limits::PICKLE_BYTES
                ));
            }
            Err(Trouble::Ends) => size = size.saturating_mul(4).min(limits::PICKLE_BYTES).min(len),
        }
    }
}

/// The object, the names of the storages in the order of the file, and where they begin.
fn pickles(bytes: &[u8]) -> Result<(Pickled, Pickled, usize), Trouble> {
    let head = bytes.get(..bytes.len().min(32)).unwrap_or_default();
    let is_torch = head.windows(MAGIC.len()).any(|window| window == MAGIC);
    let mut at = 0usize;
    let mut next = || {
        let pickled = machine::read(bytes.get(at..).unwrap_or_default(), false)?;
        at = at.saturating_add(pickled.used);
        Ok((pickled, at))
    };
    let refused = |why: &str| Err(Trouble::Refused(why.into()));
    if !is_torch {
        // its names are looked at, so that one that is a program is refused for that
        next()?;
        return refused(
            "is a Python pickle, but not one that torch.save wrote: load it in Python and save the weights as safetensors",
        );
    }
    next()?;
    let (version, _) = next()?;
    if !matches!(version.values.get(version.root), Value::Int(1001)) {
        return refused(
            "is of a version of PyTorch's old format that is not read: load it in PyTorch and save it again",
        );
    }
    let (system, _) = next()?;
    if !little_endian(&system.values, &system) {
        return refused("was written by a big-endian machine: save it again on a little-endian one");
    }
    let (object, _) = next()?;
    let (keys, end) = next()?;
    Ok((object, keys, end))
}

fn little_endian(values: &Values, system: &Pickled) -> bool {
    let Value::Dict(entries) = values.get(system.root) else { return false };
    let is = |key| values.text(key) == Some("little_endian");
    entries.iter().any(|&(key, value)| is(key) && matches!(values.get(value), Value::Bool(true)))
}

/// Finds each storage: eight bytes with the number of its elements, then the elements.
fn storages(source: &Source, len: usize, object: Pickled, keys: &Pickled, end: usize) -> Result<Container, String> {
    let damaged = || "ends within a tensor (was the file copied completely?)".to_owned();
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    for value in &object.values.0 {
        if let Value::Storage(storage) = value {
            let size = storage.element.map_or(1, super::Element::size);
            sizes.insert(&storage.key, size);
        }
    }
    let Value::List(list) = keys.values.get(keys.root) else {
        return Err("does not list its storages: the file is damaged".into());
    };
    let mut storages = BTreeMap::new();
    let mut at = end;
    for &key in list {
        let key = keys.values.text(key).ok_or("has a storage without a name: the file is damaged")?;
        let size = *sizes
            .get(key)
            .ok_or_else(|| format!("has the storage {key:?}, which no tensor uses: the file is damaged"))?;
        let mut count = [0; 8];
        source.read_exact_at(&mut count, at).map_err(|_| damaged())?;
        let bytes = usize::try_from(u64::from_le_bytes(count))
            .ok()
            .and_then(|count| count.checked_mul(size))
            .ok_or_else(damaged)?;
        let start = at.checked_add(8).ok_or_else(damaged)?;
        at = start.checked_add(bytes).filter(|&end| end <= len).ok_or_else(damaged)?;
        storages.insert(key.to_owned(), (start, bytes));
    }
    Ok(Container { values: object.values, root: object.root, storages, script: false })
}
