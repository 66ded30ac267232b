//! The non-mutating methods of Python's `str`, `list`, `tuple` and `dict`.
//!
//! transformers renders in Jinja2's immutable sandbox, which rejects mutating methods.

use std::{fmt, sync::Arc};

use minijinja::{
    Error, State, Value,
    value::{Object, ObjectRepr, Rest},
};

use super::{
    arguments::Arguments,
    format,
    operators::{equal, hashable, undefined},
    values::{Items, Type, charge, fault, items, text},
};

/// Mutating methods.
const UNSAFE: [&str; 10] =
    ["append", "clear", "extend", "insert", "pop", "popitem", "remove", "reverse", "setdefault", "update"];

const DICT: [&str; 9] = ["get", "items", "keys", "values", "copy", "pop", "popitem", "setdefault", "update"];
const LIST: [&str; 11] =
    ["append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse", "sort"];

/// Methods of Python's `str`.
const STR: &str = "capitalize casefold center count encode endswith expandtabs find format format_map index isalnum isalpha \
                   isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust \
                   lower lstrip maketrans partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit \
                   rstrip split splitlines startswith strip swapcase title upper zfill";

/// Whether any of the types has a method of this name. Methods take precedence over a dictionary's keys.
pub(super) fn is_name(name: &str) -> bool {
    STR.split(' ').any(|method| method == name) || LIST.contains(&name) || DICT.contains(&name)
}

/// Whether the value has a method of this name.
pub(super) fn has(value: &Value, name: &str) -> bool {
    // The sandbox has no mutating methods.
    if UNSAFE.contains(&name) || name == "sort" {
        return false;
    }
    match Type::of(value) {
        Type::Str => STR.split(' ').any(|method| method == name),
        Type::List => LIST.contains(&name),
        Type::Tuple => ["count", "index"].contains(&name),
        Type::Dict => DICT.contains(&name) || name == "clear",
        _ => false,
    }
}

/// A bound method, such as `text.upper` without a call.
#[derive(Debug)]
struct Bound {
    value: Value,
    name: String,
}

impl Object for Bound {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        method(&self.value, &self.name, args)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<built-in method {} of {} object>", self.name, Type::of(&self.value).name())
    }
}

/// A bound method as a value.
pub(super) fn bound(value: Value, name: &str) -> Value {
    Value::from_object(Bound { value, name: name.to_owned() })
}

/// Whether the value is a bound method.
pub(super) fn is_bound(value: &Value) -> bool {
    value.downcast_object_ref::<Bound>().is_some()
}

/// Calls a method: `value.name(arguments)`.
pub(super) fn call(state: &State<'_, '_>, value: Value, name: &str, arguments: Rest<Value>) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(undefined());
    }
    if name.starts_with('_') {
        return Err(fault(format!("access to attribute '{name}' is unsafe")));
    }
    if has(&value, name) {
        return method(&value, name, &arguments);
    }
    match Type::of(&value) {
        Type::Other => value.call_method(state, name, &arguments),
        Type::Dict => match value.get_attr(name)? {
            found if found.is_undefined() => Err(fault(format!("'dict object' has no attribute '{name}'"))),
            found => found.call(state, &arguments),
        },
        other => Err(fault(format!("'{} object' has no attribute '{name}'", other.name()))),
    }
}

fn method(value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let of = Type::of(value);
    if UNSAFE.contains(&name) || name == "sort" {
        return Err(fault(format!("access to attribute '{name}' of '{}' object is unsafe", of.name())));
    }
    let args = Arguments::new(args);
    match of {
        Type::Str => {
            let made = of_text(value.as_str().unwrap_or_default(), name, &args)?;
            charge(made.as_str().map_or(0, str::len))?;
            Ok(made)
        }
        Type::Dict => of_dict(value, name, &args),
        _ => of_sequence(value, name, &args),
    }
}

