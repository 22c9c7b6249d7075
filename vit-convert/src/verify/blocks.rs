//! Finds the first block that differs, by comparing the graph's values with the model's tokens after every block.

use candle_core::{Device, Tensor};
use vit_model::VisionTransformer;
use vit_model::vit::tap::Tap;

use super::difference::short;
use super::error::Error;
use super::inputs::Input;
use super::run::{Arithmetic, Value, run_watched};
use crate::onnx::graph::{Graph, ValueId};

/// The model's tokens after every block.
#[derive(Default)]
struct Tokens(Vec<Vec<f64>>);

impl Tap for Tokens {
    fn block(&mut self, _: usize, tokens: &Tensor) -> candle_core::Result<bool> {
        let data: Vec<f32> = tokens.flatten_all()?.to_vec1()?;
        self.0.push(data.into_iter().map(f64::from).collect());
        Ok(true)
    }
}

/// Describes the first block whose tokens equal no value of the graph.
///
/// A block counts as equal if a later one is, because fusion may hide the tokens between two blocks.
pub(super) fn locate(
    graph: &Graph,
    model: &VisionTransformer,
    input: &Input,
    outputs: &[ValueId],
    arithmetic: Arithmetic,
    tolerance: f64,
) -> Result<String, Error> {
    let config = model.config();
    let [h, w] = config.img_size;
    let x = Tensor::from_slice(&input.pixels, (input.batch, config.in_chans, h, w), &Device::Cpu)
        .map_err(vit_model::Error::from)?;
    let mut tokens = Tokens::default();
    model.forward_tapped(&x, &mut tokens)?;
    let (b, n, d) = (input.batch, config.num_tokens(), config.embed_dim);
    let mut closest = vec![(f64::INFINITY, 0); tokens.0.len()];
    let mut watch = |id, value: &Value| {
        if !value.is_real() || value.len() != b * n * d {
            return;
        }
        let turned = match value.dims.as_slice() {
            dims if dims == [n, b, d] && b > 1 => value.permute(&[1, 0, 2]),
            dims if dims == [b, d, n] && n != d => value.permute(&[0, 2, 1]),
            _ => Ok(value.clone()),
        };
        let Some(data) = turned.ok().and_then(|v| v.to_f64().ok()) else { return };
        for (best, block) in closest.iter_mut().zip(&tokens.0) {
            let scale = block.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
            let far = data.iter().zip(block).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / scale;
            if far < best.0 {
                *best = (far, id);
            }
        }
    };
    // this run succeeds, because the same nodes have been evaluated before
    run_watched(graph, input.values.clone(), outputs, arithmetic, &mut watch)?;
    let last = closest.iter().rposition(|(far, _)| *far <= tolerance);
    Ok(match last {
        Some(i) if i + 1 == closest.len() => {
            format!(
                "the tokens agree after every block, so the difference lies behind block {i}: final norm, pooling or head"
            )
        }
        Some(i) => {
            let (far, id) = closest[i + 1];
            let name = graph.names.get(id as usize).map_or("none", String::as_str);
            let far = short(far);
            format!(
                "the tokens agree up to block {i}; block {} is the first that diverges (the closest value, `{name}`, by {far})",
                i + 1
            )
        }
        None => "block 0 is the first whose tokens diverge: the embedding or that block differs".into(),
    })
}
