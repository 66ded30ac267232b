//! Text files of the demo models: a word-level tokenizer with byte fallback, and the chat template.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::task;

/// Begin-of-text token.
pub const BOS: &str = "<|bos|>";
/// End-of-answer token.
pub const EOS: &str = "<|eos|>";
/// Token id of [`EOS`].
pub const EOS_ID: u32 = 1;

/// Concatenates messages without role markers and ends answers with [`EOS`]. A raw prompt and a chat with the same
/// content therefore give the same tokens.
const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}\
{% if m['role'] == 'assistant' %}{{ eos_token }}{% elif m['role'] == 'system' %}{{ ' ' }}{% endif %}{% endfor %}";

/// Maps each byte to the printable character of byte-level tokenizers (GPT-2's table).
fn byte_characters() -> Vec<char> {
    let printable = |b: u32| (0x21..=0x7e).contains(&b) || (0xa1..=0xac).contains(&b) || (0xae..=0xff).contains(&b);
    let mut next = 0x100;
    let character = |b: u32| {
        let code = if printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or('\u{fffd}')
    };
    (0..256).map(character).collect()
}

/// Tokens by id: two special tokens, 256 bytes, and every word of the task followed by a space.
///
/// The space follows the word instead of preceding it, so that prompts and answers start without a space. Only their
/// last token, "?" or ".", is a plain byte.
pub fn vocabulary() -> Vec<String> {
    let bytes = byte_characters();
    let space = bytes[usize::from(b' ')];
    let mut tokens = vec![BOS.to_string(), EOS.to_string()];
    tokens.extend(bytes.iter().map(char::to_string));
    tokens.extend(task::words().into_iter().map(|word| format!("{word}{space}")));
    tokens
}

fn tokenizer() -> Value {
    let vocabulary = vocabulary();
    let vocab: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let special = |id: usize| {
        json!({"id": id, "content": vocabulary[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0), special(1)],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{L}+ ?|\p{N}+ ?|[^\s\p{L}\p{N}]+ ?|\s+"},
             "behavior": "Isolated", "invert": false},
            byte_level,
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        // There are no merges: a piece is one token (`ignore_merges`), or is split into bytes.
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                  "vocab": vocab, "merges": []},
    })
}

/// Writes the tokenizer, its configuration, the chat template and the generation configuration into `folder`.
pub fn write(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let special = |content: &str| {
        json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
               "special": true})
    };
    let config = json!({
        "added_tokens_decoder": {"0": special(BOS), "1": special(EOS)},
        "bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": false,
        "model_max_length": 2048, "tokenizer_class": "PreTrainedTokenizerFast",
    });
    let files = [
        ("tokenizer.json", tokenizer()),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", json!({"bos_token": BOS, "eos_token": EOS})),
        ("generation_config.json", json!({"bos_token_id": 0, "eos_token_id": EOS_ID, "do_sample": false})),
    ];
    for (name, mut value) in files {
        // Nodes compare the hash of the tokenizer, so its bytes must not depend on the order of keys in this file.
        value.sort_all_objects();
        crate::folder::write_json(&folder.join(name), &value)?;
    }
    let path = folder.join("chat_template.jinja");
    fs::write(&path, CHAT_TEMPLATE).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use overfill_text::{ChatMessage, TextFiles, TextModel};

    use super::*;

    #[test]
    fn words_are_one_token_and_any_text_survives() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        let text = TextModel::from_files(&TextFiles::from_folder(folder.path()).unwrap()).unwrap();
        assert_eq!(text.eos_token_ids(), [EOS_ID]);

        let prompt = "kim : molde , nurse , mice , 16 . list everyone by pet ?";
        let ids = text.encode(prompt, true).unwrap();
        assert_eq!(ids.len(), 1 + prompt.split(' ').count());
        assert_eq!(ids[0], 0);
        for any in
            [prompt, "Kim's  cat\n\tsat:on,the.mat? ", "zażółć 你好 👩‍👩‍👧 \u{0}\u{7f}", " ", "", "16kim ??..., <|x|>"]
        {
            let ids = text.encode(any, false).unwrap();
            assert_eq!(text.decode(&ids, true).unwrap(), any);
        }

        // A raw prompt and a chat of one message give the same tokens.
        let chat = text.encode_chat(&[ChatMessage::new("user", prompt)], true).unwrap();
        assert_eq!(chat, ids);
        let answered = [ChatMessage::new("user", prompt), ChatMessage::new("assistant", "mice kim 16 .")];
        let chat = text.encode_chat(&answered, false).unwrap();
        assert_eq!(chat.last(), Some(&EOS_ID));
        assert_eq!(chat[..ids.len()], ids);
    }
}
