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
use candle_core::{DType, Device, Tensor};
use image::{ImageBuffer, Luma, Rgb, RgbImage, imageops};
use vit_model::{image::Image, load, preprocess::Preprocess, tap};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/digits");
const TARGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/attention");
/// A smaller picture is enlarged by a whole factor.
const MIN_SIDE: u32 = 224;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| format!("{DIGITS}/model.safetensors"));
    let image = args.next().unwrap_or_else(|| format!("{DIGITS}/samples/8.png"));
    let folder = args.next().unwrap_or_else(|| TARGET.into());

    let checkpoint = load::pretrained(&model)?;
    let config = &checkpoint.info.model;
    let preprocess = Preprocess::new(&checkpoint.info.preprocess)?;
    let image = Image::open(image.as_ref(), true)?;
    let [h, w] = config.img_size;

    let x = Tensor::from_vec(preprocess.apply(&image)?, (1, config.in_chans, h, w), &Device::Cpu)?;
    let vit = checkpoint.model(DType::F32, &Device::Cpu)?; // the CPU engine keeps no attention maps, candle's modules do
    let maps = vit.attention_maps(&x)?; // a block each, or as many for every block: [1, heads, N, N]
    let mean = |maps: &[Tensor]| Tensor::cat(maps, 1)?.squeeze(0)?.mean(0); // [N, N]
    let blocks = maps.chunks(maps.len().div_ceil(config.depth)).map(mean).collect::<Result<Vec<_>, _>>()?;

    // what the model saw of the image: resized and cropped
    let seen = RgbImage::from_raw(w as u32, h as u32, preprocess.resize_and_crop(&image)?);
    let seen = seen.context("the model does not read pictures in colour")?;
    let draw = |attention: &Tensor, name: &str| -> anyhow::Result<()> {
        let path = Path::new(&folder).join(name);
        overlay(&seen, &tap::per_patch(attention, config)?, config.grid()).save(&path)?;
        println!("{}", path.display());
        Ok(())
    };
    std::fs::create_dir_all(&folder).with_context(|| folder.clone())?;
    for (block, attention) in blocks.iter().enumerate() {
        draw(attention, &format!("block-{block:02}.png"))?;
    }
    draw(&tap::rollout(&blocks)?, "rollout.png")
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
