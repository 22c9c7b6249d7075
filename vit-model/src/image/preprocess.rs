//! An image to a model's input, exactly as the checkpoint's own processor does it: resize, centre crop, normalise.

use std::borrow::Cow;

use super::decode::Image;
use super::resample::{Filter, Library, resample};
use crate::preprocessing::{CropMode, Interpolation, scaled};
use crate::{Error, PreprocessConfig, Resize, Result, limits};

/// A [`PreprocessConfig`] prepared for images: what does not depend on the image is computed once.
///
/// Resampling is bit-identical to Pillow's for checkpoints of timm, and to torchvision's 8-bit `antialias=True` for those of
/// Hugging Face. Both make two passes and round to 8 bits in between. Pillow's weights have 22 bits, torchvision's 15 or
/// fewer, so the two differ by up to 2, and by more if the order of the passes differs.
#[derive(Clone, Debug)]
pub struct Preprocess {
    size: [usize; 2],
    channels: usize,
    target: Target,
    /// `None`: the nearest pixel.
    filter: Option<Filter>,
    torchvision: bool,
    crop: bool,
    blend_white: bool,
    /// The colour around an image that is smaller than the crop.
    fill: [u8; 3],
    /// Per channel: 8-bit sample → value of the tensor.
    tables: Vec<[f32; 256]>,
}

/// How the size of the resized image follows from that of the image.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// As the config's `resize` says.
    Fixed(Resize),
    /// Both sides at least `[h, w]`, one of them equal.
    Cover([usize; 2]),
    /// Both sides at most `[h, w]`, one of them equal.
    Contain([usize; 2]),
}

impl Preprocess {
    /// Checks a config and prepares its tables. Models of 3 channels get RGB, those of 1 channel the luma.
    ///
    /// # Errors
    /// [`Error::Config`] for values that no model can have; [`Error::Unsupported`] for other numbers of channels.
    pub fn new(config: &PreprocessConfig) -> Result<Self> {
        config.validate()?;
        let [channels, h, w] = config.input_size;
        if channels != 1 && channels != 3 {
            return Err(Error::unsupported(format!(
                "preprocessing for a model of {channels} channels (a picture gives 1 or 3): prepare the tensor yourself"
            )));
        }
        let per_channel = |name: &str, values: &[f64]| match values.len() {
            n if n == channels => Ok(values.to_vec()),
            1 => Ok(vec![values[0]; channels]),
            n => Err(Error::config(format!("preprocess: `{name}` has {n} values for {channels} channels"))),
        };
        let (mean, std) = (per_channel("mean", &config.mean)?, per_channel("std", &config.std)?);

        let scale = [scaled(h, config.crop_pct)?, scaled(w, config.crop_pct)?];
        let target = match (config.resize, config.crop_mode) {
            (Some(resize), _) => Target::Fixed(resize),
            (None, CropMode::Squash) => Target::Fixed(Resize::Exact(scale)),
            (None, CropMode::Border) => Target::Contain(scale),
            (None, _) if scale[0] == scale[1] => Target::Fixed(Resize::ShortestEdge(scale[0])),
            (None, _) => Target::Cover(scale),
        };
        let border = config.resize.is_none() && config.crop_mode == CropMode::Border;
        let mut fill = [0; 3];
        if border {
            for (f, m) in fill.iter_mut().zip(&mean) {
                *f = (255.0 * m).round_ties_even().clamp(0.0, 255.0) as u8;
            }
        }
        // in f32 and in torch's order of operations, so that the values are bit-identical to torch's
        let table =
            |(mean, std): (&f64, &f64)| std::array::from_fn(|v| (v as f32 / 255.0 - *mean as f32) / *std as f32);
        Ok(Self {
            size: [h, w],
            channels,
            target,
            filter: filter(config.interpolation),
            crop: config.crop_mode != CropMode::None,
            torchvision: config.torchvision,
            blend_white: config.white_key,
            fill,
            tables: mean.iter().zip(&std).map(table).collect(),
        })
    }

    /// `[channels, height, width]` of the tensor.
    pub fn output_shape(&self) -> [usize; 3] {
        [self.channels, self.size[0], self.size[1]]
    }

