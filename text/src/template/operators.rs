//! Python's operators, as functions that translated templates call.

use std::cmp::Ordering;

use minijinja::{
    Environment, Error, Value,
    value::{Rest, ValueKind},
};

use super::{
    format, methods, texts,
    values::{Items, Range, Shape, Type, VISIT_BYTES, charge, fault, items, text},
};

/// Maximum size of a repetition (`'ab' * 3`, `[1] * 3`), in bytes or items.
const MAX_BYTES: usize = 16 << 20;

/// Maximum length of a `range`, as in Jinja2's sandbox.
const MAX_RANGE: usize = 100_000;

/// Maximum nesting depth of values that are stored in a namespace.
const MAX_STORED_DEPTH: usize = 500;

/// A binary operator.
type Binary = fn(&Value, &Value) -> Result<Value, Error>;

/// Registers the functions that `super::expression` writes for operators.
pub(super) fn register(environment: &mut Environment<'_>) {
    let binary: [(&'static str, Binary); 7] = [
        ("__sub__", |a, b| arithmetic("-", a, b)),
        ("__mul__", multiply),
        ("__div__", |a, b| arithmetic("/", a, b)),
        ("__floordiv__", |a, b| arithmetic("//", a, b)),
        ("__mod__", modulo),
        ("__pow__", |a, b| arithmetic("**", a, b)),
        ("__item__", item),
    ];
    for (name, function) in binary {
        environment.add_function(name, move |a: &Value, b: &Value| function(a, b));
    }
    environment.add_function("__neg__", |a: &Value| arithmetic("-", &Value::from(0), a).map(|zero| negated(a, zero)));
    environment.add_function("__pos__", |a: &Value| arithmetic("+", &Value::from(0), a));
    environment.add_function("__add__", |first: Value, rest: Rest<Value>| {
        rest.iter().try_fold(first, |sum, part| add(&sum, part))
    });
    environment.add_function("__compare__", |first: Value, rest: Rest<Value>| -> Result<bool, Error> {
        // `a < b < c` means `a < b and b < c`.
        let mut left = &first;
        for pair in rest.chunks_exact(2) {
            if !holds(left, pair[0].as_str().unwrap_or_default(), &pair[1])? {
                return Ok(false);
            }
            left = &pair[1];
        }
        Ok(true)
    });
    environment.add_function("__value__", |value: Value| value);
    environment.add_function("__key__", |key: Value| hashable(&key).map(|()| key));
    environment.add_function("__stored__", |value: Value| check_depth(&value, MAX_STORED_DEPTH).map(|()| value));
    environment.add_function("__tuple__", |items: Rest<Value>| Items::tuple(items.0));
    environment.add_function("__concat__", |parts: Rest<Value>| -> Result<String, Error> {
        parts.iter().try_fold(String::new(), |all, part| Ok(all + &text(part)?))
    });
    environment.add_function("__float__", |digits: &str| digits.parse::<f64>().map_err(|e| fault(e.to_string())));
    environment.add_function("__slice__", slice);
    environment.add_function("__iterate__", |value: Value| -> Result<Value, Error> {
        match value.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => items(&value).map(Value::from),
            // A list of characters, so that the loop knows its length.
            ValueKind::String => items(&value).map(Value::from),
            _ => Ok(value),
        }
    });
    environment.add_function("__attribute__", |value: Value, name: &str| match () {
        () if value.is_undefined() => Err(undefined()),
        // As in Jinja2's sandbox, private attributes are undefined. Accessing an attribute of the result is an error.
        () if name.starts_with('_') => Ok(Value::UNDEFINED),
        () if methods::has(&value, name) => Ok(methods::bound(value, name)),
        () => value.get_attr(name),
    });
    environment.add_function("__method__", methods::call);
    environment.add_function("__no_loader__", |tag: &str| -> Result<Value, Error> {
        Err(fault(format!("{tag}: there are no other templates")))
    });
    environment.add_function("range", range);
}

