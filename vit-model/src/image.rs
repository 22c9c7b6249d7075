//! Decoding a picture to 8-bit RGB: by content, within stated limits, truncated files refused.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use image::metadata::Orientation;
use image::{ColorType, ImageDecoder, ImageFormat, ImageReader, Limits};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::{Error, Result, limits};

/// A picture whose decoding takes more than this waits for its turn, so that many threads need the memory of one.
const LARGE_BYTES: u64 = 64 << 20;
static LARGE: Mutex<()> = Mutex::new(());

/// An 8-bit RGB picture, rows top to bottom.
///
/// Whatever the file holds becomes RGB as Pillow's `convert("RGB")` does it: palettes are looked up, alpha is dropped
/// without blending, grey is repeated. 16-bit samples keep their high byte. Animations give their first frame. Colour
/// profiles and gamma are not applied (nor does Pillow).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    width: u32,
    height: u32,
    pixels: Vec<u8>, // [H, W, 3]
    transparent: Option<[u8; 3]>,
}

impl Image {
    /// Decodes a file by its content, whatever its name. `exif` turns the picture upright as its EXIF says.
    pub fn open(path: &Path, exif: bool) -> Result<Self> {
        // looked at before it is opened: opening a FIFO would wait for a writer
        let meta = std::fs::metadata(path).map_err(Error::io(path))?;
        let refuse = |why: &str| Err(Error::file(path, why));
        if meta.is_dir() {
            return refuse("is a folder, not an image");
        }
        if !meta.is_file() {
            return refuse("is not a regular file");
        }
        if meta.len() == 0 {
            return refuse("empty file");
        }
        let file = File::open(path).map_err(Error::io(path))?;
        decode(BufReader::new(file), meta.len(), exif).map_err(|why| Error::file(path, why))
    }

    /// Decodes a file that is in memory.
    pub fn decode(bytes: &[u8], exif: bool) -> Result<Self> {
        if bytes.is_empty() {
            return Err(Error::Image("empty file".into()));
        }
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        decode(Cursor::new(bytes), len, exif).map_err(Error::Image)
    }

    /// A picture from its pixels, `[H, W, 3]`.
    pub fn from_rgb8(width: u32, height: u32, pixels: Vec<u8>) -> Result<Self> {
        let samples = check_size(width, height).and_then(|n| usize::try_from(n.saturating_mul(3)).ok());
        if samples != Some(pixels.len()) {
            return Err(Error::Image(format!("{} bytes are not {width}×{height} pixels of RGB", pixels.len())));
        }
        Ok(Self { width, height, pixels, transparent: None })
    }

    /// Columns.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The samples, `[H, W, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The one colour that a PNG or GIF without an alpha channel declares as transparent.
    pub fn transparent(&self) -> Option<[u8; 3]> {
        self.transparent
    }

    /// The luma of every pixel, `[H, W]`, as Pillow's `convert("L")` (ITU-R 601) computes it.
    pub fn to_luma(&self) -> Vec<u8> {
        self.pixels.chunks_exact(3).map(|p| if let &[r, g, b] = p { luma(r, g, b) } else { 0 }).collect()
    }
}

/// `(0.299 r + 0.587 g + 0.114 b)` in 16-bit fixed point, rounded; the three factors add up to 65536.
fn luma(r: u8, g: u8, b: u8) -> u8 {
    let [r, g, b] = [r, g, b].map(u32::from);
    let sum = r.wrapping_mul(19595).wrapping_add(g.wrapping_mul(38470)).wrapping_add(b.wrapping_mul(7471));
    let [_, luma, _, _] = sum.wrapping_add(0x8000).to_be_bytes();
    luma
}

/// The pixels of a picture of this size, unless there are none or too many.
fn check_size(width: u32, height: u32) -> Option<u64> {
    let pixels = u64::from(width).saturating_mul(u64::from(height));
    (1..=limits::PIXELS).contains(&pixels).then_some(pixels)
}

/// As `check_size`, with the words for the user; and a check of the memory at `bytes_per_pixel`.
fn budget(width: u32, height: u32, bytes_per_pixel: u64) -> Result<u64, String> {
    let Some(pixels) = check_size(width, height) else {
        if width == 0 || height == 0 {
            return Err(format!("the picture is {width}×{height} pixels: nothing to see"));
        }
        return Err(format!(
            "{width}×{height} pixels are too many: at most {} million are decoded",
            limits::PIXELS / 1_000_000
        ));
    };
    let bytes = pixels.saturating_mul(bytes_per_pixel);
    if bytes > limits::DECODER_BYTES {
        return Err(format!(
            "decoding {width}×{height} pixels of this kind would take {} MB, at most {} MB are used",
            bytes / 1_000_000,
            limits::DECODER_BYTES / 1_000_000
        ));
    }
    Ok(bytes)
}