    /// The input for one image, `[C, H, W]`.
    ///
    /// # Errors
    /// [`Error::Image`] if its aspect ratio is too extreme, or if it is not cropped and has another shape than the input.
    pub fn apply(&self, image: &Image) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.channels * self.size[0] * self.size[1]];
        self.apply_into(image, &mut out)?;
        Ok(out)
    }

    /// Writes the input for one image, `[C, H, W]`, to a slice, such as one image of a batch.
    ///
    /// # Errors
    /// As [`apply`](Self::apply), and [`Error::Input`] for a slice of another length.
    pub fn apply_into(&self, image: &Image, out: &mut [f32]) -> Result<()> {
        let plane = self.size[0] * self.size[1];
        if out.len() != self.channels * plane {
            let (wanted, found) = (self.channels * plane, out.len());
            return Err(Error::Input(format!("the tensor of a picture has {wanted} values, found room for {found}")));
        }
        let pixels = self.resize_and_crop(image)?;
        for ((c, table), out) in self.tables.iter().enumerate().zip(out.chunks_exact_mut(plane)) {
            let samples = pixels[c..].iter().step_by(self.channels);
            out.iter_mut().zip(samples).for_each(|(value, &sample)| *value = table[usize::from(sample)]);
        }
        Ok(()) // [C, H, W]
    }

    /// The library whose filter is used: torchvision has some itself, and its pictures go through Pillow for the others.
    fn library(&self, filter: Filter) -> Library {
        match filter {
            Filter::Bilinear | Filter::Bicubic | Filter::Lanczos if self.torchvision => Library::Torchvision,
            _ => Library::Pillow,
        }
    }

    /// The 8-bit samples that the input is computed from, `[H, W, C]`.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn resize_and_crop(&self, image: &Image) -> Result<Vec<u8>> {
        let source: Cow<'_, [u8]> = match (image.alpha().filter(|_| self.blend_white), self.channels) {
            (Some(alpha), 3) => {
                let pixels = image.pixels().as_chunks::<3>().0;
                pixels.iter().zip(alpha).flat_map(|(pixel, alpha)| pixel.map(|v| over_white(v, *alpha))).collect()
            }
            (_, 1) => image.to_luma().into(),
            _ => image.pixels().into(),
        };
        let (w, h) = (image.width() as usize, image.height() as usize);
        let [new_h, new_w] = self.target.of(h, w)?;
        let [out_h, out_w] = self.size;
        if !self.crop && [new_h, new_w] != self.size {
            return Err(Error::image(format!(
                "its {w}×{h} pixels become {new_w}×{new_h}, and this checkpoint's processor does not crop them to the \
                 model's {out_w}×{out_h}"
            )));
        }
        let rows = Span::new(new_h, out_h, self.torchvision);
        let columns = Span::new(new_w, out_w, self.torchvision);

        let mut out = vec![0; out_h * out_w * self.channels];
        if rows.pad + columns.pad > 0 || rows.len < out_h || columns.len < out_w {
            out.chunks_exact_mut(self.channels).for_each(|pixel| pixel.copy_from_slice(&self.fill[..self.channels]));
        }
        let resize = Resampling { source: &source, h, w, new_h, new_w, rows, columns, channels: self.channels, out_w };
        match self.filter {
            None => resize.nearest(&mut out),
            Some(filter) => resize.filtered(self.library(filter), filter, &mut out),
        }
        Ok(out)
    }
}

/// A sample of a pixel over white, with the fixed-point arithmetic of Pillow's `alpha_composite`.
fn over_white(value: u8, alpha: u8) -> u8 {
    const BITS: u32 = 7;
    let (value, alpha) = (u32::from(value), u32::from(alpha));
    let ours = alpha << BITS;
    let white = 255 * (1 << BITS) - ours;
    let sum = value * ours + 255 * white + (0x80 << BITS);
    (((sum >> 8) + sum) >> 8 >> BITS) as u8
}

fn filter(interpolation: Interpolation) -> Option<Filter> {
    match interpolation {
        Interpolation::Bilinear => Some(Filter::Bilinear),
        Interpolation::Bicubic => Some(Filter::Bicubic),
        Interpolation::Lanczos => Some(Filter::Lanczos),
        Interpolation::Box => Some(Filter::Box),
        Interpolation::Hamming => Some(Filter::Hamming),
        Interpolation::Nearest => None,
    }
}

