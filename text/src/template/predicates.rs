//! Jinja2's tests (`jinja2/tests.py`) with Python's semantics.

use std::cmp::Ordering;

use minijinja::{
    Environment, Error, State, Value,
    value::{Rest, ValueKind},
};

use super::{
    methods,
    operators::{compare, contains, equal},
    values::{Items, Shape, Type, fault, text},
};

type Test = fn(&Value) -> bool;
type Comparison = fn(Ordering) -> bool;

/// Registers the tests.
pub(super) fn register(environment: &mut Environment<'_>) {
    let of_type: [(&'static str, Test); 15] = [
        ("defined", |v| !v.is_undefined()),
        ("undefined", Value::is_undefined),
        ("none", Value::is_none),
        ("boolean", |v| Type::of(v) == Type::Bool),
        ("true", |v| Type::of(v) == Type::Bool && v.is_true()),
        ("false", |v| Type::of(v) == Type::Bool && !v.is_true()),
        ("integer", |v| Type::of(v) == Type::Int),
        ("float", |v| Type::of(v) == Type::Float),
        ("number", |v| matches!(Type::of(v), Type::Bool | Type::Int | Type::Float)),
        ("string", |v| Type::of(v) == Type::Str),
        ("mapping", |v| Type::of(v) == Type::Dict),
        ("iterable", iterable),
        ("sequence", sequence),
        ("callable", callable),
        ("escaped", Value::is_safe),
    ];
    for (name, test) in of_type {
        environment.add_test(name, move |value: &Value| test(value));
    }
    for name in ["eq", "equalto", "=="] {
        environment.add_test(name, |a: &Value, b: &Value| equal(a, b));
    }
    for name in ["ne", "!="] {
        environment.add_test(name, |a: &Value, b: &Value| !equal(a, b));
    }
    let ordered: [(&'static [&'static str], Comparison); 4] = [
        (&["lt", "lessthan", "<"], Ordering::is_lt),
        (&["le", "<="], Ordering::is_le),
        (&["gt", "greaterthan", ">"], Ordering::is_gt),
        (&["ge", ">="], Ordering::is_ge),
    ];
    for (names, holds) in ordered {
        for name in names {
            environment
                .add_test(*name, move |a: &Value, b: &Value| Ok::<_, Error>(compare("<", a, b)?.is_some_and(holds)));
        }
    }
    environment.add_test("in", |value: &Value, container: &Value| contains(container, value));
    for (name, rest) in [("odd", 1.0), ("even", 0.0)] {
        environment.add_test(name, move |value: &Value| match Type::of(value) {
            Type::Float => Ok(f64::try_from(value.clone())?.rem_euclid(2.0) == rest),
            _ => Ok::<_, Error>(whole(value)?.rem_euclid(2) as f64 == rest),
        });
    }
    environment.add_test("divisibleby", |value: &Value, by: &Value| match whole(by)? {
        0 => Err(fault("integer modulo by zero")),
        by => Ok(whole(value)?.checked_rem(by).is_none_or(|rest| rest == 0)),
    });
    environment.add_test("sameas", |a: &Value, b: &Value| Type::of(a) == Type::of(b) && equal(a, b));
    environment.add_test("lower", |value: &Value| cased(value, char::is_lowercase, char::is_uppercase));
    environment.add_test("upper", |value: &Value| cased(value, char::is_uppercase, char::is_lowercase));
    environment.add_test("filter", |state: &State<'_, '_>, name: &str, _: Rest<Value>| {
        // Calling an unknown filter gives `UnknownFilter`. Other errors mean that the filter exists.
        !matches!(state.apply_filter(name, &[Value::from("")]), Err(e) if e.kind() == minijinja::ErrorKind::UnknownFilter)
    });
    environment.add_test("test", |state: &State<'_, '_>, name: &str, _: Rest<Value>| {
        !matches!(state.perform_test(name, &[Value::from("")]), Err(e) if e.kind() == minijinja::ErrorKind::UnknownTest)
    });
}

fn iterable(value: &Value) -> bool {
    !matches!(Type::of(value), Type::None | Type::Bool | Type::Int | Type::Float) && value.kind() != ValueKind::Plain
}

/// Whether a value has a length and item access. Strings and dictionaries count, too.
fn sequence(value: &Value) -> bool {
    match Type::of(value) {
        Type::Undefined | Type::Str | Type::List | Type::Tuple | Type::Dict => true,
        Type::Other => {
            value.kind() == ValueKind::Seq
                && !value
                    .downcast_object_ref::<Items>()
                    .is_some_and(|items| matches!(items.shape, Shape::View(_) | Shape::Generator))
        }
        _ => false,
    }
}

fn callable(value: &Value) -> bool {
    methods::is_bound(value)
        || (Type::of(value) == Type::Other && matches!(value.kind(), ValueKind::Plain | ValueKind::Map))
}

fn whole(value: &Value) -> Result<i64, Error> {
    match Type::of(value) {
        Type::Bool => Ok(value.is_true().into()),
        Type::Int => Ok(i64::try_from(value.clone())?),
        other => Err(fault(format!("an int is required, not '{}'", other.name()))),
    }
}

fn cased(value: &Value, wanted: fn(char) -> bool, other: fn(char) -> bool) -> Result<bool, Error> {
    let s = text(value)?;
    Ok(s.chars().any(wanted) && !s.chars().any(other))
}
