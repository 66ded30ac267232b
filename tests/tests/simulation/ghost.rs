//! A sender that replays recorded KV connections.

use std::time::Duration;

use overfill_transport::tcp::frame::{ANSWER_BYTES, Answer, decode_answer};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
    time::timeout,
};

use crate::guard::Witness;

/// Checks KV-4: a replayed connection is refused.
pub async fn ghost(mut asked: mpsc::Receiver<(String, Vec<u8>)>, witness: Witness) -> turmoil::Result {
    while let Some((endpoint, said)) = asked.recv().await {
        let haunt = async {
            let mut stream = turmoil::net::TcpStream::connect(endpoint).await?;
            stream.write_all(&said).await?;
            let mut answer = [0; ANSWER_BYTES];
            stream.read_exact(&mut answer).await?;
            std::io::Result::Ok(decode_answer(&answer))
        };
        if let Ok(Ok(Some(answer))) = timeout(Duration::from_secs(3), haunt).await
            && !matches!(answer, Answer::Refuse(_))
        {
            witness.violated(format!("KV-4: a used ticket is answered with {answer:?}"));
        }
    }
    Ok(())
}
