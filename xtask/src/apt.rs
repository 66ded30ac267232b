//! What the tests need of the system, installed where that is possible.

use std::process::Command;

use anyhow::{Result, bail};

use crate::process::{run, succeeds};

/// Installs Debian packages; an error, with `needs` as the reason, where this is not root on Debian.
pub fn install(packages: &[&str], needs: &str) -> Result<()> {
    let root_user =
        Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0".as_slice());
    if !root_user || !succeeds(Command::new("apt-get").arg("--version")) {
        bail!("{needs}; install it (Debian: apt install {}) and try again", packages.join(" "));
    }
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    run(Command::new("apt-get")
        .args(["install", "-y", "-qq", "--no-install-recommends"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Sees to it that etcd is there, for the tests of discovery.
pub fn etcd() -> Result<()> {
    let usable = || succeeds(Command::new("etcd").arg("--version"));
    if !usable() {
        install(&["etcd-server"], "the tests of discovery need etcd")?;
    }
    if !usable() {
        bail!("etcd does not start after installing etcd-server");
    }
    Ok(())
}

/// Sees to it that the programs are there that make hosts of a network, and disturb their links.
pub fn network() -> Result<()> {
    let usable = || succeeds(Command::new("nft").arg("--version")) && succeeds(Command::new("tc").arg("-Version"));
    if !usable() {
        install(&["iproute2", "nftables"], "the tests of bad links need ip, tc and nft")?;
    }
    Ok(())
}

/// May there be hosts? An error if this is not root, or the system has no network namespaces.
pub fn hosts() -> Result<()> {
    let namespace = format!("overfill-{}", std::process::id());
    let made = succeeds(Command::new("ip").args(["netns", "add", &namespace]));
    let entered =
        succeeds(Command::new("ip").args(["netns", "exec", &namespace, "nft", "add", "table", "inet", "test"]));
    if made {
        run(Command::new("ip").args(["netns", "del", &namespace]))?;
    }
    if !entered {
        bail!("no network namespaces, or not for this user");
    }
    Ok(())
}

/// Sees to it that valgrind is there, for the kernels' accesses to memory.
pub fn valgrind() -> Result<()> {
    // Without the symbols of the C library it does not start.
    if !succeeds(Command::new("valgrind").args(["--quiet", "true"])) {
        install(&["valgrind", "libc6-dbg"], "checking the kernels' accesses to memory needs valgrind")?;
    }
    Ok(())
}
