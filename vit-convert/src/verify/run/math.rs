//! Loops over many numbers that the compiler makes vectors of, and eˣ, erf and tanh without a branch or a table for
//! them.
//!
//! An f32 is computed as a double, so that these functions add nothing to the rounding of their result.

// what is not inlined into `wide` is compiled without its vectors
#![allow(clippy::inline_always)]

use std::f64::consts::{LN_2, LOG2_E};

/// Runs a loop, compiled for the vectors of this CPU.
#[inline]
pub fn wide<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// A number within bounds; NaN stays NaN.
#[inline(always)]
fn bounded(x: f64, most: f64) -> f64 {
    let x = if x > most { most } else { x };
    if x < -most { -most } else { x }
}

#[inline(always)]
fn horner<const N: usize>(x: f64, coefficients: [f64; N]) -> f64 {
    let mut sum = coefficients[N - 1];
    for &c in coefficients[..N - 1].iter().rev() {
        sum = sum * x + c;
    }
    sum
}

/// eˣ within 5e-13 of it, relative; beyond ±708, where no f32 is finite or not 0, e^±708.
#[inline(always)]
pub fn exp(x: f64) -> f64 {
    // 2ⁿ · eʳ with |r| ≤ ½ ln 2: n is left in the low bits of a sum that has no room for fractions
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5 · 2⁵²
    const TAYLOR: [f64; 11] = [
        1.0,
        1.0,
        1.0 / 2.0,
        1.0 / 6.0,
        1.0 / 24.0,
        1.0 / 120.0,
        1.0 / 720.0,
        1.0 / 5040.0,
        1.0 / 40320.0,
        1.0 / 362_880.0,
        1.0 / 3_628_800.0,
    ];
    let x = bounded(x, 708.0);
    let shifted = x * LOG2_E + SHIFT;
    let r = x - (shifted - SHIFT) * LN_2;
    let power = (shifted.to_bits() << 52).wrapping_add(1023 << 52);
    horner(r, TAYLOR) * f64::from_bits(power)
}

/// erf within 3e-11 of it, relative: `x · p(x²) / q(x²)`, fitted over 0 to 5 with the error levelled; ±1 beyond.
#[inline(always)]
pub fn erf(x: f64) -> f64 {
    const P: [f64; 8] = [
        1.1283791670691066,
        0.20739645228977086,
        0.060509770335801204,
        0.005510855398966166,
        0.0005986790509318757,
        2.8825539938293372e-05,
        1.2709547881102245e-06,
        1.18806694303616e-08,
    ];
    const Q: [f64; 9] = [
        1.0,
        0.5171336524922502,
        0.12600328029502625,
        0.018981095309291627,
        0.0019403850374721818,
        0.00013771026058490672,
        6.528147420187744e-06,
        1.638695781754259e-07,
        3.669930409654346e-10,
    ];
    let x = bounded(x, 5.0);
    x * horner(x * x, P) / horner(x * x, Q)
}

/// tanh, within 1e-12 of it.
#[inline(always)]
pub fn tanh(x: f64) -> f64 {
    1.0 - 2.0 / (1.0 + exp(2.0 * bounded(x, 300.0)))
}

/// Numbers that are summed side by side.
const LANES: usize = 16;

/// `Σ f(x)` in doubles, in an order that is the same on every CPU.
#[inline(always)]
pub fn sum(row: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let (whole, rest) = row.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in whole {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += f(f64::from(x));
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&x| f(f64::from(x))).sum::<f64>()
}

/// The largest number that is none but NaN; −∞ of nothing.
#[inline(always)]
pub fn max(row: &[f32]) -> f32 {
    let (whole, rest) = row.as_chunks::<LANES>();
    let mut tops = [f32::NEG_INFINITY; LANES];
    for chunk in whole {
        for (top, &x) in tops.iter_mut().zip(chunk) {
            *top = if x > *top { x } else { *top };
        }
    }
    tops.iter().chain(rest).fold(f32::NEG_INFINITY, |top, &x| if x > top { x } else { top })
}

/// Softmax of a row, or its logarithm.
#[inline(always)]
pub fn softmax(row: &mut [f32], log: bool) {
    let top = f64::from(max(row));
    if log {
        let shift = top + sum(row, |x| exp(x - top)).ln();
        row.iter_mut().for_each(|x| *x = (f64::from(*x) - shift) as f32);
        return;
    }
    row.iter_mut().for_each(|x| *x = exp(f64::from(*x) - top) as f32);
    let by = (1.0 / sum(row, |x| x)) as f32;
    row.iter_mut().for_each(|x| *x *= by);
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::cpu::erf::erf_f64;

    /// Farthest from `to` over ±`range`, relative to the larger of `to` and `floor`.
    fn far(range: f64, floor: f64, f: fn(f64) -> f64, to: fn(f64) -> f64) -> f64 {
        let points = (-100_000..=100_000).map(|i| range * f64::from(i) / 100_000.0);
        points.map(|x| (f(x) - to(x)).abs() / to(x).abs().max(floor)).fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_much_closer_to_the_libms_than_an_f32_can_say() {
        // 2⁻²⁴ = 6e-8 is the rounding of the result; the libm's own error is 1e-16
        assert!(far(700.0, 0.0, exp, f64::exp) < 5e-13);
        assert!(far(9.0, 0.0, erf, erf_f64) < 3e-11);
        assert!(far(30.0, 1.0, tanh, f64::tanh) < 1e-12);
    }

    #[test]
    fn what_is_no_number_or_infinite_stays_so() {
        assert!([exp, erf, tanh].iter().all(|f| f(f64::NAN).is_nan()));
        assert_eq!(exp(f64::INFINITY) as f32, f32::INFINITY);
        assert_eq!(exp(f64::NEG_INFINITY) as f32, 0.0);
        assert_eq!([erf(f64::INFINITY) as f32, tanh(f64::NEG_INFINITY) as f32], [1.0, -1.0]);
        assert_eq!(erf(-0.0).to_bits(), (-0.0f64).to_bits());
    }

    #[test]
    fn rows_of_any_length_are_summed_and_searched() {
        for n in [0, 1, 15, 16, 17, 197] {
            let row: Vec<f32> = (0..n).map(|i| ((i * 7) % 31) as f32 - 11.0).collect();
            let wanted = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            assert_eq!(wide(|| sum(&row, |x| x * x)), wanted);
            assert_eq!(wide(|| max(&row)), row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        assert_eq!(max(&[f32::NAN, 2.0, 3.0]), 3.0);
    }
}
