//! The common part of a service's `main`: command line, logs, signals, exit codes.

use std::{error::Error, process::ExitCode};

use clap::Args;

use crate::{ConfigError, LogFormat, Shutdown, telemetry::init_with_traces, traces::Exporter};

/// Exit code for an invalid configuration (`EX_USAGE`).
pub const EXIT_CONFIG: u8 = 64;
/// Exit code of a process that failed to start or failed while running.
pub const EXIT_FAILURE: u8 = 1;

/// Settings of every service process.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Process")]
pub struct ProcessArgs {
    /// Format of log lines on standard error: text or json. RUST_LOG sets the log levels.
    #[arg(long, env = "OVERFILL_LOG_FORMAT", default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// URL of an OpenTelemetry collector that gets traces over OTLP (gRPC), for example http://collector:4317. The
    /// variables OTEL_TRACES_SAMPLER, OTEL_TRACES_SAMPLER_ARG and OTEL_RESOURCE_ATTRIBUTES apply.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_url: Option<String>,
    /// Shut down when standard input closes, so that a child process never outlives its parent.
    #[arg(long)]
    pub exit_with_stdin: bool,
    /// Allow listen addresses other than loopback without encryption and authentication.
    #[arg(long, env = "OVERFILL_ALLOW_INSECURE")]
    pub allow_insecure: bool,
}

/// Parses the command line as `A`. Prints help and errors.
///
/// # Errors
/// Success after printing help or the version, [`EXIT_CONFIG`] after printing an error.
pub fn parse_args<A: clap::Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|e| {
        let _ = e.print();
        if e.use_stderr() { ExitCode::from(EXIT_CONFIG) } else { ExitCode::SUCCESS }
    })
}

/// Runs the service of this name: sets up logs, traces and signals, calls `serve`, and returns the exit code. Prints
/// every configuration error on a separate line.
///
/// `serve` binds, then serves until the shutdown begins and the running requests have ended.
pub async fn run<C, E: Into<Box<dyn Error>>>(
    service: &'static str,
    process: &ProcessArgs,
    config: Result<C, Vec<ConfigError>>,
    serve: impl AsyncFnOnce(C, Shutdown) -> Result<(), E>,
) -> ExitCode {
    let exporter = process.otlp_url.as_deref().map(|url| Exporter::new(service, url)).transpose();
    let (exporter, unusable) = match exporter {
        Ok(exporter) => (exporter, None),
        Err(e) => (None, Some(e)),
    };
    init_with_traces(process.log_format, exporter.as_ref());
    let config = match (config, unusable) {
        (config, None) => config,
        (config, Some(why)) => {
            let fault = ConfigError::new("otlp-url", "usable", format!("an error: {why}"));
            Err(config.err().into_iter().flatten().chain([fault]).collect())
        }
    };
    let config = match config {
        Ok(config) => config,
        Err(faults) => {
            for fault in faults {
                eprintln!("error: {fault}");
            }
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    let shutdown = Shutdown::new();
    let followed = shutdown.follow_signals().and_then(|()| match process.exit_with_stdin {
        true => shutdown.follow_stdin(),
        false => Ok(()),
    });
    if let Err(e) = followed {
        eprintln!("error: setting up shutdown: {e}");
        return ExitCode::from(EXIT_FAILURE);
    }
    let served = serve(config, shutdown).await;
    if let Some(exporter) = exporter {
        exporter.end().await;
    }
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", one_line(&*e.into()));
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

/// Formats an error and its causes on one line. A cause whose text is already included is skipped, because many errors
/// repeat their source in their own text.
pub fn one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("loading weights")]
    struct Outer(#[source] Inner);
    #[derive(Debug, thiserror::Error)]
    #[error("no such file\nat all")]
    struct Inner;

    #[test]
    fn causes_are_said_once_on_one_line() {
        assert_eq!(one_line(&Outer(Inner)), "loading weights: no such file at all");
    }
}