fn holds(a: &Value, operator: &str, b: &Value) -> Result<bool, Error> {
    let order = |holds: fn(Ordering) -> bool| Ok(compare(operator, a, b)?.is_some_and(holds));
    match operator {
        "==" => Ok(equal(a, b)),
        "!=" => Ok(!equal(a, b)),
        "<" => order(Ordering::is_lt),
        "<=" => order(Ordering::is_le),
        ">" => order(Ordering::is_gt),
        ">=" => order(Ordering::is_ge),
        "in" => contains(b, a),
        _ => Ok(!contains(b, a)?),
    }
}

/// Returns an error if a value can't be a dictionary key: lists, dictionaries, and tuples that contain them.
pub(super) fn hashable(key: &Value) -> Result<(), Error> {
    match Type::of(key) {
        of @ (Type::List | Type::Dict) => Err(fault(format!("unhashable type: '{}'", of.name()))),
        Type::Tuple => items(key)?.iter().try_for_each(hashable),
        _ => Ok(()),
    }
}

/// Returns an error if `value` is nested more than `left` levels deep. Values are dropped recursively, so their depth must
/// be bounded. Checking values that are stored in a namespace is enough: a loop can't nest values deeper in any other way.
fn check_depth(value: &Value, left: usize) -> Result<(), Error> {
    charge(VISIT_BYTES)?;
    let inner = match Type::of(value) {
        Type::List | Type::Tuple | Type::Other if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) => {
            items(value)?
        }
        Type::Dict => items(value)?.iter().map(|key| value.get_item(key)).collect::<Result<_, _>>()?,
        _ => return Ok(()),
    };
    if left == 0 {
        return Err(fault(format!("values may be nested {MAX_STORED_DEPTH} deep")));
    }
    inner.iter().try_for_each(|value| check_depth(value, left - 1))
}

pub(super) fn undefined() -> Error {
    fault("value is undefined")
}

fn unsupported(operator: &str, a: &Value, b: &Value) -> Error {
    let (a, b) = (Type::of(a), Type::of(b));
    if a == Type::Undefined || b == Type::Undefined {
        return undefined();
    }
    fault(format!("unsupported operand type(s) for {operator}: '{}' and '{}'", a.name(), b.name()))
}

/// Negates a float directly: 0 - 0.0 would give 0.0 instead of -0.0. Other types use `difference`, which is 0 - a.
fn negated(a: &Value, difference: Value) -> Value {
    match Type::of(a) {
        Type::Float => f64::try_from(a.clone()).map_or(difference, |a| Value::from(-a)),
        _ => difference,
    }
}

/// A Python number. Booleans are integers.
#[derive(Clone, Copy)]
enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    fn of(value: &Value) -> Option<Self> {
        match Type::of(value) {
            Type::Bool => Some(Self::Int(value.is_true().into())),
            Type::Int => i128::try_from(value.clone()).ok().map(Self::Int),
            Type::Float => f64::try_from(value.clone()).ok().map(Self::Float),
            _ => None,
        }
    }

    fn float(self) -> f64 {
        match self {
            Self::Int(n) => n as f64,
            Self::Float(x) => x,
        }
    }
}

fn int(value: i128) -> Value {
    i64::try_from(value).map_or_else(|_| Value::from(value), Value::from)
}

