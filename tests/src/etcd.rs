//! A real etcd cluster, one process per member.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::service::send_signal;
use crate::wait::wait_for;

/// If this variable is set, a missing etcd fails tests instead of skipping them.
const REQUIRED: &str = "OVERFILL_ETCD_REQUIRED";

/// An etcd cluster. Dropping it kills it.
pub struct Etcd {
    members: Vec<Member>,
    /// Folder with `ca.pem`, `cert.pem` and `key.pem`, if services connect over TLS.
    tls: Option<PathBuf>,
    folder: TempDir,
}

struct Member {
    name: String,
    client: String,
    /// URL for services. It differs from `client` only with TLS.
    advertised: String,
    peer: String,
    child: Option<Child>,
}

impl Etcd {
    /// Starts a cluster and waits until it serves. Returns `None` and prints a message if etcd is not installed.
    pub fn start(members: usize) -> Result<Option<Self>> {
        Self::start_with(members, None)
    }

    /// Starts a one-member cluster that requires TLS with client certificates. `folder` contains the certificates.
    pub fn start_tls(folder: &Path) -> Result<Option<Self>> {
        Self::start_with(1, Some(folder))
    }

    fn start_with(members: usize, tls: Option<&Path>) -> Result<Option<Self>> {
        if Command::new("etcd").arg("--version").output().is_err() {
            ensure!(std::env::var_os(REQUIRED).is_none(), "etcd is not installed, and {REQUIRED} is set");
            eprintln!("SKIPPED: etcd is not installed (Debian: apt install etcd-server)");
            return Ok(None);
        }
        let member = |i| {
            let client = free_address()?;
            let advertised = match tls {
                Some(_) => free_address()?.replace("http://", "https://"),
                None => client.clone(),
            };
            Ok(Member { name: format!("m{i}"), client, advertised, peer: free_address()?, child: None })
        };
        let members = (0..members).map(member).collect::<Result<_>>()?;
        let mut etcd = Self { members, tls: tls.map(Path::to_owned), folder: tempfile::tempdir()? };
        etcd.start_all()?;
        Ok(Some(etcd))
    }

    /// Value of `--etcd-url`.
    pub fn urls(&self) -> String {
        self.members.iter().map(|member| member.advertised.as_str()).collect::<Vec<_>>().join(",")
    }

    /// Starts all stopped members and waits until they serve.
    pub fn start_all(&mut self) -> Result<()> {
        let cluster: Vec<_> = self.members.iter().map(|m| format!("{}={}", m.name, m.peer)).collect();
        for member in self.members.iter_mut().filter(|member| member.child.is_none()) {
            let data = self.folder.path().join(&member.name);
            let mut command = Command::new("etcd");
            let mut listen = member.client.clone();
            if let Some(tls) = &self.tls {
                listen = format!("{listen},{}", member.advertised);
                let flags = [("--cert-file", "cert"), ("--key-file", "key"), ("--trusted-ca-file", "ca")];
                for (flag, file) in flags {
                    command.arg(flag).arg(tls.join(file).with_extension("pem"));
                }
                command.arg("--client-cert-auth");
            }
            let child = command
                .args(["--name", &member.name, "--listen-client-urls", &listen, "--log-level", "error"])
                .args(["--advertise-client-urls", &member.advertised, "--listen-peer-urls", &member.peer])
                .args(["--initial-advertise-peer-urls", &member.peer, "--initial-cluster", &cluster.join(",")])
                // Timeouts that a slow machine can keep.
                .args(["--heartbeat-interval", "100", "--election-timeout", "1000"])
                .arg("--data-dir")
                .arg(data)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("starting etcd")?;
            member.child = Some(child);
        }
        wait_for("etcd", || Ok(self.revision().err().map(|e| format!("{e:#}"))))
    }

    /// Kills all members.
    pub fn kill(&mut self) -> Result<()> {
        (0..self.members.len()).try_for_each(|i| self.kill_member(i))
    }

    fn kill_member(&mut self, i: usize) -> Result<()> {
        if let Some(mut child) = self.members[i].child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Deletes all data. No member may be running.
    pub fn wipe(&mut self) -> Result<()> {
        ensure!(self.members.iter().all(|member| member.child.is_none()), "etcd runs");
        self.folder = tempfile::tempdir()?;
        Ok(())
    }

    /// Sends a signal to all members.
    pub fn signal(&self, signal: &str) -> Result<()> {
        self.members.iter().filter_map(|member| member.child.as_ref()).try_for_each(|child| send_signal(child, signal))
    }

    /// Kills the leader.
    pub fn kill_leader(&mut self) -> Result<()> {
        // A member that has just started may not answer yet.
        let mut leads = None;
        wait_for("a leader of etcd", || {
            leads = self.members.iter().position(|member| {
                let status = post(&member.client, "/v3/maintenance/status", &json!({}));
                status.is_ok_and(|status| status["leader"] == status["header"]["member_id"])
            });
            Ok(leads.is_none().then(|| "no member leads".to_owned()))
        })?;
        self.kill_member(leads.context("no member leads")?)
    }

    /// Enables authentication, with root as the only user.
    pub fn enable_login(&self, password: &str) -> Result<()> {
        self.post("/v3/auth/user/add", &json!({"name": "root", "password": password}))?;
        self.post("/v3/auth/role/add", &json!({"name": "root"}))?;
        self.post("/v3/auth/user/grant", &json!({"user": "root", "role": "root"}))?;
        self.post("/v3/auth/enable", &json!({}))?;
        Ok(())
    }

    /// Returns the current revision.
    pub fn revision(&self) -> Result<u64> {
        number(&self.all()?["header"]["revision"])
    }

    /// Returns the number of keys.
    pub fn keys(&self) -> Result<u64> {
        self.all()?.get("count").map_or(Ok(0), number)
    }

    /// Waits until there are `count` keys.
    pub fn wait_keys(&self, count: u64) -> Result<()> {
        wait_for("keys in etcd", || {
            let keys = self.keys()?;
            Ok((keys != count).then(|| format!("{keys}, not {count}")))
        })
    }

    /// Compacts all revisions before the current one.
    pub fn compact(&self) -> Result<()> {
        let revision = self.revision()?.to_string();
        self.post("/v3/kv/compaction", &json!({"revision": revision, "physical": true}))?;
        Ok(())
    }

    fn all(&self) -> Result<Value> {
        // The range of all keys.
        self.post("/v3/kv/range", &json!({"key": "AA==", "range_end": "AA==", "keys_only": true}))
    }

    /// Posts to each running member in turn until one answers.
    fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let mut last = anyhow::anyhow!("no member runs");
        for member in self.members.iter().filter(|member| member.child.is_some()) {
            match post(&member.client, path, body) {
                Ok(value) => return Ok(value),
                Err(error) => last = error,
            }
        }
        bail!(last)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn post(url: &str, path: &str, body: &Value) -> Result<Value> {
    Ok(ureq::post(&format!("{url}{path}")).timeout(Duration::from_secs(5)).send_json(body)?.into_json()?)
}

/// Parses a number. etcd writes 64-bit numbers as strings in JSON.
fn number(value: &Value) -> Result<u64> {
    value.as_str().with_context(|| format!("{value} is not a number"))?.parse().context("a number of etcd's")
}

/// Returns a free address, since etcd can't pick a port itself.
fn free_address() -> Result<String> {
    Ok(format!("http://{}", TcpListener::bind("127.0.0.1:0")?.local_addr()?))
}
