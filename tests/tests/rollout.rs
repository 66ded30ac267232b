//! Rollouts under load, as Kubernetes does them with 2 nodes per pool, no surge and one node at a time: both pools at once,
//! each waiting only for its own new node to be ready. No request fails.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use anyhow::{Result, bail, ensure};
use overfill_tests::golden::folder;
use overfill_tests::metrics::At;
use overfill_tests::network::Host;
use overfill_tests::{Completion, Network, Request, Router as _, Service, wait_for};

const OLD: &str = "llama-tied";
const NEW: &str = "llama-untied";
const CLIENTS: usize = 6;

/// A cluster of pools whose nodes the router finds by name.
struct Cluster {
    network: Network,
    host: Host,
    router: Service,
    pools: Vec<Pool>,
}

/// Nodes of one role that run the same model.
struct Pool {
    role: &'static str,
    nodes: Vec<Service>,
}

impl Cluster {
    fn start() -> Result<Option<Self>> {
        let Some(network) = Network::start()? else { return Ok(None) };
        let host = network.host()?;
        host.set_names(&[])?;
        let args = [
            "router",
            "--grpc=127.0.0.1:0",
            &format!("--http={}:0", host.address()),
            "--prefill-dns=http://prefill.test:50061",
            "--decode-dns=http://decode.test:50071",
            "--dns-interval-seconds=0.1",
            "--node-timeout-seconds=3",
            "--served-model=m",
            "--cluster=rollout",
            "--allow-insecure",
        ];
        let router = Service::start_on(Some(host.clone()), args.map(str::to_owned).to_vec())?;
        let pools = ["prefill", "decode"].map(|role| Pool { role, nodes: Vec::new() }).into();
        Ok(Some(Self { network, host, router, pools }))
    }

    /// Starts a node of a role. The router finds it at once, ready or not, as with a headless Service that publishes the
    /// addresses of pods that are not ready.
    fn add(&mut self, role: &'static str, pair: &str, name: &str) -> Result<()> {
        let host = self.network.host()?;
        let address = host.address().to_owned();
        let model = folder(pair, "full");
        let (port, kv) = if role == "prefill" { (50061, None) } else { (50071, Some("--kv-listen=0.0.0.0:50072")) };
        let mut args = vec![role.to_owned()];
        args.extend([
            format!("--model={model}"),
            format!("--served-model-name={name}"),
            format!("--listen=0.0.0.0:{port}"),
            format!("--advertise-host={address}"),
            format!("--admin={address}:0"),
        ]);
        args.extend(
            ["--weights=f32", "--kv-dtype=f32", "--kv-pool-tokens=8192", "--drain-timeout-seconds=60"]
                .map(str::to_owned),
        );
        args.extend(["--cluster=rollout", "--allow-insecure"].map(str::to_owned));
        args.extend(kv.map(str::to_owned));
        let node = Service::start_on(Some(host), args)?;
        self.pool(role)?.nodes.push(node);
        self.publish()
    }

    fn pool(&mut self, role: &str) -> Result<&mut Pool> {
        match self.pools.iter_mut().find(|pool| pool.role == role) {
            Some(pool) => Ok(pool),
            None => bail!("no pool {role}"),
        }
    }

    fn publish(&self) -> Result<()> {
        let names = self.pools.iter().flat_map(|pool| {
            let name = if pool.role == "prefill" { "prefill.test" } else { "decode.test" };
            pool.nodes.iter().map(move |node| (node.host().map_or("", Host::address), name))
        });
        self.host.set_names(&names.collect::<Vec<_>>())
    }

    /// Waits until the newest node of each pool is ready.
    fn wait_newest(&self) -> Result<()> {
        for pool in &self.pools {
            let Some(node) = pool.nodes.last() else { continue };
            let url = format!("http://{}/ready", node.admin());
            wait_for("readiness", || Ok(ureq::get(&url).call().err().map(|e| format!("{} node: {e}", pool.role))))?;
        }
        Ok(())
    }

    /// Replaces one node of both pools: the oldest ones are asked to end, and new ones start at once.
    fn step(&mut self, pair: &str, name: &str) -> Result<()> {
        for role in ["prefill", "decode"] {
            let old = self.pool(role)?.nodes.remove(0);
            old.signal("TERM")?;
            self.add(role, pair, name)?;
            self.leave(old)?;
        }
        self.wait_newest()
    }

    /// Waits for the end of a node that was asked to end.
    fn leave(&self, mut node: Service) -> Result<()> {
        let status = node.wait_end()?;
        ensure!(status.success(), "a node ended with {status}");
        Ok(())
    }

