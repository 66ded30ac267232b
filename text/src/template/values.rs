//! Python's values on top of minijinja's: tuples, dictionary views, generators, `range`, `str` and `repr`.

use std::{cell::Cell, fmt, fmt::Write as _, sync::Arc};

use minijinja::{
    Error, ErrorKind, Value,
    value::{DynObject, Enumerator, Object, ObjectExt as _, ObjectRepr, ValueKind},
};

/// Maximum nesting depth of printed values. minijinja's own printing has no limit.
const MAX_DEPTH: usize = 1000;

/// Maximum total size of intermediate results of one rendering, in bytes. The instruction limit does not bound the memory
/// that one instruction allocates.
const MAX_MADE_BYTES: usize = 1 << 30;

/// Bytes charged for visiting one value. Values that share parts may be far larger than the memory that they use.
pub(super) const VISIT_BYTES: usize = 64;

thread_local! {
    /// Bytes charged so far. Each rendering runs on its own thread.
    static MADE_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Counts bytes before they are allocated. Returns an error beyond [`MAX_MADE_BYTES`].
pub(super) fn charge(bytes: usize) -> Result<(), Error> {
    let made = MADE_BYTES.get().saturating_add(bytes);
    MADE_BYTES.set(made);
    match made {
        ..=MAX_MADE_BYTES => Ok(()),
        _ => Err(fault(format!("intermediate results must have at most {MAX_MADE_BYTES} bytes in total"))),
    }
}

/// An error of a template, with a message of at most 1000 characters.
pub(super) fn fault(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into().chars().take(1000).collect::<String>())
}

/// Python's type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Undefined,
    None,
    Bool,
    Int,
    Float,
    Str,
    List,
    Tuple,
    Dict,
    /// Dictionary views such as `dict.items()`, `range(3)`, generators such as the result of `map`, macros and namespaces.
    Other,
}

impl Type {
    pub(super) fn of(value: &Value) -> Self {
        match value.kind() {
            ValueKind::Undefined => Self::Undefined,
            ValueKind::None => Self::None,
            ValueKind::Bool => Self::Bool,
            ValueKind::Number if value.is_integer() => Self::Int,
            ValueKind::Number => Self::Float,
            ValueKind::String => Self::Str,
            ValueKind::Seq | ValueKind::Iterable => match value.downcast_object_ref::<Items>() {
                Some(Items { shape: Shape::Tuple, .. }) => Self::Tuple,
                Some(_) => Self::Other,
                None if value.downcast_object_ref::<Range>().is_some() => Self::Other,
                None => Self::List,
            },
            ValueKind::Map if !is_namespace(value) => Self::Dict,
            _ => Self::Other,
        }
    }

    /// The type's name in Python's error messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Undefined => "Undefined",
            Self::None => "NoneType",
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Float => "float",
            Self::Str => "str",
            Self::List => "list",
            Self::Tuple => "tuple",
            Self::Dict => "dict",
            Self::Other => "object",
        }
    }
}

/// Whether the value is one of minijinja's own objects, such as `namespace()` or `loop`, which are maps to minijinja.
fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| {
        let name = object.type_name();
        ["Namespace", "Loop", "Macro", "Cycler", "Joiner", "Module"].iter().any(|own| name.ends_with(own))
    })
}

/// The Python type of an [`Items`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Tuple,
    /// A dictionary view. The string is `keys`, `values` or `items`.
    View(&'static str),
    /// A generator. In Python it can be iterated only once and has no length. It is true even if it is empty.
    Generator,
}

/// An iterable that is not a list.
#[derive(Debug)]
pub(super) struct Items {
    pub shape: Shape,
    pub items: Vec<Value>,
}

impl Items {
    pub(super) fn tuple(items: Vec<Value>) -> Value {
        Value::from_object(Self { shape: Shape::Tuple, items })
    }

    pub(super) fn view(name: &'static str, items: Vec<Value>) -> Value {
        Value::from_object(Self { shape: Shape::View(name), items })
    }

    pub(super) fn generator(items: Vec<Value>) -> Value {
        Value::from_object(Self { shape: Shape::Generator, items })
    }
}

impl Object for Items {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        if self.shape == Shape::Tuple { ObjectRepr::Seq } else { ObjectRepr::Iterable }
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match self.shape {
            Shape::Tuple => self.items.get(usize::try_from(key.clone()).ok()?).cloned(),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|this| Box::new(this.items.iter().cloned()))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.items.len())
    }

    fn is_true(self: &Arc<Self>) -> bool {
        self.shape == Shape::Generator || !self.items.is_empty()
    }

    fn custom_cmp(self: &Arc<Self>, other: &DynObject) -> Option<std::cmp::Ordering> {
        let other = other.downcast_ref::<Self>()?;
        Some(self.items.cmp(&other.items))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&items_repr(self, 0).map_err(|_| fmt::Error)?)
    }
}

