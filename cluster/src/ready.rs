//! The ready line, which tells a parent process that a service is up, and its addresses.

use std::{
    io::{self, Write},
    net::SocketAddr,
};

use serde::{Deserialize, Serialize};

/// Printed as one line of JSON on standard output once the service is bound and serving.
///
/// `{"ready":"prefill","grpc":"127.0.0.1:40001","admin":"127.0.0.1:40002"}`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyLine {
    /// `prefill`, `decode` or `router`.
    #[serde(rename = "ready")]
    pub role: String,
    /// Listen address of the gRPC service.
    pub grpc: SocketAddr,
    /// Listen address of the OpenAI API; routers only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<SocketAddr>,
    /// Listen address for KV; decode nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<SocketAddr>,
    /// Listen address of `/startup`, `/live`, `/ready`, `/health` and `/metrics`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<SocketAddr>,
}

impl ReadyLine {
    /// Parses `line`. Returns `None` if it is not a ready line.
    pub fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line.trim()).ok()
    }

    /// Prints the line and flushes it. Errors are ignored: a service keeps running when its parent no longer reads.
    pub fn print(&self) {
        let mut out = io::stdout().lock();
        if let Ok(line) = serde_json::to_string(self) {
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_line_parses() {
        let line = ReadyLine {
            role: "decode".into(),
            grpc: SocketAddr::from(([127, 0, 0, 1], 1)),
            http: None,
            kv: Some(SocketAddr::from(([127, 0, 0, 1], 2))),
            admin: None,
        };
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(text, r#"{"ready":"decode","grpc":"127.0.0.1:1","kv":"127.0.0.1:2"}"#);
        assert_eq!(ReadyLine::parse(&text), Some(line));
        assert_eq!(ReadyLine::parse("loading weights"), None);
    }
}
