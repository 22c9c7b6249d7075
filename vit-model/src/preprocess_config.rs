//! How checkpoints describe their preprocessing: timm's `pretrained_cfg`, Hugging Face's `preprocessor_config.json`.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use serde_json::Value;

use crate::{Config, Error, PreprocessConfig, Resize, Result, limits};

/// The filters, under timm's names, in the order of Pillow's numbers (0 is nearest).
pub(crate) const FILTERS: [&str; 6] = ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"];

const IMAGENET: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
const INCEPTION: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);
const CLIP: ([f64; 3], [f64; 3]) = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]);

impl PreprocessConfig {
    /// Reads a timm `config.json` (its `pretrained_cfg`; or the old form, which had those keys at the top).
    ///
    /// What is absent has the default of timm's `PretrainedCfg`: bicubic, `crop_pct` 0.875, ImageNet's mean and
    /// standard deviation; an absent `input_size` is the model's.
    pub fn from_timm(config: &Value, model: &Config) -> Result<Self> {
        let cfg =
            Object::new("pretrained_cfg", config.get("pretrained_cfg").filter(|c| !c.is_null()).unwrap_or(config))?;
        let [h, w] = model.img_size;
        let input_size = match cfg.list("input_size")? {
            None => [model.in_chans, h, w],
            Some(list) => {
                let sizes = list.iter().map(|v| cfg.to_usize("input_size", v)).collect::<Result<Vec<_>>>()?;
                let &[_, h, w] = sizes.as_slice() else {
                    return Err(cfg.wrong("input_size", "[channels, height, width]", &sizes));
                };
                [model.in_chans, h, w]
            }
        };
        let config = Self {
            input_size,
            interpolation: cfg.text("interpolation")?.unwrap_or("bicubic").into(),
            crop_pct: cfg.number("crop_pct")?.unwrap_or(0.875),
            crop_mode: cfg.text("crop_mode")?.unwrap_or("center").into(),
            mean: per_channel(cfg.numbers("mean")?.unwrap_or(IMAGENET.0.into()), model.in_chans),
            std: per_channel(cfg.numbers("std")?.unwrap_or(IMAGENET.1.into()), model.in_chans),
            resize: None,
            torchvision: false,
            white_key: false,
        };
        config.validate()?;
        Ok(config)
    }

    /// Reads a Hugging Face `preprocessor_config.json`.
    ///
    /// What is absent has the default of its processor class (`image_processor_type`, or `feature_extractor_type` in
    /// older files; else the usual class of `model_type`, from the model's `config.json`), an absent `size` is the
    /// model's. An empty object therefore gives what the class does for this model.
    ///
    /// Alpha is dropped, where newer processors of `transformers` blend it onto white; but a file's one transparent
    /// colour becomes white where the processor converts to RGB, as it does there.
    pub fn from_hf(processor: &Value, model_type: &str, model: &Config) -> Result<Self> {
        let cfg = Object::new("preprocessor_config", processor)?;
        if let Some(timm) = processor.get("pretrained_cfg").filter(|c| c.is_object()) {
            return Self::from_timm(timm, model);
        }
        let named = match cfg.text("image_processor_type")? {
            None => cfg.text("feature_extractor_type")?,
            named => named,
        };
        let class = match named {
            Some(name) => Class::named(name)?,
            None => Class::of_model(model_type),
        };
        for (key, value) in cfg.map {
            let known = matches!(
                key.as_str(),
                "do_resize" | "do_center_crop" | "do_rescale" | "do_normalize" | "do_convert_rgb" | "do_reduce_labels"
            );
            if key.starts_with("do_") && !known && value == &Value::Bool(true) {
                return Err(Error::Unsupported(format!("preprocessor_config: the step `{key}`")));
            }
        }

        let [h, w] = model.img_size;
        let mut size = match cfg.get("size") {
            _ if !cfg.flag("do_resize")?.unwrap_or(true) => Resize::None,
            None if class.square => Resize::Exact(class.size.map_or([h, w], |size| [size, size])),
            None => Resize::ShortestEdge(class.size.unwrap_or(h.min(w))),
            Some(size) => cfg.size("size", size, class.square)?,
        };
        let mut crop = if cfg.flag("do_center_crop")?.unwrap_or(class.crop) {
            match cfg.get("crop_size") {
                None => Some([h, w]),
                Some(value) => match cfg.size("crop_size", value, true)? {
                    Resize::Exact(size) => Some(size),
                    _ => return Err(cfg.wrong("crop_size", "a height and a width", value)),
                },
            }
        } else {
            None
        };
        if class.convnext {
            // below 384 the picture is resized to size / crop_pct and cropped, else squashed
            if let Resize::ShortestEdge(edge) = size {
                let crop_pct = cfg.number("crop_pct")?.unwrap_or(224.0 / 256.0);
                if edge < 384 {
                    size = Resize::ShortestEdge(scaled(edge, crop_pct)?);
                    crop = Some([edge, edge]);
                } else {
                    (size, crop) = (Resize::Exact([edge, edge]), None);
                }
            }
        }
        let input = match (crop, size) {
            (Some(crop), _) => crop,
            (None, Resize::Exact(size)) => size,
            // a square picture comes out right; another one is refused when it is seen
            (None, Resize::ShortestEdge(edge) | Resize::Edges([edge, _])) => [edge, edge],
            (None, Resize::Within(size)) => size,
            (None, Resize::None) => [h, w],
        };

        let channels = model.in_chans;
        let (mut mean, mut std) = if cfg.flag("do_normalize")?.unwrap_or(true) {
            let mean = cfg.numbers("image_mean")?.unwrap_or(class.norm.0.into());
            (mean, cfg.numbers("image_std")?.unwrap_or(class.norm.1.into()))
        } else {
            (vec![0.0], vec![1.0])
        };
        if cfg.flag("offset")?.unwrap_or(false) {
            mean.iter_mut().for_each(|m| *m += 1.0); // x · factor − 1, then the mean
        }
        let factor = match cfg.flag("do_rescale")? {
            Some(false) => 1.0,
            _ => cfg.number("rescale_factor")?.unwrap_or(1.0 / 255.0),
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(cfg.wrong("rescale_factor", "a positive number", &factor));
        }
        // (x · f − m) / s = (x / 255 − m / 255 f) / (s / 255 f)
        let unit = 255.0 * factor;
        if (unit - 1.0).abs() > 1e-9 {
            mean.iter_mut().chain(&mut std).for_each(|v| *v /= unit);
        }

        let squash = size == Resize::Exact(input);
        let config = Self {
            input_size: [channels, input[0], input[1]],
            interpolation: match cfg.get("resample") {
                None => class.filter.into(),
                Some(value) => cfg.filter("resample", value)?.into(),
            },
            crop_pct: 1.0,
            crop_mode: match crop {
                _ if squash => "squash",
                Some(_) => "center",
                None => "none",
            }
            .into(),
            mean: per_channel(mean, channels),
            std: per_channel(std, channels),
            resize: (!squash).then_some(size),
            torchvision: true,
            white_key: cfg.flag("do_convert_rgb")?.unwrap_or(class.convert),
        };
        config.validate()?;
        Ok(config)
    }

