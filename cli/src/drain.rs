//! `overfill drain`: drains a node, and waits until it has no requests.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use overfill_proto::v1::{self, node_client::NodeClient};

use crate::router_client::{RouterUrl, refusal};

/// Longest time between two reports of a draining node.
const SILENCE: Duration = Duration::from_secs(600);

const AFTER_HELP: &str = "\
Examples, for a node that listens on 127.0.0.1:50071:
  overfill drain 127.0.0.1:50071
  overfill drain http://127.0.0.1:50071 --drain-timeout 5";

/// Which node, and how fast.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct DrainArgs {
    /// Address of the node as `overfill status` prints it (http://host:port or host:port), or its node id.
    node: String,
    /// Seconds after which the node hands its unfinished requests to other nodes [default: the node's own
    /// --drain-timeout-seconds]
    #[arg(long, value_name = "SECONDS", help_heading = "Drain")]
    drain_timeout: Option<f64>,
    #[command(flatten)]
    router: RouterUrl,
}

/// Runs the subcommand: the node refuses new requests, leaves discovery, finishes or hands over its requests, and exits.
pub async fn run(args: DrainArgs) -> Result<()> {
    let mut client = args.router.connect().await?;
    let nodes = client.list_nodes(v1::ListNodesRequest {}).await.map_err(refusal)?.into_inner().nodes;
    let node = find(&nodes, &args.node)?;
    let channel = args.router.tls.channel(&node.url).await?;
    let request = v1::DrainRequest { timeout_seconds: args.drain_timeout };
    let mut reports = NodeClient::new(channel).drain(request).await.map_err(refusal)?.into_inner();
    let mut shown = None;
    loop {
        let report = tokio::time::timeout(SILENCE, reports.message()).await;
        let report = report.with_context(|| format!("{} sent no report for {} s", node.url, SILENCE.as_secs()))?;
        let Some(load) = report.map_err(refusal)? else { break };
        let now = (load.running_requests, load.waiting_requests, load.open_handoffs);
        if shown.replace(now) != Some(now) {
            eprintln!("{}: {} running, {} waiting, {} handoffs", node.url, now.0, now.1, now.2);
        }
    }
    if shown != Some((0, 0, 0)) {
        bail!("{} ended before all its requests had ended", node.url);
    }
    println!("{} is empty", node.url);
    Ok(())
}

/// Finds the node with this name or address.
fn find<'a>(nodes: &'a [v1::ListedNode], name: &str) -> Result<&'a v1::ListedNode> {
    let is_meant = |node: &&v1::ListedNode| {
        let id = node.info.as_ref().is_some_and(|info| !info.node_id.is_empty() && info.node_id == name);
        id || node.url == name || node.url.split_once("://").is_some_and(|(_, rest)| rest == name)
    };
    let meant: Vec<_> = nodes.iter().filter(is_meant).collect();
    match meant[..] {
        [node] => Ok(node),
        [] => {
            let known: Vec<_> = nodes.iter().map(|node| node.url.as_str()).collect();
            bail!("the router has no node {name}; its nodes are: {}", known.join(", "))
        }
        _ => bail!("{name} is the name of {} nodes; use an address instead", meant.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_found_by_address_or_id() {
        let node = |url: &str, id: &str| v1::ListedNode {
            url: url.into(),
            info: Some(v1::NodeInfo { node_id: id.into(), ..Default::default() }),
            ..Default::default()
        };
        let nodes = [node("http://a:1", "x"), node("http://b:1", "y"), node("http://c:1", "y"), node("http://d:1", "")];
        for name in ["http://a:1", "a:1", "x"] {
            assert_eq!(find(&nodes, name).unwrap().url, "http://a:1");
        }
        assert!(find(&nodes, "y").unwrap_err().to_string().contains("2 nodes"));
        assert!(find(&nodes, "").unwrap_err().to_string().contains("http://b:1"));
    }
}
