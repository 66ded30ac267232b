//! Reads what a receiver answers.

use std::io::{self, ErrorKind};

use super::frame::{self, ANSWER_BYTES, Answer, SUM_BYTES};
use super::hello::{self, Grant};
use super::link::Link;

/// Message from the receiver.
pub(super) enum Reply {
    /// Any answer but [`Answer::Accepted`].
    Answer(Answer),
    /// The ticket is accepted.
    Grant(Grant),
}

/// Reads answers, keeping a partly received one across calls.
pub(super) struct AnswerReader {
    bytes: Vec<u8>,
    have: usize,
    part: Part,
    max_grant_bytes: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Answer,
    GrantLength,
    Grant,
}

impl AnswerReader {
    /// A grant with more than `max_grant_bytes` is refused before memory is allocated for it.
    pub fn new(max_grant_bytes: usize) -> Self {
        Self { bytes: vec![0; ANSWER_BYTES], have: 0, part: Part::Answer, max_grant_bytes }
    }

    /// Whether no answer is partly received.
    pub fn is_between(&self) -> bool {
        self.have == 0 && self.part == Part::Answer
    }

    /// Reads the next answer. Cancel safe: dropping the future loses no bytes.
    pub async fn next(&mut self, stream: &Link) -> io::Result<Reply> {
        loop {
            match stream.try_read(&mut self.bytes[self.have..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.have += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => stream.readable().await?,
                Err(e) => return Err(e),
            }
            if self.have == self.bytes.len()
                && let Some(reply) = self.take()?
            {
                return Ok(reply);
            }
        }
    }

    /// Decodes the complete part and prepares for the next one.
    fn take(&mut self) -> io::Result<Option<Reply>> {
        let bytes = std::mem::take(&mut self.bytes);
        self.have = 0;
        let (reply, part, length) = match self.part {
            Part::Answer => {
                let bytes = bytes.try_into().map_err(|_| ErrorKind::InvalidData)?;
                match frame::decode_answer(&bytes).ok_or(ErrorKind::InvalidData)? {
                    Answer::Accepted => (None, Part::GrantLength, 4),
                    answer => (Some(Reply::Answer(answer)), Part::Answer, ANSWER_BYTES),
                }
            }
            Part::GrantLength => {
                let length = u32::from_le_bytes(bytes.try_into().map_err(|_| ErrorKind::InvalidData)?) as usize;
                if !(SUM_BYTES + 1..=self.max_grant_bytes).contains(&length) {
                    return Err(ErrorKind::InvalidData.into());
                }
                (None, Part::Grant, length)
            }
            Part::Grant => {
                let grant = hello::decode_grant(&bytes).ok_or(ErrorKind::InvalidData)?;
                (Some(Reply::Grant(grant)), Part::Answer, ANSWER_BYTES)
            }
        };
        self.part = part;
        self.bytes = vec![0; length];
        Ok(reply)
    }
}
