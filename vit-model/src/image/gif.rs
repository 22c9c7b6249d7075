//! The first frame of a GIF on its screen, with the pixels of Pillow.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::io::Read;

use gif::{ColorOutput, DecodeOptions, Decoder};

use crate::memory;

/// RGB `[H, W, 3]` and, if there is a transparent colour, alpha `[H, W]`.
pub(super) struct Screen {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
    pub alpha: Option<Vec<u8>>,
}

/// Decodes the first frame. `admit` is asked for the size with its bytes per pixel before anything is allocated, and what it returns
/// is kept meanwhile.
pub(super) fn decode<T>(
    input: impl Read,
    admit: impl Fn(u32, u32, u64) -> Result<T, String>,
) -> Result<Screen, String> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    let mut decoder = options.read_info(input).map_err(describe)?;
    let screen = [decoder.width(), decoder.height()].map(u32::from);
    let frame = decoder.next_frame_info().map_err(describe)?.ok_or("there is no picture in it")?;
    let [left, top, w, h] = [frame.left, frame.top, frame.width, frame.height].map(u32::from);
    let transparent = frame.transparent;
    // a frame that does not fit makes the screen larger
    let width = screen[0].max(left.saturating_add(w));
    let height = screen[1].max(top.saturating_add(h));
    let _turn = admit(width, height, 6)?;
    let palette = decoder.palette().map(<[u8]>::to_vec).unwrap_or_default();
    let to_usize = |n: u32| usize::try_from(n).map_err(|e| e.to_string());
    let [width_of, height_of, left, top, w, h] =
        [to_usize(width)?, to_usize(height)?, to_usize(left)?, to_usize(top)?, to_usize(w)?, to_usize(h)?];
    let zeros = |n: usize| memory::zeros(n, "the picture").map_err(|error| error.to_string());
    let mut indices = zeros(w.saturating_mul(h))?;
    fill(&mut decoder, &mut indices)?;

    // around the frame the screen is transparent if anything is, and otherwise has the first colour
    let mut screen = zeros(width_of.saturating_mul(height_of))?;
    screen.fill(transparent.unwrap_or(0));
    for (row, line) in indices.chunks_exact(w.max(1)).enumerate() {
        let start = row.saturating_add(top).saturating_mul(width_of).saturating_add(left);
        if let Some(place) = screen.get_mut(start..start.saturating_add(w)) {
            place.copy_from_slice(line);
        }
    }
    // without a palette an index is a grey value; colours that a palette lacks are black
    let colours = palette.as_chunks::<3>().0;
    let colour = |index: u8| match colours.get(usize::from(index)) {
        Some(colour) => *colour,
        None if colours.is_empty() => [index; 3],
        None => [0; 3],
    };
    let pixels = screen.iter().flat_map(|&index| colour(index)).collect();
    let alpha = transparent.map(|clear| screen.iter().map(|&index| if index == clear { 0 } else { 255 }).collect());
    let alpha = alpha.filter(|alpha: &Vec<u8>| alpha.contains(&0));
    Ok(Screen { width, height, pixels, alpha })
}

fn fill<R: Read>(decoder: &mut Decoder<R>, indices: &mut [u8]) -> Result<(), String> {
    decoder.read_into_buffer(indices).map_err(describe)
}

#[allow(clippy::needless_pass_by_value)] // as `map_err` gives it
fn describe(error: gif::DecodingError) -> String {
    match error {
        gif::DecodingError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            "truncated: the file ends before the end of the image".into()
        }
        other => {
            let text = other.to_string();
            if text.to_lowercase().contains("unexpected end of file") { format!("truncated: {text}") } else { text }
        }
    }
}
