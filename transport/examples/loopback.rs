//! Prints the throughput of a handoff over loopback, of a memory copy and of a bare TCP copy. The arguments are the size
//! in MiB and the number of rounds: `cargo run --release --example loopback -- 512 20`.

use std::process::ExitCode;

use overfill_transport::bench::{HandoffOptions, Shape, handoffs};

#[tokio::main(flavor = "multi_thread")]
async fn main() -> ExitCode {
    let argument = |at, default| std::env::args().nth(at).and_then(|arg| arg.parse().ok()).unwrap_or(default);
    let (shape, rounds) = (Shape::of(argument(1, 512_usize) << 20), argument(2, 20));
    let options = HandoffOptions { rounds, ..HandoffOptions::default() };
    match handoffs(shape, shape.host_store(), shape.host_store(), &options).await {
        Ok(report) => {
            let costs = [("memcpy", Some(report.memcpy)), ("bare tcp", report.bare), ("handoff", Some(report.handoff))];
            for (name, cost) in costs.into_iter().filter_map(|(name, cost)| Some((name, cost?))) {
                let (speed, cpu) = (cost.bytes_per_second / 1e9, cost.cpu_seconds_per_gigabyte);
                println!("{name:12} {speed:8.2} GB/s {cpu:8.2} CPU s/GB");
            }
            println!("handoff/tcp  {:8.0} %", report.handoff_to_bare.unwrap_or(f64::NAN) * 100.0);
            println!("exposed      {:8.2} ms", report.exposed_seconds * 1e3);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("loopback: {error}");
            ExitCode::FAILURE
        }
    }
}
