//! `cargo xtask gpu`: tests and figures on an NVIDIA GPU. What it needs is collected in one folder, which can be carried to
//! another machine.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::built::{built, of};
use crate::process::{phase, root, succeeds, target};
use crate::{apt, cuda, rdma};

/// Folder of the golden pairs, in the repository.
const GOLDEN: &str = "tests/golden";
/// The result, in the folder.
const REPORT: &str = "gpu.json";

/// Builds, and tests and measures on this machine's GPU. `options`: of `overfill bench gpu`.
pub fn run(options: &[&str]) -> Result<()> {
    // Comes with the driver. Without it, the build would be in vain.
    ensure!(succeeds(Command::new("nvidia-smi").arg("-L")), "this machine has no NVIDIA GPU (`nvidia-smi -L` fails)");
    let folder = target().join("gpu");
    collect(&folder)?;
    test(&folder, options)
}

/// Builds, and puts into `folder` all that [`test`] needs.
pub fn collect(folder: &Path) -> Result<()> {
    cuda::nvcc()?;
    let mut features = vec![cuda::FEATURES];
    match apt::rdma_build() {
        Ok(()) => features.push(rdma::FEATURES),
        Err(error) => eprintln!("== LEFT OUT: KV over RDMA: {error:#}"),
    }
    let features = format!("--features={}", features.join(","));
    // For a trial, with OVERFILL_PROFILE=dev what is built already.
    let profile = format!("--profile={}", std::env::var("OVERFILL_PROFILE").unwrap_or_else(|_| "release".into()));
    let programs = built(&["build", &profile, "--bin", "overfill", "--test", "gpu", "--test", "nccl", &features])?;
    let tests = built(&["test", &profile, "--no-run", "--lib", &features])?;
    let this = std::env::current_exe().context("finding this program's file")?;
    let files = Files::of(folder);
    // The tests of clusters find the binary in the folder above their own.
    fs::create_dir_all(folder.join("deps")).with_context(|| format!("creating {}", folder.display()))?;
    copy(of(&programs, "cli")?, &files.overfill)?;
    copy(of(&programs, "tests")?, &files.clusters)?;
    copy(of(&programs, "transport")?, &files.transport)?;
    copy(of(&tests, "model")?, &files.kernels)?;
    copy(&this, &folder.join("xtask"))?;
    copy_folder(&root().join(GOLDEN), &files.golden)?;
    eprintln!("== collected in {}", folder.display());
    Ok(())
}

/// Runs the tests and measures. Writes [`REPORT`] into the folder, and prints the table.
pub fn test(folder: &Path, options: &[&str]) -> Result<()> {
    let folder = fs::canonicalize(folder).with_context(|| folder.display().to_string())?;
    let files = Files::of(&folder);
    files.check_gpu(options)?;
    let mut steps = Vec::new();
    let mut step = |name: &'static str, result: Result<Value>| match result {
        Ok(value) => steps.push((name, true, value)),
        Err(error) => {
            eprintln!("== {name}: FAILED: {error:#}");
            steps.push((name, false, json!(format!("{error:#}"))));
        }
    };
    step("kernels", files.tests(&files.kernels, &["cuda::"]));
    step("handoffs over NCCL", files.tests(&files.transport, &[]));
    step("clusters", files.tests(&files.clusters, &[]));
    step("figures", files.figures(options));
    let report: serde_json::Map<String, Value> = steps
        .iter()
        .map(|(name, passed, value)| ((*name).to_owned(), json!({"passed": passed, "result": value})))
        .collect();
    let file = folder.join(REPORT);
    fs::write(&file, serde_json::to_string_pretty(&report)? + "\n").with_context(|| file.display().to_string())?;
    eprintln!("== written: {}", file.display());
    for (name, passed, value) in &steps {
        let result = value.as_str().unwrap_or("ok");
        eprintln!("{name:18} {}  {result}", if *passed { "passed" } else { "FAILED" });
    }
    let failed: Vec<&str> = steps.iter().filter(|(_, passed, _)| !passed).map(|(name, ..)| *name).collect();
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// What is in the folder.
struct Files {
    overfill: PathBuf,
    /// Tests of the kernels against the engine on the processor.
    kernels: PathBuf,
    /// Tests of KV over NCCL.
    transport: PathBuf,
    /// Tests of clusters of real processes.
    clusters: PathBuf,
    golden: PathBuf,
    figures: PathBuf,
}

impl Files {
    fn of(folder: &Path) -> Self {
        Self {
            overfill: folder.join("overfill"),
            kernels: folder.join("deps/kernels"),
            transport: folder.join("deps/transport"),
            clusters: folder.join("deps/clusters"),
            golden: folder.join("golden"),
            figures: folder.join("figures.json"),
        }
    }

    /// Ends with one line if there is no GPU.
    fn check_gpu(&self, options: &[&str]) -> Result<()> {
        let mut command = self.bench(options);
        let done = command.args(["--limits-only", "--json"]).output().with_context(|| format!("{command:?}"))?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            bail!(
                "no NVIDIA GPU can be used: {}",
                said.lines().last().unwrap_or_default().trim_start_matches("error: ")
            );
        }
        let limits: Value = serde_json::from_slice(&done.stdout).context("the output of overfill bench gpu")?;
        eprintln!("== {}", limits["gpu"]);
        Ok(())
    }

    fn bench(&self, options: &[&str]) -> Command {
        let mut command = Command::new(&self.overfill);
        command.args(["bench", "gpu"]).args(options);
        command
    }

    /// Runs a program of tests on the GPU. Returns its summary.
    fn tests(&self, program: &Path, filter: &[&str]) -> Result<Value> {
        let mut command = Command::new(program);
        command.args(filter).env("OVERFILL_REAL_GPU", "1").env("OVERFILL_GOLDEN", &self.golden);
        // Both sides of a handoff share the GPU.
        command.env("NCCL_MULTI_RANK_GPU_ENABLE", "1");
        eprintln!("$ {}", program.display());
        let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("starting {command:?}"))?;
        let mut summary = String::new();
        for line in BufReader::new(child.stdout.take().context("no standard output")?).lines() {
            let line = line?;
            eprintln!("{line}");
            if let Some(counts) = line.strip_prefix("test result: ") {
                counts.clone_into(&mut summary);
            }
        }
        let status = child.wait()?;
        ensure!(status.success(), "{status}, {summary}");
        Ok(json!(summary))
    }

    /// Measures, and prints the table. Returns what was measured.
    fn figures(&self, options: &[&str]) -> Result<Value> {
        phase("figures", || {
            let mut command = self.bench(options);
            command.arg("--out").arg(&self.figures);
            let status = command.status().with_context(|| format!("starting {command:?}"))?;
            ensure!(status.success(), "{status}");
            Ok(())
        })?;
        let text = fs::read_to_string(&self.figures).with_context(|| self.figures.display().to_string())?;
        serde_json::from_str(&text).with_context(|| self.figures.display().to_string())
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    // A program that is running can't be written to.
    if to.exists() {
        fs::remove_file(to).with_context(|| format!("removing {}", to.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_folder(&entry.path(), &to)?,
            false => copy(&entry.path(), &to)?,
        }
    }
    Ok(())
}
