//! Tests of all formats.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const FUNCTIONS: [&str; 3] = ["get_weather", "search", "ping"];

fn format(tools: Option<ToolFormat>, reasoning: Option<ReasoningFormat>) -> AnswerFormat {
    let functions: Vec<String> = FUNCTIONS.map(str::to_owned).to_vec();
    AnswerFormat { reasoning, tools, functions: functions.into(), ..AnswerFormat::default() }
}

/// An answer with its fragments joined.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
}

/// Joins the parts, and checks their order.
fn joined(parts: Vec<AnswerPart>) -> Answer {
    let mut answer = Answer::default();
    let mut open = false;
    for part in parts {
        assert_eq!(open, matches!(part, AnswerPart::CallArguments(_) | AnswerPart::CallEnd), "{part:?}");
        match part {
            AnswerPart::Reasoning(text) => {
                assert!(answer.content.is_empty() && answer.calls.is_empty() && !text.is_empty());
                answer.reasoning += &text;
            }
            AnswerPart::Content(text) => {
                assert!(!text.is_empty());
                answer.content += &text;
            }
            AnswerPart::CallStart { name } => {
                open = true;
                answer.calls.push((name, String::new()));
            }
            AnswerPart::CallArguments(text) => answer.calls.last_mut().unwrap().1 += &text,
            AnswerPart::CallEnd => open = false,
        }
    }
    assert!(!open);
    answer
}

/// Parses the pieces of a text.
fn parse_pieces<'a>(format: &AnswerFormat, pieces: impl IntoIterator<Item = &'a str>) -> Answer {
    let mut parser = AnswerParser::new(format);
    let mut parts: Vec<AnswerPart> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
    parts.extend(parser.finish());
    joined(parts)
}

/// Parses a text as a whole and by characters, which must give the same.
fn parse(format: &AnswerFormat, text: &str) -> Answer {
    let whole = parse_pieces(format, [text]);
    assert_eq!(parse_pieces(format, text.split_inclusive(|_| true)), whole, "{text}");
    whole
}

fn answer(content: &str, calls: &[(&str, Value)]) -> (String, Vec<(String, Value)>) {
    (content.to_owned(), calls.iter().map(|(name, arguments)| ((*name).to_owned(), arguments.clone())).collect())
}

/// The content, and the calls with their arguments as values.
fn parse_calls(tools: ToolFormat, text: &str) -> (String, Vec<(String, Value)>) {
    let Answer { content, calls, .. } = parse(&format(Some(tools), None), text);
    let calls = calls.into_iter().map(|(name, text)| {
        let arguments = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        (name, arguments)
    });
    (content, calls.collect())
}

