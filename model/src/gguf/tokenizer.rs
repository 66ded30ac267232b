//! Builds a tokenizer.json from a GGUF file's metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

use std::{borrow::Cow, collections::HashMap};

use overfill_text::ranked_merges;
use serde_json::{Map, Value, json};

use super::header::Metadata;
use crate::ModelError;

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";

/// How text is split before byte-level BPE merges, for the given values of `tokenizer.ggml.pre`.
struct PreTokenizer {
    names: &'static [&'static str],
    /// The splitting rule.
    split: Split,
    /// Whether text is normalised to NFC.
    nfc: bool,
    /// Whether a piece that is itself a token is kept whole, regardless of merges.
    ignore_merges: bool,
    /// Whether to prepend the begin-of-text token, if the file does not say.
    add_bos: bool,
}

enum Split {
    /// GPT-2's pattern.
    Gpt2,
    /// Every digit on its own, then GPT-2's pattern.
    DigitsThenGpt2,
    /// This pattern.
    Pattern(&'static str),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PRE_TOKENIZERS: [PreTokenizer; 4] = [
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        split: Split::Pattern(LLAMA3),
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        split: Split::Pattern(QWEN2),
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer { names: &["smollm"], split: Split::DigitsThenGpt2, nfc: false, ignore_merges: false, add_bos: false },
    PreTokenizer { names: &["gpt-2", "default"], split: Split::Gpt2, nfc: false, ignore_merges: false, add_bos: false },
];

/// A token's type, from `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The vocabulary. A token's index is its id.
pub(super) struct Vocabulary<'a> {
    pub tokens: Vec<Cow<'a, str>>,
    kinds: Vec<Kind>,
    pub bos: Option<usize>,
    pub eos: Option<usize>,
}

impl<'a> Vocabulary<'a> {
    /// Reads the vocabulary; `None` if the file has none.
    pub(super) fn read(metadata: &Metadata<'a>) -> Result<Option<Self>, ModelError> {
        let Some(tokens) = metadata.texts(TOKENS)? else { return Ok(None) };
        let key = "tokenizer.ggml.token_type";
        let kind = |number: f64| match number {
            2.0 => Kind::Unknown,
            3.0 => Kind::Control,
            4.0 => Kind::UserDefined,
            5.0 => Kind::Unused,
            6.0 => Kind::Byte,
            _ => Kind::Normal,
        };
        let kinds = match metadata.numbers(key, tokens.len())? {
            Some(numbers) => numbers.into_iter().map(kind).collect(),
            None => vec![Kind::Normal; tokens.len()],
        };
        let mut read = Self { tokens, kinds, bos: None, eos: None };
        // SentencePiece has default ids for these.
        let (bos, eos) = if is_sentence_piece(metadata)? { (Some(1), Some(2)) } else { (None, None) };
        let known = |id: &usize| *id < read.tokens.len();
        let bos = read.id(metadata, BOS)?.or(bos.filter(known));
        let eos = read.id(metadata, "tokenizer.ggml.eos_token_id")?.or(eos.filter(known));
        (read.bos, read.eos) = (bos, eos);
        Ok(Some(read))
    }

    /// The token id stored under `key`.
    pub(super) fn id(&self, metadata: &Metadata<'_>, key: &str) -> Result<Option<usize>, ModelError> {
        let count = self.tokens.len();
        match metadata.index(key)? {
            Some(id) if id >= count => Err(metadata.bad(key, &format!("ids below {count}, the number of tokens"))),
            id => Ok(id),
        }
    }

    /// Whether the token is matched in a text before any splitting.
    pub(super) fn is_added(&self, id: usize) -> bool {
        matches!(self.kinds[id], Kind::Control | Kind::UserDefined | Kind::Unknown)
    }

    /// Maps tokens to ids. If a token occurs more than once, its first id counts.
    fn ids(&self) -> HashMap<&str, usize> {
        let mut ids = HashMap::new();
        for (id, token) in self.tokens.iter().enumerate() {
            ids.entry(&**token).or_insert(id);
        }
        ids
    }

