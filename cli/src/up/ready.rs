//! Waiting until the cluster can serve, and printing its addresses.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use overfill_proto::v1::{ListNodesRequest, ListedNode};

use super::child::{ROUTER, Started};
use crate::router_client::{self, refusal};

/// Longest time until the router has connected to all nodes.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
const JOIN_INTERVAL: Duration = Duration::from_millis(20);

/// Waits until the router sees every node as healthy.
pub async fn wait_for_nodes(started: &[Started]) -> Result<()> {
    let mut client = router_client::connect(&router(started)?.grpc_url()).await?;
    let expected = started.len() - 1;
    let mut away = String::new();
    let joined = tokio::time::timeout(JOIN_TIMEOUT, async {
        loop {
            let nodes = client.list_nodes(ListNodesRequest {}).await.map_err(refusal)?.into_inner().nodes;
            if nodes.iter().filter(|node| node.healthy).count() == expected {
                return Ok(());
            }
            away = nodes.iter().filter(|node| !node.healthy).map(describe).collect::<Vec<_>>().join("; ");
            tokio::time::sleep(JOIN_INTERVAL).await;
        }
    })
    .await;
    match joined {
        Ok(result) => result,
        Err(_) => bail!("the router did not see all {expected} nodes within {} s: {away}", JOIN_TIMEOUT.as_secs()),
    }
}

fn describe(node: &ListedNode) -> String {
    format!("{}: {}", node.url, if node.error.is_empty() { "not joined yet" } else { &node.error })
}

fn router(started: &[Started]) -> Result<&Started> {
    started.iter().find(|s| s.ready.role == ROUTER).context("there is no router")
}

fn router_urls(started: &[Started]) -> Result<(String, String)> {
    let router = router(started)?;
    let http = router.ready.http.context("the router did not report its HTTP address")?;
    Ok((router.grpc_url(), format!("http://{http}")))
}

/// Formats the addresses as text.
pub fn text(started: &[Started]) -> Result<String> {
    let (grpc, http) = router_urls(started)?;
    let mut out = format!("\noverfill is up; Ctrl-C ends it.\n\n  OpenAI API  {http}/v1\n  gRPC        {grpc}\n");
    for node in started.iter().filter(|s| s.ready.role != ROUTER) {
        let admin = node.ready.admin.map(|admin| format!(", metrics http://{admin}/metrics")).unwrap_or_default();
        out += &format!("  {:<10}  {}{admin}, {}\n", node.name, node.grpc_url(), node.model);
    }
    Ok(out + "\n")
}

/// Formats the addresses as one line of JSON:
/// `{"grpc":URL,"http":URL,"processes":[{"name","role","pid","grpc","admin","kv"}]}`.
pub fn json(started: &[Started]) -> Result<serde_json::Value> {
    let (grpc, http) = router_urls(started)?;
    let processes: Vec<_> = started
        .iter()
        .map(|s| {
            serde_json::json!({
                "name": s.name, "role": s.ready.role, "pid": s.pid, "model": s.model, "grpc": s.grpc_url(),
                "admin": s.ready.admin.map(|a| format!("http://{a}")), "kv": s.ready.kv,
            })
        })
        .collect();
    Ok(serde_json::json!({"grpc": grpc, "http": http, "processes": processes}))
}
