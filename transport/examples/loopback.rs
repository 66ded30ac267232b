//! Prints the throughput of a handoff over loopback, of a memory copy and of a bare TCP copy. The argument is the size
//! in MiB: `cargo run --release --example loopback -- 512`.

use std::process::ExitCode;

#[tokio::main(flavor = "multi_thread")]
async fn main() -> ExitCode {
    let megabytes = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(512usize);
    match overfill_transport::bench::loopback(megabytes << 20).await {
        Ok(report) => {
            println!("kv per round  {:8.1} MB", report.bytes as f64 / 1e6);
            println!("memcpy        {:8.2} GB/s", report.memcpy_bytes_per_second / 1e9);
            println!("bare tcp      {:8.2} GB/s", report.tcp_bytes_per_second / 1e9);
            println!("handoff       {:8.2} GB/s", report.handoff_bytes_per_second / 1e9);
            println!("handoff/tcp   {:8.0} %", report.handoff_to_tcp() * 100.0);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("loopback: {error}");
            ExitCode::FAILURE
        }
    }
}
