//! The checksums in the document of a file that this project wrote: one of the architecture, and one of each tensor.
//!
//! They detect accidents: a damaged byte, exchanged tensors, a document combined with the weights of another model. They do
//! not protect against forgery, because anybody who writes a file can also write its checksums. The hash is XXH3 because it
//! is fast, and every model that is loaded is hashed.

use std::{collections::BTreeMap, fmt, hash::Hasher as _};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use twox_hash::XxHash3_64;

use crate::{Config, weights::TensorInfo};

/// The key of the checksums in the document. They describe the file rather than the model, so they are not part of
/// [`ModelInfo`](crate::ModelInfo): otherwise, writing other weights with the same document would write stale checksums.
pub const KEY: &str = "xxh3";

/// The 64 bits of XXH3, written as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum(pub u64);

/// The expected checksums of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Checksums {
    /// The checksum of the architecture's JSON as this crate writes it.
    pub model: Checksum,
    /// The checksum of each tensor, by its name; see [`Running`].
    pub tensors: BTreeMap<String, Checksum>,
}

impl Checksums {
    /// Compares a tensor's checksum with the expected one.
    ///
    /// # Errors
    /// If they differ. The message says what to do.
    pub(crate) fn compare(&self, name: &str, found: Checksum) -> Result<(), String> {
        let why = match self.tensors.get(name) {
            Some(&expected) if expected == found => return Ok(()),
            Some(expected) => format!("its checksum is {found}, expected {expected}"),
            None => "it has no checksum, although others do".into(),
        };
        Err(format!(
            "is not what was written: {why}. The file is damaged, or was assembled from other files; convert or fetch it \
             again (if you changed it on purpose, remove `{KEY}` from its configuration)"
        ))
    }
}

/// Computes a tensor's checksum piece by piece. It covers `name`, NUL, `dtype`, NUL, `[1, 2, 3]`, NUL and the bytes of the
/// elements, so the same bytes with another name or shape have another checksum. For a tensor in Q8_0 (GGUF), the type is F32,
/// as in [`Weights`](crate::Weights), and the bytes are its blocks.
pub struct Running(XxHash3_64);

impl Running {
    /// Starts the checksum of a tensor.
    pub fn new(name: &str, info: &TensorInfo) -> Self {
        let mut hash = XxHash3_64::with_seed(0);
        hash.write(format!("{name}\0{}\0{:?}\0", info.dtype.name(), info.shape).as_bytes());
        Self(hash)
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// The checksum of everything so far.
    pub fn finish(&self) -> Checksum {
        Checksum(self.0.finish())
    }
}

impl Checksum {
    /// The checksum of an architecture.
    pub fn of_model(config: &Config) -> Self {
        // serialising a struct of numbers, strings and booleans cannot fail; fields that later versions add are left out
        // when they are off, so that the checksums of older files stay valid
        let text = serde_json::to_string(config).unwrap_or_default();
        Self(XxHash3_64::oneshot(text.as_bytes()))
    }

    /// The checksum of a tensor.
    pub fn of_tensor(name: &str, info: &TensorInfo, bytes: &[u8]) -> Self {
        let mut running = Running::new(name, info);
        running.update(bytes);
        running.finish()
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u64::from_str_radix(&text, 16).ok().filter(|_| digits);
        number.map(Self).ok_or_else(|| D::Error::custom(format!("{text:?} is not a checksum of 16 hexadecimal digits")))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Dtype;

    /// The expected values come from Python's `xxhash.xxh3_64_hexdigest` over the same bytes.
    #[test]
    fn a_tensor_has_the_checksum_that_another_program_computes() {
        let info = TensorInfo { dtype: Dtype::F32, shape: vec![2, 3] };
        let bytes: Vec<u8> = [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(Checksum::of_tensor("head.weight", &info, &bytes).to_string(), "ff1374506a338c60");
        let info = TensorInfo { dtype: Dtype::F16, shape: vec![5000] };
        let bytes: Vec<u8> = (0..10_000_u32).flat_map(|i| u8::try_from(i * 7 % 251)).collect();
        let whole = Checksum::of_tensor("pos_embed", &info, &bytes);
        assert_eq!(whole.to_string(), "9eba3c8e4c72749f");
        let mut running = Running::new("pos_embed", &info);
        bytes.chunks(4097).for_each(|part| running.update(part));
        assert_eq!(running.finish(), whole);
    }

    #[test]
    fn digits_that_are_none_are_refused() {
        for bad in ["\"0\"", "\"+123456789abcdef\"", "\"0123456789abcdeg\"", "\"00123456789abcdef\"", "7", "null"] {
            assert!(serde_json::from_str::<Checksum>(bad).is_err(), "{bad}");
        }
        let good: Checksum = serde_json::from_str("\"0123456789abcdef\"").unwrap();
        assert_eq!(serde_json::to_string(&good).unwrap(), "\"0123456789abcdef\"");
    }
}
