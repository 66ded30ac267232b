//! A base image out of Debian packages, without a shell. It needs no registry.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::run;

/// What a Rust program needs: C library, unwinder, C++ library (for CUDA), certificates, time zones, names of services.
const PACKAGES: &[&str] = &["base-files", "ca-certificates", "libc6", "libgcc-s1", "libstdc++6", "netbase", "tzdata"];

/// Runs after packages were unpacked to `$1`, and before their archives are removed. No script of a package has run.
///
/// Packages that only such scripts need are taken away again, and so are all programs. The rest goes to dpkg's list, from
/// which scanners learn what is installed.
const AFTER_UNPACKING: &str = r#"
set -eu
cd "$1"
for archive in var/cache/apt/archives/*.deb; do
    name=$(dpkg-deb --field "$archive" Package)
    case " $WANTED gcc-base " in
        *" $(echo "$name" | sed 's/^gcc-[0-9]*-base$/gcc-base/') "*)
            dpkg-deb --field "$archive" | sed '1aStatus: install ok installed' >> var/lib/dpkg/status
            echo >> var/lib/dpkg/status ;;
        *)
            dpkg-deb --fsys-tarfile "$archive" | tar --list | while read -r path; do
                if [ ! -d "$path" ] || [ -L "$path" ]; then rm -f "$path"; fi
            done ;;
    esac
done
find bin/ sbin/ usr/bin/ usr/sbin/ ! -type d -delete
rm -rf usr/share/man usr/share/perl5 usr/share/lintian
# mmdebstrap copies these two from this machine.
rm -f etc/hostname etc/resolv.conf
echo 'root:x:0:0:root:/root:/usr/sbin/nologin' > etc/passwd
echo 'nonroot:x:65532:65532:nonroot:/nonexistent:/usr/sbin/nologin' >> etc/passwd
printf 'root:x:0:\nnonroot:x:65532:\n' > etc/group
echo 'hosts: files dns' > etc/nsswitch.conf
# What update-ca-certificates would do.
cat usr/share/ca-certificates/mozilla/*.crt > etc/ssl/certs/ca-certificates.crt
"#;

/// Makes `FOLDER/base.tar` unless one may be reused and is there already. Its Debian release is the one of this machine, so
/// that binaries built here find their C library.
pub fn make(folder: &Path, reuse: bool) -> Result<PathBuf> {
    let release = release()?;
    let recipe = format!("{release}\n{}\n{AFTER_UNPACKING}", PACKAGES.join(" "));
    let (archive, stamp) = (folder.join("base.tar"), folder.join("base.recipe"));
    if reuse && archive.is_file() && std::fs::read_to_string(&stamp).is_ok_and(|have| have == recipe) {
        return Ok(archive);
    }
    let hook = folder.join("after-unpacking.sh");
    std::fs::write(&hook, AFTER_UNPACKING).with_context(|| format!("writing {}", hook.display()))?;
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=extract", "--skip=output/dev"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(format!("--extract-hook=sh '{}' \"$1\"", hook.display()))
        .arg(&release)
        .arg(&archive)
        .env("WANTED", PACKAGES.join(" ")))?;
    // apt leaves these behind. They mean nothing without apt, and not all of them are root's.
    run(Command::new("tar").arg("--delete").arg("--file").arg(&archive).args([
        "./etc/apt",
        "./var/cache/apt",
        "./var/lib/apt",
        "./var/local",
    ]))?;
    std::fs::write(&stamp, recipe).with_context(|| format!("writing {}", stamp.display()))?;
    Ok(archive)
}

/// Returns the name of this machine's Debian release.
fn release() -> Result<String> {
    const FILE: &str = "/etc/os-release";
    let text = std::fs::read_to_string(FILE).with_context(|| format!("reading {FILE}"))?;
    match text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")) {
        Some(name) => Ok(name.trim_matches('"').to_owned()),
        None => bail!("{FILE} names no release (VERSION_CODENAME); the base image is made of Debian's packages"),
    }
}
