//! Small files read whole, and the names of the files in a model's folder.

use std::path::{Component, Path};

use crate::{Result, inputs, json, limits};

/// What a model is: timm's or transformers' configuration.
pub(crate) const CONFIG: &str = "config.json";
/// How transformers preprocesses images for it. Its version 5 writes the second file, with the first one's content under a key.
pub(crate) const PROCESSORS: [&str; 2] = ["preprocessor_config.json", "processor_config.json"];
/// The weights, if they are in one file.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// Which file holds which tensor, if there are several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// open_clip's configuration.
pub(crate) const OPEN_CLIP: &str = "open_clip_config.json";
/// The names of a model's weights, the preferred ones first. Of each, the second name is an index of several files.
pub(crate) const FORMS: [[&str; 2]; 4] = [
    [WEIGHTS, INDEX],
    ["pytorch_model.bin", "pytorch_model.bin.index.json"],
    ["open_clip_model.safetensors", "open_clip_model.safetensors.index.json"],
    ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.bin.index.json"],
];

/// A tokeniser in the format of the `tokenizers` library.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// What transformers adds to a tokeniser: its special tokens and the length of a text.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The special tokens again, as older versions of transformers write them.
pub(crate) const SPECIAL_TOKENS: &str = "special_tokens_map.json";
/// Tokens beyond the vocabulary, as older versions of transformers write them.
pub(crate) const ADDED_TOKENS: &str = "added_tokens.json";
/// The vocabulary of a byte-level BPE.
pub(crate) const VOCAB: &str = "vocab.json";
/// The merges of a byte-level BPE.
pub(crate) const MERGES: &str = "merges.txt";

/// Everything that a tokeniser may be made of. If there is a [`TOKENIZER`], the [`VOCAB`] and the [`MERGES`] are not read.
#[cfg(feature = "hub")]
pub(crate) const TEXT_FILES: [&str; 6] = [TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, VOCAB, MERGES, ADDED_TOKENS];

/// A whole file of at most [`limits::JSON_BYTES`]. Of a longer one it returns one byte more than that, which `json::parse` refuses.
pub(crate) fn small_file(path: &Path) -> Result<Vec<u8>> {
    file_up_to(path, limits::JSON_BYTES)
}

/// A whole file of at most so many bytes. Of a longer one it returns one byte more than that.
pub(crate) fn file_up_to(path: &Path, most: usize) -> Result<Vec<u8>> {
    inputs::read(path, most)
}

/// Counts the files of a model's folder as inputs, those too that a run does not open: its weights where it only preprocesses, and
/// its tokeniser where it only embeds images.
pub(crate) fn expect(folder: &Path) {
    if !inputs::protected() {
        return;
    }
    let texts = [TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, VOCAB, MERGES];
    let settings = [CONFIG, OPEN_CLIP].into_iter().chain(PROCESSORS).chain(texts);
    for name in settings.chain(FORMS.into_iter().flatten()) {
        inputs::expect(&folder.join(name));
    }
    for [_, index] in FORMS {
        let path = folder.join(index);
        let index = if path.is_file() { small_file(&path).ok() } else { None };
        let index = index.and_then(|bytes| json::parse(&bytes).ok()).unwrap_or_default();
        let map = index.get("weight_map").and_then(serde_json::Value::as_object);
        let shards: std::collections::BTreeSet<&str> =
            map.into_iter().flatten().filter_map(|(_, file)| file.as_str()).take(limits::INDEXED).collect();
        for shard in shards.into_iter().take(limits::SHARDS) {
            if matches!(Path::new(shard).components().next(), Some(Component::Normal(_))) {
                inputs::expect(&folder.join(shard));
            }
        }
    }
}
