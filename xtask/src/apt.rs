//! Programs that the tests need. Missing ones are installed if possible.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::process::{run, succeeds};

/// Installs Debian packages. Fails with `needs` as the reason unless the user is root on Debian.
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

/// Installs etcd for the discovery tests unless it is present.
pub fn etcd() -> Result<()> {
    let usable = || succeeds(Command::new("etcd").arg("--version"));
    if !usable() {
        install(&["etcd-server"], "the discovery tests need etcd")?;
    }
    if !usable() {
        bail!("etcd does not start after installing etcd-server");
    }
    Ok(())
}

/// Installs the browser for the tests of the router's page, unless it is present.
pub fn chromium() -> Result<()> {
    let usable = || ["chromium", "chromedriver"].iter().all(|program| succeeds(Command::new(program).arg("--version")));
    if !usable() {
        install(&["chromium", "chromium-driver", "fonts-dejavu-core"], "the tests of the page need chromium")?;
    }
    if !usable() {
        bail!("chromium does not start after installing it");
    }
    Ok(())
}

/// Installs promtool for the tests of the chart's rules, unless it is present.
pub fn promtool() -> Result<()> {
    let usable = || succeeds(Command::new("promtool").arg("--version"));
    if !usable() {
        install(&["prometheus"], "the tests of the chart's rules need promtool")?;
    }
    if !usable() {
        bail!("promtool does not start after installing prometheus");
    }
    Ok(())
}

/// Installs the programs that create network hosts and disturb their links, unless they are present.
pub fn network() -> Result<()> {
    let usable = || succeeds(Command::new("nft").arg("--version")) && succeeds(Command::new("tc").arg("-Version"));
    if !usable() {
        install(&["iproute2", "nftables"], "the tests of faulty links need ip, tc and nft")?;
    }
    Ok(())
}

/// Checks that network namespaces can be created. Fails if the user is not root or the system has none.
pub fn hosts() -> Result<()> {
    let namespace = format!("overfill-{}", std::process::id());
    let made = succeeds(Command::new("ip").args(["netns", "add", &namespace]));
    let entered =
        succeeds(Command::new("ip").args(["netns", "exec", &namespace, "nft", "add", "table", "inet", "test"]));
    if made {
        run(Command::new("ip").args(["netns", "del", &namespace]))?;
    }
    if !entered {
        bail!("network namespaces are not available to this user");
    }
    Ok(())
}

/// Installs the C++ compiler of the software GPU, with its sanitizers, unless it is present.
pub fn compiler() -> Result<()> {
    let usable = || succeeds(Command::new("g++").arg("--version"));
    if !usable() {
        install(&["g++"], "the software GPU needs a C++ compiler")?;
    }
    if !usable() {
        bail!("g++ does not start after its installation");
    }
    Ok(())
}

/// Installs what building RDMA needs, unless it is present.
pub fn rdma_build() -> Result<()> {
    let libclang = || {
        let list = Command::new("ldconfig").arg("-p").output();
        list.is_ok_and(|list| String::from_utf8_lossy(&list.stdout).contains("libclang"))
            || Path::new("/usr/lib")
                .read_dir()
                .is_ok_and(|entries| entries.flatten().any(|entry| entry.path().join("lib/libclang.so").exists()))
    };
    let usable = || succeeds(Command::new("cmake").arg("--version")) && libclang();
    if !usable() {
        install(&["cmake", "libclang-dev"], "building RDMA needs cmake and libclang")?;
    }
    if !usable() {
        bail!("cmake or libclang is still missing after the installation");
    }
    Ok(())
}

/// Installs the virtual machine for the tests of RDMA, and the files that go into it, unless they are present.
pub fn rdma_machine() -> Result<()> {
    const NEEDS: &str = "the tests of RDMA run in a virtual machine";
    if cfg!(not(target_arch = "x86_64")) {
        bail!("{NEEDS}, which is made for x86-64 only");
    }
    let usable = || {
        succeeds(Command::new("qemu-system-x86_64").arg("--version"))
            && ["/sbin/depmod", "/bin/ip", "/bin/busybox", "/etc/libibverbs.d/rxe.driver", "/usr/bin/strip"]
                .iter()
                .all(|file| Path::new(file).is_file())
            && succeeds(Command::new("apt-cache").args(["show", "linux-image-amd64"]))
    };
    if !usable() {
        let packages =
            ["qemu-system-x86", "busybox-static", "libibverbs1", "ibverbs-providers", "iproute2", "kmod", "binutils"];
        install(&packages, NEEDS)?;
    }
    if !usable() {
        bail!("{NEEDS}; qemu or a file that goes into it is still missing after the installation");
    }
    Ok(())
}

/// Installs valgrind for the memory check of kernels, unless it is present.
pub fn valgrind() -> Result<()> {
    // valgrind does not start without the C library's symbols.
    if !succeeds(Command::new("valgrind").args(["--quiet", "true"])) {
        install(&["valgrind", "libc6-dbg"], "the memory check of kernels needs valgrind")?;
    }
    Ok(())
}

/// Installs the programs that build images, unless they are present.
pub fn images() -> Result<()> {
    let usable =
        || ["buildah", "mmdebstrap", "strip"].iter().all(|program| succeeds(Command::new(program).arg("--version")));
    if !usable() {
        install(
            &["buildah", "mmdebstrap", "binutils"],
            "building container images needs buildah, mmdebstrap and strip",
        )?;
    }
    if !usable() {
        bail!("buildah, mmdebstrap or strip does not start after its installation");
    }
    Ok(())
}

/// Installs the programs that run containers, unless they are present.
pub fn containers() -> Result<()> {
    // podman finds its own programs in one of these folders.
    let has = |program: &str| {
        ["/usr/lib/podman", "/usr/libexec/podman"].iter().any(|folder| Path::new(folder).join(program).is_file())
    };
    let usable = || {
        ["podman", "runc", "iptables"].iter().all(|program| succeeds(Command::new(program).arg("--version")))
            && succeeds(Command::new("ip").arg("-Version"))
            && has("netavark")
            && has("aardvark-dns")
    };
    if !usable() {
        install(
            &["podman", "runc", "netavark", "aardvark-dns", "iptables", "iproute2"],
            "the test of container images needs podman with runc, netavark and aardvark-dns, iptables and ip",
        )?;
    }
    if !usable() {
        bail!("podman, runc, netavark, aardvark-dns, iptables or ip is still missing after the installation");
    }
    Ok(())
}

/// Checks that the system has what containers consist of. Fails if the user is not root or the system does not allow it.
pub fn namespaces() -> Result<()> {
    let trial = "ip link add bridge0 type bridge && ip link add end0 type veth peer name end1 && iptables -t nat -L -n \
                 && groups=/sys/fs/cgroup && if [ -d $groups/memory ]; then groups=$groups/memory; fi \
                 && mkdir -p $groups/overfill-trial && rmdir $groups/overfill-trial";
    let isolated = ["--mount", "--pid", "--fork", "--net", "--uts", "--ipc", "--mount-proc", "sh", "-c", trial];
    if !succeeds(Command::new("unshare").args(isolated)) {
        bail!("this system does not let this user create namespaces, bridges and cgroups for containers");
    }
    Ok(())
}
