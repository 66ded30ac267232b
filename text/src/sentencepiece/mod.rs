//! Makes a tokenizer.json of `tokenizer.model`, the file of the SentencePiece library, for folders that have no tokenizer.json.
//!
//! A text between special tokens is split into the same ids as by SentencePiece. What the `tokenizers` crate can't express is
//! refused. Three differences remain: names of special tokens in a text are special tokens; in a unigram model, a
//! text that has the name of a byte, such as `<0x0A>`, may become that byte; and a text whose best segmentations differ by
//! less than rounding may be split differently, as SentencePiece computes in f32.

mod merges;
mod proto;

use std::collections::{BTreeMap, HashSet};

use prost::Message;
use serde_json::{Map, Value, json};

use crate::{TextError, tokenizer};
pub use merges::ranked_merges;
use proto::{Kind, Model, NormalizerSpec, TrainerSpec, Type};

pub(crate) const FILE: &str = "tokenizer.model";
const CONFIG: &str = "tokenizer_config.json";
const ADDED: &str = "added_tokens.json";
/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";
/// Spaces that are removed from the beginning of an output, if the model removes extra ones.
const MOST_SPACES: usize = 1000;
/// Classes of transformers that give a text the ids of SentencePiece. Others change them.
const CLASSES: [&str; 6] = [
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
];

fn invalid(reason: impl Into<String>) -> TextError {
    TextError::Invalid { file: FILE, reason: reason.into() }
}

fn unsupported(field: &str, value: impl ToString, supported: &str) -> TextError {
    let value = value.to_string();
    invalid(format!("{field} is {value}, supported: {supported}; for others, put tokenizer.json next to the file"))
}

/// A model file that was checked: pieces, and what they are.
struct Vocabulary {
    /// Texts, scores and kinds. The index is the id.
    pieces: Vec<(String, f32, Kind)>,
    trainer: TrainerSpec,
    normalizer: NormalizerSpec,
}

impl Vocabulary {
    fn read(bytes: &[u8]) -> Result<Self, TextError> {
        let Model { pieces, trainer_spec, normalizer_spec } =
            Model::decode(bytes).map_err(|e| invalid(format!("not a model of SentencePiece: {e}")))?;
        let (trainer, normalizer) = (trainer_spec.unwrap_or_default(), normalizer_spec.unwrap_or_default());
        let mut seen = HashSet::new();
        let mut read = Vec::with_capacity(pieces.len());
        for (id, piece) in pieces.iter().enumerate() {
            let kind =
                Kind::try_from(piece.kind.unwrap_or(1)).map_err(|e| invalid(format!("type of piece {id}: {e}")))?;
            let (text, score) = (piece.piece().to_owned(), piece.score());
            if text.is_empty() || !seen.insert(piece.piece()) {
                return Err(invalid(format!("piece {id} is {text:?}, supported: each text once, and not empty")));
            }
            if !score.is_finite() {
                return Err(invalid(format!("the score of piece {id} is {score}, supported: finite numbers")));
            }
            if kind == Kind::Unused {
                return Err(unsupported(&format!("the type of piece {id}"), "UNUSED", "all others"));
            }
            read.push((text, score, kind));
        }
        let read = Self { pieces: read, trainer, normalizer };
        read.check()?;
        Ok(read)
    }

    fn check(&self) -> Result<(), TextError> {
        let Self { trainer, normalizer, .. } = self;
        if normalizer.precompiled_charsmap.as_ref().is_some_and(|rules| !rules.is_empty()) {
            return Err(unsupported("normalizer_spec.name", normalizer.name(), "identity"));
        }
        if !normalizer.escape_whitespaces() {
            return Err(unsupported("normalizer_spec.escape_whitespaces", "false", "true"));
        }
        if trainer.treat_whitespace_as_suffix() {
            return Err(unsupported("trainer_spec.treat_whitespace_as_suffix", "true", "false"));
        }
        let bytes = self.of(Kind::Byte).count();
        let wanted = if trainer.byte_fallback() { 256 } else { 0 };
        if bytes != wanted || (0..=u8::MAX).any(|byte| wanted > 0 && self.id(&format!("<0x{byte:02X}>")).is_none()) {
            return Err(invalid(format!("{bytes} pieces are of type BYTE, supported: {wanted}, one for each byte")));
        }
        let user_defined = self.of(Kind::UserDefined).next();
        if let Some((_, text, _)) = user_defined.filter(|_| normalizer.add_dummy_prefix()) {
            let field = format!("normalizer_spec.add_dummy_prefix, with the user-defined piece {text:?},");
            return Err(unsupported(&field, "true", "false"));
        }
        Ok(())
    }

