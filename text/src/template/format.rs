//! Python's `%` operator on strings, `str.format` and `str.format_map`.

use minijinja::{Error, Value};

use super::{
    arguments::Arguments,
    values::{Type, charge, fault, float, items, repr, text},
};

/// Maximum width and precision of a format field.
const MAX_WIDTH: usize = 1 << 15;

/// A format specifier: `[[fill]align][sign][#][0][width][,][.precision][type]`.
#[derive(Clone, Default)]
struct Spec {
    fill: char,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    width: usize,
    thousands: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// `format % values`.
pub(super) fn percent(format: &str, values: &Value) -> Result<String, Error> {
    let tuple = Type::of(values) == Type::Tuple;
    let mut left = if tuple { items(values)? } else { vec![values.clone()] }.into_iter();
    let mut used = false;
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut spec = Spec { fill: ' ', align: Some('>'), ..Spec::default() };
        let mut named = None;
        if chars.next_if_eq(&'(').is_some() {
            let key: String = std::iter::from_fn(|| chars.next_if(|c| *c != ')')).collect();
            chars.next();
            let value = values.get_item(&Value::from(key.clone()))?;
            if Type::of(values) != Type::Dict || value.is_undefined() {
                return Err(fault(format!("format has no value for {key:?}")));
            }
            named = Some(value);
        }
        let mut zero = false;
        while let Some(flag) = chars.next_if(|c| "#0- +".contains(*c)) {
            match flag {
                '#' => spec.alternate = true,
                '0' => zero = true,
                '-' => spec.align = Some('<'),
                sign => spec.sign = Some(sign),
            }
        }
        let number = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| -> Result<usize, Error> {
            let digits: String = std::iter::from_fn(|| chars.next_if(char::is_ascii_digit)).collect();
            width(&digits)
        };
        spec.width = number(&mut chars)?;
        if chars.next_if_eq(&'.').is_some() {
            spec.precision = Some(number(&mut chars)?);
        }
        let kind = chars.next().ok_or_else(|| fault("incomplete format"))?;
        if kind == '%' {
            out.push('%');
            continue;
        }
        let mut value = || {
            used = true;
            named.clone().or_else(|| left.next()).ok_or_else(|| fault("not enough arguments for format string"))
        };
        let value = value()?;
        if zero && spec.align == Some('>') && !matches!(kind, 's' | 'r') {
            (spec.fill, spec.align) = ('0', Some('='));
        }
        match kind {
            's' | 'r' => {
                spec.kind = Some('s');
                let shown = if kind == 's' { text(&value)? } else { repr(&value)? };
                out += &fielded(&Value::from(shown), &spec)?;
            }
            'd' | 'i' | 'u' => {
                spec.kind = Some('d');
                let whole = match Type::of(&value) {
                    Type::Float => Value::from(f64::try_from(value)?.trunc() as i64),
                    Type::Int | Type::Bool => value,
                    other => return Err(fault(format!("%d format: a real number is required, not {}", other.name()))),
                };
                out += &fielded(&whole, &spec)?;
            }
            'f' | 'F' | 'e' | 'E' | 'g' | 'G' | 'x' | 'X' | 'o' | 'c' => {
                spec.kind = Some(kind);
                out += &fielded(&value, &spec)?;
            }
            other => return Err(fault(format!("unsupported format character '{other}'"))),
        }
    }
    let mapping = matches!(Type::of(values), Type::Dict);
    if left.next().is_some() && !mapping && (tuple || !used) {
        return Err(fault("not all arguments converted during string formatting"));
    }
    Ok(out)
}

fn width(digits: &str) -> Result<usize, Error> {
    match digits {
        "" => Ok(0),
        digits => digits
            .parse()
            .ok()
            .filter(|width| *width <= MAX_WIDTH)
            .ok_or_else(|| fault(format!("a width must be at most {MAX_WIDTH}, got {digits}"))),
    }
}

/// `format.format(*arguments)`.
pub(super) fn braces(format: &str, arguments: &Arguments<'_>) -> Result<String, Error> {
    let mut next = 0;
    filled(format, &mut |name| {
        let index = if name.is_empty() {
            next += 1;
            Some(next - 1)
        } else {
            name.parse::<usize>().ok()
        };
        let found = match index {
            Some(index) => arguments.positional.get(index).cloned(),
            None => arguments.get(usize::MAX, name),
        };
        found.ok_or_else(|| fault(format!("format has no argument {name:?}")))
    })
}

