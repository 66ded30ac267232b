//! One streamed answer, measured by the client.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;

use super::load::Request;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest line of a stream: the first event repeats the prompt's ids.
const MOST_LINE_BYTES: usize = 64 << 20;

/// The words that stand for token ids in prompts of text. They are so common that each is one token of most vocabularies.
const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by", "had",
    "not", "are", "but", "from", "or", "have", "an", "they", "which", "one", "you", "were", "her", "all", "she",
    "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "more", "no", "if", "out", "so",
    "said", "what", "up", "its", "about", "into", "than", "them", "can", "only", "other", "new", "some", "could",
    "time", "these",
];

/// How prompts are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Prompts {
    /// Token ids, to /v1/completions.
    Ids,
    /// Words, to /v1/completions.
    Text,
    /// Words as a message, to /v1/chat/completions.
    Chat,
}

/// The API of a server that speaks OpenAI's.
pub struct Api {
    client: reqwest::Client,
    url: String,
    model: String,
    prompts: Prompts,
    timeout: Duration,
}

/// The outcome of one request.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// When it was sent, or should have been sent.
    pub sent: Instant,
    /// Number of prompt tokens: what the server reports, else what was asked for.
    pub prompt_tokens: usize,
    /// How the answer arrived.
    pub result: Result<Arrivals, Failure>,
}

/// How an answer arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrivals {
    /// Number of output tokens.
    pub tokens: usize,
    /// Arrival time of each token if the server reports token ids, else of each event with text.
    pub times: Vec<Instant>,
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
    usage: Option<Usage>,
    error: Option<ApiError>,
}

#[derive(Deserialize)]
struct Choice {
    token_ids: Option<Vec<u32>>,
    text: Option<String>,
    delta: Option<Delta>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    message: String,
}

impl Choice {
    fn has_text(&self) -> bool {
        let Self { token_ids: _, text, delta } = self;
        let delta = delta.iter().flat_map(|delta| [&delta.content, &delta.reasoning_content, &delta.reasoning]);
        delta.chain([text]).flatten().any(|text| !text.is_empty())
    }
}

/// What a stream has brought so far.
#[derive(Default)]
struct Received {
    /// Arrival of each token id.
    ids: Vec<Instant>,
    /// Arrival of each event with text.
    texts: Vec<Instant>,
    usage: Option<Usage>,
}

impl Received {
    fn take(&mut self, event: Event, now: Instant) -> Result<(), Failure> {
        let Event { choices, usage, error } = event;
        if let Some(ApiError { kind, message }) = error {
            return Err(Failure::new(kind.unwrap_or_else(|| "error".into()), message));
        }
        self.usage = usage.or(self.usage);
        self.ids.extend(choices.iter().flat_map(|choice| choice.token_ids.iter().flatten()).map(|_| now));
        self.texts.extend(choices.iter().filter(|choice| choice.has_text()).map(|_| now));
        Ok(())
    }

    /// The arrivals of a complete answer. A server without token ids may not know `ignore_eos`, so its answer may be shorter
    /// than `asked`.
    fn arrivals(self, asked: usize) -> Result<Arrivals, Failure> {
        let Self { ids, texts, usage } = self;
        let (arrivals, least) = match ids.is_empty() {
            false => (Arrivals { tokens: ids.len(), times: ids }, asked),
            true => (Arrivals { tokens: usage.map_or(texts.len(), |usage| usage.completion_tokens), times: texts }, 1),
        };
        match !arrivals.times.is_empty() && (least..=asked).contains(&arrivals.tokens) {
            true => Ok(arrivals),
            false => {
                Err(Failure::new("wrong number of tokens", format!("{} tokens instead of {asked}", arrivals.tokens)))
            }
        }
    }
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
        prompts: Prompts,
        timeout: Duration,
    ) -> Result<Self> {
        // Each request has a connection of its own. A server may close one that is idle at the moment when the next request is
        // sent on it, and llama-server does so after a number of requests.
        let mut builder =
            reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true).pool_max_idle_per_host(0);
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
        let path = match prompts {
            Prompts::Ids | Prompts::Text => "completions",
            Prompts::Chat => "chat/completions",
        };
        let url = format!("{}/v1/{path}", url.trim_end_matches('/'));
        Ok(Self { client, url, model: model.into(), prompts, timeout })
    }

    /// Sends a request and waits until it is complete, fails or times out.
    pub async fn complete(&self, request: Request) -> Outcome {
        let sent = Instant::now();
        let received = match tokio::time::timeout(self.timeout, self.stream(&request)).await {
            Ok(received) => received,
            Err(_) => Err(Failure::new("timeout", format!("not complete after {} s", self.timeout.as_secs_f64()))),
        };
        let usage = received.as_ref().ok().and_then(|received| received.usage);
        let prompt_tokens = usage.map_or(request.prompt.len(), |usage| usage.prompt_tokens);
        Outcome { sent, prompt_tokens, result: received.and_then(|received| received.arrivals(request.output_tokens)) }
    }

    /// The body of a request.
    fn body(&self, request: &Request) -> Value {
        let mut body = json!({
            "model": self.model, "max_tokens": request.output_tokens, "temperature": 0, "ignore_eos": true, "stream": true,
            "stream_options": {"include_usage": true},
            // Every token then has an event, even if it adds no text yet. Servers that do not know this field ignore it.
            "return_token_ids": true,
        });
        let words = || {
            let words = request.prompt.iter().map(|id| WORDS[*id as usize % WORDS.len()]);
            words.collect::<Vec<_>>().join(" ")
        };
        match self.prompts {
            Prompts::Ids => body["prompt"] = json!(request.prompt),
            Prompts::Text => body["prompt"] = json!(words()),
            Prompts::Chat => body["messages"] = json!([{"role": "user", "content": words()}]),
        }
        body
    }

    async fn stream(&self, request: &Request) -> Result<Received, Failure> {
        let mut received = Received::default();
        let body = self.body(request);
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
                return Ok(received);
            }
            let now = Instant::now();
            let event: Event = serde_json::from_str(data).map_err(|e| Failure::caused("broken stream", &e))?;
            received.take(event, now)?;
        }
        Err(Failure::new("broken stream", "it ended without [DONE]"))
    }
}

