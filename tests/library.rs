//! The library beyond `forward`: intermediates, attention maps, other image sizes, other heads, against timm and
//! transformers. `VIT_PARITY=folder` judges another pack of the same form.

use std::{
    collections::HashMap,
    env, fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;
use vit_model::{
    Pool, VisionTransformer, checkpoint,
    vit::Prune,
    vit::intermediates::{FeatureFormat, FinalNorm},
    vit::pos_embed::Resample,
    vit::tap::Blocks,
};

use crate::support::Parts;

type Outcome = Result<(), Box<dyn std::error::Error>>;
type Tensors = HashMap<String, Tensor>;

fn cases() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity");
    let root = env::var_os("VIT_PARITY").map_or(here, PathBuf::from);
    let folders = |kind: &str| fs::read_dir(root.join(kind)).unwrap().map(|entry| entry.unwrap().path());
    folders("timm_extra").chain(folders("hf")).collect()
}

/// f32 sums in another order than PyTorch's differ by about 1e-6.
fn compare(expect: &Tensors, name: &str, have: &Tensor) -> Outcome {
    let Some(want) = expect.get(name) else { return Err(format!("no `{name}` is expected").into()) };
    if have.dims() != want.dims() {
        return Err(format!("`{name}` is {:?}, expected {:?}", have.dims(), want.dims()).into());
    }
    let largest = |t: Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let limit = 1e-4 * largest(want.clone())?.min(1.0);
    let d = largest((have - want)?)?;
    if d <= limit { Ok(()) } else { Err(format!("`{name}` differs by {d:.2e}, at most {limit:.2e}").into()) }
}

fn answers(model: &VisionTransformer, expect: &Tensors, tag: &str, input: &str) -> Outcome {
    let features = model.forward_features(&expect[input])?;
    for (kind, have) in [
        ("logits", model.forward_head(&features)?),
        ("pre_logits", model.forward_pre_logits(&features)?),
        ("features", features),
    ] {
        let name = format!("{tag}.{kind}");
        if expect.contains_key(&name) {
            compare(expect, &name, &have)?;
        }
        let raw = format!("{tag}.hf.last_hidden_state");
        // CLIP's stands before the final norm
        if kind == "features" && expect.contains_key(&raw) && !model.config().pre_norm {
            compare(expect, &raw, &have)?;
        }
    }
    Ok(())
}

fn size(extra: &Value) -> [usize; 2] {
    serde_json::from_value(extra["img_size"].clone()).unwrap()
}

/// One tag of a case; `Ok(false)`: an operation that this library does not offer.
fn judge(case: &Path, extra: &Value, expect: &Tensors) -> Result<bool, Box<dyn std::error::Error>> {
    let checkpoint = checkpoint::open(case)?;
    let mut model = checkpoint.model(DType::F32, &Device::Cpu)?;
    let (tag, how) = (extra["tag"].as_str().unwrap(), Resample::of(&checkpoint.info));
    let own = format!("{tag}.x");
    match extra["op"].as_str().unwrap() {
        "attention_maps" => {
            for (i, map) in model.attention_maps(&expect["x"])?.iter().enumerate() {
                compare(expect, &format!("{tag}.{i}"), map)?;
            }
        }
        "forward_intermediates" => {
            let list: Vec<isize> = serde_json::from_value(extra["indices"].clone()).unwrap_or_default();
            let blocks = match &extra["indices"] {
                Value::Null => Blocks::All,
                Value::Number(n) => Blocks::Last(n.as_u64().unwrap() as usize),
                _ => Blocks::At(&list),
            };
            let nlc = extra["output_fmt"] == "NLC";
            let format = if nlc { FeatureFormat::Nlc } else { FeatureFormat::Nchw };
            let norm = if extra["norm"] == true { FinalNorm::Apply } else { FinalNorm::Skip };
            let (last, intermediates) = model.forward_intermediates(&expect["x"], blocks, norm, format)?;
            compare(expect, &format!("{tag}.final"), &last)?;
            assert_eq!(intermediates.len() as u64, extra["n"].as_u64().unwrap());
            let alone = model.get_intermediate_layers(&expect["x"], blocks, norm, format)?;
            for (i, (with, alone)) in intermediates.iter().zip(&alone).enumerate() {
                compare(expect, &format!("{tag}.{i}"), &with.patches)?;
                compare(expect, &format!("{tag}.{i}"), &alone.patches)?;
                let name = format!("{tag}.{i}.prefix");
                if let (Some(prefix), true) = (&with.prefix, expect.contains_key(&name)) {
                    compare(expect, &name, prefix)?;
                }
            }
        }
        "forward" if size(extra).iter().zip(model.config().patch_size).any(|(side, patch)| side % patch != 0) => {
            return Ok(false); // timm's dynamic_img_pad
        }
        "forward" => {
            model.set_dynamic_size(Some(Resample::Bicubic));
            answers(&model, expect, tag, &own)?;
        }
        "load_at" if extra.get("patch_size").is_some() => return Ok(false),
        "load_at" => {
            model.set_input_size(size(extra), how)?;
            answers(&model, expect, tag, &own)?;
        }
        "interpolate_pos_encoding" => {
            model.set_dynamic_size(Some(how));
            answers(&model, expect, tag, &own)?;
            model.set_dynamic_size(None);
            assert!(model.forward(&expect[&own]).is_err());
            model.set_input_size(size(extra), how)?;
            answers(&model, expect, tag, &own)?;
        }
        "reset_classifier" => {
            let prefix = format!("{tag}.");
            let named = expect.iter().filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_owned(), t.clone())));
            let vb = VarBuilder::from_tensors(named.collect(), DType::F32, &Device::Cpu);
            let pool: Option<Pool> = serde_json::from_value(extra["global_pool"].clone())?;
            let classes = extra["num_classes"].as_u64().unwrap() as usize;
            model.reset_classifier(classes, pool, &vb)?;
            answers(&model, expect, tag, "x")?;
        }
        other => return Err(format!("operation {other}").into()),
    }
    Ok(true)
}

