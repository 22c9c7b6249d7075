//! Texts → token ids, from the files beside a model: `tokenizer.json`, or `vocab.json` and `merges.txt`.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, PostProcessor as _};

use super::document;
use crate::files::{ADDED_TOKENS, MERGES, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG, VOCAB, file_up_to, small_file};
use crate::{Error, Result, json as strict, limits};

/// The pattern that CLIP splits texts by, as transformers has it.
const CLIP_PATTERN: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The special tokens that transformers gives names to.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Turns texts into the ids that a text tower reads: cut and padded to one length.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pad: u32,
    /// Ids of a text.
    length: usize,
    /// Of them, how many the tokeniser itself adds.
    special: usize,
}

impl Tokenizer {
    /// Reads the tokeniser in a folder. Texts become at most `length` ids, fewer if `tokenizer_config.json` says so. `pad` is
    /// used if no file names the token to pad with.
    ///
    /// # Errors
    /// [`Error::File`]: the folder has no tokeniser, or one that cannot be used.
    pub(crate) fn open(folder: &Path, length: usize, pad: Option<u32>) -> Result<Self> {
        let settings = Settings::read(folder)?;
        let whole = folder.join(TOKENIZER);
        let (path, bytes) = if exists(&whole) {
            let bytes = file_up_to(&whole, limits::TOKENIZER_BYTES)?;
            if bytes.len() > limits::TOKENIZER_BYTES {
                return Err(Error::file(whole, format!("has more than {} bytes", limits::TOKENIZER_BYTES)));
            }
            (whole, bytes)
        } else if exists(&folder.join(VOCAB)) && exists(&folder.join(MERGES)) {
            (folder.join(VOCAB), clip(folder, &settings)?)
        } else {
            let sentencepiece = ["spiece.model", "tokenizer.model"].into_iter().find(|name| exists(&folder.join(name)));
            return Err(Error::file(
                folder,
                match sentencepiece {
                    Some(name) => format!(
                        "has its tokenizer in {name} alone, which is not read; save it as {TOKENIZER} with \
                         `AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)`"
                    ),
                    None => format!(
                        "has no tokenizer: neither {TOKENIZER} nor {VOCAB} and {MERGES} (`vit-cli pull` fetches them for a \
                         repository that is in the cache without them)"
                    ),
                },
            ));
        };
        let fail = |why: String| Error::file(&path, why);
        document::check(&bytes).map_err(fail)?;
        let mut inner: tokenizers::Tokenizer =
            serde_json::from_slice(&bytes).map_err(|error| fail(format!("is no tokenizer: {error}")))?;
        settings.add_to(&mut inner).map_err(fail)?;
        inner.with_padding(None);
        let off = inner.with_truncation(None);
        off.map_err(|error| fail(error.to_string()))?;

        let length = settings.length.map_or(length, |most| most.min(length));
        let special = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        if special >= length {
            return Err(fail(format!("adds {special} tokens to each text, but a text has only {length}")));
        }
        let named = settings.name("pad_token").or_else(|| settings.is_clip().then(|| "<|endoftext|>".into()));
        let Some(pad) = named.and_then(|token| inner.token_to_id(&token)).or(pad) else {
            return Err(fail("does not name the token to pad texts with (`pad_token`)".into()));
        };
        Ok(Self { inner, pad, length, special })
    }

    /// The ids of each text, all of one length.
    ///
    /// # Errors
    /// [`Error::Input`] for a text that is too long to tokenise, or that has no ids in this vocabulary.
    pub fn encode(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<u32>>> {
        texts.iter().map(|text| self.encode_one(text.as_ref())).collect()
    }

    /// How many ids a text has.
    pub fn length(&self) -> usize {
        self.length
    }

    fn encode_one(&self, text: &str) -> Result<Vec<u32>> {
        if text.len() > limits::TEXT_BYTES {
            let (found, most) = (text.len(), limits::TEXT_BYTES);
            return Err(Error::Input(format!("a text of {found} bytes, at most {most} are tokenised")));
        }
        let fail = |error: tokenizers::Error| Error::Input(format!("the text {text:?} cannot be tokenised: {error}"));
        let mut encoding = self.inner.encode_fast(text, false).map_err(fail)?;
        encoding.truncate(self.length.saturating_sub(self.special), 0, tokenizers::TruncationDirection::Right);
        let encoding = self.inner.post_process(encoding, None, true).map_err(fail)?;
        let mut ids = encoding.get_ids().to_vec();
        ids.resize(self.length, self.pad);
        Ok(ids)
    }
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn object(path: &Path) -> Result<Map<String, Value>> {
    if !exists(path) {
        return Ok(Map::new());
    }
    match strict::parse(&small_file(path)?).map_err(|why| Error::file(path, why))? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::file(path, "must hold an object")),
    }
}

/// What the files around a tokeniser say about it.
struct Settings {
    config: Map<String, Value>,
    special: Map<String, Value>,
    /// Ids of a text.
    length: Option<usize>,
}

