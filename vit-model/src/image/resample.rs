//! Resamples 8-bit images, bit-identical to Pillow or torchvision, and computes only the window that is needed.

// a function that is not inlined into the one that enables vector instructions is compiled without them
#![allow(clippy::inline_always)]

use std::ops::Range;

use pulp::NullaryFnOnce;

use crate::vectorize::dispatch;
use crate::vit::pos_embed::cubic;

/// A filter: a function of the distance in source pixels that is zero from `support` on.
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
            Self::Bicubic => cubic(x, -0.5), // the Catmull-Rom spline
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

/// The library whose output is reproduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Library {
    /// Weights are fixed-point numbers with 22 fractional bits: 32 bits less 8 for the sample and 2 for overshoot.
    Pillow,
    /// Like PyTorch's uint8 kernel: weights are 16-bit fixed-point numbers, with as many fractional bits as the largest weight
    /// allows.
    Torchvision,
}

/// Fractional bits of Pillow's weights, and one more than the largest number for torchvision's.
const BITS: u32 = 22;

/// Rows that the horizontal pass computes at once, one per vector lane.
const ROWS: usize = 16;

/// Samples of a row that the vertical pass computes at once.
const LANES: usize = 64;

/// For some output samples of a row or column, the source samples that contribute to each and their weights.
struct Taps {
    spans: Vec<(usize, Range<usize>)>, // for each output: the first source sample, and a range of `weights`
    weights: Vec<i32>,
    /// Fractional bits of the weights.
    bits: u32,
}

impl Taps {
    fn new(library: Library, filter: Filter, old: usize, new: usize, window: Range<usize>) -> Self {
        let scale = old as f64 / new as f64;
        let stretch = scale.max(1.0);
        let support = filter.support() * stretch;
        let mut taps = Self { spans: Vec::with_capacity(window.len()), weights: Vec::new(), bits: BITS };
        let mut row = Vec::new();
        if library == Library::Torchvision {
            let mut largest = 0f64;
            for i in 0..new {
                weigh(library, filter, [scale, support, 1.0 / stretch], old, i, &mut row);
                largest = row.iter().fold(largest, |m, &w| m.max(w));
            }
            let fits = |bits: u32| ((largest * f64::from(1 << bits)).round() as i32) < 1 << 15;
            taps.bits = (1..BITS).take_while(|&bits| fits(bits)).last().unwrap_or(0);
        }
        for i in window {
            let first = weigh(library, filter, [scale, support, 1.0 / stretch], old, i, &mut row);
            let begin = taps.weights.len();
            let unit = f64::from(1 << taps.bits);
            taps.weights.extend(row.iter().map(|weight| (weight * unit).round() as i32));
            taps.spans.push((first, begin..taps.weights.len()));
        }
        taps
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.spans.iter().map(|(first, range)| (*first, &self.weights[range.clone()]))
    }

    /// The range of source samples that contribute to any of the output samples.
    fn reads(&self) -> Range<usize> {
        let first = self.spans.iter().map(|s| s.0).min().unwrap_or(0);
        let end = self.spans.iter().map(|s| s.0 + s.1.len()).max().unwrap_or(0);
        first..end
    }
}

/// Computes the weights of output sample `i`, whose sum is one. Returns the index of the first source sample.
fn weigh(
    library: Library,
    filter: Filter,
    [scale, support, narrow]: [f64; 3],
    old: usize,
    i: usize,
    row: &mut Vec<f64>,
) -> usize {
    let centre = (i as f64 + 0.5) * scale;
    row.clear();
    // each library adds in its own order, which matters for rounding; the cast to usize turns negative values into 0
    let first = match library {
        Library::Pillow => {
            let first = (centre - support + 0.5) as usize;
            let end = ((centre + support + 0.5) as usize).min(old);
            row.extend((first..end).map(|x| filter.at((x as f64 - centre + 0.5) * narrow)));
            first
        }
        Library::Torchvision => {
            let first = (centre - support).floor() as usize;
            let end = ((centre + support).ceil() as usize).min(old);
            let centre = centre - 0.5;
            row.extend((first..end).map(|x| filter.at((x as f64 - centre) * narrow)));
            first
        }
    };
    let sum: f64 = row.iter().sum();
    if sum != 0.0 {
        row.iter_mut().for_each(|weight| *weight /= sum);
    }
    first
}

