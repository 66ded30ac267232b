//! `overfill plan`: how many nodes a load needs.
//!
//! # The model
//!
//! Prefill nodes are servers of a queue with general service times (M/G/k), with two differences from the textbook: a
//! step serves several prompts (the chunked scheduler), and the router joins the shortest queue. A decode node is one
//! batch: the time of a step depends on the number of sequences and on their context. So the number of sequences depends
//! on the time of a step, which depends on the number of sequences: by Little's law, sequences = arrivals per second x
//! seconds in the batch. There is a fixed point below the node's capacity, or the queue grows without end.
//!
//! Such formulas give bounds: the nodes that each resource needs on average. Limits are percentiles, and the distribution
//! of waiting times has no closed form here. So a plan comes from a discrete-event simulation (`cluster`), which runs the
//! router's choice of nodes and both schedulers as they are shipped. Its tests compare it with what is known exactly:
//! the Pollaczek-Khinchine formula for M/D/1, Little's law, and requests that are alone. `size` searches the smallest
//! number of nodes with simulated runs over the same requests.
//!
//! Sources: L. Kleinrock, Queueing Systems, volumes 1 and 2 (M/G/1, Little's law); Y. Zhong et al., DistServe, OSDI 2024
//! (arXiv 2401.09670: goodput of separate prefill and decode, M/D/1 for prefill); A. Agrawal et al., Vidur, MLSys 2024
//! (arXiv 2405.05465: simulation of schedulers with measured operators); A. Agrawal et al., Sarathi-Serve, OSDI 2024
//! (arXiv 2403.02310: chunked prefill, with which two stages are compared).
//!
//! The parts: `args` (command line), `profile` and `curve` (what a machine can do), `mix` and `trace` (requests), `goals`
//! (limits), `cluster` (simulation), `size` (search), `report` (what the plan says), `print` and `values` (how it says it).

pub mod args;
pub mod cluster;
pub mod curve;
mod goals;
pub mod mix;
mod print;
pub mod profile;
mod report;
mod size;
#[cfg(test)]
mod tests;
pub mod trace;
mod values;

use anyhow::{Context, Result, bail};
use overfill_cluster::{LogFormat, init_telemetry};
use serde_json::json;

pub use args::PlanArgs;
use size::Infeasible;
use values::Names;

/// Runs the subcommand. An infeasible plan is an error.
pub fn run(args: PlanArgs) -> Result<()> {
    init_telemetry(LogFormat::Text);
    let (as_json, values_file, model, fixed) =
        (args.json, args.values.clone(), args.values_model.clone(), args.fixed_replicas);
    let task = args.task()?;
    if let Some(layout) = task.given {
        let given = report::judge(&task, layout);
        if as_json {
            println!("{}", serde_json::to_string(&given)?);
        } else {
            print!("{}", print::print_judgement(&given, &task.planner.goals));
        }
        return Ok(());
    }
    let plan = match report::plan(&task) {
        Ok(plan) => plan,
        Err(Infeasible(reason)) => {
            if as_json {
                println!("{}", json!({"feasible": false, "reason": reason}));
            }
            bail!("infeasible: {reason}");
        }
    };
    if as_json {
        let mut value = serde_json::to_value(&plan)?;
        value["feasible"] = json!(true);
        println!("{value}");
    } else {
        print!("{}", print::print(&plan));
    }
    if let Some(file) = values_file {
        let names = Names { model: &model, fixed, kv_pool_tokens: task.kv_pool_tokens };
        let text = values::values(&plan, &task.settings, &names);
        std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}
