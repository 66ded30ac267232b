//! Plain copies, as bounds for a handoff.

use std::io;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};

use super::{BenchError, Runtimes};
use crate::tcp::Link;
use crate::tcp::payload::{CHUNK_BYTES, read_full, write_full};

/// Two memory regions of the same size.
pub(super) struct Buffers {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Buffers {
    /// Writes to every page, as for the stores.
    pub(super) fn new(bytes: usize) -> Self {
        Self { from: (0..bytes).map(|i| i as u8).collect(), to: vec![1; bytes] }
    }

    /// Copies by one thread.
    pub(super) fn memcpy(&mut self) -> Duration {
        let start = Instant::now();
        self.to.copy_from_slice(&self.from);
        start.elapsed()
    }

    /// Copies through a TCP connection from one runtime to the other, without frames or checksums.
    pub(super) async fn tcp(&mut self, runtimes: &Runtimes) -> Result<Duration, BenchError> {
        let listening = runtimes.receiver.spawn(TcpListener::bind("127.0.0.1:0"));
        let listener = listening.await.map_err(io::Error::other)??;
        let address = listener.local_addr()?;
        let accepting = runtimes.receiver.spawn(async move { Link::tcp(listener.accept().await?.0) });
        let connecting = runtimes.sender.spawn(async move { Link::tcp(TcpStream::connect(address).await?) });
        let out = connecting.await.map_err(io::Error::other)??;
        let incoming = accepting.await.map_err(io::Error::other)??;
        let (from, mut to) = (std::mem::take(&mut self.from), std::mem::take(&mut self.to));
        let start = Instant::now();
        let writing = runtimes.sender.spawn(async move {
            for part in from.chunks(CHUNK_BYTES) {
                write_direct(&out, part).await?;
            }
            // The reader sends one byte when it has read everything.
            read_full(&out, &mut [0]).await?;
            Ok::<_, io::Error>(from)
        });
        let reading = runtimes.receiver.spawn(async move {
            for part in to.chunks_mut(CHUNK_BYTES) {
                read_full(&incoming, part).await?;
            }
            write_full(&incoming, &[1]).await?;
            Ok::<_, io::Error>(to)
        });
        self.from = writing.await.map_err(io::Error::other)??;
        let took = start.elapsed();
        self.to = reading.await.map_err(io::Error::other)??;
        Ok(took)
    }
}

async fn write_direct(stream: &Link, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write_vectored(&[io::IoSlice::new(bytes)]) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
