//! Builds the software GPU, and prints the environment variable with which a program finds it in place of a real one:
//! `env $(cargo run -q -p overfill-software-gpu --example environment) PROGRAM`.

use std::process::ExitCode;

use overfill_software_gpu::SoftwareGpu;

fn main() -> ExitCode {
    match SoftwareGpu::build(false, &[]) {
        Ok(gpu) => {
            let (name, value) = gpu.environment();
            println!("{name}={value}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("software GPU: {error}");
            ExitCode::FAILURE
        }
    }
}
