//! Logging to standard error. Standard output is reserved for the output of a command.

use std::{
    io::{self, Write},
    str::FromStr,
};

use tracing_subscriber::{EnvFilter, Layer as _, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::traces::Exporter;

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Plain text.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("log format must be text or json, got {other:?}")),
        }
    }
}

impl std::fmt::Display for LogFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Starts logging. `RUST_LOG` sets the levels; the default is `info`. Further calls in a process have no effect.
pub fn init_telemetry(format: LogFormat) {
    init_with_traces(format, None);
}

/// Starts logging, and the export of traces if there is an exporter.
pub(crate) fn init_with_traces(format: LogFormat, exporter: Option<&Exporter>) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = match format {
        LogFormat::Text => {
            fmt::layer().with_target(false).with_ansi(false).with_writer(|| OneLine(io::stderr())).boxed()
        }
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(io::stderr).boxed(),
    };
    #[cfg(feature = "traces")]
    let traces = exporter.map(Exporter::layer);
    #[cfg(not(feature = "traces"))]
    let traces = exporter.map(|_| tracing_subscriber::layer::Identity::new());
    // Ignored: an error means that logging is already set up.
    let _ = tracing_subscriber::registry().with(logs.with_filter(filter)).with(traces).try_init();
}

/// Writes every event as one line and escapes control characters, so that data from a client can neither start a new
/// log line nor send escape sequences to the terminal. Each call of `write` must contain one whole event.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let mut line = String::with_capacity(text.len() + 1);
        for c in text.trim_end_matches('\n').chars() {
            match c.is_control() {
                true => line.extend(c.escape_default()),
                false => line.push(c),
            }
        }
        line.push('\n');
        self.0.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let mut out = OneLine(Vec::new());
        out.write_all(b"WARN refused: \x1b[2Ja\r\nINFO all is well\xff\n").unwrap();
        assert_eq!(out.0, "WARN refused: \\u{1b}[2Ja\\r\\nINFO all is well\u{fffd}\n".as_bytes());
    }
}
