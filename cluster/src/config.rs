//! Configuration errors.

use std::{fmt::Display, net::SocketAddr};

use crate::ProcessArgs;

/// A setting with an invalid value. A service collects all of them and reports them together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{flag} must be {limit}, got {value}")]
pub struct ConfigError {
    /// Name of the flag, without dashes.
    pub flag: &'static str,
    /// Condition on the value. It completes the sentence "--flag must be ...".
    pub limit: String,
    /// The value given.
    pub value: String,
}

impl ConfigError {
    /// Creates an error for `--flag`.
    pub fn new(flag: &'static str, limit: impl Display, value: impl Display) -> Self {
        Self { flag, limit: limit.to_string(), value: value.to_string() }
    }

    /// Adds an error to `faults` unless `ok`.
    pub fn check(faults: &mut Vec<Self>, ok: bool, flag: &'static str, limit: impl Display, value: impl Display) {
        if !ok {
            faults.push(Self::new(flag, limit, value));
        }
    }

    /// Rejects a non-loopback listen address unless it is `secured` or --allow-insecure is set. `how` names the flags
    /// that would secure it; the error text quotes them.
    pub fn check_exposed(
        faults: &mut Vec<Self>,
        flag: &'static str,
        listen: Option<SocketAddr>,
        secured: bool,
        how: &str,
        process: &ProcessArgs,
    ) {
        let Some(listen) = listen else { return };
        let ok = listen.ip().is_loopback() || secured || process.allow_insecure;
        let limit = format!("a loopback address unless {how} is given (or --allow-insecure)");
        Self::check(faults, ok, flag, limit, listen);
    }

    /// Checks the address that other processes dial. `advertised` must have the form `host:port`. Without it, they dial
    /// the `listen` address, which then must not be a wildcard such as 0.0.0.0.
    pub fn check_advertised(
        faults: &mut Vec<Self>,
        flag: &'static str,
        advertised: Option<&str>,
        listen: Option<SocketAddr>,
    ) {
        let Some(text) = advertised else {
            let everywhere = listen.is_some_and(|address| address.ip().is_unspecified());
            let limit = "given when the listen address is a wildcard";
            return Self::check(faults, !everywhere, flag, limit, "nothing");
        };
        let ok = text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        Self::check(faults, ok, flag, "host:port", text);
    }

    /// Returns the value of `result`. If it is an error, adds a [`ConfigError`] to `faults` and returns `None`.
    pub fn collect<T, E>(
        faults: &mut Vec<Self>,
        result: Result<T, E>,
        flag: &'static str,
        limit: impl Display,
        value: impl Display,
    ) -> Option<T> {
        result.inspect_err(|_| faults.push(Self::new(flag, limit, value))).ok()
    }
}
