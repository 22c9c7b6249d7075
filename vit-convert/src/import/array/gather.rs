//! Copies the elements that digits enumerate. A transposition goes through rectangles that fit the cache.

use crate::import::axes::Digit;
use crate::onnx::graph::DType;

/// Rounds to what a type can hold.
pub fn round(dtype: DType, value: f64) -> f32 {
    match dtype {
        DType::F16 => half::f16::from_f64(value).to_f32(),
        DType::Bf16 => half::bf16::from_f64(value).to_f32(),
        _ => value as f32,
    }
}

/// Elements of a type that the digits enumerate from `offset`; those of 4 bits become bytes.
pub fn gathered(dtype: DType, all: &[u8], offset: usize, digits: &[Digit]) -> Vec<u8> {
    match dtype {
        t @ (DType::U4 | DType::I4) => {
            let wide: Vec<u8> = all.iter().flat_map(|&b| [b & 15, b >> 4]).collect();
            let mut out = gather::<1>(&wide, offset, digits);
            if t == DType::I4 {
                out.iter_mut().for_each(|b| *b = ((*b << 4) as i8 >> 4) as u8);
            }
            out
        }
        t => match t.bits() {
            8 => gather::<1>(all, offset, digits),
            16 => gather::<2>(all, offset, digits),
            32 => gather::<4>(all, offset, digits),
            _ => gather::<8>(all, offset, digits),
        },
    }
}

/// Elements of `W` bytes that the digits enumerate from `offset`. An index outside `src` reads as zeros; the reader of
/// the file has excluded it.
fn gather<const W: usize>(src: &[u8], offset: usize, digits: &[Digit]) -> Vec<u8> {
    let count: usize = digits.iter().map(|d| d.size).product();
    let mut out = vec![0u8; count * W];
    if count == 0 {
        return out;
    }
    let src = src.as_chunks::<W>().0;
    let out_elems = out.as_chunks_mut::<W>().0;
    // the digits and what one step of each means in the output
    let mut loops: Vec<(usize, usize, usize)> = Vec::with_capacity(digits.len()); // (size, source step, output step)
    let mut step = 1;
    for d in digits.iter().rev() {
        loops.push((d.size, d.stride, step));
        step *= d.size;
    }
    // innermost: the output's fastest digit and, if another one, the source's fastest digit
    let inner = if loops.is_empty() { (1, 1, 1) } else { loops.remove(0) };
    let other = if inner.1 == 1 { None } else { loops.iter().position(|l| l.1 == 1) };
    let across = other.map_or((1, 0, 0), |k| loops.remove(k));
    let mut count = vec![0usize; loops.len()];
    let (mut from, mut to) = (offset, 0usize);
    loop {
        tile(src, out_elems, from, to, inner, across);
        // the next position of the outer digits
        let mut k = 0;
        loop {
            if k == loops.len() {
                return out;
            }
            let (size, s, o) = loops[k];
            count[k] += 1;
            from += s;
            to += o;
            if count[k] < size {
                break;
            }
            from -= s * size;
            to -= o * size;
            count[k] = 0;
            k += 1;
        }
    }
}

/// Rows of the rectangles that a transposition copies at once, so that they stay in the L1 cache.
const DOWN: usize = 64;
/// Columns of such a rectangle. If rows are a multiple of a page apart, the cache does not keep a line of each row
/// until its next element is needed, so that many elements of a row are read together.
const ALONG: usize = 32;

/// Copies a plane: `inner` is the output's fastest digit, `across` the source's.
fn tile<const W: usize>(
    src: &[[u8; W]],
    out: &mut [[u8; W]],
    from: usize,
    to: usize,
    (n, step, _): (usize, usize, usize),
    (m, across, out_across): (usize, usize, usize),
) {
    if m == 1 {
        let (Some(row), Some(column)) = (out.get_mut(to..to + n), src.get(from..)) else { return };
        match step {
            0 => row.fill(column.first().copied().unwrap_or([0; W])),
            1 => column.get(..n).into_iter().for_each(|column| row.copy_from_slice(column)),
            _ => row.iter_mut().zip(column.iter().step_by(step)).for_each(|(cell, v)| *cell = *v),
        }
        return;
    }
    debug_assert_eq!(across, 1);
    let mut held = [[[0u8; W]; ALONG]; DOWN];
    for j0 in (0..m).step_by(ALONG) {
        let columns = ALONG.min(m - j0);
        for i0 in (0..n).step_by(DOWN) {
            let rows = DOWN.min(n - i0);
            for (i, line) in held.iter_mut().enumerate().take(rows) {
                let Some(all) = src.get(from + (i0 + i) * step + j0..) else { return };
                match all.first_chunk::<ALONG>() {
                    Some(whole) if columns == ALONG => *line = *whole,
                    _ => line.iter_mut().zip(all).take(columns).for_each(|(cell, v)| *cell = *v),
                }
            }
            for j in 0..columns {
                let at = to + (j0 + j) * out_across + i0;
                let Some(row) = out.get_mut(at..at + rows) else { return };
                row.iter_mut().zip(&held).for_each(|(cell, line)| *cell = line[j]);
            }
        }
    }
}