fn of_dict(value: &Value, name: &str, args: &Arguments<'_>) -> Result<Value, Error> {
    let keys = items(value)?;
    let values = || keys.iter().map(|key| value.get_item(key)).collect::<Result<Vec<_>, _>>();
    Ok(match name {
        "keys" => Items::view("keys", keys),
        "values" => Items::view("values", values()?),
        "items" => {
            let pairs = keys.iter().zip(values()?).map(|(key, value)| Items::tuple(vec![key.clone(), value]));
            Items::view("items", pairs.collect())
        }
        "get" => {
            let key = args.required(0, "key")?;
            hashable(&key)?;
            match keys.iter().find(|other| equal(other, &key)) {
                Some(key) => value.get_item(key)?,
                None => args.get(1, "default").unwrap_or(Value::from(())),
            }
        }
        "copy" => value.clone(),
        other => return Err(fault(format!("'dict object' has no attribute '{other}'"))),
    })
}

fn of_sequence(value: &Value, name: &str, args: &Arguments<'_>) -> Result<Value, Error> {
    let all = items(value)?;
    match name {
        "copy" => Ok(value.clone()),
        "count" => {
            let wanted = args.required(0, "value")?;
            Ok(all.iter().filter(|item| equal(item, &wanted)).count().into())
        }
        "index" => {
            let wanted = args.required(0, "value")?;
            let start = args.whole(1, "start")?.unwrap_or(0).max(0) as usize;
            let found = all.iter().skip(start).position(|item| equal(item, &wanted)).map(|at| at + start);
            found.map(Value::from).ok_or_else(|| fault("value is not in list"))
        }
        other => Err(fault(format!("'{} object' has no attribute '{other}'", Type::of(value).name()))),
    }
}

fn of_text(s: &str, name: &str, args: &Arguments<'_>) -> Result<Value, Error> {
    let chars = |wanted: &dyn Fn(char) -> bool| !s.is_empty() && s.chars().all(wanted);
    let cased = |wanted: fn(&char) -> bool, other: fn(&char) -> bool| {
        s.chars().any(|c| wanted(&c)) && !s.chars().any(|c| other(&c))
    };
    Ok(match name {
        "upper" => s.to_uppercase().into(),
        "lower" | "casefold" => s.to_lowercase().into(),
        "capitalize" => capitalized(s).into(),
        "title" => titled(s).into(),
        "swapcase" => {
            let swap =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            s.chars().map(swap).collect::<String>().into()
        }
        "strip" | "lstrip" | "rstrip" => strip(s, name, args.get(0, "chars").as_ref())?.into(),
        "split" | "rsplit" => split(s, name == "rsplit", args)?,
        "splitlines" => Value::from(lines(s, args.get(0, "keepends").is_some_and(|keep| keep.is_true()))),
        "partition" | "rpartition" => {
            let separator = args.text(0, "sep")?;
            let parts = if name == "partition" { s.split_once(&*separator) } else { s.rsplit_once(&*separator) };
            let parts = match parts {
                Some((before, after)) => [before, &separator, after],
                None if name == "partition" => [s, "", ""],
                None => ["", "", s],
            };
            Items::tuple(parts.into_iter().map(Value::from).collect())
        }
        "replace" => {
            let (old, new) = (args.text(0, "old")?, args.text(1, "new")?);
            replaced(s, &old, &new, args.whole(2, "count")?)?.into()
        }
        "startswith" | "endswith" => {
            let affixes = args.required(0, "prefix")?;
            let affixes = if Type::of(&affixes) == Type::Tuple { items(&affixes)? } else { vec![affixes] };
            let (_, part) = part(s, args.whole(1, "start")?, args.whole(2, "end")?);
            let mut found = false;
            for affix in &affixes {
                let affix =
                    affix.as_str().ok_or_else(|| fault(format!("{name} first arg must be str or a tuple of str")))?;
                found |= if name == "startswith" { part.starts_with(affix) } else { part.ends_with(affix) };
            }
            found.into()
        }
        "find" | "index" | "rfind" | "rindex" => {
            let wanted = args.text(0, "sub")?;
            let (skipped, part) = part(s, args.whole(1, "start")?, args.whole(2, "end")?);
            let at = if name.starts_with('r') { part.rfind(&*wanted) } else { part.find(&*wanted) };
            match at {
                Some(at) => (skipped + part[..at].chars().count()).into(),
                None if name.ends_with("find") => Value::from(-1),
                None => return Err(fault("substring not found")),
            }
        }
        "count" => {
            let (_, part) = part(s, args.whole(1, "start")?, args.whole(2, "end")?);
            match args.text(0, "sub")?.as_ref() {
                "" => (part.chars().count() + 1).into(),
                wanted => part.matches(wanted).count().into(),
            }
        }
        "join" => {
            let parts = items(&args.required(0, "iterable")?)?;
            let mut out = Vec::with_capacity(parts.len());
            for (i, part) in parts.iter().enumerate() {
                let wrong =
                    || fault(format!("sequence item {i}: expected str instance, {} found", Type::of(part).name()));
                out.push(part.as_str().ok_or_else(wrong)?);
            }
            joined(&out, s)?.into()
        }
        "removeprefix" => s.strip_prefix(&*args.text(0, "prefix")?).unwrap_or(s).into(),
        "removesuffix" => s.strip_suffix(&*args.text(0, "suffix")?).unwrap_or(s).into(),
        "center" | "ljust" | "rjust" | "zfill" => padded(s, name, args)?.into(),
        "expandtabs" => {
            let size = args.whole(0, "tabsize")?.unwrap_or(8).clamp(0, 1000) as usize;
            charge(s.matches('\t').count().saturating_mul(size))?;
            let mut out = String::new();
            let mut column = 0;
            for c in s.chars() {
                let width = if c == '\t' && size > 0 { size - column % size } else { usize::from(c != '\t') };
                if c == '\t' {
                    out.extend(std::iter::repeat_n(' ', width))
                } else {
                    out.push(c)
                }
                column = if c == '\n' || c == '\r' { 0 } else { column + width };
            }
            out.into()
        }
        "format" => format::braces(s, args)?.into(),
        "format_map" => format::braces_map(s, &args.required(0, "mapping")?)?.into(),
        "encode" => Value::from_bytes(s.as_bytes().to_vec()),
        "isalpha" => chars(&char::is_alphabetic).into(),
        "isdigit" | "isdecimal" => chars(&|c| c.is_ascii_digit() || (!c.is_ascii() && c.is_numeric())).into(),
        "isnumeric" => chars(&char::is_numeric).into(),
        "isalnum" => chars(&char::is_alphanumeric).into(),
        "isspace" => chars(&char::is_whitespace).into(),
        "isascii" => s.is_ascii().into(),
        "isprintable" => s.chars().all(|c| !c.is_control()).into(),
        "isidentifier" => {
            let mut all = s.chars();
            let first = all.next().is_some_and(|c| c == '_' || c.is_alphabetic());
            (first && all.all(|c| c == '_' || c.is_alphanumeric())).into()
        }
        "islower" => cased(|c| c.is_lowercase(), |c| c.is_uppercase()).into(),
        "isupper" => cased(|c| c.is_uppercase(), |c| c.is_lowercase()).into(),
        "istitle" => (s.chars().any(char::is_alphabetic) && titled(s) == s).into(),
        other => return Err(fault(format!("str.{other} is not supported"))),
    })
}