    /// Refuses what cannot be, before anything is allocated from it.
    pub fn validate(&self) -> Result<()> {
        let fail = |why: String| Err(Error::Config(format!("preprocess: {why}")));
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
        if !FILTERS.contains(&self.interpolation.as_str()) {
            return fail(format!(
                "`interpolation` must be one of {}, found {:?}",
                FILTERS.join(", "),
                self.interpolation
            ));
        }
        match (self.crop_mode.as_str(), self.resize) {
            ("center" | "squash" | "border", _) | ("none", Some(_)) => {}
            (other, _) => return fail(format!("`crop_mode` must be center, squash or border, found {other:?}")),
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
            return fail(format!(
                "pictures can be resized to 1 to {} pixels a side, found {side}",
                limits::RESIZE_SIDE
            ));
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

/// `floor(side / crop_pct)`, as timm computes the size that a picture is resized to.
pub(crate) fn scaled(side: usize, crop_pct: f64) -> Result<usize> {
    let fail = || Error::Config(format!("preprocess: `crop_pct` {crop_pct:e} makes no usable size of {side} pixels"));
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
fn to_usize(value: f64) -> Option<usize> {
    ((0.0..=4294967295.0).contains(&value) && value.fract() == 0.0).then_some(value as usize)
}

/// One value stands for all channels; equal values stand for any number of them.
fn per_channel(values: Vec<f64>, channels: usize) -> Vec<f64> {
    match values.first() {
        Some(&first) if values.len() != channels && channels <= 1024 && values.iter().all(|v| *v == first) => {
            vec![first; channels]
        }
        _ => values,
    }
}

/// The defaults of a class of `transformers`' image processors.
struct Class {
    filter: &'static str,
    norm: ([f64; 3], [f64; 3]),
    /// A `size` of one number is height and width, not the shortest edge.
    square: bool,
    crop: bool,
    /// The default `size`, where it is not the model's image size.
    size: Option<usize>,
    /// `do_convert_rgb`
    convert: bool,
    /// `size` below 384 is enlarged by `crop_pct` and cropped back.
    convnext: bool,
}

impl Class {
    fn named(name: &str) -> Result<Self> {
        let base = Self {
            filter: "bicubic",
            norm: IMAGENET,
            square: true,
            crop: false,
            size: None,
            convert: false,
            convnext: false,
        };
        let short = name.trim_end_matches("Pil").trim_end_matches("Fast");
        let short = short.trim_end_matches("ImageProcessor").trim_end_matches("FeatureExtractor");
        Ok(match short {
            "ViT" => Self { filter: "bilinear", norm: INCEPTION, ..base },
            "DeiT" => Self { norm: INCEPTION, crop: true, size: Some(256), ..base },
            "CLIP" | "Bit" | "ChineseCLIP" | "ViTHybrid" => {
                Self { norm: CLIP, square: false, crop: true, convert: true, ..base }
            }
            "Siglip" => Self { norm: INCEPTION, square: false, convert: true, ..base },
            "Beit" => Self { norm: INCEPTION, ..base },
            "Blip" => Self { norm: CLIP, convert: true, ..base },
            "ConvNext" => Self { filter: "bilinear", square: false, size: Some(384), convnext: true, ..base },
            other => {
                return Err(Error::Unsupported(format!(
                    "the image processor {other:?} (known: ViT, DeiT, CLIP, Bit, Siglip, Beit, Blip, ConvNext)"
                )));
            }
        })
    }

    /// The class that `transformers` uses for a model type, where the file does not name one.
    fn of_model(model_type: &str) -> Self {
        let name = match model_type {
            "deit" => "DeiT",
            "clip" | "clip_vision_model" => "CLIP",
            "dinov2" | "dinov2_with_registers" => "Bit",
            "siglip" | "siglip_vision_model" => "Siglip",
            "beit" | "data2vec-vision" => "Beit",
            _ => "ViT",
        };
        Self::named(name).unwrap_or(Self {
            filter: "bilinear",
            norm: INCEPTION,
            square: true,
            crop: false,
            size: None,
            convert: false,
            convnext: false,
        })
    }
}

/// A JSON object with its name for the errors; a key whose value is null counts as absent.
struct Object<'a> {
    name: &'static str,
    map: &'a serde_json::Map<String, Value>,
}

impl<'a> Object<'a> {
    fn new(name: &'static str, value: &'a Value) -> Result<Self> {
        let map = value.as_object().ok_or_else(|| Error::Config(format!("{name}: expected an object")))?;
        Ok(Self { name, map })
    }

    fn wrong(&self, key: &str, expected: &str, found: &impl std::fmt::Debug) -> Error {
        let mut found = format!("{found:?}");
        if found.len() > 80 {
            found = found.chars().take(80).chain(['…']).collect();
        }
        Error::Config(format!("{}: `{key}` must be {expected}, found {found}", self.name))
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn read<T>(&self, key: &str, expected: &str, as_type: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.get(key).map(|v| as_type(v).ok_or_else(|| self.wrong(key, expected, v))).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>> {
        self.read(key, "a list", Value::as_array)
    }

    /// One number, or a list of them.
    fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.read(key, "numbers, one per channel", |value| match value {
            Value::Array(list) => list.iter().map(Value::as_f64).collect(),
            one => one.as_f64().map(|v| vec![v]),
        })
    }

    fn to_usize(&self, key: &str, value: &Value) -> Result<usize> {
        let wrong = || self.wrong(key, "whole numbers of pixels", value);
        match value.as_u64() {
            Some(n) => usize::try_from(n).map_err(|_| wrong()),
            None => value.as_f64().and_then(to_usize).ok_or_else(wrong), // 224.0
        }
    }

    /// `size` and `crop_size` in all the forms they have had.
    fn size(&self, key: &str, value: &Value, square: bool) -> Result<Resize> {
        let wrong = || self.wrong(key, "a number, [height, width], or {height, width} or {shortest_edge}", value);
        Ok(match value {
            Value::Object(map) => {
                let side =
                    |name: &str| map.get(name).filter(|v| !v.is_null()).map(|v| self.to_usize(key, v)).transpose();
                let sides = (side("height")?, side("width")?, side("shortest_edge")?, side("longest_edge")?);
                match (sides, side("max_height")?, side("max_width")?) {
                    ((_, _, Some(short), Some(long)), _, _) => Resize::Edges([short, long]),
                    ((_, _, Some(short), None), _, _) => Resize::ShortestEdge(short),
                    (_, Some(h), Some(w)) => Resize::Within([h, w]),
                    ((Some(h), Some(w), _, _), _, _) => Resize::Exact([h, w]),
                    _ => return Err(wrong()),
                }
            }
            Value::Array(list) => match list.as_slice() {
                [side] if square => Resize::Exact([self.to_usize(key, side)?; 2]),
                [side] => Resize::ShortestEdge(self.to_usize(key, side)?),
                [h, w] => Resize::Exact([self.to_usize(key, h)?, self.to_usize(key, w)?]),
                _ => return Err(wrong()),
            },
            side if square => Resize::Exact([self.to_usize(key, side)?; 2]),
            side => Resize::ShortestEdge(self.to_usize(key, side)?),
        })
    }

    /// A filter as Pillow's number or as a name.
    fn filter(&self, key: &str, value: &Value) -> Result<&'static str> {
        let found = match value {
            Value::String(name) => FILTERS.iter().find(|f| **f == name.to_lowercase()),
            number => number.as_u64().and_then(|n| usize::try_from(n).ok()).and_then(|n| FILTERS.get(n)),
        };
        found.copied().ok_or_else(|| self.wrong(key, "a filter of Pillow, 0 to 5", value))
    }
}
