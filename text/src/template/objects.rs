//! Jinja2's global functions that minijinja does not have: `cycler`, `joiner`, `dict`.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
};

use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    value::{Object, ObjectRepr, Rest},
};

use super::{
    arguments::Arguments,
    operators::hashable,
    values::{Type, fault, items},
};

/// Registers the functions.
pub(super) fn register(environment: &mut Environment<'_>) {
    environment.add_function("cycler", |items: Rest<Value>| match items.is_empty() {
        true => Err(fault("at least one item has to be provided")),
        false => Ok(Value::from_object(Cycler { items: items.0, at: AtomicUsize::new(0) })),
    });
    environment.add_function("joiner", |separator: Option<String>| {
        let separator = separator.unwrap_or_else(|| ", ".into());
        Value::from_object(Joiner { separator, used: AtomicBool::new(false) })
    });
    environment.add_function("dict", dict);
}

fn dict(arguments: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new(&arguments);
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    if let Some(first) = args.positional.first() {
        for entry in items(first)? {
            let (key, value) = match Type::of(first) {
                Type::Dict => (entry.clone(), first.get_item(&entry)?),
                _ => match items(&entry)?.as_slice() {
                    [key, value] => (key.clone(), value.clone()),
                    other => return Err(fault(format!("dict() needs pairs, got {} values", other.len()))),
                },
            };
            hashable(&key)?;
            pairs.push((key, value));
        }
    }
    if let Some(named) = args.named {
        for key in named.try_iter()? {
            let value = named.get_item(&key)?;
            pairs.push((key, value));
        }
    }
    Ok(pairs.into_iter().collect())
}

#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.items[self.at.load(Relaxed)].clone())
    }

    fn call_method(self: &Arc<Self>, _: &State<'_, '_>, method: &str, _: &[Value]) -> Result<Value, Error> {
        let at = self.at.load(Relaxed);
        match method {
            "next" => {
                self.at.store((at + 1) % self.items.len(), Relaxed);
                Ok(self.items[at].clone())
            }
            "reset" => {
                self.at.store(0, Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<cycler>")
    }
}

#[derive(Debug)]
struct Joiner {
    separator: String,
    used: AtomicBool,
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &State<'_, '_>, _: &[Value]) -> Result<Value, Error> {
        Ok(Value::from(if self.used.swap(true, Relaxed) { self.separator.as_str() } else { "" }))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<joiner>")
    }
}
