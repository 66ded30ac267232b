//! Bytes between a socket and KV memory, in order, checksummed, and without a copy of our own where blocks are large.
//!
//! KV memory may be locked while it is read or written, so nothing waits in there: the closures move what the socket
//! takes or has at that moment, and the waiting is done outside.

use std::io::{self, ErrorKind, IoSlice};

use overfill_kv::{BlockId, KvStore, StoreError};
use tokio::net::TcpStream;

use crate::frame::CRC_BYTES;

/// Blocks at least this long move directly between socket and KV memory; for shorter ones a call to the system each
/// costs more than a copy.
const DIRECT_BYTES: usize = 16 * 1024;

/// Most bytes per call to the system, so that the checksum finds them in cache.
const CHUNK_BYTES: usize = 256 * 1024;

/// Why a payload did not move.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MoveError {
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Fills `buf` from the socket.
pub(crate) async fn read_full(stream: &TcpStream, buf: &mut [u8]) -> io::Result<()> {
    let mut at = 0;
    while at < buf.len() {
        match stream.try_read(&mut buf[at..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => at += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => stream.readable().await?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes all of `buf` to the socket.
pub(crate) async fn write_full(stream: &TcpStream, buf: &[u8]) -> io::Result<()> {
    Outgoing::new(stream).with(buf).flush().await
}

/// How far a payload has moved; carried over every wait.
#[derive(Default)]
struct Progress {
    /// Whole blocks behind us.
    blocks: usize,
    /// Bytes of the next block that have moved.
    at: usize,
    /// Bytes of the next block that are in the checksum.
    hashed: usize,
}

impl Progress {
    fn next_block(&mut self) {
        *self = Self { blocks: self.blocks + 1, at: 0, hashed: 0 };
    }
}

/// The writing half. Small parts are kept back and leave together with the next large one.
pub(crate) struct Outgoing<'a> {
    stream: &'a TcpStream,
    small: Vec<u8>,
    /// Bytes of `small` that have left.
    sent: usize,
    staging: Vec<u8>,
}

impl<'a> Outgoing<'a> {
    pub fn new(stream: &'a TcpStream) -> Self {
        Self { stream, small: Vec::new(), sent: 0, staging: Vec::new() }
    }

    /// Queues a few bytes; [`Self::flush`] sends them at the latest.
    pub fn push(&mut self, bytes: &[u8]) {
        self.small.extend_from_slice(bytes);
    }

    fn with(mut self, bytes: &[u8]) -> Self {
        self.push(bytes);
        self
    }

    pub async fn flush(&mut self) -> io::Result<()> {
        while !self.small.is_empty() {
            match self.try_send(&[]) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.stream.writable().await?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Sends what was kept back; never completes unless that fails. For waits for something else.
    pub async fn flush_then_pend(&mut self) -> io::Result<std::convert::Infallible> {
        self.flush().await?;
        std::future::pending().await
    }

    /// One call to the system: what was kept back, then `chunk`. Returns the bytes of `chunk` that left.
    fn try_send(&mut self, chunk: &[u8]) -> io::Result<usize> {
        if self.small.is_empty() {
            return self.stream.try_write(chunk);
        }
        let parts = [IoSlice::new(&self.small[self.sent..]), IoSlice::new(chunk)];
        let n = self.stream.try_write_vectored(&parts)?;
        let kept_back = self.small.len() - self.sent;
        if n < kept_back {
            self.sent += n;
            return Ok(0);
        }
        self.small.clear();
        self.sent = 0;
        Ok(n - kept_back)
    }

    /// Sends `header`, the blocks `ids` of `layer`, and the checksum of both (which may be kept back). When it returns,
    /// the blocks are not read any more.
    pub async fn frame(
        &mut self,
        header: &[u8],
        store: &dyn KvStore,
        layer: usize,
        ids: &[BlockId],
    ) -> Result<(), MoveError> {
        let mut crc = crc32fast::Hasher::new();
        crc.update(header);
        self.push(header);
        if store.block_bytes() < DIRECT_BYTES {
            self.frame_staged(store, layer, ids, &mut crc).await?;
        } else {
            self.frame_direct(store, layer, ids, &mut crc).await?;
        }
        self.push(&crc.finalize().to_le_bytes());
        Ok(())
    }

    async fn frame_staged(
        &mut self,
        store: &dyn KvStore,
        layer: usize,
        ids: &[BlockId],
        crc: &mut crc32fast::Hasher,
    ) -> Result<(), MoveError> {
        let mut staging = std::mem::take(&mut self.staging);
        staging.clear();
        store.read(layer, ids, &mut |_, bytes| staging.extend_from_slice(bytes))?;
        crc.update(&staging);
        let mut at = 0;
        while at < staging.len() {
            match self.try_send(&staging[at..]) {
                Ok(n) => at += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.stream.writable().await?,
                Err(e) => return Err(e.into()),
            }
        }
        self.staging = staging;
        Ok(())
    }

    async fn frame_direct(
        &mut self,
        store: &dyn KvStore,
        layer: usize,
        ids: &[BlockId],
        crc: &mut crc32fast::Hasher,
    ) -> Result<(), MoveError> {
        let mut p = Progress::default();
        while p.blocks < ids.len() {
            let mut stopped: Option<io::Error> = None;
            store.read(layer, &ids[p.blocks..], &mut |_, bytes| {
                while stopped.is_none() && p.at < bytes.len() {
                    let end = bytes.len().min(p.at + CHUNK_BYTES);
                    if p.hashed < end {
                        crc.update(&bytes[p.hashed..end]);
                        p.hashed = end;
                    }
                    match self.try_send(&bytes[p.at..end]) {
                        Ok(n) => p.at += n,
                        Err(e) => stopped = Some(e),
                    }
                }
                if stopped.is_none() {
                    p.next_block();
                }
            })?;
            match stopped {
                Some(e) if e.kind() != ErrorKind::WouldBlock => return Err(e.into()),
                Some(_) => self.stream.writable().await?,
                None => {}
            }
        }
        Ok(())
    }
}

/// The reading half of one frame's payload and checksum.
pub(crate) struct Incoming<'a> {
    stream: &'a TcpStream,
    staging: Vec<u8>,
}

impl<'a> Incoming<'a> {
    pub fn new(stream: &'a TcpStream) -> Self {
        Self { stream, staging: Vec::new() }
    }

    /// Reads the blocks `ids` of `layer` and the checksum over `header` and them; returns whether it is right.
    pub async fn frame(
        &mut self,
        header: &[u8],
        store: &dyn KvStore,
        layer: usize,
        ids: &[BlockId],
    ) -> Result<bool, MoveError> {
        let mut crc = crc32fast::Hasher::new();
        crc.update(header);
        let staged = store.block_bytes() < DIRECT_BYTES;
        if staged {
            self.staging.resize(ids.len() * store.block_bytes(), 0);
            read_full(self.stream, &mut self.staging).await?;
            crc.update(&self.staging);
        } else {
            self.frame_direct(store, layer, ids, &mut crc).await?;
        }
        let mut sent = [0; CRC_BYTES];
        read_full(self.stream, &mut sent).await?;
        let right = crc.finalize().to_le_bytes() == sent;
        if staged && right {
            let blocks = self.staging.chunks_exact(store.block_bytes());
            let mut blocks = blocks.into_iter();
            store.write(layer, ids, &mut |_, bytes| {
                if let Some(block) = blocks.next() {
                    bytes.copy_from_slice(block);
                }
            })?;
        }
        Ok(right)
    }

    async fn frame_direct(
        &mut self,
        store: &dyn KvStore,
        layer: usize,
        ids: &[BlockId],
        crc: &mut crc32fast::Hasher,
    ) -> Result<(), MoveError> {
        let mut p = Progress::default();
        while p.blocks < ids.len() {
            let mut stopped: Option<io::Error> = None;
            store.write(layer, &ids[p.blocks..], &mut |_, bytes| {
                while stopped.is_none() && p.at < bytes.len() {
                    let end = bytes.len().min(p.at + CHUNK_BYTES);
                    match self.stream.try_read(&mut bytes[p.at..end]) {
                        Ok(0) => stopped = Some(ErrorKind::UnexpectedEof.into()),
                        Ok(n) => {
                            crc.update(&bytes[p.at..p.at + n]);
                            p.at += n;
                        }
                        Err(e) => stopped = Some(e),
                    }
                }
                if stopped.is_none() {
                    p.next_block();
                }
            })?;
            match stopped {
                Some(e) if e.kind() != ErrorKind::WouldBlock => return Err(e.into()),
                Some(_) => self.stream.readable().await?,
                None => {}
            }
        }
        Ok(())
    }
}
