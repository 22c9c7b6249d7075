//! Integers in the blocks' linear layers, and floats in everything else.
//!
//! Weights are signed bytes with a scale for each output. Activations are unsigned bytes with a scale and an offset for
//! each row, found once the row is complete: what GELU leaves is hardly ever negative, and would use half of a signed byte.
//! Sums are exact, in 32 bits, and become f32 where the bias is added.
//!
//! `x86` has what all such kernels share; `tiled` multiplies in AMX tiles, `vnni` in vectors.

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiled;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use tiled::Tiled;
#[cfg(target_arch = "x86_64")]
pub(crate) use vnni::Vnni;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Mixed;

/// The widest layer whose sums 32 bits hold for certain: `255 · 127 · 2¹⁶ < 2³¹`.
pub(crate) const WIDEST: usize = 1 << 16;

/// A row whose values differ by less than this counts as zero: the inverse of its scale would be infinite.
const TINY: f32 = 256.0 * f32::MIN_POSITIVE;

/// `x + MAGIC` is rounded to an integer, ties to even, which then stands in the lowest bits.
const MAGIC: f32 = 1.5 * (1 << 23) as f32;

/// What the bytes of a row stand for: `step · byte + least`. Zero is among it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    step: f32,
    least: f32,
}

impl Scale {
    /// For values from `low ≤ 0` to `high ≥ 0`; with it the inverse of the step, and what the byte of the least is, before
    /// that is taken off from all. In a row that is not finite the step is NaN, so that no product with it is a number.
    fn new(low: f32, high: f32) -> (Self, f32, i32) {
        if !(low.is_finite() && high.is_finite()) {
            return (Self { step: f32::NAN, least: 0.0 }, 0.0, 0);
        }
        if high - low < TINY {
            return (Self { step: 0.0, least: 0.0 }, 0.0, 0);
        }
        // 254 steps, as both ends may be rounded away from each other
        let step = high / 254.0 - low / 254.0;
        let inverse = 1.0 / step;
        // rounded once, as the kernels round: where the product itself is rounded to a tie, the least value's byte would be −1
        let off = low.mul_add(inverse, MAGIC) - MAGIC;
        (Self { step, least: step * off }, inverse, off as i32)
    }
}

/// Rounds a row of weights to integers of a byte; answers their scale, and the sum of what they stand for.
pub(crate) fn round(row: &mut [f32]) -> (f32, f32) {
    // as integers, which compilers compare and add in vectors; a sum is exact, as no layer is wider than `WIDEST`
    let largest = row.iter().fold(0, |m, x| m.max(x.abs().to_bits() as i32));
    let largest = f32::from_bits(largest as u32);
    let (Scale { step, .. }, inverse, _) = Scale::new(-largest, largest);
    let mut sum = 0i32;
    for x in row {
        let shifted = *x * inverse + MAGIC;
        sum = sum.wrapping_add((shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32));
        *x = shifted - MAGIC;
    }
    (step, step * sum as f32)
}
