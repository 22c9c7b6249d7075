//! Bytes as a checkpoint of PyTorch's beside a configuration: the archive or the old format, the pickle, names, shapes, and views.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vit_fuzz::Folder;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    let folder = Folder::named("pickle");
    folder.write("config.json", include_bytes!("../../tests/fixtures/containers/plain/config.json"));
    folder
});

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.write("model.pth", data);
    if let Ok(checkpoint) = vit_model::checkpoint::open(&path) {
        for name in checkpoint.weights.tensors().keys() {
            let _ = checkpoint.weights.read_f32(name);
        }
    }
});