fn decode<R: BufRead + Seek>(mut input: R, len: u64, exif: bool) -> Result<Image, String> {
    let head = input.fill_buf().map_err(|e| e.to_string())?;
    if head.starts_with(&[0xff, 0xd8, 0xff]) {
        if len > limits::JPEG_FILE_BYTES {
            return Err(format!("a JPEG of {} MB, at most {} MB are read", len >> 20, limits::JPEG_FILE_BYTES >> 20));
        }
        let mut bytes = Vec::new();
        input.take(limits::JPEG_FILE_BYTES).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        return decode_jpeg(&bytes, exif).map_err(|why| format!("JPEG: {why}"));
    }
    let unknown = not_an_image(head);
    let key = if head.starts_with(&PNG) { png_key(&mut input) } else { None };
    input.rewind().map_err(|e| e.to_string())?;
    let reader = ImageReader::new(input).with_guessed_format().map_err(|e| e.to_string())?;
    let Some(format) = reader.format() else { return Err(unknown) };
    decode_other(reader, format, key, exif)
        .map_err(|why| format!("{}: {why}", format.extensions_str().first().unwrap_or(&"image").to_uppercase()))
}

const PNG: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// The one transparent colour of a PNG: of a palette's single clear entry, or of 8-bit grey or RGB.
fn png_key<R: BufRead + Seek>(input: &mut R) -> Option<[u8; 3]> {
    let mut palette = Vec::new();
    let (mut depth, mut kind) = (0, 0);
    input.seek_relative(8).ok()?;
    loop {
        let mut head = [0; 8];
        input.read_exact(&mut head).ok()?;
        let [a, b, c, d, name @ ..] = head;
        let len = u32::from_be_bytes([a, b, c, d]);
        let mut body = Vec::new();
        match &name {
            b"IDAT" | b"IEND" => return None,
            b"IHDR" | b"PLTE" | b"tRNS" if len <= 768 => {
                input.by_ref().take(len.into()).read_to_end(&mut body).ok()?;
            }
            _ => input.seek_relative(len.into()).ok()?,
        }
        input.seek_relative(4).ok()?; // the checksum
        match (&name, body.as_slice()) {
            (b"IHDR", [_, _, _, _, _, _, _, _, bits, colour, ..]) => (depth, kind) = (*bits, *colour),
            (b"PLTE", _) => palette = body,
            (b"tRNS", alpha) => {
                return match (kind, depth, alpha) {
                    (3, _, _) => {
                        let clear = alpha.iter().position(|a| *a == 0)?;
                        let others_opaque = alpha.iter().enumerate().all(|(i, a)| i == clear || *a == 255);
                        let mut colours = palette.chunks_exact(3);
                        colours.nth(clear).filter(|_| others_opaque)?.try_into().ok()
                    }
                    (0, 8, [_, v]) => Some([*v; 3]),
                    (2, 8, [_, r, _, g, _, b]) => Some([*r, *g, *b]),
                    _ => None,
                };
            }
            _ => {}
        }
    }
}

/// What a file that is no image looks like.
fn not_an_image(head: &[u8]) -> String {
    let start = head.trim_ascii_start();
    let looks = if start.first() == Some(&b'<') {
        "it looks like HTML or XML, perhaps the page of a failed download"
    } else if !head.is_empty() && head.iter().take(64).all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace()) {
        "it looks like text"
    } else {
        "its first bytes belong to no known format"
    };
    format!("not a PNG, JPEG, WebP, GIF, BMP, TIFF or PNM image: {looks}")
}

