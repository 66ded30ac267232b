//! Structured output: which tokens may come next, so that the whole output matches a [`Grammar`]. The crate llguidance
//! does the work: it parses JSON schemas, regular expressions and grammars, and walks the vocabulary.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarInit, ParserLimits, TopLevelGrammar},
};
use overfill_kv::Grammar;
use parking_lot::Mutex;
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use crate::{TextFiles, TextModel};

/// Longer tokens are never allowed. The trie of tokens is as deep as its longest one.
const MAX_TOKEN_BYTES: usize = 512;
/// Size limit of the trie, in nodes. The crate's format has room for this many.
const MAX_TRIE_NODES: usize = 1 << 22;
/// Limit of a grammar's automaton. A state takes about 2 kB.
const MAX_LEXER_STATES: usize = 50_000;
/// Maximum white space between two elements of JSON, in characters.
const MAX_GAP: usize = 64;
/// Grammars that are kept compiled.
const KEPT: usize = 8;

/// Why a grammar can't be used, or an output does not match it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

impl GrammarError {
    /// An error with this text.
    pub fn new(error: impl fmt::Display) -> Self {
        // One line, also where the crate shows the place in a grammar on lines of its own.
        let text = error.to_string();
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        Self(lines.collect::<Vec<_>>().join("; "))
    }
}

/// Compiles grammars for a model's tokens.
pub struct Grammars {
    files: Arc<TextFiles>,
    vocab_size: usize,
    ends: Vec<u32>,
    /// Made when the first grammar comes: it takes time and holds all tokens.
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    /// Compiled grammars, the last used one first.
    kept: Mutex<Vec<(Grammar, Matcher)>>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

impl Grammars {
    /// For a model with `vocab_size` token ids. `ends`: its end-of-text tokens, which are allowed when the output is complete.
    pub fn new(files: Arc<TextFiles>, vocab_size: usize, ends: &[u32]) -> Self {
        let ends = ends.iter().copied().filter(|id| (*id as usize) < vocab_size).collect();
        Self { files, vocab_size, ends, factory: OnceLock::new(), kept: Mutex::default() }
    }

    /// A matcher at the beginning of the output. Takes milliseconds for a grammar that was not used lately.
    ///
    /// # Errors
    /// The grammar is invalid or too complex, or the model has no end-of-text token.
    pub fn matcher(&self, grammar: &Grammar) -> Result<GrammarMatcher, GrammarError> {
        if let Some(matcher) = self.find(grammar) {
            return Ok(matcher);
        }
        let factory = self.factory.get_or_init(|| self.factory()).as_ref().map_err(Clone::clone)?;
        let matcher = compile(factory, grammar)?;
        let mut kept = self.kept.lock();
        kept.truncate(KEPT - 1);
        kept.insert(0, (grammar.clone(), matcher.clone()));
        Ok(self.begin(matcher))
    }

    fn find(&self, grammar: &Grammar) -> Option<GrammarMatcher> {
        let mut kept = self.kept.lock();
        let at = kept.iter().position(|(known, _)| known == grammar)?;
        kept[..=at].rotate_right(1);
        Some(self.begin(kept[0].1.clone()))
    }

    fn begin(&self, matcher: Matcher) -> GrammarMatcher {
        GrammarMatcher { matcher, words: self.vocab_size.div_ceil(u32::BITS as usize) }
    }

    fn factory(&self) -> Result<ParserFactory, GrammarError> {
        if self.ends.is_empty() {
            return Err(GrammarError::new("the model has no end-of-text token, which structured output needs"));
        }
        let model = TextModel::from_files(&self.files).map_err(GrammarError::new)?;
        let words: Vec<Vec<u8>> = (0..self.vocab_size as u32).map(|id| word(&model, id)).collect();
        if words.iter().map(Vec::len).sum::<usize>() >= MAX_TRIE_NODES {
            return Err(GrammarError::new("the tokenizer is too large for structured output"));
        }
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, self.ends[0]), &words);
        new_factory(Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&self.ends))))
    }
}

/// A token's bytes, as the crate wants them. Empty for a token that is never allowed.
fn word(model: &TextModel, id: u32) -> Vec<u8> {
    let mut bytes = model.token_bytes(id);
    if model.is_special(id) {
        bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
    }
    if bytes.len() > MAX_TOKEN_BYTES { Vec::new() } else { bytes }
}

