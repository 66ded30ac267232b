//! Clients that disconnect in every phase of a request. Both nodes release all resources.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::binary;
use overfill_tests::{Cluster, Completion, Golden, Request, Router as _, wait_for};
use serde_json::json;

/// Returns a request that is too long to end before its client disconnects.
fn endless(index: usize) -> Request {
    let prompt: Vec<u32> = (0..400).map(|i| (5 + (i * 7 + index * 31) % 300) as u32).collect();
    Request::tokens(&prompt, 600).with("model", json!("small")).with("stream", json!(true))
}

/// Starts a cluster that is slow enough to be interrupted in every phase: chunks of one block, few concurrent requests.
fn cluster() -> Result<(Cluster, Request, Completion)> {
    let mut args = Golden::up_args("llama-untied");
    args.extend(["--prefill-arg=--max-batch-tokens=16", "--decode-arg=--max-running=2"].map(str::to_owned));
    let cluster = Cluster::start(&args)?;
    let probe = Request::tokens(&[7, 8, 9], 12).with("model", json!("small"));
    let answer = probe.send(&cluster)?;
    cluster.wait_idle()?;
    Ok((cluster, probe, answer))
}

/// Sends a request over a new connection without reading the answer.
fn send(cluster: &Cluster, request: &Request) -> Result<TcpStream> {
    let address = cluster.http().strip_prefix("http://").context("not http")?;
    let mut connection = TcpStream::connect(address)?;
    let body = request.0.to_string();
    write!(
        connection,
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    Ok(connection)
}

/// Waits until the sum of a gauge over all nodes is at least `least`.
fn wait_for_gauge(cluster: &Cluster, role: &str, gauge: &str, least: f64) -> Result<()> {
    wait_for(gauge, || {
        let mut sum = 0.0;
        for process in cluster.processes().iter().filter(|p| p.name.starts_with(role)) {
            sum += cluster.gauge(process, gauge)?;
        }
        Ok((sum < least).then(|| format!("{sum}, not {least}")))
    })
}

fn check_recovered(cluster: &Cluster, probe: &Request, answer: &Completion) -> Result<()> {
    let left = Instant::now();
    cluster.wait_idle()?;
    eprintln!("all resources released after {:.0} ms", left.elapsed().as_secs_f64() * 1e3);
    ensure!(probe.send(cluster)? == *answer, "another answer after the cancellations");
    cluster.check_undisturbed()?;
    cluster.wait_idle()
}

#[test]
fn clients_that_leave_at_any_phase_leave_nothing_behind() -> Result<()> {
    let (cluster, probe, answer) = cluster()?;

    // Disconnect immediately after sending.
    for i in 0..8 {
        drop(send(&cluster, &endless(i))?);
    }
    check_recovered(&cluster, &probe, &answer).context("left at once")?;

    // Disconnect during prefill or handoff.
    let clients: Vec<TcpStream> = (0..6).map(|i| send(&cluster, &endless(10 + i))).collect::<Result<_>>()?;
    wait_for_gauge(&cluster, "prefill", "vllm:num_requests_running", 1.0)?;
    drop(clients);
    check_recovered(&cluster, &probe, &answer).context("left during prefill")?;

    // Disconnect at the first byte of the answer.
    let mut client = send(&cluster, &endless(20))?;
    client.read_exact(&mut [0])?;
    drop(client);
    check_recovered(&cluster, &probe, &answer).context("left at the first byte")?;

    // Disconnect during decoding, with other requests waiting for a place in the batch.
    let mut streams = Vec::new();
    for i in 0..4 {
        streams.push(endless(30 + i).stream(&cluster)?);
    }
    for event in streams[0].by_ref().take(5) {
        event?;
    }
    drop(streams);
    check_recovered(&cluster, &probe, &answer).context("left while decoding")
}

#[test]
fn a_killed_client_leaves_nothing_behind_and_others_go_on() -> Result<()> {
    let (cluster, probe, answer) = cluster()?;
    let mut client = Command::new(binary()?)
        .args(["generate", "--router", cluster.grpc(), "--model", "small", "--ignore-eos"])
        .args(["--max-tokens", "900", "--token-ids", "11,12,13"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut first = [0];
    client.stdout.take().context("no output")?.read_exact(&mut first)?;
    let meanwhile = std::thread::scope(|scope| {
        let other = scope.spawn(|| probe.send(&cluster));
        client.kill()?;
        client.wait()?;
        other.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))
    })?;
    ensure!(meanwhile == answer, "another answer while a client was killed");
    check_recovered(&cluster, &probe, &answer)
}
