//! Bytes and unique names of single tokens, and token offsets in a text.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    sync::{Arc, OnceLock},
};

use serde_json::Value;
use tokenizers::Tokenizer;

/// Bytes and unique names of single tokens, as reported with log-probabilities.
pub(crate) struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    form: Form,
    /// Tokens whose bytes are the same as those of another token, which has the text as its name. Computed on first use:
    /// nodes never need it.
    without_own_name: OnceLock<HashSet<u32>>,
}

/// How a token's entry in the vocabulary encodes its bytes.
enum Form {
    /// GPT-2's encoding: each character stands for one byte.
    ByteLevel(HashMap<char, u8>),
    /// Text that the decoder transforms, for example by turning U+2581 into a space or by putting spaces between words.
    Text {
        /// Whether an entry such as `<0xF0>` stands for one byte.
        byte_fallback: bool,
        /// A token and its text. Decoders drop the first space of a text. Other tokens are therefore decoded after this
        /// token, which gives their text in the middle of a text.
        before: Option<(u32, String)>,
    },
}

impl Vocabulary {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let decoder = tokenizer.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok());
        let decoder = decoder.unwrap_or_default();
        let form = match has_type(&decoder, "ByteLevel") {
            true => Form::ByteLevel(byte_characters()),
            false => Form::Text { byte_fallback: has_type(&decoder, "ByteFallback"), before: before(&tokenizer) },
        };
        Self { tokenizer, form, without_own_name: OnceLock::new() }
    }

    /// The bytes that a token contributes in the middle of a text. Empty for ids that the tokenizer does not know.
    pub(crate) fn bytes(&self, id: u32) -> Vec<u8> {
        let Some(entry) = self.tokenizer.id_to_token(id) else { return Vec::new() };
        match &self.form {
            // If any character of the entry stands for no byte, the decoder uses the entry unchanged.
            Form::ByteLevel(bytes) => {
                entry.chars().map(|c| bytes.get(&c).copied()).collect::<Option<_>>().unwrap_or(entry.into_bytes())
            }
            Form::Text { byte_fallback: true, .. } if fallback_byte(&entry).is_some() => {
                fallback_byte(&entry).into_iter().collect()
            }
            Form::Text { before, .. } => {
                let decode = |ids: &[u32]| self.tokenizer.decode(ids, false).unwrap_or_default();
                let in_the_middle = before.as_ref().and_then(|(before, text)| {
                    let both = decode(&[*before, id]);
                    both.strip_prefix(text.as_str()).map(str::to_owned)
                });
                in_the_middle.unwrap_or_else(|| decode(&[id])).into_bytes()
            }
        }
    }

    /// The unique name of a token: its text if no other token has that name, `bytes:\xf0` if its bytes are not valid
    /// UTF-8, else `token_id:17`.
    pub(crate) fn name(&self, id: u32) -> String {
        let shared = self.without_own_name.get_or_init(|| self.find_shared()).contains(&id);
        let bytes = self.bytes(id);
        let escaped = |bytes: &[u8]| {
            bytes.iter().fold(String::from("bytes:"), |mut name, byte| {
                // Writing to a String can't fail.
                let _ = write!(name, "\\x{byte:02x}");
                name
            })
        };
        match String::from_utf8(bytes) {
            Ok(text) if !text.is_empty() && !shared => text,
            Ok(text) if self.is_fallback_byte(id) => escaped(text.as_bytes()),
            Err(e) if !shared => escaped(e.as_bytes()),
            _ => format!("token_id:{id}"),
        }
    }

    fn is_fallback_byte(&self, id: u32) -> bool {
        matches!(self.form, Form::Text { byte_fallback: true, .. })
            && self.tokenizer.id_to_token(id).as_deref().and_then(fallback_byte).is_some()
    }

    /// Tokens with the same bytes as another token that takes precedence: ordinary tokens precede byte tokens, then lower
    /// ids precede higher ids.
    fn find_shared(&self) -> HashSet<u32> {
        let mut ids: Vec<u32> = self.tokenizer.get_vocab(true).into_values().collect();
        ids.sort_by_cached_key(|id| (self.is_fallback_byte(*id), *id));
        ids.dedup();
        let mut seen = HashSet::with_capacity(ids.len());
        ids.into_iter().filter(|id| !seen.insert(self.bytes(*id))).collect()
    }
}

