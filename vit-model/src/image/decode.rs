//! Decoding an image to 8-bit RGB: by its content, within stated limits. Truncated files are errors.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::io::{BufRead, BufReader, Cursor, Read, Seek};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use image::metadata::Orientation as Turn;
use image::{ColorType, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::gif;
use super::jpeg::Jpeg;
use super::tags::{self, Tags};
use crate::{Error, Result, inputs, limits, memory};

/// Images that take more than this to decode are decoded one at a time, so that many threads need the memory of one.
const LARGE_BYTES: u64 = 64 << 20;
static LARGE: Mutex<()> = Mutex::new(());

/// An 8-bit RGB image, rows top to bottom.
///
/// Every format is converted to RGB as Pillow's `convert("RGB")` does: palettes are looked up, grey is repeated, and alpha is
/// kept apart, because some processors drop it and others blend with it. 16-bit samples keep their high byte. Of an animation
/// the first frame is decoded. Colour profiles and gamma are not applied, as in Pillow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    width: u32,
    height: u32,
    pixels: Vec<u8>,        // [H, W, 3]
    alpha: Option<Vec<u8>>, // [H, W]
}

/// Which way up an image is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Orientation {
    /// Upright, as its EXIF orientation says.
    #[default]
    Exif,
    /// As its pixels are stored.
    Stored,
}

/// How an image is decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct ImageOptions {
    /// Which way up.
    pub orientation: Orientation,
}

impl ImageOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Which way up; the default is [`Orientation::Exif`].
    #[must_use]
    pub fn orientation(self, orientation: Orientation) -> Self {
        Self { orientation }
    }
}