    /// Ids, texts and scores of all pieces of a kind.
    fn of(&self, wanted: Kind) -> impl Iterator<Item = (usize, &str, f32)> {
        let pieces = self.pieces.iter().enumerate().filter(move |(_, (.., kind))| *kind == wanted);
        pieces.map(|(id, (text, score, _))| (id, text.as_str(), *score))
    }

    fn id(&self, wanted: &str) -> Option<usize> {
        self.pieces.iter().position(|(text, ..)| text == wanted)
    }

    fn model(&self) -> Result<Value, TextError> {
        let (unknown, byte_fallback) = (self.of(Kind::Unknown).next(), self.trainer.byte_fallback());
        match Type::try_from(self.trainer.model_type.unwrap_or(1)) {
            Ok(Type::Bpe) => {
                let merges = self.merges()?;
                let ids = self.pieces.iter().enumerate().map(|(id, (text, ..))| (text.clone(), json!(id)));
                Ok(json!({
                    "type": "BPE", "byte_fallback": byte_fallback, "fuse_unk": true, "merges": merges,
                    "unk_token": unknown.map(|(_, text, _)| text), "vocab": ids.collect::<Map<_, _>>(),
                }))
            }
            Ok(Type::Unigram) => {
                // SentencePiece prefers user-defined pieces, but only to other pieces that begin and end there.
                for (_, text, _) in self.of(Kind::UserDefined) {
                    if let Some((_, other, _)) = self.of(Kind::Normal).find(|(_, other, _)| other.contains(text)) {
                        let field = format!("piece {other:?}, with the user-defined piece {text:?} inside,");
                        return Err(unsupported(&field, "UNIGRAM", "BPE"));
                    }
                }
                let (unknown, ..) = unknown.ok_or_else(|| invalid("no piece is of type UNKNOWN"))?;
                // The penalty of unknown characters is relative to the worst score. SentencePiece takes it over normal
                // pieces alone.
                let worst = self.of(Kind::Normal).map(|(.., score)| score).fold(0.0, f32::min);
                // Others are found before the text is split, or stand for bytes.
                let score = |score: f32, kind: Kind| f64::from(if kind == Kind::Normal { score } else { worst });
                let vocabulary: Vec<Value> =
                    self.pieces.iter().map(|(text, own, kind)| json!([text, score(*own, *kind)])).collect();
                Ok(json!({"type": "Unigram", "unk_id": unknown, "byte_fallback": byte_fallback, "vocab": vocabulary}))
            }
            other => {
                let found = other.map_or("another number".into(), |kind| format!("{kind:?}").to_uppercase());
                Err(unsupported("trainer_spec.model_type", found, "UNIGRAM, BPE"))
            }
        }
    }

    fn merges(&self) -> Result<Vec<(&str, &str)>, TextError> {
        // User-defined pieces are found before the text is split.
        let pieces: Vec<(&str, f32)> = self.of(Kind::Normal).map(|(_, text, score)| (text, score)).collect();
        let known: HashSet<&str> = pieces.iter().map(|(text, _)| *text).collect();
        // SentencePiece can merge a character that is no piece itself; ranked merges can't.
        for (text, _) in &pieces {
            let alone = |c: &char| !known.contains(c.encode_utf8(&mut [0; 4]) as &str);
            if text.chars().count() > 1
                && let Some(c) = text.chars().find(alone)
            {
                return Err(unsupported(
                    &format!("{c:?} of the piece {text:?}"),
                    "no piece",
                    "characters that are pieces",
                ));
            }
        }
        ranked_merges(&pieces).map_err(|[one, two]| {
            let found = "the same, and both may merge in one place";
            unsupported(&format!("the score of the pieces {one:?} and {two:?}"), found, "different ones")
        })
    }
}

