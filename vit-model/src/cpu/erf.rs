//! Half the error function, `E(x) = Φ(x) − ½ = ½ erf(x/√2)`, in pieces whose coefficients a vector instruction looks up.

/// Pieces of `x ≥ 0`, as many as a vector of AVX-512 has lanes. The last is the constant ½, from which `E` differs there by less
/// than half the last bit of an f32.
pub(crate) const PIECES: usize = 16;
/// Width of a piece.
pub(crate) const WIDTH: f32 = 0.375;
/// Coefficients of a piece, whose polynomial is within 5e-9.
pub(crate) const COEFFICIENTS: usize = 6;

/// `[power of u][piece]`, for `x = (piece + u) · WIDTH`.
pub(crate) static TABLE: [[f32; PIECES]; COEFFICIENTS] = table();

const fn table() -> [[f32; PIECES]; COEFFICIENTS] {
    let mut table = [[0.0; PIECES]; COEFFICIENTS];
    table[0][PIECES - 1] = 0.5;
    let mut piece = 0;
    while piece < PIECES - 1 {
        let coefficients = interpolate(piece as f64);
        let mut power = 0;
        while power < COEFFICIENTS {
            table[power][piece] = coefficients[power] as f32;
            power += 1;
        }
        piece += 1;
    }
    table
}

/// The polynomial through six points of a piece, in powers of `u`.
const fn interpolate(piece: f64) -> [f64; COEFFICIENTS] {
    // the zeros of Chebyshev's polynomial of degree 6, moved to 0 … 1
    let nodes = [
        0.01703708685546585,
        0.1464466094067262,
        0.3705904774487396,
        0.6294095225512604,
        0.8535533905932737,
        0.9829629131445341,
    ];
    let mut divided = [0.0; COEFFICIENTS];
    let mut i = 0;
    while i < COEFFICIENTS {
        divided[i] = half_erf((piece + nodes[i]) * WIDTH as f64);
        i += 1;
    }
    // Newton's divided differences, then Horner's scheme over their products
    let mut order = 1;
    while order < COEFFICIENTS {
        let mut i = COEFFICIENTS - 1;
        while i >= order {
            divided[i] = (divided[i] - divided[i - 1]) / (nodes[i] - nodes[i - order]);
            i -= 1;
        }
        order += 1;
    }
    let mut powers = [0.0; COEFFICIENTS];
    let mut term = COEFFICIENTS;
    while term > 0 {
        term -= 1;
        let mut power = COEFFICIENTS - 1;
        while power > 0 {
            powers[power] = powers[power - 1] - powers[power] * nodes[term];
            power -= 1;
        }
        powers[0] = divided[term] - powers[0] * nodes[term];
    }
    powers
}

/// `½ erf(x/√2) = φ(x) · Σ x^(2n+1) / (1·3·5⋯(2n+1))`, whose terms are all positive.
const fn half_erf(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while n < 100.0 {
        term *= x * x / (2.0 * n + 1.0);
        sum += term;
        n += 1.0;
    }
    // e^(−x²/2), by the series of its 64th root
    let t = -x * x / 128.0;
    let (mut power, mut exp, mut n) = (1.0, 1.0, 1.0);
    while n < 20.0 {
        power *= t / n;
        exp += power;
        n += 1.0;
    }
    let mut squarings = 0;
    while squarings < 6 {
        exp *= exp;
        squarings += 1;
    }
    sum * exp * 0.3989422804014327 // 1/√(2π)
}
