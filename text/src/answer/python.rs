//! Calls written as a list of Python calls: `[f(a="x", b=[1, True]), g()]`.

use std::mem;

use super::{
    json::{MAX_DEPTH, Step},
    sink::{Sink, is_name},
};

/// Reads the list after its bracket. Arguments become JSON.
pub(super) struct CallList {
    /// Text that is content if no call follows.
    raw: String,
    only_known: bool,
    state: State,
    /// The name of a function or an argument.
    word: String,
    has_calls: bool,
}

enum State {
    /// Before the name of a function.
    Function,
    FunctionName,
    /// Before the name of an argument. `first`: no argument has come.
    Argument {
        first: bool,
    },
    ArgumentName,
    /// After the name of an argument.
    Equals,
    Value(Literal),
    /// After an argument.
    ArgumentEnd,
    /// After a call.
    CallEnd,
}

impl CallList {
    /// `raw`: text up to the bracket, which is content if no call follows. `only_known`: only functions of the request can
    /// be called.
    pub(super) fn new(raw: String, only_known: bool) -> Self {
        Self { raw, only_known, state: State::Function, word: String::new(), has_calls: false }
    }

    /// Reads a character. At `Bad`, everything before it has been given to `sink`.
    pub(super) fn push(&mut self, c: char, sink: &mut Sink) -> Step {
        let outside = matches!(self.state, State::Function | State::FunctionName | State::CallEnd);
        if outside {
            self.raw.push(c);
        }
        let step = self.read(c, sink);
        if step == Step::Bad {
            if outside {
                self.raw.pop();
                sink.text(&self.raw);
            } else {
                sink.end();
            }
        }
        step
    }

    fn read(&mut self, c: char, sink: &mut Sink) -> Step {
        let of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        self.state = match (&mut self.state, c) {
            (State::Value(literal), c) => {
                let mut fragment = String::new();
                let step = literal.push(c, &mut fragment);
                sink.arguments(&fragment);
                match step {
                    Step::More => return Step::More,
                    Step::Last => State::ArgumentEnd,
                    Step::After => {
                        self.state = State::ArgumentEnd;
                        return self.read(c, sink);
                    }
                    Step::Bad => return Step::Bad,
                }
            }
            (State::FunctionName, '(') => {
                let name = mem::take(&mut self.word);
                if !is_name(&name) || self.only_known && !sink.knows(&name) {
                    return Step::Bad;
                }
                sink.start(&name);
                sink.arguments("{");
                self.raw.clear();
                State::Argument { first: true }
            }
            (State::ArgumentName, '=') => self.value(sink),
            (State::FunctionName | State::ArgumentName, c) if of_name(c) => {
                self.word.push(c);
                return Step::More;
            }
            (State::ArgumentName, c) if c.is_whitespace() => State::Equals,
            (State::FunctionName, _) => return Step::Bad,
            (_, c) if c.is_whitespace() => return Step::More,
            (State::Function, c) if of_name(c) => {
                self.word.push(c);
                State::FunctionName
            }
            (State::Argument { .. } | State::ArgumentEnd, ')') => {
                sink.arguments("}");
                sink.end();
                self.has_calls = true;
                State::CallEnd
            }
            (State::Argument { first }, c) if of_name(c) => {
                sink.arguments(if *first { "" } else { ", " });
                self.word.push(c);
                State::ArgumentName
            }
            (State::Equals, '=') => self.value(sink),
            (State::ArgumentEnd, ',') => State::Argument { first: false },
            (State::CallEnd, ',') => State::Function,
            (State::CallEnd | State::Function, ']') if self.has_calls => return Step::Last,
            _ => return Step::Bad,
        };
        Step::More
    }

    fn value(&mut self, sink: &mut Sink) -> State {
        sink.arguments(&format!("\"{}\": ", mem::take(&mut self.word)));
        State::Value(Literal::default())
    }

    /// Ends the answer.
    pub(super) fn finish(&mut self, sink: &mut Sink) {
        match self.state {
            State::Function | State::FunctionName => sink.text(&self.raw),
            State::CallEnd => {}
            _ => sink.end(),
        }
    }
}

/// Turns a Python literal into JSON: strings, numbers, True, False, None, lists and dictionaries with string keys.
#[derive(Default)]
struct Literal {
    state: Place,
    /// The open containers. True: a dictionary.
    stack: Vec<bool>,
}

#[derive(Default)]
enum Place {
    #[default]
    Value,
    /// A value, or the end of the list. `first`: the list is empty so far.
    Item {
        first: bool,
    },
    /// A key, or the end of the dictionary.
    Key {
        first: bool,
    },
    Colon,
    /// A comma, or the end of the container.
    Comma,
    Text {
        quote: char,
        is_key: bool,
        escape: Option<String>,
    },
    /// A number, or True, False or None.
    Word(String),
}

