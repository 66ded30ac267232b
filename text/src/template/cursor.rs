//! Token cursor of the expression and statement parsers.

use super::lexer::{Token, TokenKind};

/// A syntax error of a template, as a message.
pub(super) type Fault = String;

/// Maximum nesting depth of expressions. Deeper expressions could overflow the stack.
const MAX_DEPTH: usize = 200;

/// Reads the tokens of one tag.
pub(super) struct Parser<'t> {
    /// Tokens of the tag.
    pub(super) tokens: &'t [Token],
    /// Index of the next token.
    pub(super) at: usize,
    depth: usize,
}

impl<'t> Parser<'t> {
    pub(super) fn new(tokens: &'t [Token]) -> Self {
        Self { tokens, at: 0, depth: 0 }
    }

    pub(super) fn peek(&self) -> Option<&'t TokenKind> {
        self.tokens.get(self.at).map(|token| &token.kind)
    }

    pub(super) fn is_operator(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(TokenKind::Operator(found)) if *found == operator)
    }

    /// Whether the next token is this word.
    pub(super) fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Some(TokenKind::Name(found)) if found == word)
    }

    /// Takes the operator if it is the next token.
    pub(super) fn take(&mut self, operator: &str) -> bool {
        let found = self.is_operator(operator);
        self.at += usize::from(found);
        found
    }

    /// Takes the word if it is the next token.
    pub(super) fn take_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        self.at += usize::from(found);
        found
    }

    pub(super) fn expect(&mut self, operator: &str) -> Result<(), Fault> {
        if self.take(operator) { Ok(()) } else { Err(self.unexpected(&format!("{operator:?}"))) }
    }

    pub(super) fn unexpected(&self, wanted: &str) -> Fault {
        match self.tokens.get(self.at) {
            Some(token) => format!("expected {wanted}, got {:?}", token.text()),
            None => format!("expected {wanted}, got the end of the tag"),
        }
    }

    /// Takes a name.
    pub(super) fn name(&mut self) -> Result<String, Fault> {
        match self.peek() {
            Some(TokenKind::Name(name)) => {
                self.at += 1;
                Ok(name.clone())
            }
            _ => Err(self.unexpected("a name")),
        }
    }

    /// Skips a token.
    pub(super) fn skip(&mut self) {
        self.at += 1;
    }

    /// Returns an error if tokens are left.
    pub(super) fn end(&self) -> Result<(), Fault> {
        if self.at == self.tokens.len() { Ok(()) } else { Err(self.unexpected("the end of the tag")) }
    }

    pub(super) fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T, Fault>) -> Result<T, Fault> {
        if self.depth == MAX_DEPTH {
            return Err(format!("expressions may be nested {MAX_DEPTH} deep"));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// Parses items separated by commas up to `close`. A trailing comma is allowed.
    pub(super) fn items(
        &mut self,
        close: &str,
        item: impl Fn(&mut Self) -> Result<String, Fault>,
    ) -> Result<Vec<String>, Fault> {
        let mut items = Vec::new();
        while !self.take(close) {
            if !items.is_empty() {
                self.expect(",")?;
                if self.take(close) {
                    break;
                }
            }
            items.push(item(self)?);
        }
        Ok(items)
    }
}
