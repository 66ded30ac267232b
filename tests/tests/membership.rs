//! Nodes that register in etcd: joining, leaving, restarting, and failures of etcd itself.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use overfill_tests::certify::certify;
use overfill_tests::service::{decode_args, prefill_args, router_args};
use overfill_tests::{Completion, Etcd, Request, Service, wait_for};

const PAIR: &str = "llama-tied";

/// The shortest lease that etcd grants.
const LEASE: Duration = Duration::from_secs(2);

fn request(index: usize) -> Request {
    let prompt: Vec<u32> = (0..40).map(|i| (5 + (i * 7 + index * 31) % 300) as u32).collect();
    Request::tokens(&prompt, 24)
}

fn etcd_args(etcd: &Etcd) -> Vec<String> {
    let lease = LEASE.as_secs().to_string();
    ["--etcd-url", &etcd.urls(), "--etcd-lease-seconds", &lease, "--etcd-prefix", "test"].map(str::to_owned).to_vec()
}

/// A cluster whose services only know the address of etcd.
struct Parts {
    prefill: Service,
    decode: Service,
    router: Service,
    answer: Completion,
}

fn start(etcd: &Etcd) -> Result<Parts> {
    let more = etcd_args(etcd);
    let router = Service::start(router_args(), &more)?;
    let prefill = Service::start(prefill_args(PAIR), &more)?;
    let decode = Service::start(decode_args(PAIR), &more)?;
    router.wait_nodes(1, 1)?;
    let answer = request(0).send(&router)?;
    ensure!(answer.tokens.len() == 24, "{answer:?}");
    Ok(Parts { prefill, decode, router, answer })
}

/// Sends requests until leases without renewal would have expired twice.
fn outlast_the_lease(parts: &Parts) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < 2 * LEASE {
        check(parts)?;
    }
    Ok(())
}

fn check(parts: &Parts) -> Result<()> {
    let answer = request(0).send(&parts.router)?;
    ensure!(answer == parts.answer, "{answer:?} instead of {:?}", parts.answer);
    Ok(())
}

fn check_undisturbed(router: &Service) -> Result<()> {
    let migrations = router.metric("overfill_migrations_total", "")?;
    ensure!(migrations == Some(0.0), "{migrations:?} migrations");
    Ok(())
}

#[test]
fn nodes_join_leave_and_restart() -> Result<()> {
    let Some(etcd) = Etcd::start(1)? else { return Ok(()) };
    let mut parts = start(&etcd)?;
    // A second router finds the same nodes. A static list may be combined with etcd.
    let mut more = etcd_args(&etcd);
    more.extend(["--prefill-url".into(), parts.prefill.url()]);
    let second = Service::start(router_args(), &more)?;
    second.wait_nodes(1, 1)?;
    ensure!(request(0).send(&second)? == parts.answer, "another answer from the second router");

    // A node that is asked to end removes its registration.
    parts.decode.signal("TERM")?;
    let status = parts.decode.wait_end()?;
    ensure!(status.success(), "the decode node ended with {status}");
    etcd.wait_keys(1)?;
    for router in [&parts.router, &second] {
        router.wait_nodes(1, 0)?;
        // The routers remove the node.
        router.wait_metric("overfill_nodes", "role=\"decode\"", 0.0)?;
    }

    // The node restarts at the same address.
    parts.decode = parts.decode.start_again()?;
    parts.router.wait_nodes(1, 1)?;
    check(&parts)?;

    // The node is killed and restarted before its registration expires.
    parts.decode.kill()?;
    parts.decode = parts.decode.start_again()?;
    for router in [&parts.router, &second] {
        wait_for("the new incarnation", || {
            let answer = request(0).send(router);
            Ok(answer.err().map(|e| format!("{e:#}")))
        })?;
        ensure!(request(0).send(router)? == parts.answer, "another answer from the new incarnation");
    }

    // A killed node is removed when its lease expires.
    let third = Service::start(decode_args(PAIR), &etcd_args(&etcd))?;
    parts.router.wait_nodes(1, 2)?;
    drop(third);
    parts.router.wait_metric("overfill_nodes", "role=\"decode\"", 1.0)?;
    check(&parts)?;

    // A frozen node registers again after it continues.
    parts.decode.signal("STOP")?;
    parts.router.wait_metric("overfill_nodes", "role=\"decode\"", 0.0)?;
    parts.decode.signal("CONT")?;
    parts.router.wait_nodes(1, 1)?;
    check(&parts)
}

