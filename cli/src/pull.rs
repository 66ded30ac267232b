//! `overfill pull`: downloads a model, so that nodes without access to the hub can load it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::bench::seconds;

const AFTER_HELP: &str = "\
Set HF_TOKEN for models that need a login, and HF_ENDPOINT for a mirror of the hub.

Examples:
  overfill pull HuggingFaceTB/SmolLM2-135M-Instruct --dir models/smollm2
  overfill pull owner/name@revision --dir models/name && overfill up --full models/name";

/// A model to download.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct PullArgs {
    /// Hub id of the model: owner/name or owner/name@revision.
    model: String,
    /// Folder that gets the model's files. If the model is complete there, nothing is downloaded.
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    dir: PathBuf,
    /// Download nothing: wait until another process has completed the folder, for at most this long.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    wait_seconds: Option<f64>,
}

/// Runs the subcommand.
pub fn run(args: &PullArgs) -> Result<()> {
    match args.wait_seconds {
        Some(time) => overfill_model::wait_until_complete(&args.model, &args.dir, Duration::from_secs_f64(time))?,
        None => overfill_model::pull(&args.model, &args.dir)?,
    }
    println!("{} is complete in {}", args.model, args.dir.display());
    Ok(())
}