impl Image {
    /// Decodes a file by its content, whatever its name, and turns it upright as its EXIF says.
    ///
    /// # Errors
    /// [`Error::Image`] with the path: a file that cannot be read (then with the system's error), of no known format,
    /// truncated, or too large.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &ImageOptions::default())
    }

    /// As [`open`](Self::open), with options.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: &ImageOptions) -> Result<Self> {
        let path = path.as_ref();
        let unread = |error: std::io::Error| {
            let (path, why) = (Some(path.to_owned()), error.to_string());
            Error::Image { path, why, source: Some(error) }
        };
        let refuse = |why: &str| Err(Error::image(why).within(path));
        let (file, meta) = match inputs::open(path) {
            Err(Error::Io { source, .. }) => return Err(unread(source)),
            Err(Error::File { why, .. }) => return refuse(&why),
            opened => opened?,
        };
        if meta.len() == 0 {
            return refuse("empty file");
        }
        let decoded = decode(&mut BufReader::new(&file), meta.len(), options.orientation);
        // if the file has changed, report that, because it explains any other error
        inputs::unchanged(&file, &meta).map_err(unread)?;
        decoded.map_err(|why| Error::image(why).within(path))
    }

    /// Looks at the first bytes of a file (some hundred are enough), before the rest is read.
    ///
    /// # Errors
    /// [`Error::Image`] if they belong to no known format, with what they look like.
    pub fn check_start(bytes: &[u8]) -> Result<()> {
        // a reader without a file's name knows the formats that are compiled in, as `decode` does
        let guessed = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
        let known = guessed.is_ok_and(|reader| reader.format().is_some());
        if known { Ok(()) } else { Err(Error::image(not_an_image(bytes))) }
    }

    /// Decodes a file that is in memory, and turns it upright as its EXIF says.
    ///
    /// # Errors
    /// [`Error::Image`], as [`open`](Self::open), but without a path.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Self::decode_with(bytes, &ImageOptions::default())
    }

    /// As [`decode`](Self::decode), with options.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_with(bytes: &[u8], options: &ImageOptions) -> Result<Self> {
        if bytes.is_empty() {
            return Err(Error::image("empty file"));
        }
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        decode(&mut Cursor::new(bytes), len, options.orientation).map_err(Error::image)
    }

    /// An image from its pixels, `[H, W, 3]`.
    ///
    /// # Errors
    /// [`Error::Image`] for another number of bytes, or too many pixels.
    pub fn from_rgb8(width: u32, height: u32, pixels: Vec<u8>) -> Result<Self> {
        let samples = check_size(width, height).and_then(|n| usize::try_from(n.saturating_mul(3)).ok());
        if samples != Some(pixels.len()) {
            return Err(Error::image(format!("{} bytes are not {width}×{height} pixels of RGB", pixels.len())));
        }
        Ok(Self { width, height, pixels, alpha: None })
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

    /// How opaque each pixel is, `[H, W]`, if the file says that any pixel is not.
    pub fn alpha(&self) -> Option<&[u8]> {
        self.alpha.as_deref()
    }

    /// The same with an alpha channel, `[H, W]`.
    pub(super) fn with_alpha(self, alpha: Option<Vec<u8>>) -> Self {
        Self { alpha, ..self }
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

/// The number of pixels of an image of this size, unless it is zero or too large.
fn check_size(width: u32, height: u32) -> Option<u64> {
    let pixels = u64::from(width).saturating_mul(u64::from(height));
    (1..=limits::PIXELS).contains(&pixels).then_some(pixels)
}

/// Like `check_size`, with a message for the user; also checks the memory at `bytes_per_pixel`.
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

/// What an image is decoded from. Not a type parameter, so that every decoder is compiled once for files and bytes.
trait Input: BufRead + Seek {}

impl<T: BufRead + Seek> Input for T {}

fn decode(input: &mut dyn Input, len: u64, orientation: Orientation) -> Result<Image, String> {
    let upright = orientation == Orientation::Exif;
    let head = input.fill_buf().map_err(|e| e.to_string())?;
    if head.starts_with(&[0xff, 0xd8, 0xff]) {
        if len > limits::JPEG_FILE_BYTES {
            return Err(format!("a JPEG of {} MB, at most {} MB are read", len >> 20, limits::JPEG_FILE_BYTES >> 20));
        }
        let mut bytes = Vec::new();
        input.take(limits::JPEG_FILE_BYTES).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        return decode_jpeg(&bytes, upright).map_err(|why| format!("JPEG: {why}"));
    }
    let unknown = not_an_image(head);
    input.rewind().map_err(|e| e.to_string())?;
    let reader = ImageReader::new(input).with_guessed_format().map_err(|e| e.to_string())?;
    let Some(format) = reader.format() else { return Err(unknown) };
    let decoded = if format == ImageFormat::Gif {
        gif::decode(reader.into_inner(), |w, h, bytes| budget(w, h, bytes).map(turn)).map(|screen| {
            let gif::Screen { width, height, pixels, alpha } = screen;
            Image { width, height, pixels, alpha }
        })
    } else {
        decode_other(reader, format, upright)
    };
    decoded.map_err(|why| format!("{}: {why}", format.extensions_str().first().unwrap_or(&"image").to_uppercase()))
}

/// What a file that is not an image looks like.
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

fn decode_jpeg(bytes: &[u8], upright: bool) -> Result<Image, String> {
    let jpeg = Jpeg::open(bytes)?;
    let (width, height, orientation) = (jpeg.width, jpeg.height, jpeg.orientation);
    let bytes_needed = budget(width, height, jpeg.bytes_per_pixel)?;
    let _turn = turn(bytes_needed);
    let mut pixels = buffer(width, height, 0)?;
    jpeg.decode_into(&mut pixels)?;
    let image = Image { width, height, pixels, alpha: None };
    if upright { orient(image, orientation) } else { Ok(image) }
}

fn decode_other(reader: ImageReader<&mut dyn Input>, format: ImageFormat, upright: bool) -> Result<Image, String> {
    let input = reader.into_inner();
    let tags = if format == ImageFormat::Tiff { Tags::read(input) } else { None };
    input.rewind().map_err(|e| e.to_string())?;
    let mut reader = ImageReader::with_format(input, format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(limits::DECODER_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(describe)?;
    let (width, height) = decoder.dimensions();
    let kind = decoder.color_type();
    // these decoders keep a second buffer of their own
    let copies: u64 = if matches!(format, ImageFormat::WebP | ImageFormat::Tiff) { 2 } else { 1 };
    let per_pixel = u64::from(kind.bytes_per_pixel()).saturating_mul(copies).max(3);
    let bytes_needed = budget(width, height, per_pixel)?;
    let _turn = turn(bytes_needed);

    let samples = usize::try_from(decoder.total_bytes()).map_err(|e| e.to_string())?;
    let orientation = match &tags {
        Some(tags) => tags.turn(),
        None if format == ImageFormat::Tiff => decoder.orientation().unwrap_or(Turn::NoTransforms),
        None => {
            let (exif, xmp) = (decoder.exif_metadata().ok().flatten(), decoder.xmp_metadata().ok().flatten());
            tags::turn(exif.as_deref(), xmp.as_deref())
        }
    };
    let mut pixels = buffer(width, height, samples)?;
    decoder.read_image(pixels.get_mut(..samples).unwrap_or_default()).map_err(describe)?;
    let alpha = alpha_of(pixels.get(..samples).unwrap_or_default(), kind);
    to_rgb8(&mut pixels, width, height, kind)?;
    if let Some(alpha) = alpha.as_deref().filter(|_| tags.is_some_and(|tags| tags.associated)) {
        tags::unmultiply(&mut pixels, alpha);
    }
    let image = Image { width, height, pixels, alpha };
    if upright { orient(image, orientation) } else { Ok(image) }
}

/// Waits until no other large image is being decoded.
fn turn(bytes: u64) -> Option<std::sync::MutexGuard<'static, ()>> {
    (bytes > LARGE_BYTES).then(|| LARGE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Zeros for the decoder's samples, and for as much RGB.
fn buffer(width: u32, height: u32, samples: usize) -> Result<Vec<u8>, String> {
    let rgb = u64::from(width).saturating_mul(u64::from(height)).saturating_mul(3);
    let len = usize::try_from(rgb).map_err(|e| e.to_string())?.max(samples);
    memory::zeros(len, "the picture").map_err(|error| error.to_string())
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

/// The alpha channel of samples, unless every pixel is opaque.
pub(super) fn alpha_of(pixels: &[u8], kind: ColorType) -> Option<Vec<u8>> {
    let stride = usize::from(kind.bytes_per_pixel());
    // the high byte of a 16-bit sample
    let high = usize::from(cfg!(target_endian = "little"));
    let at = match kind {
        ColorType::La8 | ColorType::Rgba8 => stride.checked_sub(1)?,
        ColorType::La16 | ColorType::Rgba16 => stride.checked_sub(2)?.checked_add(high)?,
        _ => return None,
    };
    let samples = || pixels.chunks_exact(stride).filter_map(|pixel| pixel.get(at));
    samples().any(|&alpha| alpha != 255).then(|| samples().copied().collect())
}

/// Converts samples to RGB in place, so that memory holds one image only.
pub(super) fn to_rgb8(pixels: &mut Vec<u8>, width: u32, height: u32, kind: ColorType) -> Result<(), String> {
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

/// Repeats one byte of every pixel of `stride` ≤ 3 bytes, from the last pixel to the first, because pixels grow.
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // indices below `count · 3`, the length of a slice
fn spread(pixels: &mut [u8], count: usize, stride: usize, at: usize) {
    for i in (0..count.min(pixels.len() / 3)).rev() {
        let value = pixels[i * stride + at];
        pixels[3 * i..3 * i + 3].fill(value);
    }
}

/// Keeps three bytes of every pixel of `stride` ≥ 4 bytes, from the first pixel to the last, because pixels shrink.
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // indices below `count · stride`, the length of a slice
fn gather(pixels: &mut [u8], count: usize, stride: usize, at: [usize; 3]) {
    for i in 0..count.min(pixels.len() / stride) {
        let rgb = at.map(|a| pixels[i * stride + a]);
        pixels[3 * i..3 * i + 3].copy_from_slice(&rgb);
    }
}

/// Turns an image upright.
fn orient(image: Image, orientation: Turn) -> Result<Image, String> {
    let (width, height) = (image.width, image.height);
    let across = matches!(orientation, Turn::Rotate90 | Turn::Rotate270 | Turn::Rotate90FlipH | Turn::Rotate270FlipH);
    if across {
        budget(width, height, 6)?;
    }
    let to_usize = |n: u32| usize::try_from(n).map_err(|e| e.to_string());
    let size = [to_usize(width)?, to_usize(height)?];
    let pixels = turned::<3>(image.pixels, size, orientation);
    let alpha = image.alpha.map(|alpha| turned::<1>(alpha, size, orientation));
    let (width, height) = if across { (height, width) } else { (width, height) };
    Ok(Image { width, height, pixels, alpha })
}

/// The samples `[H, W, C]` of an image of `[w, h]`, turned.
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // inside a picture whose size is checked
fn turned<const C: usize>(mut pixels: Vec<u8>, [w, h]: [usize; 2], orientation: Turn) -> Vec<u8> {
    let row = w * C;
    let swap_columns = |pixels: &mut [u8]| {
        for line in pixels.chunks_exact_mut(row) {
            for x in 0..w / 2 {
                for c in 0..C {
                    line.swap(C * x + c, C * (w - 1 - x) + c);
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
        Turn::NoTransforms => {}
        Turn::FlipHorizontal => swap_columns(&mut pixels),
        Turn::FlipVertical => swap_rows(&mut pixels),
        Turn::Rotate180 => {
            swap_columns(&mut pixels);
            swap_rows(&mut pixels);
        }
        Turn::Rotate90 | Turn::Rotate270 | Turn::Rotate90FlipH | Turn::Rotate270FlipH => {
            // column x of the upright picture is row x of the file, or row h−1−x; from its start or from its end
            let from_bottom = matches!(orientation, Turn::Rotate90 | Turn::Rotate270FlipH);
            let from_right = matches!(orientation, Turn::Rotate270 | Turn::Rotate270FlipH);
            let mut upright = vec![0; pixels.len()];
            for (y, line) in upright.chunks_exact_mut(h * C).enumerate() {
                let column = C * if from_right { w - 1 - y } else { y };
                for (x, pixel) in line.chunks_exact_mut(C).enumerate() {
                    let source = if from_bottom { h - 1 - x } else { x };
                    pixel.copy_from_slice(&pixels[source * row + column..][..C]);
                }
            }
            return upright;
        }
    }
    pixels
}
