//! Rules about the project's files that the compiler does not check.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::root;

/// Maximum length of a source file, in lines.
const MAX_LINES: usize = 500;

/// Checks all tracked files and reports all violations together.
pub fn run() -> Result<()> {
    let mut faults = Vec::new();
    for path in tracked_files()? {
        let Ok(text) = std::fs::read_to_string(root().join(&path)) else { continue };
        check(&path, &text, &mut faults);
    }
    if faults.is_empty() {
        return Ok(());
    }
    for fault in &faults {
        eprintln!("{fault}");
    }
    bail!("{} violations of the project's rules", faults.len())
}

fn check(path: &Path, text: &str, faults: &mut Vec<String>) {
    let name = path.display();
    let rust = path.extension().is_some_and(|e| e == "rs");
    let prose = path.extension().is_some_and(|e| e == "md");
    // Paths outside of the repository exist only on some machines. The string is assembled here so that this file
    // passes.
    let outside = ["../", "shared/"].concat();
    if (rust || prose) && text.contains(&outside) {
        faults.push(format!("{name}: mentions {outside}, which is outside of the repository"));
    }
    if !rust {
        return;
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        faults.push(format!("{name}: {lines} lines, maximum is {MAX_LINES}; split the file by purpose"));
    }
    let root_file = path.file_name().is_some_and(|f| f == "lib.rs" || f == "main.rs");
    if root_file && !text.starts_with("//!") {
        faults.push(format!("{name}: does not begin with a `//!` comment on the purpose of the crate"));
    }
}

fn tracked_files() -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .context("listing the repository's files with git")?;
    if !output.status.success() {
        bail!("git ls-files: {}", output.status);
    }
    let text = String::from_utf8(output.stdout).context("file names that are not UTF-8")?;
    Ok(text.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breaches_are_found() {
        let mut faults = Vec::new();
        check(Path::new("a/lib.rs"), &"x\n".repeat(MAX_LINES + 1), &mut faults);
        assert_eq!(faults.len(), 2, "{faults:?}");
        faults.clear();
        check(Path::new("README.md"), &["see ../", "shared/x"].concat(), &mut faults);
        assert_eq!(faults.len(), 1, "{faults:?}");
        faults.clear();
        check(Path::new("a/lib.rs"), "//! Fine.\n", &mut faults);
        assert!(faults.is_empty(), "{faults:?}");
    }
}
