//! Traces, as a collector that is not ours receives them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use overfill_proto::v1::{self, generate_request::Prompt, router_client::RouterClient};
use overfill_tests::python::python;
use overfill_tests::service::{decode_args, prefill_args, router_args};
use overfill_tests::{Router as _, Service, wait_for};

const PAIR: &str = "llama-tied";
/// Number of layers of the pair.
const LAYERS: usize = 3;

/// A collector that prints the spans it gets.
struct Collector {
    child: Child,
    url: String,
    log: PathBuf,
    _folder: tempfile::TempDir,
}

impl Collector {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        let free = || -> Result<u16> { Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()) };
        let (grpc, http) = (free()?, free()?);
        let output = File::create(&log)?;
        let child = Command::new(program()?)
            .args(["start", "--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed"])
            .args(["--otlp-grpc-endpoint", &format!("127.0.0.1:{grpc}")])
            .args(["--otlp-http-endpoint", &format!("127.0.0.1:{http}")])
            .args(["--pid-file", &folder.path().join("pid").to_string_lossy()])
            .stdout(output.try_clone()?)
            .stderr(output)
            .stdin(Stdio::null())
            .spawn()
            .context("starting the collector")?;
        let url = format!("http://127.0.0.1:{grpc}");
        wait_for("the collector", || {
            let connected = std::net::TcpStream::connect(("127.0.0.1", grpc));
            Ok(connected.err().map(|e| e.to_string()))
        })?;
        Ok(Self { child, url, log, _folder: folder })
    }

    /// The spans of a trace that have arrived.
    fn spans(&self, trace: &str) -> Result<Vec<Span>> {
        let text = std::fs::read_to_string(&self.log)?;
        let (mut spans, mut service): (Vec<Span>, String) = (Vec::new(), String::new());
        for line in text.lines() {
            let line = line.trim();
            if let Some(name) = line.strip_prefix("-> service.name: Str(") {
                service = name.trim_end_matches(')').to_owned();
            } else if let Some(id) = line.strip_prefix("Trace ID       : ") {
                spans.push(Span { service: service.clone(), trace: id.to_owned(), ..Span::default() });
            }
            let Some(span) = spans.last_mut() else { continue };
            if let Some(id) = line.strip_prefix("Parent ID      : ") {
                span.parent = id.to_owned();
            } else if let Some(id) = line.strip_prefix("ID             : ") {
                span.id = id.to_owned();
            } else if let Some(name) = line.strip_prefix("Name           : ") {
                span.name = name.to_owned();
            } else if let Some(name) = line.strip_prefix("-> Name: ") {
                *span.events.entry(name.to_owned()).or_default() += 1;
            }
        }
        spans.retain(|span| span.trace == trace);
        Ok(spans)
    }

    /// Waits for the spans of a trace until its root span, with this parent, is among them and nothing is missing.
    fn wait(&self, trace: &str, root: &str, count: usize) -> Result<Vec<Span>> {
        let mut spans = Vec::new();
        wait_for("spans", || {
            spans = self.spans(trace)?;
            let missing = !spans.iter().any(|span| span.parent == root) || spans.len() < count;
            Ok(missing.then(|| format!("{} spans, not {count} or more with a root: {spans:#?}", spans.len())))
        })?;
        Ok(spans)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Debug, Default)]
struct Span {
    service: String,
    trace: String,
    id: String,
    parent: String,
    name: String,
    /// Events by name.
    events: BTreeMap<String, usize>,
}

