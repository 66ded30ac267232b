//! A plot of the speed of mode exact over the rate of forced agreement, as a multiple of the full model alone.

use std::{error::Error, path::Path};

use plotters::prelude::*;

use super::Row;

const SIZE: (u32, u32) = (720, 440);
const COLORS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(110, 110, 110),
];

/// Writes an SVG file: one line for each batch size.
pub fn write(file: &Path, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let mut batches: Vec<usize> = rows.iter().map(|row| row.batch).collect();
    batches.dedup();
    let points = |batch: usize| -> Vec<(f64, f64)> {
        let of_batch = rows.iter().filter(|row| row.batch == batch);
        let mut points: Vec<(f64, f64)> =
            of_batch.filter_map(|row| Some((row.forced_agreement?, row.relative_speed))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let all: Vec<(f64, f64)> = batches.iter().flat_map(|batch| points(*batch)).collect();
    let least = all.iter().map(|point| point.0).fold(1.0, f64::min);
    let most = all.iter().map(|point| point.0).fold(least + 0.05, f64::max);
    let highest = all.iter().map(|point| point.1).fold(1.0, f64::max) * 1.1;

    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Mode exact against the full model alone", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d(least..most, 0.0..highest)?;
    chart
        .configure_mesh()
        .x_desc("forced agreement: share of drafts that are the full model's tokens")
        .y_desc("tokens per second, full model alone = 1")
        .draw()?;
    chart.draw_series(LineSeries::new([(least, 1.0), (most, 1.0)], BLACK.stroke_width(1)))?;
    for (batch, color) in batches.iter().zip(COLORS.iter().cycle()) {
        chart
            .draw_series(LineSeries::new(points(*batch), color.stroke_width(2)))?
            .label(format!("batch {batch}"))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        chart.draw_series(points(*batch).into_iter().map(|at| Circle::new(at, 3, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}
