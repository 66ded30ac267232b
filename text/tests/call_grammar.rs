//! Grammars of answers that must call functions: what they allow is parsed as calls with valid arguments.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::{path::Path, sync::Arc};

use overfill_kv::Grammar;
use overfill_text::{
    AnswerFormat, AnswerParser, AnswerPart, Grammars, ReasoningFormat, TextFiles, TextModel, ToolFormat,
};
use proptest::prelude::*;
use serde_json::{Value, json};

const VOCAB: usize = 340;
const MARKERS: [&str; 7] =
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>"];

struct Case {
    model: TextModel,
    grammars: Grammars,
    format: AnswerFormat,
    grammar: Grammar,
}

/// The arguments of `add` refer to a definition of their schema.
fn functions() -> [(&'static str, Value); 2] {
    let digit = json!({"type": "integer", "minimum": 0, "maximum": 9});
    [
        (
            "add",
            json!({"type": "object", "additionalProperties": false, "required": ["a", "b"], "$defs": {"digit": digit},
                   "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}}}),
        ),
        ("ping", json!({"type": "object", "properties": {}, "additionalProperties": false})),
    ]
}

impl Case {
    /// `special`: whether the markers are special tokens. `named`: whether the template is one of Mistral's newer ones.
    fn new(
        tools: ToolFormat,
        reasoning: Option<ReasoningFormat>,
        special: bool,
        named: bool,
        only_one_call: bool,
    ) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama-tied/full");
        let mut files = TextFiles::from_folder(&folder).unwrap();
        if special {
            let mut config: Value = serde_json::from_slice(files.tokenizer_config_json.as_ref().unwrap()).unwrap();
            config["additional_special_tokens"] = json!(MARKERS);
            files.tokenizer_config_json = Some(config.to_string().into_bytes());
        }
        files.chat_template = named.then(|| b"[TOOL_CALLS]f[ARGS]".to_vec());
        let model = TextModel::from_files(&files).unwrap();
        assert_eq!(model.special_ids(MARKERS.into_iter()).len(), if special { MARKERS.len() } else { 0 });
        let functions = functions();
        let names: Vec<String> = functions.iter().map(|(name, _)| (*name).to_owned()).collect();
        let format = AnswerFormat {
            reasoning,
            tools: Some(tools),
            functions: names.into(),
            only_one_call,
            ..AnswerFormat::default()
        };
        let functions: Vec<(&str, &Value)> = functions.iter().map(|(name, schema)| (*name, schema)).collect();
        let grammar = model.call_grammar(&format, &functions);
        let ends = model.eos_token_ids().to_vec();
        Self { grammars: Grammars::new(Arc::new(files), VOCAB, &ends), model, format, grammar }
    }

    /// Whether `text` is a whole answer.
    fn allows(&self, text: &str) -> bool {
        let mut matcher = self.grammars.matcher(&self.grammar).unwrap_or_else(|e| panic!("{e}: {:?}", self.grammar));
        let has = |set: &[u32], id: u32| set[id as usize / 32] >> (id % 32) & 1 == 1;
        for id in self.model.encode(text, false).unwrap() {
            if !has(&matcher.allowed().unwrap(), id) {
                return false;
            }
            matcher.accept(id).unwrap();
        }
        has(&matcher.allowed().unwrap(), self.model.eos_token_ids()[0])
    }

    /// An answer whose tokens are drawn from those that are allowed. It ends as soon as it may.
    fn draw(&self, mut random: impl FnMut() -> usize) -> String {
        let mut matcher = self.grammars.matcher(&self.grammar).unwrap();
        let shown = self.model.special_ids(self.format.markers());
        let mut decoder = self.model.detokenizer_showing(&[], &shown).unwrap();
        let mut text = String::new();
        for _ in 0..2000 {
            let set = matcher.allowed().unwrap();
            let allowed: Vec<u32> =
                (0..VOCAB as u32).filter(|id| set[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
            if allowed.contains(&self.model.eos_token_ids()[0]) {
                return text + &decoder.flush().unwrap();
            }
            let token = allowed[random() % allowed.len()];
            matcher.accept(token).unwrap();
            text += &decoder.push(token).unwrap();
        }
        panic!("the answer does not end: {text}");
    }

    /// The calls of a text. There is no content.
    fn calls(&self, text: &str) -> Vec<(String, Value)> {
        let mut parser = AnswerParser::new(&self.format);
        let mut parts = parser.push(text);
        parts.extend(parser.finish());
        let mut calls: Vec<(String, String)> = Vec::new();
        for part in parts {
            match part {
                AnswerPart::CallStart { name } => calls.push((name, String::new())),
                AnswerPart::CallArguments(text) => calls.last_mut().unwrap().1 += &text,
                AnswerPart::CallEnd | AnswerPart::Reasoning(_) => {}
                AnswerPart::Content(content) => panic!("content {content:?} in {text:?}"),
            }
        }
        calls.into_iter().map(|(name, text)| (name, serde_json::from_str(&text).unwrap())).collect()
    }
}

#[test]
fn answers_that_call_are_allowed() {
    let hermes = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}\n</tool_call>";
    let llama = "{\"name\": \"ping\", \"parameters\": {}}";
    let list = "[TOOL_CALLS][{\"name\": \"ping\", \"arguments\": {}}, {\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}]";
    let named = "[TOOL_CALLS]ping[ARGS]{}[TOOL_CALLS]add[ARGS]{\"a\": 1, \"b\": 2}";
    for special in [false, true] {
        let case = |tools, named| Case::new(tools, None, special, named, false);
        let cases = [
            (case(ToolFormat::Hermes, false), format!("{hermes}\n{hermes}"), 2),
            (case(ToolFormat::Hermes, false), hermes.to_owned(), 1),
            (case(ToolFormat::Llama3Json, false), llama.to_owned(), 1),
            (case(ToolFormat::Mistral, false), list.to_owned(), 2),
            (case(ToolFormat::Mistral, true), named.to_owned(), 2),
        ];
        for (case, text, calls) in &cases {
            assert!(case.allows(text), "{text} {:?}", case.grammar);
            assert_eq!(case.calls(text).len(), *calls);
            for wrong in
                ["", "I can't.", &text.replace("\"b\": 2", "\"b\": 12"), &format!("{text} x"), &text[..text.len() - 1]]
            {
                assert!(wrong == text || !case.allows(wrong), "{wrong} {:?}", case.grammar);
            }
        }
        let one = Case::new(ToolFormat::Hermes, None, special, false, true);
        assert!(one.allows(hermes) && !one.allows(&format!("{hermes}\n{hermes}")));
    }
}

#[test]
fn reasoning_may_come_first() {
    let call = "<tool_call>\n{\"name\": \"ping\", \"arguments\": {}}\n</tool_call>";
    for special in [false, true] {
        for (reasoning, is_open, allowed) in [
            (ReasoningFormat::Qwen3, false, ["", "<think>\nHm\n\n</think>\n\n"]),
            (ReasoningFormat::Qwen3, true, ["</think>", "\nHm </thin {\n</think>\n\n"]),
            (ReasoningFormat::DeepseekR1, false, ["Hm</think>", "<think>\nHm</think>\n"]),
        ] {
            let mut case = Case::new(ToolFormat::Hermes, Some(reasoning), special, false, false);
            case.format.reasoning_is_open = is_open;
            let [_, (name, schema)] = &functions();
            case.grammar = case.model.call_grammar(&case.format, &[(name, schema)]);
            for thoughts in allowed {
                let text = format!("{thoughts}{call}");
                assert!(case.allows(&text), "{text:?} {:?}", case.grammar);
                assert_eq!(case.calls(&text), [("ping".to_owned(), json!({}))]);
                assert!(!case.allows(&format!("{thoughts}Well")));
            }
        }
    }
}

#[test]
fn an_answer_of_a_format_may_reason_first() {
    for special in [false, true] {
        let mut case = Case::new(ToolFormat::Hermes, Some(ReasoningFormat::Qwen3), special, false, false);
        for (grammar, text) in [
            (Grammar::Json(r#"{"type": "integer"}"#.into()), "12"),
            (Grammar::Json("true".into()), "[1, \"a\"]"),
            (Grammar::Regex("[a-c/]+\\\\?".into()), "a/b\\"),
            (Grammar::Choice(vec!["yes".into(), "\"no\"".into()]), "\"no\""),
            (Grammar::Lark("start: \"a\" b\nb: /[0-9]+/".into()), "a17"),
        ] {
            let alone = grammar.clone();
            case.grammar = case.model.grammar_after_reasoning(&case.format, &grammar);
            for thoughts in ["", "<think>\nHm: 1.\n</think>\n\n"] {
                assert!(case.allows(&format!("{thoughts}{text}")), "{thoughts}{text} {:?}", case.grammar);
                assert!(!case.allows(&format!("{thoughts}{text} x")) && !case.allows(&format!("{thoughts}!")));
            }
            let none = AnswerFormat { reasoning: None, ..case.format.clone() };
            assert_eq!(case.model.grammar_after_reasoning(&none, &grammar), alone);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_drawn_calls(seed in any::<u64>(), tools in prop::sample::select(&ToolFormat::ALL[..]), special: bool,
                           named: bool, only_one: bool) {
        let mut state = seed;
        let random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let tools = if tools == ToolFormat::Pythonic { ToolFormat::Llama3Json } else { tools };
        let case = Case::new(tools, None, special, named, only_one);
        let text = case.draw(random);
        let calls = case.calls(&text);
        prop_assert!(!calls.is_empty() && (calls.len() == 1 || !only_one), "{text}");
        for (name, arguments) in calls {
            let number = |key: &str| arguments[key].as_u64().is_some_and(|n| n <= 9);
            let valid = if name == "add" { number("a") && number("b") } else { name == "ping" && arguments == json!({}) };
            prop_assert!(valid, "{text}");
        }
    }
}
