//! Photographs as two Rust libraries prepare them for a model of 224 × 224 pixels, for `compare.py`.
//!
//! Each form calls the same functions of the `image` crate with the same arguments as the library does:
//!
//! - `candle`: `candle-examples/src/imagenet.rs`, `load_image224`
//! - `fastembed`: `src/image_embedding/utils.rs` with CLIP's `preprocessor_config.json`
//!
//! `preprocessing-peers FORM IMAGE OUT` writes `224 · 224 · 3` bytes, before scaling and normalisation.

use image::imageops::FilterType;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [form, input, output] = args.as_slice() else {
        return Err("usage: preprocessing-peers candle|fastembed IMAGE OUT".into());
    };
    let photo = image::ImageReader::open(input)?.decode()?;
    let pixels = match form.as_str() {
        // bilinear, to the size itself; transformers resizes to 256 with bicubic and crops
        "candle" => photo.resize_to_fill(224, 224, FilterType::Triangle),
        // both sides to 224, whatever the photo's shape is
        "fastembed" => image::DynamicImage::from(photo.into_rgb8()).resize_exact(224, 224, FilterType::CatmullRom),
        other => return Err(format!("no form {other}").into()),
    };
    std::fs::write(output, pixels.into_rgb8().into_raw())?;
    Ok(())
}
