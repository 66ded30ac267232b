//! Structured output: OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_...` fields.

use overfill_kv::Grammar;
use serde::Deserialize;
use serde_json::{Value, json};

use super::fields::Fields;
use crate::GenerateError;

/// A grammar, and the field that has it.
pub type Structured = (&'static str, Grammar);

#[derive(Deserialize)]
struct ResponseFormat {
    r#type: String,
    json_schema: Option<JsonSchema>,
}

/// The schema's `name`, `description` and `strict` change nothing: every schema is enforced.
#[derive(Deserialize)]
struct JsonSchema {
    schema: Option<Value>,
}

#[derive(Deserialize)]
struct StructuredOutputs {
    json: Option<Value>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    structural_tag: Option<Value>,
}

/// Takes the fields. At most one grammar may be given.
pub fn take(fields: &mut Fields) -> Result<Option<Structured>, GenerateError> {
    let mut found = Vec::new();
    if let Some(format) = fields.take::<ResponseFormat>("response_format")? {
        found.extend(response_format(format)?.map(|grammar| ("response_format", grammar)));
    }
    if let Some(outputs) = fields.take::<StructuredOutputs>("structured_outputs")? {
        const FIELD: &str = "structured_outputs";
        let StructuredOutputs { json, json_object, regex, choice, grammar, structural_tag } = outputs;
        if structural_tag.is_some() {
            return Err(GenerateError::invalid(FIELD, "structured_outputs.structural_tag is not supported"));
        }
        let object = json_object.unwrap_or(false).then(any_object);
        let json = json.map(|json| schema(FIELD, json)).transpose()?;
        let others = [regex.map(Grammar::Regex), choice.map(Grammar::Choice), grammar.map(Grammar::Lark)];
        let before = found.len();
        found.extend([object, json].into_iter().chain(others).flatten().map(|grammar| (FIELD, grammar)));
        if found.len() == before {
            let kinds = "one of json, json_object, regex, choice and grammar";
            return Err(GenerateError::limit(FIELD, format!("an object with {kinds}"), "none of them"));
        }
    }
    let json = fields.take("guided_json")?.map(|json| schema("guided_json", json)).transpose()?;
    found.extend(json.map(|json| ("guided_json", json)));
    found.extend(fields.take("guided_regex")?.map(|regex| ("guided_regex", Grammar::Regex(regex))));
    found.extend(fields.take("guided_choice")?.map(|texts| ("guided_choice", Grammar::Choice(texts))));
    found.extend(fields.take("guided_grammar")?.map(|lark| ("guided_grammar", Grammar::Lark(lark))));
    if let [(first, _), (second, _), ..] = found[..] {
        let message = format!("{first} and {second}: only one form of structured output can be asked for");
        return Err(GenerateError::invalid(second, message));
    }
    Ok(found.pop())
}

fn response_format(ResponseFormat { r#type, json_schema }: ResponseFormat) -> Result<Option<Grammar>, GenerateError> {
    const FIELD: &str = "response_format";
    match (r#type.as_str(), json_schema) {
        ("text", _) => Ok(None),
        ("json_object", _) => Ok(Some(any_object())),
        ("json_schema", Some(JsonSchema { schema: Some(json) })) => schema(FIELD, json).map(Some),
        ("json_schema", Some(JsonSchema { schema: None })) => Ok(Some(any_object())),
        ("json_schema", None) => Err(GenerateError::invalid(FIELD, "response_format.json_schema is missing")),
        (other, _) => {
            Err(GenerateError::limit("response_format.type", "one of text, json_object and json_schema", other))
        }
    }
}

/// What an answer must match that is JSON without a schema.
pub fn any_object() -> Grammar {
    Grammar::Json(json!({"type": "object"}).to_string())
}

/// A schema, which may also be given as a text.
fn schema(field: &str, json: Value) -> Result<Grammar, GenerateError> {
    match json {
        Value::String(text) => Ok(Grammar::Json(text)),
        Value::Object(_) | Value::Bool(_) => Ok(Grammar::Json(json.to_string())),
        other => Err(GenerateError::limit(field, "a JSON schema, as an object or a text", other)),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;

    use super::*;

    fn taken(json: Value) -> Result<Option<Structured>, String> {
        let mut fields = Fields::parse(&Bytes::from(json.to_string())).unwrap();
        let taken = take(&mut fields).map_err(|e| e.to_string());
        assert!(taken.is_err() || fields.finish().is_ok(), "every field is taken");
        taken
    }

    #[test]
    fn every_form_gives_its_grammar() {
        let schema = json!({"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}});
        let text = schema.to_string();
        assert!(text.find("\"z\"") < text.find("\"a\""), "the order of properties is kept");
        let json = |field| Ok(Some((field, Grammar::Json(text.clone()))));
        let format =
            |json_schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": json_schema}});
        assert_eq!(taken(format(json!({"name": "n", "strict": true, "schema": schema}))), json("response_format"));
        assert_eq!(taken(json!({"structured_outputs": {"json": schema}})), json("structured_outputs"));
        assert_eq!(taken(json!({"guided_json": schema})), json("guided_json"));
        assert_eq!(taken(json!({"guided_json": text})), json("guided_json"));
        let object = Ok(Some(("response_format", any_object())));
        assert_eq!(taken(json!({"response_format": {"type": "json_object"}})), object);
        assert_eq!(taken(format(json!({"name": "n"}))), object);
        let choice = Grammar::Choice(vec!["a".into(), "b".into()]);
        assert_eq!(taken(json!({"guided_choice": ["a", "b"]})), Ok(Some(("guided_choice", choice.clone()))));
        let outputs = |kind: &str, value: Value| json!({"structured_outputs": {kind: value}});
        assert_eq!(taken(outputs("choice", json!(["a", "b"]))), Ok(Some(("structured_outputs", choice))));
        let lark = Grammar::Lark("start: \"a\"".into());
        assert_eq!(taken(outputs("grammar", json!("start: \"a\""))), Ok(Some(("structured_outputs", lark))));
        for nothing in [json!({}), json!({"response_format": {"type": "text"}, "guided_json": null})] {
            assert_eq!(taken(nothing), Ok(None));
        }
    }

    #[test]
    fn refusals_name_the_place() {
        let refused = |json| taken(json).unwrap_err();
        assert_eq!(
            refused(json!({"response_format": {"type": "xml"}})),
            "response_format.type must be one of text, json_object and json_schema, got xml"
        );
        assert!(refused(json!({"response_format": {"type": "json_schema"}})).ends_with("json_schema is missing"));
        assert!(refused(json!({"guided_json": 3})).starts_with("guided_json must be a JSON schema"));
        assert!(refused(json!({"guided_choice": "a"})).starts_with("guided_choice: invalid type"));
        assert!(refused(json!({"structured_outputs": {}})).contains("one of json, json_object, regex"));
        assert!(refused(json!({"structured_outputs": {"structural_tag": {}}})).ends_with("is not supported"));
        let both = refused(json!({"guided_regex": "a", "response_format": {"type": "json_object"}}));
        assert!(both.starts_with("response_format and guided_regex: only one"), "{both}");
    }
}
