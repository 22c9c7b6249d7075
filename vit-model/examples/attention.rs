//! Where a model looks: attention as heat maps over the image, one for each block and one for all (attention rollout).
//!
//! ```console
//! $ cargo run --release -p vit-model --example attention
//! $ cargo run --release -p vit-model --example attention timm/deit_small_patch16_224.fb_in1k photo.jpg maps
//! ```
//!
//! Arguments: a model (a file, a folder or a Hub id), an image, and a folder to write into. Without them: the digits
//! model, its sample of an eight, and `target/attention`.

use std::path::Path;

use anyhow::Context as _;
use vit_model::image::Image;
use vit_model::image_crate::{ImageBuffer, Luma, Rgb, RgbImage, imageops};
use vit_model::{Predictor, predictor::Runtime};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/digits");
const TARGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/attention");
/// A smaller picture is enlarged by a whole factor.
const MIN_SIDE: u32 = 224;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "digits".into());
    let image = args.next().unwrap_or_else(|| format!("{DIGITS}/samples/8.png"));
    let folder = args.next().unwrap_or_else(|| TARGET.into());

    // the CPU engine keeps no attention, candle's modules do
    let model = Predictor::builder().runtime(Runtime::Modules).open(&model)?;
    let image = Image::open(image)?;
    let maps = model.attention(&image)?;

    // what the model saw of the image: resized and cropped
    let [h, w] = model.config().img_size;
    let seen = RgbImage::from_raw(w as u32, h as u32, model.preprocess()?.resize_and_crop(&image)?);
    let seen = seen.context("the model does not read pictures in colour")?;
    let draw = |attention: &[f32], name: &str| -> anyhow::Result<()> {
        let path = Path::new(&folder).join(name);
        overlay(&seen, &maps.per_patch(attention)?, maps.grid()).save(&path)?;
        println!("{}", path.display());
        Ok(())
    };
    std::fs::create_dir_all(&folder).with_context(|| folder.clone())?;
    for map in &maps {
        draw(&map.mean()?, &format!("{}.png", map.name()))?;
    }
    draw(&maps.rollout()?, "rollout.png")
}

/// The map, stretched to its own range and smooth between patches, half transparent over the picture.
fn overlay(picture: &RgbImage, weights: &[f32], [rows, columns]: [usize; 2]) -> RgbImage {
    let (low, high) = weights.iter().fold((f32::MAX, f32::MIN), |(l, h), &w| (l.min(w), h.max(w)));
    let range = (high - low).max(f32::MIN_POSITIVE);
    let map = ImageBuffer::from_fn(columns as u32, rows as u32, |x, y| {
        Luma([(weights[y as usize * columns + x as usize] - low) / range])
    });

    let scale = MIN_SIDE.div_ceil(picture.width().min(picture.height()));
    let (width, height) = (picture.width() * scale, picture.height() * scale);
    let map = imageops::resize(&map, width, height, imageops::FilterType::Triangle);
    let mut over = imageops::resize(picture, width, height, imageops::FilterType::Nearest);
    for (Rgb(pixel), Luma([v])) in over.pixels_mut().zip(map.pixels()) {
        // black over red and yellow to white
        let heat = [3.0 * v, 3.0 * v - 1.0, 3.0 * v - 2.0].map(|c| 255.0 * c.clamp(0.0, 1.0));
        *pixel = std::array::from_fn(|c| f32::from(pixel[c]).midpoint(heat[c]).round() as u8);
    }
    over
}
