//! Reads the preprocessing from timm's `pretrained_cfg` and from Hugging Face's `preprocessor_config.json`.

use serde_json::Value;

use crate::{
    Config, Error, PreprocessConfig, Resize, Result,
    preprocessing::{CropMode, Interpolation, scaled, to_usize},
};

const IMAGENET: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
const INCEPTION: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);
const CLIP: ([f64; 3], [f64; 3]) = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]);

impl PreprocessConfig {
    /// Reads the `pretrained_cfg` of a timm `config.json`, or the top level of an old one, which had those keys there.
    ///
    /// An absent key has the default of timm's `PretrainedCfg`: bicubic, `crop_pct` 0.875, ImageNet's mean and standard
    /// deviation. An absent `input_size` is the model's image size.
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
            interpolation: cfg.text("interpolation")?.map_or(Ok(Interpolation::Bicubic), str::parse)?,
            crop_pct: cfg.number("crop_pct")?.unwrap_or(0.875),
            crop_mode: cfg.text("crop_mode")?.map_or(Ok(CropMode::Center), str::parse)?,
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
    /// An absent key has the default of the processor class. That class is `image_processor_type`, or in older files
    /// `feature_extractor_type`, or otherwise the usual class for `model_type`, which is from the model's `config.json`. An
    /// absent `size` is the model's image size. So for an empty object, the result is what the class does for this model.
    ///
    /// If the processor converts to RGB (`do_convert_rgb`), transparent pixels are blended onto white, as in transformers 5;
    /// otherwise the alpha channel is dropped.
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
                return Err(Error::unsupported(format!("preprocessor_config: the step `{key}`")));
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
            // below 384 pixels, the image is resized to size / crop_pct and cropped; from 384 on, it is squashed
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
            // this is correct for square images; preprocessing rejects others
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
            mean.iter_mut().for_each(|m| *m += 1.0); // such processors subtract 1 after scaling
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
                None => class.filter,
                Some(value) => cfg.filter("resample", value)?,
            },
            crop_pct: 1.0,
            crop_mode: match crop {
                _ if squash => CropMode::Squash,
                Some(_) => CropMode::Center,
                None => CropMode::None,
            },
            mean: per_channel(mean, channels),
            std: per_channel(std, channels),
            resize: (!squash).then_some(size),
            torchvision: true,
            white_key: cfg.flag("do_convert_rgb")?.unwrap_or(class.convert),
        };
        config.validate()?;
        Ok(config)
    }
}

/// Repeats one value for every channel. Equal values count as one, so that three of them fit any number of channels.
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
    filter: Interpolation,
    norm: ([f64; 3], [f64; 3]),
    /// Whether a `size` of one number means height and width, rather than the shortest edge.
    square: bool,
    crop: bool,
    /// The default `size`, if it is not the model's image size.
    size: Option<usize>,
    /// The default of `do_convert_rgb`.
    convert: bool,
    /// Whether a `size` below 384 is divided by `crop_pct`, and the image then cropped to `size`.
    convnext: bool,
}

impl Class {
    fn named(name: &str) -> Result<Self> {
        let base = Self {
            filter: Interpolation::Bicubic,
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
            "ViT" => Self { filter: Interpolation::Bilinear, norm: INCEPTION, ..base },
            "DeiT" => Self { norm: INCEPTION, crop: true, size: Some(256), ..base },
            "CLIP" | "Bit" | "ChineseCLIP" | "ViTHybrid" => {
                Self { norm: CLIP, square: false, crop: true, convert: true, ..base }
            }
            "Siglip" => Self { norm: INCEPTION, square: false, convert: true, ..base },
            "Beit" => Self { norm: INCEPTION, ..base },
            // it resizes after scaling to 0 to 1, which differs by less than half a step of a pixel's 256
            "DINOv3ViT" => Self { filter: Interpolation::Bilinear, ..base },
            "Blip" => Self { norm: CLIP, convert: true, ..base },
            "ConvNext" => {
                Self { filter: Interpolation::Bilinear, square: false, size: Some(384), convnext: true, ..base }
            }
            other => {
                return Err(Error::unsupported(format!(
                    "the image processor {other:?} (known: ViT, DeiT, CLIP, Bit, Siglip, Beit, DINOv3ViT, Blip, ConvNext)"
                )));
            }
        })
    }

    /// The class that `transformers` uses for a model type if the file does not name one.
    fn of_model(model_type: &str) -> Self {
        let name = match model_type {
            "deit" => "DeiT",
            "clip" | "clip_vision_model" => "CLIP",
            "dinov2" | "dinov2_with_registers" => "Bit",
            "siglip" | "siglip_vision_model" => "Siglip",
            "beit" | "data2vec-vision" => "Beit",
            "dinov3_vit" => "DINOv3ViT",
            _ => "ViT",
        };
        Self::named(name).unwrap_or(Self {
            filter: Interpolation::Bilinear,
            norm: INCEPTION,
            square: true,
            crop: false,
            size: None,
            convert: false,
            convnext: false,
        })
    }
}

/// A JSON object and its name for error messages. A key whose value is null counts as absent.
struct Object<'a> {
    name: &'static str,
    map: &'a serde_json::Map<String, Value>,
}

impl<'a> Object<'a> {
    fn new(name: &'static str, value: &'a Value) -> Result<Self> {
        let map = value.as_object().ok_or_else(|| Error::config(format!("{name}: expected an object")))?;
        Ok(Self { name, map })
    }

    fn wrong(&self, key: &str, expected: &str, found: &impl std::fmt::Debug) -> Error {
        let mut found = format!("{found:?}");
        if found.len() > 80 {
            found = found.chars().take(80).chain(['…']).collect();
        }
        Error::config(format!("{}: `{key}` must be {expected}, found {found}", self.name))
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

    /// Reads one number or a list of numbers.
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

    /// Reads `size` or `crop_size` in all the forms that versions of `transformers` wrote.
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

    /// Reads a filter by Pillow's number or by name.
    fn filter(&self, key: &str, value: &Value) -> Result<Interpolation> {
        let found = match value {
            Value::String(name) => name.to_lowercase().parse().ok(),
            number => {
                let number = number.as_u64().and_then(|n| usize::try_from(n).ok());
                number.and_then(|n| Interpolation::ALL.get(n)).copied()
            }
        };
        found.ok_or_else(|| self.wrong(key, "one of Pillow's filters, 0 to 5", value))
    }
}
