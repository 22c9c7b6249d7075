//! Search by example: the images of a folder, those most like a query first.
//!
//! ```console
//! $ cargo run --release -p vit-model --example embed
//! $ cargo run --release -p vit-model --example embed timm/vit_small_patch14_dinov2.lvd142m query.jpg photos
//! ```
//!
//! Arguments: a model (a file, a folder or a Hub id), the query, and the folder. Without them: the digits model, its
//! sample of a nine, and all its samples.

use std::path::PathBuf;

use vit_model::{Predictor, image};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/digits");

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let model = Predictor::open(args.next().unwrap_or_else(|| "digits".into()))?;
    let query = args.next().unwrap_or_else(|| format!("{DIGITS}/samples/9.png"));
    let folder = args.next().unwrap_or_else(|| format!("{DIGITS}/samples"));

    let images = image::files(&folder).collect::<vit_model::Result<Vec<PathBuf>>>()?;
    let wanted = model.embed_all([&query]).normalize().next().expect("an answer for each input")?;
    let mut found = Vec::new();
    for (path, vector) in images.iter().zip(model.embed_all(&images).normalize()) {
        match vector {
            // of two vectors of length 1 the product is the cosine
            Ok(vector) => found.push((wanted.iter().zip(&vector).map(|(a, b)| a * b).sum::<f32>(), path)),
            Err(why) => eprintln!("left out: {why}"),
        }
    }
    found.sort_by(|(a, _), (b, _)| b.total_cmp(a));

    println!("most like {query}, by the cosine of {} features:", wanted.len());
    for (similarity, path) in found.iter().take(20) {
        println!("  {similarity:7.4}  {}", path.display());
    }
    Ok(())
}
