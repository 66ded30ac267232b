//! Renders chat templates with the same output as Hugging Face's transformers.
//!
//! transformers runs Jinja2 in an immutable sandbox. This module translates a template for minijinja (`source`,
//! `expression`) and renders it over values with Python's semantics (`values`, `operators`, `methods`, `filters`,
//! `predicates`). `text/tests/jinja/` holds the expected output of transformers for more than a thousand small templates.
//!
//! Differences from Jinja2:
//! - Results of `map`, `select` and similar filters can be iterated more than once and have a length.
//! - Methods of text that is marked as safe return plain text. `autoescape` has no effect.
//! - Integers have 128 bits. 1 and true are two different keys of a dictionary. `pprint` does not break lines.
//! - Bodies of `generation`, `set` and `filter` have no scope of their own. `break` can't leave a `with`.
//! - Not supported: `varargs` and `kwargs` of macros, attribute names of `groupby` results, `print`, `self`, `urlize`,
//!   `lipsum` and `random`.
//!
//! Templates are untrusted programs. A template with unbounded loops, output or nesting ends with an error. The memory that
//! functions allocate for intermediate results is bounded (`values::charge`). Plain text of the template that `set` blocks
//! and macros capture repeatedly is bounded only by the limit of instructions.

mod arguments;
mod continuation;
mod cursor;
mod expression;
mod filters;
mod format;
mod json;
mod lexer;
mod methods;
mod objects;
mod operators;
mod predicates;
mod source;
mod texts;
mod time;
mod values;

use std::{collections::BTreeMap, io, thread, time::SystemTime};

use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use crate::TextError;

const NAME: &str = "chat_template";

/// Instruction limit of one rendering, plus [`FUEL_PER_MESSAGE`] for each message. A template that loops over all messages
/// for each message takes about 30 instructions per pair.
const FUEL: u64 = 4_000_000;
const FUEL_PER_MESSAGE: u64 = 100_000;
/// Upper bound of the instruction limit for any number of messages: a few seconds.
const MAX_FUEL: u64 = 400_000_000;

/// Maximum size of a prompt in bytes, plus [`OUTPUT_PER_BYTE`] for each byte of the messages, tools and documents.
const OUTPUT_BYTES: usize = 1 << 20;
const OUTPUT_PER_BYTE: usize = 16;

/// Stack size of the threads that compile and render. Compiling templates and dropping and printing values recurse. The
/// limits on template size and nesting depth keep the recursion within this stack. Only used pages of it take memory.
const STACK_BYTES: usize = 256 << 20;

/// The variables of one rendering of a chat template.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// The messages: objects with `role`, `content`, `tool_calls` and other fields that the template supports. Keys keep
    /// the client's order.
    pub messages: &'a [Json],
    /// Tool definitions in the format of OpenAI's API.
    pub tools: Option<&'a Json>,
    /// Documents for retrieval-augmented generation.
    pub documents: Option<&'a Json>,
    /// Whether the prompt ends with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends with the text of the last message, for the model to go on with.
    pub continue_final_message: bool,
    /// Other variables, such as `enable_thinking`.
    pub variables: Option<&'a Map<String, Json>>,
}

impl<'a> ChatInput<'a> {
    /// An input without tools, documents and other variables.
    pub fn new(messages: &'a [Json], add_generation_prompt: bool) -> Self {
        Self {
            messages,
            tools: None,
            documents: None,
            add_generation_prompt,
            continue_final_message: false,
            variables: None,
        }
    }

    /// Total size of the texts in messages, tools and documents, in bytes.
    pub fn text_bytes(&self) -> usize {
        self.messages.iter().chain(self.tools).chain(self.documents).map(text_bytes).sum()
    }
}