#[test]
fn etcd_may_want_a_login() -> Result<()> {
    let Some(etcd) = Etcd::start(1)? else { return Ok(()) };
    etcd.enable_login("hunter2")?;
    let folder = tempfile::tempdir()?;
    let login = |password: &str| -> Result<Vec<String>> {
        let file = folder.path().join(password);
        std::fs::write(&file, format!("{password}\n"))?;
        let file = file.to_str().context("not UTF-8")?.to_owned();
        let more = ["--etcd-user".to_owned(), "root".to_owned(), "--etcd-password-file".to_owned(), file];
        Ok(etcd_args(&etcd).into_iter().chain(more).collect())
    };
    let router = Service::start(router_args(), &login("hunter2")?)?;
    let _prefill = Service::start(prefill_args(PAIR), &login("hunter2")?)?;
    let stranger = Service::start(decode_args(PAIR), &login("wrong")?)?;
    let _decode = Service::start(decode_args(PAIR), &login("hunter2")?)?;
    router.wait_nodes(1, 1)?;
    request(0).send(&router)?;
    ensure!(stranger.metric("vllm:request_success_total", "")? == Some(0.0), "a node that could not register was used");
    Ok(())
}

#[test]
fn etcd_may_want_certificates() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certify(folder.path())?;
    let Some(mut etcd) = Etcd::start_tls(folder.path())? else { return Ok(()) };
    let file = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let with = |own: bool| {
        let mut args = etcd_args(&etcd);
        args.extend(["--etcd-ca".to_owned(), file("ca.pem")]);
        if own {
            args.extend(["--etcd-cert".to_owned(), file("cert.pem"), "--etcd-key".to_owned(), file("key.pem")]);
        }
        args
    };
    let router = Service::start(router_args(), &with(true))?;
    let _stranger = Service::start(decode_args(PAIR), &with(false))?;
    let _prefill = Service::start(prefill_args(PAIR), &with(true))?;
    let _decode = Service::start(decode_args(PAIR), &with(true))?;
    router.wait_nodes(1, 1)?;
    let answer = request(0).send(&router)?;
    // The nodes register again after etcd has lost its data.
    let second = with(true);
    etcd.kill()?;
    etcd.wipe()?;
    etcd.start_all()?;
    etcd.wait_keys(2)?;
    let second = Service::start(router_args(), &second)?;
    second.wait_nodes(1, 1)?;
    ensure!(request(0).send(&second)? == answer, "another answer from the second router");
    ensure!(etcd.keys()? == 2, "a node without a certificate has registered");
    Ok(())
}

#[test]
fn etcd_may_freeze_die_and_come_back_empty() -> Result<()> {
    let Some(mut etcd) = Etcd::start(1)? else { return Ok(()) };
    let parts = start(&etcd)?;

    etcd.signal("STOP")?;
    outlast_the_lease(&parts).context("etcd frozen")?;
    etcd.signal("CONT")?;
    etcd.wait_keys(2)?;
    check(&parts)?;

    etcd.kill()?;
    outlast_the_lease(&parts).context("etcd dead")?;
    etcd.wipe()?;
    etcd.start_all()?;
    // The nodes register again, and a router that only knows etcd finds them.
    etcd.wait_keys(2)?;
    let second = Service::start(router_args(), &etcd_args(&etcd))?;
    second.wait_nodes(1, 1)?;
    ensure!(request(0).send(&second)? == parts.answer, "another answer from the second router");
    check(&parts)?;

    // The first router still finds nodes that join later.
    let decode = Service::start(decode_args(PAIR), &etcd_args(&etcd))?;
    parts.router.wait_nodes(1, 2)?;
    drop(decode);
    check_undisturbed(&second)?;
    check_undisturbed(&parts.router)
}

#[test]
fn changes_that_were_compacted_away_are_not_missed() -> Result<()> {
    let Some(mut etcd) = Etcd::start(1)? else { return Ok(()) };
    let mut parts = start(&etcd)?;
    parts.router.signal("STOP")?;
    let decode = Service::start(decode_args(PAIR), &etcd_args(&etcd))?;
    etcd.wait_keys(3)?;
    parts.decode.signal("TERM")?;
    parts.decode.wait_end()?;
    etcd.wait_keys(2)?;
    etcd.compact()?;
    etcd.kill()?;
    etcd.start_all()?;
    parts.router.signal("CONT")?;
    parts.router.wait_metric("overfill_nodes", "role=\"decode\"", 1.0)?;
    parts.router.wait_nodes(1, 1)?;
    parts.decode = decode;
    check(&parts)
}

#[test]
fn etcd_may_lose_its_leader() -> Result<()> {
    let Some(mut etcd) = Etcd::start(3)? else { return Ok(()) };
    let parts = start(&etcd)?;
    etcd.kill_leader()?;
    outlast_the_lease(&parts)?;
    // Nodes can join with the remaining members.
    let decode = Service::start(decode_args(PAIR), &etcd_args(&etcd))?;
    parts.router.wait_nodes(1, 2)?;
    etcd.wait_keys(3)?;
    check(&parts)?;
    drop(decode);
    parts.router.wait_metric("overfill_nodes", "role=\"decode\"", 1.0)?;
    check_undisturbed(&parts.router)
}
