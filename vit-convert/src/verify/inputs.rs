//! The images that a conversion is tried on: random, from a fixed seed, strong and faint, as the graph takes them.

use vit_model::Config;

use super::Error;
use super::run::Value;
use crate::graph::{DType, Graph};

/// How a graph's input becomes the model's pixels `[B, C, H, W]`: `pixel = raw · scale + shift`, per channel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
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

/// Where the random numbers begin.
const SEED: u64 = 0x5649_545F_5253;

/// SplitMix64 (Steele, Lea and Flood 2014): the same numbers everywhere.
pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub(super) fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Roughly normal: the sum of four uniforms, which needs no library's `ln` and so gives the same bits everywhere.
    fn normal(&mut self) -> f64 {
        let sum: f64 = (0..4).map(|_| self.uniform()).sum();
        (sum - 2.0) * 3f64.sqrt()
    }
}

/// The runs to try. Strong noise shows the wiring; a faint image on a shifted ground shows ε, means and biases.
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
        Some(b) => vec![b],
        None if large => vec![1],
        None => vec![2, 1],
    };
    let mut random = Random(SEED);
    let alone = batches == [1];
    let run = |(i, batch)| one(&mut random, config, reading, input.dtype, batch, (i, alone));
    batches.into_iter().enumerate().map(run).collect()
}

/// Some images in the model's own form `[B, C, H, W]`, and how many they are.
pub(super) fn images(config: &Config, batch: usize) -> Result<(Vec<f32>, usize), Error> {
    let input = one(&mut Random(SEED), config, &Reading::default(), None, batch, (0, batch == 1))?;
    Ok((input.pixels, input.batch))
}

fn one(
    random: &mut Random,
    config: &Config,
    reading: &Reading,
    dtype: Option<DType>,
    batch: usize,
    (first, alone): (usize, bool),
) -> Result<Input, Error> {
    let dtype = dtype.unwrap_or(DType::F32);
    let ([h, w], c) = (config.img_size, config.in_chans);
    let dims = if reading.nhwc { vec![batch, h, w, c] } else { vec![batch, c, h, w] };
    super::run::count(&dims).map_err(Error::Graph)?;
    let of = |list: &[f64], default: f64, i: usize| list.get(i).copied().unwrap_or(default);
    let mut raw = vec![0f64; batch * c * h * w];
    let mut pixels = vec![0f32; raw.len()];
    for b in 0..batch {
        let odd = (b + first) % 2 == 1;
        for k in 0..c {
            let ground = random.normal();
            let (scale, shift) = (of(&reading.scale, 1.0, k), of(&reading.shift, 0.0, k));
            for y in 0..h {
                // one image alone is both, its lower half faint
                let faint = if alone { y >= h / 2 } else { odd };
                for x in 0..w {
                    let wanted = if faint { ground + 0.05 * random.normal() } else { random.normal() };
                    let at = if reading.nhwc { ((b * h + y) * w + x) * c + k } else { ((b * c + k) * h + y) * w + x };
                    // as the graph's type holds it; integers cover their whole range
                    let r = match dtype {
                        DType::U8 if faint => (120.0 + 8.0 * ground + 4.0 * random.normal()).clamp(0.0, 255.0).floor(),
                        DType::U8 => (random.next() >> 56) as f64,
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
    fn the_same_images_every_time() {
        let mut random = Random(1);
        assert_eq!([random.next(), random.next()], [0x910A_2DEC_8902_5CC1, 0xBEEB_8DA1_658E_EC67]);
        let mut sum = (0.0, 0.0);
        for _ in 0..10_000 {
            let x = random.normal();
            sum = (sum.0 + x, sum.1 + x * x);
        }
        assert!((sum.0 / 1e4).abs() < 0.03 && (sum.1 / 1e4 - 1.0).abs() < 0.05, "{sum:?}");
    }
}
