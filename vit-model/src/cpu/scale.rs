//! The scales of int8: how a row of floats becomes bytes.

/// The widest layer whose sums are certain to fit 32 bits: `255 · 127 · 2¹⁶ < 2³¹`.
pub(crate) const WIDEST: usize = 1 << 16;

/// A row whose values differ by less than this counts as zero, because the inverse of its scale would be infinite.
const TINY: f32 = 256.0 * f32::MIN_POSITIVE;

/// `x + MAGIC` is `x` rounded to an integer, ties to even, which is then in the lowest bits.
pub(crate) const MAGIC: f32 = 1.5 * (1 << 23) as f32;

/// A byte of a row of activations represents `step · byte + least`. Zero is among these values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) step: f32,
    pub(crate) least: f32,
}

impl Scale {
    /// The scale for values from `low ≤ 0` to `high ≥ 0`, the inverse of its step, and the integer that the least value is
    /// rounded to, which is subtracted from all. If the row is not finite, the step is NaN so that no product is a number.
    pub(crate) fn new(low: f32, high: f32) -> (Self, f32, i32) {
        if !(low.is_finite() && high.is_finite()) {
            return (Self { step: f32::NAN, least: 0.0 }, 0.0, 0);
        }
        if high - low < TINY {
            return (Self { step: 0.0, least: 0.0 }, 0.0, 0);
        }
        // 254 steps, because both ends may be rounded away from each other
        let step = high / 254.0 - low / 254.0;
        let inverse = 1.0 / step;
        // a fused product, as in the kernels: if it were rounded to a tie first, the least value's byte could be −1
        let off = low.mul_add(inverse, MAGIC) - MAGIC;
        (Self { step, least: step * off }, inverse, off as i32)
    }
}

/// Rounds a row of weights to integers of a byte. Returns their scale, and the sum of the values that they represent.
pub(crate) fn round(row: &mut [f32]) -> (f32, f32) {
    // as integers, because compilers vectorise their comparisons and sums; no layer is wide enough to overflow the sum
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
