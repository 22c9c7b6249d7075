//! `explain`: attention as a picture, laid over what the model saw.

use anyhow::bail;
use image::{ExtendedColorType, ImageEncoder as _, codecs::png::PngEncoder};
use vit_model::predictor::Runtime;
use vit_model::{BlockKind, Config, Precision, PreprocessConfig};

use crate::args::{ExplainArgs, ExplainMethod, orientation};
use crate::output::show;
use crate::sources::Source;
use crate::{complain, model, open, save};

/// A picture smaller than this is enlarged by a whole factor.
const MIN_SIDE: usize = 224;

pub fn run(args: &ExplainArgs, verbose: bool) -> anyhow::Result<()> {
    if !matches!(args.run.precision, Precision::Auto | Precision::F32) {
        bail!("--precision: attention is read from candle's modules, which run in f32 here; leave it out, or say f32");
    }
    let checkpoint = model::checkpoint(&args.model)?;
    let config = &checkpoint.info.model;
    check(args, config)?;
    let source = Source::of(&args.image);
    save::check(&args.output, &[&args.image])?;
    let image = source.image(orientation(args.no_exif))?;
    // the engine keeps no attention maps: candle's modules run
    let builder = open::builder(args.run).runtime(Runtime::Modules);
    let predictor = builder.checkpoint(&checkpoint).map_err(|error| open::named(&args.model, error))?;
    open::state_assumptions(predictor.info());
    if verbose {
        complain(&format!("{} runs in candle's modules, which can be looked into", show(&args.model)));
    }
    let pixels = source.named(predictor.preprocess().and_then(|preprocess| preprocess.apply(&image)))?;
    let maps = source.named(predictor.attention(&image))?;
    let attention = match args.method {
        ExplainMethod::Rollout => maps.rollout()?,
        ExplainMethod::Map => maps.block(args.block.unwrap_or(config.depth - 1), args.head)?,
    };
    let weights = maps.per_patch(&attention)?;
    if let Some(bad) = weights.iter().find(|w| !w.is_finite()) {
        bail!("the model's attention is {bad}");
    }
    let picture = draw(&weights, config, (!args.bare).then_some((&*pixels, &checkpoint.info.preprocess)));
    let (width, height) = (picture.width as u32, picture.height as u32);
    save::file(&args.output, |out| {
        Ok(PngEncoder::new(out).write_image(&picture.rgb, width, height, ExtendedColorType::Rgb8)?)
    })
}

fn check(args: &ExplainArgs, config: &Config) -> anyhow::Result<()> {
    if args.method == ExplainMethod::Rollout {
        if args.block.is_some() || args.head.is_some() {
            bail!("--block and --head choose a map: add --method map");
        }
        if config.diff_attn || config.block == BlockKind::DiffParallelScaling {
            bail!("rollout needs attention that sums to one; this model's is a difference: use --method map");
        }
    }
    if let Some(block) = args.block.filter(|&b| b >= config.depth) {
        bail!("--block {block}: the model has blocks 0 to {}", config.depth - 1);
    }
    if let Some(head) = args.head.filter(|&h| h >= config.num_heads) {
        bail!("--head {head}: the model has heads 0 to {}", config.num_heads - 1);
    }
    Ok(())
}

struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

/// The map, scaled to its own range, smooth between patches; over the picture where there is one.
fn draw(weights: &[f32], config: &Config, beneath: Option<(&[f32], &PreprocessConfig)>) -> Picture {
    let ([h, w], [ph, pw], [rows, columns]) = (config.img_size, config.patch_size, config.grid());
    let scale = MIN_SIDE.div_ceil(h.min(w)).max(1);
    let (low, high) = weights.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &w| (l.min(w), h.max(w)));
    let range = (high - low).max(f32::MIN_POSITIVE);
    let at = |row: usize, column: usize| (weights[row * columns + column] - low) / range;
    // between the centres of patches, as a pixel of the picture lies there
    let place = |pixel: usize, patch: usize, count: usize| {
        let x = ((pixel as f32 + 0.5) / scale as f32 / patch as f32 - 0.5).clamp(0.0, (count - 1) as f32);
        let below = x.floor() as usize;
        (below, (below + 1).min(count - 1), x - x.floor())
    };
    let mut rgb = Vec::with_capacity(h * w * scale * scale * 3);
    for y in 0..h * scale {
        let (top, bottom, down) = place(y, ph, rows);
        for x in 0..w * scale {
            let (left, right, along) = place(x, pw, columns);
            let upper = at(top, left) * (1.0 - along) + at(top, right) * along;
            let lower = at(bottom, left) * (1.0 - along) + at(bottom, right) * along;
            let heat = heat(upper * (1.0 - down) + lower * down);
            let pixel = match beneath {
                None => heat,
                Some((pixels, preprocess)) => {
                    let picture = seen(pixels, preprocess, config, y / scale, x / scale);
                    std::array::from_fn(|c| 0.5 * picture[c] + 0.5 * heat[c])
                }
            };
            rgb.extend(pixel.map(|v| (v * 255.0).round().clamp(0.0, 255.0) as u8));
        }
    }
    Picture { width: w * scale, height: h * scale, rgb }
}

/// A pixel of the model's input, back in 0 … 1; one channel is grey, of more than three the first three are shown.
fn seen(pixels: &[f32], preprocess: &PreprocessConfig, config: &Config, y: usize, x: usize) -> [f32; 3] {
    let [h, w] = config.img_size;
    std::array::from_fn(|c| {
        let c = if config.in_chans < 3 { 0 } else { c };
        let value = f64::from(pixels[(c * h + y) * w + x]);
        let (mean, std) = (preprocess.mean.get(c).unwrap_or(&0.0), preprocess.std.get(c).unwrap_or(&1.0));
        (value * std + mean) as f32
    })
}

/// Black over red and yellow to white.
fn heat(v: f32) -> [f32; 3] {
    [(v * 3.0).clamp(0.0, 1.0), (v * 3.0 - 1.0).clamp(0.0, 1.0), (v * 3.0 - 2.0).clamp(0.0, 1.0)]
}
