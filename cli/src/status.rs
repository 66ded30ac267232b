//! `overfill status`: a router's nodes and models.

use std::io::{IsTerminal, stdout};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use overfill_kv::Role;
use overfill_proto::v1;

use crate::router_client::{RouterUrl, refusal};
use crate::text::{bytes, table};

/// Time between two updates of --watch.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

const AFTER_HELP: &str = "\
Examples, while a cluster runs (overfill up):
  overfill status
  overfill status --watch
  overfill status --router http://127.0.0.1:50051 --json";

/// What a router sees.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct StatusArgs {
    /// Print JSON.
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Print the status again every second, until interrupted.
    #[arg(long, help_heading = "Output")]
    watch: bool,
    #[command(flatten)]
    router: RouterUrl,
}

/// Runs the subcommand.
pub async fn run(args: StatusArgs) -> Result<()> {
    if !args.watch {
        print!("{}", show(&args).await?);
        return Ok(());
    }
    loop {
        // An unreachable router is shown as well, and does not end the command.
        let text = show(&args).await.unwrap_or_else(|error| format!("{error:#}\n"));
        let clear = if stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        print!("{clear}{text}");
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

async fn show(args: &StatusArgs) -> Result<String> {
    let mut client = args.router.connect().await?;
    let nodes = client.list_nodes(v1::ListNodesRequest {}).await.map_err(refusal)?.into_inner().nodes;
    let models = client.list_models(v1::ListModelsRequest {}).await.map_err(refusal)?.into_inner().models;
    if args.json {
        return Ok(format!("{}\n", json(&nodes, &models)));
    }
    let header = ["NODE", "ROLE", "MODEL", "STATE", "KV", "RUNNING", "WAITING", "FREE BLOCKS", "HANDOFFS", "STRANDED"];
    let nodes = table(header, &nodes.iter().map(node_row).collect::<Vec<_>>());
    let header = ["SERVED MODEL", "FULL MODEL", "CONTEXT", "DECODE NODES"];
    let rows: Vec<_> = models
        .iter()
        .map(|m| [m.name.clone(), m.full_model.clone(), m.max_context_tokens.to_string(), m.decode_nodes.to_string()])
        .collect();
    let models_table = table(header, &rows);
    let watched: Vec<_> = models.iter().filter_map(watch_row).collect();
    if watched.is_empty() {
        return Ok(format!("{nodes}\n{models_table}"));
    }
    let header = ["WATCHED MODEL", "ANSWERS", "TOKENS", "AGREEMENT", "LOGPROB GAP", "PARTED", "PARTED AT"];
    Ok(format!("{nodes}\n{models_table}\n{}", table(header, &watched)))
}

fn role(info: &v1::NodeInfo) -> &'static str {
    Role::try_from(info.role()).map_or("-", Role::as_str)
}

fn state(node: &v1::ListedNode, load: &v1::NodeLoad) -> String {
    match (node.healthy, load.draining) {
        (_, true) => "draining".into(),
        (true, _) => "serving".into(),
        (false, _) => format!("away: {}", node.error),
    }
}

fn node_row(node: &v1::ListedNode) -> [String; 10] {
    let (info, load) = (node.info.clone().unwrap_or_default(), node.load.unwrap_or_default());
    [
        node.url.clone(),
        role(&info).into(),
        info.model.clone(),
        state(node, &load),
        info.kv_transports,
        load.running_requests.to_string(),
        load.waiting_requests.to_string(),
        format!("{}/{}", load.free_blocks, info.total_blocks),
        load.open_handoffs.to_string(),
        bytes(load.stranded_bytes),
    ]
}

fn watch_row(model: &v1::ServedModel) -> Option<[String; 7]> {
    let watch = model.watch.as_ref()?;
    Some([
        model.name.clone(),
        watch.answers.to_string(),
        watch.tokens.to_string(),
        format!("{:.2} %", 100.0 * watch.agreement),
        format!("{:.4}", watch.logprob_gap_nats),
        watch.parted_answers.to_string(),
        watch.median_parted_at_tokens.to_string(),
    ])
}

fn json(nodes: &[v1::ListedNode], models: &[v1::ServedModel]) -> serde_json::Value {
    let nodes: Vec<_> = nodes
        .iter()
        .map(|node| {
            let (info, load) = (node.info.clone().unwrap_or_default(), node.load.unwrap_or_default());
            serde_json::json!({
                "url": node.url, "node_id": info.node_id, "incarnation": info.incarnation, "role": role(&info), "model": info.model,
                "kv_transports": info.kv_transports, "healthy": node.healthy, "error": node.error, "draining": load.draining,
                "running_requests": load.running_requests, "waiting_requests": load.waiting_requests,
                "queued_tokens": load.queued_tokens, "free_blocks": load.free_blocks,
                "total_blocks": info.total_blocks, "open_handoffs": load.open_handoffs,
                "stranded_bytes": load.stranded_bytes, "max_context_tokens": info.max_context_tokens,
            })
        })
        .collect();
    let models: Vec<_> = models
        .iter()
        .map(|m| {
            serde_json::json!({
                "name": m.name, "full_model": m.full_model, "max_context_tokens": m.max_context_tokens,
                "decode_nodes": m.decode_nodes,
                "watch": m.watch.as_ref().map(|watch| serde_json::json!({
                    "answers": watch.answers, "tokens": watch.tokens, "agreement": watch.agreement,
                    "logprob_gap_nats": watch.logprob_gap_nats, "parted_answers": watch.parted_answers,
                    "median_parted_at_tokens": watch.median_parted_at_tokens,
                })),
            })
        })
        .collect();
    serde_json::json!({"nodes": nodes, "models": models})
}
