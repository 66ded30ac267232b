//! The output of one sequence, over all attempts.

use std::{sync::Arc, time::Duration};

use overfill_kv::FinishReason;
use overfill_text::{Detokenizer, StopMatcher, TextError};
use tokio::time::Instant;

use crate::{
    attempt::Plan,
    legs::LegTimes,
    request::{Finished, Generation, StopCause, Timings},
};

/// Why a sequence ended, and the request's stop string or stop token that ended it.
pub type End = (FinishReason, Option<StopCause>);

/// A sequence and its output so far.
pub struct Sequence {
    generation: Arc<Generation>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    output: Vec<u32>,
    /// Whether the prompt's log-probabilities still have to be reported.
    prompt_logprobs: bool,
    first_token: Option<Instant>,
    last_token: Instant,
    /// Fingerprint of the full model that computed the first token.
    pub producer: Option<String>,
    /// Nodes, migrations and times of the sequence. Times are filled in at the end.
    pub timings: Timings,
}

impl Sequence {
    /// Creates a sequence without output.
    pub fn new(generation: Arc<Generation>) -> Result<Self, TextError> {
        let (text, prompt) = (&generation.model.text, &generation.prompt);
        let detokenizer = match generation.skip_special {
            true => text.detokenizer_showing(prompt, &generation.shown_special)?,
            false => text.detokenizer(prompt, false)?,
        };
        Ok(Self {
            detokenizer,
            stops: StopMatcher::new(generation.stop.clone(), generation.include_stop),
            output: Vec::new(),
            producer: None,
            prompt_logprobs: generation.prompt_logprobs,
            first_token: None,
            last_token: generation.arrived,
            timings: Timings {
                queue_seconds: generation.arrived.elapsed().as_secs_f64(),
                mode: generation.mode(),
                ..Timings::default()
            },
            generation,
        })
    }

    /// The plan of the next attempt. `avoid`: keys of nodes to avoid.
    pub fn plan(&self, avoid: Vec<u64>, progress_timeout: Duration) -> Plan {
        let generation = &self.generation;
        let tokens = match self.output.is_empty() {
            true => generation.prompt.clone(),
            false => generation.prompt.iter().chain(&self.output).copied().collect(),
        };
        Plan {
            generation: generation.clone(),
            tokens,
            generated: self.output.len() as u32,
            // Scoring a prompt without output also generates one token, which is discarded.
            remaining: (generation.max_tokens - self.output.len() as u32).max(1),
            prompt_logprobs: self.prompt_logprobs,
            producer: self.producer.clone(),
            avoid,
            progress_timeout,
        }
    }

    /// Records that the prompt's log-probabilities were reported, so that later attempts omit them.
    pub fn scored(&mut self) {
        self.prompt_logprobs = false;
    }

    /// Adds a token. Returns the text that has become final, and the end if this is the last token.
    pub fn push(&mut self, id: u32) -> Result<(String, Option<End>), TextError> {
        self.last_token = Instant::now();
        self.first_token.get_or_insert(self.last_token);
        self.output.push(id);
        if self.generation.stop_token_ids.contains(&id) {
            let own = !self.generation.model.eos_token_ids.contains(&id);
            return Ok((String::new(), Some((FinishReason::Stop, own.then_some(StopCause::Token(id))))));
        }
        let text = self.detokenizer.push(id)?;
        if self.output.len() <= self.generation.sampling.min_tokens as usize {
            // As in vLLM, stop texts count only after the minimum.
            return Ok((text, self.full()));
        }
        let (text, found) = self.stops.push(&text);
        if let Some(found) = found {
            let cause = StopCause::Text(self.generation.stop[found.stop].clone());
            return Ok((text, Some((FinishReason::Stop, Some(cause)))));
        }
        Ok((text, self.full()))
    }

    /// The tokens so far.
    pub fn output(&self) -> &[u32] {
        &self.output
    }

    /// The end of an output that has its maximum length.
    fn full(&self) -> Option<End> {
        let full = self.output.len() as u32 >= self.generation.max_tokens;
        full.then_some((FinishReason::Length, None))
    }

    /// Ends the sequence.
    pub fn finish(&mut self, (reason, stop): End, legs: LegTimes) -> Result<Finished, TextError> {
        let text = match stop {
            Some(StopCause::Text(_)) => String::new(),
            // An incomplete character that was held back becomes a replacement character.
            Some(StopCause::Token(_)) | None => self.stops.push(&self.detokenizer.flush()?).0 + &self.stops.flush(),
        };
        let since = |at: Instant| (at - self.generation.arrived).as_secs_f64();
        let completion_tokens = self.output.len() as u32;
        let mut timings = Timings { total_seconds: since(Instant::now()), legs, ..self.timings.clone() };
        if let Some(first) = self.first_token {
            timings.ttft_seconds = since(first);
            timings.mean_itl_seconds =
                (self.last_token - first).as_secs_f64() / f64::from(completion_tokens.max(2) - 1);
        }
        let prompt_tokens = self.generation.prompt.len() as u32;
        Ok(Finished { reason, stop, text, prompt_tokens, completion_tokens, timings })
    }
}