#[test]
fn hermes() {
    let parse = |text: &str| parse_calls(ToolFormat::Hermes, text);
    let rome = ("get_weather", json!({"location": "Rome"}));
    let one = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"location\": \"Rome\"}}\n</tool_call>";
    assert_eq!(parse(one), answer("", std::slice::from_ref(&rome)));
    assert_eq!(parse(&format!("I look.\n{one}\n{one}\n")), answer("I look.", &[rome.clone(), rome.clone()]));
    assert_eq!(parse(&format!("{one}\n Done.")), answer("\n Done.", std::slice::from_ref(&rome)));
    // Arguments before the name, as a text, missing, or without the closing tag.
    let before = r#"<tool_call>{"arguments": {"location": "Rome"}, "id": 7, "name": "get_weather"}"#;
    assert_eq!(parse(before), answer("", std::slice::from_ref(&rome)));
    let text = r#"<tool_call>{"name": "get_weather", "arguments": "{\"location\": \"Rome\"}"}</tool_call>"#;
    assert_eq!(parse(text), answer("", &[rome]));
    assert_eq!(parse(r#"<tool_call>{"name": "x"}</tool_call>"#), answer("", &[("x", json!({}))]));
    assert_eq!(parse(r#"<tool_call>{"name": "x", "arguments": null}"#), answer("", &[("x", json!({}))]));
    // Line breaks within a string.
    let broken = "<tool_call>{\"name\": \"x\", \"arguments\": {\"a\": \"1\n\t2\"}}</tool_call>";
    assert_eq!(parse(broken), answer("", &[("x", json!({"a": "1\n\t2"}))]));
    for text in [
        "",
        " \n",
        "a < b </tool_call> <tool",
        "<tool_call>",
        "<tool_call> {\"name\": 3}</tool_call>",
        "<tool_call>{\"name\": \"a b\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"x\", \"arguments\": [1]}</tool_call>",
        "<tool_call>{\"name\": \"get_wea",
        "x <tool_call>\n<function=f>\n</function>\n</tool_call>\n",
    ] {
        assert_eq!(parse(text), answer(text, &[]), "{text}");
    }
    assert_eq!(parse(&format!("<tool_call><tool_call>{one}")).1.len(), 1);
}

#[test]
fn arguments_that_stop_being_json_are_cut_there() {
    let hermes = format(Some(ToolFormat::Hermes), None);
    let got = parse(&hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 'x'}}</tool_call> Bye");
    assert_eq!(got.calls, [("f".to_owned(), "{\"a\": ".to_owned())]);
    assert_eq!(got.content, "'x'}}</tool_call> Bye");
    let got = parse(&hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"cut o");
    assert_eq!((got.calls[0].1.as_str(), got.content.as_str()), ("{\"a\": \"cut o", ""));
    // What is wrong after the arguments does not change the call.
    let got = parse(&hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {}} }</tool_call>");
    assert_eq!((got.calls[0].1.as_str(), got.content.as_str()), ("{}", " }</tool_call>"));
}

#[test]
fn llama() {
    let parse = |text: &str| parse_calls(ToolFormat::Llama3Json, text);
    let rome = ("get_weather", json!({"location": "Rome"}));
    let one = r#"{"name": "get_weather", "parameters": {"location": "Rome"}}"#;
    assert_eq!(parse(one), answer("", std::slice::from_ref(&rome)));
    let tagged = format!("Wait. <|python_tag|>{one}");
    assert_eq!(parse(&tagged), answer("Wait.", std::slice::from_ref(&rome)));
    let two = format!(" <|python_tag|>{one}; {one}");
    assert_eq!(parse(&two), answer("", &[rome.clone(), rome.clone()]));
    assert_eq!(parse(&format!("[{one}, {one}]")), answer("", &[rome.clone(), rome.clone()]));
    assert_eq!(parse(&format!("{one};\nBye")), answer(";\nBye", &[rome]));
    for text in [
        // JSON that is no call of a function that the request has.
        r#"{"name": "Bob", "parameters": {}}"#,
        r#"{"type": "person", "age": 4.5e1, "tags": ["a", true, null]}"#,
        "[1, 2]",
        "The weather: {\"name\": \"get_weather\", \"parameters\": {}}",
        "<|python_tag|>search.call(query=\"x\")",
        "{\"name\": \"get_weather\", \"para",
    ] {
        assert_eq!(parse(text), answer(text, &[]), "{text}");
    }
}

#[test]
fn mistral() {
    let parse = |text: &str| parse_calls(ToolFormat::Mistral, text);
    let rome = ("get_weather", json!({"location": "Rome"}));
    for calls in [
        r#"[TOOL_CALLS][{"name": "get_weather", "arguments": {"location": "Rome"}}, {"name": "ping", "arguments": {}}]"#,
        r#"[TOOL_CALLS] [{"name": "get_weather", "arguments": {"location": "Rome"}, "id": "abc"},{"name": "ping"}]"#,
        r#"[TOOL_CALLS]get_weather{"location": "Rome"}[TOOL_CALLS]ping{}"#,
        r#"[TOOL_CALLS]get_weather[ARGS]{"location": "Rome"}[TOOL_CALLS]ping[ARGS]{}"#,
        r#"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"location": "Rome"} [TOOL_CALLS]ping[ARGS] {}"#,
    ] {
        let two = [rome.clone(), ("ping", json!({}))];
        assert_eq!(parse(calls), answer("", &two), "{calls}");
        assert_eq!(parse(&format!("Well: {calls}")), answer("Well:", &two), "{calls}");
    }
    for text in ["[TOOL_CALLS]", "[TOOL_CALLS] is a token {", "[TOOL_CALLS][]", "a [ARGS] b", "[TOOL_CALLS]ping[ARGS"] {
        assert_eq!(parse(text), answer(text, &[]), "{text}");
    }
}

#[test]
fn pythonic() {
    let parse = |text: &str| parse_calls(ToolFormat::Pythonic, text);
    let text = r#"[get_weather(location="R\"\u00f6me'\n", unit='c"'), search( tags = [ 'a', "b", ], limit=-3, ratio=.5, exact=True, range={'from': None, "to": {}}), ping()]"#;
    let calls = [
        ("get_weather", json!({"location": "R\"öme'\n", "unit": "c\""})),
        (
            "search",
            json!({"tags": ["a", "b"], "limit": -3, "ratio": 0.5, "exact": true, "range": {"from": null, "to": {}}}),
        ),
        ("ping", json!({})),
    ];
    assert_eq!(parse(text), answer("", &calls));
    assert_eq!(parse(&format!("<|python_start|>{text}<|python_end|>")), answer("", &calls));
    assert_eq!(parse(&format!("{text} Bye")), answer(" Bye", &calls));
    let smile = parse(r#"[search(query="\ud83d\ude00 \x41 \d")]"#);
    assert_eq!(smile, answer("", &[("search", json!({"query": "😀 A \\d"}))]));
    for text in ["[1, 2]", "[]", "[other(a=1)]", "ping()", "Yes: [ping()]", "[ping", "<|python_end|>"] {
        assert_eq!(parse(text), answer(text, &[]), "{text}");
    }
    let cut = super::tests::parse(&format(Some(ToolFormat::Pythonic), None), "[ping(3)]");
    assert_eq!((cut.calls[0].1.as_str(), cut.content.as_str()), ("{", ")]"));
}

#[test]
fn reasoning() {
    let qwen = format(Some(ToolFormat::Hermes), Some(ReasoningFormat::Qwen3));
    let call = "<tool_call>{\"name\": \"ping\", \"arguments\": {}}</tool_call>";
    let got = parse(&qwen, &format!("<think>\nHm, {call}?\n\nOk.\n</think>\n\n{call}"));
    assert_eq!(got.reasoning, format!("Hm, {call}?\n\nOk."));
    assert_eq!((got.content.as_str(), got.calls.len()), ("", 1));
    let got = parse(&qwen, " <think>a</think>\n\n  b\n");
    assert_eq!((got.reasoning.as_str(), got.content.as_str()), ("a", "  b\n"));
    let got = parse(&qwen, "No <think>a</think>");
    assert_eq!((got.reasoning.as_str(), got.content.as_str()), ("", "No <think>a</think>"));
    for cut in ["<think>a\n</thi", "<think>\na\n</thi"] {
        assert_eq!(parse(&qwen, cut).reasoning, "a\n</thi");
    }
    assert_eq!(parse(&qwen, "<thi").content, "<thi");
    assert_eq!(parse(&qwen, "<think>\n\n</think>\n\nx").reasoning, "");
    let open = AnswerFormat { reasoning_is_open: true, ..qwen };
    let got = parse(&open, "a < b\n</think>\nc");
    assert_eq!((got.reasoning.as_str(), got.content.as_str()), ("a < b", "c"));
    let r1 = format(None, Some(ReasoningFormat::DeepseekR1));
    for text in ["a</think>c", "<think>\na</think>c", "\na\n</think>\nc"] {
        let got = parse(&r1, text);
        assert_eq!((got.reasoning.as_str(), got.content.as_str()), ("a", "c"), "{text}");
    }
    assert_eq!(parse(&r1, "<thi").reasoning, "<thi");
}

#[test]
fn where_the_prompt_leaves_the_reasoning() {
    let at = |prompt| ReasoningFormat::Qwen3.position(prompt, None);
    assert_eq!(at("what is <think>?\n<|im_start|>assistant\n"), ReasoningPosition::Before);
    assert_eq!(at("<|im_start|>assistant\n<think>\n"), ReasoningPosition::Within);
    assert_eq!(at("<|im_start|>assistant\n<think>\n\n</think>\n\n"), ReasoningPosition::After);
    let continuing = |message| ReasoningFormat::Qwen3.position("assistant\n", Some(message));
    assert_eq!(continuing("<think>\nHm"), ReasoningPosition::Within);
    assert_eq!(continuing("<think>\nHm</think> The"), ReasoningPosition::After);
    assert_eq!(continuing("The"), ReasoningPosition::After);
    assert_eq!(continuing(""), ReasoningPosition::Before);
}

#[test]
fn only_one_call() {
    let one = AnswerFormat { only_one_call: true, ..format(Some(ToolFormat::Llama3Json), None) };
    let call = r#"{"name": "ping", "parameters": {"a": 1}}"#;
    assert_eq!(parse(&one, &format!("{call}; {call}")).calls, [("ping".to_owned(), "{\"a\": 1}".to_owned())]);
}

#[test]
fn arguments_are_passed_on_as_they_come() {
    let mut parser = AnswerParser::new(&format(Some(ToolFormat::Hermes), None));
    assert_eq!(parser.push("Ok\n<tool_call>{\"name\": \"ping\", \"arg"), [AnswerPart::Content("Ok".into())]);
    let parts = parser.push("uments\": {\"a");
    let start = AnswerPart::CallStart { name: "ping".into() };
    assert_eq!(parts, [start, AnswerPart::CallArguments("{\"a".into())]);
    assert_eq!(parser.push("\": 1"), [AnswerPart::CallArguments("\": 1".into())]);
    assert_eq!(parser.push("}"), [AnswerPart::CallArguments("}".into())]);
    assert_eq!(parser.push("}"), [AnswerPart::CallEnd]);
    assert_eq!(parser.push("\n</tool_call>\n"), []);
    assert_eq!(parser.finish(), []);
}

/// A call in a format, as models write it.
fn written(tools: ToolFormat, calls: &[(String, Value)], spaced: bool) -> String {
    let object = |key: &str, (name, arguments): &(String, Value)| {
        let object = json!({"name": name, key: arguments});
        if spaced { serde_json::to_string_pretty(&object).unwrap() } else { object.to_string() }
    };
    let objects = |key: &str| calls.iter().map(|call| object(key, call)).collect::<Vec<_>>();
    match tools {
        ToolFormat::Hermes => {
            objects("arguments").iter().map(|o| format!("<tool_call>\n{o}\n</tool_call>\n")).collect::<String>()
        }
        ToolFormat::Llama3Json => objects("parameters").join("; "),
        ToolFormat::Mistral if spaced => format!("[TOOL_CALLS][{}]", objects("arguments").join(", ")),
        ToolFormat::Mistral => {
            calls.iter().map(|(name, arguments)| format!("[TOOL_CALLS]{name}[ARGS]{arguments}")).collect()
        }
        ToolFormat::Pythonic => {
            let value = |value: &Value| {
                let text = value.to_string();
                // Outside of strings, JSON differs from Python only in these words.
                if value.is_string() { text } else { text.replace("true", "True").replace("null", "None") }
            };
            let call = |(name, arguments): &(String, Value)| {
                let arguments = arguments.as_object().unwrap().iter();
                let arguments: Vec<String> = arguments.map(|(key, v)| format!("{key}={}", value(v))).collect();
                format!("{name}({})", arguments.join(if spaced { ", " } else { "," }))
            };
            format!("[{}]", calls.iter().map(call).collect::<Vec<_>>().join(", "))
        }
    }
}

fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        any::<i32>().prop_map(|n| json!(f64::from(n) / 8.0)),
        "[ -~é\n\t\"\\\\]{0,8}".prop_map(|text| Value::from(text.replace("true", "").replace("null", ""))),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,4}", inner, 0..3).prop_map(|map| json!(map)),
        ]
    })
}