/// The first letter in title case, the others in lower case.
pub(super) fn capitalized(s: &str) -> String {
    let mut chars = s.chars();
    chars.next().map_or_else(String::new, |first| large(first) + &chars.as_str().to_lowercase())
}

/// The title case of a letter: `ß` gives `Ss`.
fn large(c: char) -> String {
    let mut large = c.to_uppercase();
    large.next().into_iter().chain(large.flat_map(char::to_lowercase)).collect()
}

fn titled(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut inside = false;
    for c in s.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        inside = c.is_alphabetic();
    }
    out
}

/// Replaces the first `count` occurrences of `old`. `None` or a negative `count` replaces all.
pub(super) fn replaced(s: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    let most = count.filter(|count| *count >= 0).map_or(usize::MAX, |count| count as usize);
    charge(s.matches(old).count().min(most).saturating_mul(new.len()).saturating_add(s.len()))?;
    Ok(s.replacen(old, new, most))
}

/// Joins `parts` with `separator`.
pub(super) fn joined(parts: &[impl AsRef<str>], separator: &str) -> Result<String, Error> {
    let bytes: usize = parts.iter().map(|part| part.as_ref().len()).sum();
    charge(separator.len().saturating_mul(parts.len()).saturating_add(bytes))?;
    Ok(parts.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(separator))
}

