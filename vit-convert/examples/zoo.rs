//! Imports every case of an exporter zoo and compares configuration and tensors with its truth, bit for bit.
//!
//! `ZOO=path/to/zoo cargo run --example zoo -- [NAME …]`: names are prefixes or parts of cases.

use std::collections::BTreeMap;
use std::path::Path;

use vit_model::weights::{Weights, widen};

fn main() -> anyhow::Result<()> {
    let zoo = std::env::var("ZOO")?;
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let mut names: Vec<String> = std::fs::read_dir(Path::new(&zoo).join("cases"))?
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| wanted.is_empty() || wanted.iter().any(|w| n.contains(w.as_str())))
        .collect();
    names.sort();
    let mut tally: BTreeMap<String, [usize; 3]> = BTreeMap::new();
    for name in names {
        let case = Path::new(&zoo).join("cases").join(&name);
        let truth: serde_json::Value = serde_json::from_slice(&std::fs::read(case.join("config.json"))?)?;
        let expect = truth["expect"].as_str().unwrap_or("").to_string();
        let outcome = vit_convert::onnx::read(&case.join("model.onnx")).and_then(|g| vit_convert::import(&g));
        let row = tally.entry(expect.clone()).or_default();
        row[1] += 1;
        let (good, note) = match outcome {
            Err(e) => (expect != "ok", format!("refused: {e}")),
            Ok(found) => {
                row[2] += 1;
                let mut bad = compare(&case, &truth, &found)?;
                let differs = !bad.is_empty() && expect == "ok";
                if bad.is_empty() {
                    bad.push(format!("converted{}", if found.approximate.is_empty() { "" } else { ", approximately" }));
                }
                (expect != "refuse" && !differs, bad.join("; "))
            }
        };
        row[0] += usize::from(good);
        println!("{} {name} [{expect}] {note}", if good { "ok  " } else { "FAIL" });
    }
    for (k, [good, all, converted]) in tally {
        println!("{k} {good}/{all}, converted {converted}");
    }
    Ok(())
}

fn compare(case: &Path, truth: &serde_json::Value, found: &vit_convert::Imported) -> anyhow::Result<Vec<String>> {
    let mut bad = Vec::new();
    let have = serde_json::to_value(&found.config)?;
    let token = truth["model"]["global_pool"] == "token";
    // packed and split SwiGLU are the same function
    let gated =
        truth["model"]["mlp"].as_str().is_some_and(|m| m.starts_with("swiglu")) && have["mlp"] != truth["model"]["mlp"];
    for (key, want) in truth["model"].as_object().into_iter().flatten() {
        let got = &have[key];
        let close = key == "ln_eps" && want.as_f64().zip(got.as_f64()).is_some_and(|(a, b)| (a - b).abs() <= 2e-2 * a);
        let tie = (token && (key == "fc_norm" || key == "final_norm"))
            || (key == "head_bias" && truth["model"]["num_classes"] == 0)
            || (gated && key.starts_with("mlp"));
        if got != want && !close && !tie {
            bad.push(format!("{key}: want {want}, found {got}"));
        }
    }
    let path = case.join("truth.safetensors");
    let exact = truth["weights_exact"].as_bool().unwrap_or(false);
    if !path.exists() || !exact || gated {
        return Ok(bad);
    }
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    for (name, view) in file.tensors() {
        let alias = if token { name.replace("fc_norm.", "norm.") } else { name.clone() };
        let Some(info) = found.weights.tensors().get(&alias) else {
            bad.push(format!("missing {name}"));
            continue;
        };
        if info.shape != view.shape() {
            bad.push(format!("{name}: shape {:?}, want {:?}", info.shape, view.shape()));
            continue;
        }
        let have = found.weights.read_f32(&alias)?;
        let dtype = match view.dtype() {
            safetensors::Dtype::F16 => vit_model::weights::Dtype::F16,
            safetensors::Dtype::BF16 => vit_model::weights::Dtype::Bf16,
            safetensors::Dtype::F64 => vit_model::weights::Dtype::F64,
            _ => vit_model::weights::Dtype::F32,
        };
        let want = widen(dtype, view.data());
        let off = have.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        if off > 0.0 {
            bad.push(format!("{name}: off by {off:e}"));
        }
    }
    let extra =
        found.weights.tensors().keys().filter(|n| file.tensor(n).is_err() && !(token && n.starts_with("norm.")));
    bad.extend(extra.map(|n| format!("extra {n}")));
    Ok(bad)
}
