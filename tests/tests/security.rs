//! TLS on all connections, API keys for clients, and no port exposed by accident.

use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use overfill_cluster::Tls;
use overfill_tests::certify::certify;
use overfill_tests::cluster::binary;
use overfill_tests::service::{decode_args, prefill_args, router_args};
use overfill_tests::{Request, Service, completion, wait_for};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PAIR: &str = "llama-tied";
const KEY: &str = "a-key-of-team-a-0123456789";

struct Secured {
    folder: tempfile::TempDir,
    _prefill: Service,
    decode: Service,
    router: Service,
}

impl Secured {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        certify(folder.path())?;
        let file = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        let keys = json!([{"name": "team-a", "key": KEY, "requests_per_minute": 1000}]);
        std::fs::write(folder.path().join("keys.json"), keys.to_string())?;
        std::fs::write(folder.path().join("key"), KEY)?;
        let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
        let tls = ["--tls-ca", &ca, "--tls-cert", &cert, "--tls-key", &key];
        let prefill = Service::start(prefill_args(PAIR), &tls)?;
        let decode = Service::start(decode_args(PAIR), &tls)?;
        let secure = |node: &Service| node.url().replace("http://", "https://");
        let (prefill_url, decode_url, keys) = (secure(&prefill), secure(&decode), file("keys.json"));
        let more = ["--prefill-url", &prefill_url, "--decode-url", &decode_url, "--api-keys", &keys];
        let serve = ["--serve-tls-cert", &cert, "--serve-tls-key", &key];
        let router = Service::start(router_args(), &[&more[..], &tls[..], &serve[..]].concat())?;
        let this = Self { folder, _prefill: prefill, decode, router };
        wait_for("the nodes", || {
            let output = this.overfill(&["status", "--json"], true)?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok((text.matches("\"healthy\":true").count() != 2).then_some(text))
        })?;
        Ok(this)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a subcommand against the router.
    fn overfill(&self, args: &[&str], with_key: bool) -> Result<Output> {
        let mut command = Command::new(binary()?);
        command.arg(args[0]).arg("--router").arg(self.router.url().replace("http://", "https://"));
        command.arg("--tls-ca").arg(self.file("ca.pem")).env_remove("OVERFILL_API_KEY");
        command.arg("--tls-cert").arg(self.file("cert.pem")).arg("--tls-key").arg(self.file("key.pem"));
        if with_key {
            command.arg("--api-key-file").arg(self.file("key"));
        }
        command.args(&args[1..]).output().context("running overfill")
    }

