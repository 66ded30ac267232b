//! Jinja2's string filters.

use std::fmt::Write as _;

use minijinja::{Environment, Error, Value, value::Rest};

use super::{
    arguments::Arguments,
    methods,
    values::{Type, charge, fault, items, text},
};

/// Maximum width of a line that a filter creates, in characters.
const MAX_WIDTH: i64 = 1 << 20;

/// Registers the filters.
pub(super) fn register(environment: &mut Environment<'_>) {
    environment.add_filter("upper", |value: &Value| Ok::<_, Error>(text(value)?.to_uppercase()));
    environment.add_filter("lower", |value: &Value| Ok::<_, Error>(text(value)?.to_lowercase()));
    environment.add_filter("capitalize", |value: &Value| Ok::<_, Error>(methods::capitalized(&text(value)?)));
    environment.add_filter("title", |value: &Value| Ok::<_, Error>(title(&text(value)?)));
    environment.add_filter("trim", |value: &Value, chars: Option<Value>| {
        methods::strip(&text(value)?, "strip", chars.as_ref()).map(str::to_owned)
    });
    environment.add_filter("replace", |value: &Value, arguments: Rest<Value>| {
        let args = Arguments::new(&arguments);
        let (s, old, new) = (text(value)?, text(&args.required(0, "old")?)?, text(&args.required(1, "new")?)?);
        methods::replaced(&s, &old, &new, args.whole(2, "count")?)
    });
    environment.add_filter("center", |value: &Value, arguments: Rest<Value>| {
        let width = Arguments::new(&arguments).whole(0, "width")?.unwrap_or(80);
        centred(&text(value)?, width)
    });
    environment.add_filter("indent", indent);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordcount", |value: &Value| {
        let s = text(value)?;
        Ok::<_, Error>(s.split(|c: char| c != '_' && !c.is_alphanumeric()).filter(|word| !word.is_empty()).count())
    });
    environment.add_filter("wordwrap", wordwrap);
    for name in ["escape", "e"] {
        environment.add_filter(name, |value: &Value| markup(value).map(Value::from_safe_string));
    }
    environment
        .add_filter("forceescape", |value: &Value| Ok::<_, Error>(Value::from_safe_string(escaped(&text(value)?))));
    environment.add_filter("safe", |value: &Value| text(value).map(Value::from_safe_string));
    environment.add_filter("striptags", |value: &Value| {
        let mut out = String::new();
        let mut inside = false;
        for c in text(value)?.chars() {
            match c {
                '<' => inside = true,
                '>' if inside => inside = false,
                c if !inside => out.push(c),
                _ => {}
            }
        }
        Ok::<_, Error>(out.split_whitespace().collect::<Vec<_>>().join(" "))
    });
    environment.add_filter("urlencode", |value: &Value| match Type::of(value) {
        Type::Dict => {
            let quoted = |s: &str| quoted(s, "").replace("%20", "+");
            let pair = |key: &Value| Ok(format!("{}={}", quoted(&text(key)?), quoted(&text(&value.get_item(key)?)?)));
            Ok(items(value)?.iter().map(pair).collect::<Result<Vec<_>, Error>>()?.join("&"))
        }
        _ => Ok(quoted(&text(value)?, "/")),
    });
    environment.add_filter("xmlattr", |value: &Value, space: Option<bool>| {
        if Type::of(value) != Type::Dict {
            return Err(fault(format!("'{} object' has no attribute 'items'", Type::of(value).name())));
        }
        let mut out = Vec::new();
        for key in items(value)? {
            let item = value.get_item(&key)?;
            if !item.is_none() && !item.is_undefined() {
                out.push(format!("{}=\"{}\"", escaped(&text(&key)?), escaped(&text(&item)?)));
            }
        }
        let leading = if out.is_empty() || space == Some(false) { "" } else { " " };
        Ok(leading.to_owned() + &out.join(" "))
    });
    environment.add_filter("filesizeformat", |value: &Value, binary: Option<bool>| {
        let bytes = f64::try_from(value.clone())?;
        let (base, units) = match binary {
            Some(true) => (1024.0, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"]),
            _ => (1000.0, ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"]),
        };
        if bytes < base {
            let unit = if bytes == 1.0 { "Byte" } else { "Bytes" };
            return Ok::<_, Error>(format!("{} {unit}", bytes as i64));
        }
        let exponent = ((bytes.ln() / f64::ln(base)).floor() as usize).clamp(1, units.len());
        Ok(format!("{:.1} {}", bytes / base.powi(exponent as i32), units[exponent - 1]))
    });
}

/// Upper case at the start and after whitespace, hyphens and opening brackets, lower case elsewhere. `str.title` has other
/// word boundaries.
fn title(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut first = true;
    for c in s.chars() {
        if first {
            out.extend(c.to_uppercase())
        } else {
            out.extend(c.to_lowercase())
        }
        first = c.is_whitespace() || "-({[<".contains(c);
    }
    out
}

fn centred(s: &str, width: i64) -> Result<String, Error> {
    if width > MAX_WIDTH {
        return Err(fault(format!("width must be at most {MAX_WIDTH}, got {width}")));
    }
    let width = width.max(0) as usize;
    let missing = width.saturating_sub(s.chars().count());
    let left = missing / 2 + (missing & width & 1);
    Ok(" ".repeat(left) + s + &" ".repeat(missing - left))
}

fn indent(value: &Value, arguments: Rest<Value>) -> Result<String, Error> {
    let args = Arguments::new(&arguments);
    let indent = match args.get(0, "width") {
        None => "    ".to_owned(),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(i64::try_from(width)?.clamp(0, 1000) as usize),
        },
    };
    let (first, blank) = (args.flag(1, "first", false), args.flag(2, "blank", false));
    let Some(s) = value.as_str() else {
        return Err(fault(format!("indent needs a str, not '{}'", Type::of(value).name())));
    };
    let s = s.replace("\r\n", "\n");
    charge(s.matches('\n').count().saturating_mul(indent.len()).saturating_add(s.len()))?;
    let mut out = String::with_capacity(s.len());
    for (i, line) in s.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if (i > 0 && (blank || !line.is_empty())) || (i == 0 && first) {
            out.push_str(&indent);
        }
        out.push_str(line);
    }
    Ok(out)
}

