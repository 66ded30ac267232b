//! Compiles the GPU kernels, if the feature `cuda` is on.
//!
//! nvcc comes from `$CUDA_HOME/bin` or from `PATH`; `cargo xtask test` installs one where there is none.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// Architectures with machine code. Newer ones compile the PTX of the last one when they load it.
const ARCHITECTURES: [&str; 4] = ["80", "86", "89", "90"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=src/cuda/kernels");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    if let Err(reason) = compile() {
        println!("cargo::error=the GPU kernels could not be compiled: {reason}");
    }
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let nvcc = env::var_os("CUDA_HOME").map_or_else(|| "nvcc".into(), |home| Path::new(&home).join("bin/nvcc"));
    let mut sources: Vec<PathBuf> = std::fs::read_dir("src/cuda/kernels")
        .map_err(|e| e.to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    // One unit that includes all others, so that one module holds all kernels.
    let all = out.join("kernels.cu");
    let text: String = sources
        .iter()
        .map(|source| Ok(format!("#include {:?}\n", source.canonicalize().map_err(|e| e.to_string())?)))
        .collect::<Result<_, String>>()?;
    std::fs::write(&all, text).map_err(|e| e.to_string())?;
    let mut command = Command::new(&nvcc);
    command.args(["-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v,-warn-spills", "--threads", "0"]);
    for arch in ARCHITECTURES {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    let last = ARCHITECTURES[ARCHITECTURES.len() - 1];
    command.arg(format!("-gencode=arch=compute_{last},code=compute_{last}"));
    command.arg("-o").arg(out.join("kernels.fatbin")).arg(&all);
    let done = command.output().map_err(|e| format!("{}: {e}; set CUDA_HOME or PATH", nvcc.display()))?;
    let said = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        return Err(format!("nvcc: {}\n{said}", done.status));
    }
    // Registers and spills of every kernel, for the test that checks them.
    std::fs::write(out.join("ptxas.txt"), said.as_bytes()).map_err(|e| e.to_string())
}