/// Python's `range`.
#[derive(Debug)]
pub(super) struct Range {
    pub start: i64,
    pub stop: i64,
    pub step: i64,
}

impl Range {
    pub(super) fn len(&self) -> usize {
        let (distance, step) = match self.step > 0 {
            true => (i128::from(self.stop) - i128::from(self.start), i128::from(self.step)),
            false => (i128::from(self.start) - i128::from(self.stop), -i128::from(self.step)),
        };
        usize::try_from((distance + step - 1).max(0) / step).unwrap_or(usize::MAX)
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let index = usize::try_from(key.clone()).ok().filter(|index| *index < self.len())?;
        Some(Value::from(self.start + index as i64 * self.step))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            1 => write!(f, "range({}, {})", self.start, self.stop),
            step => write!(f, "range({}, {}, {step})", self.start, self.stop),
        }
    }
}

/// All items of an iterable value. Values that are not iterable, such as none, are an error.
pub(super) fn items(value: &Value) -> Result<Vec<Value>, Error> {
    match Type::of(value) {
        Type::None | Type::Bool | Type::Int | Type::Float => {
            Err(fault(format!("'{}' object is not iterable", Type::of(value).name())))
        }
        _ => {
            charge(value.len().unwrap_or_default().saturating_mul(size_of::<Value>()))?;
            Ok(value.try_iter()?.collect())
        }
    }
}

/// Python's `str(value)`.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    match Type::of(value) {
        Type::Str => {
            let text = value.as_str().unwrap_or_default();
            charge(text.len())?;
            Ok(text.to_owned())
        }
        Type::Undefined => Ok(String::new()),
        _ => repr(value),
    }
}

/// Python's `repr(value)`.
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    repr_at(value, 0)
}

fn repr_at(value: &Value, depth: usize) -> Result<String, Error> {
    charge(value.as_str().map_or(VISIT_BYTES, str::len))?;
    if depth > MAX_DEPTH {
        return Err(fault(format!("values may be nested {MAX_DEPTH} deep")));
    }
    Ok(match Type::of(value) {
        Type::Undefined => "Undefined".into(),
        Type::Float => float(f64::try_from(value.clone())?),
        Type::Str => text_repr(value.as_str().unwrap_or_default()),
        Type::List => joined("[", value.try_iter()?, "]", depth)?,
        Type::Dict => {
            let mut out = String::from("{");
            for (i, key) in value.try_iter()?.enumerate() {
                let separator = if i == 0 { "" } else { ", " };
                let item = value.get_item(&key)?;
                let _ = write!(out, "{separator}{}: {}", repr_at(&key, depth + 1)?, repr_at(&item, depth + 1)?);
            }
            out + "}"
        }
        Type::Tuple | Type::Other => match value.downcast_object::<Items>() {
            Some(items) => items_repr(&items, depth)?,
            // minijinja's Debug format of bytes is Python's; its Display format is not.
            None if value.as_bytes().is_some() => format!("{value:?}"),
            // minijinja would print the whole content of a namespace, repeating values that it shares.
            None if value.kind() == ValueKind::Map => "<object>".into(),
            None => value.to_string(),
        },
        Type::None | Type::Bool | Type::Int => value.to_string(),
    })
}

fn items_repr(this: &Items, depth: usize) -> Result<String, Error> {
    let items = || this.items.iter().cloned();
    match this.shape {
        Shape::Tuple if this.items.len() == 1 => joined("(", items(), ",)", depth),
        Shape::Tuple => joined("(", items(), ")", depth),
        Shape::View(name) => joined(&format!("dict_{name}(["), items(), "])", depth),
        Shape::Generator => Ok("<generator object>".into()),
    }
}

fn joined(open: &str, items: impl Iterator<Item = Value>, close: &str, depth: usize) -> Result<String, Error> {
    let mut out = String::from(open);
    for (i, item) in items.enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        out.push_str(&repr_at(&item, depth + 1)?);
    }
    Ok(out + close)
}

/// Python's `repr` of a string: in single quotes, unless it contains single quotes and no double quotes.
pub(super) fn text_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        // Writing to a String can't fail.
        let _ = match c {
            '\\' => write!(out, "\\\\"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            c if c == quote => write!(out, "\\{c}"),
            c if c < ' ' || ('\u{7f}'..='\u{a0}').contains(&c) || c == '\u{ad}' => write!(out, "\\x{:02x}", c as u32),
            '\u{2028}' | '\u{2029}' | '\u{200b}'..='\u{200f}' | '\u{feff}' => write!(out, "\\u{:04x}", c as u32),
            c => write!(out, "{c}"),
        };
    }
    out.push(quote);
    out
}

/// Python's `repr` of a float: the shortest digits that round-trip, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let magnitude = number.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let text = number.to_string();
    if text.contains('.') { text } else { text + ".0" }
}
