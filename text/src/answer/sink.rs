//! Collects the parts of an answer, and finds markers.

use std::{mem, sync::Arc};

use super::AnswerPart;

/// Maximum length of a function's name, as in OpenAI's API.
const MAX_NAME_BYTES: usize = 64;

/// Collects the parts of an answer. White space is held back until it is known whether a tool call follows.
pub(super) struct Sink {
    parts: Vec<AnswerPart>,
    /// White space that is content only if more content follows.
    space: String,
    /// A call has ended, and only white space has followed.
    after_call: bool,
    /// Number of calls that have begun.
    calls: usize,
    functions: Arc<[String]>,
    only_one_call: bool,
}

impl Sink {
    pub(super) fn new(functions: Arc<[String]>, only_one_call: bool) -> Self {
        Self { parts: Vec::new(), space: String::new(), after_call: false, calls: 0, functions, only_one_call }
    }

    pub(super) fn take(&mut self) -> Vec<AnswerPart> {
        mem::take(&mut self.parts)
    }

    /// Adds reasoning.
    pub(super) fn reasoning(&mut self, more: &str) {
        match self.parts.last_mut() {
            _ if more.is_empty() => {}
            Some(AnswerPart::Reasoning(text)) => *text += more,
            _ => self.parts.push(AnswerPart::Reasoning(more.to_owned())),
        }
    }

    /// Adds content of an answer that has no calls.
    pub(super) fn plain(&mut self, more: &str) {
        match self.parts.last_mut() {
            _ if more.is_empty() => {}
            Some(AnswerPart::Content(text)) => *text += more,
            _ => self.parts.push(AnswerPart::Content(more.to_owned())),
        }
    }

    /// Adds content that calls may follow.
    pub(super) fn text(&mut self, more: &str) {
        let rest = more.trim_end();
        if rest.is_empty() {
            self.space += more;
            return;
        }
        let before = mem::replace(&mut self.space, more[rest.len()..].to_owned());
        self.plain(&before);
        self.plain(rest);
        self.after_call = false;
    }

    /// Drops the white space before a marker that closes calls. Returns whether only that has followed a call.
    pub(super) fn close(&mut self) -> bool {
        if self.after_call {
            self.space.clear();
        }
        self.after_call
    }

    /// Whether the request has a function of this name.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.functions.iter().any(|function| function == name)
    }

    /// Begins a call.
    pub(super) fn start(&mut self, name: &str) {
        self.space.clear();
        self.calls += 1;
        if self.wanted() {
            self.parts.push(AnswerPart::CallStart { name: name.to_owned() });
        }
    }

    /// Adds to the arguments of the call.
    pub(super) fn arguments(&mut self, more: &str) {
        if !self.wanted() {
            return;
        }
        match self.parts.last_mut() {
            _ if more.is_empty() => {}
            Some(AnswerPart::CallArguments(text)) => *text += more,
            _ => self.parts.push(AnswerPart::CallArguments(more.to_owned())),
        }
    }

    /// Ends the call.
    pub(super) fn end(&mut self) {
        self.after_call = true;
        if self.wanted() {
            self.parts.push(AnswerPart::CallEnd);
        }
    }

    /// Ends the answer.
    pub(super) fn finish(&mut self) {
        let space = mem::take(&mut self.space);
        if !self.after_call {
            self.plain(&space);
        }
    }

    fn wanted(&self) -> bool {
        self.calls == 1 || !self.only_one_call
    }
}

/// Whether `name` may be the name of a function.
pub(super) fn is_name(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-' | b'.');
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(plain)
}

/// Finds markers in a stream of characters.
pub(super) struct Matcher {
    markers: &'static [&'static str],
    /// The beginning of a marker.
    held: String,
}

impl Matcher {
    pub(super) fn new(markers: &'static [&'static str]) -> Self {
        Self { markers, held: String::new() }
    }

    /// Adds a character. Passes on text that is part of no marker, and returns the marker that has ended, if one has.
    pub(super) fn push(&mut self, c: char, mut text: impl FnMut(&str)) -> Option<&'static str> {
        self.held.push(c);
        // A single character is the usual case.
        while !self.held.is_empty() && !self.markers.iter().any(|marker| marker.starts_with(&self.held)) {
            let first = self.held.remove(0);
            text(first.encode_utf8(&mut [0; 4]));
        }
        let found = self.markers.iter().find(|marker| **marker == self.held).copied()?;
        self.held.clear();
        Some(found)
    }

    /// The text that is held back at the end.
    pub(super) fn finish(&mut self) -> String {
        mem::take(&mut self.held)
    }
}
