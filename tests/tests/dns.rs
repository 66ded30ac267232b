//! Discovery without etcd: a router resolves host names again and again, as it does with headless Services in Kubernetes.

use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use overfill_proto::v1;
use overfill_tests::metrics::At;
use overfill_tests::python::python;
use overfill_tests::service::{decode_args, prefill_args};
use overfill_tests::{Network, Request, Router as _, Service, wait_for};
use prost::Message as _;

const PAIR: &str = "llama-tied";

/// Waits until the node answers `/ready` with this status.
fn wait_ready(node: &Service, status: u16) -> Result<()> {
    let url = format!("http://{}/ready", node.admin());
    wait_for("readiness", || {
        let now = match ureq::get(&url).call() {
            Ok(response) => response.status(),
            Err(ureq::Error::Status(status, _)) => status,
            Err(error) => return Err(error.into()),
        };
        Ok((now != status).then(|| format!("{url} is {now}, not {status}")))
    })
}

fn node(network: &Network, args: Vec<String>, ports: &[(&str, u16)]) -> Result<Service> {
    let host = network.host()?;
    let mut args = args;
    args.extend(["--allow-insecure".into(), "--cluster=test".into(), format!("--advertise-host={}", host.address())]);
    args.extend(ports.iter().flat_map(|(flag, port)| [(*flag).to_owned(), format!("0.0.0.0:{port}")]));
    args.extend(["--admin".into(), format!("{}:0", host.address())]);
    Service::start_on(Some(host), args)
}

fn prefill(network: &Network) -> Result<Service> {
    node(network, prefill_args(PAIR), &[("--listen", 50061)])
}

fn decode(network: &Network) -> Result<Service> {
    node(network, decode_args(PAIR), &[("--listen", 50071), ("--kv-listen", 50072)])
}

fn address(node: &Service) -> &str {
    node.host().map_or("", |host| host.address())
}

#[test]
fn nodes_are_found_by_name_and_ready_only_with_a_partner() -> Result<()> {
    let Some(network) = Network::start()? else { return Ok(()) };
    let host = network.host()?;
    host.set_names(&[])?;
    let mut args: Vec<String> = ["router", "--grpc", "127.0.0.1:0"].map(str::to_owned).to_vec();
    let names = ["--prefill-dns=http://prefill.test:50061", "--decode-dns=http://decode.test:50071"];
    args.extend(names.map(str::to_owned));
    args.extend(["--cluster=test", "--dns-interval-seconds=0.1", "--node-timeout-seconds=3"].map(str::to_owned));
    args.extend(["--allow-insecure".into(), "--http".into(), format!("{}:0", host.address())]);
    let router = Service::start_on(Some(host.clone()), args)?;

    // A router without nodes is ready. A prefill node without a decode node is not, if one is expected.
    let mut first = prefill(&network)?;
    wait_ready(&first, 503)?;
    let starting = network.host()?;
    host.set_names(&[(address(&first), "prefill.test"), (starting.address(), "decode.test")])?;
    router.wait_nodes(1, 0)?;
    first.wait_metric("overfill_routers", "", 1.0)?;
    wait_ready(&first, 503)?;

    let (one, two) = (decode(&network)?, decode(&network)?);
    let decodes = [(address(&one), "decode.test"), (address(&two), "decode.test")];
    let mut all = vec![(address(&first), "prefill.test")];
    all.extend(decodes);
    host.set_names(&all)?;
    router.wait_nodes(1, 2)?;
    for node in [&first, &one, &two] {
        wait_ready(node, 200)?;
    }
    let request = Request::tokens(&[9, 8, 7, 6, 5], 24);
    let answer = request.send(&At(router.http()))?;

    // A second prefill node replaces the first one. The name changes before the first one is gone.
    let second = prefill(&network)?;
    let mut now = vec![(address(&second), "prefill.test")];
    now.extend(decodes);
    host.set_names(&now)?;
    router.wait_nodes(2, 2)?;
    first.signal("TERM")?;
    ensure!(first.wait_end()?.success(), "the first prefill node failed");
    router.wait_nodes(1, 2)?;
    ensure!(request.send(&At(router.http()))? == answer, "another answer after the change");
    // The router removes the address of the first one.
    router.wait_metric("overfill_nodes", "role=\"prefill\"", 1.0)?;

    host.set_names(&[(address(&second), "prefill.test")])?;
    // A node that has served stays ready when its partners leave.
    drop((one, two));
    router.wait_nodes(1, 0)?;
    wait_ready(&second, 200)?;
    // A new prefill node is ready without a partner if the decode pool has no nodes at all.
    let third = prefill(&network)?;
    host.set_names(&[(address(&second), "prefill.test"), (address(&third), "prefill.test")])?;
    wait_ready(&third, 200)
}

/// A client that keeps one channel open reaches routers that were added later: its connections end at their age, and it looks up
/// the addresses again. No request fails.
#[test]
fn one_grpc_channel_reaches_routers_that_are_added() -> Result<()> {
    let Some(network) = Network::start()? else { return Ok(()) };
    let (prefill, decode) = (prefill(&network)?, decode(&network)?);
    let router = || {
        let host = network.host()?;
        let urls = [
            format!("--prefill-url=http://{}:50061", address(&prefill)),
            format!("--decode-url=http://{}:50071", address(&decode)),
        ];
        let mut args = ["router", "--cluster=test", "--allow-insecure", "--max-connection-age-seconds=1"]
            .map(str::to_owned)
            .to_vec();
        args.extend(urls);
        args.extend(["--grpc=0.0.0.0:50051".to_owned(), format!("--http={}:0", host.address())]);
        let router = Service::start_on(Some(host), args)?;
        router.wait_nodes(1, 1)?;
        Ok::<_, anyhow::Error>(router)
    };
    let mut routers = vec![router()?];
    let client = network.host()?;
    client.set_names(&[(address(&routers[0]), "routers.test")])?;
    let prompt = v1::generate_request::Prompt::TokenIds(v1::TokenIds { ids: vec![9, 8, 7] });
    let request = v1::GenerateRequest { prompt: Some(prompt), max_tokens: 1, ..v1::GenerateRequest::default() };
    let hex: String = request.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect();
    let mut running = client
        .command(python()?)
        .args([concat!(env!("CARGO_MANIFEST_DIR"), "/python/grpc_channel.py"), "dns:///routers.test:50051", &hex])
        // Finds names where the test sets them.
        .env("GRPC_DNS_RESOLVER", "native")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let answers = |router: &Service, running: &mut Child| {
        wait_for("answers of a router", || {
            ensure!(running.try_wait()?.is_none(), "the client has ended");
            let answered = router.metric("vllm:request_success_total", "")?.unwrap_or(0.0);
            Ok((answered == 0.0).then(|| format!("{} has answered nothing", router.http())))
        })
    };
    let mut steps = || -> Result<()> {
        answers(&routers[0], &mut running)?;
        routers.extend([router()?, router()?]);
        let names: Vec<_> = routers.iter().map(|router| (address(router), "routers.test")).collect();
        client.set_names(&names)?;
        routers.iter().skip(1).try_for_each(|router| answers(router, &mut running))
    };
    let reached = steps();
    drop(running.stdin.take());
    let end = running.wait_with_output()?;
    let said = String::from_utf8_lossy(&end.stderr).into_owned();
    ensure!(end.status.success(), "the client failed: {said}");
    reached.with_context(|| said)
}