    /// Runs `change` while clients send requests for the models that `models` names at the time. Every answer must be one
    /// of `answers`.
    fn under_load(
        &mut self,
        answers: &[Completion],
        change: impl FnOnce(&mut Self, &Load) -> Result<()>,
    ) -> Result<()> {
        let http = self.router.http().to_owned();
        let load = Load::default();
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|_| {
                    let (load, http) = (&load, &http);
                    scope.spawn(move || load.client(http, answers).inspect_err(|_| load.stop.store(true, SeqCst)))
                })
                .collect();
            let changed = load.wait_progress().and_then(|()| change(self, &load)).and_then(|()| load.wait_progress());
            load.stop.store(true, SeqCst);
            for client in clients {
                client.join().unwrap_or_else(|_| bail!("a client panicked"))?;
            }
            changed
        })
    }
}

#[derive(Default)]
struct Load {
    stop: AtomicBool,
    done: AtomicUsize,
    /// Whether clients ask for the model `next` instead of `m`.
    next: AtomicBool,
}

impl Load {
    fn client(&self, http: &str, answers: &[Completion]) -> Result<()> {
        while !self.stop.load(SeqCst) {
            let model = if self.next.load(SeqCst) { "next" } else { "m" };
            let answer = request(model).send(&At(http))?;
            ensure!(answers.contains(&answer), "{answer:?} is none of {answers:?}");
            self.done.fetch_add(1, SeqCst);
        }
        Ok(())
    }

    fn wait_progress(&self) -> Result<()> {
        let goal = self.done.load(SeqCst) + 2 * CLIENTS;
        wait_for("answers", || {
            ensure!(!self.stop.load(SeqCst), "a client has failed");
            let done = self.done.load(SeqCst);
            Ok((done < goal).then(|| format!("{done}, not {goal}")))
        })
    }
}

fn request(model: &str) -> Request {
    let prompt: Vec<u32> = (0..100).map(|i| (5 + i * 7 % 250) as u32).collect();
    Request::tokens(&prompt, 40).with("model", model.into())
}

/// The answer of a pair alone.
fn answer_of(cluster: &mut Cluster, pair: &str) -> Result<Completion> {
    for role in ["prefill", "decode"] {
        cluster.add(role, pair, "m")?;
    }
    cluster.wait_newest()?;
    request("m").send(&At(cluster.router.http()))
}

#[test]
fn a_new_release_and_a_new_pair_roll_out_without_a_failure() -> Result<()> {
    let Some(mut other) = Cluster::start()? else { return Ok(()) };
    let new = answer_of(&mut other, NEW)?;
    drop(other);
    let Some(mut cluster) = Cluster::start()? else { return Ok(()) };
    let old = answer_of(&mut cluster, OLD)?;
    ensure!(old != new, "both pairs answer the same");
    for role in ["prefill", "decode"] {
        cluster.add(role, OLD, "m")?;
    }
    cluster.wait_newest()?;

    // The same pair, with a new image.
    cluster.under_load(std::slice::from_ref(&old), |cluster, load| {
        for _ in 0..2 {
            cluster.step(OLD, "m")?;
            load.wait_progress()?;
        }
        Ok(())
    })?;

    // Another pair under the same name: each node only works with its own. In the middle, a rollback, then forward again.
    // A sequence stays with its pair, so an answer is that of one pair or of the other.
    let both = [old, new.clone()];
    cluster.under_load(&both, |cluster, load| {
        for pair in [NEW, OLD, NEW, NEW] {
            cluster.step(pair, "m")?;
            load.wait_progress()?;
        }
        Ok(())
    })?;
    let answer = request("m").send(&At(cluster.router.http()))?;
    ensure!(answer == new, "{answer:?} is not the new pair's");

    // A pair beside another one, under another name. When clients have moved, the old one goes away.
    cluster.under_load(&both, |cluster, load| {
        for role in ["prefill", "decode"] {
            cluster.add(role, OLD, "next")?;
        }
        cluster.wait_newest()?;
        load.next.store(true, SeqCst);
        load.wait_progress()?;
        for role in ["prefill", "decode"] {
            let pool = cluster.pool(role)?;
            let nodes: Vec<Service> = pool.nodes.drain(..2).collect();
            cluster.publish()?;
            for node in nodes {
                node.signal("TERM")?;
                cluster.leave(node)?;
            }
        }
        load.wait_progress()
    })
}
