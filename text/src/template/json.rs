//! transformers' `tojson` filter, which is Python's `json.dumps`.

use std::fmt::Write as _;

use minijinja::{Error, Value, value::Rest};

use super::{
    arguments::Arguments,
    operators::compare,
    values::{Type, VISIT_BYTES, charge, fault, float, items},
};

/// Maximum nesting depth of written values.
const MAX_DEPTH: usize = 1000;
/// Maximum indent, in bytes.
const MAX_INDENT: i64 = 64;

struct Style {
    ascii: bool,
    /// Indent of one level. `None`: everything on one line.
    indent: Option<String>,
    between: String,
    after_key: String,
    sort_keys: bool,
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let indent = match args.get(1, "indent").filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) if text.len() as i64 > MAX_INDENT => {
                return Err(fault(format!("indent must have at most {MAX_INDENT} bytes, got {}", text.len())));
            }
            Some(text) => text.to_owned(),
            None => " ".repeat(i64::try_from(indent)?.clamp(0, MAX_INDENT) as usize),
        }),
    };
    let (between, after_key) = match args.get(2, "separators").filter(|separators| !separators.is_none()) {
        None => ((if indent.is_none() { ", " } else { "," }).to_owned(), ": ".to_owned()),
        Some(separators) => match items(&separators)?.as_slice() {
            [between, after_key] if [between, after_key].iter().all(|s| s.as_str().is_some_and(|s| s.len() <= 64)) => {
                (between.to_string(), after_key.to_string())
            }
            _ => return Err(fault("separators must be two strings of at most 64 bytes")),
        },
    };
    let style = Style {
        ascii: args.flag(0, "ensure_ascii", false),
        indent,
        between,
        after_key,
        sort_keys: args.flag(3, "sort_keys", false),
    };
    let mut out = String::new();
    write(&mut out, value, &style, 0)?;
    Ok(Value::from(out))
}

fn write(out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(fault(format!("values may be nested {MAX_DEPTH} deep")));
    }
    charge(value.as_str().map_or(VISIT_BYTES, str::len))?;
    match Type::of(value) {
        Type::None => out.push_str("null"),
        Type::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        Type::Int => out.push_str(&value.to_string()),
        Type::Float => out.push_str(&number(f64::try_from(value.clone())?)),
        Type::Str => write_text(out, value.as_str().unwrap_or_default(), style.ascii),
        Type::List | Type::Tuple => {
            let all = items(value)?;
            write_all(out, ('[', ']'), all.len(), style, depth, |out, i| write(out, &all[i], style, depth + 1))?;
        }
        Type::Dict => {
            let mut keys = items(value)?;
            if style.sort_keys {
                let mut wrong = None;
                keys.sort_by(|a, b| match compare("<", a, b) {
                    Ok(order) => order.unwrap_or(std::cmp::Ordering::Equal),
                    Err(e) => {
                        wrong = Some(e);
                        std::cmp::Ordering::Equal
                    }
                });
                if let Some(e) = wrong {
                    return Err(e);
                }
            }
            write_all(out, ('{', '}'), keys.len(), style, depth, |out, i| {
                match Type::of(&keys[i]) {
                    Type::Str => write_text(out, keys[i].as_str().unwrap_or_default(), style.ascii),
                    Type::None | Type::Bool | Type::Int | Type::Float => {
                        out.push('"');
                        write(out, &keys[i], style, depth + 1)?;
                        out.push('"');
                    }
                    other => {
                        return Err(fault(format!("keys must be str, int, float, bool or None, not {}", other.name())));
                    }
                }
                out.push_str(&style.after_key);
                write(out, &value.get_item(&keys[i])?, style, depth + 1)
            })?;
        }
        other => return Err(fault(format!("Object of type {} is not JSON serializable", other.name()))),
    }
    Ok(())
}

fn write_all(
    out: &mut String,
    (open, close): (char, char),
    count: usize,
    style: &Style,
    depth: usize,
    mut write: impl FnMut(&mut String, usize) -> Result<(), Error>,
) -> Result<(), Error> {
    out.push(open);
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    for i in 0..count {
        if i > 0 {
            out.push_str(&style.between);
        }
        line(out, depth + 1);
        write(out, i)?;
    }
    if count > 0 {
        line(out, depth);
    }
    out.push(close);
    Ok(())
}

/// Writes a float. As in Python, NaN and infinities are written although JSON does not have them.
fn number(number: f64) -> String {
    match number {
        n if n.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        n => float(n),
    }
}

fn write_text(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for c in text.chars() {
        // Writing to a String can't fail.
        let _ = match c {
            '"' => write!(out, "\\\""),
            '\\' => write!(out, "\\\\"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            '\u{8}' => write!(out, "\\b"),
            '\u{c}' => write!(out, "\\f"),
            c if c < ' ' || (ascii && c == '\u{7f}') => write!(out, "\\u{:04x}", c as u32),
            c if ascii && !c.is_ascii() => {
                c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))
            }
            c => write!(out, "{c}"),
        };
    }
    out.push('"');
}
