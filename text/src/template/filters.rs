//! Jinja2's filters (`jinja2/filters.py`) with Python's semantics.

use std::cmp::Ordering;

use minijinja::{Environment, Error, State, Value, value::Rest};

use super::{
    arguments::Arguments,
    format, json, methods,
    operators::{add, compare, equal, undefined},
    texts,
    values::{Items, Shape, Type, VISIT_BYTES, charge, fault, items, repr, text},
};

/// Registers all filters, including the string filters of `texts`.
pub(super) fn register(environment: &mut Environment<'_>) {
    texts::register(environment);
    environment.add_filter("tojson", json::to_json);
    for name in ["length", "count"] {
        environment.add_filter(name, |value: &Value| length(value));
    }
    for name in ["default", "d"] {
        environment.add_filter(name, |value: Value, arguments: Rest<Value>| {
            let args = Arguments::new(&arguments);
            let replaced = value.is_undefined() || (args.flag(1, "boolean", false) && !value.is_true());
            let default = || args.get(0, "default_value").unwrap_or_else(|| Value::from(""));
            if replaced { default() } else { value }
        });
    }
    environment
        .add_filter("first", |value: &Value| Ok::<_, Error>(items(value)?.into_iter().next().unwrap_or_default()));
    environment.add_filter("last", |value: &Value| match is_generator(value) {
        true => Err(fault("'generator' object is not reversible")),
        false => Ok(items(value)?.into_iter().next_back().unwrap_or_default()),
    });
    environment.add_filter("list", |value: &Value| items(value).map(Value::from));
    environment.add_filter("items", |value: Value| match Type::of(&value) {
        Type::Undefined => Ok(Items::generator(Vec::new())),
        Type::Dict => Ok(Items::generator(pairs(&value)?)),
        _ => Err(fault("Can only get item pairs from a mapping.")),
    });
    environment.add_filter("reverse", |value: &Value| match value.as_str() {
        Some(text) => Ok(Value::from(text.chars().rev().collect::<String>())),
        None => items(value).map(|all| Items::generator(all.into_iter().rev().collect())),
    });
    environment.add_filter("join", join);
    environment.add_filter("sum", sum);
    environment.add_filter("sort", sort);
    environment.add_filter("dictsort", dictsort);
    environment.add_filter("min", |value: &Value, rest: Rest<Value>| extreme(value, &rest, Ordering::Less));
    environment.add_filter("max", |value: &Value, rest: Rest<Value>| extreme(value, &rest, Ordering::Greater));
    environment.add_filter("unique", unique);
    environment.add_filter("groupby", groupby);
    environment.add_filter("map", map);
    for (name, by_attribute, wanted) in
        [("select", false, true), ("reject", false, false), ("selectattr", true, true), ("rejectattr", true, false)]
    {
        environment.add_filter(name, move |state: &State<'_, '_>, value: &Value, arguments: Rest<Value>| {
            chosen(state, value, &arguments, by_attribute, wanted)
        });
    }
    environment.add_filter("batch", batch);
    environment.add_filter("slice", slice);
    environment.add_filter("attr", |value: &Value, name: &str| {
        if name.starts_with('_') {
            return Err(fault(format!("access to attribute '{name}' is unsafe")));
        }
        // As in Jinja2, `attr` does not look up a dictionary's keys.
        Ok(match Type::of(value) {
            _ if methods::has(value, name) => methods::bound(value.clone(), name),
            Type::Other => value.get_attr(name)?,
            _ => Value::UNDEFINED,
        })
    });
    environment.add_filter("abs", |value: &Value| match Type::of(value) {
        Type::Float => Ok(Value::from(f64::try_from(value.clone())?.abs())),
        Type::Int | Type::Bool => Ok(Value::from(i64::try_from(value.clone())?.saturating_abs())),
        other => Err(fault(format!("bad operand type for abs(): '{}'", other.name()))),
    });
    environment.add_filter("int", int);
    environment.add_filter("float", |value: &Value, default: Option<f64>| {
        let parsed = match value.as_str() {
            Some(text) => text.trim().replace('_', "").parse().ok(),
            None if value.is_undefined() => return Err(undefined()),
            None => number(value),
        };
        Ok(parsed.or(default).unwrap_or(0.0))
    });
    environment.add_filter("round", round);
    environment.add_filter("string", |value: &Value| text(value));
    environment.add_filter("pprint", |value: &Value| repr(value));
    environment.add_filter("format", |template: &Value, arguments: Rest<Value>| {
        let args = Arguments::new(&arguments);
        let values = match args.named {
            Some(named) if args.positional.is_empty() => named.clone(),
            _ => Items::tuple(args.positional.to_vec()),
        };
        format::percent(&text(template)?, &values)
    });
}

