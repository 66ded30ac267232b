//! Mutates inputs. The same seed gives the same mutations.

/// SplitMix64 generator: varied and reproducible numbers are sufficient here.
pub struct Random(u64);

impl Random {
    /// Starts a stream that depends only on `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number in `0..end`. `end` must be at least 1.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// Returns a random item of a list.
    pub fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Maximum size of an input.
const MAX_BYTES: usize = 16 << 10;

/// Tokens with a meaning in at least one of the formats.
const WORDS: [&[u8]; 24] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b":",
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"18446744073709551616",
    b"9223372036854775807",
    b"4294967295",
    b"16777216",
    b"1048576",
    b"NaN",
    b"\xff\xfe",
    b"\xf0\x9f\x92",
    b"{{",
    b"{%",
    b"%}",
    b"\\ud800",
];

/// Lengths and counts at which arithmetic may overflow.
const NUMBERS: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Returns a random seed with one to four mutations.
pub fn mutated(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = random.of(seeds).clone();
    for _ in 0..1 + random.below(4) {
        change(&mut input, seeds, random);
    }
    input.truncate(MAX_BYTES);
    input
}

fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let to = at + random.below(input.len() - at + 1);
    match random.below(12) {
        // Flips a bit or replaces a byte.
        0 | 1 if at < input.len() => input[at] ^= 1 << random.below(8),
        2 if at < input.len() => input[at] = random.bits() as u8,
        // Truncates the input or removes a piece.
        3 => input.truncate(at),
        4 => drop(input.drain(at..to)),
        // Copies a piece to another place.
        5 if input.len() < MAX_BYTES => {
            let piece = input[at..to].to_vec();
            let place = random.below(input.len() + 1);
            input.splice(place..place, piece);
        }
        // Writes a length or count.
        6 | 7 => {
            let number = match random.below(4) {
                0 => (input.len() as u64).wrapping_add(random.bits() % 5).wrapping_sub(2),
                _ => *random.of(&NUMBERS),
            };
            let bytes = if random.below(4) == 0 { number.to_be_bytes() } else { number.to_le_bytes() };
            for (slot, byte) in input[at..].iter_mut().zip(&bytes[..1 << random.below(4)]) {
                *slot = *byte;
            }
        }
        // Joins the beginning of this input with the end of another.
        8 => {
            let other = random.of(seeds);
            input.truncate(at);
            input.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
        // Inserts or overwrites a token, sometimes 500 times to cause deep nesting.
        9 | 10 => {
            let word = random.of(&WORDS);
            let many = word.repeat(if random.below(16) == 0 { 500 } else { 1 });
            let end = if random.below(2) == 0 { at } else { (at + many.len()).min(input.len()) };
            input.splice(at..end, many);
        }
        _ => input.extend((0..random.below(32)).map(|_| random.bits() as u8)),
    }
}

/// Formats an input as hex.
pub fn to_hex(input: &[u8]) -> String {
    input.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Parses hex. Returns `None` if it is invalid.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    digits.len().is_multiple_of(2).then(|| digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_inputs() {
        let seeds = [b"one".to_vec(), b"another".to_vec(), Vec::new()];
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..500).map(|_| mutated(&seeds, &mut random)).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn hex_is_read_again() {
        assert_eq!(from_hex(&to_hex(b"\x00\xffa")).as_deref(), Some(&b"\x00\xffa"[..]));
        assert_eq!((from_hex("0"), from_hex("0g")), (None, None));
    }
}
