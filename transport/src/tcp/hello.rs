//! How a handoff begins: hello and answer, from version 2 on. Version 1 is in [`frame`](super::frame). All numbers are
//! little-endian.
//!
//! ```text
//! hello    "OFKV" newest:u16 oldest:u16 length:u32                        length of what follows
//!          ticket:[16] digest:[32] held_blocks:u32 prompt_tokens:u32
//!          sums:u8 transports:u8 rank:u16 ranks:u16 0:u16 address sender:[16]    later versions may add fields here
//!          sum:u64
//! accepted answer of kind 4, then
//!          length:u32 version:u16 sums:u8 transport:u8 [address places | communicator:[128]] sum:u64
//! address  qp:u32 psn:u32 gid:[16] lid:u16 mtu:u8 present:u8
//! places   slots:u16 0:u16 slot_bytes:u32 layers:u32 blocks:u32 layers*(address:u64 key:u32) blocks*(id:u32)
//! ```
//!
//! `sender` identifies the sender to NCCL, and is 0 without it. A grant has address and places for RDMA, NCCL's id of the
//! communicator for NCCL, and nothing for TCP. In a hello of version 1, `oldest` is 0. `sums` and `transports` are sets in a hello; the answer names one of each.
//! `rank` of `ranks` counts the writers that fill one attempt together; receivers take one so far.

use overfill_kv::handoff::Hello;
use overfill_kv::{KvTransport, PROTOCOL, ProtocolVersions, Ticket, TransportSet};

use super::format::{Sums, sealed};
use super::frame::{ACCEPTED, ANSWER_BYTES, HELLO_BYTES, MAGIC, SUM_BYTES, decode_hello, is_sealed, seal};
use crate::nccl::{CommunicatorId, ID_BYTES, SenderId};
use crate::rdma::{Grant as RdmaGrant, Place, Places, RdmaAddress};

/// Bytes after which the length of a hello is known.
pub const START_BYTES: usize = 12;
/// Size of a hello of version 2 in bytes.
pub const HELLO_2_BYTES: usize = START_BYTES + FIELDS_BYTES + SUM_BYTES;
const FIELDS_BYTES: usize = 16 + 32 + 4 + 4 + 8 + ADDRESS_BYTES + SENDER_BYTES;
const ADDRESS_BYTES: usize = 28;
const SENDER_BYTES: usize = 16;
/// Maximum length of the rest of a hello, in bytes. It leaves room for later versions.
const MAX_REST_BYTES: usize = 1024;

/// What a sender presents and offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Versions of the wire format that the sender speaks.
    pub versions: ProtocolVersions,
    /// Ticket and expectations.
    pub hello: Hello,
    /// Bits of the [`Sums`] that the sender can compute.
    pub sums: u8,
    /// Transports that the sender can use.
    pub transports: TransportSet,
    /// Number of this writer, from 0, and of all writers of the attempt.
    pub rank: (u16, u16),
    /// Queue pair of the sender, if it can use RDMA.
    pub rdma: Option<RdmaAddress>,
    /// The sender's name for NCCL at this receiver, if it can use NCCL.
    pub nccl: Option<SenderId>,
}

impl Offer {
    /// The offer of a sender of this program that fills the attempt alone.
    pub fn new(hello: Hello, transports: TransportSet, rdma: Option<RdmaAddress>, nccl: Option<SenderId>) -> Self {
        Self { versions: PROTOCOL, hello, sums: Sums::PerBlock as u8, transports, rank: (0, 1), rdma, nccl }
    }

    fn version_1(hello: Hello) -> Self {
        let transports = TransportSet::of(&[KvTransport::Tcp]);
        let versions = ProtocolVersions::UNSTATED;
        Self { versions, hello, sums: Sums::Chain as u8, transports, rank: (0, 1), rdma: None, nccl: None }
    }
}

/// The first bytes of a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A hello of version 1, of which this many bytes follow.
    First(usize),
    /// A hello of a sender that speaks these versions, of which this many bytes follow.
    Later(ProtocolVersions, usize),
}