impl Literal {
    /// Reads a character, and adds to the JSON.
    fn push(&mut self, c: char, out: &mut String) -> Step {
        self.state = match (&mut self.state, c) {
            (Place::Text { quote, is_key, escape }, c) => {
                let text = match escape {
                    Some(escape) => match continued(escape, c) {
                        Escape::More => return Step::More,
                        Escape::Is(text) => text,
                        Escape::Bad => return Step::Bad,
                    },
                    None if c == '\\' => {
                        *escape = Some(String::new());
                        return Step::More;
                    }
                    None if c == *quote => {
                        out.push('"');
                        if *is_key {
                            self.state = Place::Colon;
                            return Step::More;
                        }
                        return self.ended();
                    }
                    None => quoted(c.encode_utf8(&mut [0; 4])),
                };
                *escape = None;
                *out += &text;
                return Step::More;
            }
            (Place::Word(word), c) if c.is_ascii_alphanumeric() || matches!(c, '_' | '.') => {
                word.push(c);
                return Step::More;
            }
            (Place::Word(word), '+' | '-') if word.ends_with(['e', 'E']) => {
                word.push(c);
                return Step::More;
            }
            (Place::Word(word), _) => {
                let Some(json) = word_as_json(word) else { return Step::Bad };
                *out += &json;
                return match self.ended() {
                    Step::Last => Step::After,
                    _ => self.push(c, out),
                };
            }
            (_, c) if c.is_whitespace() => return Step::More,
            (Place::Item { .. }, ']') | (Place::Key { .. }, '}') => return self.closed(c, out),
            (Place::Comma, ']') if self.stack.last() == Some(&false) => return self.closed(c, out),
            (Place::Comma, '}') if self.stack.last() == Some(&true) => return self.closed(c, out),
            (Place::Comma, ',') => match self.stack.last() {
                Some(true) => Place::Key { first: false },
                _ => Place::Item { first: false },
            },
            (Place::Colon, ':') => {
                *out += ": ";
                Place::Value
            }
            (Place::Key { first }, '"' | '\'') => {
                *out += if *first { "\"" } else { ", \"" };
                Place::Text { quote: c, is_key: true, escape: None }
            }
            (Place::Item { first }, c) => {
                *out += if *first { "" } else { ", " };
                self.state = Place::Value;
                return self.push(c, out);
            }
            (Place::Value, '[' | '{') if self.stack.len() < MAX_DEPTH => {
                out.push(c);
                self.stack.push(c == '{');
                if c == '{' { Place::Key { first: true } } else { Place::Item { first: true } }
            }
            (Place::Value, '"' | '\'') => {
                out.push('"');
                Place::Text { quote: c, is_key: false, escape: None }
            }
            (Place::Value, c) if c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.') => Place::Word(c.into()),
            _ => return Step::Bad,
        };
        Step::More
    }

    fn closed(&mut self, c: char, out: &mut String) -> Step {
        out.push(c);
        self.stack.pop();
        self.ended()
    }

    fn ended(&mut self) -> Step {
        self.state = Place::Comma;
        if self.stack.is_empty() { Step::Last } else { Step::More }
    }
}

/// A number, True, False or None as JSON.
fn word_as_json(word: &str) -> Option<String> {
    Some(match word {
        "True" | "true" => "true".into(),
        "False" | "false" => "false".into(),
        "None" | "null" => "null".into(),
        word if serde_json::from_str::<serde_json::Number>(word).is_ok() => word.into(),
        // Python's `.5`, `1.`, `+1` and `1_000`.
        word => {
            let digits: String = word.chars().filter(|c| *c != '_').collect();
            let number = digits.strip_prefix('+').unwrap_or(&digits);
            let plain = number.bytes().all(|c| c.is_ascii_digit() || matches!(c, b'-' | b'+' | b'.' | b'e' | b'E'));
            match serde_json::from_str::<serde_json::Number>(number) {
                Ok(_) => number.into(),
                Err(_) => number.parse::<f64>().ok().filter(|n| plain && n.is_finite())?.to_string(),
            }
        }
    })
}

/// `text` within a JSON string.
fn quoted(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// What an escape sequence in a string means, as JSON.
enum Escape {
    More,
    Is(String),
    Bad,
}

/// Adds a character to the part of an escape sequence after its backslash.
fn continued(escape: &mut String, c: char) -> Escape {
    escape.push(c);
    let is = |c: char| Escape::Is(quoted(c.encode_utf8(&mut [0; 4])));
    let mut characters = escape.chars();
    let (kind, digits) = (characters.next(), characters.as_str());
    let length = match kind {
        Some('n') => return is('\n'),
        Some('t') => return is('\t'),
        Some('r') => return is('\r'),
        Some('b') => return is('\u{8}'),
        Some('f') => return is('\u{c}'),
        Some('0') => return is('\0'),
        Some('\n') => return Escape::Is(String::new()),
        Some(c @ ('\\' | '\'' | '"' | '/')) => return is(c),
        Some('x') => 2,
        Some('u') => 4,
        Some('U') => 8,
        // Python keeps the backslash of sequences that it does not know.
        _ => return Escape::Is(quoted(&format!("\\{escape}"))),
    };
    if !digits.bytes().all(|c| c.is_ascii_hexdigit()) {
        return Escape::Bad;
    }
    if digits.len() < length {
        return Escape::More;
    }
    match u32::from_str_radix(digits, 16) {
        // Half of a pair, as models write it that know JSON better than Python. A reader of JSON joins the halves.
        Ok(code @ 0xd800..=0xdfff) => Escape::Is(format!("\\u{code:04x}")),
        Ok(code) => char::from_u32(code).map_or(Escape::Bad, is),
        Err(_) => Escape::Bad,
    }
}
