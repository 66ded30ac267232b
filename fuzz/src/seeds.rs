//! Valid, small inputs to start from. Together they cover what each target accepts.

use overfill_kv::handoff::{Commit, Hello, Piece, RefuseReason};
use overfill_kv::{Grammar, SamplingParams, Ticket, TransportSet};
use overfill_model::ModelConfig;
use overfill_proto::v1;
use overfill_transport::nccl::SenderId;
use overfill_transport::rdma::{self, Place, Places, RdmaAddress};
use overfill_transport::tcp::format::Format;
use overfill_transport::tcp::frame::{
    ANSWER_BYTES, Answer, Header, encode_answer, encode_commit, encode_header, encode_hello, encode_ping,
};
use overfill_transport::tcp::hello::{self, Grant, Offer, Way};
use prost::Message;
use serde_json::{Map, Value, json};

use crate::files::{CONFIG, FILES};
use crate::messages::SCHEMA;
use crate::text::TOKENIZER;

/// File name and content of a seed.
pub type Seed = (String, Vec<u8>);

/// Returns the seeds of a target. `seeds/` contains them, and may also contain inputs that once failed.
pub fn seeds(target: &str) -> Vec<Seed> {
    let seeds: Vec<(&str, Vec<u8>)> = match target {
        "frames" => frames(),
        "handoff" => handoff(),
        "messages" => messages(),
        "http_bodies" => http_bodies(),
        "safetensors" => safetensors(),
        "gguf" => vec![("model", gguf())],
        "model_folder" => model_folder(),
        "chat_messages" => chat_messages(),
        "chat_template" => chat_templates(),
        "detokenizer" => vec![
            ("text", [&[0, 2, 40, 0][..], &[72, 0, 101, 0, 108, 1, 111, 1, 3, 0, 200, 0]].concat()),
            ("bytes", [&[1, 0][..], &(100..250).flat_map(|id| [id, 0]).collect::<Vec<u8>>()].concat()),
        ],
        "stop_texts" => vec![
            ("one", b"\x00\x01\x03end\x05hello\x02 e\x02nd\x03 no".to_vec()),
            ("several", "\u{1}\u{2}\u{3}aéb\u{2}é\u{1}a\u{2}aé\u{1}b".as_bytes().to_vec()),
        ],
        "answers" => answers(),
        other => panic!("no target {other}"),
    };
    seeds.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

/// The formats of calls and of reasoning, three flags, and the text in pieces.
fn answers() -> Vec<(&'static str, Vec<u8>)> {
    let object = r#"{"name": "f", "arguments": {"a": [1.5e3, "\u00e9\n", true, null], "b": {}}}"#;
    let seed = |formats: [u8; 3], text: &str| {
        let bytes = text.as_bytes();
        let pieces = bytes.chunks(50).flat_map(|piece| [&[piece.len() as u8][..], piece].concat());
        formats.into_iter().chain(pieces).collect()
    };
    let hermes =
        format!("<think>\nHm\n</think>\n\nWell\n<tool_call>\n{object}\n</tool_call>\n<tool_call>{object}</tool_call>");
    let llama = format!("<|python_tag|>{object}; {object}").replace("arguments", "parameters");
    let python = r#"[f(a=[-1, .5, None], b='x\u00e9\'', c={"d": True}), get_weather()]"#;
    vec![
        ("hermes", seed([0, 0, 0], &hermes)),
        ("llama", seed([1, 2, 0], &llama)),
        ("pythonic", seed([2, 1, 1], &format!("x</think>{python}"))),
        ("mistral", seed([3, 2, 0], &format!("[TOOL_CALLS][{object}, {object}]"))),
        ("mistral-named", seed([3, 2, 2], "[TOOL_CALLS]f[ARGS]{\"a\": {}}[TOOL_CALLS]f[CALL_ID]x[ARGS]{}")),
    ]
}

fn frames() -> Vec<(&'static str, Vec<u8>)> {
    let hello = Hello { ticket: Ticket([7; 16]), schema_digest: [9; 32], held_blocks: 1, prompt_tokens: 100 };
    let piece = Piece { layer: 1, first_block: 2, blocks: 3 };
    let address = RdmaAddress { qp: 17, psn: 5, gid: [7; 16], lid: 0, mtu: 5 };
    let places = Places { staging: None, layers: vec![Place { address: 1 << 40, key: 7 }], blocks: vec![4, 5] };
    let grant = Grant { version: 2, way: Way::Rdma(rdma::Grant { address, places }) };
    vec![
        ("hello", encode_hello(&hello).to_vec()),
        ("hello-2", hello::encode(&Offer::new(hello, TransportSet(3), Some(address), Some(SenderId([6; 16]))))),
        ("grant", hello::encode_accepted(&grant)[ANSWER_BYTES + 4..].to_vec()),
        ("written", Format::new(2, 8).encode(&Header::Written(piece, 9))),
        ("accept", encode_answer(Answer::Accept).to_vec()),
        ("refuse", encode_answer(Answer::Refuse(RefuseReason::Checksum)).to_vec()),
        ("layer", encode_header(&Header::Layer(piece, 1 << 16)).to_vec()),
        ("ping", encode_ping().to_vec()),
        ("commit", encode_commit(&Commit { first_token: 7, frames: 3, bytes: 1 << 16 }, 12).to_vec()),
    ]
}

fn handoff() -> Vec<(&'static str, Vec<u8>)> {
    // Two layers of two blocks, starting at block 1: hello, each layer announced and received, commit, decode, end.
    let head = [1, 1, 1, 0];
    let layer = |layer, first, blocks| [5, layer, first, blocks, 13, 0];
    let whole = [&head[..], &layer(0, 1, 2), &layer(1, 1, 1), &layer(1, 2, 1), &[21, 26, 27, 28]].concat();
    let short = [&head[..], &layer(0, 1, 2), &[25, 21]].concat();
    let outside = [&head[..], &layer(0, 0, 2), &[28]].concat();
    let slow = [&head[..], &layer(0, 1, 1), &[29, 29, 28]].concat();
    // The window of the first layer has left block 1 behind.
    let windowed = [&[4, 1, 1, 0][..], &layer(1, 1, 2), &layer(0, 2, 1), &[21, 26, 27, 28]].concat();
    vec![("whole", whole), ("short", short), ("outside", outside), ("slow", slow), ("windowed", windowed)]
}

fn messages() -> Vec<(&'static str, Vec<u8>)> {
    let of = |kind: u8, message: &[u8]| [&[kind], message].concat();
    let sampling = SamplingParams { logit_bias: [(7, 1.5)].into(), logprobs: Some(2), ..SamplingParams::greedy() };
    let constrained = SamplingParams {
        grammar: Some(Grammar::Choice(vec!["a".into(), "b".into()])),
        allowed_token_ids: vec![4, 5],
        bad_words: vec![vec![4, 4]],
        min_tokens: 3,
        end_token_ids: vec![1],
        ..sampling.clone()
    };
    let [sampling, constrained] = [&sampling, &constrained].map(v1::SamplingParams::from);
    let schema = v1::KvSchema::from(&*SCHEMA);
    let decode = v1::DecodeRequest {
        request_id: "r".into(),
        prompt_tokens: (1..20).collect(),
        sampling: Some(sampling.clone()),
        max_tokens: 40,
        stop_token_ids: vec![1],
        deadline_seconds: 4.0,
        generated_tokens: 2,
        producer: "f".into(),
        incarnation: "1".into(),
        mode: v1::Mode::Unspecified.into(),
        model: "m".into(),
    };
    let prefill = v1::PrefillRequest {
        request_id: "r".into(),
        prompt_tokens: (1..20).collect(),
        sampling: Some(sampling.clone()),
        handoff: Some(v1::HandoffTarget {
            ticket: vec![7; 16],
            kv_endpoint: Some(overfill_kv::KvEndpoint::new("127.0.0.1:1".into()).into()),
            kv_schema: Some(schema.clone()),
            held_tokens: 16,
        }),
        ..Default::default()
    };
    let extend = v1::ExtendRequest {
        request_id: "r".into(),
        lease: vec![7; 16],
        position: 20,
        tokens: (1..20).collect(),
        standing_tokens: 14,
        choose: true,
        handoff: prefill.handoff.clone(),
        handoff_end_tokens: 32,
        ..Default::default()
    };
    let score = v1::ScoreRequest {
        request_id: "r".into(),
        tokens: (1..20).collect(),
        generated_tokens: 5,
        sampling: Some(sampling.clone()),
        ..Default::default()
    };
    let verdict = v1::VerdictRequest {
        request_id: "r".into(),
        ticket: vec![7; 16],
        position: 20,
        tokens: vec![3, 4],
        seconds_per_draft: Some(0.25),
        ..Default::default()
    };
    let generate = v1::GenerateRequest {
        model: "m".into(),
        prompt: Some(v1::generate_request::Prompt::TokenIds(v1::TokenIds { ids: vec![1, 2, 3] })),
        sampling: Some(sampling.clone()),
        max_tokens: 4,
        stop: vec!["end".into()],
        ..Default::default()
    };
    let info = v1::NodeInfo {
        node_id: "n".into(),
        role: v1::Role::Decode.into(),
        kv_schema: Some(schema.clone()),
        ..Default::default()
    };
    let reserved = v1::Reserved {
        ticket: vec![7; 16],
        kv_endpoint: Some(overfill_kv::KvEndpoint::new("127.0.0.1:1".into()).into()),
        held_tokens: 16,
        kv_schema: Some(schema.clone()),
    };
    let token = v1::OutputToken { token: 3, logprob: -0.5, top: vec![v1::TokenLogprob { token: 3, logprob: -0.5 }] };
    let first = v1::FirstToken { token: Some(token), prefill_seconds: 0.1 };
    let decode_event = v1::DecodeEvent { event: Some(v1::decode_event::Event::Reserved(reserved)) };
    let prefill_event = v1::PrefillEvent { event: Some(v1::prefill_event::Event::FirstToken(first)) };
    vec![
        ("decode", of(0, &decode.encode_to_vec())),
        ("prefill", of(1, &prefill.encode_to_vec())),
        ("generate", of(2, &generate.encode_to_vec())),
        ("schema", of(3, &schema.encode_to_vec())),
        ("sampling", of(4, &sampling.encode_to_vec())),
        ("constrained", of(4, &constrained.encode_to_vec())),
        ("info", of(5, &info.encode_to_vec())),
        ("decode-event", of(6, &decode_event.encode_to_vec())),
        ("prefill-event", of(7, &prefill_event.encode_to_vec())),
        ("extend", of(8, &extend.encode_to_vec())),
        ("verdict", of(9, &verdict.encode_to_vec())),
        ("score", of(10, &score.encode_to_vec())),
    ]
}

fn http_bodies() -> Vec<(&'static str, Vec<u8>)> {
    let of = |kind: u8, body: Value| [&[kind][..], body.to_string().as_bytes()].concat();
    let everything = json!({
        "model": "m", "prompt": [[1, 2], [3]], "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "n": 2,
        "min_p": 0.1, "seed": -3, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1,
        "logit_bias": {"7": -5}, "stop": ["a", "é"], "logprobs": 2, "echo": true, "ignore_eos": true,
        "stop_token_ids": [3], "stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true,
        "skip_special_tokens": false, "tools": [], "suffix": null,
    });
    let chat = json!({
        "model": "m", "max_completion_tokens": 4, "logprobs": true, "top_logprobs": 2, "stop": "x",
        "messages": [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "é"}]},
                     {"role": "assistant", "content": null, "tool_calls": []}],
    });
    let tools = json!({
        "max_tokens": 4, "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": false,
        "tools": [{"type": "function", "function": {"name": "f", "description": "x", "strict": true, "parameters":
                   {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}}],
        "messages": [{"role": "user", "content": "hi"},
                     {"role": "assistant", "reasoning_content": "r", "tool_calls":
                      [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1.0}"}}]},
                     {"role": "tool", "tool_call_id": "c", "name": "f", "content": "x"},
                     {"role": "assistant", "content": "We"}],
        "continue_final_message": true, "chat_template_kwargs": {"enable_thinking": false}, "documents": [{"title": "t"}],
    });
    let responses = json!({
        "model": "m", "max_output_tokens": 4, "instructions": "Be brief.", "tool_choice": {"type": "function", "name": "f"},
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}], "reasoning": {"effort": "none"},
        "input": [{"role": "developer", "content": "x"}, {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                  {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
                  {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{\"a\": 1.0}"},
                  {"type": "function_call_output", "call_id": "c", "output": "x"}],
        "include": ["message.output_text.logprobs"], "top_logprobs": 2, "store": true,
    });
    let messages = json!({
        "model": "m", "max_tokens": 4, "system": [{"type": "text", "text": "Be brief."}], "stop_sequences": ["x"],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "low"},
        "messages": [{"role": "user", "content": "hi"},
                     {"role": "assistant", "content": [{"type": "thinking", "thinking": "r", "signature": ""},
                      {"type": "text", "text": "t"}, {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
                     {"role": "assistant", "content": "We"}],
    });
    vec![
        ("responses", of(2, responses)),
        ("messages", of(3, messages)),
        ("tools", of(1, tools)),
        ("text", of(0, json!({"prompt": "hello"}))),
        ("texts", of(0, json!({"prompt": ["hello", "world"], "max_tokens": 0, "echo": true}))),
        ("everything", of(0, everything)),
        ("chat", of(1, chat)),
    ]
}

fn config() -> ModelConfig {
    let value = serde_json::from_str(CONFIG).expect("the configuration above");
    ModelConfig::from_json(std::path::Path::new("config.json"), value).expect("the configuration above")
}

/// A checkpoint in each format of [`QUANTISATIONS`](crate::files::QUANTISATIONS).
fn safetensors() -> Vec<(&'static str, Vec<u8>)> {
    const ONES: [u8; 64] = [1; 64];
    let shape = |rows: usize, columns: usize| [(rows as u64).to_le_bytes(), (columns as u64).to_le_bytes()].concat();
    let names = ["model", "fp8-blocks", "fp8", "gptq", "packed", "bytes"];
    names
        .into_iter()
        .zip(0..)
        .map(|(name, number)| {
            let mut tensors = Vec::new();
            for (name, dimensions) in config().tensor_shapes() {
                let ([rows, columns], true) = (dimensions.as_slice(), number > 0 && name.contains("layers")) else {
                    tensors.push((name, "BF16", dimensions.clone(), vec![1; 2 * dimensions.iter().product::<usize>()]));
                    continue;
                };
                let (rows, columns) = (*rows, *columns);
                let mut part = |part: &str, dtype, shape: &[usize], bytes: &[u8]| {
                    tensors.push((name.replace("weight", part), dtype, shape.to_vec(), bytes.to_vec()));
                };
                match number {
                    1 | 2 => {
                        part("weight", "F8_E4M3", &[rows, columns], &ONES[..rows * columns]);
                        let scales = if number == 1 { vec![rows.div_ceil(3), 2] } else { vec![] };
                        part("weight_scale", "BF16", &scales, &ONES[..2 * scales.iter().product::<usize>()]);
                    }
                    3 => {
                        part("qweight", "I32", &[1, rows], &ONES[..4 * rows]);
                        part("qzeros", "I32", &[2, 1], &ONES[..8]);
                        part("scales", "F16", &[2, rows], &ONES[..4 * rows]);
                        part("g_idx", "I32", &[columns], &[0; 16]);
                    }
                    4 => {
                        part("weight_packed", "I32", &[rows, 1], &ONES[..4 * rows]);
                        part("weight_scale", "BF16", &[rows, 2], &ONES[..4 * rows]);
                        part("weight_zero_point", "I32", &[1, 2], &ONES[..8]);
                        part("weight_shape", "I64", &[2], &shape(rows, columns));
                    }
                    _ => {
                        part("weight", "I8", &[rows, columns], &ONES[..rows * columns]);
                        part("weight_scale", "F32", &[rows, 1], &ONES[..4 * rows]);
                        part("weight_zero_point", "I8", &[rows, 1], &ONES[..rows]);
                    }
                }
            }
            let (mut header, mut data) = (Map::new(), Vec::new());
            for (name, dtype, shape, bytes) in tensors {
                let start = data.len();
                data.extend(bytes);
                header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
            }
            let header = Value::Object(header).to_string();
            (name, [&[number], &(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat())
        })
        .collect()
}

fn gguf() -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let entry = |key: &str, kind: u32, value: &[u8]| [&text(key), &kind.to_le_bytes()[..], value].concat();
    let number = |key: &str, number: u32| entry(key, 4, &number.to_le_bytes());
    let texts = |key: &str, list: &[&str]| {
        let head = [&8_u32.to_le_bytes()[..], &(list.len() as u64).to_le_bytes()].concat();
        entry(key, 9, &list.iter().fold(head, |all, item| [all, text(item)].concat()))
    };
    let metadata = [
        entry("general.architecture", 8, &text("llama")),
        number("llama.block_count", 1),
        number("llama.embedding_length", 4),
        number("llama.feed_forward_length", 4),
        number("llama.attention.head_count", 2),
        number("llama.attention.head_count_kv", 1),
        number("llama.context_length", 64),
        entry("llama.attention.layer_norm_rms_epsilon", 6, &1e-5_f32.to_le_bytes()),
        entry("tokenizer.ggml.model", 8, &text("gpt2")),
        entry("tokenizer.ggml.pre", 8, &text("gpt-2")),
        texts("tokenizer.ggml.tokens", &["<s>", "</s>", "a", "b", "ab", "c", "d", "e"]),
        texts("tokenizer.ggml.merges", &["a b"]),
        number("tokenizer.ggml.bos_token_id", 0),
        number("tokenizer.ggml.eos_token_id", 1),
        entry("tokenizer.chat_template", 8, &text("{{ messages[0].content }}")),
    ];
    let tensors: [(&str, &[u64]); 11] = [
        ("token_embd.weight", &[4, 8]),
        ("output_norm.weight", &[4]),
        ("blk.0.attn_norm.weight", &[4]),
        ("blk.0.ffn_norm.weight", &[4]),
        ("blk.0.attn_q.weight", &[4, 4]),
        ("blk.0.attn_k.weight", &[4, 2]),
        ("blk.0.attn_v.weight", &[4, 2]),
        ("blk.0.attn_output.weight", &[4, 4]),
        ("blk.0.ffn_gate.weight", &[4, 4]),
        ("blk.0.ffn_up.weight", &[4, 4]),
        ("blk.0.ffn_down.weight", &[4, 4]),
    ];
    let counts = [(tensors.len() as u64).to_le_bytes(), (metadata.len() as u64).to_le_bytes()].concat();
    let mut file = [&b"GGUF"[..], &3_u32.to_le_bytes(), &counts, &metadata.concat()].concat();
    let mut offset = 0;
    for (name, shape) in tensors {
        file.extend([text(name), (shape.len() as u32).to_le_bytes().to_vec()].concat());
        shape.iter().for_each(|size| file.extend(size.to_le_bytes()));
        // F16.
        file.extend([&1_u32.to_le_bytes()[..], &u64::to_le_bytes(offset)].concat());
        offset = (offset + 2 * shape.iter().product::<u64>()).next_multiple_of(32);
    }
    file.resize(file.len().next_multiple_of(32) + offset as usize, 1);
    file
}

fn model_folder() -> Vec<(&'static str, Vec<u8>)> {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let mut scaled: Value = serde_json::from_str(CONFIG).expect("the configuration above");
    scaled["rope_scaling"] = llama3;
    scaled["layer_types"] = json!(["full_attention"]);
    let contents: [(&str, Vec<u8>); 9] = [
        ("config.json", CONFIG.into()),
        ("config.json", scaled.to_string().into()),
        (
            "overfill.json",
            br#"{"version": 1, "full_model": {"name": "f", "fingerprint": "ab"}, "kept_layers": [0, 2]}"#.to_vec(),
        ),
        ("model.safetensors.index.json", br#"{"weight_map": {"a": "model-1.safetensors"}}"#.to_vec()),
        ("generation_config.json", br#"{"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20}"#.to_vec()),
        (
            "tokenizer_config.json",
            br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"},
                "chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}]}"#
                .to_vec(),
        ),
        ("special_tokens_map.json", br#"{"bos_token": "<s>"}"#.to_vec()),
        ("tokenizer.json", TOKENIZER.into()),
        ("tokenizer.model", sentencepiece()),
    ];
    let names = [
        "config",
        "config-scaled",
        "overfill",
        "index",
        "generation",
        "tokenizer-config",
        "special",
        "tokenizer",
        "sentencepiece",
    ];
    let file = |name: &str| FILES.iter().position(|file| *file == name).expect("one of the files") as u8;
    names.into_iter().zip(contents).map(|(name, (of, content))| (name, [vec![file(of)], content].concat())).collect()
}

/// A BPE model without rules of normalisation.
fn sentencepiece() -> Vec<u8> {
    let field = |number: u8, content: &[u8]| [&[number << 3 | 2, content.len() as u8], content].concat();
    let piece = |text: &str, score: f32, kind: u8| {
        let score = [&[0x15], &score.to_le_bytes()[..]].concat();
        field(1, &[field(1, text.as_bytes()), score, vec![0x18, kind]].concat())
    };
    let pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("\u{2581}", -5.0, 1), ("ab", 0.0, 1)];
    let letters = [("a", -6.0, 1), ("b", -7.0, 1)];
    let pieces = pieces.iter().chain(&letters).map(|(text, score, kind)| piece(text, *score, *kind));
    // Type BPE; no dummy prefix, no removal of spaces.
    [pieces.collect::<Vec<_>>().concat(), field(2, &[0x18, 2]), field(3, &[0x18, 0, 0x20, 0])].concat()
}

fn chat_messages() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("turns", b"\x00\x80\x09Be brief.\x00\x04 hi \x40\x10<think>x</think>y\x00\x07{\"a\":1}".to_vec()),
        ("roles", "\u{1}\u{70}\u{3}abc\u{7f}\u{2}é".as_bytes().to_vec()),
    ]
}

fn chat_templates() -> Vec<(&'static str, Vec<u8>)> {
    let templates: [(&str, &str); 4] = [
        (
            "turns",
            "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}{% endfor %}\
             {% if add_generation_prompt %}<|assistant|>{% endif %}",
        ),
        (
            "namespace",
            "{%- set ns = namespace(x='') -%}{%- for m in messages[::-1] -%}{%- set ns.x = ns.x + m.content -%}\
             {%- generation -%}{{ ns.x | tojson(indent=2) }}{%- endgeneration -%}{%- endfor -%}",
        ),
        (
            "macros",
            "{% macro say(x, y=1) %}{{ x ~ y }}{% endmacro %}{% for i in range(3) %}{{ say(messages[0].role, i) }}\
             {% if loop.last %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        ),
        (
            "methods",
            "{{ messages[1].content.strip().split(' ')[-1].upper().replace('+', '-') }}{{ strftime_now('%d %b %Y') }}\
             {{ {'a': [1, 2.5, none]}.items() | list | length }}{{ '%s' | format(1) }}{% set x %}y{% endset %}{{ x * 3 }}",
        ),
    ];
    templates.map(|(name, template)| (name, template.into())).to_vec()
}
