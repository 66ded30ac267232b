//! Parses Jinja2's expressions and translates them for minijinja.
//!
//! minijinja has neither tuples nor Python's operators. Constructs with different semantics become calls of functions in
//! `super::operators`: `a ~ (1, 2)` becomes `__concat__(a, __tuple__(1, 2))`. The output is fully parenthesized, so that
//! Jinja2's precedence is kept. The grammar is the same as in `jinja2/parser.py`.

use super::{
    cursor::{Fault, Parser},
    lexer::{Token, TokenKind},
    methods,
};

/// Maximum number of attributes, filters, tests and calls of one value in a row. Each of them copies the text so far, so the
/// cost is quadratic.
const MAX_LINKS: usize = 500;

impl Parser<'_> {
    /// The target of an assignment or a loop: a name, `a.b` (with `dotted`), or a list of targets with or without
    /// parentheses.
    pub(super) fn target(&mut self, dotted: bool) -> Result<String, Fault> {
        let mut targets = Vec::new();
        let mut many = false;
        loop {
            let target = match self.take("(") {
                true => {
                    let inner = self.nested(|p| p.target(dotted))?;
                    self.expect(")")?;
                    format!("({inner})")
                }
                false => {
                    let mut name = self.name()?;
                    if ["true", "false", "none", "True", "False", "None"].contains(&name.as_str()) {
                        return Err(format!("can't assign to {name:?}"));
                    }
                    while dotted && self.take(".") {
                        name = format!("{name}.{}", self.name()?);
                    }
                    name
                }
            };
            targets.push(target);
            if !self.take(",") {
                break;
            }
            many = true;
            if self.is_word("in") || self.is_operator("=") || self.is_operator(")") {
                break;
            }
        }
        let all = targets.join(", ");
        Ok(if many && targets.len() == 1 { format!("{all},") } else { all })
    }

    /// An expression, or a tuple without parentheses. Without `conditions`, an `if` ends the expression.
    pub(super) fn tuple(&mut self, conditions: bool) -> Result<String, Fault> {
        self.tuple_until(conditions, false)
    }

    fn tuple_until(&mut self, conditions: bool, parenthesised: bool) -> Result<String, Fault> {
        let mut items = Vec::new();
        let mut many = false;
        loop {
            if self.peek().is_none() || self.is_operator(")") || self.is_word("recursive") {
                break;
            }
            items.push(if conditions { self.expression()? } else { self.or()? });
            if !self.take(",") {
                break;
            }
            many = true;
        }
        match (items.len(), many) {
            (1, false) => Ok(items.remove(0)),
            (0, _) if !parenthesised => Err(self.unexpected("an expression")),
            _ => Ok(format!("__tuple__({})", items.join(", "))),
        }
    }

    /// An expression, possibly with a conditional `a if b else c`.
    pub(super) fn expression(&mut self) -> Result<String, Fault> {
        self.nested(|p| {
            let mut value = p.or()?;
            while p.take_word("if") {
                let condition = p.or()?;
                value = match p.take_word("else") {
                    true => format!("({value} if {condition} else {})", p.expression()?),
                    false => format!("({value} if {condition})"),
                };
            }
            Ok(value)
        })
    }

    fn or(&mut self) -> Result<String, Fault> {
        self.logic("or", Self::and)
    }

    fn and(&mut self) -> Result<String, Fault> {
        self.logic("and", Self::not)
    }

    /// A chain of `and` or `or`. minijinja folds `'' and 1` to a boolean if all operands are literals. The call of
    /// `__value__` prevents that.
    fn logic(&mut self, word: &str, operand: fn(&mut Self) -> Result<String, Fault>) -> Result<String, Fault> {
        let mut parts = vec![operand(self)?];
        while self.take_word(word) {
            parts.push(operand(self)?);
        }
        Ok(match parts.len() {
            1 => parts.remove(0),
            _ => format!("(__value__({}) {word} {})", parts[0], parts[1..].join(&format!(" {word} "))),
        })
    }

    fn not(&mut self) -> Result<String, Fault> {
        if self.take_word("not") {
            return Ok(format!("(not {})", self.nested(Self::not)?));
        }
        self.compare()
    }

    fn compare(&mut self) -> Result<String, Fault> {
        let mut parts = vec![self.sum()?];
        loop {
            let operator = match self.peek() {
                Some(TokenKind::Operator(operator @ ("==" | "!=" | "<" | "<=" | ">" | ">="))) => *operator,
                Some(TokenKind::Name(name)) if name == "in" => "in",
                Some(TokenKind::Name(name)) if name == "not" => {
                    let next = self.tokens.get(self.at + 1).map(|token| &token.kind);
                    if !matches!(next, Some(TokenKind::Name(name)) if name == "in") {
                        break;
                    }
                    self.at += 1;
                    "not in"
                }
                _ => break,
            };
            self.at += 1;
            parts.push(quoted(operator));
            parts.push(self.sum()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { format!("__compare__({})", parts.join(", ")) })
    }

    fn binary(
        &mut self,
        operators: &[(&str, &str)],
        operand: fn(&mut Self) -> Result<String, Fault>,
    ) -> Result<String, Fault> {
        let mut left = operand(self)?;
        while let Some((_, function)) = operators.iter().find(|(operator, _)| self.is_operator(operator)) {
            self.at += 1;
            left = format!("{function}({left}, {})", operand(self)?);
        }
        Ok(left)
    }

    /// Sums and differences. A chain of `+` becomes one call, because minijinja limits the nesting of calls.
    fn sum(&mut self) -> Result<String, Fault> {
        let mut left = self.concat()?;
        loop {
            let mut parts = vec![left];
            while self.take("+") {
                parts.push(self.concat()?);
            }
            left = if parts.len() == 1 { parts.remove(0) } else { format!("__add__({})", parts.join(", ")) };
            if !self.take("-") {
                return Ok(left);
            }
            left = format!("__sub__({left}, {})", self.concat()?);
        }
    }

    fn concat(&mut self) -> Result<String, Fault> {
        let mut parts = vec![self.product()?];
        while self.take("~") {
            parts.push(self.product()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { format!("__concat__({})", parts.join(", ")) })
    }

    fn product(&mut self) -> Result<String, Fault> {
        self.binary(&[("*", "__mul__"), ("/", "__div__"), ("//", "__floordiv__"), ("%", "__mod__")], Self::power)
    }

    fn power(&mut self) -> Result<String, Fault> {
        self.binary(&[("**", "__pow__")], |p| p.unary(true))
    }

    fn unary(&mut self, filters: bool) -> Result<String, Fault> {
        let sign = if self.take("-") {
            "__neg__"
        } else if self.take("+") {
            "__pos__"
        } else {
            ""
        };
        let value = match sign {
            "" => self.primary()?,
            sign => format!("{sign}({})", self.nested(|p| p.unary(false))?),
        };
        let value = self.postfix(value)?;
        if filters { self.filters(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Result<String, Fault> {
        let Some(token) = self.peek() else { return Err(self.unexpected("an expression")) };
        match token {
            TokenKind::Name(name) => {
                self.at += 1;
                Ok(match name.as_str() {
                    "True" => "true".into(),
                    "False" => "false".into(),
                    "None" => "none".into(),
                    name => name.into(),
                })
            }
            TokenKind::Text(text) => {
                let mut text = text.clone();
                self.at += 1;
                while let Some(TokenKind::Text(more)) = self.peek() {
                    text += more;
                    self.at += 1;
                }
                Ok(quoted(&text))
            }
            TokenKind::Integer(digits) => {
                self.at += 1;
                Ok(digits.clone())
            }
            TokenKind::Float(number) => {
                self.at += 1;
                Ok(format!("__float__({})", quoted(number)))
            }
            TokenKind::Operator("(") => {
                self.at += 1;
                let inner = self.nested(|p| p.tuple_until(true, true))?;
                self.expect(")")?;
                Ok(inner)
            }
            TokenKind::Operator("[") => {
                self.at += 1;
                Ok(format!("[{}]", self.items("]", Self::expression)?.join(", ")))
            }
            TokenKind::Operator("{") => {
                self.at += 1;
                let pair = |p: &mut Self| {
                    let key = p.expression()?;
                    p.expect(":")?;
                    let key = if key.starts_with('\'') { key } else { format!("__key__({key})") };
                    Ok(format!("{key}: {}", p.expression()?))
                };
                Ok(format!("{{{}}}", self.items("}", pair)?.join(", ")))
            }
            TokenKind::Operator(_) => Err(self.unexpected("an expression")),
        }
    }

    fn postfix(&mut self, mut value: String) -> Result<String, Fault> {
        for _ in 0..MAX_LINKS {
            value = if self.take(".") {
                self.attribute(value)?
            } else if self.take("[") {
                self.subscript(&value)?
            } else if self.take("(") {
                format!("{value}({})", self.arguments()?.join(", "))
            } else {
                return Ok(value);
            }
        }
        Err(format!("a value may have at most {MAX_LINKS} attributes, subscripts and calls in a row"))
    }

    fn attribute(&mut self, value: String) -> Result<String, Fault> {
        if let Some(TokenKind::Integer(index)) = self.peek() {
            self.at += 1;
            return Ok(format!("__item__({value}, {index})"));
        }
        // The lexer reads the two indices of `a.0.1` as one float.
        if let Some(TokenKind::Float(indices)) = self.peek()
            && let Some((first, second)) = indices.split_once('.')
        {
            self.at += 1;
            return Ok(format!("__item__(__item__({value}, {first}), {second})"));
        }
        let name = self.name()?;
        if self.take("(") {
            let mut arguments = vec![value, quoted(&name)];
            arguments.extend(self.arguments()?);
            return Ok(format!("__method__({})", arguments.join(", ")));
        }
        if methods::is_name(&name) || name.starts_with('_') {
            return Ok(format!("__attribute__({value}, {})", quoted(&name)));
        }
        Ok(format!("{value}.{name}"))
    }

    fn subscript(&mut self, value: &str) -> Result<String, Fault> {
        let mut keys = Vec::new();
        let mut many = false;
        loop {
            if keys.is_empty() || !self.is_operator("]") {
                keys.push(self.key()?);
            }
            if !self.take(",") {
                break;
            }
            many = true;
        }
        self.expect("]")?;
        match (keys.len(), many, keys.swap_remove(0)) {
            (1, false, Key::One(key)) => Ok(format!("__item__({value}, {key})")),
            (1, false, Key::Slice(parts)) => Ok(format!("__slice__({value}, {})", parts.join(", "))),
            _ => Err("a subscript with several keys is not supported".into()),
        }
    }

    fn key(&mut self) -> Result<Key, Fault> {
        let absent = || "none".to_owned();
        let start = match self.is_operator(":") {
            true => absent(),
            false => {
                let key = self.expression()?;
                if !self.is_operator(":") {
                    return Ok(Key::One(key));
                }
                key
            }
        };
        let mut parts = [start, absent(), absent()];
        for part in &mut parts[1..] {
            if self.take(":") && !self.is_operator(":") && !self.is_operator("]") && !self.is_operator(",") {
                *part = self.expression()?;
            }
        }
        Ok(Key::Slice(parts))
    }

    /// The arguments of a call, up to and including the closing parenthesis. The opening one has been taken.
    pub(super) fn arguments(&mut self) -> Result<Vec<String>, Fault> {
        self.nested(|p| {
            p.items(")", |p| {
                for splat in ["**", "*"] {
                    if p.take(splat) {
                        return Ok(format!("{splat}{}", p.expression()?));
                    }
                }
                let named = matches!(p.tokens.get(p.at + 1), Some(Token { kind: TokenKind::Operator("="), .. }));
                if let (Some(TokenKind::Name(name)), true) = (p.peek(), named) {
                    p.at += 2;
                    return Ok(format!("{name}={}", p.expression()?));
                }
                p.expression()
            })
        })
    }

    /// Filters, tests and calls after a value.
    pub(super) fn filters(&mut self, mut value: String) -> Result<String, Fault> {
        for _ in 0..MAX_LINKS {
            value = if self.take("|") {
                format!("({value} | {})", self.filter()?)
            } else if self.take_word("is") {
                self.test(&value)?
            } else if self.take("(") {
                format!("{value}({})", self.arguments()?.join(", "))
            } else {
                return Ok(value);
            }
        }
        Err(format!("a value may have at most {MAX_LINKS} filters and tests in a row"))
    }

    /// A filter's name and arguments.
    pub(super) fn filter(&mut self) -> Result<String, Fault> {
        let name = self.name()?;
        if !self.take("(") {
            return Ok(name);
        }
        Ok(format!("{name}({})", self.arguments()?.join(", ")))
    }

    fn test(&mut self, value: &str) -> Result<String, Fault> {
        let negated = self.take_word("not");
        let name = self.name()?;
        let arguments = if self.take("(") {
            self.arguments()?
        } else {
            match self.peek() {
                Some(TokenKind::Name(word))
                    if ["else", "or", "and", "is", "if", "recursive"].contains(&word.as_str()) =>
                {
                    Vec::new()
                }
                Some(TokenKind::Name(word)) if word == "in" || word == "not" => Vec::new(),
                Some(TokenKind::Operator(operator)) if !["(", "[", "{"].contains(operator) => Vec::new(),
                None => Vec::new(),
                Some(_) => {
                    let argument = self.primary()?;
                    vec![self.postfix(argument)?]
                }
            }
        };
        let test = match arguments.is_empty() {
            true => format!("({value} is {name})"),
            false => format!("({value} is {name}({}))", arguments.join(", ")),
        };
        Ok(if negated { format!("(not {test})") } else { test })
    }
}

enum Key {
    One(String),
    Slice([String; 3]),
}

/// A string literal for minijinja.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('\'');
    for c in text.chars() {
        match c {
            '\'' => out.push_str("\\'"),
            '\\' => out.push_str("\\\\"),
            c => out.push(c),
        }
    }
    out.push('\'');
    out
}
