//! Pictures whose tags or frames change how their pixels are shown. The expected pixels are Pillow 12's, for files of the same kinds.

use vit_model::image::{Image, ImageOptions, Orientation};

use crate::support::root;

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/fixtures/images").join(name)).unwrap()
}

/// A JPEG without tags.
fn plain() -> Vec<u8> {
    std::fs::read(root().join("tests/fixtures/jpeg/baseline-444-q92.jpg")).unwrap()
}

/// A JPEG with segments after its start.
fn with_segments(segments: &[Vec<u8>]) -> Vec<u8> {
    let jpeg = plain();
    let mut bytes = jpeg[..2].to_vec();
    for segment in segments {
        bytes.extend([0xff, 0xe1]);
        bytes.extend((segment.len() as u16 + 2).to_be_bytes());
        bytes.extend(segment);
    }
    bytes.extend(&jpeg[2..]);
    bytes
}

/// EXIF with entries of tag 274: type, count and the four bytes of the value; big-endian.
fn exif(entries: &[(u16, u32, [u8; 4])]) -> Vec<u8> {
    let mut bytes = b"Exif\0\0MM\0\x2a\0\0\0\x08".to_vec();
    bytes.extend((entries.len() as u16).to_be_bytes());
    for (kind, count, value) in entries {
        bytes.extend(274_u16.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(count.to_be_bytes());
        bytes.extend(value);
    }
    bytes.extend([0; 4]);
    bytes
}

fn xmp(text: &str) -> Vec<u8> {
    [b"http://ns.adobe.com/xap/1.0/\0".as_slice(), text.as_bytes()].concat()
}

#[test]
fn the_orientation_is_what_pillow_finds() {
    const SHORT_6: (u16, u32, [u8; 4]) = (3, 1, [0, 6, 0, 0]);
    let stored = Image::decode(&plain()).unwrap();
    let turned = Image::decode(&with_segments(&[exif(&[SHORT_6])])).unwrap();
    assert_eq!((turned.width(), turned.height()), (stored.height(), stored.width()));
    let [w, h] = [stored.width() as usize, stored.height() as usize];
    // 6: the first column, from below, is the first row
    assert_eq!(turned.pixels()[..3], stored.pixels()[3 * w * (h - 1)..][..3]);
    let six = |segments: &[Vec<u8>]| {
        let bytes = with_segments(segments);
        let plain = Image::decode_with(&bytes, &ImageOptions::new().orientation(Orientation::Stored)).unwrap();
        assert_eq!(plain, stored);
        let found = Image::decode(&bytes).unwrap();
        assert!(found == turned || found == stored);
        found == turned
    };
    let attribute = "<x tiff:Orientation=\"6\"/>";
    for (segments, expected) in [
        (vec![exif(&[(4, 1, [0, 0, 0, 6])])], true),
        (vec![exif(&[(3, 1, [0, 3, 0, 0]), SHORT_6])], true),
        (vec![exif(&[SHORT_6]), exif(&[(3, 1, [0, 3, 0, 0])])], true),
        (vec![exif(&[(3, 1, [0, 9, 0, 0])])], false),
        (vec![exif(&[(4, 1, [1, 0, 0, 6])])], false),
        (vec![exif(&[(3, 2, [0, 6, 0, 6])])], false),
        (vec![xmp(attribute)], true),
        (vec![xmp("<tiff:Orientation>6</tiff:Orientation>")], true),
        (vec![xmp("<tiff:Orientation/>")], false),
        (vec![exif(&[]), xmp(attribute)], true),
        // EXIF says it, so XMP is not asked
        (vec![exif(&[(3, 1, [0, 1, 0, 0])]), xmp(attribute)], false),
        (vec![b"Exif\0\0nonsense".to_vec(), xmp(attribute)], true),
    ] {
        assert_eq!(six(&segments), expected, "{segments:?}");
    }
}

#[test]
fn a_gif_frame_is_put_on_its_screen() {
    let gif = fixture("palette.gif");
    let frame = Image::decode(&gif).unwrap();
    let [w, h] = [frame.width() as usize, frame.height() as usize];
    let at = gif.windows(10).position(|b| {
        b[0] == 0x2c && b[1..5] == [0; 4] && b[5..7] == (w as u16).to_le_bytes() && b[7..9] == (h as u16).to_le_bytes()
    });
    let at = at.unwrap();
    assert_eq!(gif[10] & 0x80, 0x80, "the fixture has a global palette");
    let first: [u8; 3] = gif[13..16].try_into().unwrap();
    for ([screen_w, screen_h], [left, top]) in
        [([w + 7, h + 5], [3, 4]), ([w, h + 2], [0, 0]), ([w, h], [2, 0]), ([1, 1], [0, 0])]
    {
        let mut bytes = gif.clone();
        bytes[6..8].copy_from_slice(&(screen_w as u16).to_le_bytes());
        bytes[8..10].copy_from_slice(&(screen_h as u16).to_le_bytes());
        bytes[at + 1..at + 3].copy_from_slice(&(left as u16).to_le_bytes());
        bytes[at + 3..at + 5].copy_from_slice(&(top as u16).to_le_bytes());
        let found = Image::decode(&bytes).unwrap();
        // a frame beyond the screen enlarges it
        let [width, height] = [screen_w.max(left + w), screen_h.max(top + h)];
        assert_eq!([found.width() as usize, found.height() as usize], [width, height]);
        for y in 0..height {
            for x in 0..width {
                let inside = (left..left + w).contains(&x) && (top..top + h).contains(&y);
                let pixel = &found.pixels()[3 * (y * width + x)..][..3];
                let wanted =
                    if inside { &frame.pixels()[3 * ((y - top) * w + x - left)..][..3] } else { first.as_slice() };
                assert_eq!(pixel, wanted, "{x}, {y} of {screen_w}×{screen_h}");
            }
        }
        assert!(Image::decode(&bytes[..bytes.len() * 2 / 3]).is_err());
    }
}

/// A TIFF of one row, RGBA, with a value of `ExtraSamples`.
fn tiff(pixels: &[u8], extra: u16) -> Vec<u8> {
    let entries: [(u16, u16, u32, u32); 10] = [
        (256, 3, 1, pixels.len() as u32 / 4),
        (257, 3, 1, 1),
        (258, 3, 4, 134), // four times 8 bits, behind the directory
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 142),
        (277, 3, 1, 4),
        (278, 3, 1, 1),
        (279, 4, 1, pixels.len() as u32),
        (338, 3, 1, extra.into()),
    ];
    let mut bytes = b"II\x2a\0\x08\0\0\0".to_vec();
    bytes.extend((entries.len() as u16).to_le_bytes());
    for (tag, kind, count, value) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend([0; 4]);
    bytes.extend([8, 0, 8, 0, 8, 0, 8, 0]);
    assert_eq!(bytes.len(), 142);
    bytes.extend(pixels);
    bytes
}

