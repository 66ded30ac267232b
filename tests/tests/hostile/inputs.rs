//! Seeds of malformed inputs: valid messages, and some faults that random mutation is unlikely to find.

use overfill_fuzz::seeds::seeds;
use overfill_proto::v1;
use prost::Message;

/// Inputs for the KV port.
pub fn kv() -> Vec<Vec<u8>> {
    let frames: Vec<Vec<u8>> = seeds("frames").into_iter().map(|(_, bytes)| bytes).collect();
    let mut all = vec![frames[0].clone(), frames.concat()];
    let mut other_version = frames[0].clone();
    other_version[4] = 2;
    all.push(other_version);
    // A hello with an unknown ticket, followed by frames as if it had been accepted.
    all.extend(frames[3..].iter().map(|frame| [&frames[0][..], frame, &[0xff; 64]].concat()));
    all
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Encodes an HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let head = [&(payload.len() as u32).to_be_bytes()[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    [&head[..], payload].concat()
}

/// Encodes a header as a literal without indexing. Name and value have at most 126 bytes.
fn header(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[text.len() as u8][..], text.as_bytes()].concat();
    [vec![0], text(name), text(value)].concat()
}

fn headers(path: &str) -> Vec<u8> {
    let list = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "a"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    list.iter().flat_map(|(name, value)| header(name, value)).collect()
}

/// Encodes a call on a stream.
fn call(stream: u32, path: &str, message: &[u8]) -> Vec<u8> {
    let body = [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat();
    [frame(HEADERS, END_HEADERS, stream, &headers(path)), frame(DATA, END_STREAM, stream, &body)].concat()
}

/// Inputs for gRPC ports.
pub fn grpc() -> Vec<Vec<u8>> {
    let begun = |frames: Vec<Vec<u8>>| [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[]), frames.concat()].concat();
    let decode = v1::DecodeRequest {
        request_id: "r".into(),
        prompt_tokens: (1..40).collect(),
        max_tokens: 8,
        ..Default::default()
    };
    let prefill = v1::PrefillRequest { request_id: "r".into(), prompt_tokens: (1..40).collect(), ..Default::default() };
    let generate = v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Text("hello".into())),
        max_tokens: 4,
        ..Default::default()
    };
    let (decode, prefill, generate) = (decode.encode_to_vec(), prefill.encode_to_vec(), generate.encode_to_vec());
    let calls = |path: &str, message: &[u8]| (0..3).map(|i| call(1 + 2 * i, path, message)).collect::<Vec<_>>();
    let open = |stream: u32| frame(HEADERS, END_HEADERS, stream, &headers("/overfill.v1.Router/Generate"));
    let long_text = "x".repeat(120);
    let many_headers: Vec<u8> = (0..120).flat_map(|_| header("x-long", &long_text)).collect();
    let huge = [&[0], &[0xff; 4][..], &[8; 100]].concat();
    let settings = [&[0, 4][..], &[0xff; 4], &[0, 1], &[0xff; 4], &[0, 5], &[0; 4]].concat();
    vec![
        PREFACE.to_vec(),
        begun(calls("/overfill.v1.Decode/Decode", &decode)),
        begun(calls("/overfill.v1.Prefill/Prefill", &prefill)),
        begun(calls("/overfill.v1.Router/Generate", &generate)),
        begun(calls("/grpc.health.v1.Health/Check", &[])),
        begun(calls("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", b"\x3a\x01*")),
        begun(calls("/overfill.v1.Node/WatchLoad", &[])),
        // Calls that are opened and never finished, or reset immediately.
        begun((0..40).map(|i| open(1 + 2 * i)).collect()),
        begun((0..60).flat_map(|i| [open(1 + 2 * i), frame(RESET, 0, 1 + 2 * i, &[0, 0, 0, 8])]).collect()),
        // Headers without an end, and too many headers.
        begun([vec![frame(HEADERS, 0, 1, &headers("/"))], vec![frame(CONTINUATION, 0, 1, &[]); 300]].concat()),
        begun(vec![frame(HEADERS, 0, 1, &headers("/")), frame(CONTINUATION, END_HEADERS, 1, &many_headers)]),
        // A message with a declared length of four gigabytes.
        begun(vec![open(1), frame(DATA, 0, 1, &huge)]),
        begun(vec![frame(PING, 0, 0, &[7; 8]); 200]),
        begun(vec![frame(WINDOW, 0, 0, &[0x7f, 0xff, 0xff, 0xff]); 3]),
        begun(vec![frame(SETTINGS, 0, 0, &settings); 20]),
        begun(vec![frame(DATA, 0, 7, &[0; 1000]), frame(0xee, 0xff, 0, &[0; 100])]),
    ]
}

fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// Inputs for HTTP ports.
pub fn http() -> Vec<Vec<u8>> {
    let (text, chat) = ("/v1/completions", "/v1/chat/completions");
    let mut all = vec![b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(), b"GET /ready HTTP/1.0\r\n\r\n".to_vec()];
    for (name, body) in seeds("http_bodies") {
        // The first byte of the seed only selects the endpoint.
        let path = if name == "chat" { chat } else { text };
        all.push(post(path, &body[1..]));
    }
    for body in [
        "[".repeat(9000),
        "{\"prompt\":".repeat(1500),
        format!("{{\"prompt\": \"a\", \"messages\": {}1{}}}", "[".repeat(120), "]".repeat(120)),
        format!("{{\"prompt\": [{}], \"n\": 128}}", "[1],".repeat(3000) + "[1]"),
        "{\"prompt\": \"a\", \"max_tokens\": 1e400, \"temperature\": -1e999}".into(),
        "{\"prompt\": [18446744073709551616, -1, 1.5], \"seed\": 99999999999999999999}".into(),
        "{\"prompt\": \"\\ud800\", \"stop\": [[], {}, null], \"logit_bias\": {\"-1\": \"x\"}}".into(),
        "{\"prompt\": 1, \"prompt\": true, \"stream_options\": [], \"stream\": \"yes\"}".into(),
    ] {
        all.push(post(text, body.as_bytes()));
        all.push(post(chat, body.as_bytes()));
    }
    let head = |more: &str| format!("POST {text} HTTP/1.1\r\nhost: a\r\n{more}\r\n").into_bytes();
    all.extend([
        head(&format!("x-long: {}\r\n", "x".repeat(12_000))),
        head(&"x-many: 1\r\n".repeat(300)),
        head("content-length: 18446744073709551615\r\n"),
        head("content-length: 5\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n"),
        [head("content-length: 4000\r\n"), b"{\"prompt\"".to_vec()].concat(),
        // Chunked bodies: valid, truncated, and with a length beyond any memory.
        [head("transfer-encoding: chunked\r\n"), b"5\r\n{\"pro\r\n3\r\nmpt\r\n0\r\n\r\n".to_vec()].concat(),
        [head("transfer-encoding: chunked\r\n"), b"ff\r\n{\"prompt\":".to_vec()].concat(),
        [head("transfer-encoding: chunked\r\n"), b"ffffffffffffffff\r\n{}".to_vec()].concat(),
        [head("expect: 100-continue\r\ncontent-length: 2\r\n"), b"{}".to_vec()].concat(),
        format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "%00/..".repeat(1500)).into_bytes(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03".to_vec(),
    ]);
    all
}
