//! Targets for templates, detokenisation and stop texts: `text/`.

use std::sync::{Arc, LazyLock};

use overfill_text::{ChatMessage, StopMatcher, TextFiles, TextModel};

use crate::input::Input;

pub(crate) const TOKENIZER: &[u8] = include_bytes!("../../tests/golden/llama-tied/full/tokenizer.json");
const TOKENIZER_CONFIG: &[u8] = include_bytes!("../../tests/golden/llama-tied/full/tokenizer_config.json");
const TEMPLATE: &[u8] = include_bytes!("../../tests/golden/llama-tied/full/chat_template.jinja");

/// A template with constructs of published templates that the golden templates lack.
const THOROUGH: &[u8] =
    b"{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% set rest = messages[1:] %}\
{% else %}{% set rest = messages %}{% endif %}{{ strftime_now('%d %b %Y') }}{% set ns = namespace(last=0) %}\
{% for m in rest[::-1] %}{% if m.role == 'user' and not m.content.startswith('<tool') %}{% set ns.last = loop.index0 %}\
{% break %}{% endif %}{% endfor %}{% for m in rest %}{% if m.role not in ['user', 'assistant', 'tool'] %}\
{{ raise_exception('role ' ~ m.role) }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\\n') | tojson }}\
{{ m.content[:3] | upper }}{{ m | tojson(indent=2) }}{% endfor %}{{ ns.last }}";

fn parse(template: &[u8]) -> TextModel {
    let files = TextFiles {
        tokenizer_json: TOKENIZER.into(),
        tokenizer_config_json: Some(TOKENIZER_CONFIG.into()),
        chat_template: Some(template.into()),
        ..TextFiles::default()
    };
    TextModel::from_files(&files).expect("files of the repository")
}

static MODEL: LazyLock<Arc<TextModel>> = LazyLock::new(|| Arc::new(parse(TEMPLATE)));
static THOROUGH_MODEL: LazyLock<TextModel> = LazyLock::new(|| parse(THOROUGH));

/// Returns the tokenizer and template of a golden model.
pub(crate) fn model() -> Arc<TextModel> {
    MODEL.clone()
}

/// Renders arbitrary messages with two valid templates.
pub fn chat_messages(data: &[u8]) {
    let mut input = Input::new(data);
    let add_generation_prompt = input.byte().is_multiple_of(2);
    let mut messages = Vec::new();
    while !input.is_empty() {
        let role = match input.byte() {
            0..64 => "user".to_owned(),
            64..128 => "assistant".to_owned(),
            128..160 => "system".to_owned(),
            160..192 => "tool".to_owned(),
            _ => input.text(),
        };
        messages.push(ChatMessage { role, content: input.text() });
    }
    let prompt = MODEL.apply_chat_template(&messages, add_generation_prompt).expect("a template that takes everything");
    for message in &messages {
        // Python's whitespace has four additional characters.
        let content = message.content.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c));
        assert!(prompt.contains(&message.role) && prompt.contains(content), "{message:?} in {prompt:?}");
    }
    MODEL.encode_chat(&messages, add_generation_prompt).expect("a text that can be tokenised");
    if let Err(error) = THOROUGH_MODEL.apply_chat_template(&messages, add_generation_prompt) {
        assert!(!error.to_string().is_empty());
    }
}

/// Renders two messages with an arbitrary template. Rendering must terminate.
pub fn chat_template(data: &[u8]) {
    let files =
        TextFiles { tokenizer_json: TOKENIZER.into(), chat_template: Some(data.into()), ..TextFiles::default() };
    let Ok(model) = TextModel::from_files(&files) else { return };
    let messages = [ChatMessage::new("system", "Be brief."), ChatMessage::new("user", "What's 1 + 1?")];
    match model.apply_chat_template(&messages, true) {
        Ok(prompt) => assert!(prompt.len() <= 2 << 20, "a prompt of {} bytes", prompt.len()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Decodes arbitrary ids after an arbitrary context. Pieces must be whole characters and join to the whole text.
pub fn detokenizer(data: &[u8]) {
    let mut input = Input::new(data);
    let skip_special = input.byte().is_multiple_of(2);
    let ids = |bytes: &[u8]| -> Vec<u32> {
        // The vocabulary has 320 ids; a few more have no text.
        bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) + u32::from(pair.get(1).map_or(0, |high| high % 2)) * 80)
            .collect()
    };
    let context = ids(input.bytes());
    let ids = ids(input.rest());
    check_pieces(&MODEL, &ids, skip_special);
    // Decoding after a context must not fail.
    let Ok(mut behind) = MODEL.detokenizer(&context, skip_special) else { panic!("a context without a decoder") };
    for id in ids {
        behind.push(id).expect("a text for any id");
    }
    behind.flush().expect("a text at the end");
}

/// Checks that the joined pieces equal the text decoded at once.
fn check_pieces(model: &TextModel, ids: &[u32], skip_special: bool) {
    let whole = model.decode(ids, skip_special).expect("a text for any ids");
    let mut decoder = model.detokenizer(&[], skip_special).expect("a decoder without a context");
    let mut pieces = String::new();
    for id in ids {
        pieces += &decoder.push(*id).expect("a text for any id");
        assert!(whole.starts_with(&pieces), "{ids:?}: {pieces:?} is not how {whole:?} begins");
    }
    pieces += &decoder.flush().expect("a text at the end");
    assert_eq!(pieces, whole, "{ids:?}");
}

/// Matches arbitrary stop texts in arbitrary pieces of text. The output must end at the stop text that is complete
/// first.
pub fn stop_texts(data: &[u8]) {
    let mut input = Input::new(data);
    let keep_stop = input.byte().is_multiple_of(2);
    let stops: Vec<String> = (0..input.below(5)).map(|_| input.text()).collect();
    let mut pieces = Vec::new();
    while !input.is_empty() {
        pieces.push(input.text());
    }
    let text = pieces.concat();
    let found = stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty()).filter_map(|(index, stop)| {
        let at = text.find(stop.as_str())?;
        Some((at + stop.len(), at, index))
    });
    let found = found.min();
    let expected = match found {
        Some((end, at, _)) => &text[..if keep_stop { end } else { at }],
        None => &text,
    };
    let mut matcher = StopMatcher::new(stops, keep_stop);
    let mut out = String::new();
    let mut stopped = None;
    for piece in pieces {
        let (more, stop) = matcher.push(&piece);
        assert!(stopped.is_none() || (more.is_empty() && stop.is_none()), "{more:?} after the stop");
        out += &more;
        stopped = stopped.or(stop);
        assert!(expected.starts_with(&out), "{out:?} is not how {expected:?} begins");
    }
    out += &matcher.flush();
    assert_eq!(out, expected);
    assert_eq!(stopped.map(|stop| stop.stop), found.map(|(_, _, index)| index));
}
