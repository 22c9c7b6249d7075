//! Picture → tensor exactly as the checkpoint's own processor does it: resize, centre crop, normalise.

use std::borrow::Cow;
use std::path::Path;

use fast_image_resize::images::{Image as Plane, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use rayon::prelude::*;

use crate::image::Image;
use crate::preprocess_config::scaled;
use crate::resample::{Filter, resample};
use crate::{Error, PreprocessConfig, Resize, Result, limits};

/// Bytes of the strip of columns that is resized vertically at a time.
const STRIP_BYTES: usize = 16 << 20;

/// A `PreprocessConfig` made ready: what does not depend on the picture is computed once.
///
/// Resampling is, to the bit, Pillow's for a timm checkpoint, and torchvision's 8-bit `antialias=True` for one of Hugging
/// Face. Both make two passes and round to 8 bits in between; Pillow's weights have 22 bits, torchvision's 15 or fewer,
/// so that they are up to 2 apart, and more where the order of the passes differs.
#[derive(Clone, Debug)]
pub struct Preprocess {
    size: [usize; 2],
    channels: usize,
    target: Target,
    /// `None`: the nearest pixel.
    filter: Option<Filter>,
    torchvision: bool,
    crop: bool,
    white_key: bool,
    /// The colour around a picture that is smaller than the crop.
    fill: [u8; 3],
    /// Per channel: 8-bit sample → value of the tensor.
    tables: Vec<[f32; 256]>,
}

/// How the size of the resized picture follows from that of the picture.
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
    /// Checks a config and prepares its tables. Models of 3 channels see RGB, those of 1 channel the luma.
    pub fn new(config: &PreprocessConfig) -> Result<Self> {
        config.validate()?;
        let [channels, h, w] = config.input_size;
        if channels != 1 && channels != 3 {
            return Err(Error::Unsupported(format!(
                "preprocessing for a model of {channels} channels (a picture gives 1 or 3): prepare the tensor yourself"
            )));
        }
        let per_channel = |name: &str, values: &[f64]| match values.len() {
            n if n == channels => Ok(values.to_vec()),
            1 => Ok(vec![values[0]; channels]),
            n => Err(Error::Config(format!("preprocess: `{name}` has {n} values for {channels} channels"))),
        };
        let (mean, std) = (per_channel("mean", &config.mean)?, per_channel("std", &config.std)?);

        let scale = [scaled(h, config.crop_pct)?, scaled(w, config.crop_pct)?];
        let target = match (config.resize, config.crop_mode.as_str()) {
            (Some(resize), _) => Target::Fixed(resize),
            (None, "squash") => Target::Fixed(Resize::Exact(scale)),
            (None, "border") => Target::Contain(scale),
            (None, _) if scale[0] == scale[1] => Target::Fixed(Resize::ShortestEdge(scale[0])),
            (None, _) => Target::Cover(scale),
        };
        let border = config.resize.is_none() && config.crop_mode == "border";
        let mut fill = [0; 3];
        if border {
            for (f, m) in fill.iter_mut().zip(&mean) {
                *f = (255.0 * m).round_ties_even().clamp(0.0, 255.0) as u8;
            }
        }
        // in f32 and in torch's order of operations, so that the values are its own to the bit
        let table =
            |(mean, std): (&f64, &f64)| std::array::from_fn(|v| (v as f32 / 255.0 - *mean as f32) / *std as f32);
        Ok(Self {
            size: [h, w],
            channels,
            target,
            filter: filter(&config.interpolation),
            crop: config.crop_mode != "none",
            torchvision: config.torchvision,
            white_key: config.white_key,
            fill,
            tables: mean.iter().zip(&std).map(table).collect(),
        })
    }

    /// `[channels, height, width]` of the tensor.
    pub fn output_shape(&self) -> [usize; 3] {
        [self.channels, self.size[0], self.size[1]]
    }

    /// One picture → `[C, H, W]`.
    pub fn apply(&self, image: &Image) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.channels * self.size[0] * self.size[1]];
        self.apply_into(image, &mut out)?;
        Ok(out)
    }

    /// One picture → `[C, H, W]`, where it is wanted: an image of a batch, say.
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

    /// A file → `[C, H, W]`; `exif` turns it upright first.
    pub fn load(&self, path: &Path, exif: bool) -> Result<Vec<f32>> {
        self.apply(&Image::open(path, exif)?).map_err(|e| match e {
            Error::Image(why) => Error::file(path, why),
            other => other,
        })
    }

    /// Files → tensors in their order, on all threads of the current rayon pool; the result does not depend on how many.
    ///
    /// All tensors of the call are in memory at once, of the pictures as many as there are threads (of large ones, one).
    pub fn load_batch<P: AsRef<Path> + Sync>(&self, paths: &[P], exif: bool) -> Vec<Result<Vec<f32>>> {
        paths.par_iter().map(|path| self.load(path.as_ref(), exif)).collect()
    }

    /// The 8-bit samples that the tensor is made of, `[H, W, C]`.
    pub fn resize_and_crop(&self, image: &Image) -> Result<Vec<u8>> {
        let keyed = image.transparent().filter(|_| self.white_key);
        let source: Cow<'_, [u8]> = match (keyed, self.channels) {
            (Some(key), 3) => {
                let white = |p: &[u8]| if p == key { [255; 3] } else { [p[0], p[1], p[2]] };
                image.pixels().chunks_exact(3).flat_map(white).collect()
            }
            (_, 1) => image.to_luma().into(),
            _ => image.pixels().into(),
        };
        let (w, h) = (image.width() as usize, image.height() as usize);
        let [new_h, new_w] = self.target.of(h, w)?;
        let [out_h, out_w] = self.size;
        if !self.crop && [new_h, new_w] != self.size {
            return Err(Error::Image(format!(
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
        let job = Job { source: &source, h, w, new_h, new_w, rows, columns, channels: self.channels, out_w };
        match self.filter {
            None => job.nearest(&mut out),
            Some(filter) => match torchvision_filter(filter).filter(|_| self.torchvision) {
                Some(filter) => job.torchvision(filter, &mut out)?,
                None => job.pillow(filter, &mut out),
            },
        }
        Ok(out)
    }
}

fn filter(name: &str) -> Option<Filter> {
    match name {
        "bilinear" => Some(Filter::Bilinear),
        "lanczos" => Some(Filter::Lanczos),
        "box" => Some(Filter::Box),
        "hamming" => Some(Filter::Hamming),
        "nearest" => None,
        _ => Some(Filter::Bicubic),
    }
}

/// The filters that torchvision has itself; for the others its pictures go through Pillow.
fn torchvision_filter(filter: Filter) -> Option<FilterType> {
    match filter {
        Filter::Bilinear => Some(FilterType::Bilinear),
        Filter::Bicubic => Some(FilterType::CatmullRom),
        Filter::Lanczos => Some(FilterType::Lanczos3),
        Filter::Box | Filter::Hamming => None,
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
            return Err(Error::Image(format!(
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
struct Job<'a> {
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

impl Job<'_> {
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

    fn pillow(&self, filter: Filter, out: &mut [u8]) {
        let [rows, columns] = [self.rows, self.columns].map(|span| span.start..span.start + span.len);
        let (old, new) = ([self.h, self.w], [self.new_h, self.new_w]);
        let kept = match self.channels {
            1 => resample::<1>(self.source, old, new, rows, columns, filter),
            _ => resample::<3>(self.source, old, new, rows, columns, filter),
        };
        let line = self.columns.len * self.channels;
        for (y, row) in kept.chunks_exact(line).enumerate() {
            let to = self.at(y, 0);
            out[to..to + line].copy_from_slice(row);
        }
    }

    /// Width first, then height of the columns that are kept; each by itself, since both in one call round otherwise.
    fn torchvision(&self, filter: FilterType, out: &mut [u8]) -> Result<()> {
        let kind = if self.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
        let fail = |e: &dyn std::fmt::Display| Error::Image(format!("resize: {e}"));
        let mut resizer = Resizer::new();

        let source = ImageRef::new(self.w as u32, self.h as u32, self.source, kind).map_err(|e| fail(&e))?;
        let mut wide = None;
        if self.new_w != self.w {
            let mut resized = Plane::new(self.new_w as u32, self.h as u32, kind);
            resizer.resize(&source, &mut resized, &options).map_err(|e| fail(&e))?;
            wide = Some(resized);
        }
        let wide = match &wide {
            Some(resized) => {
                ImageRef::new(self.new_w as u32, self.h as u32, resized.buffer(), kind).map_err(|e| fail(&e))?
            }
            None => source,
        };

        // a strip of columns at a time: a tall picture's resized form need not stand in memory at once
        let strip = (STRIP_BYTES / (self.new_h * self.channels)).clamp(1, self.columns.len);
        for x in (0..self.columns.len).step_by(strip) {
            let n = strip.min(self.columns.len - x);
            let mut tall = Plane::new(n as u32, self.new_h as u32, kind);
            let window = options.crop((self.columns.start + x) as f64, 0.0, n as f64, self.h as f64);
            resizer.resize(&wide, &mut tall, &window).map_err(|e| fail(&e))?;
            let line = n * self.channels;
            let kept = tall.buffer().chunks_exact(line).skip(self.rows.start).take(self.rows.len);
            for (y, row) in kept.enumerate() {
                let to = self.at(y, x);
                out[to..to + line].copy_from_slice(row);
            }
        }
        Ok(())
    }
}
