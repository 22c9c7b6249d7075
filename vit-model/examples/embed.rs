//! Search by example: the images of a folder, those most like a query first.
//!
//! ```console
//! $ cargo run --release -p vit-model --example embed
//! $ cargo run --release -p vit-model --example embed timm/vit_small_patch14_dinov2.lvd142m query.jpg photos
//! ```
//!
//! Arguments: a model (a file, a folder or a Hub id), the query, and the folder. Without them: the digits model, its
//! sample of a nine, and all its samples.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use vit_model::{Predictor, image::Image, load, predictor::Options};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/digits");

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| format!("{DIGITS}/model.safetensors"));
    let query = args.next().unwrap_or_else(|| format!("{DIGITS}/samples/9.png"));
    let folder = args.next().unwrap_or_else(|| format!("{DIGITS}/samples"));

    let predictor = Predictor::new(&load::pretrained(&model)?, &Options::default())?;
    let wanted = embed(&predictor, query.as_ref())?;

    let mut found: Vec<(f32, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.clone())? {
        let path = entry?.path();
        match embed(&predictor, &path) {
            Ok(embedding) => found.push((cosine(&wanted, &embedding), path)),
            Err(why) => eprintln!("left out: {why}"), // what is in a folder need not be an image
        }
    }
    found.sort_by(|(a, _), (b, _)| b.total_cmp(a));

    println!("most like {query}, by the cosine of {} features:", wanted.len());
    for (similarity, path) in found.iter().take(20) {
        println!("  {similarity:7.4}  {}", path.display());
    }
    Ok(())
}

/// What the model's head would read: its features, pooled, of length 1.
fn embed(predictor: &Predictor, path: &Path) -> vit_model::Result<Vec<f32>> {
    let pixels = predictor.preprocess()?.apply(&Image::open(path, true)?)?; // [C, H, W]
    let mut features = predictor.forward(&pixels, 1)?.pre_logits; // [D]
    let length = features.iter().map(|f| f * f).sum::<f32>().sqrt();
    features.iter_mut().for_each(|f| *f /= length);
    Ok(features)
}

/// Of two vectors of length 1: 1 where they agree, 0 where they have nothing in common.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
