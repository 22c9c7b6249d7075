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
    let options = vit_convert::Options::new().verify(vit_convert::Verify::Skip);
    if let Ok(converted) = vit_convert::convert(&path, &options) {
        assert!(converted.info().model.validate().is_ok());
    }
});
