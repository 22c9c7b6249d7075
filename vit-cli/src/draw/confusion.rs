//! A confusion matrix as a picture: a row for each true class, a column for each answer.

use plotters::prelude::{Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, FontTransform, RGBColor, WHITE};
use vit_model::metrics::Confusion;

use super::{FAINT, INK, failed, font, png};
use crate::output::short;

/// Most classes whose cells contain their number.
const NUMBERED: usize = 30;

/// Most classes that are named along the sides.
const NAMED: usize = 80;

/// Draws the counts, or with `normalised` the share of each true class.
pub fn confusion(matrix: &Confusion, labels: &[String], normalised: bool) -> anyhow::Result<Vec<u8>> {
    let classes = matrix.classes().max(1);
    let named = classes <= NAMED;
    let cell = (1200 / classes).clamp(1, 56) as i32;
    let longest = if named { labels.iter().map(|l| l.chars().count().min(24)).max().unwrap_or(0) as i32 } else { 0 };
    let size = (f64::from(cell) * 0.34).clamp(9.0, 14.0);
    let names = if named { (f64::from(longest) * size * 0.62) as i32 + 16 } else { 16 };
    let (left, top) = (names + 28, 56);
    let side = cell * classes as i32;
    let picture = ((left + side + 24) as u32, (top + side + names + 28) as u32);
    png(picture, |area| {
        let anchor = |h, v| Pos::new(h, v);
        let title = if normalised { "Confusion, share of each true class" } else { "Confusion, images" };
        area.draw(&Text::new(title, (left, 18), font(18.0, INK))).map_err(failed)?;
        let rows: Vec<u64> = (0..classes).map(|t| (0..classes).map(|p| matrix.get(t, p)).sum()).collect();
        let largest = rows.iter().copied().max().unwrap_or(0).max(1) as f64;
        for (truth, &images) in rows.iter().enumerate() {
            for predicted in 0..classes {
                let count = matrix.get(truth, predicted);
                let share = count as f64 / images.max(1) as f64;
                // a rare class is as visible as a frequent one if shares are shown
                let depth = if normalised { share } else { count as f64 / largest };
                let (x, y) = (left + predicted as i32 * cell, top + truth as i32 * cell);
                let colour = shade(depth);
                area.draw(&Rectangle::new([(x, y), (x + cell, y + cell)], colour.filled())).map_err(failed)?;
                if classes <= NUMBERED && count > 0 {
                    let ink = if depth > 0.5 { WHITE } else { INK };
                    let style = font(size, ink).pos(anchor(HPos::Center, VPos::Center));
                    let number = if normalised { format!("{share:.2}") } else { count.to_string() };
                    area.draw(&Text::new(number, (x + cell / 2, y + cell / 2), style)).map_err(failed)?;
                }
            }
        }
        area.draw(&Rectangle::new([(left, top), (left + side, top + side)], FAINT.stroke_width(1))).map_err(failed)?;
        if named {
            for (class, label) in labels.iter().take(classes).enumerate() {
                let (label, middle) = (short(label, 24), class as i32 * cell + cell / 2);
                let row = font(size, INK).pos(anchor(HPos::Right, VPos::Center));
                area.draw(&Text::new(label.clone(), (left - 8, top + middle), row)).map_err(failed)?;
                // turned, so that long names do not run into each other
                let column = font(size, INK).transform(FontTransform::Rotate90).pos(anchor(HPos::Left, VPos::Center));
                area.draw(&Text::new(label, (left + middle, top + side + 8), column)).map_err(failed)?;
            }
        }
        let below = font(13.0, INK).pos(anchor(HPos::Center, VPos::Bottom));
        let bottom = picture.1 as i32 - 8;
        area.draw(&Text::new("answer", (left + side / 2, bottom), below)).map_err(failed)?;
        let beside = font(13.0, INK).transform(FontTransform::Rotate270).pos(anchor(HPos::Center, VPos::Top));
        area.draw(&Text::new("true class", (10, top + side / 2), beside)).map_err(failed)
    })
}

/// White to dark blue: the lightness falls evenly, so twice the share looks twice as dark.
fn shade(depth: f64) -> RGBColor {
    let mix = |from: f64, to: f64| (from + (to - from) * depth.clamp(0.0, 1.0)).round() as u8;
    RGBColor(mix(255.0, 8.0), mix(255.0, 48.0), mix(255.0, 107.0))
}
