//! Builds the images with buildah, and lists what is in them with syft.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::store::Store;
use super::{TARGETS, VERSION, absolute, base, name};
use crate::process::{cargo, root, run, succeeds, target};
use crate::python;

/// The services and the command line.
const NAMES: [&str; 4] = ["overfill-router", "overfill-prefill", "overfill-decode", "overfill"];

/// Builds a list of dependencies into binaries, from which syft learns the crates.
const AUDITABLE: &str = "0.7.7";

/// Binaries for the images.
pub enum Binaries {
    /// Those of `cargo build`, which must have run. Without debug information.
    Debug,
    /// Built here with `cargo auditable`.
    Release,
    /// Those in a folder.
    Folder(PathBuf),
}

impl Binaries {
    /// Finds or builds the binaries. Returns their folder.
    fn folder(&self) -> Result<PathBuf> {
        match self {
            Self::Debug => Ok(target().join("debug")),
            Self::Release => build_release(),
            Self::Folder(folder) => Ok(folder.clone()),
        }
    }
}

/// Builds the images of all targets out of the binaries, and writes `FOLDER/overfill-TARGET.cdx.json` for each.
pub fn images(store: &Store, folder: &Path, binaries: &Binaries) -> Result<()> {
    let syft = python::venv("syft", "xtask/src/images/requirements.txt")?.with_file_name("syft");
    let ready = collect(&binaries.folder()?, matches!(binaries, Binaries::Debug), folder)?;
    // Images that someone may use get the packages of today.
    let archive = base::make(folder, !store.is_own())?;
    build(store, "base", "FROM scratch\nADD base.tar /\n", &archive)?;
    let revision = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(root()).output();
    let revision = match &revision {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    };
    for target in TARGETS {
        run(store
            .command("buildah")
            .args(["build", "--quiet", "--isolation", "chroot", "--target", target, "--tag", &name(target)])
            .arg(format!("--build-arg=BASE_IMAGE={}", name("base")))
            .arg(format!("--build-arg=VERSION={VERSION}"))
            .arg(format!("--build-arg=REVISION={revision}"))
            .arg(format!("--build-context=binaries={}", ready.display()))
            .arg(root()))?;
        bill_of_materials(store, &syft, target, folder, matches!(binaries, Binaries::Release))?;
    }
    Ok(())
}

/// Builds an image of this machine's etcd, for tests.
pub fn etcd(store: &Store, folder: &Path) -> Result<()> {
    let found = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|folder| folder.join("etcd")).find(|program| program.is_file())
    });
    let program = found.context("the test of containers needs etcd (Debian: apt install etcd-server)")?;
    let copy = folder.join("etcd");
    std::fs::copy(&program, &copy).with_context(|| format!("copying {}", program.display()))?;
    let text = format!(
        "FROM {}\nCOPY --chmod=0755 etcd /usr/bin/etcd\nUSER 65532:65532\nENTRYPOINT [\"/usr/bin/etcd\"]\n",
        name("base")
    );
    build(store, "etcd", &text, &copy)
}

/// Builds an image by a Dockerfile that uses one file. Both are in the same folder.
fn build(store: &Store, target: &str, text: &str, file: &Path) -> Result<()> {
    let folder = file.parent().context("a file without a folder")?;
    let dockerfile = folder.join(format!("{target}.Dockerfile"));
    std::fs::write(&dockerfile, text).with_context(|| format!("writing {}", dockerfile.display()))?;
    // Without this list, buildah would walk through everything in the folder.
    let ignore = folder.join(format!("{target}.ignore"));
    let name_of_file = file.file_name().context("a file without a name")?.to_string_lossy();
    std::fs::write(&ignore, format!("*\n!{name_of_file}\n"))
        .with_context(|| format!("writing {}", ignore.display()))?;
    run(store
        .command("buildah")
        .args(["build", "--quiet", "--isolation", "chroot", "--tag", &name(target)])
        .arg("--ignorefile")
        .arg(&ignore)
        .arg("--file")
        .arg(&dockerfile)
        .arg(folder))
}

/// Copies the binaries to a folder of the form that the Dockerfile's stage `binaries` has.
fn collect(from: &Path, strip: bool, folder: &Path) -> Result<PathBuf> {
    let ready = folder.join("binaries");
    for name in ["bin", "lib", "etc"] {
        let path = ready.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    }
    for name in NAMES {
        let (source, copy) = (from.join(name), ready.join("bin").join(name));
        if !source.is_file() {
            bail!(
                "{} is missing; run `cargo build --workspace --bins`, or choose --release or --binaries DIR",
                source.display()
            );
        }
        if strip {
            run(Command::new("strip").args(["--strip-debug", "-o"]).arg(&copy).arg(&source))?;
        } else {
            std::fs::copy(&source, &copy).with_context(|| format!("copying {}", source.display()))?;
        }
    }
    absolute(&ready)
}

fn build_release() -> Result<PathBuf> {
    let tools = target().join("images/tools");
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::env::join_paths(std::iter::once(tools.join("bin")).chain(std::env::split_paths(&paths)))
        .context("PATH")?;
    if !succeeds(cargo(&["auditable", "--version"]).env("PATH", &paths)) {
        run(cargo(&["install", "--locked", "cargo-auditable", "--version", AUDITABLE, "--root"]).arg(&tools))?;
    }
    let mut build = cargo(&["auditable", "build", "--locked", "--release", "--bins"]);
    for package in ["overfill-router", "overfill-prefill-node", "overfill-decode-node", "overfill-cli"] {
        build.args(["--package", package]);
    }
    run(build.env("PATH", paths))?;
    Ok(target().join("release"))
}

/// Writes the list of an image's contents (CycloneDX) and checks that it is not empty by mistake.
fn bill_of_materials(store: &Store, syft: &Path, target: &str, folder: &Path, crates: bool) -> Result<()> {
    let archive = folder.join("scanned.tar");
    let list = folder.join(format!("overfill-{target}.cdx.json"));
    // buildah adds to an archive that exists.
    if archive.exists() {
        std::fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
    }
    run(store.command("buildah").args(["push", "--quiet", &name(target)]).arg(format!(
        "oci-archive:{}:{}",
        archive.display(),
        name(target)
    )))?;
    run(Command::new(syft)
        .args(["scan", "--quiet"])
        .arg(format!("oci-archive:{}", archive.display()))
        .args(["--source-name", &format!("overfill-{target}"), "--source-version", VERSION, "--output"])
        .arg(format!("cyclonedx-json={}", list.display()))
        .env("SYFT_CHECK_FOR_APP_UPDATE", "false"))?;
    std::fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;

    let text = std::fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    let parsed: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("reading {}", list.display()))?;
    let listed = |wanted: &str| {
        parsed["components"].as_array().is_some_and(|all| all.iter().any(|component| component["name"] == wanted))
    };
    for wanted in if crates { &["libc6", "tokio"][..] } else { &["libc6"] } {
        if !listed(wanted) {
            bail!("{} lists no {wanted}; the image has it", list.display());
        }
    }
    Ok(())
}
