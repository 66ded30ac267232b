//! What differs between the versions of the wire format, once a hello is answered.

use overfill_kv::{BlockId, KvMemory, KvStore, StoreError, handoff::Commit};

use super::frame::{
    self, COMMIT_BYTES, HEADER_BYTES, Header, SUM_BYTES, checksum, decode_header, encode_header, is_sealed, next_sum,
};

/// Size of a frame header of version 2, in bytes.
pub const HEADER_2_BYTES: usize = HEADER_BYTES + 8;

/// How the checksum of a layer frame covers its blocks. Encoded as one bit in a hello and in its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Sums {
    /// Each block is hashed with the sum so far as the seed. Blocks must be hashed one after the other.
    Chain = 1,
    /// Each block is hashed alone, and the sum so far is the seed of a hash over that. So blocks can be hashed at the same
    /// time, also where they lie.
    PerBlock = 2,
}

impl Sums {
    /// The sum of the frame that ends with `block`, where `sum` is that of everything before it.
    pub fn next(self, sum: u64, block: &[u8]) -> u64 {
        match self {
            Self::Chain => next_sum(sum, block),
            Self::PerBlock => next_sum(sum, &checksum(block)),
        }
    }

    /// Like [`Self::next`] for blocks of a store, in order. A device sums its own blocks, if each is hashed alone.
    pub fn of_store(
        self,
        store: &dyn KvStore,
        layer: usize,
        blocks: &[BlockId],
        mut sum: u64,
    ) -> Result<u64, StoreError> {
        if (self, store.memory()) == (Self::PerBlock, KvMemory::Device) {
            let sums = store.block_sums(layer, blocks)?;
            return Ok(sums.iter().fold(sum, |sum, block| next_sum(sum, &block.to_le_bytes())));
        }
        // Another device may have written the blocks, so they are read from memory.
        store.read(layer, blocks, &mut |_, block| sum = self.next(sum, std::hint::black_box(block)))?;
        Ok(sum)
    }
}

/// Format of the frames of one handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    version: u32,
    kv_heads: u16,
}

impl Format {
    /// The format of `version` for KV with `kv_heads` heads.
    pub fn new(version: u32, kv_heads: u32) -> Self {
        // More heads than 65535 are impossible: a schema has at most 4096.
        Self { version, kv_heads: kv_heads.min(u32::from(u16::MAX)) as u16 }
    }

    /// Version of the wire format.
    pub fn version(self) -> u32 {
        self.version
    }

    /// Size of a frame header in bytes.
    pub fn header_bytes(self) -> usize {
        if self.version == 1 { HEADER_BYTES } else { HEADER_2_BYTES }
    }

    /// How layer frames are summed.
    pub fn sums(self) -> Sums {
        if self.version == 1 { Sums::Chain } else { Sums::PerBlock }
    }

    /// Encodes a frame header.
    pub fn encode(self, header: &Header) -> Vec<u8> {
        let mut bytes = encode_header(header).to_vec();
        if self.version > 1 {
            let (heads, number) = match *header {
                Header::Layer(..) => (self.kv_heads, 0),
                Header::Written(_, number) => (self.kv_heads, number),
                Header::Ping | Header::Commit { .. } => (0, 0),
            };
            bytes.extend(0_u16.to_le_bytes());
            bytes.extend(heads.to_le_bytes());
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    /// Decodes a frame header of [`Self::header_bytes`] bytes. `None` if it is not one, or if its range of heads is not
    /// all heads, which no receiver supports yet.
    pub fn decode(self, bytes: &[u8]) -> Option<Header> {
        let (common, more) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let header = decode_header(common)?;
        if self.version == 1 {
            return (more.is_empty() && !matches!(header, Header::Written(..))).then_some(header);
        }
        let more: [u8; 8] = more.try_into().ok()?;
        let [a, b, c, d, number @ ..] = more;
        let (range, number) = ((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])), u32::from_le_bytes(number));
        match header {
            Header::Layer(..) if range == (0, self.kv_heads) && number == 0 => Some(header),
            Header::Written(piece, _) if range == (0, self.kv_heads) => Some(Header::Written(piece, number)),
            Header::Ping | Header::Commit { .. } if more == [0; 8] => Some(header),
            _ => None,
        }
    }

    /// Encodes a ping frame.
    pub fn ping(self) -> Vec<u8> {
        sealed(self.encode(&Header::Ping))
    }

    /// Encodes a commit frame. `exposed_micros` is the time in microseconds since the sender's owner committed.
    pub fn commit(self, commit: &Commit, exposed_micros: u64) -> Vec<u8> {
        let mut bytes = self.encode(&Header::Commit { first_token: commit.first_token });
        for number in [commit.frames, commit.bytes, exposed_micros] {
            bytes.extend(number.to_le_bytes());
        }
        sealed(bytes)
    }

