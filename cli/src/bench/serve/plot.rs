//! A plot of the run: the distributions of TTFT and ITL, and throughput over time.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use tokio::time::Instant;

use super::client::{Arrivals, Outcome};
use super::summary::{Distribution, Summary, percentile};
use crate::text;

const SIZE: (u32, u32) = (760, 900);
const COLOR: RGBColor = RGBColor(0, 114, 178);
/// Points of a curve. More would not be visible.
const POINTS: usize = 400;
/// Points of throughput over time.
const INTERVALS: usize = 60;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// Writes an SVG file.
pub fn write(file: &Path, summary: &Summary, outcomes: &[Outcome], start: Instant) -> Drawn {
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((3, 1));
    let latencies = [("Time to first token", &summary.ttft_seconds), ("Time between tokens", &summary.itl_seconds)];
    for (area, (name, distribution)) in areas.iter().zip(latencies) {
        match distribution {
            Some(distribution) => shares(area, name, distribution)?,
            None => drop(area.titled(&format!("{name}: nothing measured"), ("sans-serif", 18))?),
        }
    }
    throughput(&areas[2], summary, outcomes, start)?;
    root.present()?;
    Ok(())
}

/// Plots the cumulative distribution. The time axis is logarithmic, so that the median and the tail are both visible.
fn shares(area: &Area<'_>, name: &str, distribution: &Distribution) -> Drawn {
    let Distribution { p50, p99, max, sorted, .. } = distribution;
    // The plot needs a range that is not empty and does not start at 0.
    let least = sorted[0].max(1e-6);
    let range = least * 0.95..max.max(least) * 1.05;
    let caption = format!("{name}: median {}, p99 {}", text::seconds(*p50), text::seconds(*p99));
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(range.log_scale(), 0.0..1.0)?;
    chart.configure_mesh().y_desc("share below").x_label_formatter(&|x| text::seconds(*x)).draw()?;
    let points =
        (0..=POINTS).map(|i| i as f64 / POINTS as f64).map(|share| (percentile(sorted, share).max(least), share));
    chart.draw_series(LineSeries::new(points, COLOR.stroke_width(2)))?;
    Ok(())
}

/// Plots the output tokens per second in each interval of the run.
fn throughput(area: &Area<'_>, summary: &Summary, outcomes: &[Outcome], start: Instant) -> Drawn {
    let width = summary.elapsed_seconds / INTERVALS as f64;
    let mut rates = [0.0; INTERVALS];
    for Arrivals { tokens, times } in outcomes.iter().filter_map(|outcome| outcome.result.as_ref().ok()) {
        let tokens_each = *tokens as f64 / times.len() as f64;
        for time in times {
            let interval = (time.duration_since(start).as_secs_f64() / width) as usize;
            rates[interval.min(INTERVALS - 1)] += tokens_each / width;
        }
    }
    let highest = rates.iter().copied().fold(1.0, f64::max);
    let caption = format!("Output tokens per second: {:.1} on average", summary.output_tokens_per_second);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..summary.elapsed_seconds, 0.0..highest * 1.05)?;
    chart.configure_mesh().x_desc("seconds").draw()?;
    let points = rates.iter().enumerate().map(|(i, rate)| ((i as f64 + 0.5) * width, *rate));
    chart.draw_series(LineSeries::new(points, COLOR.stroke_width(2)))?;
    Ok(())
}