#[test]
fn everything_beyond_forward_equals_timm_and_transformers() {
    let (mut right, mut failed) = (0, Vec::new());
    for case in cases() {
        let meta: Value = serde_json::from_slice(&fs::read(case.join("meta.json")).unwrap()).unwrap();
        let Some(extras) = meta["extra"].as_array().filter(|_| meta["expect"] == "ok") else { continue };
        let expect = candle_core::safetensors::load(case.join("expect.safetensors"), &Device::Cpu).unwrap();
        for extra in extras {
            match judge(&case, extra, &expect) {
                Ok(done) => right += usize::from(done),
                Err(why) => failed.push(format!("{} {}: {why}", case.display(), extra["tag"])),
            }
        }
    }
    assert!(failed.is_empty(), "{} right\n{}", right, failed.join("\n"));
    assert!(right >= 20, "only {right} were tried");
}

#[test]
fn pruned_models_answer_with_intermediates() {
    let case = cases().into_iter().find(|case| case.ends_with("inter_vit")).unwrap();
    let expect = candle_core::safetensors::load(case.join("expect.safetensors"), &Device::Cpu).unwrap();
    let mut model = checkpoint::open(&case).unwrap().model(DType::F32, &Device::Cpu).unwrap();
    // inter1 is blocks 0 and 2 without the norm
    assert_eq!(model.prune_intermediate_layers(Blocks::At(&[2]), Prune::FinalNormAndHead).unwrap(), [2]);
    assert_eq!((model.config().depth, model.config().num_classes), (3, 0));
    let tokens = model.forward(&expect["x"]).unwrap();
    compare(&expect, "inter1.1", &tokens.narrow(1, 1, 12).unwrap()).unwrap();
    assert!(model.forward_intermediates(&expect["x"], Blocks::At(&[3]), FinalNorm::Skip, FeatureFormat::Nlc).is_err());
}

/// Read in stretches, tensors are what they are when read whole, and what is wrong with them is said as well.
#[test]
fn stretches_are_the_tensor() {
    let folder = |kind: &str, name: &str| {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(kind).join(name)
    };
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/digits/model.safetensors");
    let first = |kind: &str| fs::read_dir(folder(kind, "")).unwrap().next().unwrap().unwrap().path();
    for path in [digits.clone(), first("hf"), first("timm")] {
        let weights = checkpoint::open(&path).unwrap().weights;
        for name in weights.tensors().keys() {
            let (whole, read) = (weights.read(name).unwrap(), weights.stretches(name).unwrap());
            let mut pieces = vec![0; whole.len()];
            // the later ones first
            for (i, piece) in pieces.chunks_mut(1000).enumerate().rev() {
                read(i * 1000, piece).unwrap();
            }
            assert!(pieces == whole, "{name} of {}", path.display());
            let past = read(whole.len() - 3, &mut [0; 4]).unwrap_err().to_string();
            assert!(past.contains("fewer than its shape says"), "{past}"); // under the name that the file has
        }
    }
    // the index is the one in the tensor, not in the stretch
    let mut file = Parts::of(&fs::read(&digits).unwrap());
    file.without_checksums();
    let name = file.names().into_iter().find(|name| name.ends_with("fc1.weight")).unwrap();
    let start = file.range(&name).start;
    file.data[start + 4 * 50..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let damaged = tempfile::NamedTempFile::with_suffix(".safetensors").unwrap();
    fs::write(&damaged, file.bytes()).unwrap();
    let weights = checkpoint::open(damaged.path()).unwrap().weights;
    let read = weights.stretches(&name).unwrap();
    read(0, &mut [0; 4 * 50]).unwrap();
    let error = read(4 * 40, &mut [0; 4 * 20]).unwrap_err().to_string();
    assert!(error.contains(name.as_str()) && error.contains("element 50 "), "{error}");
}