    /// Decodes what follows the header of a commit, checksum included. Also returns `exposed_micros`. `None` if the
    /// checksum is wrong.
    pub fn decode_commit(
        self,
        first_token: u32,
        header: &[u8],
        rest: &[u8; COMMIT_BYTES + SUM_BYTES],
    ) -> Option<(Commit, u64)> {
        if !is_sealed(&[header, rest].concat()) {
            return None;
        }
        let (payload, _) = rest.split_first_chunk::<COMMIT_BYTES>()?;
        Some(frame::decode_commit(first_token, payload))
    }
}

/// Appends the checksum.
pub(super) fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&bytes);
    bytes.extend(sum);
    bytes
}

#[cfg(test)]
mod tests {
    use overfill_kv::handoff::Piece;

    use super::*;

    const PIECE: Piece = Piece { layer: 27, first_block: 0x0102_0304, blocks: 8 };

    /// Blocks of 300 bytes, in the memory of the host or of a device.
    struct Blocks(KvMemory);

    impl KvStore for Blocks {
        fn num_layers(&self) -> usize {
            1
        }

        fn num_blocks(&self) -> usize {
            4
        }

        fn block_bytes(&self) -> usize {
            300
        }

        fn memory(&self) -> KvMemory {
            self.0
        }

        fn read(&self, _: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
            blocks.iter().enumerate().for_each(|(i, block)| f(i, &[block.0 as u8; 300]));
            Ok(())
        }

        fn write(&self, _: usize, _: &[BlockId], _: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
            Ok(())
        }
    }

    #[test]
    fn sums_of_a_store_are_those_of_its_blocks() {
        let blocks = [2, 0, 3].map(BlockId);
        for sums in [Sums::Chain, Sums::PerBlock] {
            let expected = blocks.iter().fold(7, |sum, block| sums.next(sum, &[block.0 as u8; 300]));
            for memory in [KvMemory::Host, KvMemory::Device] {
                assert_eq!(sums.of_store(&Blocks(memory), 0, &blocks, 7).unwrap(), expected);
            }
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        for version in 1..=2 {
            let format = Format::new(version, 8);
            for header in [Header::Layer(PIECE, 524_288), Header::Ping, Header::Commit { first_token: 7 }] {
                let bytes = format.encode(&header);
                assert_eq!((bytes.len(), format.decode(&bytes)), (format.header_bytes(), Some(header)));
            }
            let commit = Commit { first_token: 7, frames: 1 << 40, bytes: 99 };
            let bytes = format.commit(&commit, 12);
            let (header, rest) = bytes.split_at(format.header_bytes());
            let mut rest: [u8; COMMIT_BYTES + SUM_BYTES] = rest.try_into().unwrap();
            assert_eq!(format.decode_commit(7, header, &rest), Some((commit, 12)));
            rest[3] ^= 1;
            assert_eq!(format.decode_commit(7, header, &rest), None);
        }
        let written = Header::Written(PIECE, 77);
        let (first, second) = (Format::new(1, 8), Format::new(2, 8));
        assert_eq!(second.decode(&second.encode(&written)), Some(written));
        assert_eq!(first.decode(&first.encode(&written)), None, "version 1 knows no one-sided pieces");
        // The frames of version 1 are those of the functions in `frame`.
        assert_eq!(first.ping(), frame::encode_ping());
        assert_eq!(second.decode(&first.encode(&Header::Ping)), None, "too short");
    }

    #[test]
    fn a_range_of_heads_must_be_all_heads() {
        let one = Format::new(2, 8).encode(&Header::Layer(PIECE, 1));
        for (at, value) in [(20, 1), (22, 4), (22, 16), (24, 1)] {
            let mut bytes = one.clone();
            bytes[at] = value;
            assert_eq!(Format::new(2, 8).decode(&bytes), None);
        }
        let mut ping = Format::new(2, 8).encode(&Header::Ping);
        ping[27] = 1;
        assert_eq!(Format::new(2, 8).decode(&ping), None);
    }

    #[test]
    fn both_sums_see_every_block_and_their_order() {
        for sums in [Sums::Chain, Sums::PerBlock] {
            let of = |blocks: &[&[u8]]| blocks.iter().fold(1, |sum, block| sums.next(sum, block));
            let whole = of(&[b"abcd", b"efgh"]);
            assert_ne!(whole, of(&[b"efgh", b"abcd"]));
            assert_ne!(whole, of(&[b"abcd"]));
            assert_ne!(whole, of(&[b"abcd", b"efgi"]));
        }
        assert_ne!(Sums::Chain.next(1, b"abcd"), Sums::PerBlock.next(1, b"abcd"));
    }
}
