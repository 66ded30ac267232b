//! Moves payloads between a link and KV memory, with checksums. Over a plain socket, KV in host memory is not copied in
//! this process.
//!
//! KV memory may be locked while it is read or written, so the closures passed to the store do not wait. They move the
//! bytes that the socket accepts or has at that moment. Waiting for the socket happens outside.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};

use super::format::Sums;
use super::frame::{SUM_BYTES, next_sum};
use super::link::Link;
use crate::nccl::NcclError;
use crate::rdma::RdmaError;
use overfill_kv::{BlockId, KvMemory, KvStore, StoreError};

/// Maximum bytes per system call. Large enough for few calls, small enough that checksummed bytes are still in cache
/// when they are sent.
pub(crate) const CHUNK_BYTES: usize = 512 * 1024;

/// Why a payload could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MoveError {
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Rdma(RdmaError),
    #[error(transparent)]
    Nccl(#[from] NcclError),
}

impl From<RdmaError> for MoveError {
    fn from(error: RdmaError) -> Self {
        match error {
            RdmaError::Store(error) => Self::Store(error),
            other => Self::Rdma(other),
        }
    }
}

/// Reads from the socket until `buf` is full.
pub(crate) async fn read_full(stream: &Link, buf: &mut [u8]) -> io::Result<()> {
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
pub(crate) async fn write_full(stream: &Link, buf: &[u8]) -> io::Result<()> {
    Outgoing::new(stream, Sums::Chain).with(buf).flush().await
}

/// The writing half of a connection. Small parts are buffered and sent together with the next payload.
pub(crate) struct Outgoing<'a> {
    stream: &'a Link,
    small: Vec<u8>,
    /// Bytes of `small` already sent.
    sent: usize,
    staging: Vec<u8>,
    sums: Sums,
}

impl<'a> Outgoing<'a> {
    /// `sums`: how frames are summed.
    pub fn new(stream: &'a Link, sums: Sums) -> Self {
        Self { stream, small: Vec::new(), sent: 0, staging: Vec::new(), sums }
    }

    /// Buffers a few bytes. The next frame or [`Self::flush`] sends them.
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
        self.stream.flushed().await
    }

    /// Sends the buffered bytes, then never completes. Returns only on an error. For use in a `select!`.
    pub async fn flush_then_pend(&mut self) -> io::Result<std::convert::Infallible> {
        self.flush().await?;
        std::future::pending().await
    }

    /// Sends the buffered bytes and `chunk` with one system call. Returns how many bytes of `chunk` were sent.
    fn try_send(&mut self, chunk: &[&[u8]]) -> io::Result<usize> {
        let kept_back = self.small.len() - self.sent;
        let mut parts = Vec::with_capacity(chunk.len() + 1);
        if kept_back > 0 {
            parts.push(IoSlice::new(&self.small[self.sent..]));
        }
        parts.extend(chunk.iter().map(|part| IoSlice::new(part)));
        let n = self.stream.try_write_vectored(&parts)?;
        if n < kept_back {
            self.sent += n;
            return Ok(0);
        }
        self.small.clear();
        self.sent = 0;
        Ok(n - kept_back)
    }

    /// Sends `header`, the blocks `ids` of `layer`, and the checksum of both. The blocks are not read any more after
    /// this returns.
    pub async fn frame(
        &mut self,
        header: &[u8],
        store: &dyn KvStore,
        layer: usize,
        ids: &[BlockId],
    ) -> Result<(), MoveError> {
        self.push(header);
        let size = store.block_bytes();
        let total = ids.len() * size + SUM_BYTES;
        let mut p = FrameProgress::after(header, self.sums);
        if store.memory() == KvMemory::Host {
            while p.at < total {
                let mut blocked = Ok(());
                store.view(layer, ids, &mut |blocks| blocked = self.send_now(blocks, &mut p))?;
                self.wait_writable(blocked).await?;
            }
        } else {
            let mut staging = std::mem::take(&mut self.staging);
            staging.clear();
            store.read(layer, ids, &mut |_, bytes| staging.extend_from_slice(bytes))?;
            let blocks: Vec<&[u8]> = staging.chunks_exact(size).collect();
            while p.at < total {
                let blocked = self.send_now(&blocks, &mut p);
                self.wait_writable(blocked).await?;
            }
            self.staging = staging;
        }
        Ok(())
    }

    /// Sends blocks and checksum from position `p` on until everything is sent or the socket would block. The checksum
    /// goes with the last blocks: a receiver that had to wait for it would sleep once per frame.
    fn send_now(&mut self, blocks: &[&[u8]], p: &mut FrameProgress) -> io::Result<()> {
        let size = blocks.first().map_or(1, |b| b.len().max(1));
        let length = size * blocks.len();
        while p.at < length + SUM_BYTES {
            let end = (length + SUM_BYTES).min(p.at + CHUNK_BYTES);
            while p.summed * size < end.min(length) {
                p.sum_block(blocks[p.summed]);
            }
            // Complete if any byte of it is in this chunk.
            let sum = p.sum.to_le_bytes();
            let mut chunk: Vec<&[u8]> = window(blocks, p.at.min(length), end.min(length)).collect();
            chunk.push(&sum[p.at.saturating_sub(length)..end.saturating_sub(length)]);
            p.at += self.try_send(&chunk)?;
        }
        Ok(())
    }

    async fn wait_writable(&self, result: io::Result<()>) -> io::Result<()> {
        match result {
            Err(e) if e.kind() == ErrorKind::WouldBlock => self.stream.writable().await,
            other => other,
        }
    }
}

