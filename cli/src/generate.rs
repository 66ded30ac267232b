//! `overfill generate`: one prompt in, streamed text on stdout, one line of timings on stderr.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use overfill_kv::{Mode, Role};
use overfill_proto::v1::{self, generate_event::Event, generate_request::Prompt};

use crate::router_client::{Client, RouterUrl, refusal};
use crate::text;

/// Longest time between two events of a streamed answer.
const SILENCE: Duration = Duration::from_secs(600);

const AFTER_HELP: &str = "\
The text goes to standard output, the timings to standard error.

Examples, while a cluster runs (overfill up):
  overfill generate \"kim : molde , nurse , mice , 16 . ana : lima , baker , dog , 3 . ben : kyoto , cook , goat , 12 . list everyone by pet ?\"
  overfill generate --chat --max-tokens 32 --temperature 0.7 --seed 1 \"Hello\"
  echo \"A prompt\" | overfill generate --json";

/// One completion.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct GenerateArgs {
    /// Prompt [default: standard input, unless --token-ids is set]
    prompt: Option<String>,
    /// Prompt as comma-separated token ids.
    #[arg(long, value_delimiter = ',', value_name = "ID", conflicts_with = "prompt", help_heading = "Prompt")]
    token_ids: Vec<u32>,
    /// Send the prompt as a user message through the model's chat template.
    #[arg(long, conflicts_with = "token_ids", help_heading = "Prompt")]
    chat: bool,
    /// Fail unless a prefill node generated the first token, and decode nodes all others. For checks of a cluster.
    #[arg(long, help_heading = "Output")]
    check_stages: bool,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    router: RouterUrl,
}

/// Options of both `generate` and `chat`.
#[derive(Args)]
pub struct Options {
    /// Name of the served model. Not needed if the router serves only one.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME", help_heading = "Sampling")]
    model: String,
    /// Maximum number of tokens to generate. 0 means as many as the context holds.
    #[arg(long, default_value_t = 256, value_name = "TOKENS", help_heading = "Sampling")]
    max_tokens: u32,
    /// Sampling temperature. 0 means greedy decoding.
    #[arg(long, default_value_t = 0.0, help_heading = "Sampling")]
    temperature: f64,
    /// Sample from the most likely tokens whose probabilities add up to this value.
    #[arg(long, default_value_t = 1.0, value_name = "PROBABILITY", help_heading = "Sampling")]
    top_p: f64,
    /// Sample from this many of the most likely tokens. 0 means all tokens.
    #[arg(long, default_value_t = 0, value_name = "TOKENS", help_heading = "Sampling")]
    top_k: u32,
    /// Drop tokens less likely than this fraction of the most likely token's probability.
    #[arg(long, default_value_t = 0.0, value_name = "FRACTION", help_heading = "Sampling")]
    min_p: f64,
    /// Random seed. The same seed gives the same text.
    #[arg(long, default_value_t = 0, help_heading = "Sampling")]
    seed: u64,
    /// Stop text: generation ends before it. May be repeated.
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    stop: Vec<String>,
    /// Continue past the end-of-text token.
    #[arg(long, help_heading = "Sampling")]
    ignore_eos: bool,
    /// What the full model does after the first token: draft (nothing), refresh or exact [default: the router's]
    #[arg(long, value_name = "MODE", help_heading = "Sampling")]
    mode: Option<Mode>,
    /// Print the timings as one line of JSON.
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// The result of a request.
pub struct Answer {
    /// The whole text.
    pub text: String,
    spans: Vec<Span>,
    finished: v1::GenerateFinished,
    /// Measured by this client, including the network.
    ttft_seconds: f64,
    itl_seconds: f64,
}

/// Consecutive tokens from one model.
#[derive(Debug, PartialEq)]
struct Span {
    first: usize,
    last: usize,
    model: String,
    /// `None` if the router did not report it.
    stage: Option<Role>,
}

/// Runs the subcommand.
pub async fn run(args: GenerateArgs) -> Result<()> {
    let prompt = if args.token_ids.is_empty() {
        let text = args.prompt.map_or_else(read_prompt, Ok)?;
        if args.chat {
            Prompt::Messages(v1::Messages { messages: vec![message("user", text)], ..v1::Messages::default() })
        } else {
            Prompt::Text(text)
        }
    } else {
        Prompt::TokenIds(v1::TokenIds { ids: args.token_ids })
    };
    let mut client = args.router.connect().await?;
    let answer = stream(&mut client, prompt, &args.options).await?;
    answer.print_timings(args.options.json);
    if args.check_stages {
        check_stages(&answer.spans)?;
    }
    Ok(())
}

/// Checks that a prefill node generated the first token, and decode nodes at least one more and all others.
fn check_stages(spans: &[Span]) -> Result<()> {
    let right = match spans {
        [first, rest @ ..] => {
            first.stage == Some(Role::Prefill)
                && first.last == 1
                && !rest.is_empty()
                && rest.iter().all(|span| span.stage == Some(Role::Decode))
        }
        [] => false,
    };
    if !right {
        let spans: Vec<String> = spans.iter().map(Span::describe).collect();
        bail!(
            "the first token must come from a prefill node and the others from decode nodes, got {}",
            spans.join(", ")
        );
    }
    Ok(())
}

fn read_prompt() -> Result<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("reading the prompt from standard input")?;
    Ok(text)
}

