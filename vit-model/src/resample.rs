//! Pillow's resampling of 8-bit pictures to the bit, of which only a window is computed.

// what is not inlined into the function that switches vectors on is compiled without them
#![allow(clippy::inline_always)]

use std::ops::Range;

use pulp::{Arch, NullaryFnOnce};

use crate::pos_embed::cubic;

/// A filter: its values at a distance in source pixels, zero from `support` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filter {
    Box,
    Bilinear,
    Hamming,
    Bicubic,
    Lanczos,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        match self {
            Self::Box => f64::from(x > -0.5 && x <= 0.5),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Hamming if x == 0.0 => 1.0,
            Self::Hamming if x.abs() >= 1.0 => 0.0,
            Self::Hamming => {
                let x = x.abs() * std::f64::consts::PI;
                x.sin() / x * (0.54 + 0.46 * x.cos())
            }
            Self::Bicubic => cubic(x, -0.5), // Catmull and Rom's
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

/// Bits after the point of a weight: what 32 bits leave beside 8 of the sample and 2 of overshoot.
const BITS: u32 = 22;

/// What makes the shift by `BITS` round to nearest.
const HALF: i32 = 1 << (BITS - 1);

/// Rows that go through the horizontal taps side by side: lanes of a vector.
const ROWS: usize = 16;

/// Samples of a row that go through the vertical taps side by side.
const LANES: usize = 64;

/// The weights of some output samples of a row or column: the samples from `start` on count, `weights` each.
struct Taps {
    spans: Vec<(usize, Range<usize>)>, // first source sample, its and the following weights
    weights: Vec<i32>,
}

impl Taps {
    fn new(filter: Filter, old: usize, new: usize, window: Range<usize>) -> Self {
        let scale = old as f64 / new as f64;
        let stretch = scale.max(1.0);
        let support = filter.support() * stretch;
        let mut taps = Self { spans: Vec::with_capacity(window.len()), weights: Vec::new() };
        let mut row = Vec::new();
        for i in window {
            let centre = (i as f64 + 0.5) * scale;
            // a cast to usize takes the negative to 0
            let first = (centre - support + 0.5) as usize;
            let end = ((centre + support + 0.5) as usize).min(old);
            row.clear();
            row.extend((first..end).map(|x| filter.at((x as f64 - centre + 0.5) * (1.0 / stretch))));
            let sum: f64 = row.iter().sum();
            let begin = taps.weights.len();
            taps.weights.extend(row.iter().map(|w| {
                let weight = if sum == 0.0 { *w } else { w / sum };
                (weight * f64::from(1 << BITS)).round() as i32
            }));
            taps.spans.push((first, begin..taps.weights.len()));
        }
        taps
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.spans.iter().map(|(first, range)| (*first, &self.weights[range.clone()]))
    }

    /// The source samples that any of the output samples reads.
    fn reads(&self) -> Range<usize> {
        let first = self.spans.iter().map(|s| s.0).min().unwrap_or(0);
        let end = self.spans.iter().map(|s| s.0 + s.1.len()).max().unwrap_or(0);
        first..end
    }
}

/// A picture `[h, w, C]`, resized to `[new_h, new_w, C]`, of which `rows` and `columns` are returned.
///
/// Each side is a pass of its own, with 8 bits in between; a side whose length stays is not touched. Width comes before
/// height, but where the height shrinks by more than twice what the width does (so since Pillow 13: there are fewer
/// pixels to make then; the rounding in between, and what it clips, differ).
pub(crate) fn resample<const C: usize>(
    source: &[u8],
    [h, w]: [usize; 2],
    [new_h, new_w]: [usize; 2],
    rows: Range<usize>,
    columns: Range<usize>,
    filter: Filter,
) -> Vec<u8> {
    let across = (new_w != w).then(|| Taps::new(filter, w, new_w, columns.clone()));
    let down = (new_h != h).then(|| Taps::new(filter, h, new_h, rows.clone()));
    if h > new_h && h - new_h > 2 * w.saturating_sub(new_w) {
        let read = across.as_ref().map_or(columns, Taps::reads);
        let low = vertical::<C>(source, w, 0, down.as_ref(), rows, read.clone());
        horizontal::<C>(&low, read.len(), read.start, across.as_ref(), 0..read.len())
    } else {
        let read = down.as_ref().map_or(rows.clone(), Taps::reads);
        let strip = &source[read.start * w * C..read.end * w * C];
        let narrow = horizontal::<C>(strip, w, 0, across.as_ref(), columns.clone());
        vertical::<C>(&narrow, columns.len(), read.start, down.as_ref(), 0..read.len(), 0..columns.len())
    }
}

/// Every row of `[_, w, C]`, whose first column is `first` of the picture, through the taps; without them, `columns`.
fn horizontal<const C: usize>(
    source: &[u8],
    w: usize,
    first: usize,
    taps: Option<&Taps>,
    columns: Range<usize>,
) -> Vec<u8> {
    let Some(taps) = taps else { return crop::<C>(source, w, 0..source.len() / (w * C), columns) };
    let mut out = vec![0; source.len() / (w * C) * taps.spans.len() * C];
    dispatch(Horizontal::<C> { source, w, first, taps, out: &mut out });
    out
}

struct Horizontal<'a, const C: usize> {
    source: &'a [u8],
    w: usize,
    first: usize,
    taps: &'a Taps,
    out: &'a mut [u8],
}

