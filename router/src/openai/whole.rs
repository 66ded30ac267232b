//! Integers as clients write them.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, Unexpected, Visitor},
};

/// An integer. Some clients write 4 as 4.0, which JSON does not tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole(pub i64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WholeVisitor)
    }
}

struct WholeVisitor;

impl Visitor<'_> for WholeVisitor {
    type Value = Whole;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Whole, E> {
        Ok(Whole(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Whole, E> {
        i64::try_from(value)
            .map(Whole)
            .map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &"an integer of 64 bits"))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Whole, E> {
        // The largest value below 2^63 is a whole number.
        let fits = value.fract() == 0.0 && (i64::MIN as f64..-(i64::MIN as f64)).contains(&value);
        if fits { Ok(Whole(value as i64)) } else { Err(E::invalid_type(Unexpected::Float(value), &self)) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;

    #[test]
    fn whole_numbers_of_any_form() {
        let read = |value: Value| from_value::<Whole>(value).map(|whole| whole.0).map_err(|e| e.to_string());
        for (value, whole) in [
            (json!(4), 4),
            (json!(4.0), 4),
            (json!(-1.0), -1),
            (json!(i64::MIN), i64::MIN),
            (json!(-9_223_372_036_854_775_808.0), i64::MIN),
        ] {
            assert_eq!(read(value), Ok(whole));
        }
        assert_eq!(read(json!(4.5)).unwrap_err(), "invalid type: floating point `4.5`, expected an integer");
        for value in [json!(u64::MAX), json!(1e300), json!(9_223_372_036_854_775_808.0), json!("4"), json!(true)] {
            assert!(read(value).unwrap_err().contains("expected an integer"));
        }
    }
}
