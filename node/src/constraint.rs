//! Which tokens of a request's output may come next: its grammar and its allowed tokens.

use std::sync::Arc;

use overfill_kv::SamplingParams;
use overfill_model::TokenMask;
use overfill_proto::InvalidField;
use overfill_text::{GrammarError, GrammarMatcher, Grammars, TextFiles};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tonic::Status;

/// Grammars that are compiled at the same time. Each takes a thread.
const COMPILING: usize = 2;

/// Makes the constraints of a node's requests.
#[derive(Clone, Debug)]
pub struct Constraints {
    grammars: Arc<Grammars>,
    threads: Arc<Semaphore>,
    vocab_size: usize,
    ends: Arc<[u32]>,
}

impl Constraints {
    /// For a model with these files. `ends`: its end-of-text tokens.
    pub fn new(files: Arc<TextFiles>, vocab_size: usize, ends: &[u32]) -> Self {
        let grammars = Arc::new(Grammars::new(files, vocab_size, ends));
        Self { grammars, threads: Arc::new(Semaphore::new(COMPILING)), vocab_size, ends: ends.into() }
    }

    /// The constraint of a request whose output so far is `output`, ready for the next token. `None` if every token may
    /// come next, apart from what the sampler knows by itself.
    ///
    /// # Errors
    /// The grammar is invalid or too complex, `output` does not match it, or the deadline has passed.
    pub async fn begin(
        &self,
        sampling: &SamplingParams,
        output: &[u32],
        deadline: Instant,
    ) -> Result<Option<Constraint>, Status> {
        let invalid = |e: &GrammarError| Status::from(InvalidField::new("sampling.grammar", "valid", e));
        let only = match sampling.allowed_token_ids.as_slice() {
            [] => None,
            ids => Some(self.set(ids, sampling.grammar.is_some())),
        };
        let matcher = match sampling.grammar.clone() {
            None => None,
            Some(grammar) => {
                let late = |_| Status::deadline_exceeded("the deadline of the request has passed");
                let lost = |e: &dyn std::error::Error| Status::internal(format!("compiling a grammar: {e}"));
                let thread = timeout_at(deadline, self.threads.clone().acquire_owned()).await.map_err(late)?;
                let thread = thread.map_err(|e| lost(&e))?;
                let (grammars, output) = (self.grammars.clone(), output.to_vec());
                let compile = tokio::task::spawn_blocking(move || {
                    let _thread = thread;
                    let mut matcher = grammars.matcher(&grammar)?;
                    output.iter().try_for_each(|token| matcher.accept(*token))?;
                    Ok(matcher)
                });
                let compiled = timeout_at(deadline, compile).await.map_err(late)?.map_err(|e| lost(&e))?;
                Some(compiled.map_err(|e| invalid(&e))?)
            }
        };
        if only.is_none() && matcher.is_none() {
            return Ok(None);
        }
        let mut constraint = Constraint { only, matcher, allowed: Vec::new() };
        constraint.prepare().map_err(|e| invalid(&e))?;
        Ok(Some(constraint))
    }

    /// The set of these tokens. With a grammar, the end belongs to it.
    fn set(&self, ids: &[u32], with_ends: bool) -> Vec<u32> {
        let mut words = vec![0; self.vocab_size.div_ceil(u32::BITS as usize)];
        let ends = self.ends.iter().filter(|_| with_ends);
        for id in ids.iter().chain(ends) {
            if let Some(word) = words.get_mut((id / u32::BITS) as usize) {
                *word |= 1 << (id % u32::BITS);
            }
        }
        words
    }
}

/// The tokens that may come next in one output.
#[derive(Clone, Debug)]
pub struct Constraint {
    /// Set of the tokens that the request allows; `None` allows all.
    only: Option<Vec<u32>>,
    matcher: Option<GrammarMatcher>,
    /// Set of the tokens that may come next.
    allowed: Vec<u32>,
}

impl Constraint {
    /// The next token of the output.
    ///
    /// # Errors
    /// The token was not allowed, or the grammar is too complex.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        self.matcher.as_mut().map_or(Ok(()), |matcher| matcher.accept(token))
    }

    /// Finds out which tokens may come next.
    ///
    /// # Errors
    /// No token may come next, or the grammar is too complex.
    pub fn prepare(&mut self) -> Result<(), GrammarError> {
        let Self { only, matcher, allowed } = self;
        match (matcher, only) {
            (Some(matcher), only) => {
                *allowed = matcher.allowed()?;
                let only = only.iter().flatten();
                allowed.iter_mut().zip(only).for_each(|(word, only)| *word &= only);
            }
            (None, Some(only)) => allowed.clone_from(only),
            (None, None) => {}
        }
        match allowed.iter().all(|word| *word == 0) {
            true => Err(GrammarError::new("it allows none of allowed_token_ids")),
            false => Ok(()),
        }
    }

    /// The tokens that may come next, after [`Self::prepare`].
    pub fn mask(&self) -> TokenMask<'_> {
        TokenMask { words: &self.allowed }
    }
}