impl<const C: usize> NullaryFnOnce for Horizontal<'_, C> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { source, w, first, taps, out } = self;
        let (line, reads) = (taps.spans.len() * C, taps.reads());
        // some rows side by side, column by column: their samples have the same weights
        let mut block = vec![[[0; C]; ROWS]; reads.len()];
        for (out, rows) in out.chunks_mut(ROWS * line).zip(source.chunks(ROWS * w * C)) {
            for (i, row) in rows.chunks_exact(w * C).enumerate() {
                let pixels = row[(reads.start - first) * C..].as_chunks().0;
                block.iter_mut().zip(pixels).for_each(|(column, pixel)| column[i] = *pixel);
            }
            for (x, (start, weights)) in taps.iter().enumerate() {
                let mut sums = [[HALF; C]; ROWS];
                for (samples, weight) in block[start - reads.start..].iter().zip(weights) {
                    add(sums.as_flattened_mut(), samples.as_flattened(), *weight);
                }
                let mut pixels = [[0; C]; ROWS];
                round(sums.as_flattened(), pixels.as_flattened_mut());
                for (row, pixel) in out.chunks_exact_mut(line).zip(pixels) {
                    row[x * C..][..C].copy_from_slice(&pixel);
                }
            }
        }
    }
}

/// The given columns of `[_, w, C]`, whose first row is `first` of the picture, through the taps; without them, `rows`.
fn vertical<const C: usize>(
    source: &[u8],
    w: usize,
    first: usize,
    taps: Option<&Taps>,
    rows: Range<usize>,
    columns: Range<usize>,
) -> Vec<u8> {
    let Some(taps) = taps else { return crop::<C>(source, w, rows, columns) };
    let mut out = vec![0; taps.spans.len() * columns.len() * C];
    let (source, line) = (&source[columns.start * C..], columns.len() * C);
    dispatch(Vertical { source, stride: w * C, first, taps, out: &mut out, line });
    out
}

struct Vertical<'a> {
    source: &'a [u8],
    stride: usize,
    first: usize,
    taps: &'a Taps,
    out: &'a mut [u8],
    line: usize,
}

impl NullaryFnOnce for Vertical<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { source, stride, first, taps, out, line } = self;
        for (out, (start, weights)) in out.chunks_exact_mut(line).zip(taps.iter()) {
            let rows = || source[(start - first) * stride..].chunks(stride).zip(weights);
            for (i, out) in out.chunks_mut(LANES).enumerate() {
                let (at, n) = (i * LANES, out.len());
                let mut sums = [HALF; LANES];
                for (row, weight) in rows() {
                    // of a known number, they stay in registers
                    match <&[u8; LANES]>::try_from(&row[at..at + n]) {
                        Ok(samples) => add(&mut sums, samples, *weight),
                        Err(_) => add(&mut sums, &row[at..at + n], *weight),
                    }
                }
                round(&sums, out);
            }
        }
    }
}

/// Runs the form of an operation that was compiled for the vectors of this CPU.
fn dispatch(op: impl NullaryFnOnce<Output = ()>) {
    // without pulp's feature `x86-v3`, which gemm leaves off, `Arch` knows AVX-512 and nothing below it
    #[cfg(target_arch = "x86_64")]
    if let (Arch::Scalar, Some(avx2)) = (Arch::new(), pulp::x86::V3::try_new()) {
        return avx2.vectorize(op);
    }
    Arch::new().dispatch(op);
}

// both are inlined into each form

#[inline(always)]
fn add(sums: &mut [i32], samples: &[u8], weight: i32) {
    sums.iter_mut().zip(samples).for_each(|(sum, sample)| *sum += i32::from(*sample) * weight);
}

#[inline(always)]
fn round(sums: &[i32], samples: &mut [u8]) {
    samples.iter_mut().zip(sums).for_each(|(sample, sum)| *sample = (sum >> BITS).clamp(0, 255) as u8);
}

fn crop<const C: usize>(source: &[u8], w: usize, rows: Range<usize>, columns: Range<usize>) -> Vec<u8> {
    let rows = source.chunks_exact(w * C).skip(rows.start).take(rows.len());
    rows.flat_map(|row| &row[columns.start * C..columns.end * C]).copied().collect()
}