/// `format.format_map(mapping)`.
pub(super) fn braces_map(format: &str, mapping: &Value) -> Result<String, Error> {
    filled(format, &mut |name| match mapping.get_item(&Value::from(name))? {
        value if value.is_undefined() => Err(fault(format!("format has no argument {name:?}"))),
        value => Ok(value),
    })
}

fn filled(format: &str, argument: &mut dyn FnMut(&str) -> Result<Value, Error>) -> Result<String, Error> {
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find(['{', '}']) {
        let (before, tail) = rest.split_at(at);
        out.push_str(before);
        if tail.starts_with("{{") || tail.starts_with("}}") {
            out.push_str(&tail[..1]);
            rest = &tail[2..];
            continue;
        }
        let closed = tail.starts_with('{').then(|| tail.find('}')).flatten();
        let end = closed.ok_or_else(|| fault("a single '{' or '}' in format string"))?;
        let field = &tail[1..end];
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (path, conversion) = field.split_once('!').unwrap_or((field, ""));
        let name = &path[..path.find(['.', '[']).unwrap_or(path.len())];
        let mut value = argument(name)?;
        let mut path = &path[name.len()..];
        while !path.is_empty() {
            let (key, after) = match path.strip_prefix('[') {
                Some(inner) => inner.split_once(']').ok_or_else(|| fault("expected ']' in a format"))?,
                None => {
                    let inner = &path[1..];
                    inner.split_at(inner.find(['.', '[']).unwrap_or(inner.len()))
                }
            };
            value = match key.parse::<usize>() {
                // Jinja2's sandbox hides attributes that begin with an underscore.
                _ if key.starts_with('_') => Value::UNDEFINED,
                Ok(index) => value.get_item_by_index(index)?,
                Err(_) => value.get_item(&Value::from(key))?,
            };
            path = after;
        }
        let value = match conversion {
            "" => value,
            "r" | "a" => Value::from(repr(&value)?),
            "s" => Value::from(text(&value)?),
            other => return Err(fault(format!("unknown conversion {other:?}"))),
        };
        out += &fielded(&value, &parse_spec(spec)?)?;
        rest = &tail[end + 1..];
    }
    Ok(out + rest)
}

fn parse_spec(spec: &str) -> Result<Spec, Error> {
    let mut parsed = Spec { fill: ' ', ..Spec::default() };
    let all: Vec<char> = spec.chars().collect();
    let mut at = 0;
    let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
    if is_align(all.get(1)) {
        (parsed.fill, parsed.align, at) = (all[0], Some(all[1]), 2);
    } else if is_align(all.first()) {
        (parsed.align, at) = (Some(all[0]), 1);
    }
    if let Some(sign) = all.get(at).filter(|c| "+- ".contains(**c)) {
        parsed.sign = Some(*sign);
        at += 1;
    }
    if all.get(at) == Some(&'#') {
        parsed.alternate = true;
        at += 1;
    }
    if all.get(at) == Some(&'0') {
        match parsed.align {
            None => (parsed.fill, parsed.align) = ('0', Some('=')),
            Some(_) if at < 2 => parsed.fill = '0',
            Some(_) => {}
        }
        at += 1;
    }
    let digits = |at: usize| all[at..].iter().take_while(|c| c.is_ascii_digit()).collect::<String>();
    let text = digits(at);
    (parsed.width, at) = (width(&text)?, at + text.len());
    if let Some(separator) = all.get(at).filter(|c| ",_".contains(**c)) {
        parsed.thousands = Some(*separator);
        at += 1;
    }
    if all.get(at) == Some(&'.') {
        let text = digits(at + 1);
        (parsed.precision, at) = (Some(width(&text)?), at + 1 + text.len());
    }
    parsed.kind = all.get(at).copied();
    if all.len() > at + 1 {
        return Err(fault(format!("invalid format specifier {spec:?}")));
    }
    Ok(parsed)
}

