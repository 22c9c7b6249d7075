//! Bytes as a picture: decoding, orientation, and every way of preprocessing it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vit_model::{CropMode, Interpolation, PreprocessConfig, image::{Image, Preprocess}};

fuzz_target!(|data: &[u8]| {
    let Ok(image) = Image::decode(data) else { return };
    for (interpolation, crop_mode) in [
        (Interpolation::Bilinear, CropMode::Center),
        (Interpolation::Bicubic, CropMode::Squash),
        (Interpolation::Lanczos, CropMode::Border),
    ] {
        let mut config = PreprocessConfig::new([3, 24, 32]);
        (config.interpolation, config.crop_mode) = (interpolation, crop_mode);
        let Ok(preprocess) = Preprocess::new(&config) else { panic!("a good configuration is refused") };
        if let Ok(pixels) = preprocess.apply(&image) {
            assert!(pixels.len() == 3 * 24 * 32 && pixels.iter().all(|v| v.is_finite()));
        }
    }
});
