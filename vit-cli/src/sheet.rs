//! A contact sheet: images with a line or two under each, as one HTML file that needs nothing beside it.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use image::{ExtendedColorType, ImageEncoder as _, RgbImage, codecs::jpeg::JpegEncoder, imageops};
use vit_model::image::{Image, Orientation};

use crate::output::show;
use crate::sources::Source;

/// The longer side of an image on the sheet, in pixels: sharp on screens with two pixels to the point.
const SIDE: u32 = 320;

/// An image of the sheet.
pub struct Entry {
    pub source: Source,
    /// What stands under it, a line each.
    pub lines: Vec<String>,
}

/// The page. An image that can no longer be read has its name and the reason in its place.
pub fn html(title: &str, note: &str, entries: &[Entry], orientation: Orientation) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{0}</title>\n<style>{STYLE}</style>\n\
         <h1>{0}</h1>\n<p>{1}</p>\n<main>\n",
        text(title),
        text(note)
    );
    for entry in entries {
        let name = show(entry.source.name());
        let _ = write!(page, "<figure>");
        match entry.source.image(orientation).and_then(|image| thumbnail(&image)) {
            Ok((jpeg, width, height)) => {
                let data = BASE64_STANDARD.encode(jpeg);
                let _ = write!(
                    page,
                    "<img alt=\"{}\" width=\"{width}\" height=\"{height}\" loading=\"lazy\" src=\"data:image/jpeg;base64,{data}\">",
                    text(&name)
                );
            }
            Err(why) => {
                let _ = write!(page, "<p class=\"gone\">{}</p>", text(&format!("{why:#}")));
            }
        }
        let _ = write!(page, "<figcaption>");
        for line in &entry.lines {
            let _ = write!(page, "<b>{}</b>", text(line));
        }
        let _ = writeln!(page, "<span>{}</span></figcaption></figure>", text(&name));
    }
    page += "</main>\n</html>\n";
    page
}

const STYLE: &str = "\
:root{color-scheme:light dark;font:15px/1.4 system-ui,sans-serif}body{margin:1.5rem}h1{font-size:1.3rem;margin:0}\
p{margin:.3rem 0 1rem}main{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:1rem}\
figure{margin:0}img{width:100%;height:170px;object-fit:contain;background:#8882;border-radius:4px}\
figcaption{margin-top:.3rem}figcaption b{display:block;font-weight:600}figcaption span{font-size:.8rem;opacity:.75;\
overflow-wrap:anywhere}.gone{height:170px;margin:0;padding:.5rem;box-sizing:border-box;background:#8882;overflow:auto}";

/// A small JPEG of an image, and its size.
fn thumbnail(image: &Image) -> anyhow::Result<(Vec<u8>, u32, u32)> {
    let (width, height) = (image.width(), image.height());
    let scale = f64::from(SIDE) / f64::from(width.max(height)).max(f64::from(SIDE));
    let side = |length: u32| ((f64::from(length) * scale).round() as u32).max(1);
    let whole = RgbImage::from_raw(width, height, image.pixels().to_vec())
        .ok_or_else(|| anyhow::anyhow!("an image of {width} × {height} has other pixels"))?;
    let small = imageops::thumbnail(&whole, side(width), side(height));
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, 80).write_image(
        &small,
        small.width(),
        small.height(),
        ExtendedColorType::Rgb8,
    )?;
    Ok((jpeg, small.width(), small.height()))
}

/// Text between tags or in an attribute.
fn text(plain: &str) -> String {
    let mut out = String::with_capacity(plain.len());
    for c in plain.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_become_markup() {
        let entry =
            Entry { source: Source::Bad("<script>.png".into(), "gone & \"lost\"".into()), lines: vec!["a<b".into()] };
        let page = html("'t'", "n", &[entry], Orientation::Exif);
        assert!(!page.contains("<script>"));
        for part in ["&lt;script&gt;.png", "gone &amp; &quot;lost&quot;", "<b>a&lt;b</b>", "<h1>&#39;t&#39;</h1>"] {
            assert!(page.contains(part), "{part} in {page}");
        }
    }

    #[test]
    fn thumbnails_keep_their_proportions_and_are_never_enlarged() {
        let of = |w: u32, h: u32| {
            let image = Image::from_rgb8(w, h, vec![128; (w * h * 3) as usize]).unwrap();
            let (jpeg, w, h) = thumbnail(&image).unwrap();
            assert_eq!(image::load_from_memory(&jpeg).unwrap().width(), w);
            (w, h)
        };
        assert_eq!(of(640, 320), (320, 160));
        assert_eq!(of(8, 4), (8, 4));
        assert_eq!(of(1000, 1), (320, 1));
    }
}