fn arithmetic(operator: &'static str, a: &Value, b: &Value) -> Result<Value, Error> {
    let (Some(x), Some(y)) = (Number::of(a), Number::of(b)) else { return Err(unsupported(operator, a, b)) };
    let zero = || fault("division by zero");
    let large = || fault(format!("the result of {operator} is too large"));
    if let (Number::Int(x), Number::Int(y)) = (x, y) {
        match operator {
            "+" => return x.checked_add(y).map(int).ok_or_else(large),
            "-" => return x.checked_sub(y).map(int).ok_or_else(large),
            "*" => return x.checked_mul(y).map(int).ok_or_else(large),
            "//" | "%" if y == 0 => return Err(zero()),
            // Floor division: the remainder has the sign of the divisor.
            "//" | "%" => {
                let (quotient, rest) = (x.checked_div(y).ok_or_else(large)?, x % y);
                let down = rest != 0 && (rest < 0) != (y < 0);
                return Ok(match operator {
                    "//" => int(quotient - i128::from(down)),
                    _ => int(if down { rest + y } else { rest }),
                });
            }
            "**" if y >= 0 => {
                return u32::try_from(y).ok().and_then(|y| x.checked_pow(y)).map(int).ok_or_else(large);
            }
            _ => {}
        }
    }
    let (x, y) = (x.float(), y.float());
    let result = match operator {
        "/" | "//" | "%" if y == 0.0 => return Err(zero()),
        "+" => x + y,
        "-" => x - y,
        "*" => x * y,
        "/" => x / y,
        "//" | "%" => {
            let rest = x % y;
            let rest = if rest != 0.0 && (rest < 0.0) != (y < 0.0) {
                rest + y
            } else {
                rest.abs().copysign(y).min(rest.abs().max(rest))
            };
            if operator == "%" { rest } else { ((x - rest) / y).round() }
        }
        "**" => x.powf(y),
        other => return Err(fault(format!("no operator {other}"))),
    };
    Ok(Value::from(result))
}

/// Python's `a + b`.
pub(super) fn add(a: &Value, b: &Value) -> Result<Value, Error> {
    match (Type::of(a), Type::of(b)) {
        (Type::Str, Type::Str) if a.is_safe() || b.is_safe() => {
            Ok(Value::from_safe_string(texts::markup(a)? + &texts::markup(b)?))
        }
        (Type::Str, Type::Str) => {
            charge(a.as_str().map_or(0, str::len) + b.as_str().map_or(0, str::len))?;
            Ok(Value::from([a.as_str().unwrap_or_default(), b.as_str().unwrap_or_default()].concat()))
        }
        (Type::List, Type::List) => Ok(Value::from([items(a)?, items(b)?].concat())),
        (Type::Tuple, Type::Tuple) => Ok(Items::tuple([items(a)?, items(b)?].concat())),
        _ => arithmetic("+", a, b),
    }
}

fn multiply(a: &Value, b: &Value) -> Result<Value, Error> {
    let (sequence, times) = match (Type::of(a), Type::of(b)) {
        (Type::Str | Type::List | Type::Tuple, Type::Int | Type::Bool) => (a, b),
        (Type::Int | Type::Bool, Type::Str | Type::List | Type::Tuple) => (b, a),
        _ => return arithmetic("*", a, b),
    };
    let times = match Number::of(times) {
        Some(Number::Int(n)) => usize::try_from(n.max(0)).unwrap_or(usize::MAX),
        _ => 0,
    };
    let check = |size: usize, unit: usize| match size.checked_mul(times) {
        Some(size) if size <= MAX_BYTES => charge(size.saturating_mul(unit)),
        _ => Err(fault(format!("a repetition must have at most {MAX_BYTES} bytes or items"))),
    };
    if let Some(text) = sequence.as_str() {
        check(text.len(), 1)?;
        return Ok(Value::from(text.repeat(times)));
    }
    let all = items(sequence)?;
    check(all.len(), size_of::<Value>())?;
    let repeated: Vec<Value> = std::iter::repeat_n(all, times).flatten().collect();
    Ok(if Type::of(sequence) == Type::Tuple { Items::tuple(repeated) } else { Value::from(repeated) })
}

fn modulo(a: &Value, b: &Value) -> Result<Value, Error> {
    match a.as_str() {
        Some(text) if a.is_safe() => {
            // Strings that are inserted into safe text are HTML-escaped.
            let escaped = |value: &Value| match value.as_str() {
                Some(_) => texts::markup(value).map(Value::from),
                None => Ok(value.clone()),
            };
            let values = match Type::of(b) {
                Type::Tuple => Items::tuple(items(b)?.iter().map(escaped).collect::<Result<_, _>>()?),
                _ => escaped(b)?,
            };
            format::percent(text, &values).map(Value::from_safe_string)
        }
        Some(text) => format::percent(text, b).map(Value::from),
        None => arithmetic("%", a, b),
    }
}