fn decode_jpeg(bytes: &[u8], exif: bool) -> Result<Image, String> {
    let layout = jpeg_layout(bytes)?;
    // headers are read leniently (cameras leave junk between them), the pixels are not: a lenient decoder fills what is
    // missing with grey and calls it a success
    let lenient = DecoderOptions::default().set_strict_mode(false).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), lenient);
    decoder.decode_headers().map_err(|e| e.to_string())?;
    let info = decoder.info().ok_or("no frame header")?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    let grey = info.components == 1;
    // a progressive or non-interleaved file keeps all its 16-bit coefficients until the end
    let buffered = layout.progressive || layout.first_scan < info.components;
    let per_pixel = if buffered { u64::from(info.components).saturating_mul(2).saturating_add(3) } else { 3 };
    let bytes_needed = budget(width, height, per_pixel)?;
    let _turn = turn(bytes_needed);

    let out = if grey { ColorSpace::Luma } else { ColorSpace::RGB };
    decoder.set_options(lenient.set_strict_mode(true).jpeg_set_out_colorspace(out));
    let samples = decoder.output_buffer_size().ok_or("no size")?;
    let mut pixels = buffer(width, height, samples)?;
    decoder.decode_into(pixels.get_mut(..samples).unwrap_or_default()).map_err(|e| e.to_string())?;
    let orientation = decoder.exif().and_then(|chunk| Orientation::from_exif_chunk(chunk));
    to_rgb8(&mut pixels, width, height, if grey { ColorType::L8 } else { ColorType::Rgb8 })?;
    let image = Image { width, height, pixels, transparent: None };
    if exif { orient(image, orientation.unwrap_or(Orientation::NoTransforms)) } else { Ok(image) }
}

/// What the markers of a JPEG say.
struct JpegLayout {
    progressive: bool,
    /// Components in the first scan.
    first_scan: u8,
}

/// Walks the markers to the end of the image, and refuses a file that stops before.
fn jpeg_layout(bytes: &[u8]) -> Result<JpegLayout, String> {
    let cut = || "truncated: the file ends before the end of the image".to_string();
    let mut rest = bytes.get(2..).ok_or_else(cut)?;
    let mut layout = JpegLayout { progressive: false, first_scan: 0 };
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
            0xd9 if layout.first_scan == 0 => return Err("there is no picture in it".into()),
            0xd9 => return Ok(layout),
            _ => {
                let &[hi, lo, first, ..] = rest else { return Err(cut()) };
                match marker {
                    0xc2 | 0xc6 | 0xca | 0xce => layout.progressive = true,
                    0xda if layout.first_scan == 0 => layout.first_scan = first,
                    _ => {}
                }
                rest = rest.get(usize::from(u16::from_be_bytes([hi, lo])).max(2)..).ok_or_else(cut)?;
            }
        }
    }
}

