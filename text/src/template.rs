//! Chat templates, rendered as Hugging Face's transformers renders them.
//!
//! A template is a program, and comes from whoever made the model: one that loops, or writes without end, ends with an
//! error, and one that nests without end does not end the process. What it holds in variables is not limited: minijinja
//! has no place to do so.

use std::{collections::BTreeMap, io, thread, time::SystemTime};

use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    value::{Kwargs, ViaDeserialize},
};
use serde::Serialize as _;

use crate::{ChatMessage, TextError};

const NAME: &str = "chat_template";

/// Instructions that one rendering may take. Published templates take up to about a hundred for each message.
const FUEL: u64 = 2_000_000;

/// A prompt may have this many bytes, and [`OUTPUT_PER_BYTE`] more for each byte of the messages.
const OUTPUT_BYTES: usize = 1 << 20;
const OUTPUT_PER_BYTE: usize = 16;

/// Of the thread that renders. A value within a value within a value is dropped, and printed, by recursion: as deep as
/// the fuel lasts, that fits. Only what is used of it becomes memory.
const STACK_BYTES: usize = 256 << 20;

/// A compiled template and the special tokens that it may name.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    pub(crate) fn compile(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, SystemTime::now()));
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| TextError::Invalid { file: "chat template", reason: e.to_string() })?;
        Ok(Self { environment, special_tokens })
    }

    pub(crate) fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, TextError> {
        thread::scope(|scope| {
            let render = || self.render_here(messages, add_generation_prompt);
            let rendering =
                thread::Builder::new().name(NAME.into()).stack_size(STACK_BYTES).spawn_scoped(scope, render);
            let rendering = rendering.map_err(|e| TextError::Template(format!("starting a thread for it: {e}")))?;
            rendering.join().unwrap_or_else(|_| Err(TextError::Template("it failed".into())))
        })
    }

    fn render_here(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, TextError> {
        let template = self.environment.get_template(NAME).map_err(|e| TextError::Template(e.to_string()))?;
        let special = Value::from_serialize(&self.special_tokens);
        let given: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        let mut out = Limited { bytes: Vec::new(), limit: OUTPUT_BYTES + OUTPUT_PER_BYTE * given, full: false };
        let context = context! {
            messages => messages,
            tools => (),
            documents => (),
            add_generation_prompt => add_generation_prompt,
            ..special
        };
        let rendered = template.render_captured_to(context, &mut out).map(drop);
        let Limited { bytes, limit, full } = out;
        rendered.map_err(|e| {
            TextError::Template(match e.kind() {
                _ if full => format!("a prompt must be at most {limit} bytes for {given} bytes of messages"),
                ErrorKind::OutOfFuel => format!("it must take at most {FUEL} steps"),
                // The detail of `raise_exception` is the message; the place in the template helps nobody but its author.
                _ => e.detail().map_or_else(|| e.to_string(), str::to_owned),
            })
        })?;
        String::from_utf8(bytes).map_err(|e| TextError::Template(e.to_string()))
    }
}

/// What a template writes, up to a limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
    full: bool,
}

impl io::Write for Limited {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if more.len() > self.limit - self.bytes.len() {
            self.full = true;
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Python's `json.dumps(value, ensure_ascii=False)`: minijinja's own filter escapes for HTML and leaves out the spaces.
fn to_json(ViaDeserialize(value): ViaDeserialize<serde_json::Value>, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = " ".repeat(n.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonJson)).map_err(failed)?,
    }
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(text))
}

struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// transformers marks the assistant's text with `{% generation %}` for training masks. It prints nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Behind the two characters that open it: `{%}` does not close itself.
        let Some(length) = rest[start + 2..].find("%}") else { break };
        let tag = &rest[start..start + length + 4];
        out.push_str(&rest[..start]);
        match tag[2..tag.len() - 2].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace()) {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + length + 4..];
    }
    out.push_str(rest);
    out
}

