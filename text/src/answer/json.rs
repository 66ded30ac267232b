//! Reads JSON character by character.

/// Maximum nesting depth of values. Deeper ones are no calls.
pub(super) const MAX_DEPTH: usize = 128;

/// What a character means to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It is part of the value, which goes on.
    More,
    /// It is the last character of the value.
    Last,
    /// It comes after the value.
    After,
    /// The value can't go on so.
    Bad,
}

/// Reads one JSON value.
#[derive(Default)]
pub(super) struct Scanner {
    state: State,
    /// The open containers. True: an object.
    stack: Vec<bool>,
}

#[derive(Clone, Copy, Default)]
enum State {
    #[default]
    Value,
    /// A value, or the end of the list.
    FirstItem,
    /// A key, or the end of the object.
    FirstKey,
    Key,
    Colon,
    /// A comma, or the end of the container.
    Comma,
    /// In a string. `hex`: digits that `\u` still needs. `escaped`: after a backslash.
    Text {
        is_key: bool,
        escaped: bool,
        hex: u8,
    },
    /// In `true`, `false` or `null`: what is left of it.
    Word(&'static str),
    Number(Number),
}

#[derive(Clone, Copy)]
enum Number {
    Minus,
    Zero,
    Whole,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

impl Scanner {
    /// Whether the next character is in a string.
    pub(super) fn in_text(&self) -> bool {
        matches!(self.state, State::Text { .. })
    }

    /// Reads a character. White space before the value is part of it.
    pub(super) fn push(&mut self, c: char) -> Step {
        let (state, step) = match (self.state, c) {
            (State::Text { is_key, escaped, hex }, c) => return self.text(is_key, escaped, hex, c),
            (State::Number(number), c) => return self.number(number, c),
            (State::Word(left), c) => match left.strip_prefix(c) {
                Some("") => return self.ended(),
                Some(left) => (State::Word(left), Step::More),
                None => return Step::Bad,
            },
            (state, ' ' | '\t' | '\n' | '\r') => (state, Step::More),
            (State::FirstItem, ']') | (State::FirstKey, '}') => return self.closed(),
            (State::Value | State::FirstItem, c) => return self.value(c),
            (State::FirstKey | State::Key, '"') => (State::Text { is_key: true, escaped: false, hex: 0 }, Step::More),
            (State::Colon, ':') => (State::Value, Step::More),
            (State::Comma, ',') if self.stack.last() == Some(&true) => (State::Key, Step::More),
            (State::Comma, ',') if self.stack.last() == Some(&false) => (State::Value, Step::More),
            (State::Comma, '}') if self.stack.last() == Some(&true) => return self.closed(),
            (State::Comma, ']') if self.stack.last() == Some(&false) => return self.closed(),
            (State::FirstKey | State::Key | State::Colon | State::Comma, _) => return Step::Bad,
        };
        self.state = state;
        step
    }

    fn value(&mut self, c: char) -> Step {
        self.state = match c {
            '{' | '[' if self.stack.len() < MAX_DEPTH => {
                self.stack.push(c == '{');
                if c == '{' { State::FirstKey } else { State::FirstItem }
            }
            '"' => State::Text { is_key: false, escaped: false, hex: 0 },
            't' => State::Word("rue"),
            'f' => State::Word("alse"),
            'n' => State::Word("ull"),
            '-' => State::Number(Number::Minus),
            '0' => State::Number(Number::Zero),
            '1'..='9' => State::Number(Number::Whole),
            _ => return Step::Bad,
        };
        Step::More
    }

    fn text(&mut self, is_key: bool, escaped: bool, hex: u8, c: char) -> Step {
        let (escaped, hex) = match (escaped, hex, c) {
            (true, 0, 'u') => (false, 4),
            (true, 0, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => (false, 0),
            (true, _, _) => return Step::Bad,
            (false, 0, '\\') => (true, 0),
            (false, 0, '"') if is_key => {
                self.state = State::Colon;
                return Step::More;
            }
            (false, 0, '"') => return self.ended(),
            (false, 0, _) => (false, 0),
            (false, hex, c) if c.is_ascii_hexdigit() => (false, hex - 1),
            (false, _, _) => return Step::Bad,
        };
        self.state = State::Text { is_key, escaped, hex };
        Step::More
    }

    fn number(&mut self, number: Number, c: char) -> Step {
        use Number::{Exponent, ExponentDigits, ExponentSign, Fraction, Minus, Point, Whole, Zero};
        let next = match (number, c) {
            (Minus, '0') => Zero,
            (Minus, '1'..='9') | (Whole, '0'..='9') => Whole,
            (Zero | Whole, '.') => Point,
            (Point | Fraction, '0'..='9') => Fraction,
            (Zero | Whole | Fraction, 'e' | 'E') => Exponent,
            (Exponent, '+' | '-') => ExponentSign,
            (Exponent | ExponentSign | ExponentDigits, '0'..='9') => ExponentDigits,
            (Zero | Whole | Fraction | ExponentDigits, c) => {
                // The number has ended before this character.
                return match self.ended() {
                    Step::Last => Step::After,
                    _ => self.push(c),
                };
            }
            (Minus | Point | Exponent | ExponentSign, _) => return Step::Bad,
        };
        self.state = State::Number(next);
        Step::More
    }

    fn closed(&mut self) -> Step {
        self.stack.pop();
        self.ended()
    }

    fn ended(&mut self) -> Step {
        self.state = State::Comma;
        if self.stack.is_empty() { Step::Last } else { Step::More }
    }
}

/// Adds `c` to JSON text. Models write line breaks within strings, where JSON wants them escaped.
pub(super) fn add(out: &mut String, c: char, in_text: bool) {
    match c {
        '\n' if in_text => *out += "\\n",
        '\r' if in_text => *out += "\\r",
        '\t' if in_text => *out += "\\t",
        c if in_text && c < ' ' => *out += &format!("\\u{:04x}", c as u32),
        c => out.push(c),
    }
}
