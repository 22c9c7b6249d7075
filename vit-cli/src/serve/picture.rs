//! A picture as clients put it into JSON: base64, a data URI, or a URL.

use axum::body::Bytes;
use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use serde_json::Value;

use super::fault::Fault;

/// With or without padding, as clients send it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A picture as a client sent it.
#[derive(Clone, Debug)]
pub enum Picture {
    /// An encoded file.
    Bytes(Bytes),
    /// Where to fetch it.
    Url(String),
}

impl Picture {
    /// A data URI, a URL, or base64.
    pub fn from_text(text: &str) -> Result<Self, Fault> {
        let text = text.trim();
        if text.starts_with("http://") || text.starts_with("https://") {
            return Ok(Self::Url(text.to_owned()));
        }
        let encoded = match text.strip_prefix("data:") {
            None => text,
            Some(uri) => match uri.split_once(',') {
                Some((kind, data)) if kind.ends_with(";base64") => data,
                _ => return Err(Fault::input("a data URI must be `data:image/…;base64,…`")),
            },
        };
        let bytes = BASE64
            .decode(encoded)
            .map_err(|e| Fault::input(format!("a picture in JSON must be base64, a data URI or a URL ({e})")))?;
        Ok(Self::Bytes(bytes.into()))
    }

    /// As clients nest pictures in JSON: a text; `{"image": text}`, `{"url": text}`, `{"image_url": {"url": text}}`.
    pub fn from_json(value: &Value) -> Result<Self, Fault> {
        let nested = |value: &Value| {
            ["image", "url", "b64", "b64_json", "image_url"].iter().find_map(|key| value.get(key).cloned())
        };
        match value {
            Value::String(text) => Self::from_text(text),
            Value::Object(_) => match nested(value) {
                Some(inner) => Self::from_json(&inner),
                None => Err(Fault::input("an object with a picture has it under `image` or `url`")),
            },
            _ => Err(Fault::input("a picture in JSON is a text: base64, a data URI or a URL")),
        }
    }

    /// One picture, or a list of them.
    pub fn list(value: &Value) -> Result<Vec<Self>, Fault> {
        match value {
            Value::Array(many) => many.iter().map(Self::from_json).collect(),
            one => Ok(vec![Self::from_json(one)?]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(picture: Picture) -> Option<Bytes> {
        if let Picture::Bytes(bytes) = picture { Some(bytes) } else { None }
    }

    #[test]
    fn pictures_come_as_base64_in_every_usual_form() {
        for text in ["AAEC/w==", "AAEC/w", "data:image/png;base64,AAEC/w==", " AAEC/w== "] {
            assert_eq!(bytes(Picture::from_text(text).unwrap()).unwrap(), [0u8, 1, 2, 255].as_slice(), "{text}");
        }
        let nested = serde_json::json!({"image_url": {"url": "data:image/png;base64,AAEC/w=="}});
        assert!(bytes(Picture::from_json(&nested).unwrap()).is_some());
        assert!(matches!(Picture::from_text("https://example.org/a.png").unwrap(), Picture::Url(_)));
        for bad in ["data:image/png,AAEC", "not base64!"] {
            assert!(Picture::from_text(bad).is_err(), "{bad}");
        }
    }
}
