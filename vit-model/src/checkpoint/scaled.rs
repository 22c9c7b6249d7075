//! 8-bit weights with their scales: `weight` times `weight_scale`, one for the matrix, for each row, or for each block.

use std::sync::Arc;

use super::{computed::Computed, stored::Stored};
use crate::{
    Error, Result,
    weights::{Dtype, Weights},
};

/// Ends of the names of scales, for a weight `x.weight`: those of compressed-tensors, of DeepSeek (a factor, in spite of its
/// name), and of ComfyUI.
const ENDS: [&str; 3] = ["weight_scale", "weight_scale_inv", "scale_weight"];
/// Ends of the names of scales of activations, which are not quantised here.
const INPUTS: [&str; 2] = ["input_scale", "scale_input"];

/// Multiplies every weight that has a scale by it.
pub(super) fn merge(stored: &mut Stored) -> Result<()> {
    let mut computed = Computed::new(stored.weights.clone());
    let (mut hidden, mut scaled) = (0usize, 0usize);
    for (name, scale) in stored.weights.tensors() {
        if INPUTS.iter().any(|end| name.ends_with(&format!(".{end}"))) {
            computed.hide(name);
            hidden = hidden.saturating_add(1);
            continue;
        }
        let Some((layer, end)) = name.rsplit_once('.') else { continue };
        let weight = format!("{layer}.weight");
        let Some(info) = stored.weights.tensors().get(&weight).filter(|_| ENDS.contains(&end)) else { continue };
        let rows = info.shape.first().copied().unwrap_or(1);
        let blocks = |&n: &usize| n.div_ceil(BLOCK);
        let fits = match scale.shape.as_slice() {
            [] | [1] | [1, 1] => true,
            [n] | [n, 1] if *n == rows => true,
            shape => {
                shape.len() == 2 && info.shape.len() == 2 && shape.iter().copied().eq(info.shape.iter().map(blocks))
            }
        };
        if !fits {
            return Err(Error::tensor(
                name,
                format!(
                    "has the shape {:?}, which is not that of a scale of 8-bit weights (fp8) of {:?}",
                    scale.shape, info.shape
                ),
            ));
        }
        computed.hide(name);
        scaled = scaled.saturating_add(1);
        let (name, shape) = (name.clone(), info.shape.clone());
        computed.replace(weight.clone(), shape.clone(), move |file| multiplied(file, &weight, &name, &shape));
    }
    if scaled > 0 {
        stored.remarks.push(format!("{scaled} weights were multiplied by their scales"));
    }
    if scaled > 0 || hidden > 0 {
        stored.weights = Arc::new(computed);
    }
    Ok(())
}

/// Rows and columns of a block with one scale.
const BLOCK: usize = 128;

/// A weight times its scale.
fn multiplied(file: &dyn Weights, name: &str, scale: &str, shape: &[usize]) -> Result<Vec<u8>> {
    let (values, factors) = (file.read_f32(name)?, file.read_f32(scale)?);
    let rows = shape.first().copied().unwrap_or(1).max(1);
    let width = values.len().checked_div(rows).unwrap_or(0).max(1);
    let blocks = file.tensors().get(scale).filter(|info| info.shape.len() == 2);
    let across = blocks.and_then(|info| info.shape.get(1)).copied().unwrap_or(1);
    let by_row = factors.len() == rows && across == 1;
    let factor = |at: usize| {
        let (row, column) = (at.checked_div(width).unwrap_or(0), at.checked_rem(width).unwrap_or(0));
        let index = match factors.len() {
            1 => 0,
            _ if by_row => row,
            _ => (row / BLOCK).saturating_mul(across).saturating_add(column / BLOCK),
        };
        factors.get(index).copied().unwrap_or(f32::NAN)
    };
    let bytes: Vec<u8> = values.iter().enumerate().flat_map(|(at, value)| (value * factor(at)).to_le_bytes()).collect();
    crate::weights::check_finite(name, Dtype::F32, &bytes)?;
    Ok(bytes)
}
