//! Bytes as a picture: decoding, orientation, and every way of preprocessing it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vit_model::{PreprocessConfig, image::Image, preprocess::Preprocess};

fuzz_target!(|data: &[u8]| {
    let Ok(image) = Image::decode(data, true) else { return };
    for (interpolation, crop_mode) in [("bilinear", "center"), ("bicubic", "squash"), ("lanczos", "border")] {
        let config = PreprocessConfig {
            input_size: [3, 24, 32],
            interpolation: interpolation.into(),
            crop_pct: 0.9,
            crop_mode: crop_mode.into(),
            mean: vec![0.5; 3],
            std: vec![0.5; 3],
            resize: None,
            torchvision: false,
            white_key: false,
        };
        let Ok(preprocess) = Preprocess::new(&config) else { panic!("a good configuration is refused") };
        if let Ok(pixels) = preprocess.apply(&image) {
            assert!(pixels.len() == 3 * 24 * 32 && pixels.iter().all(|v| v.is_finite()));
        }
    }
});
