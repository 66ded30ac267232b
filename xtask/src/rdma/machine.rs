//! The virtual machine: a kernel, and a file system in memory with everything that the tests need.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, Result, bail};

use super::{find, output};
use crate::process::run as sh;

/// Limit of one run. On two processors it takes two minutes.
const LIMIT: Duration = Duration::from_secs(600);
const PASSED: &str = "RDMA-VM: PASSED";
/// Modules of soft-RoCE.
const MODULES: [&str; 4] = ["rdma_rxe", "ib_uverbs", "veth", "crc32_generic"];
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

/// Files of the machine, under construction.
pub struct Machine {
    folder: PathBuf,
    /// Root of its file system.
    files: PathBuf,
    kernel: PathBuf,
}

impl Machine {
    /// Gets Debian's kernel and puts the system's tools and libraries together. `folder` keeps the kernel for the next
    /// time.
    pub fn new(folder: &Path) -> Result<Self> {
        let files = folder.join("files");
        match fs::remove_dir_all(&files) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).context("removing old files"),
            _ => {}
        }
        for name in ["bin", "proc", "sys", "dev", "tmp", "etc/libibverbs.d", "lib/modules", "t/debug/deps"] {
            fs::create_dir_all(files.join(name))?;
        }
        let unpacked = kernel(folder)?;
        let kernel = find(&unpacked.join("boot"), "vmlinuz-")?;
        let mut machine = Self { folder: folder.to_owned(), files, kernel };
        machine.add_modules(&unpacked)?;
        fs::copy(program("busybox")?, machine.files.join("bin/busybox"))?;
        symlink("busybox", machine.files.join("bin/sh"))?;
        for tool in ["ip", "rdma"] {
            machine.add_program(&program(tool)?, &format!("/tools/{tool}"))?;
        }
        machine.add_library(&Path::new(LIBRARIES).join("libibverbs.so.1"))?;
        machine.add_library(&find(&Path::new(LIBRARIES).join("libibverbs"), "librxe")?)?;
        fs::copy("/etc/libibverbs.d/rxe.driver", machine.files.join("etc/libibverbs.d/rxe.driver"))?;
        let init = machine.files.join("init");
        fs::write(&init, include_str!("init.sh"))?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        Ok(machine)
    }

    /// Copies a program without its debug information, and the libraries that it needs.
    pub fn add_program(&mut self, program: &Path, to: &str) -> Result<()> {
        let to = self.place(Path::new(to))?;
        sh(Command::new("strip").arg("-o").arg(&to).arg(program))?;
        self.add_needed(program)
    }

    /// Copies a folder to the same path.
    pub fn add_folder(&mut self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                self.add_folder(&path)?;
            } else {
                fs::copy(&path, self.place(&path)?)?;
            }
        }
        Ok(())
    }

    fn add_library(&mut self, library: &Path) -> Result<()> {
        let to = self.place(library)?;
        if !to.exists() {
            fs::copy(library, to).with_context(|| format!("copying {}", library.display()))?;
        }
        self.add_needed(library)
    }

    fn add_needed(&mut self, file: &Path) -> Result<()> {
        // Lines are `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x..)` or `/lib64/ld-linux-x86-64.so.2 (0x..)`.
        for line in output(Command::new("ldd").arg(file))?.lines() {
            let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) else { continue };
            let to = self.place(Path::new(path))?;
            if !to.exists() {
                fs::copy(path, to).with_context(|| format!("copying {path}"))?;
            }
        }
        Ok(())
    }

    /// Where a path of the machine is, with its folder.
    fn place(&self, path: &Path) -> Result<PathBuf> {
        let place = self.files.join(path.strip_prefix("/").unwrap_or(path));
        if let Some(folder) = place.parent() {
            fs::create_dir_all(folder)?;
        }
        Ok(place)
    }

    /// Copies the modules, those that they depend on, and the index in which `modprobe` finds them.
    fn add_modules(&mut self, unpacked: &Path) -> Result<()> {
        let from = find(&unpacked.join("lib/modules"), "")?;
        let version = from.file_name().context("no version")?.to_owned();
        let to = self.files.join("lib/modules").join(&version);
        sh(Command::new("depmod").arg("-b").arg(unpacked).arg(&version))?;
        fs::create_dir_all(&to)?;
        let index = fs::read_to_string(from.join("modules.dep"))?;
        for module in MODULES {
            // `kernel/a/rdma_rxe.ko: kernel/b/needed.ko kernel/c/another.ko`
            let name = format!("/{module}.ko");
            let line = index.lines().find(|line| line.split(':').next().is_some_and(|path| path.ends_with(&name)));
            for file in line.with_context(|| format!("the kernel has no {module}"))?.split([':', ' ']) {
                if !file.is_empty() {
                    let place = to.join(file);
                    fs::create_dir_all(place.parent().context("no folder")?)?;
                    fs::copy(from.join(file), place)?;
                }
            }
        }
        for name in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
            fs::copy(from.join(name), to.join(name))?;
        }
        sh(Command::new("depmod").arg("-b").arg(&self.files).arg(&version))
    }

    /// Starts the machine and shows what it prints. Fails unless it reports that all tests have passed.
    pub fn run(&self) -> Result<()> {
        let archive = self.folder.join("files.cpio");
        let pack = format!("find . | busybox cpio -o -H newc > {}", archive.display());
        sh(Command::new("sh").args(["-c", &pack]).current_dir(&self.files))?;
        let mut command = Command::new("qemu-system-x86_64");
        // Emulation works in containers and in virtual machines, where acceleration may be missing or hang.
        command.args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-m",
            "2048",
            "-smp",
            "2",
            "-nographic",
            "-no-reboot",
        ]);
        command.args(["-nodefaults", "-serial", "stdio"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&archive);
        command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
        let mut machine = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting qemu")?;
        let lines = BufReader::new(machine.stdout.take().context("no output")?);
        let (sender, receiver) = channel();
        let reader = std::thread::spawn(move || {
            for line in lines.split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    return;
                }
            }
        });
        let end = Instant::now() + LIMIT;
        let mut passed = false;
        let result = loop {
            match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    println!("  {line}");
                    passed |= line.ends_with(PASSED);
                }
                Err(RecvTimeoutError::Disconnected) if passed => break Ok(()),
                Err(RecvTimeoutError::Disconnected) => break Err("a test in the virtual machine failed"),
                Err(RecvTimeoutError::Timeout) => break Err("the virtual machine did not end in time"),
            }
        };
        machine.kill()?;
        machine.wait()?;
        // Ends with the machine's output.
        let _ = reader.join();
        fs::remove_file(&archive)?;
        match result {
            Ok(()) => Ok(()),
            Err(reason) => bail!(reason),
        }
    }
}

/// Downloads and unpacks Debian's kernel, unless this version is there already. It is not installed.
fn kernel(folder: &Path) -> Result<PathBuf> {
    let depends = output(Command::new("apt-cache").args(["depends", "linux-image-amd64"]))?;
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned);
    let package = package.context("apt-cache names no kernel; run apt-get update")?;
    let unpacked = folder.join(&package);
    if !unpacked.exists() {
        let download = folder.join("download");
        fs::create_dir_all(&download)?;
        sh(Command::new("apt-get").args(["download", "-qq", &package]).current_dir(&download))?;
        let file = find(&download, &package)?;
        let partly = folder.join("partly");
        sh(Command::new("dpkg-deb").arg("-x").arg(file).arg(&partly))?;
        fs::rename(partly, &unpacked)?;
        fs::remove_dir_all(download)?;
    }
    Ok(unpacked)
}

/// Finds a program of the system.
fn program(name: &str) -> Result<PathBuf> {
    let found = ["/bin", "/sbin", "/usr/bin", "/usr/sbin"].iter().map(|folder| Path::new(folder).join(name));
    found.into_iter().find(|path| path.is_file()).with_context(|| format!("no program {name}"))
}
