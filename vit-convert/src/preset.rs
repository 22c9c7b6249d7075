//! `--preprocess`: a well-known preprocessing by name, or changes to timm's defaults.

use serde_json::json;
use vit_model::PreprocessConfig;

use crate::{Error, Result};

/// `imagenet`, `inception`, `clip`, or `key=value` pairs: `mean=0.5,std=0.4:0.5:0.6,crop_pct=0.9,interpolation=bicubic`.
/// The caller replaces the image size with the model's.
///
/// # Errors
/// An unknown name or key, or a value that is not valid for its key.
pub fn parse(text: &str) -> Result<PreprocessConfig> {
    let wrong = |why: String| Error::graph(format!("--preprocess {text}: {why}"));
    let base = |mean: [f64; 3], std: [f64; 3], crop_pct: f64| {
        json!({
            "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": crop_pct, "crop_mode": "center",
            "mean": mean, "std": std,
        })
    };
    let mut config = match text {
        "imagenet" => base([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 0.9),
        "clip" => base([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], 1.0),
        _ => base([0.5; 3], [0.5; 3], 0.9),
    };
    let pairs = if matches!(text, "imagenet" | "inception" | "clip") { "" } else { text };
    for part in pairs.split(',').filter(|_| !pairs.is_empty()) {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| wrong("imagenet, inception, clip, or key=value pairs such as crop_pct=0.9".into()))?;
        let number =
            |text: &str| text.parse::<f64>().map_err(|_| wrong(format!("{key} must be a number, found {text:?}")));
        config[key] = match key {
            "mean" | "std" => {
                let list = value.split(':').map(number).collect::<Result<Vec<f64>>>()?;
                json!(if let [one] = list[..] { vec![one; 3] } else { list })
            }
            "crop_pct" => json!(number(value)?),
            "interpolation" | "crop_mode" => json!(value),
            _ => {
                return Err(wrong(format!(
                    "unknown key {key}; the keys are mean, std, crop_pct, interpolation and crop_mode"
                )));
            }
        };
    }
    if text.is_empty() {
        return Err(wrong("imagenet, inception, clip, or key=value pairs such as crop_pct=0.9".into()));
    }
    let config: PreprocessConfig = serde_json::from_value(config).map_err(|error| wrong(error.to_string()))?;
    config.validate()?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use vit_model::{CropMode, Interpolation};

    use super::parse;

    #[test]
    fn names_and_pairs_are_read_and_others_refused() {
        assert_eq!(parse("clip").unwrap().crop_pct, 1.0);
        assert_eq!(parse("inception").unwrap().mean, [0.5; 3]);
        let mixed = parse("mean=0.1:0.2:0.3,std=0.25,interpolation=bilinear,crop_mode=squash").unwrap();
        assert_eq!((mixed.mean, mixed.std), (vec![0.1, 0.2, 0.3], vec![0.25; 3]));
        assert_eq!((mixed.interpolation, mixed.crop_mode), (Interpolation::Bilinear, CropMode::Squash));
        for bad in ["", "imagnet", "mean=red", "std=0", "size=3", "crop_pct=0", "interpolation=best", "mean=0.5,"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
