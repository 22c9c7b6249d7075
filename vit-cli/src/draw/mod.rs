//! Charts as PNG files, with text in the font that is part of the program.

mod confusion;
mod reliability;

use std::sync::Once;

use anyhow::anyhow;
use image::{ExtendedColorType, ImageEncoder as _, codecs::png::PngEncoder};
use plotters::coord::Shift;
use plotters::prelude::{BitMapBackend, DrawingArea, IntoDrawingArea as _, WHITE};
use plotters::style::{Color as _, FontStyle, IntoFont as _, RGBColor, TextStyle, register_font};

pub use confusion::confusion;
pub use reliability::reliability;

/// A picture that is being drawn.
type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// The colour of lines and text: soft enough for a white page, and dark enough to read.
const INK: RGBColor = RGBColor(0x24, 0x29, 0x2f);

/// Lines that only guide the eye.
const FAINT: RGBColor = RGBColor(0xd0, 0xd7, 0xde);

/// The colour of what is measured.
const BLUE: RGBColor = RGBColor(0x21, 0x66, 0xac);

/// The colour of what falls short.
const RED: RGBColor = RGBColor(0xd6, 0x60, 0x4d);

/// Draws a picture on white and encodes it as PNG.
fn png(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> anyhow::Result<()>) -> anyhow::Result<Vec<u8>> {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        // the font is part of the program, so it is a font
        let _ = register_font("sans", FontStyle::Normal, include_bytes!("../../assets/DejaVuSans.ttf"));
    });
    let (width, height) = size;
    let mut pixels = vec![0; width as usize * height as usize * 3];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        draw(&area)?;
        area.present().map_err(failed)?;
    }
    let mut png = Vec::new();
    PngEncoder::new(&mut png).write_image(&pixels, width, height, ExtendedColorType::Rgb8)?;
    Ok(png)
}

/// Text in the program's font.
fn font<'a>(size: f64, colour: RGBColor) -> TextStyle<'a> {
    ("sans", size).into_font().color(&colour.to_rgba())
}

/// An error of the drawing library, which has no common type.
fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("the picture cannot be drawn: {error}")
}
