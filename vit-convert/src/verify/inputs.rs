//! The images for a proof: random from a fixed seed, with strong and with faint contrast, in the graph's input format.

use vit_model::{Config, random::SplitMix64};

use super::error::Error;
use super::run::{self, Value};
use crate::onnx::graph::{DType, Graph};

/// How a graph's input becomes the model's pixels `[B, C, H, W]`, `pixel = raw · scale + shift` per channel; and which
/// of its outputs is the model's answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// The graph's name for the answer.
    pub output: String,
    /// Other outputs that are parts of the model.
    pub parts: Vec<String>,
    /// The graph divides the answer by its Euclidean length.
    pub unit: bool,
    /// The graph takes `[B, H, W, C]`.
    pub nhwc: bool,
    /// Per channel; empty: 1.
    pub scale: Vec<f64>,
    /// Per channel; empty: 0.
    pub shift: Vec<f64>,
}

/// One run: the graph's inputs, and the same images as the model reads them.
#[derive(Clone)]
pub(super) struct Input {
    pub values: Vec<Value>,
    pub pixels: Vec<f32>,
    pub batch: usize,
}

/// The batches of the runs if the graph accepts any batch.
pub const BATCHES: [usize; 2] = [2, 1];

/// The largest batch that is run, because a small file can declare any.
pub const MOST: usize = 64;

/// Seed of the random numbers.
const SEED: u64 = 0x5649_545F_5253;

/// Roughly normal: the sum of four uniforms, which needs no `ln`, whose last bits differ between libraries.
fn normal(random: &mut SplitMix64) -> f64 {
    let sum: f64 = (0..4).map(|_| random.uniform()).sum();
    (sum - 2.0) * 3f64.sqrt()
}

/// The runs to try. Strong noise reveals wrong wiring; a faint image on a shifted background reveals wrong ε, means and
/// biases.
pub(super) fn plan(graph: &Graph, config: &Config, reading: &Reading, large: bool) -> Result<Vec<Input>, Error> {
    let [input] = graph.inputs.as_slice() else {
        return Err(Error::Graph(format!("the graph has {} inputs, a Vision Transformer has one", graph.inputs.len())));
    };
    let [h, w] = config.img_size;
    let image = if reading.nhwc { [h, w, config.in_chans] } else { [config.in_chans, h, w] };
    let fixed = match &input.shape {
        None => None,
        Some(shape) => {
            let fits = shape.len() == 4 && shape[1..].iter().zip(image).all(|(s, d)| s.is_none_or(|s| s == d as u64));
            if !fits {
                return Err(Error::Graph(format!(
                    "the graph takes {shape:?}, the converted model images of {image:?}"
                )));
            }
            shape[0].map(|b| usize::try_from(b).unwrap_or(usize::MAX))
        }
    };
    let batches = match fixed {
        Some(0) => return Err(Error::Graph("the graph takes batches of no image".into())),
        Some(1) if !large => vec![1, 1],
        Some(b) if b <= MOST => vec![b],
        // many graphs that declare a batch compute any; `verify` says so of those that do not
        _ if large => vec![1],
        _ => BATCHES.to_vec(),
    };
    let mut random = SplitMix64(SEED);
    let alone = batches == [1];
    let run = |(i, batch)| one(&mut random, config, reading, input.dtype, batch, (i, alone));
    batches.into_iter().enumerate().map(run).collect()
}

/// Some images in the model's own form `[B, C, H, W]`, and how many they are.
pub(super) fn images(config: &Config, batch: usize) -> Result<(Vec<f32>, usize), Error> {
    let input = one(&mut SplitMix64(SEED), config, &Reading::default(), None, batch, (0, batch == 1))?;
    Ok((input.pixels, input.batch))
}

fn one(
    random: &mut SplitMix64,
    config: &Config,
    reading: &Reading,
    dtype: Option<DType>,
    batch: usize,
    (first, alone): (usize, bool),
) -> Result<Input, Error> {
    let dtype = dtype.unwrap_or(DType::F32);
    let ([h, w], c) = (config.img_size, config.in_chans);
    let dims = if reading.nhwc { vec![batch, h, w, c] } else { vec![batch, c, h, w] };
    run::count(&dims).map_err(Error::Graph)?;
    let of = |list: &[f64], default: f64, i: usize| list.get(i).copied().unwrap_or(default);
    let mut raw = vec![0f64; batch * c * h * w];
    let mut pixels = vec![0f32; raw.len()];
    for b in 0..batch {
        let odd = (b + first) % 2 == 1;
        for k in 0..c {
            let ground = normal(random);
            let (scale, shift) = (of(&reading.scale, 1.0, k), of(&reading.shift, 0.0, k));
            for y in 0..h {
                // a single image has both, with a faint lower half
                let faint = if alone { y >= h / 2 } else { odd };
                for x in 0..w {
                    let wanted = if faint { ground + 0.05 * normal(random) } else { normal(random) };
                    let at = if reading.nhwc { ((b * h + y) * w + x) * c + k } else { ((b * c + k) * h + y) * w + x };
                    // rounded to the graph's type; integers cover their whole range
                    let r = match dtype {
                        DType::U8 if faint => (120.0 + 8.0 * ground + 4.0 * normal(random)).clamp(0.0, 255.0).floor(),
                        DType::U8 => (random.bits() >> 56) as f64,
                        dtype if super::run::is_float(dtype) => (wanted - shift) / scale,
                        other => return Err(Error::Graph(format!("the graph takes images of {other:?}"))),
                    };
                    raw[at] = r;
                }
            }
        }
    }
    let value = Value::reals(dtype, dims, raw);
    let held = value.to_f64().map_err(Error::Graph)?;
    for b in 0..batch {
        for k in 0..c {
            let (scale, shift) = (of(&reading.scale, 1.0, k), of(&reading.shift, 0.0, k));
            for y in 0..h {
                for x in 0..w {
                    let at = if reading.nhwc { ((b * h + y) * w + x) * c + k } else { ((b * c + k) * h + y) * w + x };
                    pixels[((b * c + k) * h + y) * w + x] = (held[at] * scale + shift) as f32;
                }
            }
        }
    }
    Ok(Input { values: vec![value], pixels, batch })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_is_roughly_normal() {
        let mut random = SplitMix64(1);
        let mut sum = (0.0, 0.0);
        for _ in 0..10_000 {
            let x = normal(&mut random);
            sum = (sum.0 + x, sum.1 + x * x);
        }
        assert!((sum.0 / 1e4).abs() < 0.03 && (sum.1 / 1e4 - 1.0).abs() < 0.05, "{sum:?}");
    }
}
