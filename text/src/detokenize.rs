//! Tokens to text, one at a time.

use std::{collections::HashSet, sync::Arc};

use tokenizers::Tokenizer;

use crate::TextError;

/// What a decoder writes for bytes that are no character, or none yet.
const REPLACEMENT: char = '\u{fffd}';

/// Tokens that may wait for the rest of a character before those that can't belong to it any more are let go.
const MAX_PENDING: usize = 16;

/// Turns a stream of tokens into text. What it has given never changes: an incomplete character waits for its rest.
///
/// All pieces and the [`Detokenizer::flush`] joined are what decoding all tokens at once gives. (One exception: under
/// a byte-fallback decoder, decoding at once turns a whole run of byte tokens into replacement characters if any of
/// them is invalid; here the characters already given stay.)
///
/// Cost per token: two decodes of the few tokens since the last complete character.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    special: Arc<HashSet<u32>>,
    skip_special: bool,
    /// Tokens of the piece given last (a token's text may depend on the one before), then those not yet given.
    ids: Vec<u32>,
    /// Of `ids`, those whose text has been given.
    given: usize,
    /// Text of those.
    given_text: String,
}

impl Detokenizer {
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        special: Arc<HashSet<u32>>,
        context: &[u32],
        skip_special: bool,
    ) -> Result<Self, TextError> {
        let keep = |id: &&u32| tokenizer.id_to_token(**id).is_some() && !(skip_special && special.contains(id));
        let mut ids: Vec<u32> = context.iter().rev().filter(keep).take(6).copied().collect();
        ids.reverse();
        let given = ids.len();
        let mut this = Self { tokenizer, special, skip_special, ids, given, given_text: String::new() };
        this.given_text = this.decode(&this.ids)?;
        Ok(this)
    }

    /// Takes the next token; gives the text that is certain now, which may be empty.
    pub fn push(&mut self, token: u32) -> Result<String, TextError> {
        // An id outside the vocabulary has no text. It would only stand between the bytes of a character.
        if self.skip_special && self.special.contains(&token) || self.tokenizer.id_to_token(token).is_none() {
            return Ok(String::new());
        }
        self.ids.push(token);
        let pending = self.ids.len() - self.given;
        let text = self.decode(&self.ids)?;
        let mut certain = self.ids.len();
        if text.ends_with(REPLACEMENT) {
            if pending < MAX_PENDING {
                return Ok(String::new());
            }
            // An incomplete character is at most three bytes long, so it lies in the last three tokens. Whatever
            // decodes to the same text when split there can't be changed by what follows.
            let mut split = None;
            for at in (self.ids.len() - 3..self.ids.len()).rev() {
                if format!("{}{}", self.decode(&self.ids[..at])?, self.decode(&self.ids[at..])?) == text {
                    split = Some(at);
                    break;
                }
            }
            match split {
                Some(at) => certain = at,
                None => return Ok(String::new()),
            }
        }
        let new = self.since_given(certain)?;
        if new.is_empty() && certain == self.ids.len() {
            // Tokens without text need not be decoded again and again.
            if pending >= MAX_PENDING {
                self.ids.truncate(self.given);
            }
            return Ok(new);
        }
        self.ids.drain(..self.given);
        self.given = certain - self.given;
        self.given_text = self.decode(&self.ids[..self.given])?;
        Ok(new)
    }

    /// The end of the stream: what is left, an incomplete character as a replacement character.
    pub fn flush(&mut self) -> Result<String, TextError> {
        let rest = self.since_given(self.ids.len())?;
        self.ids.clear();
        self.given = 0;
        self.given_text.clear();
        Ok(rest)
    }

    /// Text of `ids[given..end]`, in the context of the given ones.
    fn since_given(&self, end: usize) -> Result<String, TextError> {
        let text = self.decode(&self.ids[..end])?;
        match text.strip_prefix(self.given_text.as_str()) {
            Some(new) => Ok(new.to_owned()),
            None => self.decode(&self.ids[self.given..end]),
        }
    }

    fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        if ids.is_empty() {
            return Ok(String::new());
        }
        self.tokenizer.decode(ids, self.skip_special).map_err(|e| TextError::Tokenizer(e.to_string()))
    }
}