/// Python's `strip`, `lstrip` or `rstrip` (`name`). Removes whitespace, or the given characters.
pub(super) fn strip<'s>(s: &'s str, name: &str, chars: Option<&Value>) -> Result<&'s str, Error> {
    let chars = match chars.filter(|chars| !chars.is_none()) {
        None => None,
        Some(chars) => Some(chars.as_str().ok_or_else(|| fault(format!("{name} arg must be None or str")))?),
    };
    let goes = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let s = if name == "rstrip" { s } else { s.trim_start_matches(goes) };
    Ok(if name == "lstrip" { s } else { s.trim_end_matches(goes) })
}

/// Whether Python counts `c` as whitespace: Unicode whitespace and four control characters.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn split(s: &str, from_the_right: bool, args: &Arguments<'_>) -> Result<Value, Error> {
    let most = args.whole(1, "maxsplit")?.filter(|most| *most >= 0).map(|most| most as usize);
    let parts: Vec<&str> = match args.get(0, "sep").filter(|separator| !separator.is_none()) {
        Some(separator) => {
            let separator = separator.as_str().ok_or_else(|| fault("must be str or None"))?;
            match (separator, most, from_the_right) {
                ("", _, _) => return Err(fault("empty separator")),
                (separator, None, _) => s.split(separator).collect(),
                (separator, Some(most), false) => s.splitn(most + 1, separator).collect(),
                (separator, Some(most), true) => {
                    let mut parts: Vec<&str> = s.rsplitn(most + 1, separator).collect();
                    parts.reverse();
                    parts
                }
            }
        }
        None => {
            let most = most.unwrap_or(usize::MAX);
            let mut parts = Vec::new();
            let mut rest = s.trim_matches(is_space);
            while !rest.is_empty() {
                let cut = if from_the_right { rest.rfind(is_space) } else { rest.find(is_space) };
                let Some(cut) = cut.filter(|_| parts.len() < most) else {
                    parts.push(rest);
                    break;
                };
                if from_the_right {
                    let space = rest[cut..].chars().next().map_or(1, char::len_utf8);
                    parts.push(&rest[cut + space..]);
                    rest = rest[..cut].trim_end_matches(is_space);
                } else {
                    parts.push(&rest[..cut]);
                    rest = rest[cut..].trim_start_matches(is_space);
                }
            }
            // The rest after the last split keeps its trailing whitespace.
            if parts.len() > most && most < usize::MAX {
                let last = parts.len() - 1;
                if !from_the_right && let Some(at) = s.rfind(parts[last]) {
                    parts[last] = &s[at..];
                }
            }
            if from_the_right {
                parts.reverse();
            }
            parts
        }
    };
    Ok(Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>()))
}

fn lines(s: &str, keep_ends: bool) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = s;
    while !rest.is_empty() {
        let end = rest.find(['\n', '\r', '\u{b}', '\u{c}', '\u{85}', '\u{2028}', '\u{2029}']).unwrap_or(rest.len());
        let after = &rest[end..];
        let length = if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(0, char::len_utf8) };
        lines.push(rest[..end + if keep_ends { length } else { 0 }].to_owned());
        rest = &rest[end + length..];
    }
    lines
}

/// The number of characters before `start`, and `s[start:end]`.
fn part(s: &str, start: Option<i64>, end: Option<i64>) -> (usize, &str) {
    let length = s.chars().count() as i64;
    let at = |bound: i64| (if bound < 0 { bound + length } else { bound }).clamp(0, length) as usize;
    let (start, end) = (start.map_or(0, at), end.map_or(length as usize, at));
    let byte = |at: usize| s.char_indices().nth(at).map_or(s.len(), |(byte, _)| byte);
    (start, &s[byte(start)..byte(end.max(start))])
}

fn padded(s: &str, name: &str, args: &Arguments<'_>) -> Result<String, Error> {
    let width = args.whole(0, "width")?.unwrap_or(0).clamp(0, 1 << 20) as usize;
    let fill = args.get(1, "fillchar").map(|fill| text(&fill)).transpose()?.unwrap_or_else(|| " ".into());
    if fill.chars().count() != 1 {
        return Err(fault("The fill character must be exactly one character long"));
    }
    charge(width)?;
    let missing = width.saturating_sub(s.chars().count());
    Ok(match name {
        "ljust" => s.to_owned() + &fill.repeat(missing),
        "rjust" => fill.repeat(missing) + s,
        "zfill" => {
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
        // If the padding is odd, Python puts the extra character on the left for an odd width, else on the right.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            fill.repeat(left) + s + &fill.repeat(missing - left)
        }
    })
}
