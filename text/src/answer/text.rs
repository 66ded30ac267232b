//! Finds tool calls in the text of an answer.

use super::{
    call::{Named, Objects},
    formats::ToolFormat,
    json::Step,
    python::CallList,
    sink::{Matcher, Sink},
};

/// Text with tool calls of one format.
pub(super) struct CallText {
    format: ToolFormat,
    matcher: Matcher,
    state: State,
}

enum State {
    Text,
    /// After a marker, or at the beginning of an answer that needs none. Holds the marker and white space.
    Open {
        raw: String,
        marked: bool,
    },
    Objects(Objects),
    Named(Named),
    List(CallList),
}

impl CallText {
    pub(super) fn new(format: ToolFormat) -> Self {
        let state = match format.needs_no_marker() {
            true => State::Open { raw: String::new(), marked: false },
            false => State::Text,
        };
        Self { format, matcher: Matcher::new(format.markers()), state }
    }

    /// Adds a character.
    pub(super) fn push(&mut self, c: char, sink: &mut Sink) {
        let step = match &mut self.state {
            State::Text => {
                self.text(c, sink);
                return;
            }
            State::Open { raw, .. } if c.is_whitespace() => {
                raw.push(c);
                return;
            }
            State::Open { raw, marked } => match (self.format, c) {
                (ToolFormat::Pythonic, '[') => {
                    self.state = State::List(CallList::new(std::mem::take(raw) + "[", !*marked));
                    return;
                }
                (ToolFormat::Pythonic, _) => Step::Bad,
                (_, '{' | '[') => {
                    self.state = State::Objects(Objects::new(std::mem::take(raw), !*marked));
                    self.push(c, sink);
                    return;
                }
                (ToolFormat::Mistral, _) => {
                    self.state = State::Named(Named::new(std::mem::take(raw)));
                    self.push(c, sink);
                    return;
                }
                (ToolFormat::Hermes | ToolFormat::Llama3Json, _) => Step::Bad,
            },
            State::Objects(objects) => objects.push(c, sink),
            State::Named(named) => named.push(c, sink),
            State::List(list) => list.push(c, sink),
        };
        match step {
            Step::More => {}
            Step::Last => self.state = State::Text,
            Step::After | Step::Bad => {
                if let State::Open { raw, .. } = &self.state {
                    sink.text(raw);
                }
                self.state = State::Text;
                self.text(c, sink);
            }
        }
    }

    fn text(&mut self, c: char, sink: &mut Sink) {
        let Some(found) = self.matcher.push(c, |text| sink.text(text)) else { return };
        let opens = self.format.markers()[0] == found;
        if opens {
            self.state = State::Open { raw: found.to_owned(), marked: true };
        } else if !(self.closes(found) && sink.close()) {
            sink.text(found);
        }
    }

    /// Whether a marker is the one after calls.
    fn closes(&self, marker: &str) -> bool {
        matches!(self.format, ToolFormat::Hermes | ToolFormat::Pythonic) && marker == self.format.markers()[1]
    }

    /// Ends the answer.
    pub(super) fn finish(&mut self, sink: &mut Sink) {
        match &mut self.state {
            State::Text => sink.text(&self.matcher.finish()),
            State::Open { raw, .. } => sink.text(raw),
            State::Objects(objects) => objects.finish(sink),
            State::Named(named) => named.finish(sink),
            State::List(list) => list.finish(sink),
        }
    }
}
