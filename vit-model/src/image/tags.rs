//! What the tags of a picture say about its pixels: which way up it is, as Pillow's `exif_transpose` finds it, and whether a
//! TIFF's colours are multiplied by alpha.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::io::{Cursor, Read, Seek, SeekFrom};

use image::metadata::Orientation as Turn;

/// Bytes of XMP that are searched.
const XMP_BYTES: u64 = 1 << 20;

/// Tags of the first directory of a TIFF file, or of EXIF, which is one.
#[derive(Debug, Default)]
pub(super) struct Tags {
    /// The last entry counts if there are several. A value that is no orientation turns nothing.
    orientation: Option<Turn>,
    xmp: Vec<u8>,
    /// Colours are multiplied by alpha.
    pub associated: bool,
}

impl Tags {
    /// Reads the directory; `None` if there is none, or if it has 64-bit offsets.
    pub(super) fn read(input: &mut (impl Read + Seek + ?Sized)) -> Option<Self> {
        let big = match bytes::<4>(input, 0)? {
            [b'I', b'I', 42, 0] => false,
            [b'M', b'M', 0, 42] => true,
            _ => return None,
        };
        let two = |b: [u8; 2]| if big { u16::from_be_bytes(b) } else { u16::from_le_bytes(b) };
        let four = |b: [u8; 4]| if big { u32::from_be_bytes(b) } else { u32::from_le_bytes(b) };
        let start = u64::from(four(bytes(input, 4)?));
        let count = two(bytes(input, start)?);
        let mut tags = Self::default();
        for index in 0..u64::from(count) {
            let at = start.checked_add(2)?.checked_add(index.checked_mul(12)?)?;
            let Some([t0, t1, k0, k1, c0, c1, c2, c3, v0, v1, v2, v3]) = bytes(input, at) else { break };
            let (tag, kind, count) = (two([t0, t1]), two([k0, k1]), four([c0, c1, c2, c3]));
            let (short, long) = (two([v0, v1]), four([v0, v1, v2, v3]));
            match tag {
                274 => {
                    let value = match (kind, count) {
                        (3 | 8, 1) => u8::try_from(short).ok(),
                        (4 | 9, 1) => u8::try_from(long).ok(),
                        (6, 1) => Some(v0),
                        _ => None,
                    };
                    tags.orientation = Some(value.and_then(Turn::from_exif).unwrap_or(Turn::NoTransforms));
                }
                338 if kind == 3 => {
                    let first = if count <= 2 { Some(short) } else { bytes(input, u64::from(long)).map(two) };
                    tags.associated = first == Some(1);
                }
                700 if count > 4 => {
                    let most = u64::from(count).min(XMP_BYTES);
                    if input.seek(SeekFrom::Start(long.into())).is_ok() {
                        tags.xmp.clear();
                        let _ = input.take(most).read_to_end(&mut tags.xmp);
                    }
                }
                _ => {}
            }
        }
        Some(tags)
    }

    /// Which way up a picture with these tags is.
    pub(super) fn turn(&self) -> Turn {
        self.orientation.or_else(|| of_xmp(&self.xmp)).unwrap_or(Turn::NoTransforms)
    }
}

/// Which way up a picture is: its EXIF decides, and XMP if EXIF does not mention it.
pub(super) fn turn(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Turn {
    let mut exif = exif.unwrap_or_default();
    while let Some(rest) = exif.strip_prefix(b"Exif\0\0") {
        exif = rest;
    }
    let tags = Tags::read(&mut Cursor::new(exif)).unwrap_or_default();
    Tags { xmp: xmp.unwrap_or_default().into(), ..tags }.turn()
}

/// The first `tiff:Orientation` of XMP, as an attribute or an element.
fn of_xmp(xmp: &[u8]) -> Option<Turn> {
    const NAME: &[u8] = b"tiff:Orientation";
    let digit = xmp.windows(NAME.len()).enumerate().filter(|(_, window)| *window == NAME).find_map(|(at, _)| {
        let rest = xmp.get(at.saturating_add(NAME.len())..)?;
        let rest = rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?;
        rest.first().filter(|digit| digit.is_ascii_digit())
    });
    digit.and_then(|digit| Turn::from_exif(digit.wrapping_sub(b'0')))
}

/// So many bytes from a place.
fn bytes<const N: usize>(input: &mut (impl Read + Seek + ?Sized), at: u64) -> Option<[u8; N]> {
    let mut out = [0; N];
    input.seek(SeekFrom::Start(at)).ok()?;
    input.read_exact(&mut out).ok()?;
    Some(out)
}

/// Divides colours by alpha in place, as Pillow does when it reads such a file: `[H, W, 3]` and `[H, W]`.
pub(super) fn unmultiply(rgb: &mut [u8], alpha: &[u8]) {
    for (pixel, &alpha) in rgb.chunks_exact_mut(3).zip(alpha) {
        for value in pixel {
            // alpha is a byte, so nothing overflows, and what is brighter than its alpha becomes white
            *value = match alpha {
                0 => 0,
                _ => u8::try_from(u32::from(*value).wrapping_mul(255).checked_div(alpha.into()).unwrap_or(0))
                    .unwrap_or(255),
            };
        }
    }
}