/// Computes where each token begins in a text, in characters.
pub struct Offsets {
    vocabulary: Arc<Vocabulary>,
    special: Arc<HashSet<u32>>,
    skip_special: bool,
    /// No token with text has been taken yet, so the decoder drops the first space.
    at_start: bool,
    characters: usize,
    /// Length of the text so far, in bytes.
    bytes: usize,
    /// Bytes of an incomplete character at the end.
    partial: Vec<u8>,
}

impl Offsets {
    pub(crate) fn new(
        vocabulary: Arc<Vocabulary>,
        special: Arc<HashSet<u32>>,
        context: &[u32],
        skip_special: bool,
    ) -> Self {
        let at_start = context.iter().all(|id| skip_special && special.contains(id));
        Self { vocabulary, special, skip_special, at_start, characters: 0, bytes: 0, partial: Vec::new() }
    }

    /// Offset of the next output token, in characters. A token that continues a character has the offset of the
    /// character.
    pub fn next_output(&mut self, id: u32) -> usize {
        let begins = self.characters;
        if !(self.skip_special && self.special.contains(&id)) {
            self.take(id);
        }
        begins
    }

    /// Offset of the next token of a prompt whose text is `prompt`. A special token advances the offset only if its text
    /// is in `prompt`: the tokenizer may have added the token.
    pub fn next_of_prompt(&mut self, id: u32, prompt: &str) -> usize {
        let begins = self.characters;
        let written = || prompt.as_bytes().get(self.bytes..).is_some_and(|b| b.starts_with(&self.vocabulary.bytes(id)));
        if !self.special.contains(&id) || written() {
            self.take(id);
        }
        begins
    }

    /// Moves to the end of `prompt`, where the output begins.
    pub fn end_prompt(&mut self, prompt: &str) {
        (self.characters, self.bytes) = (prompt.chars().count(), prompt.len());
        self.partial.clear();
    }

    fn take(&mut self, id: u32) {
        let mut bytes = self.vocabulary.bytes(id);
        if bytes.is_empty() {
            return;
        }
        if std::mem::take(&mut self.at_start) && bytes[0] == b' ' && matches!(self.vocabulary.form, Form::Text { .. }) {
            bytes = self.vocabulary.tokenizer.decode(&[id], false).unwrap_or_default().into_bytes();
        }
        self.partial.extend(bytes);
        let complete = complete_length(&self.partial);
        self.characters += String::from_utf8_lossy(&self.partial[..complete]).chars().count();
        self.bytes += complete;
        self.partial.drain(..complete);
    }
}

/// Length of `bytes` without an incomplete character at the end.
fn complete_length(bytes: &[u8]) -> usize {
    let mut from = 0;
    loop {
        match std::str::from_utf8(&bytes[from..]) {
            Ok(_) => return bytes.len(),
            Err(e) => match e.error_len() {
                Some(length) => from += e.valid_up_to() + length,
                None => return from + e.valid_up_to(),
            },
        }
    }
}

/// Whether the decoder or one of its parts is of type `name`.
fn has_type(decoder: &Value, name: &str) -> bool {
    decoder["type"] == name
        || decoder["decoders"].as_array().is_some_and(|parts| parts.iter().any(|p| has_type(p, name)))
}

/// The first ordinary token, by id, whose text is ASCII letters and digits.
fn before(tokenizer: &Tokenizer) -> Option<(u32, String)> {
    let added = tokenizer.get_added_vocabulary();
    let mut ids: Vec<u32> = tokenizer.get_vocab(false).into_values().collect();
    ids.sort_unstable();
    let text = |id: u32| tokenizer.decode(&[id], false).ok().map(|text| (id, text));
    let plain = |(_, text): &(u32, String)| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric());
    ids.into_iter().filter(|id| !added.get_added_tokens_decoder().contains_key(id)).filter_map(text).find(plain)
}

