//! What constrains an output besides its length and its stop texts: grammars, bad words, minimum length.

use overfill_kv::{
    Grammar, SamplingParams,
    sampling::{MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_GRAMMAR_BYTES},
};
use overfill_text::TextModel;

use crate::{GenerateError, prompt::TextPool, request::Lifetime};

/// A word may be two sequences of tokens: at the beginning of a text and behind a space.
const MAX_WORDS: usize = MAX_BAD_WORDS / 2;

/// Checks the grammar of a request, by compiling it without a vocabulary. Errors name `field`, where the request has it.
pub async fn check_grammar(
    pool: &TextPool,
    field: &str,
    grammar: &Grammar,
    lifetime: Lifetime,
) -> Result<(), GenerateError> {
    if grammar.bytes() > MAX_GRAMMAR_BYTES {
        return Err(GenerateError::limit(field, format!("at most {MAX_GRAMMAR_BYTES} bytes"), grammar.bytes()));
    }
    let checked = pool.check_grammar(grammar.clone(), lifetime).await?;
    checked.map_err(|e| GenerateError::invalid(field, format!("{field}: {e}")))
}

/// Checks the minimum length, and sets the tokens that it holds back.
pub fn hold_back_ends(
    sampling: &mut SamplingParams,
    stop_token_ids: &[u32],
    max_tokens: u32,
) -> Result<(), GenerateError> {
    if sampling.min_tokens > max_tokens {
        let limit = format!("at most max_tokens ({max_tokens})");
        return Err(GenerateError::limit("min_tokens", limit, sampling.min_tokens));
    }
    sampling.end_token_ids = if sampling.min_tokens > 0 { stop_token_ids.to_vec() } else { Vec::new() };
    Ok(())
}

/// The sequences of tokens of these words, as vLLM forms them: a word as it begins a text, and as it follows a space, if
/// that is another sequence of the same length.
pub fn bad_words(text: &TextModel, words: &[String]) -> Result<Vec<Vec<u32>>, GenerateError> {
    if words.len() > MAX_WORDS {
        return Err(GenerateError::limit("bad_words", format!("at most {MAX_WORDS} words"), words.len()));
    }
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    for word in words {
        let bare = word.trim_start();
        if bare.is_empty() {
            return Err(GenerateError::limit("bad_words", "of texts that are not empty", format!("{word:?}")));
        }
        // A token has at least one byte in nearly all tokenizers; this bounds the work.
        if bare.len() > 16 * MAX_BAD_WORD_TOKENS {
            return Err(GenerateError::limit(
                "bad_words",
                format!("of at most {} bytes", 16 * MAX_BAD_WORD_TOKENS),
                bare.len(),
            ));
        }
        let first = text.encode(bare, false)?;
        let second = text.encode(&format!(" {bare}"), false)?;
        if let Some(long) = [&first, &second].into_iter().find(|ids| ids.len() > MAX_BAD_WORD_TOKENS) {
            return Err(GenerateError::limit(
                "bad_words",
                format!("of at most {MAX_BAD_WORD_TOKENS} tokens"),
                long.len(),
            ));
        }
        let differs = second.first() != first.first() && second.len() == first.len();
        sequences.push(first);
        sequences.extend(differs.then_some(second));
    }
    Ok(sequences)
}