impl Target {
    /// `[height, width]` of a picture of `h` × `w` after the resize, with Python's roundings.
    fn of(self, h: usize, w: usize) -> Result<[usize; 2]> {
        let (height, width) = (h as f64, w as f64);
        let [new_h, new_w] = match self {
            Self::Fixed(Resize::None) => [height, width],
            Self::Fixed(Resize::Exact([h, w])) => [h as f64, w as f64],
            Self::Fixed(Resize::ShortestEdge(edge)) => {
                let edge = edge as f64;
                // torchvision: int(edge · long / short)
                if w <= h { [(edge * height / width).trunc(), edge] } else { [edge, (edge * width / height).trunc()] }
            }
            Self::Fixed(Resize::Edges([edge, longest])) => edges(height, width, edge as f64, longest as f64),
            Self::Fixed(Resize::Within([max_h, max_w])) => {
                let scale = (max_h as f64 / height).min(max_w as f64 / width);
                [(height * scale).trunc(), (width * scale).trunc()]
            }
            Self::Cover([h, w]) | Self::Contain([h, w]) => {
                // timm's ResizeKeepRatio
                let (a, b) = (height / h as f64, width / w as f64);
                let ratio = if matches!(self, Self::Cover(_)) { a.min(b) } else { a.max(b) };
                [(height / ratio).round_ties_even(), (width / ratio).round_ties_even()]
            }
        };
        // a very thin picture keeps one pixel, where the reference gives up
        let (new_h, new_w) = (new_h.max(1.0), new_w.max(1.0));
        let side = limits::RESIZED_SIDE as f64;
        let most = limits::PIXELS as f64;
        if new_h * new_w > most || new_w * height > most || [height, width, new_h, new_w].iter().any(|v| *v > side) {
            return Err(Error::image(format!(
                "a picture of {w}×{h} pixels would be resized to {new_w}×{new_h}: its aspect ratio is too extreme"
            )));
        }
        Ok([new_h as usize, new_w as usize])
    }
}

/// Hugging Face's `get_size_with_aspect_ratio`.
fn edges(height: f64, width: f64, edge: f64, longest: f64) -> [f64; 2] {
    let (short, long) = (height.min(width), height.max(width));
    let (edge, exact) = if long / short * edge > longest {
        let raw = longest * short / long;
        (raw.round_ties_even(), raw)
    } else {
        (edge, edge)
    };
    if short == edge {
        [height, width]
    } else if width < height {
        [(exact * height / width).trunc(), edge]
    } else {
        [edge, (exact * width / height).trunc()]
    }
}

/// One dimension of the crop: `len` samples from `start` of the resized picture go to `pad` of the output.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: usize,
    pad: usize,
    len: usize,
}

impl Span {
    fn new(resized: usize, out: usize, floor: bool) -> Self {
        if resized <= out {
            return Self { start: 0, pad: (out - resized) / 2, len: resized };
        }
        let twice = resized - out;
        // torchvision: round((resized − out) / 2), halves to even
        let up = !floor && twice % 4 == 3;
        Self { start: twice / 2 + usize::from(up), pad: 0, len: out }
    }
}

/// A resize of which only the crop is kept.
struct Resampling<'a> {
    source: &'a [u8], // [H, W, C]
    h: usize,
    w: usize,
    new_h: usize,
    new_w: usize,
    rows: Span,
    columns: Span,
    channels: usize,
    out_w: usize,
}

impl Resampling<'_> {
    /// Where row `y` of the crop lies in the output, and from column `x` on.
    fn at(&self, y: usize, x: usize) -> usize {
        ((self.rows.pad + y) * self.out_w + self.columns.pad + x) * self.channels
    }

    /// The nearest pixel, its position summed up as Pillow does.
    fn nearest(&self, out: &mut [u8]) {
        let positions = |old: usize, new: usize, span: Span| {
            let step = old as f64 / new as f64;
            let mut at = step * 0.5;
            let all = (0..span.start + span.len).map(move |_| {
                let here = (at as usize).min(old - 1);
                at += step;
                here
            });
            all.skip(span.start).collect::<Vec<_>>()
        };
        let columns = positions(self.w, self.new_w, self.columns);
        for (y, row) in positions(self.h, self.new_h, self.rows).into_iter().enumerate() {
            for (x, column) in columns.iter().enumerate() {
                let from = (row * self.w + column) * self.channels;
                let to = self.at(y, x);
                out[to..to + self.channels].copy_from_slice(&self.source[from..from + self.channels]);
            }
        }
    }

    fn filtered(&self, library: Library, filter: Filter, out: &mut [u8]) {
        let [rows, columns] = [self.rows, self.columns].map(|span| span.start..span.start + span.len);
        let (old, new) = ([self.h, self.w], [self.new_h, self.new_w]);
        let kept = match self.channels {
            1 => resample::<1>(library, self.source, old, new, rows, columns, filter),
            _ => resample::<3>(library, self.source, old, new, rows, columns, filter),
        };
        let line = self.columns.len * self.channels;
        for (y, row) in kept.chunks_exact(line).enumerate() {
            let to = self.at(y, 0);
            out[to..to + line].copy_from_slice(row);
        }
    }
}
