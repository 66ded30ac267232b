//! Load, nodes, queue and latencies over time.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::record::{INTERVAL_SECONDS, PoolSample, Record};
use crate::text;

const SIZE: (u32, u32) = (860, 1150);
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(213, 94, 0);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;
type Line = (&'static str, RGBColor, Vec<(f64, f64)>);

/// Writes an SVG file.
pub fn write(file: &Path, record: &Record) -> Drawn {
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((5, 1));
    let over = |value: &dyn Fn(&super::Sample) -> f64| -> Vec<(f64, f64)> {
        record.samples.iter().map(|sample| (sample.seconds, value(sample))).collect()
    };
    let sent = over(&|sample| sample.sent_requests as f64);
    let waiting = |pool: &PoolSample| pool.waiting as f64;
    let latencies = |share: f64, ttft: bool| -> Vec<(f64, f64)> {
        let intervals = record.intervals.iter().enumerate();
        let histograms = intervals.map(|(i, interval)| (i, if ttft { &interval.ttft } else { &interval.itl }));
        let some = histograms.filter(|(_, histogram)| histogram.count() > 0);
        some.map(|(i, histogram)| ((i as f64 + 0.5) * INTERVAL_SECONDS, histogram.quantile(share))).collect()
    };
    let plain = |value: f64| format!("{value:.0}");
    plot(&areas[0], "Requests per second", &plain, vec![("sent", BLUE, sent)])?;
    plot(
        &areas[1],
        "Nodes that serve",
        &plain,
        vec![
            ("prefill", BLUE, over(&|sample| sample.prefill.serving as f64)),
            ("decode", ORANGE, over(&|sample| sample.decode.serving as f64)),
        ],
    )?;
    plot(
        &areas[2],
        "Waiting requests",
        &plain,
        vec![
            ("at the router", BLUE, over(&|sample| sample.router_waiting as f64)),
            ("on nodes", ORANGE, over(&|sample| waiting(&sample.prefill) + waiting(&sample.decode))),
        ],
    )?;
    let lines = |ttft| vec![("median", BLUE, latencies(0.5, ttft)), ("p95", ORANGE, latencies(0.95, ttft))];
    plot(&areas[3], "Time to first token", &text::seconds, lines(true))?;
    plot(&areas[4], "Time between tokens", &text::seconds, lines(false))?;
    root.present()?;
    Ok(())
}

fn plot(area: &Area<'_>, name: &str, label: &dyn Fn(f64) -> String, lines: Vec<Line>) -> Drawn {
    let points = || lines.iter().flat_map(|(_, _, points)| points);
    let (end, highest) = points().fold((1.0, 0.0_f64), |(x, y): (f64, f64), point| (x.max(point.0), y.max(point.1)));
    // The plot needs a range that is not empty.
    let highest = if highest > 0.0 { highest * 1.1 } else { 1.0 };
    let mut chart = ChartBuilder::on(area)
        .caption(name, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0.0..highest)?;
    chart.configure_mesh().y_label_formatter(&|y| label(*y)).x_label_formatter(&|x| format!("{x:.0} s")).draw()?;
    for (name, color, points) in lines {
        let style = color.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).position(SeriesLabelPosition::UpperLeft).draw()?;
    Ok(())
}