fn truncate(value: &Value, arguments: Rest<Value>) -> Result<String, Error> {
    let args = Arguments::new(&arguments);
    let length = args.whole(0, "length")?.unwrap_or(255);
    let end = args.get(2, "end").map_or_else(|| Ok("...".to_owned()), |end| text(&end))?;
    let leeway = args.whole(3, "leeway")?.unwrap_or(5);
    let s = text(value)?;
    let end_length = end.chars().count() as i64;
    if length < end_length || leeway < 0 {
        return Err(fault(format!("truncate needs a length of at least {end_length}, got {length}")));
    }
    if s.chars().count() as i64 <= length.saturating_add(leeway) {
        return Ok(s);
    }
    let cut: String = s.chars().take((length - end_length) as usize).collect();
    if args.flag(1, "killwords", false) {
        return Ok(cut + &end);
    }
    let words = cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before);
    Ok(words.to_owned() + &end)
}

fn wordwrap(value: &Value, arguments: Rest<Value>) -> Result<String, Error> {
    let args = Arguments::new(&arguments);
    let width = args.whole(0, "width")?.unwrap_or(79).max(1) as usize;
    let break_long = args.flag(1, "break_long_words", true);
    let newline = args.get(2, "wrapstring").map_or_else(|| Ok("\n".to_owned()), |s| text(&s))?;
    let mut lines: Vec<String> = Vec::new();
    for paragraph in text(value)?.lines() {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            let mut word: Vec<char> = word.chars().collect();
            let used = line.chars().count();
            if used > 0 && used + 1 + word.len() > width {
                lines.push(std::mem::take(&mut line));
            } else if used > 0 {
                line.push(' ');
            }
            while break_long && word.len() > width {
                lines.push(word.drain(..width).collect());
            }
            line.extend(word);
        }
        lines.push(line);
    }
    methods::joined(&lines, &newline)
}

/// HTML-escapes a value unless it is marked as safe. Used where a value is combined with safe text, as in
/// `'<a>' | safe + '<b>'`. Printing a value does not escape it.
pub(super) fn markup(value: &Value) -> Result<String, Error> {
    Ok(if value.is_safe() { text(value)? } else { escaped(&text(value)?) })
}

fn escaped(s: &str) -> String {
    let escapes = [("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ("\"", "&#34;")];
    escapes.iter().fold(s.to_owned(), |s, (from, to)| s.replace(from, to))
}

fn quoted(s: &str, safe: &str) -> String {
    let mut out = String::new();
    for byte in s.bytes() {
        if byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || safe.as_bytes().contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String can't fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}
