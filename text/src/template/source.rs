//! Translates a Jinja2 template for minijinja, tag by tag.

use super::{
    cursor::{Fault, Parser},
    expression::quoted,
    lexer,
};

/// Maximum size of a template. The compiler recurses, and templates of this size fit its stack.
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// Translates `source` to a template that has the same output with minijinja as `source` with Jinja2.
pub(super) fn translate(source: &str) -> Result<String, Fault> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(format!("a template must have at most {MAX_SOURCE_BYTES} bytes, got {}", source.len()));
    }
    // Jinja2 normalizes line ends to \n.
    let source = &*source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() * 2);
    let mut rest = source;
    let fault = |rest: &str, fault: Fault| {
        let line = source[..source.len() - rest.len()].matches('\n').count() + 1;
        format!("line {line}: {fault}")
    };
    while let Some(start) = rest.find('{').filter(|at| at + 1 < rest.len()) {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        match tag.as_bytes()[1] {
            b'#' => {
                let end = tag.find("#}").ok_or_else(|| fault(tag, "a comment is not closed".into()))?;
                // The signs of a comment strip the whitespace around it, so they are kept.
                let inner = &tag[2..end];
                let open = if inner.starts_with(['-', '+']) { &inner[..1] } else { "" };
                let close = if inner.len() > open.len() && inner.ends_with(['-', '+']) {
                    &inner[inner.len() - 1..]
                } else {
                    ""
                };
                out.push_str(&format!("{{#{open} {close}#}}"));
                rest = &tag[end + 2..];
            }
            b'{' => {
                let (open, inner) = sign(&tag[2..]);
                let (tokens, close, length) = lexer::tag(inner, "}}").map_err(|e| fault(tag, e))?;
                let mut parser = Parser::new(&tokens);
                let value = parser.tuple(true).and_then(|value| parser.end().map(|()| value));
                out.push_str(&format!("{{{{{open} {} {close}}}}}", value.map_err(|e| fault(tag, e))?));
                rest = &inner[length..];
            }
            b'%' => {
                let (open, inner) = sign(&tag[2..]);
                if let Some(length) = raw(inner) {
                    let block = &tag[..2 + open.len() + length];
                    // minijinja drops a line end after `{% raw %}`, Jinja2 does not.
                    match block.split_once("%}").filter(|(tag, body)| body.starts_with('\n') && !tag.ends_with('-')) {
                        Some((tag, body)) => out.extend([tag, "%}\n", body]),
                        None => out.push_str(block),
                    }
                    rest = &inner[length..];
                    continue;
                }
                let (tokens, close, length) = lexer::tag(inner, "%}").map_err(|e| fault(tag, e))?;
                let mut parser = Parser::new(&tokens);
                let statement = statement(&mut parser).and_then(|text| parser.end().map(|()| text));
                out.push_str(&format!("{{%{open} {} {close}%}}", statement.map_err(|e| fault(tag, e))?));
                rest = &inner[length..];
            }
            _ => {
                out.push('{');
                rest = &tag[1..];
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn sign(inner: &str) -> (&str, &str) {
    inner.split_at(usize::from(inner.starts_with(['-', '+'])))
}

/// Length of a raw block from after its `{%` to the end of its `endraw` tag. Its content is not translated. `None` if
/// `inner` does not begin a raw block.
fn raw(inner: &str) -> Option<usize> {
    let after = inner.trim_start().strip_prefix("raw")?.trim_start();
    let body = after.strip_prefix(['-', '+']).unwrap_or(after).strip_prefix("%}")?;
    let mut from = inner.len() - body.len();
    loop {
        let at = from + inner[from..].find("{%")?;
        let (_, end) = sign(&inner[at + 2..]);
        if let Some(end) = end.trim_start().strip_prefix("endraw") {
            let end = end.trim_start();
            if let Some(end) = end.strip_prefix(['-', '+']).unwrap_or(end).strip_prefix("%}") {
                return Some(inner.len() - end.len());
            }
        }
        from = at + 2;
    }
}

fn statement(p: &mut Parser<'_>) -> Result<String, Fault> {
    let word = p.name()?;
    Ok(match word.as_str() {
        // transformers' tag for the assistant's text, used for training masks. It prints nothing itself.
        // An `if` rather than a `with`, because minijinja can't `break` out of the scope of a `with`.
        "generation" => "if true".into(),
        "endgeneration" | "endautoescape" => "endif".into(),
        "if" | "elif" => {
            let text = format!("{word} {}", p.tuple(false)?);
            p.take(":");
            text
        }
        "for" => {
            let target = p.target(false)?;
            if !p.take_word("in") {
                return Err("a loop needs \"in\"".into());
            }
            let mut text = format!("for {target} in __iterate__({})", p.tuple(false)?);
            if p.take_word("if") {
                text += &format!(" if {}", p.expression()?);
            }
            if p.take_word("recursive") {
                text += " recursive";
            }
            p.take(":");
            text
        }
        "set" => {
            let target = p.target(true)?;
            if p.take("=") {
                match p.tuple(true)? {
                    value if target.contains('.') => format!("set {target} = __stored__({value})"),
                    // Unpacking also works on the characters of a string.
                    value if target.contains(',') => format!("set {target} = __iterate__({value})"),
                    value => format!("set {target} = {value}"),
                }
            } else {
                format!("set {target}{}", filters(p)?)
            }
        }
        "with" => {
            let (mut targets, mut values) = (Vec::new(), Vec::new());
            while p.end().is_err() {
                targets.push(p.name()?);
                p.expect("=")?;
                values.push(p.expression()?);
                if !p.take(",") {
                    break;
                }
            }
            // All values are evaluated before any of the new names is bound, so the names are bound at once.
            match targets.len() {
                0 => "with".into(),
                1 => format!("with {} = {}", targets[0], values[0]),
                _ => format!("with ({}) = [{}]", targets.join(", "), values.join(", ")),
            }
        }
        "filter" => format!("filter {}{}", p.filter()?, filters(p)?),
        "macro" => {
            let name = p.name()?;
            p.expect("(")?;
            format!("macro {name}({})", p.arguments()?.join(", "))
        }
        "call" => {
            let signature = if p.take("(") { format!("({})", p.arguments()?.join(", ")) } else { String::new() };
            format!("call{signature} {}", p.expression()?)
        }
        "block" => {
            let name = p.name()?;
            // `scoped` and `required` have no effect, because there is no template inheritance.
            while p.take_word("scoped") || p.take_word("required") {}
            format!("block {name}")
        }
        "endblock" => {
            let _ = p.name();
            word
        }
        "autoescape" => {
            p.expression()?;
            "if true".into()
        }
        "else" | "endif" | "endfor" | "endset" | "endwith" | "endfilter" | "endmacro" | "endcall" | "break"
        | "continue" => word,
        "include" | "extends" | "import" | "from" => {
            // There are no other templates. This is an error only when the tag is executed.
            while p.end().is_err() {
                p.skip();
            }
            format!("set _ = __no_loader__({})", quoted(&word))
        }
        other => return Err(format!("unknown tag {other:?}")),
    })
}

/// Parses the filters of a block: `| upper | trim`.
fn filters(p: &mut Parser<'_>) -> Result<String, Fault> {
    let mut text = String::new();
    while p.take("|") {
        text += &format!(" | {}", p.filter()?);
    }
    Ok(text)
}
