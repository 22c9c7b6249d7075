//! Bytes as an ONNX file: reading it, beside a file of weights that it may name as external data, and importing what it holds.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vit_fuzz::Folder;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    let folder = Folder::new();
    folder.write("weights.bin", &[0x3d; 1 << 16]);
    folder
});

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.write("model.onnx", data);
    if let Ok(graph) = vit_convert::onnx::read(&path)
        && let Ok(imported) = vit_convert::import(&graph)
    {
        assert!(imported.config.validate().is_ok());
    }
});
