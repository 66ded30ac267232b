//! `cargo xtask test`: what CI runs. Fast checks come first.

use anyhow::{Context, Result};

use crate::process::{cargo, phase, run as sh, together};
use crate::{apt, clients, cuda, images, memory, python, rdma, real, tidy};

/// What to do if a program that tests need is missing and can't be installed.
#[derive(Clone, Copy, PartialEq)]
pub enum Programs {
    /// Skip the tests that need it. They are listed at the end.
    IfThere,
    /// Fail.
    Required,
}

/// Runs all phases. Stops at the first failure.
pub fn run(programs: Programs) -> Result<()> {
    phase("format", || sh(&mut cargo(&["fmt", "--all", "--check"])))?;
    phase("tidy", tidy::run)?;
    let mut left_out = Vec::new();
    let mut have = |what: &str, found: Result<()>, required: bool| match found {
        Ok(()) => Ok(true),
        Err(error) if required => Err(error.context(what.to_owned())),
        Err(error) => {
            left_out.push(format!("{what}: {error:#}"));
            Ok(false)
        }
    };
    let required = programs == Programs::Required;
    let etcd = have("discovery tests", apt::etcd(), required)?;
    let valgrind = have("memory check of kernels", apt::valgrind(), required)?;
    let network = have("tests of faulty links", apt::network(), required)?;
    // Network namespaces depend on the system and can't be installed, so these tests are never required.
    let hosts = network && have("tests of faulty links", apt::hosts(), false)?;
    let containers = etcd
        && have("test of container images", apt::images().and_then(|()| apt::containers()), required)?
        && have("test of container images", apt::namespaces(), false)?;
    let prometheus = have("tests of dashboards and rules", apt::promtool(), required)?;
    let chromium = have("tests of the page", apt::chromium(), required)?;
    let gpu = have("tests of GPU nodes", cuda::prepare(), required)?;
    let rdma = have("tests of KV over RDMA", apt::rdma_build().and_then(|()| apt::rdma_machine()), required)?;
    // All calls of cargo have the same features, so that everything is compiled once.
    let features = [(gpu, cuda::FEATURES), (rdma, rdma::FEATURES)];
    let features: Vec<&str> = features.iter().filter(|(there, _)| *there).map(|(_, features)| *features).collect();
    let features = format!("--features={}", features.join(","));
    let (mut interpreter, mut of_clients) = (None, None);
    phase("python environments", || {
        interpreter = Some(python::prepare()?);
        of_clients = Some(clients::prepare()?);
        Ok(())
    })?;
    // Downloads depend on the package index, so these tests are never required.
    let models = interpreter.as_deref().context("no interpreter").and_then(real::download);
    let models = models.map_err(|error| left_out.push(format!("tests of published checkpoints: {error:#}"))).ok();
    phase("lints", || {
        let mut command = cargo(&["clippy", "--locked", "--workspace", "--all-targets"]);
        sh(command.arg(&features).args(["--", "-D", "warnings"]))
    })?;
    // The whole-cluster tests start the real binary, which `cargo test` alone would not build. Binaries and tests are
    // built in one call, so that they use the same features and dependencies are compiled once.
    phase("binaries", || sh(cargo(&["build", "--locked", "--workspace", "--bins", "--tests"]).arg(&features)))?;
    // These mostly wait: for packages, for Helm, for Prometheus, for a browser. The chart's tests start the binaries as well.
    let mut waiting = vec!["chart"];
    waiting.extend(prometheus.then_some("monitoring"));
    waiting.extend(chromium.then_some("page"));
    together(&waiting)?;
    if containers {
        phase("container images", images::test)?;
    }
    phase("tests", || {
        let mut command = cargo(&["test", "--locked", "--workspace", "--no-fail-fast"]);
        command.arg(&features);
        if let Some(python) = &interpreter {
            command.env("OVERFILL_PYTHON", python);
        }
        if let Some(python) = &of_clients {
            command.env(clients::PYTHON, python);
        }
        if let Some(models) = &models {
            command.env(real::FOLDER, models);
        }
        // Tests whose programs are present must not be skipped by mistake.
        let needs =
            [("OVERFILL_ETCD_REQUIRED", etcd), ("OVERFILL_HOSTS_REQUIRED", hosts), ("OVERFILL_GPU_REQUIRED", gpu)];
        for (variable, there) in needs {
            if there {
                command.env(variable, "1");
            }
        }
        sh(&mut command)
    })?;
    if rdma {
        phase("KV over RDMA", || rdma::test(&features))?;
    }
    if valgrind {
        phase("memory check of kernels", || memory::run_kernels(&features))?;
    }
    for left_out in left_out {
        eprintln!("\n== LEFT OUT: {left_out}");
    }
    Ok(())
}
