//! Nodes that drain, and a decode node whose KV port is unreachable. Every answer equals the undisturbed answer.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::binary;
use overfill_tests::rig::{REQUESTS, RUNNING, Role, request, wait_phase};
use overfill_tests::service::{decode_args, prefill_args, router_args};
use overfill_tests::{Rig, Service};

const PAIR: &str = "llama-tied";

fn drain(rig: &Rig, node: &str, seconds: &str) -> Result<()> {
    let router = rig.router.url();
    let output = Command::new(binary()?)
        .args(["drain", "--router", &router, "--drain-timeout", seconds, node])
        .output()
        .context("overfill drain")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "overfill drain: {}\n{stderr}", output.status);
    ensure!(stderr.contains("running"), "no progress: {stderr}");
    Ok(())
}

#[test]
fn drained_nodes_cost_no_answer() -> Result<()> {
    let mut rig = Rig::start(None)?;
    let answers = rig.answers()?;
    rig.under_load(&answers, |rig, load| {
        for role in [Role::Decode, Role::Prefill] {
            // With enough time, all requests end on the draining node.
            wait_phase(rig.node(role), RUNNING)?;
            let url = rig.node(role).url();
            drain(rig, &url, "600")?;
            ensure!(rig.migrations()? == 0.0, "a node that had time enough gave requests away");
            let status = rig.node(role).wait_end()?;
            ensure!(status.success(), "the drained node ended with {status}");
            load.wait_progress()?;
            rig.start_again(role)?;
        }
        // Without time, running requests are migrated.
        wait_phase(rig.node(Role::Decode), RUNNING)?;
        let url = rig.node(Role::Decode).url();
        drain(rig, url.trim_start_matches("http://"), "0")?;
        ensure!(rig.migrations()? > 0.0, "nothing has moved");
        ensure!(rig.node(Role::Decode).wait_end()?.success(), "the drained node did not end well");
        load.wait_progress()?;
        rig.start_again(Role::Decode)
    })?;
    Ok(())
}

/// Every request to one decode node fails, since nothing listens on its advertised KV address.
#[test]
fn a_decode_node_that_no_kv_reaches_costs_no_answer() -> Result<()> {
    let prefill = Service::start(prefill_args(PAIR), &["--max-batch-tokens", "16"])?;
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let (cut_off, good) = (
        Service::start(decode_args(PAIR), &["--advertise-kv", &nowhere])?,
        Service::start::<&str>(decode_args(PAIR), &[])?,
    );
    let start = |decode: &str, up| -> Result<Service> {
        let router = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", decode])?;
        router.wait_nodes(1, up)?;
        Ok(router)
    };
    let alone = start(&good.url(), 1)?;
    let both = start(&format!("{},{}", cut_off.url(), good.url()), 2)?;
    for i in 0..REQUESTS {
        let (expected, answer) = (request(i).send(&alone)?, request(i).send(&both)?);
        ensure!(answer == expected, "request {i}: {answer:?} instead of {expected:?}");
    }
    let migrations = both.metric("overfill_migrations_total", "")?;
    ensure!(migrations > Some(0.0), "the node that can't work was never tried");
    ensure!(alone.metric("overfill_migrations_total", "")? == Some(0.0), "a router without it has moved requests");
    Ok(())
}

#[test]
fn status_is_shown_again_and_again() -> Result<()> {
    let prefill = Service::start::<&str>(prefill_args(PAIR), &[])?;
    let decode = Service::start::<&str>(decode_args(PAIR), &[])?;
    let router = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", &decode.url()])?;
    router.wait_nodes(1, 1)?;
    let mut status = Command::new(binary()?)
        .args(["status", "--watch", "--json", "--router", &router.url()])
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(status.stdout.take().context("no output")?).lines();
    for line in lines.take(2) {
        let shown: serde_json::Value = serde_json::from_str(&line?)?;
        let nodes = shown["nodes"].as_array().context("no nodes")?;
        ensure!(nodes.len() == 2, "{shown}");
        for (node, field) in nodes.iter().flat_map(|n| ["role", "open_handoffs", "stranded_bytes"].map(|f| (n, f))) {
            ensure!(!node[field].is_null(), "no {field} in {node}");
        }
    }
    status.kill()?;
    status.wait()?;
    Ok(())
}