/// Python's `len`. As in Jinja2, the length of undefined is 0.
pub(super) fn length(value: &Value) -> Result<usize, Error> {
    match Type::of(value) {
        Type::Undefined => Ok(0),
        _ if is_generator(value) => Err(fault("object of type 'generator' has no len()")),
        Type::Str | Type::List | Type::Tuple | Type::Dict | Type::Other if value.len().is_some() => {
            Ok(value.len().unwrap_or_default())
        }
        other => Err(fault(format!("object of type '{}' has no len()", other.name()))),
    }
}

fn is_generator(value: &Value) -> bool {
    value.downcast_object_ref::<Items>().is_some_and(|items| items.shape == Shape::Generator)
}

fn pairs(value: &Value) -> Result<Vec<Value>, Error> {
    let pair = |key: Value| Ok(Items::tuple(vec![key.clone(), value.get_item(&key)?]));
    items(value)?.into_iter().map(pair).collect()
}

fn number(value: &Value) -> Option<f64> {
    match Type::of(value) {
        Type::Bool => Some(f64::from(u8::from(value.is_true()))),
        Type::Int | Type::Float => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// Looks up an attribute by a path such as `a.b.0`, which is the `attribute` argument of many filters.
fn attribute(value: &Value, path: &Value) -> Result<Value, Error> {
    let parts: Vec<Value> = match path.as_str() {
        Some(path) => {
            path.split('.').map(|part| part.parse::<i64>().map_or_else(|_| Value::from(part), Value::from)).collect()
        }
        None => vec![path.clone()],
    };
    parts.iter().try_fold(value.clone(), |value, part| match Type::of(&value) {
        Type::Undefined => Err(undefined()),
        Type::Dict | Type::Other => value.get_item(part),
        Type::List | Type::Tuple => Ok(match part.as_usize() {
            Some(index) => items(&value)?.into_iter().nth(index).unwrap_or_default(),
            None => Value::UNDEFINED,
        }),
        _ => Ok(Value::UNDEFINED),
    })
}

/// The sort key of a value: the attribute at `path`, if given, in lower case unless `case_sensitive`.
fn key(value: &Value, path: Option<&Value>, case_sensitive: bool) -> Result<Value, Error> {
    let value = match path {
        Some(path) => attribute(value, path)?,
        None => value.clone(),
    };
    Ok(match value.as_str() {
        Some(text) if !case_sensitive => {
            charge(text.len())?;
            Value::from(text.to_lowercase())
        }
        _ => value,
    })
}

/// Sorts values by their keys. Returns the first error if keys can't be compared.
fn sorted_by(mut all: Vec<(Vec<Value>, Value)>, reverse: bool) -> Result<Vec<Value>, Error> {
    let mut wrong = None;
    all.sort_by(|(a, _), (b, _)| {
        let differ = a.iter().zip(b).find(|(a, b)| !equal(a, b));
        let order = differ.map_or(Ok(Some(Ordering::Equal)), |(a, b)| compare("<", a, b));
        let order = order.unwrap_or_else(|e| {
            wrong.get_or_insert(e);
            None
        });
        let order = order.unwrap_or(Ordering::Equal);
        if reverse { order.reverse() } else { order }
    });
    match wrong {
        Some(e) => Err(e),
        None => Ok(all.into_iter().map(|(_, value)| value).collect()),
    }
}

fn sort(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let case_sensitive = args.flag(1, "case_sensitive", false);
    let path = args.get(2, "attribute").filter(|path| !path.is_none());
    let paths: Vec<Option<Value>> = match path.as_ref().and_then(Value::as_str) {
        Some(path) => path.split(',').map(|path| Some(Value::from(path))).collect(),
        None => vec![path.clone()],
    };
    let keyed = items(value)?.into_iter().map(|item| {
        let keys = paths.iter().map(|path| key(&item, path.as_ref(), case_sensitive)).collect::<Result<_, _>>()?;
        Ok((keys, item))
    });
    Ok(Value::from(sorted_by(keyed.collect::<Result<_, Error>>()?, args.flag(0, "reverse", false))?))
}

fn dictsort(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    if Type::of(value) != Type::Dict {
        return Err(fault(format!("'{} object' has no attribute 'items'", Type::of(value).name())));
    }
    let args = Arguments::new(&arguments);
    let by = match args.get(1, "by").as_ref().and_then(Value::as_str) {
        None | Some("key") => 0,
        Some("value") => 1,
        Some(_) => return Err(fault("You can only sort by either \"key\" or \"value\"")),
    };
    let case_sensitive = args.flag(0, "case_sensitive", false);
    let keyed = pairs(value)?
        .into_iter()
        .map(|pair| Ok((vec![key(&pair.get_item_by_index(by)?, None, case_sensitive)?], pair)));
    Ok(Value::from(sorted_by(keyed.collect::<Result<_, Error>>()?, args.flag(2, "reverse", false))?))
}

fn extreme(value: &Value, arguments: &[Value], wanted: Ordering) -> Result<Value, Error> {
    let args = Arguments::new(arguments);
    let (case_sensitive, path) = (args.flag(0, "case_sensitive", false), args.get(1, "attribute"));
    let mut best: Option<(Value, Value)> = None;
    for item in items(value)? {
        let key = key(&item, path.as_ref(), case_sensitive)?;
        let better = match &best {
            None => true,
            Some((other, _)) => compare("<", &key, other)? == Some(wanted),
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(best.map(|(_, item)| item).unwrap_or_default())
}

fn unique(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let (case_sensitive, path) = (args.flag(0, "case_sensitive", false), args.get(1, "attribute"));
    let mut seen: Vec<Value> = Vec::new();
    let mut kept = Vec::new();
    for item in items(value)? {
        let key = key(&item, path.as_ref(), case_sensitive)?;
        charge(seen.len().saturating_mul(VISIT_BYTES))?;
        if !seen.iter().any(|other| equal(other, &key)) {
            seen.push(key);
            kept.push(item);
        }
    }
    Ok(Items::generator(kept))
}

fn groupby(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let path = args.required(0, "attribute")?;
    let (default, case_sensitive) = (args.get(1, "default"), args.flag(2, "case_sensitive", false));
    let mut keyed = Vec::new();
    for item in items(value)? {
        let mut group = attribute(&item, &path)?;
        if group.is_undefined() {
            group = default.clone().unwrap_or(group);
        }
        let folded = key(&group, None, case_sensitive)?;
        keyed.push((vec![folded.clone()], Items::tuple(vec![folded, group, item])));
    }
    let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
    for entry in sorted_by(keyed, false)? {
        let parts = items(&entry)?;
        match groups.last_mut().filter(|(folded, ..)| equal(folded, &parts[0])) {
            Some((.., members)) => members.push(parts[2].clone()),
            None => groups.push((parts[0].clone(), parts[1].clone(), vec![parts[2].clone()])),
        }
    }
    let groups = groups.into_iter().map(|(_, group, members)| Items::tuple(vec![group, Value::from(members)]));
    Ok(Value::from(groups.collect::<Vec<_>>()))
}

fn join(value: &Value, arguments: Rest<Value>) -> Result<String, Error> {
    let args = Arguments::new(&arguments);
    let separator = args.get(0, "d").map_or_else(|| Ok(String::new()), |separator| text(&separator))?;
    let path = args.get(1, "attribute").filter(|path| !path.is_none());
    let mut parts = Vec::new();
    for item in items(value)? {
        parts.push(text(&path.as_ref().map_or_else(|| Ok(item.clone()), |path| attribute(&item, path))?)?);
    }
    methods::joined(&parts, &separator)
}

fn sum(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let path = args.get(0, "attribute").filter(|path| !path.is_none());
    let start = args.get(1, "start").unwrap_or_else(|| Value::from(0));
    items(value)?.into_iter().try_fold(start, |sum, item| {
        add(&sum, &path.as_ref().map_or_else(|| Ok(item.clone()), |path| attribute(&item, path))?)
    })
}

/// The items of a value. Values that are false, such as none, have no items.
fn items_if_true(value: &Value) -> Result<Vec<Value>, Error> {
    if value.is_true() { items(value) } else { Ok(Vec::new()) }
}

fn map(state: &State<'_, '_>, value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let all = items_if_true(value)?;
    let mapped: Result<Vec<Value>, Error> = match (args.positional.split_first(), args.get(usize::MAX, "attribute")) {
        (Some((filter, _)), _) => {
            let name = filter.as_str().ok_or_else(|| fault("map needs the name of a filter"))?;
            all.into_iter()
                .map(|item| state.apply_filter(name, &[std::slice::from_ref(&item), &arguments[1..]].concat()))
                .collect()
        }
        (None, Some(path)) => {
            let default = args.get(usize::MAX, "default");
            let one = |item: Value| {
                let found = attribute(&item, &path)?;
                Ok(if found.is_undefined() { default.clone().unwrap_or(found) } else { found })
            };
            all.into_iter().map(one).collect()
        }
        (None, None) => Err(fault("map requires a filter argument")),
    };
    mapped.map(Items::generator)
}

/// `select`, `reject`, `selectattr` and `rejectattr`. With `by_attribute` the first argument is an attribute. The next
/// argument is the name of a test. Without a test, the truth of the value decides.
fn chosen(
    state: &State<'_, '_>,
    value: &Value,
    arguments: &[Value],
    by_attribute: bool,
    wanted: bool,
) -> Result<Value, Error> {
    let (path, arguments) = match by_attribute {
        true => {
            let (path, rest) = arguments.split_first().ok_or_else(|| fault("an attribute is missing"))?;
            (Some(path), rest)
        }
        false => (None, arguments),
    };
    let mut kept = Vec::new();
    for item in items_if_true(value)? {
        let looked_at = path.map_or_else(|| Ok(item.clone()), |path| attribute(&item, path))?;
        let holds = match arguments.split_first() {
            None => looked_at.is_true(),
            Some((test, rest)) => {
                let name = test.as_str().ok_or_else(|| fault("the name of a test must be a str"))?;
                state.perform_test(name, &[std::slice::from_ref(&looked_at), rest].concat())?
            }
        };
        if holds == wanted {
            kept.push(item);
        }
    }
    Ok(Items::generator(kept))
}

fn batch(value: &Value, size: usize, fill: Option<Value>) -> Result<Value, Error> {
    if size == 0 {
        return Err(fault("batch needs a size of at least 1, got 0"));
    }
    let all = items(value)?;
    let batches = all.chunks(size).map(|batch| {
        let mut batch = batch.to_vec();
        if let Some(fill) = fill.as_ref().filter(|fill| !fill.is_none() && size <= 10_000) {
            batch.resize(size, fill.clone());
        }
        Value::from(batch)
    });
    Ok(Items::generator(batches.collect()))
}

fn slice(value: &Value, slices: usize, fill: Option<Value>) -> Result<Value, Error> {
    if slices == 0 || slices > 10_000 {
        return Err(fault(format!("slice needs from 1 to 10000 slices, got {slices}")));
    }
    let all = items(value)?;
    let (size, longer) = (all.len() / slices, all.len() % slices);
    let mut at = 0;
    let cut = (0..slices).map(|i| {
        let end = at + size + usize::from(i < longer);
        let mut part = all[at..end].to_vec();
        at = end;
        if let Some(fill) = fill.as_ref().filter(|fill| !fill.is_none() && i >= longer) {
            part.push(fill.clone());
        }
        Value::from(part)
    });
    Ok(Items::generator(cut.collect()))
}

fn int(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let default = args.get(0, "default").unwrap_or_else(|| Value::from(0));
    let base = args.whole(1, "base")?.unwrap_or(10);
    Ok(match value.as_str() {
        Some(text) => {
            let digits = text.trim().replace('_', "").to_lowercase();
            let (prefix, base) = match base {
                16 => ("0x", 16),
                8 => ("0o", 8),
                2 => ("0b", 2),
                base => ("", u32::try_from(base).ok().filter(|base| (2..=36).contains(base)).unwrap_or(10)),
            };
            let whole = i64::from_str_radix(digits.strip_prefix(prefix).unwrap_or(&digits), base).ok();
            let whole =
                whole.or_else(|| digits.parse::<f64>().ok().filter(|x| x.is_finite()).map(|x| x.trunc() as i64));
            whole.map_or(default, Value::from)
        }
        None if value.is_undefined() => return Err(undefined()),
        None => match number(value) {
            Some(_) if Type::of(value) == Type::Int => value.clone(),
            Some(number) if number.is_finite() => Value::from(number.trunc() as i64),
            _ => default,
        },
    })
}

fn round(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let precision = args.whole(0, "precision")?.unwrap_or(0).clamp(-300, 300) as i32;
    let method = args.get(1, "method");
    let x = number(value).ok_or_else(|| fault(format!("can't round a '{}'", Type::of(value).name())))?;
    let factor = 10_f64.powi(precision);
    let rounded = match method.as_ref().and_then(Value::as_str).unwrap_or("common") {
        // Python rounds an int to an int, and a float correctly in decimal with ties to even.
        "common" if Type::of(value) == Type::Int && precision >= 0 => return Ok(value.clone()),
        "common" if precision > 0 => format!("{x:.*}", precision as usize).parse().unwrap_or(x),
        "common" if Type::of(value) == Type::Int => {
            return Ok(Value::from(((x * factor).round_ties_even() / factor) as i64));
        }
        "common" => (x * factor).round_ties_even() / factor,
        "ceil" => (x * factor).ceil() / factor,
        "floor" => (x * factor).floor() / factor,
        _ => return Err(fault("method must be common, ceil or floor")),
    };
    Ok(Value::from(rounded))
}
