//! Calls that are JSON: objects with the name of a function and its arguments.

use std::mem;

use super::{
    json::{self, Scanner, Step},
    sink::{Sink, is_name},
};

/// Reads `{"name": "f", "arguments": {..}}` after its first brace. `parameters` means `arguments`. The keys may have any
/// order, and other keys are ignored.
pub(super) struct CallObject {
    state: State,
    value: Scanner,
    /// The key or value being read, as JSON text.
    text: String,
    name: Option<String>,
    /// Arguments that came before the name.
    arguments: Option<String>,
    started: bool,
}

#[derive(Clone, Copy)]
enum State {
    FirstKey,
    Key,
    InKey,
    Colon,
    Name,
    /// The arguments, of which nothing but white space has come.
    Arguments,
    /// Arguments that are passed on.
    Streamed,
    /// Arguments that are kept until the end of the call.
    Kept,
    Other,
    Comma,
}

impl CallObject {
    pub(super) fn new() -> Self {
        Self {
            state: State::FirstKey,
            value: Scanner::default(),
            text: String::new(),
            name: None,
            arguments: None,
            started: false,
        }
    }

    /// Whether the call has begun: it has a name and arguments, so it is a call whatever follows.
    pub(super) fn has_started(&self) -> bool {
        self.started
    }

    /// Reads a character. `only_known`: only functions of the request can be called.
    pub(super) fn push(&mut self, c: char, only_known: bool, sink: &mut Sink) -> Step {
        let state = match (self.state, c) {
            (state @ (State::InKey | State::Name | State::Kept | State::Other | State::Streamed), c) => {
                return self.within(state, c, only_known, sink);
            }
            (state, c) if c.is_ascii_whitespace() => state,
            (State::FirstKey, '}') | (State::Comma, '}') => return self.end(sink),
            (State::FirstKey | State::Key, '"') => {
                self.begin(State::InKey);
                return self.within(State::InKey, c, only_known, sink);
            }
            (State::Colon, ':') => match mem::take(&mut self.text).as_str() {
                "name" if self.name.is_none() => self.begin(State::Name),
                "arguments" | "parameters" if !self.started && self.arguments.is_none() => State::Arguments,
                _ => self.begin(State::Other),
            },
            (State::Arguments, '{') => {
                let state = match &self.name {
                    Some(name) => {
                        sink.start(name);
                        self.started = true;
                        State::Streamed
                    }
                    None => State::Kept,
                };
                self.begin(state);
                return self.within(state, c, only_known, sink);
            }
            // Some models write the arguments as a text that contains JSON.
            (State::Arguments, '"' | 'n') => {
                self.begin(State::Kept);
                return self.within(State::Kept, c, only_known, sink);
            }
            (State::Comma, ',') => State::Key,
            _ => return Step::Bad,
        };
        self.state = state;
        Step::More
    }

    /// Begins a value in `state`.
    fn begin(&mut self, state: State) -> State {
        (self.state, self.value) = (state, Scanner::default());
        self.text.clear();
        state
    }

    /// Reads a character of a value.
    fn within(&mut self, state: State, c: char, only_known: bool, sink: &mut Sink) -> Step {
        let in_text = self.value.in_text();
        let step = self.value.push(c);
        match (step, state) {
            (Step::Bad, _) => return Step::Bad,
            (Step::After, _) | (_, State::Other) => {}
            (Step::More | Step::Last, State::Streamed) => {
                let mut fragment = String::new();
                json::add(&mut fragment, c, in_text);
                sink.arguments(&fragment);
            }
            (Step::More | Step::Last, _) => json::add(&mut self.text, c, in_text),
        }
        if step == Step::More {
            return Step::More;
        }
        let string = |text: &str| serde_json::from_str::<String>(text).ok();
        self.state = match state {
            State::InKey => match string(&self.text) {
                Some(key) => {
                    self.text = key;
                    State::Colon
                }
                None => return Step::Bad,
            },
            State::Name => match string(&self.text).filter(|name| is_name(name) && (!only_known || sink.knows(name))) {
                Some(name) => {
                    self.name = Some(name);
                    State::Comma
                }
                None => return Step::Bad,
            },
            State::Kept => {
                let text = mem::take(&mut self.text);
                let written = string(&text).filter(|inner| inner.trim_start().starts_with('{'));
                self.arguments = Some(match written {
                    _ if text.trim() == "null" => "{}".into(),
                    Some(inner) => inner,
                    None if text.starts_with('"') => return Step::Bad,
                    None => text,
                });
                State::Comma
            }
            _ => State::Comma,
        };
        match step {
            Step::After => self.push(c, only_known, sink),
            _ => Step::More,
        }
    }

