//! A client of the router's gRPC API: a streamed chat, an answer that matches a JSON schema, and a call of a function.
//!
//!     cargo run -p overfill-example -- http://localhost:50051 MODEL

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use overfill_proto::v1::{
    self, answer_part::Part, generate_event::Event, generate_request::Prompt, grammar::Kind,
    router_client::RouterClient, tool_choice::Choice,
};
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

fn place() -> Value {
    let properties = json!({
        "city": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 9999},
    });
    json!({"type": "object", "additionalProperties": false, "properties": properties, "required": ["city", "inhabitants"]})
}

/// Asks for an answer and passes each part to `each` as it arrives.
async fn chat(
    router: &mut RouterClient<Channel>,
    model: &str,
    chat: v1::Messages,
    grammar: Option<v1::Grammar>,
    mut each: impl FnMut(Part) -> Result<()>,
) -> Result<()> {
    let request = v1::GenerateRequest {
        model: model.to_owned(),
        prompt: Some(Prompt::Messages(chat)),
        // Without this message, the temperature is 1 and the seed is random.
        sampling: Some(v1::SamplingParams {
            temperature: 0.7,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 1,
            grammar,
            ..Default::default()
        }),
        max_tokens: 900,
        deadline_seconds: 60.0,
        ..Default::default()
    };
    let mut events = router.generate(request).await?.into_inner();
    loop {
        let event = events.message().await?.and_then(|event| event.event);
        let (parts, finished) = match event.context("the stream ended without the end of the answer")? {
            Event::PromptLogprobs(_) => continue,
            Event::Token(token) => (token.parts, None),
            Event::Finished(finished) => (finished.parts, Some(finished.completion_tokens)),
        };
        parts.into_iter().filter_map(|part| part.part).try_for_each(&mut each)?;
        if let Some(tokens) = finished {
            eprintln!("({tokens} tokens)");
            return Ok(());
        }
    }
}

fn question(text: &str) -> v1::Messages {
    let message = v1::Message { role: "user".into(), content: text.into(), ..Default::default() };
    v1::Messages { messages: vec![message], ..Default::default() }
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, address, model] = arguments.as_slice() else { bail!("usage: overfill-example http://HOST:PORT MODEL") };
    let endpoint = Endpoint::from_shared(address.clone())?.connect_timeout(Duration::from_secs(5));
    let mut router = RouterClient::new(endpoint.connect().await.context("connecting to the router")?);

    chat(&mut router, model, question("Tell me about Paris."), None, |part| {
        if let Part::Content(text) = part {
            print!("{text}");
            std::io::stdout().flush()?;
        }
        Ok(())
    })
    .await?;
    println!();

    let grammar = v1::Grammar { kind: Some(Kind::JsonSchema(place().to_string())) };
    let mut answer = String::new();
    let collect = |part| {
        if let Part::Content(text) = part {
            answer += &text;
        }
        Ok(())
    };
    chat(&mut router, model, question("Describe Paris."), Some(grammar), collect).await?;
    let described: Value = serde_json::from_str(&answer)?;
    println!("{} {}", described["city"], described["inhabitants"]);

    let parameters = place().to_string();
    let tool = v1::Tool { name: "describe".into(), description: "Describes a place".into(), parameters };
    let tool_choice = Some(v1::ToolChoice { choice: Some(Choice::Function("describe".into())) });
    let asked = v1::Messages { tools: vec![tool], tool_choice, single_tool_call: true, ..question("Describe Paris.") };
    let (mut name, mut arguments) = (String::new(), String::new());
    let collect = |part| {
        match part {
            Part::ToolCall(call) => name = call.name,
            Part::ToolCallArguments(text) => arguments += &text,
            Part::Content(_) | Part::Reasoning(_) => {}
        }
        Ok(())
    };
    chat(&mut router, model, asked, None, collect).await?;
    let arguments: Value = serde_json::from_str(&arguments)?;
    println!("{name}({}, {})", arguments["city"], arguments["inhabitants"]);
    Ok(())
}
