//! Bytes as a safetensors file of ours: the header, the document in it, names, shapes, and the model that they make.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vit_fuzz::Folder;

static FOLDER: LazyLock<Folder> = LazyLock::new(Folder::new);

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.write("model.safetensors", data);
    if let Ok(checkpoint) = vit_model::checkpoint::open(&path) {
        for name in checkpoint.weights.tensors().keys() {
            let _ = checkpoint.weights.read_f32(name);
        }
    }
});