    fn added_tokens(&self) -> Vec<Value> {
        let added = |id: &usize| self.is_added(*id);
        let token = |id: usize| {
            let special = self.kinds[id] != Kind::UserDefined || Some(id) == self.eos || Some(id) == self.bos;
            json!({
                "id": id, "content": self.tokens[id], "special": special,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        };
        (0..self.tokens.len()).filter(added).map(token).collect()
    }
}

fn is_sentence_piece(metadata: &Metadata<'_>) -> Result<bool, ModelError> {
    match metadata.text(MODEL)?.as_deref() {
        Some("gpt2") => Ok(false),
        Some("llama") => Ok(true),
        _ => Err(metadata.bad(MODEL, "gpt2, llama; for other models, put tokenizer.json next to the file")),
    }
}

/// The content of tokenizer.json.
pub(super) fn build(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Value, ModelError> {
    let mut json = if is_sentence_piece(metadata)? {
        sentence_piece(metadata, vocabulary)?
    } else {
        byte_level(metadata, vocabulary)?
    };
    let ids: Map<String, Value> =
        vocabulary.ids().into_iter().map(|(token, id)| (token.to_owned(), json!(id))).collect();
    json["model"]["vocab"] = Value::Object(ids);
    json["version"] = json!("1.0");
    json["added_tokens"] = json!(vocabulary.added_tokens());
    Ok(json)
}

fn byte_level(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Value, ModelError> {
    let pre = metadata.text(PRE)?.unwrap_or_else(|| {
        tracing::warn!(file = %metadata.file.display(), "{PRE} is absent: splitting text as GPT-2 does");
        "default".into()
    });
    let known = PRE_TOKENIZERS.iter().find(|known| known.names.contains(&&*pre)).ok_or_else(|| {
        let names: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|known| known.names).copied().collect();
        metadata.bad(PRE, &format!("{}; for others, put tokenizer.json next to the file", names.join(", ")))
    })?;

    let ids = vocabulary.ids();
    let texts = metadata.texts(MERGES)?.ok_or_else(|| metadata.bad(MERGES, "an array of texts"))?;
    let mut merges = Vec::with_capacity(texts.len());
    for (rank, text) in texts.iter().enumerate() {
        // The first token may itself be a space.
        let space = text.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let pair = space.map(|at| (&text[..at], &text[at + 1..]));
        let known = |(left, right): &(&str, &str)| {
            ids.contains_key(left) && ids.contains_key(right) && ids.contains_key(&*format!("{left}{right}"))
        };
        let pair = pair.filter(known).ok_or_else(|| {
            let (field, value) = (format!("{MERGES}[{rank}]"), format!("{text:?}"));
            ModelError::unsupported(metadata.file, &field, value, &format!("two tokens that join into one of {TOKENS}"))
        })?;
        merges.push(pair);
    }
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let sequence = |first: Value, use_regex| json!({"type": "Sequence", "pretokenizers": [first, bytes(use_regex)]});
    let pre_tokenizer = match known.split {
        Split::Gpt2 => bytes(true),
        Split::DigitsThenGpt2 => sequence(json!({"type": "Digits", "individual_digits": true}), true),
        Split::Pattern(pattern) => {
            let pattern = json!({"Regex": pattern});
            sequence(json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false}), false)
        }
    };
    Ok(json!({
        "normalizer": known.nfc.then(|| json!({"type": "NFC"})),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": begin(metadata, vocabulary, known.add_bos)?,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "ignore_merges": known.ignore_merges, "merges": merges},
    }))
}

fn sentence_piece(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Value, ModelError> {
    let key = "tokenizer.ggml.scores";
    let scores =
        metadata.numbers(key, vocabulary.tokens.len())?.ok_or_else(|| metadata.bad(key, "an array of numbers"))?;
    let normal = (0..scores.len()).filter(|id| vocabulary.kinds[*id] == Kind::Normal);
    let pieces: Vec<(&str, f32)> = normal.map(|id| (&*vocabulary.tokens[id], scores[id] as f32)).collect();
    let merges = ranked_merges(&pieces).map_err(|[one, two]| {
        let field = format!("{key} of {one:?} and {two:?}");
        let found = "the same, and both may merge in one place";
        let supported = "different ones; for others, put tokenizer.json next to the file";
        ModelError::unsupported(metadata.file, &field, found, supported)
    })?;
    let unknown = vocabulary.kinds.iter().position(|kind| *kind == Kind::Unknown);
    let space = "\u{2581}";
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": space})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": space}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": space}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": begin(metadata, vocabulary, true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "byte_fallback": true, "fuse_unk": true, "merges": merges,
            "unk_token": unknown.map(|id| &vocabulary.tokens[id]),
        },
    }))
}

/// The post-processor that prepends the begin-of-text token, if the file or the tokenizer's default asks for it; else
/// null.
fn begin(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>, default: bool) -> Result<Value, ModelError> {
    if !metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(default) {
        return Ok(Value::Null);
    }
    let id = vocabulary.bos.ok_or_else(|| metadata.bad(BOS, "a token id, since add_bos_token asks for it"))?;
    let token = &vocabulary.tokens[id];
    let (special, first, second) = (
        json!({"SpecialToken": {"id": token, "type_id": 0}}),
        json!({"Sequence": {"id": "A", "type_id": 0}}),
        json!({"Sequence": {"id": "B", "type_id": 1}}),
    );
    let mut tokens = Map::new();
    tokens.insert(token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]}));
    Ok(json!({
        "type": "TemplateProcessing", "single": [special, first], "pair": [special, first, second],
        "special_tokens": tokens,
    }))
}
