//! A network of hosts on this machine: network namespaces, joined by a bridge. Links can drop packets and be slow.
//!
//! Needs Linux, root, and the programs `ip`, `tc` and `nft` (Debian: iproute2, nftables).

use std::path::{Path, PathBuf};
use std::process::{Command, id};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use anyhow::{Context, Result, ensure};

/// If this variable is set, a failure to create hosts fails tests instead of skipping them.
const REQUIRED: &str = "OVERFILL_HOSTS_REQUIRED";

/// Number of networks in the address range for benchmarks (RFC 2544), each with 254 hosts.
const NETS: u32 = 512;

/// Hosts that can reach each other and this process.
pub struct Network {
    bridge: String,
    /// The first three bytes of every address.
    prefix: String,
    hosts: AtomicU32,
}

/// A host. It exists while processes run on it.
#[derive(Clone, Debug)]
pub struct Host {
    namespace: String,
    address: String,
    /// The bridge's end of the host's link.
    far: String,
}

/// Folder of the files that processes in a network namespace see in /etc.
fn files(namespace: &str) -> PathBuf {
    Path::new("/etc/netns").join(namespace)
}

impl Network {
    /// Creates a network without hosts. Returns `None` and prints a message if this machine does not support it.
    pub fn start() -> Result<Option<Self>> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let net = (id() * 4 + STARTED.fetch_add(1, Relaxed)) % NETS;
        let (bridge, prefix) = (format!("of{net}"), format!("198.{}.{}", 18 + net / 256, net % 256));
        // Removes the bridge that a killed test may have left.
        let _ = run("ip", &["link", "del", &bridge]);
        let network = Self { bridge, prefix, hosts: AtomicU32::new(0) };
        match network.set_up() {
            Ok(()) => Ok(Some(network)),
            Err(error) if std::env::var_os(REQUIRED).is_some() => Err(error.context(format!("{REQUIRED} is set"))),
            Err(error) => {
                eprintln!("SKIPPED: no network of hosts on this machine: {error:#}");
                Ok(None)
            }
        }
    }

    fn set_up(&self) -> Result<()> {
        run("nft", &["--version"])?;
        run("tc", &["-Version"])?;
        // Without a fixed address the bridge takes the lowest one of its ports. When a new host changed it, older hosts would
        // send to the old one until their neighbour entries expire, for minutes.
        run("ip", &["link", "add", &self.bridge, "address", "02:00:00:00:00:01", "type", "bridge"])?;
        run("ip", &["addr", "add", &format!("{}.1/24", self.prefix), "dev", &self.bridge])?;
        run("ip", &["link", "set", &self.bridge, "up"])?;
        // Tries everything that tests need: a host, and disturbances of its link.
        let host = self.host()?;
        host.drop_packets(100, &[])?;
        host.slow_down(1_000_000)?;
        host.heal();
        Ok(())
    }

    /// Adds a host.
    pub fn host(&self) -> Result<Host> {
        let n = self.hosts.fetch_add(1, Relaxed);
        ensure!(n < 200, "too many hosts");
        let namespace = format!("{}-{n}", self.bridge);
        let host =
            Host { address: format!("{}.{}", self.prefix, 10 + n), far: format!("{}v{n}", self.bridge), namespace };
        let _ = run("ip", &["netns", "del", &host.namespace]);
        let _ = run("ip", &["link", "del", &host.far]);
        run("ip", &["netns", "add", &host.namespace])?;
        run("ip", &["link", "add", &host.far, "type", "veth", "peer", "name", "eth0", "netns", &host.namespace])?;
        run("ip", &["link", "set", &host.far, "master", &self.bridge, "up"])?;
        host.run("ip", &["addr", "add", &format!("{}/24", host.address), "dev", "eth0"])?;
        host.run("ip", &["link", "set", "eth0", "up"])?;
        host.run("ip", &["link", "set", "lo", "up"])?;
        Ok(host)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for n in 0..self.hosts.load(Relaxed) {
            let namespace = format!("{}-{n}", self.bridge);
            let _ = run("ip", &["netns", "del", &namespace]);
            // Sockets of ended processes keep a namespace, and so its link, for minutes.
            let _ = run("ip", &["link", "del", &format!("{}v{n}", self.bridge)]);
            let _ = std::fs::remove_dir_all(files(&namespace));
        }
        let _ = run("ip", &["link", "del", &self.bridge]);
    }
}

impl Host {
    /// IP address of the host.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns a command that runs on the host. `ip` replaces itself with it, so the process id is the command's own.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command
    }

    /// Sets the names that processes on the host resolve, besides localhost: pairs of address and name. Processes that
    /// started after the first call see later calls as well.
    pub fn set_names(&self, names: &[(&str, &str)]) -> Result<()> {
        let folder = files(&self.namespace);
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let lines = names.iter().map(|(address, name)| format!("{address} {name}\n"));
        let text: String = std::iter::once("127.0.0.1 localhost\n".to_owned()).chain(lines).collect();
        // No name server: a name that is not in the file does not exist.
        std::fs::write(folder.join("nsswitch.conf"), "hosts: files\n").context("writing where a host finds names")?;
        // `ip netns exec` mounts these files over those in /etc. Writing it in place changes it for running processes.
        std::fs::write(folder.join("hosts"), text).context("writing the names of a host")
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        run("ip", &[&["netns", "exec", &self.namespace, program], args].concat())
    }

    /// Silently drops a percentage of packets in both directions. If `ports` is not empty, only connections to these
    /// ports are affected.
    pub fn drop_packets(&self, percent: u32, ports: &[String]) -> Result<()> {
        let chance = if percent < 100 { format!("numgen random mod 100 < {percent}") } else { String::new() };
        let these = if ports.is_empty() { String::new() } else { format!("{{ {} }}", ports.join(", ")) };
        let sides = if ports.is_empty() { &[""][..] } else { &["tcp dport", "tcp sport"] };
        let mut rules = String::from("add table inet faults\n");
        for hook in ["input", "output"] {
            rules += &format!("add chain inet faults {hook} {{ type filter hook {hook} priority 0 ; }}\n");
            for side in sides {
                rules += &format!("add rule inet faults {hook} {side} {these} {chance} drop\n");
            }
        }
        // All rules at once: with one direction open for some milliseconds more, answers on their way would still arrive.
        self.run("nft", &[&rules])
    }

    /// Limits the bandwidth in each direction.
    pub fn slow_down(&self, bytes_per_second: u32) -> Result<()> {
        let rate = format!("{bytes_per_second}bps");
        let limit = ["root", "tbf", "rate", &rate, "burst", "16kb", "latency", "500ms"];
        self.run("tc", &[&["qdisc", "replace", "dev", "eth0"], &limit[..]].concat())?;
        run("tc", &[&["qdisc", "replace", "dev", &self.far], &limit[..]].concat())
    }

    /// Removes all disturbances.
    pub fn heal(&self) {
        // Each command fails if there was no such disturbance.
        let _ = self.run("nft", &["delete", "table", "inet", "faults"]);
        let _ = self.run("tc", &["qdisc", "del", "dev", "eth0", "root"]);
        let _ = run("tc", &["qdisc", "del", "dev", &self.far, "root"]);
    }
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let line = || format!("{program} {}", args.join(" "));
    let output = Command::new(program).args(args).output().with_context(line)?;
    ensure!(output.status.success(), "{}: {}", line(), String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