fn decode_other<R: BufRead + Seek>(
    mut reader: ImageReader<R>,
    format: ImageFormat,
    key: Option<[u8; 3]>,
    exif: bool,
) -> Result<Image, String> {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(limits::DECODER_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(describe)?;
    let (width, height) = decoder.dimensions();
    let kind = decoder.color_type();
    // these keep a second buffer of their own
    let copies: u64 = if matches!(format, ImageFormat::WebP | ImageFormat::Gif | ImageFormat::Tiff) { 2 } else { 1 };
    let per_pixel = u64::from(kind.bytes_per_pixel()).saturating_mul(copies).max(3);
    let bytes_needed = budget(width, height, per_pixel)?;
    let _turn = turn(bytes_needed);

    let samples = usize::try_from(decoder.total_bytes()).map_err(|e| e.to_string())?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut pixels = buffer(width, height, samples)?;
    decoder.read_image(pixels.get_mut(..samples).unwrap_or_default()).map_err(describe)?;
    // a GIF has one transparent colour at most, and its pixels are those with no alpha
    let clear = |p: &[u8]| if let &[r, g, b, 0] = p { Some([r, g, b]) } else { None };
    let transparent = match format {
        ImageFormat::Gif => pixels.chunks_exact(4).find_map(clear),
        _ => key,
    };
    to_rgb8(&mut pixels, width, height, kind)?;
    let image = Image { width, height, pixels, transparent };
    if exif { orient(image, orientation) } else { Ok(image) }
}

/// Holds the turn of a large picture.
fn turn(bytes: u64) -> Option<std::sync::MutexGuard<'static, ()>> {
    (bytes > LARGE_BYTES).then(|| LARGE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Zeros for the decoder's samples, and for as much RGB.
fn buffer(width: u32, height: u32, samples: usize) -> Result<Vec<u8>, String> {
    let rgb = u64::from(width).saturating_mul(u64::from(height)).saturating_mul(3);
    let len = usize::try_from(rgb).map_err(|e| e.to_string())?.max(samples);
    Ok(vec![0; len])
}

/// The message of an error of `image`, in one line, with a truncated file called so.
fn describe(error: image::ImageError) -> String {
    let text = match error {
        image::ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            return "truncated: the file ends before the end of the image".into();
        }
        image::ImageError::Decoding(e) => match std::error::Error::source(&e) {
            Some(source) => source.to_string(),
            None => e.to_string(),
        },
        other => other.to_string(),
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.to_lowercase().contains("unexpected end of file") || line.contains("failed to fill whole buffer") {
        return format!("truncated: {line}");
    }
    line
}

/// Turns samples of a kind into RGB where they lie, so that no second picture stands in memory.
fn to_rgb8(pixels: &mut Vec<u8>, width: u32, height: u32, kind: ColorType) -> Result<(), String> {
    let count = u64::from(width).saturating_mul(u64::from(height));
    let count = usize::try_from(count).map_err(|e| e.to_string())?;
    // the byte of a 16-bit sample that is kept
    let high: usize = usize::from(cfg!(target_endian = "little"));
    match kind {
        ColorType::Rgb8 => {}
        ColorType::L8 => spread(pixels, count, 1, 0),
        ColorType::La8 => spread(pixels, count, 2, 0),
        ColorType::L16 => spread(pixels, count, 2, high),
        ColorType::La16 => gather(pixels, count, 4, [high, high, high]),
        ColorType::Rgba8 => gather(pixels, count, 4, [0, 1, 2]),
        ColorType::Rgb16 => gather(pixels, count, 6, [high, high.saturating_add(2), high.saturating_add(4)]),
        ColorType::Rgba16 => gather(pixels, count, 8, [high, high.saturating_add(2), high.saturating_add(4)]),
        other => return Err(format!("samples of the kind {other:?} are not supported, convert the picture to 8 bits")),
    }
    let samples = count.saturating_mul(3);
    if pixels.len() < samples {
        return Err(format!("{} bytes decoded, expected {samples}", pixels.len()));
    }
    pixels.truncate(samples);
    Ok(())
}

/// Repeats one byte of every pixel of `stride` ≤ 3 bytes: from the last pixel on, as the room grows.
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // indices below `count · 3`, the length of a slice
fn spread(pixels: &mut [u8], count: usize, stride: usize, at: usize) {
    for i in (0..count.min(pixels.len() / 3)).rev() {
        let value = pixels[i * stride + at];
        pixels[3 * i..3 * i + 3].fill(value);
    }
}

/// Keeps three bytes of every pixel of `stride` ≥ 4 bytes: from the first pixel on, as the room shrinks.
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // indices below `count · stride`, the length of a slice
fn gather(pixels: &mut [u8], count: usize, stride: usize, at: [usize; 3]) {
    for i in 0..count.min(pixels.len() / stride) {
        let rgb = at.map(|a| pixels[i * stride + a]);
        pixels[3 * i..3 * i + 3].copy_from_slice(&rgb);
    }
}

/// Turns a picture upright.
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // inside a picture whose size is checked
fn orient(mut image: Image, orientation: Orientation) -> Result<Image, String> {
    let to_usize = |n: u32| usize::try_from(n).map_err(|e| e.to_string());
    let (w, h) = (to_usize(image.width)?, to_usize(image.height)?);
    let row = w * 3;
    let swap_columns = |pixels: &mut [u8]| {
        for line in pixels.chunks_exact_mut(row) {
            for x in 0..w / 2 {
                for c in 0..3 {
                    line.swap(3 * x + c, 3 * (w - 1 - x) + c);
                }
            }
        }
    };
    let swap_rows = |pixels: &mut [u8]| {
        for y in 0..h / 2 {
            let (top, bottom) = pixels.split_at_mut((h - 1 - y) * row);
            top[y * row..][..row].swap_with_slice(&mut bottom[..row]);
        }
    };
    match orientation {
        Orientation::NoTransforms => return Ok(image),
        Orientation::FlipHorizontal => swap_columns(&mut image.pixels),
        Orientation::FlipVertical => swap_rows(&mut image.pixels),
        Orientation::Rotate180 => {
            swap_columns(&mut image.pixels);
            swap_rows(&mut image.pixels);
        }
        Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH => {
            budget(image.width, image.height, 6)?;
            // column x of the upright picture is row x of the file, or row h−1−x; from its start or from its end
            let from_bottom = matches!(orientation, Orientation::Rotate90 | Orientation::Rotate270FlipH);
            let from_right = matches!(orientation, Orientation::Rotate270 | Orientation::Rotate270FlipH);
            let mut upright = vec![0; image.pixels.len()];
            for (y, line) in upright.chunks_exact_mut(h * 3).enumerate() {
                let column = 3 * if from_right { w - 1 - y } else { y };
                for (x, pixel) in line.chunks_exact_mut(3).enumerate() {
                    let source = if from_bottom { h - 1 - x } else { x };
                    pixel.copy_from_slice(&image.pixels[source * row + column..][..3]);
                }
            }
            return Ok(Image {
                width: image.height,
                height: image.width,
                pixels: upright,
                transparent: image.transparent,
            });
        }
    }
    Ok(image)
}