/// The directives that templates use, in UTC.
fn strftime(format: &str, now: SystemTime) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", second_of_day / 3600),
            Some('M') => out += &format!("{:02}", second_of_day / 60 % 60),
            Some('S') => out += &format!("{:02}", second_of_day % 60),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Days since 1970 to (year, month, day), after Howard Hinnant's `civil_from_days`.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn render(source: &str) -> Result<String, TextError> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate::compile(source, tokens)?.render(&[ChatMessage::new("user", "a \"<b>\" é")], true)
    }

    #[test]
    fn whitespace_is_trimmed_as_transformers_does() {
        let source = "{{ bos_token }}{% for m in messages %}\n  {% if true %}\n[{{ m.role }}]\n  {% endif %}\n{% endfor %}\nend\n";
        assert_eq!(render(source).unwrap(), "<s>[user]\nend");
    }

    #[test]
    fn python_methods_json_and_absent_values() {
        assert_eq!(render("{{ messages[0].content.strip().split(' ')[0].upper() }}").unwrap(), "A");
        assert_eq!(render("{{ messages[0] | tojson }}").unwrap(), r#"{"content": "a \"<b>\" é", "role": "user"}"#);
        assert_eq!(render("{{ [1, 2] | tojson(indent=2) }}").unwrap(), "[\n  1,\n  2\n]");
        assert_eq!(render("{% if tools is none and eos_token is not defined %}ok{% endif %}").unwrap(), "ok");
        assert_eq!(render("{%- generation -%} x {%- endgeneration -%}").unwrap(), "x");
        assert!(render("{%}").is_err() && render("{%%}").is_err());
    }

    #[test]
    fn a_raised_exception_is_the_message() {
        let e = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(e.to_string(), "chat template: roles must alternate");
    }

    #[test]
    fn a_template_that_does_not_end_is_an_error() {
        let fault = |source: &str| render(source).unwrap_err().to_string();
        let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert_eq!(fault(loops), "chat template: it must take at most 2000000 steps");
        let writes = "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}";
        let limit = OUTPUT_BYTES + OUTPUT_PER_BYTE * 14;
        assert_eq!(
            fault(writes),
            format!("chat template: a prompt must be at most {limit} bytes for 14 bytes of messages")
        );
        assert_eq!(fault("{{ 'x' * 99999999 }}"), fault(writes));
        for recursion in ["{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'chat_template' %}"] {
            assert!(!fault(recursion).is_empty());
        }
    }

    /// minijinja 2.24 panics when an empty list is turned round, as for a system message alone by some templates.
    #[test]
    fn a_template_that_panics_is_an_error_at_most() {
        // Either is right: the next version may give the empty list.
        match render("{% for m in messages[1:][::-1] %}{{ m.role }}{% endfor %}") {
            Ok(text) => assert_eq!(text, ""),
            Err(e) => assert_eq!(e.to_string(), "chat template: it failed"),
        }
    }

    /// As deep as the fuel lasts: what is inside is dropped, printed and compared by recursion.
    #[test]
    fn a_template_that_nests_does_not_end_the_process() {
        let nest = "{% set ns = namespace(a=[], b=[]) %}{% for i in range(99999) %}\
                    {% set ns.a = [ns.a] %}{% set ns.b = [ns.b] %}{% endfor %}";
        let objects =
            "{% set ns = namespace(a={}) %}{% for i in range(99999) %}{% set ns.a = {'a': ns.a} %}{% endfor %}";
        assert_eq!(render(&format!("{nest}done")).unwrap(), "done");
        assert_eq!(render(&format!("{objects}done")).unwrap(), "done");
        for using in
            ["{{ ns.a }}", "{{ ns.a == ns.b }}", "{{ ns.a | tojson }}", "{{ ns.a ~ '' }}", "{{ [ns.a] | sort }}"]
        {
            let _ = render(&format!("{nest}{using}"));
            let _ = render(&format!("{objects}{using}"));
        }
    }

    #[test]
    fn dates() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_210_096);
        assert_eq!(strftime("%d %b %Y %A %H:%M:%S %%", at), "29 Feb 2024 Thursday 12:34:56 %");
    }
}
