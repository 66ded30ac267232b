//! Splits reasoning from content.

use std::mem;

use super::{
    formats::ReasoningFormat,
    sink::{Matcher, Sink},
};

/// Finds the end of the reasoning. Line breaks at its beginning and end, and before the content, are dropped.
pub(super) struct Reasoning {
    format: ReasoningFormat,
    /// Whether the answer begins with reasoning even if it does not begin with `<think>`.
    assumed: bool,
    state: State,
    /// Line breaks that are reasoning only if more of it follows.
    breaks: String,
}

enum State {
    /// The answer may begin with `<think>`. Holds what has come so far.
    Begin(String),
    /// In the reasoning. `begun`: it has a character other than a line break.
    Thinking {
        end: Matcher,
        begun: bool,
    },
    /// After the reasoning, before the first character of the content.
    Gap,
    Over,
}

impl Reasoning {
    pub(super) fn new(format: ReasoningFormat, is_open: bool) -> Self {
        let assumed = is_open || format == ReasoningFormat::DeepseekR1;
        Self { format, assumed, state: State::Begin(String::new()), breaks: String::new() }
    }

    /// Whether everything that follows is content.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Adds a character. Returns the text that has turned out to be content.
    pub(super) fn push(&mut self, c: char, sink: &mut Sink) -> String {
        match &mut self.state {
            State::Begin(held) => {
                held.push(c);
                let open = self.format.markers()[0];
                let text = held.trim_start();
                if text == open {
                    self.state = State::thinking(self.format);
                } else if !open.starts_with(text) {
                    let held = mem::take(held);
                    return self.without_marker(&held, sink);
                }
            }
            State::Thinking { end, begun } => {
                let breaks = &mut self.breaks;
                let found = end.push(c, |text| match text {
                    "\n" => breaks.push('\n'),
                    text => {
                        let before = mem::take(breaks);
                        if mem::replace(begun, true) {
                            sink.reasoning(&before);
                        }
                        sink.reasoning(text);
                    }
                });
                if found.is_some() {
                    self.state = State::Gap;
                }
            }
            State::Gap if c == '\n' => {}
            State::Gap | State::Over => {
                self.state = State::Over;
                return c.into();
            }
        }
        String::new()
    }

    /// Ends the answer.
    pub(super) fn finish(&mut self, sink: &mut Sink) -> String {
        let passed_on = match &mut self.state {
            State::Begin(held) => {
                let held = mem::take(held);
                self.without_marker(&held, sink)
            }
            _ => String::new(),
        };
        if let State::Thinking { end, begun } = &mut self.state {
            let held = end.finish();
            if *begun && !held.is_empty() {
                sink.reasoning(&self.breaks);
            }
            sink.reasoning(&held);
        }
        passed_on
    }

    /// The answer does not begin with `<think>`.
    fn without_marker(&mut self, held: &str, sink: &mut Sink) -> String {
        if self.assumed {
            self.state = State::thinking(self.format);
            return held.chars().map(|c| self.push(c, sink)).collect();
        }
        self.state = State::Over;
        held.to_owned()
    }
}

impl State {
    fn thinking(format: ReasoningFormat) -> Self {
        Self::Thinking { end: Matcher::new(&format.markers()[1..]), begun: false }
    }
}