/// A message of a conversation.
pub fn message(role: &str, content: String) -> v1::Message {
    v1::Message { role: role.into(), content, ..v1::Message::default() }
}

/// Sends one request and prints the text as it arrives.
pub async fn stream(client: &mut Client, prompt: Prompt, options: &Options) -> Result<Answer> {
    let start = Instant::now();
    let mut events = client.generate(options.request(prompt)).await.map_err(refusal)?.into_inner();
    let (mut text, mut spans, mut tokens) = (String::new(), Vec::new(), 0);
    let (mut first, mut last) = (start, start);
    loop {
        let event = tokio::time::timeout(SILENCE, events.message())
            .await
            .with_context(|| format!("no token for {} s", SILENCE.as_secs()))?
            .map_err(refusal)?;
        match event.and_then(|e| e.event) {
            // Never asked for.
            Some(Event::PromptLogprobs(_)) => {}
            Some(Event::Token(token)) => {
                tokens += 1;
                last = Instant::now();
                if tokens == 1 {
                    first = last;
                }
                extend(&mut spans, tokens, &token);
                emit(&token.text)?;
                text += &token.text;
            }
            Some(Event::Finished(finished)) => {
                emit(&finished.text)?;
                text += &finished.text;
                println!();
                let itl_seconds = (last - first).as_secs_f64() / (tokens.max(2) - 1) as f64;
                return Ok(Answer { text, spans, finished, ttft_seconds: (first - start).as_secs_f64(), itl_seconds });
            }
            None => bail!("the router ended the stream without finishing the answer"),
        }
    }
}

fn emit(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("writing the answer")
}

fn extend(spans: &mut Vec<Span>, position: usize, token: &v1::GeneratedToken) {
    let stage = Role::try_from(token.stage()).ok();
    match spans.last_mut() {
        Some(span) if span.model == token.model && span.stage == stage => span.last = position,
        Some(_) | None => spans.push(Span { first: position, last: position, model: token.model.clone(), stage }),
    }
}

impl Options {
    fn request(&self, prompt: Prompt) -> v1::GenerateRequest {
        let Self { model, max_tokens, temperature, top_p, top_k, min_p, seed, stop, ignore_eos, mode, json: _ } = self;
        v1::GenerateRequest {
            model: model.clone(),
            prompt: Some(prompt),
            sampling: Some(v1::SamplingParams {
                temperature: *temperature,
                top_p: *top_p,
                top_k: *top_k,
                min_p: *min_p,
                seed: *seed,
                repetition_penalty: 1.0,
                ..Default::default()
            }),
            max_tokens: *max_tokens,
            stop: stop.clone(),
            ignore_eos: *ignore_eos,
            mode: mode.map_or(v1::Mode::Unspecified, Into::into).into(),
            ..Default::default()
        }
    }