/// The content of tokenizer.json. `config`, `map` and `added` are the parsed tokenizer_config.json, special_tokens_map.json and
/// added_tokens.json, or null.
pub(crate) fn tokenizer_json(model: &[u8], config: &Value, map: &Value, added: &Value) -> Result<Vec<u8>, TextError> {
    if let Some(class) = config["tokenizer_class"].as_str().filter(|class| !CLASSES.contains(class)) {
        let reason = format!("tokenizer_class is {class}, supported without tokenizer.json: {}", CLASSES.join(", "));
        return Err(TextError::Invalid { file: CONFIG, reason });
    }
    let vocabulary = Vocabulary::read(model)?;
    let (prefix, trim) = (vocabulary.normalizer.add_dummy_prefix(), vocabulary.normalizer.remove_extra_whitespaces());
    let prefix = prefix && config["add_prefix_space"].as_bool().unwrap_or(true);
    // In this mode of transformers, only the first part of a text gets a space, not those after a special token.
    let first_only = prefix && config["legacy"] == false;

    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let mut normalizers = Vec::new();
    if trim {
        normalizers.push(replace(json!({"Regex": "^ +"}), ""));
        normalizers.push(replace(json!({"Regex": " {2,}"}), " "));
    }
    if prefix && !first_only {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
    }
    normalizers.push(replace(json!({"String": " "}), SPACE));
    if trim {
        normalizers.push(replace(json!({"Regex": format!("{SPACE}+$")}), ""));
    }
    let mut decoders =
        vec![replace(json!({"String": SPACE}), " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if prefix || trim {
        let start = if trim { MOST_SPACES } else { 1 };
        decoders.push(json!({"type": "Strip", "content": " ", "start": start, "stop": 0}));
    }
    let metaspace = json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": false});
    let mut json = json!({
        "version": "1.0",
        "added_tokens": added_tokens(&vocabulary, config, map, added)?,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": if first_only { metaspace } else { Value::Null },
        "post_processor": post_processor(&vocabulary, config, map)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": vocabulary.model()?,
    });
    // Nodes compare the hash of the text.
    json.sort_all_objects();
    Ok(json.to_string().into_bytes())
}

fn added_tokens(vocabulary: &Vocabulary, config: &Value, map: &Value, added: &Value) -> Result<Vec<Value>, TextError> {
    let token = |id: usize, text: &str, special: bool, normalized: bool| {
        json!({
            "id": id, "content": text, "special": special, "normalized": normalized,
            "single_word": false, "lstrip": false, "rstrip": false,
        })
    };
    let mut tokens = BTreeMap::new();
    for kind in [Kind::Unknown, Kind::Control, Kind::UserDefined] {
        // A user-defined piece is found after spaces were replaced.
        let user_defined = kind == Kind::UserDefined;
        tokens.extend(vocabulary.of(kind).map(|(id, text, _)| (id, token(id, text, !user_defined, user_defined))));
    }
    let invalid = |reason: String| TextError::Invalid { file: ADDED, reason };
    let entries = match added {
        Value::Null => return Ok(tokens.into_values().collect()),
        Value::Object(entries) => entries,
        _ => return Err(invalid("not an object of tokens and their ids".into())),
    };
    let named = tokenizer::special_tokens(config, map);
    let mut ids = BTreeMap::new();
    for (text, id) in entries {
        if text.is_empty() || vocabulary.id(text).is_some() {
            continue;
        }
        ids.insert(id.as_u64().ok_or_else(|| invalid(format!("the id of {text:?} is {id}, not a number")))?, text);
    }
    for ((id, text), wanted) in ids.into_iter().zip(vocabulary.pieces.len()..) {
        if id != wanted as u64 {
            return Err(invalid(format!("the id of {text:?} is {id}, supported: {wanted}, the next after {FILE}")));
        }
        let special = named.iter().any(|token| token.content == *text);
        tokens.insert(wanted, token(wanted, text, special, false));
    }
    Ok(tokens.into_values().collect())
}

/// Adds the tokens of begin and end of text, as tokenizer_config.json says. transformers' default is the first alone.
fn post_processor(vocabulary: &Vocabulary, config: &Value, map: &Value) -> Result<Value, TextError> {
    let (mut before, mut after, mut special) = (Vec::new(), Vec::new(), Map::new());
    for (field, flag, default, id, list) in [
        ("bos_token", "add_bos_token", true, vocabulary.trainer.bos_id(), &mut before),
        ("eos_token", "add_eos_token", false, vocabulary.trainer.eos_id(), &mut after),
    ] {
        let stated = config[flag].as_bool();
        if !stated.unwrap_or(default) {
            continue;
        }
        let named = tokenizer::named_token(config, map, field).and_then(|token| vocabulary.id(&token.content));
        let control = |id: &usize| vocabulary.pieces.get(*id).is_some_and(|(.., kind)| *kind == Kind::Control);
        let Some(id) = named.or_else(|| usize::try_from(id).ok().filter(control)) else {
            if stated.is_none() {
                continue;
            }
            let reason = format!("{flag} is true, but {FILE} has no {field}");
            return Err(TextError::Invalid { file: CONFIG, reason });
        };
        let text = &vocabulary.pieces[id].0;
        list.push(json!({"SpecialToken": {"id": text, "type_id": 0}}));
        special.insert(text.clone(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    if special.is_empty() {
        return Ok(Value::Null);
    }
    let sequence = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
    let of = |parts: Vec<Value>| [before.clone(), parts, after.clone()].concat();
    Ok(json!({
        "type": "TemplateProcessing", "special_tokens": special,
        "single": of(vec![sequence("A", 0)]), "pair": of(vec![sequence("A", 0), sequence("B", 1)]),
    }))
}
