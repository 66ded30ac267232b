//! Reads the metrics of services.

use std::time::Duration;

use anyhow::{Context, Result};

/// A server of the OpenAI API.
pub trait Router {
    /// URL without `/v1`.
    fn http(&self) -> &str;
}

/// The server at this URL.
pub struct At<'a>(pub &'a str);

impl Router for At<'_> {
    fn http(&self) -> &str {
        self.0
    }
}

/// Reads a metric at `url`, summed over the series whose labels contain `labels`. Returns `None` if there is none.
pub fn read(url: &str, name: &str, labels: &str) -> Result<Option<f64>> {
    let text = ureq::get(&format!("{url}/metrics")).timeout(Duration::from_secs(10)).call()?.into_string()?;
    let mut sum = None;
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(name) else { continue };
        if rest.starts_with(['{', ' ']) && rest.contains(labels) {
            let value: f64 = rest.rsplit(' ').next().unwrap_or_default().parse().context(line.to_owned())?;
            sum = Some(sum.unwrap_or(0.0) + value);
        }
    }
    Ok(sum)
}