/// The outcome of an arrival above --max-in-flight.
pub fn not_sent(prompt_tokens: usize, max_in_flight: usize) -> Outcome {
    let failure = Failure::new("not sent", format!("{max_in_flight} requests were in flight already"));
    Outcome { sent: Instant::now(), prompt_tokens, result: Err(failure) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(events: &[Value]) -> Result<Received, Failure> {
        let mut received = Received::default();
        for event in events {
            received.take(serde_json::from_value(event.clone()).unwrap(), Instant::now())?;
        }
        Ok(received)
    }

    #[test]
    fn tokens_are_counted_by_ids_else_by_usage_else_by_events() {
        let count = |events: &[Value], asked| {
            received(events).and_then(|received| received.arrivals(asked)).map(|a| (a.tokens, a.times.len()))
        };
        let ids = |ids: Value| json!({"choices": [{"text": "", "token_ids": ids}]});
        let text = |text: &str| json!({"choices": [{"text": text, "index": 0, "finish_reason": null}]});
        let delta = |delta: Value| json!({"choices": [{"delta": delta}]});
        let usage =
            |n: usize| json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": n, "total_tokens": 9}});
        assert_eq!(count(&[ids(json!([1])), ids(json!([2, 3])), usage(3)], 3), Ok((3, 3)));
        assert_eq!(count(&[text("a"), text(""), text("bc"), usage(3)], 3), Ok((3, 2)));
        assert_eq!(count(&[text("a"), text("bc")], 3), Ok((2, 2)));
        let chat =
            [json!({"role": "assistant", "content": null}), json!({"reasoning_content": "r"}), json!({"content": "c"})];
        assert_eq!(count(&chat.map(delta), 2), Ok((2, 2)));
        // With ids, the answer must be complete.
        assert!(count(&[ids(json!([1]))], 3).unwrap_err().message.starts_with("1 tokens instead of 3"));
        assert!(count(&[text("a"), usage(4)], 3).unwrap_err().message.starts_with("4 tokens instead of 3"));
        assert!(count(&[usage(0)], 3).is_err());
        assert_eq!(received(&[text("a"), usage(1)]).unwrap().usage.unwrap().prompt_tokens, 7);
        for (error, kind) in
            [(json!({"message": "m", "type": "t"}), "t"), (json!({"message": "m", "code": 500}), "error")]
        {
            assert_eq!(received(&[json!({"error": error})]).err(), Some(Failure::new(kind, "m")));
        }
    }

    #[test]
    fn prompts_take_every_form() {
        let body = |prompts| {
            let api = Api::new("http://h/", None, None, "m", prompts, Duration::from_secs(1)).unwrap();
            let body = api.body(&Request { prompt: vec![0, 65, 2], output_tokens: 4 });
            (api.url, body)
        };
        let (url, ids) = body(Prompts::Ids);
        assert_eq!((url.as_str(), &ids["prompt"]), ("http://h/v1/completions", &json!([0, 65, 2])));
        assert_eq!(body(Prompts::Text).1["prompt"], "the of and");
        let (url, chat) = body(Prompts::Chat);
        let messages = json!([{"role": "user", "content": "the of and"}]);
        assert_eq!((url.as_str(), &chat["messages"]), ("http://h/v1/chat/completions", &messages));
        assert_eq!((&chat["max_tokens"], &chat["stream_options"]["include_usage"]), (&json!(4), &json!(true)));
    }
}
