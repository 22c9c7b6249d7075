//! The functions of a ViT over vectors: exponentials and activations.

// the constants are written as they were published
#![allow(clippy::excessive_precision)]

use super::simd::Simd;

/// `eˣ` within 1.2e-7 relative; the smallest normal number below −87.3, and `e⁸⁸` above 88.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(88.0), s.max(s.splat(-87.3), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, of which the first has few bits so that n · part is exact
    let r = s.fma(n, s.splat(-0.693359375), x);
    let r = s.fma(n, s.splat(2.12194440e-4), r);
    // the minimax polynomial of Cephes' expf on |r| ≤ ln 2 / 2
    let lower = [1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1];
    let p = polynomial(s, r, 1.9875691500e-4, lower);
    let p = s.add(s.fma(s.mul(p, r), r, r), s.splat(1.0));
    s.scale(p, n)
}

/// `2ˣ` for `x ≤ 0`, within 2.2e-7 relative; below −126 some number under 1.2e-38.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // the polynomial of degree 5 with the least relative error on |r| ≤ 1/2, 7.5e-8
    exp2_by(s, x, 0.0013276472, [0.0096755413, 0.055507133, 0.240221197, 0.693146967, 1.0])
}

/// `2ˣ` for `x ≤ 0`, within 7.5e-5 relative, for results that are rounded to bf16, whose last bit is 100 times that.
#[inline(always)]
pub(crate) fn exp2_for_bf16<S: Simd>(s: S, x: S::F) -> S::F {
    exp2_by(s, x, 0.05517166907, [0.2426111222, 0.6932609855, 0.9999280735])
}

/// A polynomial by Horner's scheme, the highest power first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F, highest: f32, lower: [f32; N]) -> S::F {
    let mut p = s.splat(highest);
    for c in lower {
        p = s.fma(p, x, s.splat(c));
    }
    p
}

/// `2ˣ` by a polynomial for `|x| ≤ 1/2`, the highest power first.
#[inline(always)]
fn exp2_by<S: Simd, const N: usize>(s: S, x: S::F, highest: f32, lower: [f32; N]) -> S::F {
    let x = s.max(s.splat(-126.0), x);
    let n = s.round(x);
    s.scale(polynomial(s, s.sub(x, n), highest, lower), n)
}

/// `1 / (1 + e⁻ˣ)`
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.reciprocal(s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// `x/2 · (1 + erf(x/√2))`, within 2e-7 of `x`. `Φ(x) − ½` is odd, so it is `x` times a function of `x²`: the quotient of two
/// polynomials of degree 5 that is the closest on `|x| ≤ 5.5`, within 8e-9. Beyond, `Φ` is 0 or 1 in f32.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let near = s.limit(x, s.splat(5.5));
    let square = s.mul(near, near);
    let lower = [6.3521332e-6, 1.68827299e-4, 4.67727057e-3, 3.38528016e-2, 3.98942235e-1];
    let p = polynomial(s, square, 2.27493121e-8, lower);
    let q = polynomial(s, square, 1.1975035e-6, [7.3648045e-5, 1.88445401e-3, 2.86459614e-2, 2.51522308e-1, 1.0]);
    s.fma(x, s.div(s.mul(near, p), q), s.mul(x, s.splat(0.5)))
}

/// [`gelu`] for results that are rounded to bf16: within 1.2e-4, less than a tenth of that rounding for values of the size
/// that models have. `Φ(x) − ½` is odd, so it is `x` times a polynomial of `x²`, the one of degree 7 with the least error
/// relative to `|gelu(x)| + 0.3` on `|x| ≤ 4.25` that ends in ½; beyond, `Φ` is 0 or 1.
#[inline(always)]
pub(crate) fn gelu_for_bf16<S: Simd>(s: S, x: S::F) -> S::F {
    let near = s.limit(x, s.splat(4.25));
    let square = s.mul(near, near);
    let lower = [
        7.218663711e-8,
        -2.832573955e-6,
        6.385621236e-5,
        -9.258881328e-4,
        9.189257398e-3,
        -6.529832631e-2,
        3.982994854e-1,
    ];
    let p = polynomial(s, square, -7.985266892e-10, lower);
    s.mul(x, s.fma(near, p, s.splat(0.5)))
}

/// `x/2 · (1 + tanh(u))` is `x · sigmoid(2u)`, `u = √(2/π) (x + 0.044715 x³)`.
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let cubic = s.fma(s.mul(x, x), s.splat(0.044715), s.splat(1.0));
    s.mul(x, sigmoid(s, s.mul(s.mul(x, s.splat(1.595_769_1)), cubic)))
}

/// `x · sigmoid(1.702 x)`
#[inline(always)]
pub(crate) fn quick_gelu<S: Simd>(s: S, x: S::F) -> S::F {
    s.mul(x, sigmoid(s, s.mul(x, s.splat(1.702))))
}

/// `x · sigmoid(x)`
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    s.mul(x, sigmoid(s, x))
}

/// `max(x, 0)`
#[inline(always)]
pub(crate) fn relu<S: Simd>(s: S, x: S::F) -> S::F {
    s.max(s.splat(0.0), x)
}
