//! Runs other programs. Prints each command line on stderr, and the duration of each phase.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use crate::cuda;

/// Returns the repository's root folder.
pub fn root() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path
}

/// Returns Cargo's target folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Returns a `cargo` command that runs in the repository's root folder.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    // Every call has it, whether or not it builds with GPUs: a change would compile the kernels again.
    if let Some(home) = cuda::home() {
        command.env("CUDA_HOME", home);
    }
    command
}

/// Runs a program to its end. Fails unless it exits successfully.
pub fn run(command: &mut Command) -> Result<()> {
    let text = describe(command);
    eprintln!("$ {text}");
    let status = command.status().with_context(|| format!("starting {text}"))?;
    if !status.success() {
        bail!("{text}: {status}");
    }
    Ok(())
}

/// Returns whether the program starts and succeeds. Its output is discarded.
pub fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// Runs a named phase and prints its duration.
pub fn phase(name: &str, f: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("\n== {name}");
    let start = Instant::now();
    f().with_context(|| name.to_owned())?;
    eprintln!("== {name}: ok, {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Runs commands of this program at the same time, as a phase each. What one prints is shown when it has ended.
pub fn together(commands: &[&str]) -> Result<()> {
    // Not the file of this process: building the workspace has replaced it.
    let built = target().join("debug/xtask");
    let program = if built.exists() { built } else { std::env::current_exe()? };
    eprintln!("\n== {}, at the same time", commands.join(", "));
    std::thread::scope(|scope| {
        let run = |name: &&str| {
            let (name, mut command) = ((*name).to_owned(), Command::new(&program));
            command.arg(&name).stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
            scope.spawn(move || (Instant::now(), command.output(), Instant::now(), name))
        };
        let running: Vec<_> = commands.iter().map(run).collect();
        let mut failed = Vec::new();
        for ended in running {
            let (began, output, end, name) = ended.join().map_err(|_| anyhow!("a thread has panicked"))?;
            let output = output.with_context(|| format!("starting {name}"))?;
            eprint!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let outcome = if output.status.success() { "ok" } else { "FAILED" };
            eprintln!("== {name}: {outcome}, {:.0} s", (end - began).as_secs_f64());
            failed.extend((!output.status.success()).then_some(name));
        }
        if failed.is_empty() { Ok(()) } else { bail!("{} failed", failed.join(", ")) }
    })
}

fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|part| part.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
