//! Tests of idle connections, the connection limit, and shutdown.

use std::{io, net::SocketAddr};

use axum::{
    Extension,
    body::Bytes,
    extract::rejection::BytesRejection,
    http::StatusCode,
    routing::{get, post},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

use super::*;
use crate::net::Listener;

/// Time limit of every wait, much longer than any step takes.
const PATIENCE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

/// A running server. Requests for `/held` wait until `open` is true.
struct Rig {
    address: SocketAddr,
    open: watch::Sender<bool>,
    stop: CancellationToken,
    serving: JoinHandle<()>,
    connections: OpenConnections,
}

async fn start(limits: ConnectionLimits) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let open = watch::Sender::new(false);
    let held = open.clone();
    let routes = Router::new()
        .route(
            "/quick",
            get(async |crowded: Option<Extension<Crowded>>| if crowded.is_some() { "crowded" } else { "quick" }),
        )
        .route(
            "/held",
            get(async move || {
                let _ = held.subscribe().wait_for(|open| *open).await;
                "held"
            }),
        )
        .route(
            "/body",
            post(async |body: Result<Bytes, BytesRejection>| match body {
                Ok(body) => (StatusCode::OK, body.len().to_string()),
                Err(e) => (StatusCode::REQUEST_TIMEOUT, e.body_text()),
            }),
        );
    let stop = CancellationToken::new();
    let connections = OpenConnections::default();
    let stopped = stop.clone().cancelled_owned();
    let serving = serve(Listener::new(listener, None), routes, limits, connections.clone(), stopped);
    Rig { address, open, stop, serving: tokio::spawn(serving), connections }
}

impl Rig {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn ask(&self, path: &str) -> TcpStream {
        let mut stream = self.connect().await;
        ask(&mut stream, path).await;
        stream
    }
}

async fn ask(stream: &mut TcpStream, path: &str) {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
}

/// Reads until the text read ends with `end`.
async fn until(stream: &mut TcpStream, end: &str) -> String {
    let read = async {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            text.push(stream.read_u8().await?);
        }
        Ok::<_, io::Error>(String::from_utf8(text).unwrap())
    };
    timeout(PATIENCE, read).await.expect("no answer").expect("the connection ended")
}

/// Reads until the other side closes the connection.
async fn rest(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    match timeout(PATIENCE, stream.read_to_end(&mut text)).await.expect("it is kept open") {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionReset),
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn who_asks_for_nothing_is_ended() {
    let rig = start(ConnectionLimits { first_request: SHORT, idle: SHORT, ..ConnectionLimits::http(8) }).await;
    for begun in
        ["", "PRI * HTT", "GET /quick HTTP/1.1\r\nhost:", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"]
    {
        let mut stream = rig.connect().await;
        stream.write_all(begun.as_bytes()).await.unwrap();
        let said = rest(&mut stream).await;
        assert!(!said.contains("200 OK"), "{begun:?}: {said:?}");
    }
    // A connection is kept while a response is pending, and closed after it.
    let mut patient = rig.ask("/held").await;
    let mut quick = rig.ask("/quick").await;
    until(&mut quick, "quick").await;
    rest(&mut quick).await;
    rig.open.send_replace(true);
    until(&mut patient, "held").await;
    rest(&mut patient).await;
}

#[tokio::test]
async fn a_body_must_come_in_time() {
    let rig = start(ConnectionLimits { body: SHORT, ..ConnectionLimits::http(8) }).await;
    let head = "POST /body HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n";
    let mut stream = rig.connect().await;
    stream.write_all(format!("{head}body").as_bytes()).await.unwrap();
    assert!(until(&mut stream, "\r\n\r\n4").await.contains("200 OK"));
    stream.write_all(format!("{head}bo").as_bytes()).await.unwrap();
    let said = rest(&mut stream).await;
    assert!(said.contains("408") && said.contains("within 0.05 s"), "{said}");
}

#[tokio::test]
async fn the_silent_keep_nobody_out() {
    let rig = start(ConnectionLimits::http(2)).await;
    let mut first = rig.connect().await;
    let mut silent = Vec::new();
    for _ in 0..3 * SPARE {
        silent.push(rig.connect().await);
    }
    let mut stream = rig.ask("/quick").await;
    assert!(until(&mut stream, "quick").await.contains("200 OK"));
    rest(&mut first).await;
}

#[tokio::test]
async fn who_has_a_request_stays_and_the_rest_are_told() {
    let rig = start(ConnectionLimits::http(2)).await;
    let (mut one, mut two) = (rig.ask("/held").await, rig.ask("/held").await);
    // The server is crowded once the other two requests have begun.
    let mut three = rig.connect().await;
    loop {
        ask(&mut three, "/quick").await;
        let head = until(&mut three, "\r\n\r\n").await;
        let crowded = head.contains("content-length: 7");
        until(&mut three, if crowded { "crowded" } else { "quick" }).await;
        if crowded {
            break;
        }
    }
    assert_eq!(rig.connections.get(), 3);
    rig.open.send_replace(true);
    until(&mut one, "held").await;
    until(&mut two, "held").await;
}

#[tokio::test]
async fn a_shutdown_waits_for_answers_alone() {
    let mut rig = start(ConnectionLimits::http(8)).await;
    let mut held = rig.ask("/held").await;
    let mut idle = rig.ask("/quick").await;
    until(&mut idle, "quick").await;
    let mut slow = rig.connect().await;
    slow.write_all(b"GET /quick HTTP/1.1\r\nhost:").await.unwrap();
    // The server accepts in order, so a response on a later connection shows that the earlier ones are accepted.
    let mut last = rig.ask("/quick").await;
    until(&mut last, "quick").await;
    rig.stop.cancel();
    for stream in [&mut idle, &mut slow, &mut last] {
        rest(stream).await;
    }
    assert!(!rig.serving.is_finished());
    assert!(TcpStream::connect(rig.address).await.is_err(), "it still listens");
    rig.open.send_replace(true);
    assert!(rest(&mut held).await.ends_with("held"));
    timeout(PATIENCE, &mut rig.serving).await.expect("it does not end").unwrap();
    assert_eq!(rig.connections.get(), 0);
}

#[tokio::test]
async fn an_old_connection_is_asked_to_close() {
    let rig = start(ConnectionLimits { age: Some(SHORT), ..ConnectionLimits::http(8) }).await;
    let (mut idle, mut held) = (rig.ask("/quick").await, rig.ask("/held").await);
    until(&mut idle, "quick").await;
    rest(&mut idle).await;
    // An HTTP/2 client gets GOAWAY (frame type 7) after the server's settings.
    let mut http2 = rig.connect().await;
    http2.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let frames = rest(&mut http2).await;
    assert!(frames.contains("\0\0\x08\x07\0\0\0\0\0"), "{frames:?}");
    // The request in progress gets its answer.
    rig.open.send_replace(true);
    assert!(rest(&mut held).await.ends_with("held"));
}
