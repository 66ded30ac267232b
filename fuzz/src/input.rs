//! Splits an input into the values that a target needs. Zeros follow the end of the input.

/// The unread rest of an input.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Returns a number in `0..end`.
    pub fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    /// Returns a number that is mostly small and sometimes arbitrary. Arbitrary numbers alone would always be out of
    /// range.
    pub fn number(&mut self) -> u32 {
        match self.byte() {
            0xff => u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()]),
            0xfe => u32::MAX,
            small => u32::from(small % 16),
        }
    }

    /// Returns a byte string. Its first byte is the length.
    pub fn bytes(&mut self) -> &'a [u8] {
        let count = usize::from(self.byte()).min(self.0.len());
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    /// Returns a byte string as text. Invalid UTF-8 is replaced.
    pub fn text(&mut self) -> String {
        String::from_utf8_lossy(self.bytes()).into_owned()
    }

    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}
