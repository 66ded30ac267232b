//! Faults in a configuration.

use std::{fmt::Display, net::SocketAddr};

use crate::ProcessArgs;

/// One setting that can't be used. A service collects all of them before it gives up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{flag} must be {limit}, got {value}")]
pub struct ConfigError {
    /// Name of the flag, without dashes.
    pub flag: &'static str,
    /// What it must be.
    pub limit: String,
    /// What it is.
    pub value: String,
}

impl ConfigError {
    /// A fault of `--flag`.
    pub fn new(flag: &'static str, limit: impl Display, value: impl Display) -> Self {
        Self { flag, limit: limit.to_string(), value: value.to_string() }
    }

    /// Adds a fault to `faults` unless `ok`.
    pub fn check(faults: &mut Vec<Self>, ok: bool, flag: &'static str, limit: impl Display, value: impl Display) {
        if !ok {
            faults.push(Self::new(flag, limit, value));
        }
    }

    /// Checks that an address which is listened on is this machine's own alone, unless that is `secured`, with `how`
    /// that could be, or wanted all the same.
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

    /// Checks the `host:port` that others are told to dial: given, or the address that is listened on.
    pub fn check_advertised(
        faults: &mut Vec<Self>,
        flag: &'static str,
        advertised: Option<&str>,
        listen: Option<SocketAddr>,
    ) {
        let Some(text) = advertised else {
            let everywhere = listen.is_some_and(|address| address.ip().is_unspecified());
            let limit = "given when all addresses are listened on";
            return Self::check(faults, !everywhere, flag, limit, "nothing");
        };
        let ok = text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        Self::check(faults, ok, flag, "host:port", text);
    }

    /// The result, where there is one; else a fault goes to `faults`.
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
