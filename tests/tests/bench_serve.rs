//! `overfill bench serve` against the demo pair and against a server of another kind: checks the load that it sends and the
//! results that it reports.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::thread;

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::binary;
use overfill_tests::{Cluster, Router};
use serde_json::{Value, json};

fn bench_url(url: &str, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(binary()?);
    command.args(["bench", "serve", "--http-url", url, "--json"]).args(args);
    command.output().context("running the bench")
}

fn bench(cluster: &Cluster, args: &[&str]) -> Result<Output> {
    bench_url(cluster.http(), args)
}

fn summary(cluster: &Cluster, args: &[&str]) -> Result<Value> {
    parsed(bench(cluster, args)?)
}

fn parsed(output: Output) -> Result<Value> {
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("the summary is not JSON")
}

/// Sums a counter over the nodes of a role.
fn counter(cluster: &Cluster, role: &str, name: &str) -> Result<f64> {
    let nodes = cluster.processes().iter().filter(|process| process.name.starts_with(role));
    nodes.map(|node| cluster.gauge(node, name)).sum()
}

#[test]
fn a_closed_loop_counts_every_request_and_token() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    let folder = tempfile::tempdir()?;
    let plot = folder.path().join("run.svg");
    let plot = plot.to_str().context("a path that is not UTF-8")?;
    let args = "--requests 12 --concurrency 3 --warm-up-requests 2 --prompt-tokens uniform:8,40 --output-tokens 5 \
                --ttft-limit-seconds 600 --itl-limit-seconds 600 --plot";
    let args: Vec<&str> = args.split_whitespace().chain([plot]).collect();
    let run = summary(&cluster, &args)?;
    ensure!((&run["requests"], &run["succeeded"]) == (&json!(12), &json!(12)), "{run}");
    ensure!(run["errors"] == json!({}) && run["output_tokens"] == json!(60), "{run}");
    let counts = ["ttft_seconds", "itl_seconds", "e2e_seconds"].map(|latency| run[latency]["count"].clone());
    ensure!(counts == [json!(12), json!(48), json!(12)], "{run}");
    ensure!(run["goodput"]["requests"] == json!(12) && run["goodput"]["share"] == json!(1.0), "{run}");

    // The nodes also count the warm-up. Of its five tokens, the prefill node generates one.
    let prompts = counter(&cluster, "prefill", "vllm:prompt_tokens_total")?;
    let measured = run["prompt_tokens"].as_f64().context("no prompt tokens")?;
    ensure!((16.0..=80.0).contains(&(prompts - measured)), "{prompts} prompt tokens on the nodes, {run}");
    let generated = ["prefill", "decode"].map(|role| counter(&cluster, role, "vllm:generation_tokens_total"));
    let [prefill, decode] = generated;
    ensure!((prefill?, decode?) == (14.0, 56.0), "other tokens on the nodes than 14 times 1 and 4");

    let drawn = std::fs::read_to_string(plot)?;
    for title in ["Time to first token", "Time between tokens", "Output tokens per second"] {
        ensure!(drawn.contains(title), "no {title:?} in the picture");
    }
    // The same seed gives the same prompts.
    let again = summary(&cluster, &args)?;
    ensure!(again["prompt_tokens"] == run["prompt_tokens"], "{again}\n{run}");
    cluster.wait_idle()
}

#[test]
fn an_open_loop_is_bounded_and_counts_what_it_does_not_send() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    // The arrival rate is so high that most requests find the only place taken.
    let args =
        "--rate 5000 --requests 200 --max-in-flight 1 --prompt-tokens 16 --output-tokens 100 --ttft-limit-seconds 600";
    let run = summary(&cluster, &args.split_whitespace().collect::<Vec<_>>())?;
    let [succeeded, not_sent, good] = [&run["succeeded"], &run["errors"]["not sent"], &run["goodput"]["requests"]]
        .map(|count| count.as_u64().unwrap_or_default());
    ensure!(succeeded >= 1 && not_sent >= 1 && succeeded + not_sent == 200, "{run}");
    ensure!(run["requests"] == json!(200) && good == succeeded, "{run}");
    ensure!(run["output_tokens"] == json!(100 * succeeded), "{run}");
    cluster.wait_idle()
}

#[test]
fn failures_are_counted_by_kind_and_nothing_else_is_claimed() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    // The prompt exceeds the demo pair's context.
    let output = bench(&cluster, &["--requests", "3", "--warm-up-requests", "0", "--prompt-tokens", "4000"])?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && text.contains("error: none of 3 requests succeeded"), "{text}");
    let run: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(run["errors"] == json!({"HTTP 400": 3}) && run["ttft_seconds"].is_null(), "{run}");
    ensure!(text.contains("4000"), "no example of the failure in {text}");
    cluster.wait_idle()
}

#[test]
fn prompts_may_be_texts_and_messages() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    for prompts in ["text", "chat"] {
        let args = format!("--requests 3 --concurrency 3 --prompt-tokens 20 --output-tokens 5 --prompts {prompts}");
        let run = summary(&cluster, &args.split_whitespace().collect::<Vec<_>>())?;
        ensure!((&run["succeeded"], &run["output_tokens"]) == (&json!(3), &json!(15)), "{prompts}: {run}");
        ensure!(run["itl_seconds"]["count"] == json!(12), "{prompts}: {run}");
        // Each word has at least one token, and the router says how many.
        ensure!(run["prompt_tokens"].as_u64() > Some(60), "{prompts}: {run}");
    }
    cluster.wait_idle()
}

/// Answers a request as llama-server does: no token ids, two tokens in the second event, usage at the end.
fn answer_without_ids(stream: TcpStream) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        if line == "\r\n" {
            let mut body = vec![0; length];
            reader.read_exact(&mut body)?;
            let request: Value = serde_json::from_slice(&body)?;
            ensure!(request["prompt"].as_str().is_some_and(|p| p.split(' ').count() == 9), "{request}");
            let choice = |text: &str, reason: Option<&str>| json!({"choices": [{"text": text, "index": 0, "logprobs": null, "finish_reason": reason}], "object": "text_completion"});
            let usage =
                json!({"choices": [], "usage": {"completion_tokens": 4, "prompt_tokens": 11, "total_tokens": 15}});
            let events =
                [choice(" a", None), choice(" b c", None), choice(" d", None), choice("", Some("length")), usage];
            let mut text: String = events.iter().map(|event| format!("data: {event}\n\n")).collect();
            text += "data: [DONE]\n\n";
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {}\r\n\r\n", text.len());
            reader.get_mut().write_all((head + &text).as_bytes())?;
        }
    }
}

#[test]
fn a_server_of_another_kind_can_be_loaded() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    // A connection that fails shows as a failed request.
    thread::spawn(move || {
        listener.incoming().flatten().for_each(|stream| drop(thread::spawn(move || answer_without_ids(stream))));
    });
    let args = "--requests 5 --concurrency 2 --prompt-tokens 9 --output-tokens 4 --prompts text --model m";
    let run = parsed(bench_url(&url, &args.split_whitespace().collect::<Vec<_>>())?)?;
    ensure!((&run["succeeded"], &run["errors"]) == (&json!(5), &json!({})), "{run}");
    ensure!((&run["prompt_tokens"], &run["output_tokens"]) == (&json!(55), &json!(20)), "{run}");
    let counts = ["ttft_seconds", "itl_seconds", "e2e_seconds"].map(|latency| run[latency]["count"].clone());
    ensure!(counts == [json!(5), json!(10), json!(5)], "{run}");
    Ok(())
}
