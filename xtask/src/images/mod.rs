//! `cargo xtask images`: container images of the services, and a test that runs them.

mod base;
mod build;
mod containers;
mod store;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::process::{phase, run as sh, target};
use build::Binaries;
use store::Store;

/// Version of the images. All crates have the same.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Targets of the Dockerfile.
const TARGETS: [&str; 4] = ["router", "prefill", "decode", "cli"];

/// Builds the images with the options of the command line.
pub fn run(options: &[&str]) -> Result<()> {
    let (mut binaries, mut tested) = (None, false);
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        let chosen = match *option {
            "--test" => {
                tested = true;
                continue;
            }
            "--release" => Binaries::Release,
            "--binaries" => match rest.next() {
                Some(folder) => Binaries::Folder(PathBuf::from(folder)),
                None => bail!("--binaries needs a folder"),
            },
            other => bail!("unknown option {other:?}; cargo xtask images [--release | --binaries DIR] [--test]"),
        };
        if binaries.replace(chosen).is_some() {
            bail!("--release and --binaries exclude each other; give one of them once");
        }
    }
    apt::images()?;
    let binaries = binaries.unwrap_or(Binaries::Debug);
    if tested {
        apt::etcd()?;
        apt::containers()?;
        apt::namespaces()?;
        return test_binaries(&binaries);
    }
    let folder = folder("")?;
    build::images(&Store::own(), &folder, &binaries)?;
    eprintln!("\nSBOMs are in {}. Images:", folder.display());
    for target in TARGETS {
        println!("{}", name(target));
    }
    Ok(())
}

/// Builds the images of the debug binaries and runs them. The binaries must have been built.
pub fn test() -> Result<()> {
    test_binaries(&Binaries::Debug)
}

fn test_binaries(binaries: &Binaries) -> Result<()> {
    let folder = folder("test")?;
    let store = Store::apart(&folder)?;
    phase("building of images", || {
        build::images(&store, &folder, binaries)?;
        build::etcd(&store, &folder)?;
        // The images of the last run have lost their names to the new ones.
        sh(store.command("buildah").args(["rmi", "--prune", "--force"]))
    })?;
    phase("containers", || containers::run_test(&store))
}

/// Returns the full name of an image.
fn name(target: &str) -> String {
    format!("localhost/overfill-{target}:{VERSION}")
}

/// Creates and returns a folder for files that are made on the way.
fn folder(name: &str) -> Result<PathBuf> {
    let folder = target().join("images").join(name);
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    absolute(&folder)
}

/// `CARGO_TARGET_DIR` may be relative, but other programs run in other folders.
fn absolute(path: &Path) -> Result<PathBuf> {
    path.canonicalize().with_context(|| format!("looking for {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockerfile_has_the_version_of_the_workspace() {
        let text = std::fs::read_to_string(crate::process::root().join("Dockerfile")).unwrap();
        assert!(text.lines().any(|line| line == format!("ARG VERSION={VERSION}")), "not {VERSION}");
    }

    #[test]
    fn dockerfile_has_the_targets() {
        let text = std::fs::read_to_string(crate::process::root().join("Dockerfile")).unwrap();
        for target in TARGETS {
            assert!(text.lines().any(|line| line.starts_with("FROM ") && line.ends_with(&format!(" AS {target}"))));
        }
    }
}