    /// Returns whether timings are printed as JSON.
    pub fn json(&self) -> bool {
        self.json
    }
}

impl Answer {
    /// Prints one line on stderr: the timings, and which model generated which tokens.
    pub fn print_timings(&self, json: bool) {
        eprintln!("{}", if json { self.json() } else { self.line() });
    }

    fn line(&self) -> String {
        let timings = self.finished.timings.clone().unwrap_or_default();
        let handoff = timings.handoff.unwrap_or_default();
        let spans: Vec<String> = self.spans.iter().map(Span::describe).collect();
        format!(
            "[{} prompt tokens ({} cached), {} generated | TTFT {} | ITL {} | handoff {} in {} ({} not hidden) | {}{}]",
            self.finished.prompt_tokens,
            timings.prefill_cached_tokens,
            self.finished.completion_tokens,
            text::seconds(self.ttft_seconds),
            text::seconds(self.itl_seconds),
            text::bytes(handoff.bytes),
            text::seconds(handoff.seconds),
            text::seconds(handoff.exposed_seconds),
            match timings.drafted_tokens {
                0 => spans.join(", "),
                drafted => format!("{} of {drafted} drafts accepted", timings.accepted_tokens),
            },
            if timings.migrations > 0 { format!(" | {} migrations", timings.migrations) } else { String::new() },
        )
    }

    fn json(&self) -> String {
        let timings = self.finished.timings.clone().unwrap_or_default();
        let handoff = timings.handoff.unwrap_or_default();
        let spans: Vec<_> = self
            .spans
            .iter()
            .map(|s| serde_json::json!({"first": s.first, "last": s.last, "model": s.model, "stage": s.stage()}))
            .collect();
        serde_json::json!({
            "prompt_tokens": self.finished.prompt_tokens,
            "completion_tokens": self.finished.completion_tokens,
            "prefill_cached_tokens": timings.prefill_cached_tokens,
            "decode_held_tokens": timings.decode_held_tokens,
            "queue_seconds": timings.queue_seconds,
            "ttft_seconds": self.ttft_seconds,
            "itl_seconds": self.itl_seconds,
            "total_seconds": timings.total_seconds,
            "handoff_bytes": handoff.bytes,
            "handoff_seconds": handoff.seconds,
            "handoff_exposed_seconds": handoff.exposed_seconds,
            "prefill_node": timings.prefill_node,
            "decode_node": timings.decode_node,
            "migrations": timings.migrations,
            "drafted_tokens": timings.drafted_tokens,
            "accepted_tokens": timings.accepted_tokens,
            "tokens": spans,
        })
        .to_string()
    }
}

impl Span {
    fn stage(&self) -> &'static str {
        self.stage.map_or("unknown", Role::as_str)
    }

    fn describe(&self) -> String {
        let which = if self.first == self.last {
            format!("token {}", self.first)
        } else {
            format!("{}-{}", self.first, self.last)
        };
        format!("{which}: {} ({})", self.model, self.stage())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_one_model_are_one_span() {
        let token = |model: &str, stage| v1::GeneratedToken {
            model: model.into(),
            stage: v1::Role::from(stage).into(),
            ..Default::default()
        };
        let mut spans = Vec::new();
        extend(&mut spans, 1, &token("big", Role::Prefill));
        extend(&mut spans, 2, &token("small", Role::Decode));
        extend(&mut spans, 3, &token("small", Role::Decode));
        let lines: Vec<String> = spans.iter().map(Span::describe).collect();
        assert_eq!(lines, ["token 1: big (prefill)", "2-3: small (decode)"]);
        check_stages(&spans).unwrap();
        assert!(check_stages(&spans[..1]).is_err() && check_stages(&spans[1..]).is_err() && check_stages(&[]).is_err());
    }
}
