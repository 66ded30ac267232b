//! Bytes taken apart into what a target wants. Where there are no more, zeros follow.

/// What is left of an input.
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

    /// Below `end`.
    pub fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    /// Small most of the time, and now and then anything: a number that is always arbitrary is always out of range.
    pub fn number(&mut self) -> u32 {
        match self.byte() {
            0xff => u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()]),
            0xfe => u32::MAX,
            small => u32::from(small % 16),
        }
    }

    /// As many of the next bytes as the first of them says.
    pub fn bytes(&mut self) -> &'a [u8] {
        let count = usize::from(self.byte()).min(self.0.len());
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    /// The same as text, with a replacement for what is none.
    pub fn text(&mut self) -> String {
        String::from_utf8_lossy(self.bytes()).into_owned()
    }

    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}