/// A compiled template and the special tokens that it can use as variables.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    pub(crate) fn compile(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, TextError> {
        let invalid = |reason: String| TextError::Invalid { file: "chat template", reason };
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_formatter(|out, _, value| Ok(out.write_str(&values::text(value)?)?));
        environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
            Err(values::fault(values::text(message)?))
        });
        environment.add_function("strftime_now", |format: String| time::strftime(&format, SystemTime::now()));
        operators::register(&mut environment);
        objects::register(&mut environment);
        filters::register(&mut environment);
        predicates::register(&mut environment);
        let compiled = on_a_large_stack(|| {
            let translated = source::translate(source)?;
            environment.add_template_owned(NAME, translated).map_err(|e| e.to_string())
        });
        compiled.map_err(invalid)?.map_err(invalid)?;
        Ok(Self { environment, special_tokens })
    }

    pub(crate) fn render(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        let render =
            |input: &ChatInput<'_>| on_a_large_stack(|| self.render_here(input)).map_err(TextError::Template)?;
        match input.continue_final_message {
            true => continuation::render(input, render),
            false => render(input),
        }
    }

    fn render_here(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        let ChatInput { messages, tools, documents, add_generation_prompt, continue_final_message: _, variables } =
            input;
        let fuel = (FUEL + FUEL_PER_MESSAGE.saturating_mul(messages.len() as u64)).min(MAX_FUEL);
        // A clone shares the compiled template.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let template = environment.get_template(NAME).map_err(|e| TextError::Template(e.to_string()))?;
        let given = input.text_bytes();
        let mut out = Limited { bytes: Vec::new(), limit: OUTPUT_BYTES + OUTPUT_PER_BYTE * given, full: false };
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, token) in &self.special_tokens {
            context.insert(name, Value::from(token.as_str()));
        }
        for (name, value) in variables.iter().flat_map(|variables| variables.iter()) {
            context.insert(name, Value::from_serialize(value));
        }
        context.insert("messages", Value::from_serialize(messages));
        context.insert("tools", Value::from_serialize(tools));
        context.insert("documents", Value::from_serialize(documents));
        context.insert("add_generation_prompt", Value::from(*add_generation_prompt));
        let rendered = template.render_captured_to(context, &mut out).map(drop);
        let Limited { bytes, limit, full } = out;
        rendered.map_err(|e| {
            TextError::Template(match e.kind() {
                _ if full => format!("a prompt must be at most {limit} bytes for {given} bytes of messages"),
                ErrorKind::OutOfFuel => format!("it must take at most {fuel} steps"),
                // The detail of `raise_exception` is its message. The position in the template is of use only to its author.
                _ => e.detail().map_or_else(|| e.to_string(), str::to_owned),
            })
        })?;
        String::from_utf8(bytes).map_err(|e| TextError::Template(e.to_string()))
    }
}

/// Runs `work` on a thread with a stack of [`STACK_BYTES`]. Returns an error if the thread can't be started or panics.
fn on_a_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(NAME.into()).stack_size(STACK_BYTES).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| format!("starting a thread for the template: {e}"))?;
        thread.join().map_err(|_| "the template engine panicked".into())
    })
}

/// Total size of the strings and keys in a value, in bytes.
fn text_bytes(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(text_bytes).sum(),
        Json::Object(entries) => entries.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        Json::Null | Json::Bool(_) | Json::Number(_) => 0,
    }
}

