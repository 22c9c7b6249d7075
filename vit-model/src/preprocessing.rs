//! `PreprocessConfig`: how an image file becomes the input of a model, as data.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    config::{Config, is_default},
    limits,
};

/// A resampling filter, as Pillow defines it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Interpolation {
    /// The nearest pixel.
    Nearest,
    /// Windowed sinc over three pixels each way.
    Lanczos,
    /// A triangle over one pixel each way.
    Bilinear,
    /// Cubic convolution with a = −0.5 over two pixels each way.
    #[default]
    Bicubic,
    /// The mean of the pixels that are covered.
    Box,
    /// A Hamming window over one pixel each way.
    Hamming,
}

impl Interpolation {
    /// Every filter, in the order of Pillow's numbers, which transformers' `resample` holds.
    pub const ALL: [Self; 6] = [Self::Nearest, Self::Lanczos, Self::Bilinear, Self::Bicubic, Self::Box, Self::Hamming];

    /// timm's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nearest => "nearest",
            Self::Lanczos => "lanczos",
            Self::Bilinear => "bilinear",
            Self::Bicubic => "bicubic",
            Self::Box => "box",
            Self::Hamming => "hamming",
        }
    }
}

impl fmt::Display for Interpolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Interpolation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = || Self::ALL.map(Self::as_str).join(", ");
        Self::ALL
            .into_iter()
            .find(|filter| filter.as_str() == name)
            .ok_or_else(|| fail(format!("`interpolation` must be one of {}, found {name:?}", known())))
    }
}

/// How an image is fitted to the input size, as in timm's `transforms_factory.py`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum CropMode {
    /// The shorter edge is resized, then the centre is cropped.
    #[default]
    Center,
    /// Both edges are resized, whatever the aspect ratio.
    Squash,
    /// The longer edge is resized, then the rest is filled with the mean.
    Border,
    /// No crop follows. It needs a [`PreprocessConfig::resize`].
    None,
}

impl CropMode {
    /// timm's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Center => "center",
            Self::Squash => "squash",
            Self::Border => "border",
            Self::None => "none",
        }
    }
}

impl fmt::Display for CropMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CropMode {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        [Self::Center, Self::Squash, Self::Border, Self::None]
            .into_iter()
            .find(|mode| mode.as_str() == name)
            .ok_or_else(|| fail(format!("`crop_mode` must be center, squash or border, found {name:?}")))
    }
}

fn fail(why: impl std::fmt::Display) -> Error {
    Error::config(format!("preprocess: {why}"))
}

/// How an image file becomes the model's input, under the names of timm's `pretrained_cfg`.
///
/// The image is resized (by `resize` if it is set, otherwise by `crop_mode` and `crop_pct`), cropped at its centre to
/// `input_size` (or padded if it is smaller), divided by 255 and normalised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PreprocessConfig {
    /// `[channels, height, width]` of the input.
    pub input_size: [usize; 3],
    /// The resampling filter.
    pub interpolation: Interpolation,
    /// The resize target is `floor(size / crop_pct)`; the crop is `size`.
    pub crop_pct: f64,
    /// How the image is fitted to the input size.
    pub crop_mode: CropMode,
    /// Subtracted per channel, after `/255`.
    pub mean: Vec<f64>,
    /// Divided by per channel, after the mean.
    pub std: Vec<f64>,
    /// A resize that `crop_pct` cannot express (Hugging Face's `size`). It replaces `crop_mode` and `crop_pct`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub resize: Option<Resize>,
    /// Use the arithmetic of Hugging Face's processors: torchvision's 8-bit resize, and a crop offset that is rounded
    /// down. Otherwise use timm's: Pillow's resize, and a crop offset that is rounded half to even.
    #[serde(default, skip_serializing_if = "is_default")]
    pub torchvision: bool,
    /// Transparent pixels are blended onto white, as transformers' `do_convert_rgb` does. Otherwise alpha is dropped, as
    /// Pillow's `convert("RGB")` does.
    #[serde(default, skip_serializing_if = "is_default")]
    pub white_key: bool,
}

/// The size that an image is resized to before the crop, in pixels (the forms of Hugging Face's `size`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Resize {
    /// Not resized.
    None,
    /// `[height, width]`, whatever the image's aspect ratio.
    Exact([usize; 2]),
    /// The length of the shorter edge. The aspect ratio stays.
    ShortestEdge(usize),
    /// `[shortest, longest]`: the length of the shorter edge, or less if the longer edge would exceed its limit.
    Edges([usize; 2]),
    /// `[max_height, max_width]`: as large as fits within both.
    Within([usize; 2]),
}

impl fmt::Display for Resize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("no resize"),
            Self::Exact([h, w]) => write!(f, "resize to {h}×{w}"),
            Self::ShortestEdge(edge) => write!(f, "shortest edge {edge}"),
            Self::Edges([short, long]) => write!(f, "shortest edge {short}, longest {long}"),
            Self::Within([h, w]) => write!(f, "resize within {h}×{w}"),
        }
    }
}

