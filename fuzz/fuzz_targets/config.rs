//! Text as what stands beside weights: `config.json` (timm's, transformers'), `preprocessor_config.json`, an index of shards,
//! class names. The first byte says which.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vit_fuzz::Folder;

const TIMM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/parity/timm/vit_base_patch16_224");
const HF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/parity/hf/vit_cls");

/// A folder with a checkpoint; one file in it is written anew each time.
fn around(name: &str, source: &str, weights: &str) -> Folder {
    let folder = Folder::named(name);
    folder.write(weights, &std::fs::read(format!("{source}/model.safetensors")).expect("a fixture"));
    for file in ["config.json", "preprocessor_config.json"] {
        if let Ok(bytes) = std::fs::read(format!("{source}/{file}")) {
            folder.write(file, &bytes);
        }
    }
    folder
}

static FOLDERS: LazyLock<[(Folder, &str); 4]> = LazyLock::new(|| {
    [
        (around("timm", TIMM, "model.safetensors"), "config.json"),
        (around("hf", HF, "model.safetensors"), "config.json"),
        (around("processor", HF, "model.safetensors"), "preprocessor_config.json"),
        (around("index", TIMM, "weights.safetensors"), "model.safetensors.index.json"),
    ]
});

fuzz_target!(|data: &[u8]| {
    let Some((which, text)) = data.split_first() else { return };
    let Some((folder, file)) = FOLDERS.get(usize::from(which % 5)) else {
        let _ = vit_model::labels::parse(text);
        return;
    };
    folder.write(file, text);
    if let Ok(checkpoint) = vit_model::checkpoint::open(folder.path()) {
        let _ = vit_model::image::Preprocess::new(&checkpoint.info.preprocess);
    }
});
