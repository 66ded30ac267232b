//! A client for completions over HTTP.

use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::Router;

/// Maximum time without data from the server.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Largest difference of a log-probability between two runs of the same request, in f32.
const SAME: f32 = 1e-4;

/// Body of a request.
#[derive(Clone, Debug)]
pub struct Request(pub Value);

/// An answer, or the first choice of several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completion {
    /// Generated token ids.
    pub tokens: Vec<u32>,
    /// Log-probabilities of the tokens. Empty unless requested.
    pub logprobs: Vec<f32>,
    /// Most likely tokens of each step, best first.
    pub top: Vec<Vec<(u32, f32)>>,
    /// Generated text.
    pub text: String,
    /// `stop` or `length`.
    pub finish_reason: String,
}

impl Request {
    /// A greedy request over token ids that reports the generated ids.
    pub fn tokens(prompt: &[u32], max_tokens: u32) -> Self {
        Self(json!({
            "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": true, "return_token_ids": true,
        }))
    }

    /// A greedy request over text that reports the generated ids.
    pub fn text(prompt: &str, max_tokens: u32) -> Self {
        Self::tokens(&[], max_tokens).with("prompt", json!(prompt))
    }

    /// Sets a field.
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.0[field] = value;
        self
    }

    /// Sets fields to their values in another request.
    pub fn with_all(mut self, other: &Self, fields: &[&str]) -> Self {
        for field in fields {
            self.0[*field] = other.0[*field].clone();
        }
        self
    }

    /// Sends the request to `/v1/completions` and waits for the whole answer.
    pub fn send(&self, router: &impl Router) -> Result<Completion> {
        let body = post(router, "/v1/completions", &self.0)?;
        Completion::parse(&body)
    }

    /// Sends the request to `/v1/completions` and streams the answer.
    pub fn stream(&self, router: &impl Router) -> Result<Events> {
        let body = self.clone().with("stream", json!(true)).0;
        let response = ureq::post(&format!("{}/v1/completions", router.http()))
            .timeout(TIMEOUT)
            .send_json(body)
            .map_err(explain)?;
        Ok(Events(BufReader::new(response.into_reader())))
    }
}

/// Posts JSON and returns the answer. Fails with the server's message unless the request succeeded.
pub fn post(router: &impl Router, path: &str, body: &Value) -> Result<Value> {
    let response = ureq::post(&format!("{}{path}", router.http())).timeout(TIMEOUT).send_json(body).map_err(explain)?;
    response.into_json().context("the answer is not JSON")
}

/// Posts arbitrary bytes as JSON and returns the status and body of the answer.
pub fn post_raw(router: &impl Router, path: &str, body: &[u8]) -> Result<(u16, String)> {
    let request = ureq::post(&format!("{}{path}", router.http())).timeout(TIMEOUT);
    let response = match request.set("content-type", "application/json").send_bytes(body) {
        Ok(response) | Err(ureq::Error::Status(_, response)) => response,
        Err(error) => return Err(error.into()),
    };
    Ok((response.status(), response.into_string()?))
}

fn explain(error: ureq::Error) -> anyhow::Error {
    match error {
        ureq::Error::Status(code, response) => {
            anyhow::anyhow!("HTTP {code}: {}", response.into_string().unwrap_or_default())
        }
        other => other.into(),
    }
}

/// A stream of server-sent events. Dropping it closes the connection.
pub struct Events(BufReader<Box<dyn Read + Send + Sync>>);

impl Iterator for Events {
    type Item = Result<Value>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = String::new();
        loop {
            line.clear();
            match self.0.read_line(&mut line) {
                Ok(0) => return Some(Err(anyhow::anyhow!("the stream ended without [DONE]"))),
                Ok(_) => {}
                Err(error) => return Some(Err(error.into())),
            }
            match line.trim_end().strip_prefix("data: ") {
                Some("[DONE]") => return None,
                Some(data) => return Some(serde_json::from_str(data).with_context(|| format!("not JSON: {data:?}"))),
                None => {}
            }
        }
    }
}

impl Events {
    /// Collects the stream into one answer. Calls `on_event` for each event.
    pub fn collect_completion(self, mut on_event: impl FnMut()) -> Result<Completion> {
        let mut all = Completion::default();
        for event in self {
            let event = event?;
            on_event();
            if event["choices"].as_array().is_some_and(|choices| !choices.is_empty()) {
                all.extend(Completion::parse(&event)?);
            }
        }
        Ok(all)
    }
}

impl Completion {
    /// Parses the first choice of a body or of an event.
    pub fn parse(body: &Value) -> Result<Self> {
        if !body["error"].is_null() {
            bail!("the server answered with an error: {body}");
        }
        let choice = &body["choices"][0];
        let mut completion = Self {
            text: choice["text"].as_str().with_context(|| format!("no text in {body}"))?.to_owned(),
            finish_reason: choice["finish_reason"].as_str().unwrap_or_default().to_owned(),
            ..Self::default()
        };
        for id in choice["token_ids"].as_array().into_iter().flatten() {
            completion.tokens.push(number(id)?);
        }
        let logprobs = &choice["logprobs"];
        for value in logprobs["token_logprobs"].as_array().into_iter().flatten() {
            completion.logprobs.push(value.as_f64().map_or(f32::NAN, |v| v as f32));
        }
        for entry in logprobs["top_logprobs"].as_array().into_iter().flatten() {
            completion.top.push(top(entry)?);
        }
        Ok(completion)
    }

    /// Checks that two answers to the same request are equal. Log-probabilities may differ by rounding, which depends
    /// on the chunks of the prompt and therefore on the state of the prefix cache.
    pub fn check_same(&self, other: &Self) -> Result<()> {
        let exact = |c: &Self| (c.tokens.clone(), c.text.clone(), c.finish_reason.clone(), c.top.len());
        ensure!(exact(self) == exact(other), "{:?} instead of {:?}", exact(self), exact(other));
        ensure!(self.logprobs.len() == other.logprobs.len(), "another number of log-probabilities");
        for (i, (a, b)) in self.logprobs.iter().zip(&other.logprobs).enumerate() {
            ensure!((a - b).abs() <= SAME, "token {i}: log-probability {a} instead of {b}");
        }
        Ok(())
    }

    fn extend(&mut self, more: Self) {
        let Self { tokens, logprobs, top, text, finish_reason } = more;
        self.tokens.extend(tokens);
        self.logprobs.extend(logprobs);
        self.top.extend(top);
        self.text += &text;
        if !finish_reason.is_empty() {
            self.finish_reason = finish_reason;
        }
    }
}

fn number(value: &Value) -> Result<u32> {
    value.as_u64().and_then(|n| u32::try_from(n).ok()).with_context(|| format!("{value} is not a token id"))
}

/// Parses `{"token_id:17": -0.5, ...}`, best first.
fn top(entry: &Value) -> Result<Vec<(u32, f32)>> {
    let mut top = Vec::new();
    for (token, logprob) in entry.as_object().into_iter().flatten() {
        let id = token.strip_prefix("token_id:").with_context(|| format!("{token:?} is not of the form token_id:N"))?;
        top.push((id.parse()?, logprob.as_f64().context("a log-probability that is not a number")? as f32));
    }
    top.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(top)
}
