//! Target for the parts of chat answers: `text/src/answer/`.

use overfill_text::{AnswerFormat, AnswerParser, AnswerPart, ReasoningFormat, ToolFormat};

use crate::input::Input;

/// An answer with its fragments joined.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    reasoning: String,
    content: String,
    /// Name and arguments of each call.
    calls: Vec<(String, String)>,
}

/// Reads arbitrary pieces of an answer. They must give the same as the whole text. If nothing is found, all is content.
pub fn answers(data: &[u8]) {
    let mut input = Input::new(data);
    let tools = ToolFormat::ALL.get(usize::from(input.below(5))).copied();
    let reasoning = ReasoningFormat::ALL.get(usize::from(input.below(3))).copied();
    let flags = input.byte();
    let functions = ["f".to_owned(), "get_weather".into()];
    let format = AnswerFormat {
        tools,
        reasoning,
        reasoning_is_open: flags & 1 != 0,
        only_one_call: flags & 2 != 0,
        functions: functions.into(),
    };
    let mut pieces = Vec::new();
    while !input.is_empty() {
        pieces.push(input.text());
    }
    let text = pieces.concat();
    let whole = read(&format, std::slice::from_ref(&text));
    assert_eq!(read(&format, &pieces), whole, "{pieces:?}");
    let characters: Vec<String> = text.chars().map(String::from).collect();
    assert_eq!(read(&format, &characters), whole, "{text:?}");
    assert!(!format.only_one_call || whole.calls.len() <= 1);
    if whole.calls.is_empty() && reasoning.is_none() {
        assert_eq!(whole.content, text);
    }
}

/// Joins the parts of an answer, and checks their order.
fn read(format: &AnswerFormat, pieces: &[String]) -> Answer {
    let mut parser = AnswerParser::new(format);
    let mut parts: Vec<AnswerPart> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    parts.extend(parser.finish());
    let mut answer = Answer::default();
    let mut is_open = false;
    for part in parts {
        let within = matches!(part, AnswerPart::CallArguments(_) | AnswerPart::CallEnd);
        assert_eq!(is_open, within, "{part:?} in {pieces:?}");
        match part {
            AnswerPart::Reasoning(text) => {
                assert!(answer.content.is_empty() && answer.calls.is_empty(), "late reasoning in {pieces:?}");
                answer.reasoning += &text;
            }
            AnswerPart::Content(text) => answer.content += &text,
            AnswerPart::CallStart { name } => {
                is_open = true;
                answer.calls.push((name, String::new()));
            }
            AnswerPart::CallArguments(text) => answer.calls.last_mut().expect("a call").1 += &text,
            AnswerPart::CallEnd => is_open = false,
        }
    }
    assert!(!is_open, "an open call in {pieces:?}");
    answer
}