fn all_calls() -> impl Strategy<Value = Vec<(String, Value)>> {
    let arguments = prop::collection::btree_map("[a-z_]{1,6}", values(), 0..3).prop_map(|map| json!(map));
    prop::collection::vec((prop::sample::select(&FUNCTIONS[..]).prop_map(str::to_owned), arguments), 1..3)
}

/// Cuts a text into pieces of `lengths` characters, in a cycle.
fn pieces<'a>(text: &'a str, lengths: &[usize]) -> Vec<&'a str> {
    let mut rest = text;
    let mut pieces = Vec::new();
    for length in lengths.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let end = rest.char_indices().nth(*length).map_or(rest.len(), |(at, _)| at);
        let (piece, left) = rest.split_at(end);
        pieces.push(piece);
        rest = left;
    }
    pieces
}

proptest! {
    #[test]
    fn calls_are_found_however_the_text_is_cut(calls in all_calls(), tools in prop::sample::select(&ToolFormat::ALL[..]),
                                               spaced: bool, lengths in prop::collection::vec(1usize..9, 1..8)) {
        let text = format!("<think>x</think>\n{}", written(tools, &calls, spaced));
        let format = format(Some(tools), Some(ReasoningFormat::Qwen3));
        let got = parse_pieces(&format, pieces(&text, &lengths));
        prop_assert_eq!((got.reasoning.as_str(), got.content.as_str()), ("x", ""));
        let got: Vec<(String, Value)> =
            got.calls.into_iter().map(|(name, text)| (name, serde_json::from_str(&text).unwrap())).collect();
        prop_assert_eq!(got, calls);
    }

    /// Texts that look like calls, and are cut and mixed anyhow.
    #[test]
    fn cuts_do_not_matter(words in prop::collection::vec(prop::sample::select(&WORDS[..]), 0..14),
                          tools in prop::sample::select(&ToolFormat::ALL[..]), open: bool,
                          reasoning in prop::sample::select(&ReasoningFormat::ALL[..]),
                          lengths in prop::collection::vec(1usize..9, 1..8)) {
        let text = words.concat();
        let format = AnswerFormat { reasoning_is_open: open, ..format(Some(tools), Some(reasoning)) };
        let whole = parse_pieces(&format, [text.as_str()]);
        prop_assert_eq!(&parse_pieces(&format, pieces(&text, &lengths)), &whole);
        // Without calls and reasoning, nothing is missing.
        let format = AnswerFormat { reasoning: None, ..format };
        let whole = parse_pieces(&format, [text.as_str()]);
        if whole.calls.is_empty() {
            prop_assert_eq!(whole.content, text);
        }
    }
}

const WORDS: [&str; 32] = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<think>",
    "</think>",
    "{\"name\": \"ping\", ",
    "\"arguments\": {",
    "\"parameters\": {\"a\": ",
    "{",
    "}",
    "}}",
    "[",
    "]",
    "[ping(",
    "a=",
    ")",
    "ping",
    "\"",
    "'",
    ",",
    ";",
    " ",
    "\n",
    "1.5",
    "true",
    "None",
    "<",
    "é",
];