/// The byte that an entry such as `<0xF0>` stands for.
fn fallback_byte(entry: &str) -> Option<u8> {
    let digits = entry.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Maps characters to bytes as in GPT-2's vocabularies (`bytes_to_unicode` of its encoder.py). Printable bytes are
/// represented by themselves in Latin-1, the other bytes by the characters from U+0100 on, in order.
fn byte_characters() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=u8::MAX).filter(|byte| !printable(*byte)).zip('\u{100}'..);
    let own = (0..=u8::MAX).filter(|byte| printable(*byte)).map(|byte| (byte, char::from(byte)));
    own.chain(others).map(|(byte, c)| (c, byte)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{TextFiles, TextModel};

    fn model(tokens: &[&str], decoder: Value, byte_fallback: bool) -> TextModel {
        let vocabulary: serde_json::Map<_, _> =
            tokens.iter().zip(0..).map(|(t, id)| ((*t).into(), json!(id))).collect();
        let special = |id: usize| {
            json!({"id": id, "content": tokens[id], "special": true, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        };
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0), special(1)],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": byte_fallback},
        });
        let files = TextFiles { tokenizer_json: tokenizer.to_string().into_bytes(), ..TextFiles::default() };
        TextModel::from_files(&files).unwrap()
    }

    fn sentence_piece() -> TextModel {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let tokens = ["<s>", "</s>", "<0x41>", "<0xF0>", "<0x9F>", "A", "▁A", "▁", "▁true", "true", "é"];
        model(&tokens, decoder, true)
    }

    #[test]
    fn sentence_piece_tokens_keep_their_space_and_bytes() {
        let model = sentence_piece();
        let names: Vec<String> = (0..12).map(|id| model.token_name(id)).collect();
        let wanted = [
            "<s>",
            "</s>",
            "bytes:\\x41",
            "bytes:\\xf0",
            "bytes:\\x9f",
            "A",
            " A",
            " ",
            " true",
            "true",
            "é",
            "token_id:11",
        ];
        assert_eq!(names, wanted);
        assert_eq!((model.token_bytes(3), model.token_bytes(2)), (vec![0xf0], vec![0x41]));
        assert_eq!((model.token_bytes(8), model.token_bytes(11)), (b" true".to_vec(), vec![]));
    }

    #[test]
    fn byte_level_tokens_have_their_own_bytes() {
        // "Ġ" is a space, "ðŁ" are the bytes F0 9F, and the space in "<|end of text|>" stands for no byte.
        let tokens = ["<s>", "<|end of text|>", "Ġtrue", "ðŁ", "ĺ", "Ģ", "é", "Ãł"];
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let model = model(&tokens, decoder, false);
        let bytes: Vec<Vec<u8>> = (1..8).map(|id| model.token_bytes(id)).collect();
        let wanted: [&[u8]; 7] =
            [b"<|end of text|>", b" true", &[0xf0, 0x9f], &[0x98], &[0x80], &[0xe9], "à".as_bytes()];
        assert_eq!(bytes, wanted);
        assert_eq!((model.token_name(3), model.token_name(2)), ("bytes:\\xf0\\x9f".into(), " true".into()));
    }

    #[test]
    fn words_without_a_decoder_are_parted_by_spaces() {
        let model = model(&["<s>", "</s>", "a", "b"], Value::Null, false);
        assert_eq!((model.token_name(3), model.token_name(0)), (" b".into(), " <s>".into()));
    }

    #[test]
    fn offsets_are_those_of_the_text() {
        let model = sentence_piece();
        let offsets = |context: &[u32], ids: &[u32], skip_special| -> Vec<usize> {
            let mut offsets = model.offsets(context, skip_special);
            ids.iter().map(|id| offsets.next_output(*id)).collect()
        };
        assert_eq!(offsets(&[0, 9], &[8, 8, 9, 10, 9], true), [0, 5, 10, 14, 15]);
        // If only special tokens precede an output, its text begins without a space.
        assert_eq!(offsets(&[0], &[8, 8, 8], true), [0, 4, 9]);
        assert_eq!(offsets(&[0], &[8, 8, 8], false), [0, 5, 10]);
        assert_eq!(offsets(&[9], &[9, 1, 9], true), [0, 4, 4]);
        assert_eq!(offsets(&[9], &[9, 1, 9], false), [0, 4, 8]);
        // Tokens of one character share its offset. An invalid sequence counts as one replacement character.
        assert_eq!(offsets(&[9], &[9, 3, 4, 9, 9], true), [0, 4, 4, 4, 9]);
    }

    #[test]
    fn a_prompt_may_name_special_tokens() {
        let model = sentence_piece();
        let mut offsets = model.offsets(&[], true);
        let prompt = "true</s> A";
        let begins: Vec<usize> = [0, 8, 1, 6].iter().map(|id| offsets.next_of_prompt(*id, prompt)).collect();
        assert_eq!(begins, [0, 0, 4, 8]);
        offsets.end_prompt(prompt);
        assert_eq!([offsets.next_output(8), offsets.next_output(8)], [10, 15]);
    }
}
