//! Each product of a model by each kernel, and attention, beside what memory and arithmetic of this machine can do.

use anyhow::Result;
use clap::{Args, ValueEnum};
use overfill_kv::KvDtype;
use overfill_model::{Rows, WeightFormat, bench};
use serde_json::json;

use super::geometry::Geometry;
use crate::text;

/// Which products are measured.
#[derive(Args)]
pub struct KernelsArgs {
    /// Model whose shapes are multiplied.
    #[arg(long, value_enum, default_value = "llama-3.2-3b-overfill")]
    geometry: Geometry,
    /// Weights: f32, bf16, f16, int8, int8-channel or int4.
    #[arg(long, value_delimiter = ',', default_value = "bf16,int8,int4")]
    weights: Vec<WeightFormat>,
    /// Rows of inputs multiplied at once: 1 is a decode step, hundreds are a prompt.
    #[arg(long, value_delimiter = ',', default_value = "1,8,512", value_parser = super::count)]
    rows: Vec<usize>,
    /// Keys and values: f32, bf16 or f16.
    #[arg(long, default_value = "bf16")]
    kv_dtype: KvDtype,
    /// Tokens of each sequence whose newest token attends to them; the rows of a prompt attend to each other.
    #[arg(long, default_value_t = 512, value_parser = super::count)]
    context_tokens: usize,
    /// The node that computes so: it decides whether inputs of int8 weights are bytes or f32.
    #[arg(long, value_enum, default_value_t = Role::Decode)]
    role: Role,
    /// Runs of each measurement; the fastest counts.
    #[arg(long, default_value_t = 3, value_parser = super::count)]
    runs: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Prefill,
    Decode,
}

/// Measures, and prints one line for each product.
pub fn run(args: &KernelsArgs) -> Result<()> {
    let config = args.geometry.model_config()?;
    let rows = match args.role {
        Role::Prefill => Rows::Many,
        Role::Decode => Rows::Few,
    };
    let machine = bench::machine(args.runs)?;
    let mut figures = Vec::new();
    for weights in &args.weights {
        figures.extend(bench::kernels(&config, *weights, rows, &args.rows, args.runs)?);
    }
    figures.extend(bench::attention(&config, args.kv_dtype, &args.rows, args.context_tokens, args.runs)?);
    let share = |part: f64, whole: f64| 100.0 * part / whole;
    if args.json {
        let lines: Vec<_> = figures
            .iter()
            .map(|f| {
                json!({"format": f.format, "product": f.name, "shape": f.shape, "rows": f.rows,
                       "seconds": f.seconds, "bytes_per_second": f.bytes_per_second,
                       "operations_per_second": f.operations_per_second})
            })
            .collect();
        let value = json!({
            "isa": machine.isa, "threads": machine.threads, "read_bytes_per_second": machine.read_bytes_per_second,
            "f32_operations_per_second": machine.f32_operations_per_second, "kernels": lines,
        });
        println!("{value}");
        return Ok(());
    }
    println!(
        "{}, {} threads: memory reads {:.1} GB/s, f32 arithmetic {:.1} GFLOP/s\n",
        machine.isa,
        machine.threads,
        machine.read_bytes_per_second / 1e9,
        machine.f32_operations_per_second / 1e9
    );
    let lines: Vec<_> = figures
        .iter()
        .map(|f| {
            [
                f.format.clone(),
                f.name.to_owned(),
                f.shape.clone(),
                f.rows.to_string(),
                text::seconds(f.seconds),
                format!("{:.1}", f.bytes_per_second / 1e9),
                format!("{:.0} %", share(f.bytes_per_second, machine.read_bytes_per_second)),
                format!("{:.1}", f.operations_per_second / 1e9),
                format!("{:.0} %", share(f.operations_per_second, machine.f32_operations_per_second)),
            ]
        })
        .collect();
    let header = ["FORMAT", "PRODUCT", "SHAPE", "ROWS", "TIME", "GB/s", "OF MEMORY", "GFLOP/s", "OF F32 PEAK"];
    print!("{}", text::table(header, &lines));
    Ok(())
}
