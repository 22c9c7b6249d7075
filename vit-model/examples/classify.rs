//! The five most probable classes of each image.
//!
//! ```console
//! $ cargo run --release -p vit-model --example classify
//! $ cargo run --release -p vit-model --example classify timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k photo.jpg
//! ```
//!
//! Arguments: a model (a file, a folder or a Hub id), then images. Without them: the digits model and its ten samples.

use vit_model::Predictor;

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/digits");

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let model = Predictor::open(args.next().unwrap_or_else(|| "digits".into()))?;
    let mut images: Vec<String> = args.collect();
    if images.is_empty() {
        images = (0..10).map(|digit| format!("{DIGITS}/samples/{digit}.png")).collect();
    }
    for (image, classes) in images.iter().zip(model.classify_all(&images, 5)) {
        println!("{image}");
        for class in classes? {
            println!("  {:6.2} %  {}", 100.0 * class.probability, class.label);
        }
    }
    Ok(())
}
