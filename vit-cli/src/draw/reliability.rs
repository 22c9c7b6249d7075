//! A reliability diagram: how often a model is right where it is so sure.

use plotters::prelude::{ChartBuilder, LineSeries, Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, WHITE};
use vit_model::metrics::Evaluation;

use super::{BLUE, FAINT, INK, RED, failed, font, png};

/// Draws accuracy over confidence, and below it how many images are that sure.
pub fn reliability(evaluation: &Evaluation) -> anyhow::Result<Vec<u8>> {
    png((640, 720), |area| {
        let (upper, lower) = area.split_vertically(540);
        let mut chart = ChartBuilder::on(&upper)
            .caption("Reliability", font(18.0, INK))
            .margin(16)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..1.0, 0.0..1.0)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc("confidence")
            .y_desc("accuracy")
            .axis_style(FAINT)
            .bold_line_style(FAINT.mix(0.6))
            .light_line_style(FAINT.mix(0.0))
            .label_style(font(13.0, INK))
            .x_label_formatter(&|x| format!("{x:.1}"))
            .y_label_formatter(&|y| format!("{y:.1}"))
            .draw()
            .map_err(failed)?;
        let used = || evaluation.bins.iter().filter(|bin| bin.images > 0);
        let bars = used().map(|bin| Rectangle::new([(bin.from, 0.0), (bin.to, bin.accuracy)], BLUE.mix(0.75).filled()));
        chart.draw_series(bars).map_err(failed)?;
        // what is missing to the diagonal, or beyond it
        let gaps = used().map(|bin| {
            let (low, high) = (bin.accuracy.min(bin.confidence), bin.accuracy.max(bin.confidence));
            Rectangle::new([(bin.from, low), (bin.to, high)], RED.mix(0.45).filled())
        });
        chart.draw_series(gaps).map_err(failed)?;
        let edges = used().map(|bin| {
            let top = bin.accuracy.max(bin.confidence);
            Rectangle::new([(bin.from, 0.0), (bin.to, top)], WHITE.stroke_width(1))
        });
        chart.draw_series(edges).map_err(failed)?;
        chart.draw_series(LineSeries::new([(0.0, 0.0), (1.0, 1.0)], INK.stroke_width(1))).map_err(failed)?;
        let words = [
            (format!("calibration error {:.2} %", evaluation.calibration_error * 100.0), INK),
            ("accuracy".into(), BLUE),
            ("its distance from the mean confidence".into(), RED),
        ];
        for (line, (words, colour)) in words.into_iter().enumerate() {
            let style = font(14.0, colour).pos(Pos::new(HPos::Left, VPos::Top));
            chart.draw_series([Text::new(words, (0.03, 0.97 - 0.045 * line as f64), style)]).map_err(failed)?;
        }
        counts(&lower, evaluation)
    })
}

fn counts(area: &super::Area<'_>, evaluation: &Evaluation) -> anyhow::Result<()> {
    let most = evaluation.bins.iter().map(|bin| bin.images).max().unwrap_or(0).max(1) as f64;
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(28)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..1.0, 0.0..most)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .y_desc("images")
        .disable_x_mesh()
        .axis_style(FAINT)
        .bold_line_style(FAINT.mix(0.6))
        .light_line_style(FAINT.mix(0.0))
        .label_style(font(13.0, INK))
        .x_label_formatter(&|x| format!("{x:.1}"))
        .y_labels(3)
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()
        .map_err(failed)?;
    let bars = (evaluation.bins.iter())
        .map(|bin| Rectangle::new([(bin.from, 0.0), (bin.to, bin.images as f64)], BLUE.mix(0.5).filled()));
    chart.draw_series(bars).map(|_| ()).map_err(failed)
}