    /// Sends an HTTP request over TLS and returns the whole answer.
    async fn https(&self, request: &str) -> Result<String> {
        let address = overfill_tests::Router::http(&self.router).trim_start_matches("http://").to_owned();
        let tls = Tls::dialling(self.file("ca.pem"), None, None)?;
        let mut stream = tls.connect(&address, TcpStream::connect(&address).await?).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        // The server may close without a TLS close_notify.
        let _ = stream.read_to_end(&mut answer).await;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

fn post(path: &str, authorization: &str, body: &serde_json::Value) -> String {
    let body = body.to_string();
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{authorization}content-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

#[tokio::test]
async fn with_tls_and_keys_only_those_who_may_are_served() -> Result<()> {
    let secured = Secured::start()?;
    // The same request to a cluster without TLS and keys.
    let prefill = Service::start::<&str>(prefill_args(PAIR), &[])?;
    let decode = Service::start::<&str>(decode_args(PAIR), &[])?;
    let plain = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", &decode.url()])?;
    plain.wait_nodes(1, 1)?;
    let prompt: Vec<u32> = (0..150).map(|i| 5 + i * 7 % 300).collect();
    let request = Request::tokens(&prompt, 60);
    let expected = request.send(&plain)?;

    let key = format!("authorization: Bearer {KEY}\r\n");
    let answer = secured.https(&post("/v1/completions", &key, &request.0)).await?;
    let body = answer.split_once("\r\n\r\n").with_context(|| format!("no body: {answer}"))?.1;
    let answer = completion::Completion::parse(&serde_json::from_str(body).context(body.to_owned())?)?;
    ensure!(answer == expected, "{answer:?} instead of {expected:?}");

    for header in ["", "authorization: Bearer another-key-0123456789\r\n", "authorization: Basic abc\r\n"] {
        let answer = secured.https(&post("/v1/completions", header, &request.0)).await?;
        ensure!(answer.starts_with("HTTP/1.1 401") && answer.contains("invalid_api_key"), "{header}: {answer}");
    }
    let live = secured.https("GET /live HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await?;
    ensure!(live.starts_with("HTTP/1.1 200"), "{live}");
    let metrics = secured.https("GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await?;
    for name in ["ca.pem", "cert.pem"] {
        let path = secured.file(name);
        let series = format!("overfill_certificate_expiry_timestamp_seconds{{file=\"{}\"}} ", path.display());
        ensure!(metrics.contains(&series), "{series}: {metrics}");
    }

    let output = secured.overfill(&["generate", "--max-tokens", "3", "hello"], true)?;
    ensure!(output.status.success(), "{output:?}");
    let output = secured.overfill(&["generate", "--max-tokens", "3", "hello"], false)?;
    ensure!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("API key"), "{output:?}");
    Ok(())
}

#[test]
fn a_secured_router_can_be_loaded() -> Result<()> {
    let secured = Secured::start()?;
    let url = overfill_tests::Router::http(&secured.router).replace("http://", "https://");
    let bench = |ca: &str, key: &[&str]| -> Result<Output> {
        let mut command = Command::new(binary()?);
        command.args(["bench", "serve", "--json", "--requests", "4", "--prompt-tokens", "8", "--output-tokens", "4"]);
        command.args(["--http-url", &url, "--tls-ca", ca]).args(key).env_remove("OVERFILL_API_KEY");
        command.output().context("running the bench")
    };
    let file = |name: &str| secured.file(name).to_string_lossy().into_owned();
    let (ca, key) = (file("ca.pem"), file("key"));
    let output = bench(&ca, &["--api-key-file", &key])?;
    ensure!(output.status.success(), "{output:?}");
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(summary["succeeded"] == json!(4), "{summary}");
    let error = |output: Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let keyless = error(bench(&ca, &[])?);
    ensure!(keyless.contains("HTTP 401"), "{keyless}");
    // A CA that did not sign the cluster's certificates.
    let other = tempfile::tempdir()?;
    certify(other.path())?;
    let other = other.path().join("ca.pem").to_string_lossy().into_owned();
    let stranger = error(bench(&other, &["--api-key-file", &key])?);
    ensure!(stranger.contains("no connection"), "{stranger}");
    Ok(())
}

#[tokio::test]
async fn strangers_reach_no_node() -> Result<()> {
    let mut secured = Secured::start()?;
    let address = secured.decode.url().trim_start_matches("http://").to_owned();
    // A client that trusts the CA but has no certificate, and a client without TLS.
    let tls = Tls::dialling(secured.file("ca.pem"), None, None)?;
    let mut stream = tls.connect(&address, TcpStream::connect(&address).await?).await?;
    let mut answer = Vec::new();
    let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    ensure!(stream.read_to_end(&mut answer).await.is_err(), "a stranger was let in: {answer:?}");
    let mut stream = TcpStream::connect(&address).await?;
    let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    let _ = stream.read_to_end(&mut answer).await;
    ensure!(!answer.windows(2).any(|w| w == b"\0\0"), "HTTP/2 without TLS: {answer:?}");

    // With a client certificate, a node can be drained.
    let url = secured.decode.url().replace("http://", "https://");
    let output = secured.overfill(&["drain", &url], true)?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(secured.decode.wait_end()?.success(), "the drained node did not end well");
    Ok(())
}

#[test]
fn nothing_listens_beyond_this_machine_by_accident() -> Result<()> {
    let start = |args: &[&str]| -> Result<String> {
        let output = Command::new(binary()?).args(args).output()?;
        ensure!(output.status.code() == Some(64), "{output:?}");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let urls = ["--prefill-url", "http://127.0.0.1:1", "--decode-url", "http://127.0.0.1:1"];
    let error = start(&[&["router", "--http", "0.0.0.0:0"], &urls[..]].concat())?;
    ensure!(error.contains("--http must be a loopback address unless --serve-tls-cert or --api-keys"), "{error}");
    let mut args = decode_args(PAIR);
    args.extend(["--kv-listen", "0.0.0.0:0", "--advertise-kv", "here:1"].map(str::to_owned));
    let error = start(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(error.contains("--kv-listen must be a loopback address unless --tls-ca"), "{error}");
    // --allow-insecure permits the address.
    args.push("--allow-insecure".into());
    Service::start::<&str>(args, &[])?;
    Ok(())
}
