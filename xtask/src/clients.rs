//! `cargo xtask clients`: programs of others that use our HTTP API, unmodified.

use std::path::PathBuf;

use anyhow::Result;

use crate::process::{cargo, run as sh};
use crate::python::{self, Requirements};

/// Variable that names the interpreter with these programs.
pub const PYTHON: &str = "OVERFILL_CLIENTS_PYTHON";

/// Installs the programs unless they are up to date. Returns the interpreter.
pub fn prepare() -> Result<PathBuf> {
    // The file lists all packages, so pip need not choose any. Few of their modules are ever imported, so none are compiled.
    let arguments = &["--no-deps", "--no-compile"];
    python::environment("clients-venv", &[Requirements { file: "tests/clients/requirements.txt", arguments }])
}

/// Builds the binaries and runs the tests.
pub fn run() -> Result<()> {
    let python = prepare()?;
    sh(&mut cargo(&["build", "--locked", "--workspace", "--bins"]))?;
    let mut command = cargo(&["test", "--locked", "-p", "overfill-tests", "--test", "clients", "--test", "harnesses"]);
    sh(command.env("OVERFILL_PYTHON", python::prepare()?).env(PYTHON, python))
}
