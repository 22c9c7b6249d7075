//! The five most probable classes of each image.
//!
//! ```console
//! $ cargo run --release -p vit-model --example classify
//! $ cargo run --release -p vit-model --example classify timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k photo.jpg
//! ```
//!
//! Arguments: a model (a file, a folder or a Hub id), then images. Without them: the digits model and its ten samples.

use std::path::PathBuf;

use vit_model::{Predictor, image::Image, load, predictor::Options};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/digits");

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| format!("{DIGITS}/model.safetensors"));
    let mut paths: Vec<PathBuf> = args.map(PathBuf::from).collect();
    if paths.is_empty() {
        paths = (0..10).map(|digit| format!("{DIGITS}/samples/{digit}.png").into()).collect();
    }

    let predictor = Predictor::new(&load::pretrained(&model)?, &Options::default())?;
    for batch in paths.chunks(16) {
        let images = batch.iter().map(|path| Image::open(path, true)).collect::<Result<Vec<_>, _>>()?;
        for (path, classes) in batch.iter().zip(predictor.predict(&images)?) {
            println!("{}", path.display());
            for class in classes.iter().take(5) {
                println!("  {:6.2} %  {}", 100.0 * class.probability, class.label);
            }
        }
    }
    Ok(())
}
