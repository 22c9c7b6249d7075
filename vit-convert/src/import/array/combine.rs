//! Constants made of other constants: dequantised, scaled, added, joined. The parts are read when the result is.

use super::view::{Array, Blocks, Origin};
use crate::import::axes;

impl Array {
    /// `(codes - zero) * scale`, broadcast to one shape.
    pub fn dequantised(codes: Self, scale: &Self, zero: Option<&Self>) -> Result<Self, String> {
        let dims = codes.shape();
        let zero = zero.map(|z| z.expand(&dims).ok_or("the zero point does not fit")).transpose()?;
        let scale = scale.expand(&dims).ok_or("the scale does not fit")?;
        Self::nested(Origin::Dequantised { codes, scale, zero }, &dims)
    }

    /// `com.microsoft.MatMulNBits`'s weight as `[n, k]`.
    pub fn blocks(blocks: Blocks) -> Result<Self, String> {
        let dims = [blocks.n, blocks.k];
        Self::nested(Origin::Blocks(blocks), &dims)
    }

    /// Times another, which broadcasts to this one's shape.
    pub fn times(&self, other: &Self) -> Result<Self, String> {
        let dims = self.shape();
        let other = other.expand(&dims).ok_or("the factor does not fit")?;
        Self::nested(Origin::Product(self.clone(), other), &dims)
    }

    /// The sum of two of one shape.
    pub fn plus(&self, other: &Self) -> Result<Self, String> {
        let dims = self.shape();
        let other = other.expand(&dims).ok_or("the summand does not fit")?;
        Self::nested(Origin::Sum(self.clone(), other), &dims)
    }

    /// `bias + Σ weight · shift` for each output channel.
    pub fn shifted(weight: Self, shift: Vec<f64>, bias: Option<Self>) -> Result<Self, String> {
        let dims = [weight.dim(0)];
        Self::nested(Origin::Shifted { weight, shift, bias }, &dims)
    }

    /// Joined along a dimension; the other dimensions are equal.
    pub fn concat(parts: &[Self], dim: usize) -> Result<Self, String> {
        let (Some(first), true) = (parts.first(), parts.len() <= 1 << 16) else { return Err("nothing to join".into()) };
        let shape = first.shape();
        for part in parts {
            let other = part.shape();
            if other.len() != shape.len() || (0..shape.len()).any(|i| i != dim && other[i] != shape[i]) {
                return Err(format!("constants of shapes {shape:?} and {other:?} do not join along axis {dim}"));
            }
        }
        if let Some(whole) = Self::neighbours(parts, dim) {
            return Ok(whole);
        }
        let mut order: Vec<usize> = (0..shape.len()).collect();
        order.swap(0, dim);
        let turned: Vec<Self> = parts.iter().map(|p| p.transpose(&order)).filter(|p| !p.is_empty()).collect();
        let Some(front) = turned.first() else { return Ok(first.clone()) };
        let mut dims = front.shape();
        dims[0] = turned.iter().try_fold(0usize, |n, p| n.checked_add(p.dim(0))).ok_or("too large")?;
        let dtype = first.dtype;
        let mut out = Self::nested(Origin::Concat(turned), &dims)?;
        out.dtype = dtype;
        Ok(out.transpose(&order))
    }

    /// One view of parts that are adjacent in one origin.
    fn neighbours(parts: &[Self], dim: usize) -> Option<Self> {
        let mut whole = parts.first()?.clone();
        for part in &parts[1..] {
            if !whole.origin.same(&part.origin) || part.dtype != whole.dtype {
                return None;
            }
            let (n, m) = (whole.dim(dim), part.dim(dim));
            let stride = match (whole.dims[dim].as_slice(), part.dims[dim].as_slice()) {
                ([d], []) => (d.axis == 0).then_some(d.stride)?,
                ([d], [e]) => (d.axis == 0 && e.axis == 0 && d.stride == e.stride).then_some(d.stride)?,
                ([], rest) => {
                    let step = part.offset.checked_sub(whole.offset)?;
                    (step > 0 && rest.iter().all(|e| e.axis == 0 && e.stride == step) && rest.len() <= 1)
                        .then_some(step)?
                }
                _ => return None,
            };
            let others = (0..whole.dims.len()).all(|i| i == dim || whole.dims[i] == part.dims[i]);
            if !others || part.offset != whole.offset.checked_add(stride.checked_mul(n)?)? {
                return None;
            }
            whole.dims[dim] = axes::strided(0, stride, n.checked_add(m)?);
        }
        Some(whole)
    }

    /// Does the other follow this one immediately in the same constant of the file?
    pub fn is_followed_by(&self, other: &Self) -> bool {
        Self::neighbours(&[self.clone(), other.clone()], 0).is_some()
    }
}
