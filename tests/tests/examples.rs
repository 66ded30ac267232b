//! The clients in `examples/`, as a user runs them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::binary;
use overfill_tests::python::python;
use overfill_tests::{Cluster, Golden};

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn address(cluster: &Cluster) -> &str {
    cluster.grpc().trim_start_matches("http://")
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.current_dir(repository()).output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The second and the third answer have the form that they must have. The first is free.
fn check(stdout: &str) -> Result<()> {
    let lines: Vec<&str> = stdout.trim_end().lines().collect();
    let [.., described, called] = lines[..] else { anyhow::bail!("too few lines: {stdout}") };
    ensure!(described.chars().last().is_some_and(|c| c.is_ascii_digit()), "{described}");
    ensure!(called.starts_with("describe(") && called.ends_with(')'), "{called}");
    Ok(())
}

#[test]
fn the_rust_client_works() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args("qwen3"))?;
    let example = binary()?.with_file_name("overfill-example");
    check(&run(Command::new(example).args([&format!("http://{}", address(&cluster)), "small"]))?)
}

#[test]
fn the_python_client_works() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args("qwen3"))?;
    let stubs = tempfile::tempdir()?;
    let out = |kind: &str| format!("--{kind}={}", stubs.path().display());
    let protos =
        ["common", "node", "prefill", "decode", "router"].map(|name| format!("proto/proto/overfill/v1/{name}.proto"));
    run(Command::new(python()?)
        .args(["-m", "grpc_tools.protoc", "-I", "proto/proto", &out("python_out"), &out("grpc_python_out")])
        .args(protos))?;
    let mut client = Command::new(python()?);
    client.env("PYTHONPATH", stubs.path()).args(["examples/python/client.py", address(&cluster), "small"]);
    check(&run(&mut client)?)
}