/// Decodes the first bytes of a hello. `None` if they are not that, or if the length is impossible.
pub fn decode_start(bytes: &[u8; START_BYTES]) -> Option<Start> {
    let [m0, m1, m2, m3, n0, n1, o0, o1, l0, l1, l2, l3] = *bytes;
    if [m0, m1, m2, m3] != *MAGIC {
        return None;
    }
    let [newest, oldest] = [[n0, n1], [o0, o1]].map(|half| u32::from(u16::from_le_bytes(half)));
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    match oldest {
        0 => (newest == 1).then_some(Start::First(HELLO_BYTES - START_BYTES)),
        _ => {
            let possible = oldest <= newest && (SUM_BYTES..=MAX_REST_BYTES).contains(&length);
            possible.then_some(Start::Later(ProtocolVersions { oldest, newest }, length))
        }
    }
}

/// Encodes a hello of version 2.
pub fn encode(offer: &Offer) -> Vec<u8> {
    let Offer { versions, hello, sums, transports, rank, rdma, nccl } = offer;
    let mut out = MAGIC.to_vec();
    out.extend((versions.newest as u16).to_le_bytes());
    out.extend((versions.oldest as u16).to_le_bytes());
    out.extend(((FIELDS_BYTES + SUM_BYTES) as u32).to_le_bytes());
    out.extend(hello.ticket.0);
    out.extend(hello.schema_digest);
    out.extend(hello.held_blocks.to_le_bytes());
    out.extend(hello.prompt_tokens.to_le_bytes());
    out.extend([*sums, transports.0]);
    for number in [rank.0, rank.1, 0] {
        out.extend(number.to_le_bytes());
    }
    put_address(&mut out, rdma.as_ref());
    out.extend(nccl.map_or([0; SENDER_BYTES], |sender| sender.0));
    sealed(out)
}

/// Decodes a hello from its first bytes and the rest. `None` if the checksum is wrong or a field is missing.
pub fn decode(start: &[u8; START_BYTES], rest: &[u8]) -> Option<Offer> {
    let bytes = [start.as_slice(), rest].concat();
    match decode_start(start)? {
        Start::First(_) => decode_hello(bytes.as_slice().try_into().ok()?).map(Offer::version_1),
        Start::Later(versions, length) => {
            if rest.len() != length || !is_sealed(&bytes) {
                return None;
            }
            let mut fields = Fields(&rest[..length - SUM_BYTES]);
            let hello = Hello {
                ticket: Ticket(fields.take()?),
                schema_digest: fields.take()?,
                held_blocks: u32::from_le_bytes(fields.take()?),
                prompt_tokens: u32::from_le_bytes(fields.take()?),
            };
            let [sums, transports] = fields.take()?;
            let [rank, ranks, _] = [fields.u16()?, fields.u16()?, fields.u16()?];
            let rdma = fields.address()?;
            let nccl = Some(SenderId(fields.take()?)).filter(|sender| sender.0 != [0; SENDER_BYTES]);
            let transports = TransportSet(transports);
            Some(Offer { versions, hello, sums, transports, rank: (rank, ranks), rdma, nccl })
        }
    }
}

/// What a receiver has chosen, and where the sender may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Version of the wire format.
    pub version: u32,
    /// Transport of the KV, and what the sender needs to use it.
    pub way: Way,
}

/// How KV moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// In frames.
    Tcp,
    /// To this queue pair and memory of the receiver.
    Rdma(RdmaGrant),
    /// Over this communicator.
    Nccl(CommunicatorId),
}

impl Way {
    /// The transport.
    pub fn transport(&self) -> KvTransport {
        match self {
            Self::Tcp => KvTransport::Tcp,
            Self::Rdma(_) => KvTransport::Rdma,
            Self::Nccl(_) => KvTransport::Nccl,
        }
    }
}

/// Maximum size of a grant in bytes, after its length.
pub fn max_grant_bytes(layers: usize, blocks: usize) -> usize {
    4 + (ADDRESS_BYTES + 16 + layers * 12 + blocks * 4).max(ID_BYTES) + SUM_BYTES
}

