//! The project's commands: `cargo xtask demo | test | ci | chart | kubernetes | monitoring | rdma | real | clients | gpu | page | tidy |
//! images | neon`.

mod apt;
mod built;
mod chart;
mod clients;
mod cluster;
mod cuda;
mod demo;
mod gpu;
mod images;
mod memory;
mod monitoring;
mod neon;
mod page;
mod process;
mod python;
mod rdma;
mod real;
mod test;
mod tidy;

use std::process::ExitCode;

use test::Programs;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  demo [PROMPT]  build, start a local cluster on the demo pair, send a prompt, stream the answer
  test           everything that CI runs: format, lints, tidy checks, all tests, memory check of kernels
  ci             the same, but fails if a needed program is missing and can't be installed
  chart          the tests of the Helm chart, which need no cluster
  chart generate write the chart's schema, the tables of its README and its rendered examples
  kubernetes     install the chart into the cluster of the current kubeconfig, and scale, update and drain it under load.
                 Further arguments go to pytest
  monitoring     the tests of dashboards and alert rules, with a real Prometheus and the binaries in target/debug
  rdma           the tests of KV over RDMA, in a virtual machine with soft-RoCE
  real           published checkpoints, downloaded from the package index, compared with transformers' results
  clients        clients of others, unmodified, against clusters: OpenAI's, Anthropic's, LangChain, lm-evaluation-harness, AIPerf
  gpu [OPTIONS]  build (release), then tests of the kernels and of clusters on this machine's NVIDIA GPU, and figures of it:
                 `overfill bench gpu OPTIONS`
  gpu collect DIR
                 build, and put into DIR what a machine with a GPU needs
  gpu run DIR [OPTIONS]
                 the tests and figures, with the programs in DIR: `DIR/xtask gpu run DIR` needs neither cargo nor sources
  page           the tests of the router's page, in headless Chromium
  tidy           check the project's rules about its files
  images [--release | --binaries DIR] [--test]
                 container images of the binaries in target/debug, of a release build, or of DIR; or run them as a test
  neon           the kernel tests on an emulated ARM processor (not part of the other commands)";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["demo"] => demo::run(None),
        ["demo", prompt] => demo::run(Some(prompt)),
        ["test"] => test::run(Programs::IfThere),
        ["ci"] => test::run(Programs::Required),
        ["chart"] => chart::run(),
        ["chart", "generate"] => chart::generate(),
        ["kubernetes", ref arguments @ ..] => chart::kubernetes(arguments),
        ["monitoring"] => monitoring::run(),
        ["page"] => page::run(),
        ["tidy"] => tidy::run(),
        ["images", ref options @ ..] => images::run(options),
        ["gpu", "collect", folder] => gpu::collect(folder.as_ref()),
        ["gpu", "run", folder, ref options @ ..] => gpu::test(folder.as_ref(), options),
        ["gpu", ref options @ ..] => gpu::run(options),
        ["rdma"] => rdma::run(),
        ["real"] => real::run(),
        ["clients"] => clients::run(),
        ["neon"] => neon::run(),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(64);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