/// Python's `a == b`.
///
/// Values that share parts may be far larger than the memory that they use, so visited values are charged. Beyond the
/// budget this returns false, and the next charge is an error.
pub(super) fn equal(a: &Value, b: &Value) -> bool {
    if matches!(Type::of(a), Type::List | Type::Tuple | Type::Dict | Type::Other) && charge(VISIT_BYTES).is_err() {
        return false;
    }
    match (Type::of(a), Type::of(b)) {
        (Type::Bool | Type::Int | Type::Float, Type::Bool | Type::Int | Type::Float) => {
            match (Number::of(a), Number::of(b)) {
                (Some(Number::Int(a)), Some(Number::Int(b))) => a == b,
                (Some(a), Some(b)) => a.float() == b.float(),
                _ => false,
            }
        }
        (x, y) if x != y => false,
        (Type::List | Type::Tuple, _) => match (items(a), items(b)) {
            (Ok(a), Ok(b)) => a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| equal(a, b)),
            _ => false,
        },
        (Type::Dict, _) => {
            a.len() == b.len()
                && items(a).is_ok_and(|keys| {
                    keys.iter().all(|key| match (a.get_item(key), b.get_item(key)) {
                        (Ok(x), Ok(y)) => !y.is_undefined() && equal(&x, &y),
                        _ => false,
                    })
                })
        }
        (Type::Other, _) if matches!(a.kind(), ValueKind::Seq | ValueKind::Iterable) => match (items(a), items(b)) {
            (Ok(x), Ok(y)) => a.kind() == b.kind() && x.len() == y.len() && x.iter().zip(&y).all(|(a, b)| equal(a, b)),
            _ => false,
        },
        (Type::Other, _) => false,
        _ => a == b,
    }
}

/// The order of two values. `None` if one of them is NaN. An error if Python can't order values of these types.
pub(super) fn compare(operator: &str, a: &Value, b: &Value) -> Result<Option<Ordering>, Error> {
    match (Type::of(a), Type::of(b)) {
        (Type::Str, Type::Str) => Ok(Some(a.as_str().cmp(&b.as_str()))),
        (Type::List, Type::List) | (Type::Tuple, Type::Tuple) => {
            let (x, y) = (items(a)?, items(b)?);
            match x.iter().zip(&y).find(|(a, b)| !equal(a, b)) {
                Some((a, b)) => compare(operator, a, b),
                None => Ok(Some(x.len().cmp(&y.len()))),
            }
        }
        (x, y) => match (Number::of(a), Number::of(b)) {
            (Some(Number::Int(a)), Some(Number::Int(b))) => Ok(Some(a.cmp(&b))),
            (Some(a), Some(b)) => Ok(a.float().partial_cmp(&b.float())),
            _ if x == Type::Undefined || y == Type::Undefined => Err(undefined()),
            _ => {
                Err(fault(format!("'{operator}' not supported between instances of '{}' and '{}'", x.name(), y.name())))
            }
        },
    }
}

/// Python's `value in container`.
pub(super) fn contains(container: &Value, value: &Value) -> Result<bool, Error> {
    match Type::of(container) {
        Type::Str => match value.as_str() {
            Some(part) => Ok(container.as_str().unwrap_or_default().contains(part)),
            None => {
                Err(fault(format!("'in <string>' requires string as left operand, not {}", Type::of(value).name())))
            }
        },
        Type::Dict => {
            hashable(value)?;
            Ok(items(container)?.iter().any(|key| equal(key, value)))
        }
        Type::Undefined => Ok(false),
        Type::None | Type::Bool | Type::Int | Type::Float => {
            Err(fault(format!("argument of type '{}' is not iterable", Type::of(container).name())))
        }
        Type::List | Type::Tuple | Type::Other => Ok(items(container)?.iter().any(|item| equal(item, value))),
    }
}

/// Jinja2's `value[key]`: an item, else the method of that name, else undefined.
fn item(value: &Value, key: &Value) -> Result<Value, Error> {
    let found = item_alone(value, key)?;
    Ok(match key.as_str() {
        Some(name) if found.is_undefined() && methods::has(value, name) => methods::bound(value.clone(), name),
        _ => found,
    })
}

