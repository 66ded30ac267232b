//! Tokenizes a tag with the rules of `jinja2/lexer.py`.

use super::cursor::Fault;

/// Operators. Longer operators come before their prefixes.
const OPERATORS: [&str; 27] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";", "!",
];

/// A token of a tag.
pub(super) struct Token {
    pub kind: TokenKind,
}

pub(super) enum TokenKind {
    Name(String),
    /// Decimal digits of an integer.
    Integer(String),
    Float(String),
    Text(String),
    Operator(&'static str),
}

impl Token {
    /// The token's text for error messages.
    pub(super) fn text(&self) -> &str {
        match &self.kind {
            TokenKind::Name(text) | TokenKind::Integer(text) | TokenKind::Float(text) | TokenKind::Text(text) => text,
            TokenKind::Operator(operator) => operator,
        }
    }
}

/// Reads a tag that begins at the start of `source` and is closed by `close` (`%}` or `}}`). Returns its tokens, the
/// whitespace sign before `close` (`-`, `+` or empty), and the length in bytes including `close`.
pub(super) fn tag(source: &str, close: &str) -> Result<(Vec<Token>, &'static str, usize), Fault> {
    let mut tokens = Vec::new();
    let mut at = 0;
    // Closing brackets that are expected. Within brackets, `}}` closes two brackets and does not end the tag.
    let mut open: Vec<char> = Vec::new();
    loop {
        let rest = &source[at..];
        let Some(c) = rest.chars().next() else { return Err(format!("a tag is not closed by {close:?}")) };
        if c.is_whitespace() {
            at += c.len_utf8();
            continue;
        }
        if open.is_empty() {
            for sign in ["-", "+", ""] {
                if rest.strip_prefix(sign).is_some_and(|rest| rest.starts_with(close))
                    && !(sign == "+" && close == "}}")
                {
                    let sign = if sign == "-" { "-" } else { sign };
                    return Ok((tokens, sign, at + sign.len() + close.len()));
                }
            }
        }
        let (kind, length) = token(rest, c)?;
        if let TokenKind::Operator(operator) = kind {
            match operator {
                "(" => open.push(')'),
                "[" => open.push(']'),
                "{" => open.push('}'),
                ")" | "]" | "}" if open.pop() != operator.chars().next() => {
                    return Err(format!("unexpected {operator:?}"));
                }
                _ => {}
            }
        }
        tokens.push(Token { kind });
        at += length;
    }
}

fn token(rest: &str, first: char) -> Result<(TokenKind, usize), Fault> {
    if first == '"' || first == '\'' {
        return text(rest, first);
    }
    if first.is_ascii_digit() {
        return number(rest);
    }
    if first == '_' || first.is_alphabetic() {
        let length = rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(rest.len());
        return Ok((TokenKind::Name(rest[..length].to_owned()), length));
    }
    let operator = OPERATORS.iter().find(|operator| rest.starts_with(**operator));
    operator.map(|o| (TokenKind::Operator(o), o.len())).ok_or_else(|| format!("unexpected character {first:?}"))
}

fn number(rest: &str) -> Result<(TokenKind, usize), Fault> {
    for (prefix, radix) in [("0x", 16), ("0X", 16), ("0b", 2), ("0B", 2), ("0o", 8), ("0O", 8)] {
        if let Some(digits) = rest.strip_prefix(prefix) {
            let length = digits.find(|c: char| c != '_' && !c.is_ascii_alphanumeric()).unwrap_or(digits.len());
            let value = i128::from_str_radix(&digits[..length].replace('_', ""), radix);
            let value = value.map_err(|e| format!("{}: {e}", &rest[..length + 2]))?;
            return Ok((TokenKind::Integer(value.to_string()), length + 2));
        }
    }
    let digits = |text: &str| text.find(|c: char| c != '_' && !c.is_ascii_digit()).unwrap_or(text.len());
    let whole = digits(rest);
    let mut length = whole;
    if let Some(fraction) = rest[length..].strip_prefix('.')
        && fraction.starts_with(|c: char| c.is_ascii_digit())
    {
        length += 1 + digits(fraction);
    }
    if let Some(exponent) = rest[length..].strip_prefix(['e', 'E']) {
        let sign = usize::from(exponent.starts_with(['+', '-']));
        if exponent[sign..].starts_with(|c: char| c.is_ascii_digit()) {
            length += 1 + sign + digits(&exponent[sign..]);
        }
    }
    let text = rest[..length].replace('_', "");
    Ok((if length > whole { TokenKind::Float(text) } else { TokenKind::Integer(text) }, length))
}

/// Reads a quoted string with Python's escapes.
fn text(rest: &str, quote: char) -> Result<(TokenKind, usize), Fault> {
    let mut out = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        if c == quote {
            return Ok((TokenKind::Text(out), at + 1));
        }
        if c != '\\' {
            out.push(c);
            continue;
        }
        let Some((_, escaped)) = chars.next() else { break };
        let mut code = |first: Option<char>, radix: u32, most: usize| {
            let mut value = first.and_then(|c| c.to_digit(radix)).unwrap_or(0);
            let mut count = usize::from(first.is_some());
            while count < most {
                match chars.clone().next().and_then(|(_, c)| c.to_digit(radix)) {
                    Some(digit) => value = value * radix + digit,
                    None => break,
                }
                chars.next();
                count += 1;
            }
            (char::from_u32(value), count)
        };
        match escaped {
            '\n' => {}
            'n' => out.push('\n'),
            't' => out.push('\t'),
            'r' => out.push('\r'),
            'a' => out.push('\x07'),
            'b' => out.push('\x08'),
            'f' => out.push('\x0c'),
            'v' => out.push('\x0b'),
            '\\' | '\'' | '"' => out.push(escaped),
            '0'..='7' => out.extend(code(Some(escaped), 8, 3).0),
            'x' | 'u' | 'U' => {
                let most = match escaped {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                match code(None, 16, most) {
                    (Some(c), count) if count == most => out.push(c),
                    _ => return Err(format!("\\{escaped} needs {most} hexadecimal digits of a character")),
                }
            }
            // Python keeps the backslash of an unknown escape.
            other => out.extend(['\\', other]),
        }
    }
    Err(format!("a text is not closed by {quote}"))
}
