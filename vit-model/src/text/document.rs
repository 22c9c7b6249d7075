//! Checks a `tokenizer.json` before the `tokenizers` library builds anything from it.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::charsmap;

/// Parts that CLIP's, SigLIP's and similar tokenisers are made of. Others are refused by name, because nobody compared their
/// ids with transformers'.
const PARTS: [&str; 24] = [
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "Nmt",
    "Prepend",
    "Precompiled",
    "Replace",
    "Strip",
    "StripAccents",
    "Sequence",
    "Split",
    "ByteLevel",
    "Metaspace",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
    "RobertaProcessing",
    "BertProcessing",
    "TemplateProcessing",
    "BertNormalizer",
    "BertPreTokenizer",
];

/// Bytes of a pattern of the regular expressions in a document.
const PATTERN_BYTES: usize = 4096;

/// Checks a document's bytes: that it has the parts that are supported, and nothing that the library trusts and must not.
///
/// # Errors
/// Why it cannot be used.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let document: Document = serde_json::from_slice(bytes).map_err(|error| format!("is no tokenizer: {error}"))?;
    for part in [&document.normalizer, &document.pre_tokenizer, &document.post_processor] {
        parts(part)?;
    }
    if document.post_processor.get("type").and_then(Value::as_str) == Some("Sequence") {
        return Err("has a `post_processor` of type \"Sequence\", which is not supported".into());
    }
    // the library reads a second text where a template asks for one
    let single = document.post_processor.get("single").and_then(Value::as_array);
    for piece in single.into_iter().flatten().filter_map(|piece| piece.get("Sequence")) {
        if piece.get("id").and_then(Value::as_str) != Some("A") {
            return Err("has a `post_processor` whose template for one text reads two".into());
        }
    }
    let model = document.model;
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err("drops merges at random (`dropout`), so no two runs would agree".into());
    }
    if model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
        return Err("has a `continuing_subword_prefix`, which is not supported".into());
    }
    match (model.kind.as_deref(), &model.vocab, model.merges) {
        (Some("BPE") | None, Vocab::Ids { longest }, Some(merges)) if merges.longest <= *longest => Ok(()),
        (Some("BPE") | None, Vocab::Ids { .. }, Some(_)) => {
            Err("has a merge that makes a token longer than any of its vocabulary".into())
        }
        (Some("Unigram"), Vocab::Scores, _) => Ok(()),
        (Some("BPE" | "Unigram") | None, ..) => Err("has a `model` without its vocabulary or merges".into()),
        (Some(other), ..) => {
            Err(format!("has a model of type {other:?}; BPE and Unigram are supported, which CLIP and SigLIP have"))
        }
    }
}

/// Walks over everything that has a type.
fn parts(value: &Value) -> Result<(), String> {
    match value {
        Value::Array(items) => items.iter().try_for_each(parts),
        Value::Object(map) => {
            if let Some(Value::String(kind)) = map.get("type")
                && !PARTS.contains(&kind.as_str())
            {
                return Err(format!("has a part of type {kind:?}, which is not supported"));
            }
            if let Some(Value::String(base64)) = map.get("precompiled_charsmap") {
                charsmap::check(base64).map_err(|why| format!("has a `precompiled_charsmap` that {why}"))?;
            }
            if let Some(Value::String(pattern)) = map.get("Regex").or(map.get("String"))
                && pattern.len() > PATTERN_BYTES
            {
                return Err(format!("has a pattern of {} bytes, at most {PATTERN_BYTES} are read", pattern.len()));
            }
            map.values().try_for_each(parts)
        }
        _ => Ok(()),
    }
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    vocab: Vocab,
    merges: Option<Merges>,
}

/// A vocabulary that is looked at and not kept.
enum Vocab {
    /// Tokens and their ids, and the bytes of the longest token.
    Ids { longest: usize },
    /// Tokens and their scores.
    Scores,
}

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                let mut longest = 0;
                while let Some((token, _)) = map.next_entry::<String, u32>()? {
                    longest = longest.max(token.len());
                }
                Ok(Vocab::Ids { longest })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vocab, A::Error> {
                while let Some((token, score)) = seq.next_element::<(String, f64)>()? {
                    if token.is_empty() || !score.is_finite() {
                        return Err(A::Error::custom("a token that is empty, or whose score is not finite"));
                    }
                }
                Ok(Vocab::Scores)
            }
        }
        deserializer.deserialize_any(Walk)
    }
}

/// Merges that are looked at and not kept: the bytes of the longest token that one makes.
struct Merges {
    longest: usize,
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// `"a b"` or `["a", "b"]`.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Merge {
            Text(String),
            Pair(String, String),
            Other(IgnoredAny),
        }
        let mut longest = 0;
        for merge in Vec::<Merge>::deserialize(deserializer)? {
            longest = longest.max(match merge {
                Merge::Text(both) => both.len().saturating_sub(1),
                Merge::Pair(a, b) => a.len().saturating_add(b.len()),
                Merge::Other(_) => return Err(D::Error::custom("a merge must be two tokens")),
            });
        }
        Ok(Self { longest })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)]
mod tests {
    use serde_json::{Value, json};

    use super::check;

    fn checked(change: impl FnOnce(&mut Value)) -> Result<(), String> {
        let mut document = json!({
            "normalizer": { "type": "Lowercase" },
            "post_processor": { "type": "TemplateProcessing", "single": [{ "Sequence": { "id": "A", "type_id": 0 } }] },
            "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": ["a b"] },
        });
        change(&mut document);
        check(&serde_json::to_vec(&document).unwrap())
    }

    #[test]
    fn what_the_library_trusts_is_checked_first() {
        checked(|_| ()).unwrap();
        checked(|d| d["model"]["merges"] = json!([["a", "b"]])).unwrap();
        checked(|d| d["model"] = json!({ "type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0 })).unwrap();
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 11] = [
            // the library copies both tokens into a buffer that is as long as the longest one
            (|d| d["model"]["merges"] = json!(["ab ab"]), "longer than any"),
            (|d| d["model"]["merges"] = json!([["ab", "a"]]), "longer than any"),
            (|d| d["model"]["merges"] = json!([["a"]]), "two tokens"),
            (|d| d["model"]["continuing_subword_prefix"] = json!("##"), "continuing_subword_prefix"),
            (|d| d["model"]["dropout"] = json!(0.1), "at random"),
            (|d| d["model"]["type"] = json!("WordPiece"), "WordPiece"),
            (|d| d["model"] = json!({ "type": "Unigram", "vocab": [["", -1.0]] }), "empty"),
            (|d| d["normalizer"] = json!({ "type": "Elsewhere" }), "Elsewhere"),
            (|d| d["post_processor"]["single"][0]["Sequence"]["id"] = json!("B"), "reads two"),
            (|d| d["normalizer"] = json!({ "type": "Precompiled", "precompiled_charsmap": "////fw==" }), "larger than"),
            (
                |d| d["pre_tokenizer"] = json!({ "type": "Split", "pattern": { "Regex": "a".repeat(5000) } }),
                "5000 bytes",
            ),
        ];
        for (change, says) in cases {
            let said = checked(change).unwrap_err();
            assert!(said.contains(says), "{said:?} should contain {says:?}");
        }
        assert!(check(b"{}").is_err() && check(b"[").is_err());
    }
}