/// Progress of a payload and its checksum, kept across waits.
struct FrameProgress {
    /// Bytes sent or received.
    at: usize,
    /// Blocks included in the checksum.
    summed: usize,
    sum: u64,
    sums: Sums,
}

impl FrameProgress {
    fn after(header: &[u8], sums: Sums) -> Self {
        Self { at: 0, summed: 0, sum: next_sum(0, header), sums }
    }

    fn sum_block(&mut self, block: &[u8]) {
        self.sum = self.sums.next(self.sum, block);
        self.summed += 1;
    }
}

/// Slices of `blocks` that cover bytes `from..to` of their concatenation. All blocks have the same length.
fn window<'b>(blocks: &[&'b [u8]], from: usize, to: usize) -> impl Iterator<Item = &'b [u8]> {
    let size = blocks.first().map_or(1, |b| b.len().max(1));
    let first = (from / size).min(blocks.len());
    let last = to.div_ceil(size).clamp(first, blocks.len());
    blocks[first..last].iter().enumerate().map(move |(i, block)| {
        let start = (first + i) * size;
        &block[from.saturating_sub(start)..(to - start).min(size)]
    })
}

/// Reads the payloads and checksums of layer frames.
pub(crate) struct Incoming<'a> {
    stream: &'a Link,
    staging: Vec<u8>,
    sums: Sums,
}

impl<'a> Incoming<'a> {
    /// `sums`: how frames are summed.
    pub fn new(stream: &'a Link, sums: Sums) -> Self {
        Self { stream, staging: Vec::new(), sums }
    }

    /// Reads the blocks `ids` of `layer` into `store`, then the checksum over `header` and blocks. Returns whether the
    /// checksum is right.
    pub async fn frame(
        &mut self,
        header: &[u8],
        store: &dyn KvStore,
        layer: usize,
        ids: &[BlockId],
    ) -> Result<bool, MoveError> {
        let size = store.block_bytes();
        let length = ids.len() * size;
        let mut p = FrameProgress::after(header, self.sums);
        let mut sent = [0; SUM_BYTES];
        let direct = store.memory() == KvMemory::Host;
        if direct {
            while p.at < length + SUM_BYTES {
                let mut blocked = Ok(());
                store.edit(layer, ids, &mut |blocks| blocked = receive_now(self.stream, blocks, &mut sent, &mut p))?;
                match blocked {
                    Err(e) if e.kind() == ErrorKind::WouldBlock => self.stream.readable().await?,
                    other => other?,
                }
            }
        } else {
            self.staging.resize(length, 0);
            read_full(self.stream, &mut self.staging).await?;
            self.staging.chunks_exact(size).for_each(|block| p.sum_block(block));
            read_full(self.stream, &mut sent).await?;
        }
        let right = p.sum.to_le_bytes() == sent;
        if right && !direct {
            store.write(layer, ids, &mut |i, bytes| bytes.copy_from_slice(&self.staging[i * size..][..size]))?;
        }
        Ok(right)
    }
}

/// Reads into `blocks`, and then the checksum, from position `p` on until they are full or the socket would block.
fn receive_now(
    stream: &Link,
    blocks: &mut [&mut [u8]],
    sum: &mut [u8; SUM_BYTES],
    p: &mut FrameProgress,
) -> io::Result<()> {
    let size = blocks.first().map_or(1, |b| b.len().max(1));
    let length = size * blocks.len();
    while p.at < length + SUM_BYTES {
        let end = (length + SUM_BYTES).min(p.at + CHUNK_BYTES);
        let (first, skip) = (p.at.min(length) / size, p.at % size);
        let last = end.min(length).div_ceil(size);
        let mut parts: Vec<IoSliceMut<'_>> = Vec::with_capacity(last - first + 1);
        for (i, block) in blocks[first..last].iter_mut().enumerate() {
            let from = if i == 0 { skip } else { 0 };
            let to = (end - (first + i) * size).min(size);
            parts.push(IoSliceMut::new(&mut block[from..to]));
        }
        parts.push(IoSliceMut::new(&mut sum[p.at.saturating_sub(length)..end.saturating_sub(length)]));
        match stream.try_read_vectored(&mut parts)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => p.at += n,
        }
        while (p.summed + 1) * size <= p.at.min(length) {
            p.sum_block(blocks[p.summed]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_cuts_across_blocks() {
        let blocks: [&[u8]; 3] = [b"abcd", b"efgh", b"ijkl"];
        let cut = |from, to| window(&blocks, from, to).map(|p| p.to_vec()).collect::<Vec<_>>().concat();
        let all = b"abcdefghijkl";
        for from in 0..=all.len() {
            for to in from..=all.len() {
                assert_eq!(cut(from, to), all[from..to], "{from}..{to}");
            }
        }
    }
}