impl PreprocessConfig {
    /// Makes images of another size in the same way: the size that a picture is resized to changes in proportion.
    pub fn set_input_size(&mut self, [h, w]: [usize; 2]) {
        let [channels, old_h, old_w] = self.input_size;
        let across = |side: usize, new: usize, old: usize| {
            let product = u128::try_from(side).ok()?.checked_mul(u128::try_from(new).ok()?)?;
            let old = u128::try_from(old.max(1)).ok()?;
            usize::try_from(product.checked_add(old / 2)?.checked_div(old)?).ok()
        };
        // a size that overflows is one that `validate` refuses
        let tall = |side| across(side, h, old_h).unwrap_or(usize::MAX);
        let wide = |side| across(side, w, old_w).unwrap_or(usize::MAX);
        let short = |side| if old_h <= old_w { tall(side) } else { wide(side) };
        self.resize = self.resize.map(|resize| match resize {
            Resize::None => Resize::None,
            Resize::Exact([a, b]) => Resize::Exact([tall(a), wide(b)]),
            Resize::ShortestEdge(edge) => Resize::ShortestEdge(short(edge)),
            Resize::Edges([edge, longest]) => Resize::Edges([short(edge), short(longest)]),
            Resize::Within([a, b]) => Resize::Within([tall(a), wide(b)]),
        });
        self.input_size = [channels, h, w];
    }

    /// timm's defaults for an input of `[channels, height, width]`: bicubic, `crop_pct` 0.9, mean and standard
    /// deviation 0.5.
    pub fn new(input_size: [usize; 3]) -> Self {
        let [channels, ..] = input_size;
        Self {
            input_size,
            interpolation: Interpolation::Bicubic,
            crop_pct: 0.9,
            crop_mode: CropMode::Center,
            mean: vec![0.5; channels],
            std: vec![0.5; channels],
            resize: None,
            torchvision: false,
            white_key: false,
        }
    }

    /// [`new`](Self::new) for the input of a model.
    pub fn for_config(config: &Config) -> Self {
        let [h, w] = config.img_size;
        Self::new([config.in_chans, h, w])
    }

    /// Refuses a configuration that cannot be carried out, so that later code may allocate from it.
    ///
    /// # Errors
    /// The field that is wrong, what is possible, and what was found.
    pub fn validate(&self) -> Result<()> {
        let fail = |why| Err(fail(why));
        let [channels, h, w] = self.input_size;
        if channels == 0 || channels > 1024 {
            return fail(format!("`input_size` has {channels} channels, 1 to 1024 are possible"));
        }
        if h == 0
            || w == 0
            || h > limits::INPUT_SIDE
            || w > limits::INPUT_SIDE
            || h.saturating_mul(w) > limits::INPUT_PIXELS
        {
            return fail(format!(
                "`input_size` {h}×{w}: sides of 1 to {} and at most {} pixels are possible",
                limits::INPUT_SIDE,
                limits::INPUT_PIXELS
            ));
        }
        if self.crop_mode == CropMode::None && self.resize.is_none() {
            return fail("`crop_mode` must be center, squash or border, found \"none\" without a resize".into());
        }
        for side in [h, w] {
            scaled(side, self.crop_pct)?;
        }
        let sides = match self.resize {
            None | Some(Resize::None) => vec![],
            Some(Resize::ShortestEdge(edge)) => vec![edge],
            Some(Resize::Exact(two) | Resize::Edges(two) | Resize::Within(two)) => two.into(),
        };
        if let Some(side) = sides.into_iter().find(|side| !(1..=limits::RESIZE_SIDE).contains(side)) {
            return fail(format!("images can be resized to 1 to {} pixels a side, found {side}", limits::RESIZE_SIDE));
        }
        for (name, values) in [("mean", &self.mean), ("std", &self.std)] {
            if values.is_empty() || values.len() > 1024 {
                return fail(format!("`{name}` must have one value per channel, found {}", values.len()));
            }
            if let Some(bad) = values.iter().find(|v| !v.is_finite() || v.abs() > 1e6) {
                return fail(format!("`{name}` must be finite numbers, found {bad}"));
            }
        }
        if let Some(bad) = self.std.iter().find(|v| **v < 1e-6) {
            return fail(format!("`std` must be positive, found {bad}"));
        }
        Ok(())
    }
}

/// `floor(side / crop_pct)`, as timm computes the size that an image is resized to.
pub(crate) fn scaled(side: usize, crop_pct: f64) -> Result<usize> {
    let fail = || Error::config(format!("preprocess: `crop_pct` {crop_pct:e} makes no usable size of {side} pixels"));
    let side = u32::try_from(side).map_err(|_| fail())?;
    let size = (f64::from(side) / crop_pct).floor();
    if crop_pct > 0.0 && size >= 1.0 && size <= to_f64(limits::RESIZE_SIDE) {
        to_usize(size).ok_or_else(fail)
    } else {
        Err(fail())
    }
}

#[allow(clippy::as_conversions)] // of a value below 2^17
fn to_f64(value: usize) -> f64 {
    value as f64
}

/// A whole number that an index can hold exactly.
#[allow(clippy::as_conversions)] // after the range check
pub(crate) fn to_usize(value: f64) -> Option<usize> {
    ((0.0..=4294967295.0).contains(&value) && value.fract() == 0.0).then_some(value as usize)
}
