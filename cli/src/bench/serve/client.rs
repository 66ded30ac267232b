//! One streamed completion, measured by the client.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;

use super::load::Request;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest line of a stream: the first event repeats the prompt's ids.
const MOST_LINE_BYTES: usize = 64 << 20;

/// The OpenAI API of a router.
pub struct Api {
    client: reqwest::Client,
    url: String,
    model: String,
    timeout: Duration,
}

/// The outcome of one request.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// When it was sent, or should have been sent.
    pub sent: Instant,
    /// Number of prompt tokens.
    pub prompt_tokens: usize,
    /// Arrival time of each output token.
    pub result: Result<Vec<Instant>, Failure>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The kind of failure. Failures are counted by kind.
    pub kind: String,
    /// Details.
    pub message: String,
}

/// The part of a stream event that is needed here.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    error: Option<ApiError>,
}

#[derive(Deserialize)]
struct Choice {
    token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(rename = "type")]
    kind: String,
    message: String,
}

impl Failure {
    fn new(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind: kind.into(), message: message.into() }
    }

    /// A failure with all causes of `error`.
    fn caused(kind: &str, error: &dyn Error) -> Self {
        Self::new(kind, overfill_cluster::process::one_line(error))
    }
}

impl Api {
    /// `url` is the server's URL without `/v1`. For https, `ca` is a file with the CA certificates. `authorization` is the
    /// value of that header.
    pub fn new(
        url: &str,
        ca: Option<&Path>,
        authorization: Option<String>,
        model: &str,
        timeout: Duration,
    ) -> Result<Self> {
        let mut builder = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
        if url.starts_with("https://") {
            let ca =
                ca.with_context(|| format!("{url} needs --tls-ca: the CA that signed the server's certificate"))?;
            let pem = std::fs::read(ca).with_context(|| format!("reading {}", ca.display()))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .with_context(|| format!("{}: certificates (PEM) are needed", ca.display()))?;
            builder = certificates.into_iter().fold(builder, reqwest::ClientBuilder::add_root_certificate);
        }
        if let Some(authorization) = authorization {
            let mut value =
                HeaderValue::try_from(authorization).context("the API key must consist of printable characters")?;
            value.set_sensitive(true);
            builder = builder.default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)]));
        }
        let client = builder.build().context("preparing the HTTP client")?;
        let url = format!("{}/v1/completions", url.trim_end_matches('/'));
        Ok(Self { client, url, model: model.into(), timeout })
    }

    /// Sends a request and waits until it is complete, fails or times out.
    pub async fn complete(&self, request: Request) -> Outcome {
        let sent = Instant::now();
        let mut tokens = Vec::with_capacity(request.output_tokens);
        let result = match tokio::time::timeout(self.timeout, self.stream(&request, &mut tokens)).await {
            Ok(Ok(())) if tokens.len() == request.output_tokens => Ok(tokens),
            Ok(Ok(())) => Err(Failure::new(
                "wrong number of tokens",
                format!("{} token ids instead of {}", tokens.len(), request.output_tokens),
            )),
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure::new("timeout", format!("not complete after {} s", self.timeout.as_secs_f64()))),
        };
        Outcome { sent, prompt_tokens: request.prompt.len(), result }
    }

    async fn stream(&self, request: &Request, tokens: &mut Vec<Instant>) -> Result<(), Failure> {
        let body = json!({
            "model": self.model, "prompt": request.prompt, "max_tokens": request.output_tokens, "temperature": 0,
            "ignore_eos": true, "stream": true,
            // Every token then has an event, even if it adds no text yet.
            "return_token_ids": true,
        });
        let sending = self.client.post(&self.url).json(&body).send().await;
        let response =
            sending.map_err(|e| Failure::caused(if e.is_connect() { "no connection" } else { "HTTP" }, &e))?;
        let status = response.status();
        if !status.is_success() {
            let message = response.text().await.unwrap_or_default();
            return Err(Failure::new(format!("HTTP {}", status.as_u16()), message));
        }
        let bytes = response.bytes_stream().map_err(std::io::Error::other);
        let mut lines = FramedRead::new(StreamReader::new(bytes), LinesCodec::new_with_max_length(MOST_LINE_BYTES));
        while let Some(line) = lines.next().await {
            let line = line.map_err(|e| Failure::caused("broken stream", &e))?;
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Ok(());
            }
            let now = Instant::now();
            let event: Event = serde_json::from_str(data).map_err(|e| Failure::caused("broken stream", &e))?;
            if let Some(error) = event.error {
                return Err(Failure::new(error.kind, error.message));
            }
            let ids = event.choices.iter().flat_map(|choice| choice.token_ids.iter().flatten());
            tokens.extend(ids.map(|_| now));
        }
        Err(Failure::new("broken stream", "it ended without [DONE]"))
    }
}

/// The outcome of an arrival above --max-in-flight.
pub fn not_sent(prompt_tokens: usize, max_in_flight: usize) -> Outcome {
    let failure = Failure::new("not sent", format!("{max_in_flight} requests were in flight already"));
    Outcome { sent: Instant::now(), prompt_tokens, result: Err(failure) }
}