fn item_alone(value: &Value, key: &Value) -> Result<Value, Error> {
    let index = |length: usize| match Number::of(key) {
        Some(Number::Int(i)) if i < 0 => usize::try_from(length as i128 + i).ok(),
        Some(Number::Int(i)) => usize::try_from(i).ok(),
        _ => None,
    };
    Ok(match Type::of(value) {
        Type::Undefined => return Err(undefined()),
        Type::Str => {
            let text = value.as_str().unwrap_or_default();
            let at = index(text.chars().count());
            at.and_then(|at| text.chars().nth(at)).map_or(Value::UNDEFINED, |c| Value::from(c.to_string()))
        }
        Type::List | Type::Tuple | Type::Other if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) => {
            match (value.downcast_object_ref::<Items>().map(|items| items.shape), value.len()) {
                (Some(Shape::View(_) | Shape::Generator), _) | (_, None) => Value::UNDEFINED,
                (_, Some(length)) => match index(length).filter(|at| *at < length) {
                    Some(at) => match value.kind() {
                        ValueKind::Seq => value.get_item_by_index(at)?,
                        _ => value.try_iter()?.nth(at).unwrap_or_default(),
                    },
                    None => Value::UNDEFINED,
                },
            }
        }
        Type::Dict => match key.kind() {
            ValueKind::String => value.get_item(key)?,
            // In Python, 1, 1.0 and true are the same key.
            _ => match items(value)?.iter().find(|other| equal(other, key)) {
                Some(key) => value.get_item(key)?,
                None => Value::UNDEFINED,
            },
        },
        Type::Other => value.get_item(key)?,
        _ => Value::UNDEFINED,
    })
}

/// Python's `value[start:stop:step]`.
fn slice(value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value, Error> {
    let bound = |value: &Value| match Number::of(value) {
        _ if value.is_none() => Ok(None),
        Some(Number::Int(n)) => Ok(Some(n)),
        _ => Err(fault("slice indices must be integers or None")),
    };
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?.unwrap_or(1));
    if step == 0 {
        return Err(fault("slice step cannot be zero"));
    }
    let chosen = |length: usize| {
        let length = length as i128;
        let clamp =
            |bound: i128, low: i128, high: i128| (if bound < 0 { bound + length } else { bound }).clamp(low, high);
        let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
        let start = start.map_or(if step > 0 { 0 } else { length - 1 }, |bound| clamp(bound, low, high));
        let stop = stop.map_or(if step > 0 { length } else { -1 }, |bound| clamp(bound, low, high));
        let mut chosen = Vec::new();
        let mut at = start;
        while (step > 0 && at < stop) || (step < 0 && at > stop) {
            chosen.push(at as usize);
            at = at.saturating_add(step);
        }
        chosen
    };
    match Type::of(value) {
        Type::Str => {
            charge(value.as_str().map_or(0, str::len))?;
            let all: Vec<char> = value.as_str().unwrap_or_default().chars().collect();
            Ok(Value::from(chosen(all.len()).into_iter().map(|at| all[at]).collect::<String>()))
        }
        Type::List | Type::Tuple => {
            let all = items(value)?;
            let part: Vec<Value> = chosen(all.len()).into_iter().map(|at| all[at].clone()).collect();
            Ok(if Type::of(value) == Type::Tuple { Items::tuple(part) } else { Value::from(part) })
        }
        Type::Other if value.downcast_object_ref::<Range>().is_some() => {
            let all = items(value)?;
            Ok(Value::from(chosen(all.len()).into_iter().map(|at| all[at].clone()).collect::<Vec<_>>()))
        }
        Type::Undefined => Err(undefined()),
        _ => Ok(Value::UNDEFINED),
    }
}

fn range(first: i64, second: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    let (start, stop) = second.map_or((0, first), |second| (first, second));
    let range = Range { start, stop, step: step.unwrap_or(1) };
    if range.step == 0 {
        return Err(fault("range() arg 3 must not be zero"));
    }
    match range.len() {
        length if length > MAX_RANGE => {
            Err(fault(format!("a range must have at most {MAX_RANGE} items, got {length}")))
        }
        _ => Ok(Value::from_object(range)),
    }
}