#[test]
fn colours_that_are_multiplied_by_alpha_are_divided_by_it() {
    let pixels = [10, 20, 30, 40, 0, 0, 0, 0, 100, 50, 25, 255, 90, 10, 5, 60, 7, 7, 7, 0];
    let plain = Image::decode(&tiff(&pixels, 2)).unwrap();
    assert_eq!(plain.pixels(), [10, 20, 30, 0, 0, 0, 100, 50, 25, 90, 10, 5, 7, 7, 7]);
    let associated = Image::decode(&tiff(&pixels, 1)).unwrap();
    // 255 · c / alpha, rounded down, at most 255
    assert_eq!(associated.pixels(), [63, 127, 191, 0, 0, 0, 100, 50, 25, 255, 42, 21, 0, 0, 0]);
    assert_eq!(associated.alpha(), plain.alpha());
}

/// The one exception to Pillow's pixels, see SECURITY.md.
#[test]
fn sixteen_bits_whose_zero_is_white_are_inverted() {
    let samples: [u16; 4] = [0, 0x1234, 0xfe00, 0xffff];
    for (zero_is_white, wanted) in [(true, [255, 0xed, 1, 0]), (false, [0, 0x12, 0xfe, 255])] {
        let entries: [(u16, u16, u32); 9] = [
            (256, 3, 4),
            (257, 3, 1),
            (258, 3, 16),
            (259, 3, 1),
            (262, 3, u32::from(!zero_is_white)),
            (273, 4, 122),
            (277, 3, 1),
            (278, 3, 1),
            (279, 4, 8),
        ];
        let mut bytes = b"II\x2a\0\x08\0\0\0".to_vec();
        bytes.extend((entries.len() as u16).to_le_bytes());
        for (tag, kind, value) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(1_u32.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([0; 4]);
        assert_eq!(bytes.len(), 122);
        bytes.extend(samples.iter().flat_map(|sample| sample.to_le_bytes()));
        let found = Image::decode(&bytes).unwrap();
        assert_eq!(found.pixels(), wanted.map(|v| [v; 3]).as_flattened());
    }
}