/// Encodes an answer that accepts, with a grant.
pub fn encode_accepted(grant: &Grant) -> Vec<u8> {
    let Grant { version, way } = grant;
    let mut body = (*version as u16).to_le_bytes().to_vec();
    body.extend([Sums::PerBlock as u8, way.transport() as u8]);
    match way {
        Way::Tcp => {}
        Way::Rdma(RdmaGrant { address, places }) => {
            put_address(&mut body, Some(address));
            put_places(&mut body, places);
        }
        Way::Nccl(id) => body.extend(id.0),
    }
    let body = sealed(body);
    let mut out = seal::<ANSWER_BYTES>([ACCEPTED, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).to_vec();
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(body);
    out
}

fn put_places(out: &mut Vec<u8>, places: &Places) {
    let (slots, slot_bytes) = places.staging.unwrap_or((0, 0));
    out.extend(slots.to_le_bytes());
    out.extend([0; 2]);
    out.extend(slot_bytes.to_le_bytes());
    out.extend((places.layers.len() as u32).to_le_bytes());
    out.extend((places.blocks.len() as u32).to_le_bytes());
    for Place { address, key } in &places.layers {
        out.extend(address.to_le_bytes());
        out.extend(key.to_le_bytes());
    }
    places.blocks.iter().for_each(|id| out.extend(id.to_le_bytes()));
}

/// Decodes a grant, without its length. `None` if the checksum is wrong or it is not a grant that this program can use.
pub fn decode_grant(bytes: &[u8]) -> Option<Grant> {
    if bytes.len() <= SUM_BYTES || !is_sealed(bytes) {
        return None;
    }
    let mut fields = Fields(&bytes[..bytes.len() - SUM_BYTES]);
    let version = u32::from(fields.u16()?);
    let [sums, transport] = fields.take()?;
    if sums != Sums::PerBlock as u8 {
        return None;
    }
    let way = match KvTransport::ALL.into_iter().find(|t| *t as u8 == transport)? {
        KvTransport::Tcp => Way::Tcp,
        KvTransport::Nccl => Way::Nccl(CommunicatorId(fields.take()?)),
        KvTransport::Rdma => Way::Rdma(fields.rdma_grant()?),
    };
    Some(Grant { version, way })
}

fn put_address(out: &mut Vec<u8>, address: Option<&RdmaAddress>) {
    let present = u8::from(address.is_some());
    let RdmaAddress { qp, psn, gid, lid, mtu } = address.copied().unwrap_or_default();
    out.extend(qp.to_le_bytes());
    out.extend(psn.to_le_bytes());
    out.extend(gid);
    out.extend(lid.to_le_bytes());
    out.extend([mtu, present]);
}

/// Reads fields from the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn address(&mut self) -> Option<Option<RdmaAddress>> {
        let (qp, psn, gid) = (self.u32()?, self.u32()?, self.take()?);
        let lid = self.u16()?;
        let [mtu, present] = self.take()?;
        Some((present == 1).then_some(RdmaAddress { qp, psn, gid, lid, mtu }))
    }

    fn rdma_grant(&mut self) -> Option<RdmaGrant> {
        let address = self.address()??;
        let [slots, _] = [self.u16()?, self.u16()?];
        let [slot_bytes, layers, blocks] = [self.u32()?, self.u32()?, self.u32()?];
        // Checked before memory is allocated.
        if self.0.len() as u64 != u64::from(layers) * 12 + u64::from(blocks) * 4 {
            return None;
        }
        let mut place = || Some(Place { address: u64::from_le_bytes(self.take()?), key: self.u32()? });
        let layers = (0..layers).map(|_| place()).collect::<Option<_>>()?;
        let blocks = (0..blocks).map(|_| self.u32()).collect::<Option<_>>()?;
        let staging = (slots > 0).then_some((slots, slot_bytes));
        Some(RdmaGrant { address, places: Places { staging, layers, blocks } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::frame::encode_hello;

    const ADDRESS: RdmaAddress = RdmaAddress { qp: 17, psn: 0xabcdef, gid: [7; 16], lid: 3, mtu: 5 };

    fn hello() -> Hello {
        Hello { ticket: Ticket([3; 16]), schema_digest: [9; 32], held_blocks: 5, prompt_tokens: 1234 }
    }

    fn offer() -> Offer {
        let transports = TransportSet::of(&[KvTransport::Tcp, KvTransport::Rdma, KvTransport::Nccl]);
        Offer::new(hello(), transports, Some(ADDRESS), Some(SenderId([4; 16])))
    }

    fn decode_all(bytes: &[u8]) -> Option<Offer> {
        let (start, rest) = bytes.split_first_chunk()?;
        decode(start, rest)
    }

    #[test]
    fn hellos_of_both_versions_are_decoded() {
        let bytes = encode(&offer());
        assert_eq!(bytes.len(), HELLO_2_BYTES);
        assert_eq!(decode_all(&bytes), Some(offer()));
        let without = Offer { rdma: None, nccl: None, ..offer() };
        assert_eq!(decode_all(&encode(&without)), Some(without));
        let first = decode_all(&encode_hello(&hello())).unwrap();
        assert_eq!((first.versions, first.hello), (ProtocolVersions::UNSTATED, hello()));
        assert_eq!(first.transports.to_string(), "tcp");
    }

    #[test]
    fn a_later_version_may_say_more() {
        let later = Offer { versions: ProtocolVersions { oldest: 2, newest: 9 }, ..offer() };
        let mut bytes = encode(&later);
        bytes.truncate(HELLO_2_BYTES - SUM_BYTES);
        bytes.extend([1, 2, 3]);
        bytes[8] += 3;
        assert_eq!(decode_all(&sealed(bytes)), Some(later));
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let bytes = encode(&offer());
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_all(&bad), None, "bit {bit}");
        }
        let grant = encode_accepted(&direct());
        let body = &grant[ANSWER_BYTES + 4..];
        for bit in 0..body.len() * 8 {
            let mut bad = body.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_grant(&bad), None, "bit {bit}");
        }
    }

    fn direct() -> Grant {
        let layers = vec![Place { address: 1 << 40, key: 7 }, Place { address: 1 << 41, key: 8 }];
        let places = Places { staging: None, layers, blocks: vec![4, 5, 9] };
        Grant { version: 2, way: Way::Rdma(RdmaGrant { address: ADDRESS, places }) }
    }

    #[test]
    fn grants_are_decoded() {
        let staging =
            Places { staging: Some((2, 1 << 20)), layers: vec![Place { address: 5, key: 6 }], blocks: vec![] };
        let staged = Grant { way: Way::Rdma(RdmaGrant { address: ADDRESS, places: staging }), ..direct() };
        let tcp = Grant { version: 2, way: Way::Tcp };
        let nccl = Grant { version: 2, way: Way::Nccl(CommunicatorId([8; ID_BYTES])) };
        for grant in [direct(), staged, tcp, nccl] {
            let bytes = encode_accepted(&grant);
            let body = &bytes[ANSWER_BYTES + 4..];
            assert_eq!(bytes[ANSWER_BYTES..ANSWER_BYTES + 4], (body.len() as u32).to_le_bytes());
            assert!(body.len() <= max_grant_bytes(2, 3));
            assert_eq!(decode_grant(body), Some(grant));
        }
        // Counts that do not match the length.
        let mut body = encode_accepted(&direct())[ANSWER_BYTES + 4..].to_vec();
        body.truncate(body.len() - SUM_BYTES);
        body[4 + ADDRESS_BYTES + 8] = 200;
        assert_eq!(decode_grant(&sealed(body)), None);
    }

    #[test]
    fn impossible_starts_are_none() {
        let start = |newest: u16, oldest: u16, length: u32| {
            let mut bytes = [0; START_BYTES];
            bytes[..4].copy_from_slice(MAGIC);
            bytes[4..6].copy_from_slice(&newest.to_le_bytes());
            bytes[6..8].copy_from_slice(&oldest.to_le_bytes());
            bytes[8..].copy_from_slice(&length.to_le_bytes());
            decode_start(&bytes)
        };
        assert_eq!(start(1, 0, 77), Some(Start::First(60)));
        assert_eq!(start(4, 3, 100), Some(Start::Later(ProtocolVersions { oldest: 3, newest: 4 }, 100)));
        for (newest, oldest, length) in [(2, 0, 100), (2, 3, 100), (2, 2, 1025), (2, 2, 7)] {
            assert_eq!(start(newest, oldest, length), None);
        }
    }
}