    /// The object has ended.
    fn end(&mut self, sink: &mut Sink) -> Step {
        if !self.started {
            let Some(name) = &self.name else { return Step::Bad };
            sink.start(name);
            self.started = true;
            sink.arguments(self.arguments.as_deref().unwrap_or("{}"));
        }
        sink.end();
        Step::Last
    }
}

/// Reads one or several calls that are JSON objects: a list, or objects separated by `;`, `,` or white space.
pub(super) struct Objects {
    /// Text that is content if no call follows.
    raw: String,
    only_known: bool,
    call: Option<CallObject>,
    is_list: bool,
    has_calls: bool,
}

impl Objects {
    /// `raw`: text before the objects that is content if no call follows.
    pub(super) fn new(raw: String, only_known: bool) -> Self {
        Self { raw, only_known, call: None, is_list: false, has_calls: false }
    }

    /// Reads a character. At `Bad`, everything before it has been given to `sink`.
    pub(super) fn push(&mut self, c: char, sink: &mut Sink) -> Step {
        let Some(call) = &mut self.call else {
            match c {
                '{' => self.call = Some(CallObject::new()),
                '[' if !self.is_list && !self.has_calls => self.is_list = true,
                ']' if self.is_list && self.has_calls => {
                    self.raw.clear();
                    return Step::Last;
                }
                ',' if self.has_calls => {}
                ';' if self.has_calls && !self.is_list => {}
                c if c.is_whitespace() => {}
                _ => {
                    sink.text(&mem::take(&mut self.raw));
                    return Step::Bad;
                }
            }
            self.raw.push(c);
            return Step::More;
        };
        match call.push(c, self.only_known, sink) {
            Step::Bad if call.has_started() => {
                sink.end();
                Step::Bad
            }
            Step::Bad => {
                sink.text(&mem::take(&mut self.raw));
                Step::Bad
            }
            Step::Last => {
                self.raw.clear();
                (self.call, self.has_calls) = (None, true);
                Step::More
            }
            _ => {
                if call.has_started() {
                    self.raw.clear();
                } else {
                    self.raw.push(c);
                }
                Step::More
            }
        }
    }

    /// Ends the answer.
    pub(super) fn finish(&mut self, sink: &mut Sink) {
        let raw = mem::take(&mut self.raw);
        match &self.call {
            Some(call) if call.has_started() => sink.end(),
            // A separator after the last call.
            None if self.has_calls => {}
            _ => sink.text(&raw),
        }
    }
}

/// Reads `f{..}`, `f[ARGS]{..}` or `f[CALL_ID]x[ARGS]{..}`.
pub(super) struct Named {
    raw: String,
    /// The text between the marker and the arguments.
    head: String,
    arguments: Option<Scanner>,
}

/// Maximum length of the text before the arguments.
const MAX_HEAD_BYTES: usize = 256;

impl Named {
    /// `raw`: text before the name that is content if no call follows.
    pub(super) fn new(raw: String) -> Self {
        Self { raw, head: String::new(), arguments: None }
    }

    /// Reads a character. At `Bad`, everything before it has been given to `sink`.
    pub(super) fn push(&mut self, c: char, sink: &mut Sink) -> Step {
        if let Some(arguments) = &mut self.arguments {
            let in_text = arguments.in_text();
            let step = arguments.push(c);
            let mut fragment = String::new();
            json::add(&mut fragment, c, in_text);
            match step {
                Step::More | Step::Last => sink.arguments(&fragment),
                Step::After | Step::Bad => {}
            }
            if step != Step::More {
                sink.end();
            }
            return step;
        }
        let name = || {
            let name = self.head.trim_end();
            let name = name.strip_suffix("[ARGS]").unwrap_or(name);
            let name = name.split_once("[CALL_ID]").map_or(name, |(name, _)| name).trim();
            is_name(name).then(|| name.to_owned())
        };
        match c {
            '{' => match name() {
                Some(name) => {
                    sink.start(&name);
                    let mut arguments = Scanner::default();
                    arguments.push(c);
                    self.arguments = Some(arguments);
                    sink.arguments("{");
                    Step::More
                }
                None => self.refuse(sink),
            },
            _ if self.head.len() < MAX_HEAD_BYTES => {
                self.head.push(c);
                Step::More
            }
            _ => self.refuse(sink),
        }
    }

    fn refuse(&mut self, sink: &mut Sink) -> Step {
        sink.text(&self.raw);
        sink.text(&self.head);
        Step::Bad
    }

    /// Ends the answer.
    pub(super) fn finish(&mut self, sink: &mut Sink) {
        match self.arguments {
            Some(_) => sink.end(),
            None => {
                self.refuse(sink);
            }
        }
    }
}