impl Settings {
    fn read(folder: &Path) -> Result<Self> {
        let config = object(&folder.join(TOKENIZER_CONFIG))?;
        // transformers writes 1e30 for "no limit"
        let length = config.get("model_max_length").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        Ok(Self { config, special: object(&folder.join(SPECIAL_TOKENS))?, length: length.filter(|&n| n > 0) })
    }

    fn get(&self, key: &str) -> Option<&Value> {
        let given = |map: &'_ Map<String, Value>| map.get(key).is_some_and(|value| !value.is_null());
        if given(&self.config) { self.config.get(key) } else { self.special.get(key).filter(|value| !value.is_null()) }
    }

    /// A special token's text, which is stored as such or in an object with its properties.
    fn name(&self, key: &str) -> Option<String> {
        let value = self.get(key)?;
        value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
    }

    fn is_clip(&self) -> bool {
        let class = self.config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        class.starts_with("CLIPTokenizer")
    }

    /// Declares the named special tokens as special, as transformers does when it loads a tokeniser. A text that contains one
    /// is split there, which matters for CLIP's text encoders that pad with `!`.
    fn add_to(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), String> {
        let known: Vec<String> =
            tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        for key in SPECIAL {
            let Some(name) = self.name(key).filter(|name| !name.is_empty() && !known.contains(name)) else { continue };
            if tokenizer.token_to_id(&name).is_none() {
                continue;
            }
            let flag =
                |name: &str| self.get(key).and_then(|value| value.get(name)).and_then(Value::as_bool).unwrap_or(false);
            let token = AddedToken::from(name, true)
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .single_word(flag("single_word"));
            tokenizer.add_special_tokens([token]).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// The document of CLIP's tokeniser from `vocab.json` and `merges.txt`, as transformers' class builds it.
fn clip(folder: &Path, settings: &Settings) -> Result<Vec<u8>> {
    let path = folder.join(VOCAB);
    let vocab = object(&path)?;
    let at = folder.join(MERGES);
    let bytes = small_file(&at)?;
    if bytes.len() > limits::JSON_BYTES {
        return Err(Error::file(at, format!("has more than {} bytes", limits::JSON_BYTES)));
    }
    let text = std::str::from_utf8(&bytes).map_err(|error| Error::file(&at, format!("is not UTF-8: {error}")))?;
    let mut merges = Vec::new();
    for (number, line) in (1_usize..).zip(text.lines()) {
        if line.starts_with("#version") || line.trim().is_empty() {
            continue;
        }
        match line.split_once(' ') {
            Some((a, b)) if !a.is_empty() && !b.is_empty() && !b.contains(' ') => merges.push(json!([a, b])),
            _ => return Err(Error::file(at, format!("line {number} is not a merge of two tokens: {line:?}"))),
        }
    }
    let mut added = object(&folder.join(ADDED_TOKENS))?;
    for (id, token) in settings.config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        if let (Ok(id), Some(token)) = (id.parse::<u32>(), token.get("content").and_then(Value::as_str)) {
            added.insert(token.into(), id.into());
        }
    }
    let special = |key: &str, default: &str| -> Result<(String, Value)> {
        let name = settings.name(key).unwrap_or_else(|| default.into());
        let id = vocab.get(&name).or_else(|| added.get(&name)).cloned();
        let id = id.ok_or_else(|| Error::file(&path, format!("has no token {name:?}, which is the `{key}`")))?;
        Ok((name, id))
    };
    let (bos, eos) = (special("bos_token", "<|startoftext|>")?, special("eos_token", "<|endoftext|>")?);
    let unknown = settings.name("unk_token").unwrap_or_else(|| eos.0.clone());
    let token = |content: &str, id: &Value, special: bool| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": !special, "special": special })
    };
    let mut tokens = vec![token(&bos.0, &bos.1, true), token(&eos.0, &eos.1, true)];
    let mut others: Vec<(&String, &Value)> =
        added.iter().filter(|(name, _)| **name != bos.0 && **name != eos.0).collect();
    others.sort_by_key(|(_, id)| id.as_u64());
    tokens.extend(others.into_iter().map(|(name, id)| token(name, id, false)));
    let document = json!({
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
            { "type": "Lowercase" },
        ] },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": CLIP_PATTERN }, "behavior": "Removed", "invert": true },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        ] },
        "post_processor": { "type": "RobertaProcessing", "sep": [eos.0, eos.1], "cls": [bos.0, bos.1],
                            "trim_offsets": false, "add_prefix_space": false },
        "model": { "type": "BPE", "unk_token": unknown, "continuing_subword_prefix": "",
                   "end_of_word_suffix": "</w>", "fuse_unk": false, "vocab": vocab, "merges": merges },
    });
    serde_json::to_vec(&document).map_err(|error| Error::file(path, error.to_string()))
}
