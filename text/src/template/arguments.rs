//! Positional and keyword arguments of methods and filters.

use std::borrow::Cow;

use minijinja::{Error, Value};

use super::values::{Type, fault};

/// Arguments of one call.
pub(super) struct Arguments<'a> {
    /// Positional arguments.
    pub positional: &'a [Value],
    /// Keyword arguments.
    pub named: Option<&'a Value>,
}

impl<'a> Arguments<'a> {
    /// Splits the arguments. minijinja passes keyword arguments as the last argument.
    pub(super) fn new(all: &'a [Value]) -> Self {
        match all.split_last() {
            Some((last, rest)) if last.is_kwargs() => Self { positional: rest, named: Some(last) },
            _ => Self { positional: all, named: None },
        }
    }

    /// The positional argument at `index`, else the keyword argument `name`.
    pub(super) fn get(&self, index: usize, name: &str) -> Option<Value> {
        let named = || self.named.and_then(|named| named.get_attr(name).ok()).filter(|value| !value.is_undefined());
        self.positional.get(index).cloned().or_else(named)
    }

    pub(super) fn required(&self, index: usize, name: &str) -> Result<Value, Error> {
        self.get(index, name).ok_or_else(|| fault(format!("missing a required argument: '{name}'")))
    }

    /// A required string.
    pub(super) fn text(&self, index: usize, name: &str) -> Result<Cow<'static, str>, Error> {
        let value = self.required(index, name)?;
        match value.as_str() {
            Some(text) => Ok(text.to_owned().into()),
            None => Err(fault(format!("{name} must be str, not {}", Type::of(&value).name()))),
        }
    }

    /// An optional integer. None counts as absent.
    pub(super) fn whole(&self, index: usize, name: &str) -> Result<Option<i64>, Error> {
        match self.get(index, name).filter(|value| !value.is_none()) {
            None => Ok(None),
            Some(value) => match Type::of(&value) {
                Type::Bool => Ok(Some(value.is_true().into())),
                Type::Int => Ok(value.as_i64()),
                other => Err(fault(format!("{name} must be int, not {}", other.name()))),
            },
        }
    }

    /// The truth of an argument, or `default` if it is absent.
    pub(super) fn flag(&self, index: usize, name: &str, default: bool) -> bool {
        self.get(index, name).map_or(default, |value| value.is_true())
    }
}
