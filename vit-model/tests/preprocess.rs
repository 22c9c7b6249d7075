//! Every pixel against Pillow's and torchvision's: JPEGs over `tests/fixtures/jpeg`, preprocessing over
//! `tests/fixtures/preprocess` (or the folder in `VIT_PREPROCESS_PACK`).

use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vit_model::image::{Image, Preprocess};
use vit_model::{Config, PreprocessConfig};

fn json(path: &Path) -> Option<Value> {
    Some(serde_json::from_slice(&std::fs::read(path).ok()?).unwrap())
}

fn model(img_size: [usize; 2], in_chans: usize) -> Config {
    let mut config = Config::vit(img_size, [4, 4], 24, 2, 3);
    config.in_chans = in_chans;
    config
}

/// A folder of the pack: `index.json` lists images and configs, each config has its references in `expect.safetensors`:
/// `<image>.pil` and `.tv` as 8-bit `[C, H, W]`, `.float_pil` and `.float_tv` as the tensors.
#[test]
fn equals_pillow_and_torchvision() {
    let root = std::env::var_os("VIT_PREPROCESS_PACK").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/preprocess"));
    let index = json(&root.join("index.json")).unwrap();
    let (mut compared, mut wrong) = (0, vec![]);
    for (name, entry) in index["configs"].as_object().unwrap() {
        let folder = root.join("configs").join(name);
        let side = |i: usize| usize::try_from(entry["size"][i].as_u64().unwrap()).unwrap();
        let size = [side(0), side(1)];
        let channels = entry["mean"].as_array().unwrap().len();
        let model = model(size, channels);
        let config = json(&folder.join("config.json")).unwrap();
        let config = match json(&folder.join("preprocessor_config.json")) {
            Some(hf) => PreprocessConfig::from_hf(&hf, config["model_type"].as_str().unwrap(), &model).unwrap(),
            None => PreprocessConfig::from_timm(&config, &model).unwrap(),
        };
        let preprocess = Preprocess::new(&config).unwrap();
        let expected = std::fs::read(folder.join("expect.safetensors")).unwrap();
        let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
        for (image, file) in index["images"].as_object().unwrap() {
            if !index["raises"][name][image].is_null() {
                continue; // the reference itself gives up
            }
            let picture = Image::open(root.join(file["file"].as_str().unwrap())).unwrap();
            let pixels = preprocess.resize_and_crop(&picture).unwrap(); // [H, W, C]
            let plane = size[0] * size[1];
            // to the bit what the reference itself makes; "alt" is the other reading of 16 bits, made by Pillow for all
            let mut notes = vec![];
            for (path, limit) in [("tv", 0), ("pil", 0), ("alt", 1)] {
                let Ok(reference) = expected.tensor(&format!("{image}.{path}")) else { continue };
                let differ = reference.data().iter().enumerate();
                let most = differ.map(|(i, v)| v.abs_diff(pixels[(i % plane) * channels + i / plane])).max().unwrap();
                notes.push((path, most, most <= limit));
            }
            compared += 1;
            if !notes.iter().any(|n| n.2) {
                wrong.push(format!("{name}/{image}: {notes:?}"));
                continue;
            }
            // where the pixels are equal the tensor is torch's: 2 ulp of 3, since the processors fuse their factors
            let tensor = preprocess.apply(&picture).unwrap();
            for path in notes.iter().filter(|n| n.1 == 0).map(|n| n.0) {
                let Ok(reference) = expected.tensor(&format!("{image}.float_{path}")) else { continue };
                let reference = reference.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                let most = reference.zip(&tensor).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                if most > 1e-6 {
                    wrong.push(format!("{name}/{image}: float_{path} differs by {most}"));
                }
            }
        }
    }
    println!("{compared} compared");
    assert!(compared > 0 && wrong.is_empty(), "{} of {compared} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// No tolerance: a decoder that rounds or upsamples otherwise is off by up to 3 of 255 in 4 % of the pixels, which moved
/// probabilities by 2.5e-3.
#[test]
fn jpegs_have_the_pixels_of_pillow() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/jpeg");
    let index = json(&root.join("index.json")).unwrap();
    let wrong = index.as_object().unwrap().iter().filter(|(name, expected)| {
        let image = Image::open(root.join(format!("{name}.jpg"))).unwrap();
        let digest: String = Sha256::digest(image.pixels()).iter().map(|byte| format!("{byte:02x}")).collect();
        expected["size"] != serde_json::json!([image.width(), image.height()]) || expected["sha256"] != digest
    });
    assert_eq!(wrong.map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [""; 0]);
    assert_eq!(index.as_object().unwrap().len(), 45);
}
