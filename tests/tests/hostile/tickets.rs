//! Senders that hold a valid ticket and violate the protocol.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Context, Result, bail, ensure};
use overfill_kv::handoff::{Commit, Hello, Piece, RefuseReason};
use overfill_kv::{BLOCK_TOKENS, KvEndpoint, KvSchema};
use overfill_proto::{ticket_from_wire, v1};
use overfill_tests::Service;
use overfill_tests::wait::PATIENCE;
use overfill_transport::tcp::frame::{
    ANSWER_BYTES, Answer, Header, decode_answer, encode_commit, encode_header, encode_hello,
};

const PROMPT: usize = 70;

/// Number of protocol violations after an accepted hello.
const MISDEEDS: usize = 8;

/// Misuses reservations. The node must reject each misuse and report it to both the sender and the client.
pub fn misuse(decode: &Service) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    for misdeed in (0..MISDEEDS).cycle().take(8 * MISDEEDS) {
        runtime.block_on(misuse_one(decode.url(), misdeed)).with_context(|| format!("misdeed {misdeed}"))?;
    }
    Ok(())
}

async fn misuse_one(url: String, misdeed: usize) -> Result<()> {
    let mut client = v1::decode_client::DecodeClient::connect(url).await?;
    let request = v1::DecodeRequest {
        request_id: format!("misdeed-{misdeed}"),
        prompt_tokens: (0..PROMPT as u32).map(|i| 5 + (i * 11 + misdeed as u32) % 300).collect(),
        max_tokens: 8,
        ..Default::default()
    };
    let mut events = client.decode(request).await?.into_inner();
    let Some(v1::decode_event::Event::Reserved(reserved)) = events.message().await?.and_then(|event| event.event)
    else {
        bail!("no reservation");
    };
    let schema = KvSchema::try_from(reserved.kv_schema.context("no schema")?)?;
    let hello = Hello {
        ticket: ticket_from_wire(&reserved.ticket)?,
        schema_digest: schema.digest(),
        held_blocks: reserved.held_tokens / BLOCK_TOKENS as u32,
        prompt_tokens: PROMPT as u32,
    };
    let KvEndpoint { address: endpoint, .. } = reserved.kv_endpoint.context("endpoint")?.try_into()?;
    let done = tokio::task::spawn_blocking(move || send(&endpoint, &hello, schema.block_bytes(), misdeed));
    done.await??;
    // The request fails, and its client receives an error.
    while let Ok(event) = events.message().await {
        ensure!(
            event.is_some_and(|event| !matches!(event.event, Some(v1::decode_event::Event::Ready(_)))),
            "it went on"
        );
    }
    Ok(())
}

fn answer(stream: &mut TcpStream) -> Option<Answer> {
    let mut bytes = [0; ANSWER_BYTES];
    stream.read_exact(&mut bytes).ok()?;
    decode_answer(&bytes)
}

fn send(endpoint: &str, hello: &Hello, block_bytes: usize, misdeed: usize) -> Result<()> {
    let connect = |hello: &Hello| -> Result<TcpStream> {
        let mut stream = TcpStream::connect(endpoint)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&encode_hello(hello))?;
        Ok(stream)
    };
    if misdeed == 0 {
        // The hello names another schema.
        let mut stream = connect(&Hello { schema_digest: [0; 32], ..*hello })?;
        ensure!(answer(&mut stream) == Some(Answer::Refuse(RefuseReason::Schema)));
        return Ok(());
    }
    let mut stream = connect(hello)?;
    ensure!(answer(&mut stream) == Some(Answer::Accept), "not accepted");
    let piece = Piece { layer: 0, first_block: hello.held_blocks, blocks: 1 };
    let layer = |piece: Piece, length: usize| encode_header(&Header::Layer(piece, length as u32)).to_vec();
    let outside = Piece { first_block: hello.held_blocks + 1000, ..piece };
    let payload = vec![7; block_bytes + 8];
    let (bytes, refusal) = match misdeed {
        1 => (layer(piece, u32::MAX as usize), Some(RefuseReason::Protocol)),
        2 => (layer(Piece { blocks: u32::MAX, ..piece }, block_bytes), Some(RefuseReason::Protocol)),
        3 => (layer(outside, block_bytes), Some(RefuseReason::Protocol)),
        4 => ([layer(piece, block_bytes), payload].concat(), Some(RefuseReason::Checksum)),
        5 => {
            let commit = Commit { first_token: 1, frames: 0, bytes: 0 };
            (encode_commit(&commit, 0).to_vec(), Some(RefuseReason::Incomplete))
        }
        6 => (vec![0xee; 20], Some(RefuseReason::Protocol)),
        // The connection ends in the middle of a payload.
        _ => ([layer(piece, block_bytes), vec![7; block_bytes / 2]].concat(), None),
    };
    if misdeed == 7 {
        // A second connection with the same ticket does not disturb the first.
        let mut second = connect(hello)?;
        ensure!(answer(&mut second) == Some(Answer::Refuse(RefuseReason::Ticket)), "a ticket was taken twice");
    }
    stream.write_all(&bytes)?;
    if let Some(reason) = refusal {
        let told = answer(&mut stream);
        ensure!(told == Some(Answer::Refuse(reason)), "told {told:?} instead of {reason:?}");
    }
    Ok(())
}