/// Resizes an image `[h, w, C]` to `[new_h, new_w, C]` and returns its `rows` and `columns`.
///
/// Width and height are separate passes, and a pass is skipped if the length does not change. The width comes first, except
/// in Pillow since version 13 if the height shrinks by more than twice as much as the width, because that order computes fewer
/// pixels. The order affects the result, because values are rounded and clipped to 8 bits between the passes.
pub(crate) fn resample<const C: usize>(
    library: Library,
    source: &[u8],
    [h, w]: [usize; 2],
    [new_h, new_w]: [usize; 2],
    rows: Range<usize>,
    columns: Range<usize>,
    filter: Filter,
) -> Vec<u8> {
    let across = (new_w != w).then(|| Taps::new(library, filter, w, new_w, columns.clone()));
    let down = (new_h != h).then(|| Taps::new(library, filter, h, new_h, rows.clone()));
    if library == Library::Pillow && h > new_h && h - new_h > 2 * w.saturating_sub(new_w) {
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

/// Applies `taps` to every row of `[_, w, C]`, whose first column is column `first` of the image. Without taps, crops to
/// `columns`.
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
        // several rows at once, because samples in the same column have the same weights
        let mut block = vec![[[0; C]; ROWS]; reads.len()];
        for (out, rows) in out.chunks_mut(ROWS * line).zip(source.chunks(ROWS * w * C)) {
            for (i, row) in rows.chunks_exact(w * C).enumerate() {
                let pixels = row[(reads.start - first) * C..].as_chunks().0;
                block.iter_mut().zip(pixels).for_each(|(column, pixel)| column[i] = *pixel);
            }
            for (x, (start, weights)) in taps.iter().enumerate() {
                let mut sums = [[1 << (taps.bits - 1); C]; ROWS];
                for (samples, weight) in block[start - reads.start..].iter().zip(weights) {
                    add(sums.as_flattened_mut(), samples.as_flattened(), *weight);
                }
                let mut pixels = [[0; C]; ROWS];
                round(sums.as_flattened(), taps.bits, pixels.as_flattened_mut());
                for (row, pixel) in out.chunks_exact_mut(line).zip(pixels) {
                    row[x * C..][..C].copy_from_slice(&pixel);
                }
            }
        }
    }
}

/// Applies `taps` to the columns of `[_, w, C]`, whose first row is row `first` of the image. Without taps, crops to `rows`.
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
                let mut sums = [1 << (taps.bits - 1); LANES];
                for (row, weight) in rows() {
                    // with a length that is known at compile time, the sums stay in registers
                    match <&[u8; LANES]>::try_from(&row[at..at + n]) {
                        Ok(samples) => add(&mut sums, samples, *weight),
                        Err(_) => add(&mut sums, &row[at..at + n], *weight),
                    }
                }
                round(&sums, taps.bits, out);
            }
        }
    }
}

// both are inlined, so each version of the callers gets its own vector instructions

#[inline(always)]
fn add(sums: &mut [i32], samples: &[u8], weight: i32) {
    sums.iter_mut().zip(samples).for_each(|(sum, sample)| *sum += i32::from(*sample) * weight);
}

#[inline(always)]
fn round(sums: &[i32], bits: u32, samples: &mut [u8]) {
    samples.iter_mut().zip(sums).for_each(|(sample, sum)| *sample = (sum >> bits).clamp(0, 255) as u8);
}

fn crop<const C: usize>(source: &[u8], w: usize, rows: Range<usize>, columns: Range<usize>) -> Vec<u8> {
    let rows = source.chunks_exact(w * C).skip(rows.start).take(rows.len());
    rows.flat_map(|row| &row[columns.start * C..columns.end * C]).copied().collect()
}

#[cfg(test)]
mod tests {
    use fast_image_resize::images::{Image, ImageRef};
    use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
    use proptest::prelude::*;

    use super::{Filter, Library, resample};

    /// torchvision's result, computed by the crate `fast_image_resize` with the same algorithm: width, then height.
    fn expected(
        source: &[u8],
        [h, w]: [usize; 2],
        [new_h, new_w]: [usize; 2],
        kind: PixelType,
        filter: Filter,
    ) -> Vec<u8> {
        let filter = match filter {
            Filter::Bilinear => FilterType::Bilinear,
            Filter::Bicubic => FilterType::CatmullRom,
            _ => FilterType::Lanczos3,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
        let mut wide = Image::new(new_w as u32, h as u32, kind);
        let source = ImageRef::new(w as u32, h as u32, source, kind).unwrap();
        Resizer::new().resize(&source, &mut wide, &options).unwrap();
        let mut all = Image::new(new_w as u32, new_h as u32, kind);
        Resizer::new().resize(&wide, &mut all, &options).unwrap();
        all.into_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, ..Default::default() })]

        #[test]
        fn torchvision_s_results_are_reproduced_to_the_bit(
            (h, w, new_h, new_w) in (1usize..90, 1usize..90, 1usize..60, 1usize..60),
            filter in prop_oneof![Just(Filter::Bilinear), Just(Filter::Bicubic), Just(Filter::Lanczos)],
            seed in any::<u64>(),
        ) {
            let mut state = seed;
            // runs of black and white cause the largest overshoot
            let source: Vec<u8> = (0..h * w * 3).map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                if state >> 62 == 0 { (state >> 40) as u8 } else { ((state >> 50) as u8 & 1) * 255 }
            }).collect();
            let (old, new) = ([h, w], [new_h, new_w]);
            let found = resample::<3>(Library::Torchvision, &source, old, new, 0..new_h, 0..new_w, filter);
            prop_assert_eq!(found, expected(&source, old, new, PixelType::U8x3, filter));
            let grey = &source[..h * w];
            let found = resample::<1>(Library::Torchvision, grey, old, new, 0..new_h, 0..new_w, filter);
            let whole = expected(grey, old, new, PixelType::U8, filter);
            prop_assert_eq!(&found, &whole);
            // a window must equal that part of the whole image
            let (rows, columns) = (new_h / 3..new_h, new_w / 4..new_w);
            let part = resample::<1>(Library::Torchvision, grey, old, new, rows.clone(), columns.clone(), filter);
            let expected: Vec<u8> =
                rows.flat_map(|y| whole[y * new_w + columns.start..(y + 1) * new_w].to_vec()).collect();
            prop_assert_eq!(part, expected);
        }
    }
}
