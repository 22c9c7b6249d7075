//! Adapters of PEFT: an adapter without its model is named as such, and LoRA that was saved beside the weights is merged.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde_json::Value;

use super::{
    computed::Computed,
    stored::Stored,
    views::{Part, Views},
};
use crate::{
    Error, Result,
    files::small_file,
    json,
    weights::{Dtype, Weights},
};

const CONFIG: &str = "adapter_config.json";
/// What every name of a model with an adapter begins with.
const MODEL: &str = "base_model.model.";
const MERGE: &str = "merge it in Python (`model.merge_and_unload()` of PEFT, then `save_pretrained`) and open the folder that this writes";

/// Refuses a folder with an adapter whose model is not in it, or is a file of its own.
pub(super) fn refuse_adapter(folder: &Path) -> Result<()> {
    let has = |name: &str| folder.join(name).symlink_metadata().is_ok();
    if !has("adapter_model.safetensors") && !has("adapter_model.bin") {
        return Ok(());
    }
    let base = json::parse(&small_file(&folder.join(CONFIG)).unwrap_or_default()).unwrap_or_default();
    let base = match base.get("base_model_name_or_path").and_then(Value::as_str) {
        Some(name) => format!(" of {name:?}"),
        None => String::new(),
    };
    Err(Error::file(folder, format!("holds a PEFT adapter, which is not a model but a change{base}: {MERGE}")))
}

/// Merges LoRA that is stored beside the weights, as `merge_and_unload` does.
pub(super) fn merge(stored: &mut Stored, folder: Option<&Path>) -> Result<()> {
    let names: Vec<String> = stored.weights.tensors().keys().cloned().collect();
    if !names.iter().any(|name| name.contains(".lora_") || name.contains(".modules_to_save.")) {
        return Ok(());
    }
    let refuse =
        |why: &str| Err(Error::file(&stored.path, format!("holds a PEFT adapter beside the weights, {why}: {MERGE}")));
    if !names.iter().any(|name| name.contains(".base_layer.")) && names.iter().any(|name| name.contains(".lora_")) {
        return refuse("without the weights that it changes");
    }
    let config = folder.map(|folder| folder.join(CONFIG)).filter(|path| path.exists());
    let config = match config {
        Some(path) => json::parse(&small_file(&path)?).map_err(|why| Error::file(path, why))?,
        None => return refuse("and no adapter_config.json that says how it is scaled"),
    };
    let is_plain = |key: &str| match config.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    };
    if config.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return refuse("of another kind than LoRA");
    }
    for key in
        ["use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern", "use_qalora", "lora_bias", "megatron_config"]
    {
        if !is_plain(key) {
            return refuse(&format!("whose `{key}` changes LoRA's rule"));
        }
    }
    let alpha = config.get("lora_alpha").and_then(Value::as_f64).filter(|alpha| alpha.is_finite());
    let Some(alpha) = alpha else { return refuse("without `lora_alpha`") };
    let root = config.get("use_rslora").and_then(Value::as_bool) == Some(true);

    let mut plain = Views::new(stored.weights.clone());
    let mut deltas: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
    for name in &names {
        let bare = name.strip_prefix(MODEL).unwrap_or(name);
        if let Some((layer, rest)) = bare.split_once(".lora_") {
            let side = match rest.split('.').collect::<Vec<_>>().as_slice() {
                ["A", "weight"] | ["A", "default", "weight"] => 0,
                ["B", "weight"] | ["B", "default", "weight"] => 1,
                _ => return refuse(&format!("of which `{name}` is not part of LoRA's plain rule")),
            };
            let sides = deltas.entry(format!("{layer}.weight")).or_default();
            if let Some(slot) = sides.get_mut(side) {
                *slot = Some(name.clone());
            }
        } else if bare.contains(".original_module.") {
            // the copy in `modules_to_save` counts
        } else {
            let ours = bare.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".");
            if ours.contains(".modules_to_save.") {
                return refuse("with more than one adapter");
            }
            if plain.has(&ours) {
                return refuse(&format!("in which `{ours}` is there twice"));
            }
            let shape = plain.shape_of(name).unwrap_or_default();
            plain.add(ours, shape, vec![Part::All(name.clone())]);
        }
    }
    let count = deltas.len();
    let mut merged = Computed::new(Arc::new(plain));
    for (weight, sides) in deltas {
        let shape = |name: &str| stored.weights.tensors().get(name).map(|info| info.shape.as_slice());
        let (Some(info), [Some(a), Some(b)]) = (merged.tensors().get(&weight), sides) else {
            return refuse(&format!("of which a part of `{weight}` is missing"));
        };
        let (Some(&[rank, width]), Some(&[rows, other]), &[n, k]) = (shape(&a), shape(&b), info.shape.as_slice())
        else {
            return refuse(&format!("and `{weight}` is no matrix"));
        };
        if rank != other || k != width || n != rows || rank == 0 {
            return refuse(&format!("whose shapes do not fit `{weight}`"));
        }
        #[allow(clippy::as_conversions)] // a rank is small
        let rank = rank as f64;
        let scale = alpha / if root { rank.sqrt() } else { rank };
        let adapter = Adapter { file: stored.weights.clone(), a, b, scale };
        merged.replace(weight.clone(), vec![n, k], move |plain| adapter.added(plain, &weight, n, k));
    }
    stored.remarks.push(format!("LoRA was merged into {count} weights"));
    stored.weights = Arc::new(merged);
    Ok(())
}

/// LoRA's change of one weight: `scale · B · A`.
struct Adapter {
    file: Arc<dyn Weights>,
    a: String,
    b: String,
    scale: f64,
}

impl Adapter {
    /// A weight of `plain` with the change, summed in f64 so that the order of the ranks does not matter.
    fn added(&self, plain: &dyn Weights, name: &str, rows: usize, width: usize) -> Result<Vec<u8>> {
        let mut weight = plain.read_f32(name)?;
        let (a, b) = (self.file.read_f32(&self.a)?, self.file.read_f32(&self.b)?);
        let rank = b.len().checked_div(rows).unwrap_or(0).max(1);
        let mut sums = vec![0f64; width];
        for (row, factors) in weight.chunks_exact_mut(width.max(1)).zip(b.chunks_exact(rank)) {
            sums.fill(0.0);
            for (&factor, line) in factors.iter().zip(a.chunks_exact(width.max(1))) {
                sums.iter_mut().zip(line).for_each(|(sum, &value)| *sum += f64::from(factor) * f64::from(value));
            }
            #[allow(clippy::as_conversions)]
            row.iter_mut().zip(&sums).for_each(|(value, sum)| *value = (f64::from(*value) + self.scale * sum) as f32);
        }
        let bytes: Vec<u8> = weight.iter().flat_map(|value| value.to_le_bytes()).collect();
        crate::weights::check_finite(name, Dtype::F32, &bytes)?;
        Ok(bytes)
    }
}