/// Collects a template's output up to a limit.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render_over(source: &str, messages: &[Json]) -> Result<String, TextError> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate::compile(source, tokens)?.render(&ChatInput::new(messages, true))
    }

    fn render(source: &str) -> Result<String, TextError> {
        render_over(source, &[json!({"role": "user", "content": "a \"<b>\" é"})])
    }

    #[test]
    fn special_tokens_and_what_is_absent() {
        assert_eq!(render("{{ bos_token }}{{ messages[0].role }}{{ add_generation_prompt }}").unwrap(), "<s>userTrue");
        assert_eq!(render("{% if tools is none and eos_token is not defined %}ok{% endif %}").unwrap(), "ok");
        for source in ["{%}", "{%%}", "{{", "{% if", "{# x", "{{ 'x }}", "{{ (1 }}", "{% for x %}{% endfor %}"] {
            assert!(render(source).is_err(), "{source}");
        }
    }

    #[test]
    fn objects_keep_their_order() {
        let source = "{{ messages[0] | tojson }}{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{% endfor %}";
        let got = render_over(source, &[json!({"role": "user", "content": "q"})]);
        assert_eq!(got.unwrap(), r#"{"role": "user", "content": "q"}ba"#);
    }

    #[test]
    fn values_print_as_in_python() {
        let source = "{{ 'é' | tojson(ensure_ascii=True) }} {{ [1, 2] | tojson(separators=(',', ':')) }} {{ 1e30 | tojson }} \
                      {{ (1, 2) }} {{ 'abc'[::-1] }}";
        assert_eq!(render(source).unwrap(), "\"\\u00e9\" [1,2] 1e+30 (1, 2) cba");
    }

    #[test]
    fn tools_that_are_absent_are_not_iterable() {
        let source = "{%- if tools is iterable and tools | length > 0 %}tools{%- else %}none{%- endif %}:{{ messages[0].content }}";
        assert_eq!(render_over(source, &[json!({"role": "user", "content": "q"})]).unwrap(), "none:q");
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
        let fuel = FUEL + FUEL_PER_MESSAGE;
        assert_eq!(fault(loops), format!("chat template: it must take at most {fuel} steps"));
        let writes = "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}";
        let given = 14 + "rolecontent".len();
        let limit = OUTPUT_BYTES + OUTPUT_PER_BYTE * given;
        assert_eq!(
            fault(writes),
            format!("chat template: a prompt must be at most {limit} bytes for {given} bytes of messages")
        );
        assert_eq!(fault("{{ 'x' * 9999999 }}"), fault(writes));
        assert!(fault("{{ 'x' * 99999999999 }}").contains("a repetition must have at most"));
        for recursion in ["{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'chat_template' %}"] {
            assert!(!fault(recursion).is_empty());
        }
        // A long chain of operators does not exceed the limits.
        let chain = format!("{{{{ 0{} }}}}{{{{ (no{}) is none }}}}", " + 1".repeat(1000), " or none".repeat(1000));
        assert_eq!(render(&chain).unwrap(), "1000True");
        let deep = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
        assert!(fault(&deep).contains("nested"), "{}", fault(&deep));
    }

    #[test]
    fn what_a_template_makes_on_its_way_is_bounded() {
        let doubled = format!("{{{{ {}0 or 1{} }}}}", "[".repeat(30), "] or 1".repeat(30));
        let _ = render(&doubled);
        let compared = format!("{{{{ {}1{} }}}}", "1 < (".repeat(30), " < 1) < 1".repeat(30));
        let _ = render(&compared);
        for source in [
            "{{ 'a'.ljust(1000000, 'x' * 16000000) }}",
            "{{ ('a' * 1000000).replace('a', 'b' * 1000000) | length }}",
            "{{ ('x' * 1000000).join(['a'] * 1000000) | length }}",
            "{{ ('a\n' * 1000000) | indent('x' * 1000000) | length }}",
            "{{ ('\t' * 16000000).expandtabs(1000) | length }}",
            "{{ (['x' * 16000000] * 1000) | tojson | length }}",
            "{{ ('%(a)30000s' * 1000000) % {'a': 1} }}",
            "{{ range(100000) | unique | list | length }}",
            "{% for i in range(9999) %}{% set x = [0] * 16000000 %}{% endfor %}",
            "{{ {[1]: 2} }}",
            "{{ (-2) ** 127 // -1 }}",
        ] {
            assert!(render(source).is_err(), "{source}");
        }
        // These are deeply nested in the compiled template, not in the source.
        for source in [
            format!("{{{{ a{} }}}}", ".a".repeat(200_000)),
            format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(50_000)),
        ] {
            let _ = render(&source);
        }
    }

    /// Nested values are dropped, printed and compared recursively.
    #[test]
    fn a_template_that_nests_does_not_end_the_process() {
        let nest = "{% set ns = namespace(a=[], b=[]) %}{% for i in range(99999) %}\
                    {% set ns.a = [ns.a] %}{% set ns.b = [ns.b] %}{% endfor %}";
        let objects =
            "{% set ns = namespace(a={}) %}{% for i in range(99999) %}{% set ns.a = {'a': ns.a} %}{% endfor %}";
        for source in [nest, objects] {
            assert!(render(source).unwrap_err().to_string().ends_with("values may be nested 500 deep"));
        }
        // A value that shares its parts can be larger than any memory without being deep.
        let nest = "{% set ns = namespace(a=[], b=[]) %}{% for i in range(60) %}\
                    {% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}";
        let objects =
            "{% set ns = namespace(a={}) %}{% for i in range(60) %}{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}";
        for using in ["{{ ns.a }}", "{{ ns.a == ns.b }}", "{{ ns.a | tojson }}"] {
            assert!(render(&format!("{nest}{using}")).is_err(), "{using}");
            assert!(render(&format!("{objects}{using}")).is_err(), "{using}");
        }
    }
}
