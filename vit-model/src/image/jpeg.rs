//! JPEG to RGB with the pixels of libjpeg-turbo, the decoder of Pillow, OpenCV and torchvision.
//!
//! Decoders differ in how they round the inverse cosine transform and how they upsample chroma. libjpeg-turbo's choices are
//! what models were trained with and what their Python code feeds them, so they are the right ones here.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use image::metadata::Orientation as Turn;
use libjpeg_turbo_rs::{DecodeLimits, Decoder, PixelFormat};

use super::tags;
use crate::limits;

/// A JPEG whose headers were read.
pub(super) struct Jpeg<'a> {
    pub width: u32,
    pub height: u32,
    /// Bytes of memory that decoding takes for each pixel, the RGB result included.
    pub bytes_per_pixel: u64,
    /// How the picture has to be turned to be upright, from its EXIF.
    pub orientation: Turn,
    decoder: Decoder<'a>,
}

impl<'a> Jpeg<'a> {
    /// Reads the headers. Junk between them is accepted, because cameras leave it there.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, String> {
        check_end(bytes)?;
        let bounds = DecodeLimits {
            max_pixels: limits::PIXELS,
            max_scans: limits::JPEG_SCANS,
            max_memory: Some(limits::DECODER_BYTES),
            ..DecodeLimits::default()
        };
        let decoder = Decoder::new_with_limits(bytes, bounds).map_err(|e| e.to_string())?;
        let frame = decoder.header();
        // the decoder panics on other samplings of four components, which no encoder is known to write
        let factors: Vec<_> = frame.components.iter().map(|c| [c.horizontal_sampling, c.vertical_sampling]).collect();
        if let [cyan, magenta, yellow, black] = factors.as_slice()
            && !(cyan == black && magenta == yellow && (magenta == cyan || *magenta == [1, 1]))
        {
            return Err(format!(
                "CMYK with components sampled {factors:?} times is not supported, convert the picture to RGB"
            ));
        }
        // a plane for each component beside the result; several scans also need all 16-bit coefficients until the end
        let components = u64::try_from(frame.components.len()).unwrap_or(u64::MAX);
        let planes = components.saturating_mul(if decoder.has_multiple_scans() { 3 } else { 1 });
        Ok(Self {
            width: u32::from(frame.width),
            height: u32::from(frame.height),
            bytes_per_pixel: planes.saturating_add(3),
            orientation: turn(bytes),
            decoder,
        })
    }

    /// Decodes to `[H, W, 3]`. Missing pixels are an error: a lenient decoder fills them with grey and reports success.
    pub(super) fn decode_into(mut self, pixels: &mut [u8]) -> Result<(), String> {
        self.decoder.set_output_format(PixelFormat::Rgb);
        self.decoder.decode_image_into(pixels).map_err(|e| e.to_string())?;
        Ok(())
    }
}

/// Which way up the picture is. Several segments of EXIF are one, of several XMP the last counts, as in Pillow.
fn turn(bytes: &[u8]) -> Turn {
    let (mut exif, mut xmp) = (Vec::new(), None);
    let mut rest = bytes.get(2..).unwrap_or_default();
    // up to the first scan
    while let Some(at) =
        rest.windows(2).position(|w| matches!(w, [0xff, m] if !matches!(m, 0x00 | 0x01 | 0xff | 0xd0..=0xd8)))
        && let Some([marker, hi, lo]) = rest.get(at.saturating_add(1)..).and_then(|rest| rest.first_chunk()).copied()
        && !matches!(marker, 0xd9 | 0xda)
    {
        let start = at.saturating_add(2);
        let end = start.saturating_add(usize::from(u16::from_be_bytes([hi, lo])).max(2));
        let segment = rest.get(start.saturating_add(2)..end).unwrap_or_default();
        if marker == 0xe1 {
            if let Some(more) = segment.strip_prefix(b"Exif\0\0") {
                exif.extend_from_slice(more);
            } else if let Some(text) = segment.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
                xmp = Some(text);
            }
        }
        rest = rest.get(end..).unwrap_or_default();
    }
    tags::turn(Some(&exif), xmp)
}

/// Walks the markers to the end of the image, because the decoder accepts a file that ends earlier if its last rows are
/// complete by chance.
fn check_end(bytes: &[u8]) -> Result<(), String> {
    let cut = || "truncated: the file ends before the end of the image".to_string();
    let mut rest = bytes.get(2..).ok_or_else(cut)?;
    let mut scans = false;
    loop {
        // to the next marker, over entropy-coded data and fill bytes alike
        let at = rest
            .windows(2)
            .position(|w| matches!(w, [0xff, m] if !matches!(m, 0x00 | 0x01 | 0xff | 0xd0..=0xd7)))
            .ok_or_else(cut)?;
        let marker = rest.get(at.saturating_add(1)).copied().ok_or_else(cut)?;
        rest = rest.get(at.saturating_add(2)..).ok_or_else(cut)?;
        match marker {
            0xd8 => {} // a second start: ignored, as libjpeg does
            0xd9 if !scans => return Err("there is no picture in it".into()),
            0xd9 => return Ok(()),
            _ => {
                scans |= marker == 0xda;
                let &[hi, lo, ..] = rest else { return Err(cut()) };
                rest = rest.get(usize::from(u16::from_be_bytes([hi, lo])).max(2)..).ok_or_else(cut)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

    use super::*;

    const CMYK: &[u8] = include_bytes!("../../../tests/fixtures/jpeg/cmyk.jpg");

    #[test]
    fn odd_samplings_of_cmyk_are_refused() {
        assert!(Jpeg::open(CMYK).is_ok());
        let frame = CMYK.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
        for (component, sampling) in [(1, 0x21), (3, 0x21), (2, 0x31), (0, 0x22)] {
            let mut bytes = CMYK.to_vec();
            bytes[frame + 11 + 3 * component] = sampling;
            let why = Jpeg::open(&bytes).err().unwrap();
            assert!(why.contains("convert the picture to RGB"), "{why}");
        }
    }

    #[test]
    fn a_file_that_ends_early_is_refused() {
        let why = Jpeg::open(&CMYK[..CMYK.len() - 2]).err().unwrap();
        assert!(why.contains("truncated"), "{why}");
    }
}