/// Checks a grammar without a model.
///
/// # Errors
/// It is invalid or too complex. The error says where, if the parser knows.
pub fn check_grammar(grammar: &Grammar) -> Result<(), GrammarError> {
    static BYTES: OnceLock<Result<ParserFactory, GrammarError>> = OnceLock::new();
    let factory = BYTES.get_or_init(|| new_factory(ApproximateTokEnv::single_byte_env()));
    compile(factory.as_ref().map_err(Clone::clone)?, grammar).map(drop)
}

fn new_factory(tokens: TokEnv) -> Result<ParserFactory, GrammarError> {
    let mut factory = ParserFactory::new_simple(&tokens).map_err(GrammarError::new)?;
    factory.quiet();
    let limits = ParserLimits {
        max_lexer_states: MAX_LEXER_STATES,
        precompute_large_lexemes: false,
        verbose_errors: false,
        ..ParserLimits::default()
    };
    *factory.limits_mut() = limits;
    Ok(factory)
}

fn compile(factory: &ParserFactory, grammar: &Grammar) -> Result<Matcher, GrammarError> {
    let init = GrammarInit::Serialized(translate(grammar)?);
    let mut matcher = Matcher::new(factory.create_parser_from_init_default(init));
    if let Some(error) = matcher.get_error() {
        return Err(GrammarError::new(error));
    }
    // A schema that nothing matches is noticed only now.
    let first = matcher.compute_mask().map_err(GrammarError::new)?;
    if first.is_zero() {
        return Err(GrammarError::new("nothing matches it"));
    }
    Ok(matcher)
}

fn translate(grammar: &Grammar) -> Result<TopLevelGrammar, GrammarError> {
    match grammar {
        Grammar::Json(schema) => {
            let schema: Value = serde_json::from_str(schema).map_err(GrammarError::new)?;
            match schema {
                Value::Object(_) | Value::Bool(_) => Ok(TopLevelGrammar::from_json_schema(with_short_gaps(schema))),
                _ => Err(GrammarError::new("a JSON schema must be an object")),
            }
        }
        Grammar::Regex(regex) => Ok(TopLevelGrammar::from_regex(regex)),
        Grammar::Choice(texts) if texts.is_empty() => Err(GrammarError::new("there must be at least one text")),
        Grammar::Choice(texts) => {
            // Lark's strings have the escapes of JSON.
            let texts: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
            Ok(TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | "))))
        }
        Grammar::Lark(lark) => Ok(TopLevelGrammar::from_lark(lark.clone())),
    }
}

/// The schema with at most [`MAX_GAP`] white space in a row: some models would go on with it until their last token.
pub(crate) fn with_short_gaps(mut schema: Value) -> Value {
    const OPTIONS: &str = "x-guidance";
    if let Value::Object(fields) = &mut schema
        && !fields.contains_key(OPTIONS)
    {
        let pattern = format!("[\\x20\\x0A\\x0D\\x09]{{1,{MAX_GAP}}}");
        fields.insert(OPTIONS.into(), json!({"whitespace_pattern": pattern}));
    }
    schema
}

/// The state of one output that must match a grammar.
#[derive(Clone)]
pub struct GrammarMatcher {
    matcher: Matcher,
    /// Length of a set of tokens, in words.
    words: usize,
}

impl fmt::Debug for GrammarMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarMatcher").finish_non_exhaustive()
    }
}

impl GrammarMatcher {
    /// The tokens that may come next, at least one: bit `t % 32` of word `t / 32` stands for token `t`. End-of-text tokens are
    /// allowed if the output is complete, and nothing else if it can't go on.
    ///
    /// # Errors
    /// The grammar is too complex.
    pub fn allowed(&mut self) -> Result<Vec<u32>, GrammarError> {
        let tokens = self.matcher.compute_mask_or_eos().map_err(GrammarError::new)?;
        Ok(tokens.as_slice().iter().copied().take(self.words).collect())
    }

    /// The next token of the output. After the end, further tokens change nothing.
    ///
    /// # Errors
    /// The token was not allowed, or the grammar is too complex.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(GrammarError::new)
    }
}
