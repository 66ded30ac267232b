//! The measurements as a table or as JSON.

use crate::text;

/// Measurements in the order in which they were made.
#[derive(Default)]
pub struct Report(Vec<Line>);

struct Line {
    name: String,
    value: f64,
    unit: &'static str,
    note: String,
}

impl Report {
    /// Adds one figure. `note` says how it was measured, or what to compare it with.
    pub fn add(&mut self, name: impl Into<String>, value: f64, unit: &'static str, note: impl Into<String>) {
        let line = Line { name: name.into(), value, unit, note: note.into() };
        tracing::info!(name = line.name, value, unit, "measured");
        self.0.push(line);
    }

    /// The measurements as a table.
    pub fn table(&self) -> String {
        let rows: Vec<_> = self
            .0
            .iter()
            .map(|line| [line.name.clone(), digits(line.value), line.unit.into(), line.note.clone()])
            .collect();
        text::table(["MEASUREMENT", "VALUE", "UNIT", ""], &rows)
    }

    /// The measurements as a JSON list of `{name, value, unit, note}`.
    pub fn json(&self) -> serde_json::Value {
        self.0
            .iter()
            .map(|line| serde_json::json!({"name": line.name, "value": line.value, "unit": line.unit, "note": line.note}))
            .collect()
    }
}

/// Formats a number with three significant digits.
fn digits(value: f64) -> String {
    let decimals = if value == 0.0 { 0 } else { (2 - value.abs().log10().floor() as i32).clamp(0, 6) };
    format!("{value:.0$}", decimals as usize)
}

/// Returns the median.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_matter() {
        assert_eq!(digits(1234.5), "1234");
        assert_eq!(digits(12.345), "12.3");
        assert_eq!(digits(0.012345), "0.0123");
        assert_eq!(digits(0.0), "0");
    }

    #[test]
    fn the_median_is_no_outlier() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
    }
}
