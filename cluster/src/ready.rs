//! How a parent process learns that a service is up, and where.

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
    /// Where gRPC is served.
    pub grpc: SocketAddr,
    /// Where the OpenAI API is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<SocketAddr>,
    /// Where KV is received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<SocketAddr>,
    /// Where `/startup`, `/live`, `/ready` and `/metrics` are served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<SocketAddr>,
}

impl ReadyLine {
    /// The line; `None` if `line` is another one.
    pub fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line.trim()).ok()
    }

    /// Prints it. A parent that has gone is no reason to stop.
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
