//! Incremental detokenization.

use std::{collections::HashSet, sync::Arc};

use tokenizers::Tokenizer;

use crate::TextError;

/// The character that decoders write for bytes that are invalid or incomplete UTF-8.
const REPLACEMENT: char = '\u{fffd}';

/// Pending tokens after which [`Detokenizer::push`] returns the text of tokens that can't be part of the incomplete
/// character at the end.
const MAX_PENDING: usize = 16;

/// Turns a stream of tokens into text. Returned text never changes: an incomplete character is held back until it is
/// complete.
///
/// The returned pieces and [`Detokenizer::flush`] concatenate to the result of decoding all tokens at once. There is one
/// exception: a byte-fallback decoder turns a whole run of byte tokens into replacement characters if any of them is
/// invalid. This type does not retract characters of the run that it has already returned.
///
/// Cost per token: two decodes of the few tokens since the last complete character.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Tokens without text.
    skipped: Arc<HashSet<u32>>,
    /// Tokens of the last returned piece, kept because a token's text may depend on the token before it, then pending
    /// tokens.
    ids: Vec<u32>,
    /// Number of leading `ids` whose text has been returned.
    given: usize,
    /// Text of `ids[..given]`.
    given_text: String,
}

impl Detokenizer {
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        skipped: Arc<HashSet<u32>>,
        context: &[u32],
    ) -> Result<Self, TextError> {
        let keep = |id: &&u32| tokenizer.id_to_token(**id).is_some() && !skipped.contains(id);
        let mut ids: Vec<u32> = context.iter().rev().filter(keep).take(6).copied().collect();
        ids.reverse();
        let given = ids.len();
        let mut this = Self { tokenizer, skipped, ids, given, given_text: String::new() };
        this.given_text = this.decode(&this.ids)?;
        Ok(this)
    }

    /// Adds a token and returns the text that has become final, which may be empty.
    pub fn push(&mut self, token: u32) -> Result<String, TextError> {
        // An id outside the vocabulary has no text. Keeping it would separate the bytes of a character.
        if self.skipped.contains(&token) || self.tokenizer.id_to_token(token).is_none() {
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
            // An incomplete character has at most three bytes, so it is within the last three tokens. If splitting the
            // tokens there decodes to the same text, later tokens can't change the text before the split.
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
            // Drop tokens without text, so that they are not decoded again for every later token.
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

    /// Ends the stream and returns the remaining text. An incomplete character becomes a replacement character.
    pub fn flush(&mut self) -> Result<String, TextError> {
        let rest = self.since_given(self.ids.len())?;
        self.ids.clear();
        self.given = 0;
        self.given_text.clear();
        Ok(rest)
    }

    /// Text of `ids[given..end]`, decoded in the context of `ids[..given]`.
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
        // `ids` has no token that is to be skipped.
        self.tokenizer.decode(ids, false).map_err(|e| TextError::Tokenizer(e.to_string()))
    }
}