/// Formats a value according to `spec`.
fn fielded(value: &Value, spec: &Spec) -> Result<String, Error> {
    charge(spec.width + spec.precision.unwrap_or(0))?;
    let mut spec = spec.clone();
    let mut of = Type::of(value);
    let whole;
    let mut value = value;
    if of == Type::Bool && spec.kind != Some('s') && (spec.kind.is_some() || spec.width > 0 || spec.thousands.is_some())
    {
        (whole, of) = (Value::from(i64::from(value.is_true())), Type::Int);
        value = &whole;
    }
    if spec.kind == Some('n') {
        spec.kind = if of == Type::Float { Some('g') } else { Some('d') };
    }
    let spec = &spec;
    let wrong = |kind: char| fault(format!("unknown format code '{kind}' for object of type '{}'", of.name()));
    let number = || f64::try_from(value.clone()).map_err(|_| wrong(spec.kind.unwrap_or('f')));
    let mut body = match (spec.kind, of) {
        (None | Some('s'), Type::Str) => {
            let shown = value.as_str().unwrap_or_default();
            spec.precision.map_or_else(|| shown.to_owned(), |most| shown.chars().take(most).collect())
        }
        (Some('c'), Type::Str) if value.len() == Some(1) => text(value)?,
        (Some('c'), Type::Int) => {
            let code = u32::try_from(value.clone())?;
            char::from_u32(code).ok_or_else(|| fault("%c arg not in range(0x110000)"))?.to_string()
        }
        (None, Type::Int) | (Some('d'), Type::Int | Type::Bool) => {
            let n = i128::try_from(value.clone())?;
            format!("{}{:0>2$}", if n < 0 { "-" } else { "" }, n.unsigned_abs(), spec.precision.unwrap_or(0))
        }
        (Some(kind @ ('x' | 'X' | 'o' | 'b')), Type::Int | Type::Bool) => {
            let n = i128::try_from(value.clone())?;
            let digits = match kind {
                'x' => format!("{:x}", n.unsigned_abs()),
                'X' => format!("{:X}", n.unsigned_abs()),
                'o' => format!("{:o}", n.unsigned_abs()),
                _ => format!("{:b}", n.unsigned_abs()),
            };
            let prefix = if spec.alternate { format!("0{kind}") } else { String::new() };
            format!("{}{prefix}{digits}", if n < 0 { "-" } else { "" })
        }
        (Some('f' | 'F'), _) => format!("{:.*}", spec.precision.unwrap_or(6), number()?),
        (Some('%'), _) => format!("{:.*}%", spec.precision.unwrap_or(6), number()? * 100.0),
        (Some(kind @ ('e' | 'E')), _) => exponential(number()?, spec.precision.unwrap_or(6), kind),
        (Some('G'), _) => general(number()?, spec.precision.unwrap_or(6).max(1)).to_uppercase(),
        (Some('g'), _) => general(number()?, spec.precision.unwrap_or(6).max(1)),
        (None, Type::Float) => match spec.precision {
            Some(precision) => general(number()?, precision.max(1)),
            None => float(number()?),
        },
        (None, _) => text(value)?,
        (Some(kind), _) => return Err(wrong(kind)),
    };
    let numeric = matches!(of, Type::Int | Type::Float | Type::Bool) && !matches!(spec.kind, Some('s' | 'c'));
    if let Some(separator) = spec.thousands.filter(|_| numeric) {
        let start = usize::from(body.starts_with('-'));
        let end = body.find('.').unwrap_or(body.len());
        for at in (start + 1..end).rev().filter(|at| (end - at).is_multiple_of(3)) {
            body.insert(at, separator);
        }
    }
    if let Some(sign) = spec.sign.filter(|sign| *sign != '-' && numeric && !body.starts_with('-')) {
        body.insert(0, sign);
    }
    let missing = spec.width.saturating_sub(body.chars().count());
    let fill = |count: usize| spec.fill.to_string().repeat(count);
    Ok(match spec.align.unwrap_or(if numeric { '>' } else { '<' }) {
        '<' => body + &fill(missing),
        '^' => fill(missing / 2) + &body + &fill(missing - missing / 2),
        '=' if numeric => {
            let (sign, digits) = body.split_at(usize::from(body.starts_with(['-', '+', ' '])));
            format!("{sign}{}{digits}", fill(missing))
        }
        '=' => body + &fill(missing),
        _ => fill(missing) + &body,
    })
}

fn exponential(number: f64, precision: usize, kind: char) -> String {
    let shown = format!("{number:.precision$e}");
    let (digits, exponent) = shown.split_once('e').unwrap_or((&shown, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{digits}{kind}{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// Python's `g` format: fixed or exponential notation, without trailing zeros.
fn general(number: f64, precision: usize) -> String {
    if !number.is_finite() {
        return float(number);
    }
    // The exponent of the rounded number decides which notation is used.
    let rounded = format!("{number:.*e}", precision - 1);
    let exponent: i32 = rounded.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0);
    let trimmed = |text: &str| {
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text.to_owned() }
    };
    if exponent < -4 || exponent >= precision as i32 {
        let shown = exponential(number, precision - 1, 'e');
        let (digits, exponent) = shown.split_once('e').unwrap_or((&shown, "+00"));
        return format!("{}e{exponent}", trimmed(digits));
    }
    trimmed(&format!("{number:.*}", (precision as i32 - 1 - exponent).max(0) as usize))
}
