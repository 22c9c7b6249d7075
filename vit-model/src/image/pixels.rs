//! Images from pixels that a program already has.

use image::{ColorType, DynamicImage};

use super::decode::{Image, alpha_of, to_rgb8};
use crate::{Error, Result};

impl Image {
    /// An image from raw 8-bit pixels `[H, W, C]`, row-major. One channel is grey, three are RGB; of four the last is alpha.
    ///
    /// # Errors
    /// [`Error::Image`] for another number of channels or of bytes, or too many pixels.
    pub fn from_pixels([height, width, channels]: [usize; 3], pixels: &[u8]) -> Result<Self> {
        let expected = height.checked_mul(width).and_then(|n| n.checked_mul(channels));
        if !matches!(channels, 1 | 3 | 4) || expected != Some(pixels.len()) {
            return Err(Error::image(format!(
                "{} bytes are not [{height}, {width}, {channels}] pixels of grey, RGB or RGBA",
                pixels.len()
            )));
        }
        let rgb = match channels {
            3 => pixels.to_vec(),
            1 => pixels.iter().flat_map(|&v| [v; 3]).collect(),
            _ => pixels.chunks_exact(4).filter_map(|p| p.first_chunk::<3>()).flatten().copied().collect(),
        };
        let alpha = if channels == 4 { alpha_of(pixels, ColorType::Rgba8) } else { None };
        Ok(Self::from_rgb8(side(width)?, side(height)?, rgb)?.with_alpha(alpha))
    }

    /// Images from a batch of raw 8-bit pixels `[B, C, H, W]`, row-major, with the channels of
    /// [`from_pixels`](Self::from_pixels).
    ///
    /// # Errors
    /// As [`from_pixels`](Self::from_pixels).
    pub fn from_batch([batch, channels, height, width]: [usize; 4], pixels: &[u8]) -> Result<Vec<Self>> {
        let plane = height.checked_mul(width).filter(|&plane| plane > 0);
        let image = plane.and_then(|plane| plane.checked_mul(channels)).filter(|&image| image > 0);
        let (Some(plane), Some(image)) = (plane, image) else {
            return Err(Error::image(format!("[{batch}, {channels}, {height}, {width}] has no pixels, or too many")));
        };
        if image.checked_mul(batch) != Some(pixels.len()) {
            let found = pixels.len();
            return Err(Error::image(format!("{found} bytes are not [{batch}, {channels}, {height}, {width}] pixels")));
        }
        let interleaved = |image: &[u8]| -> Vec<u8> {
            (0..plane).flat_map(|at| image.iter().skip(at).step_by(plane).copied()).collect()
        };
        pixels
            .chunks_exact(image)
            .map(|image| Self::from_pixels([height, width, channels], &interleaved(image)))
            .collect()
    }

    /// An image from one of the crate `image` (`vit_model::image_crate`), with the conversion to 8-bit RGB that a file of
    /// the same samples gets.
    ///
    /// # Errors
    /// [`Error::Image`] if it has no pixels or too many.
    pub fn from_dynamic(image: &DynamicImage) -> Result<Self> {
        let (width, height) = (image.width(), image.height());
        let rgb = match image {
            DynamicImage::ImageRgb8(image) => image.as_raw().clone(),
            // samples of floats have no file format among ours; the crate's own conversion rounds them
            DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_) => image.to_rgb8().into_raw(),
            _ => {
                let mut pixels = image.as_bytes().to_vec();
                // grey becomes wider as it becomes RGB, in place
                let pixels_len = pixels.len().max((image.width() as usize) * (image.height() as usize) * 3);
                pixels.resize(pixels_len, 0);
                to_rgb8(&mut pixels, width, height, image.color()).map_err(Error::image)?;
                pixels
            }
        };
        let alpha = match image {
            DynamicImage::ImageRgba32F(_) => alpha_of(image.to_rgba8().as_raw(), ColorType::Rgba8),
            _ => alpha_of(image.as_bytes(), image.color()),
        };
        Ok(Self::from_rgb8(width, height, rgb)?.with_alpha(alpha))
    }
}

fn side(pixels: usize) -> Result<u32> {
    u32::try_from(pixels).map_err(|_| Error::image(format!("a side of {pixels} pixels is too long")))
}

#[cfg(test)]
mod tests {
    use image::{DynamicImage, RgbImage};

    use super::Image;

    fn checkered(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8 * 16, y as u8 * 16, (x ^ y) as u8 * 16]))
    }

    #[test]
    fn pixels_in_any_layout_are_the_same_image() {
        let rgb = checkered(7, 5);
        let want = Image::from_rgb8(7, 5, rgb.as_raw().clone()).unwrap();
        assert_eq!(Image::from_pixels([5, 7, 3], rgb.as_raw()).unwrap(), want);
        let rgba = DynamicImage::ImageRgb8(rgb.clone()).to_rgba8();
        assert_eq!(Image::from_pixels([5, 7, 4], rgba.as_raw()).unwrap(), want);
        let planes: Vec<u8> = (0..3).flat_map(|c| rgb.pixels().map(move |p| p.0[c])).collect();
        assert_eq!(Image::from_batch([2, 3, 5, 7], &planes.repeat(2)).unwrap(), [want.clone(), want]);
        for (shape, len) in [([5, 7, 2], 70), ([5, 7, 3], 104), ([0, 7, 3], 0), ([usize::MAX, 2, 3], 6)] {
            assert!(Image::from_pixels(shape, &vec![0; len]).is_err(), "{shape:?}");
        }
        assert!(Image::from_batch([1, 3, 0, 7], &[]).is_err() && Image::from_batch([2, 3, 5, 7], &planes).is_err());
    }

    #[test]
    fn every_kind_of_sample_becomes_what_its_file_would() {
        let rgb = DynamicImage::ImageRgb8(checkered(6, 4));
        for image in [
            rgb.clone(),
            rgb.to_rgba8().into(),
            rgb.to_luma8().into(),
            rgb.to_luma_alpha8().into(),
            rgb.to_rgb16().into(),
            rgb.to_rgba16().into(),
            rgb.to_luma16().into(),
            rgb.to_luma_alpha16().into(),
        ] {
            let mut png = std::io::Cursor::new(Vec::new());
            image.write_to(&mut png, image::ImageFormat::Png).unwrap();
            assert_eq!(
                Image::from_dynamic(&image).unwrap(),
                Image::decode(png.get_ref()).unwrap(),
                "{:?}",
                image.color()
            );
        }
    }
}