/// The collector from the Python environment that `cargo xtask test` prepares.
fn program() -> Result<PathBuf> {
    let python = python()?;
    let script = "import rotel, os; print(os.path.join(os.path.dirname(rotel.__file__), 'rotel-agent'))";
    let output =
        Command::new(&python).args(["-c", script]).output().with_context(|| format!("{}", python.display()))?;
    if !output.status.success() {
        bail!("rotel is missing: `cargo xtask test` prepares it\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?.trim().into())
}

struct Services {
    router: Service,
    _nodes: [Service; 2],
}

fn start(url: &str) -> Result<Services> {
    let traced = ["--otlp-url", url, "--log-format", "json"];
    let prefill = Service::start(prefill_args(PAIR), &traced)?;
    let decode = Service::start(decode_args(PAIR), &traced)?;
    let mut args = traced.to_vec();
    let urls = (prefill.url(), decode.url());
    args.extend(["--prefill-url", &urls.0, "--decode-url", &urls.1]);
    let router = Service::start(router_args(), &args)?;
    router.wait_nodes(1, 1)?;
    Ok(Services { router, _nodes: [prefill, decode] })
}

fn named<'a>(spans: &'a [Span], service: &str, name: &str) -> Result<&'a Span> {
    let mut found = spans.iter().filter(|span| span.service == service && span.name == name);
    let first = found.next().with_context(|| format!("no span {name} of {service}: {spans:#?}"))?;
    ensure!(found.next().is_none(), "two spans {name} of {service}: {spans:#?}");
    Ok(first)
}

#[test]
fn a_request_is_one_trace_across_all_services() -> Result<()> {
    let collector = Collector::start()?;
    let services = start(&collector.url)?;
    let (trace, client) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let body =
        serde_json::json!({"prompt": [5, 6, 7, 8, 9, 10], "max_tokens": 5, "temperature": 0, "ignore_eos": true});
    ureq::post(&format!("{}/v1/completions", services.router.http()))
        .set("traceparent", &format!("00-{trace}-{client}-01"))
        .send_json(body)?;
    // Request and sequence, two waits for a turn and six more legs, three spans of each node, and two handoffs.
    let spans = collector.wait(trace, client, 17)?;
    let request = named(&spans, "overfill-router", "POST /v1/completions")?;
    ensure!(request.parent == client, "{request:?}");
    let sequence = named(&spans, "overfill-router", "sequence")?;
    ensure!(sequence.parent == request.id, "{sequence:?}");
    for leg in ["reserve", "prefill_queue", "prefill", "handoff", "first_decode_step", "decode"] {
        ensure!(named(&spans, "overfill-router", leg)?.parent == sequence.id, "{leg}");
    }
    for (service, role, parts) in [
        ("overfill-prefill", "prefill", ["queue", "compute"]),
        ("overfill-decode", "decode", ["reserve", "decode steps"]),
    ] {
        let node = named(&spans, service, role)?;
        ensure!(node.parent == sequence.id, "{node:?}");
        for part in parts {
            ensure!(named(&spans, service, part)?.parent == node.id, "{part}");
        }
        let handoff = named(&spans, service, "handoff")?;
        ensure!(handoff.parent == node.id, "{handoff:?}");
        let event = if role == "prefill" { "layer sent" } else { "layer received" };
        ensure!(handoff.events.get(event) == Some(&LAYERS), "{handoff:?}");
    }

    // The same over gRPC.
    let (trace, client) = ("1bf7651916cd43dd8448eb211c80319d", "c7ad6b7169203332");
    let ask = async {
        let mut router = RouterClient::connect(services.router.url()).await?;
        let mut request = tonic::Request::new(v1::GenerateRequest {
            prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: vec![5, 6, 7] })),
            max_tokens: 3,
            ..Default::default()
        });
        request.metadata_mut().insert("traceparent", format!("00-{trace}-{client}-01").parse()?);
        let mut events = router.generate(request).await?.into_inner();
        while events.message().await?.is_some() {}
        anyhow::Ok(())
    };
    tokio::runtime::Runtime::new()?.block_on(ask)?;
    let spans = collector.wait(trace, client, 15)?;
    ensure!(named(&spans, "overfill-router", "overfill.v1.Router/Generate")?.parent == client, "{spans:?}");
    named(&spans, "overfill-decode", "decode")?;
    Ok(())
}

#[test]
fn a_dead_collector_costs_nothing() -> Result<()> {
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut services = start(&format!("http://{nowhere}"))?;
    for _ in 0..20 {
        let request = overfill_tests::Request::tokens(&[5, 6, 7], 5);
        ensure!(request.send(&services.router)?.tokens.len() == 5, "too few tokens");
    }
    services.router.signal("TERM")?;
    let status = services.router.wait_end()?;
    ensure!(status.success(), "the router ended with {status}");
    Ok(())
}
