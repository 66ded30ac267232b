//! Measures each matrix product of a model with each kernel, and attention, against the machine's memory bandwidth and
//! peak arithmetic.

use anyhow::Result;
use clap::{Args, ValueEnum};
use overfill_kv::KvDtype;
use overfill_model::{Rows, WeightFormat, bench};
use serde_json::json;

use super::geometry::Geometry;
use crate::text;

const AFTER_HELP: &str = "\
Examples:
  overfill bench kernels
  overfill bench kernels --rows 1,8 --weights bf16 --runs 10
  overfill bench kernels --geometry llama-3.2-3b --rows 64,512 --role prefill";

/// What to measure.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct KernelsArgs {
    /// Model shape. Only its matrix sizes matter; no model is loaded.
    #[arg(long, value_enum, default_value = "llama-3.2-3b-overfill", value_name = "NAME", help_heading = "Model")]
    geometry: Geometry,
    /// Weight formats, comma-separated: f32, bf16, f16, int8, int8-channel or int4.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "bf16,int8,int4",
        value_name = "FORMAT",
        help_heading = "Model"
    )]
    weights: Vec<WeightFormat>,
    /// Type of the KV cache: f32, bf16 or f16.
    #[arg(long, default_value = "bf16", value_name = "TYPE", help_heading = "Model")]
    kv_dtype: KvDtype,
    /// Node role whose kernels are measured. It decides whether int8 weights are multiplied by int8 or f32 inputs.
    #[arg(long, value_enum, default_value_t = Role::Decode, help_heading = "Model")]
    role: Role,
    /// Numbers of input rows, comma-separated. 1 is one decode step; hundreds are a prompt.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,8,512",
        value_parser = super::count,
        help_heading = "Sizes"
    )]
    rows: Vec<usize>,
    /// Context length for decode attention. Prefill attention is measured over --rows tokens.
    #[arg(long, default_value_t = 512, value_parser = super::count, value_name = "TOKENS", help_heading = "Sizes")]
    context_tokens: usize,
    /// Runs of each measurement. The fastest is reported.
    #[arg(long, default_value_t = 3, value_parser = super::count, value_name = "COUNT", help_heading = "Measurement")]
    runs: usize,
    /// Print JSON.
    #[arg(long, help_heading = "Output")]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Prefill,
    Decode,
}

/// Measures all kernels, and prints one line for each product.
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
