//! A chat: what its template turns into a prompt, and what its answer may be made of.

use std::sync::Arc;

use overfill_kv::{Grammar, SamplingParams};
use overfill_text::{AnswerFormat, ReasoningPosition};
use serde_json::{Map, Value};

use super::{
    Intake,
    batch::{Batch, Prompt},
    fields::{Common, Fields},
    messages,
    tools::Tools,
};
use crate::{
    GenerateError, constraints,
    legs::Leg,
    node::ServedModel,
    prompt::{ChatPrompt, TextPool},
    request::{Generation, Lifetime},
    settings::RequestSettings,
};

/// Variables of a chat template that have fields of their own in a request.
const RESERVED: [&str; 7] =
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"];

/// A chat that has not been rendered.
pub struct Conversation {
    /// What the template gets. Its tools are those of `tools`.
    pub chat: ChatPrompt,
    /// The functions that the model may call.
    pub tools: Tools,
}

/// What a request gives to the chat template besides messages and tools.
pub struct TemplateFields {
    /// Whether the prompt ends with the text of the last message.
    pub continue_final_message: bool,
    /// Whether the prompt ends with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// A template in place of the model's.
    pub template: Option<String>,
    /// Other variables of the template.
    pub variables: Map<String, Value>,
    /// Documents for retrieval-augmented generation.
    pub documents: Option<Vec<Map<String, Value>>>,
}

/// A chat that has been rendered.
pub struct Rendered {
    /// The prompt.
    pub prompt: String,
    /// What to look for in the answer.
    pub format: AnswerFormat,
    /// What the answer must match because of the tools.
    grammar: Option<Grammar>,
}

impl Rendered {
    /// What the whole answer must match. `asked`: what its text must match.
    pub fn grammar(&self, model: &ServedModel, asked: Option<&Grammar>) -> Result<Option<Grammar>, GenerateError> {
        match (&self.grammar, asked) {
            (Some(_), Some(_)) => {
                let fault = "tool_choice can't require a call of an answer whose text has a format as well";
                Err(GenerateError::invalid("tool_choice", fault))
            }
            (Some(calls), None) => Ok(Some(calls.clone())),
            (None, asked) => Ok(asked.map(|asked| model.text.grammar_after_reasoning(&self.format, asked))),
        }
    }
}

/// What a request asks for besides its chat.
pub struct Asked {
    /// Fields that the APIs share.
    pub common: Common,
    /// Maximum number of tokens. They must fit the context together with the prompt.
    pub max_tokens: Option<u32>,
    /// Without `max_tokens`: the answer has as many tokens as fit the context, but at most this many. `None`: the model's
    /// default.
    pub at_most_tokens: Option<u32>,
    /// Number of alternatives reported per token. `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    /// Whether the tokens of the prompt have log-probabilities as well.
    pub prompt_logprobs: bool,
    /// Whether the tokenizer adds its special tokens to the rendered chat.
    pub add_special: bool,
}

/// A chat that is ready to be answered.
pub struct Prepared {
    /// The id that the client sees.
    pub id: String,
    /// How to answer.
    pub batch: Batch,
    /// The rendered chat.
    pub prompt: Prompt,
    /// What to look for in the answers.
    pub format: AnswerFormat,
}

impl Prepared {
    /// The sequences that answer the chat.
    pub fn generations(&self) -> Result<Vec<Generation>, GenerateError> {
        self.batch.generations(std::slice::from_ref(&self.prompt))
    }
}

impl Conversation {
    /// Takes the fields of a chat completion.
    pub fn take(fields: &mut Fields, settings: &RequestSettings) -> Result<Self, GenerateError> {
        let tools = Tools::take(fields)?;
        let continue_final_message = fields.take("continue_final_message")?.unwrap_or(false);
        let extras = TemplateFields {
            continue_final_message,
            add_generation_prompt: fields.take("add_generation_prompt")?.unwrap_or(!continue_final_message),
            template: fields.take("chat_template")?,
            variables: fields.take("chat_template_kwargs")?.unwrap_or_default(),
            documents: fields.take("documents")?,
        };
        let messages = fields.take("messages")?;
        let messages = messages.ok_or_else(|| GenerateError::invalid("messages", "messages is missing"))?;
        Self::new(messages, tools, extras, settings)
    }

    /// Checks a chat. `messages`: in the format of chat completions.
    pub fn new(
        messages: Vec<Value>,
        tools: Tools,
        extras: TemplateFields,
        settings: &RequestSettings,
    ) -> Result<Self, GenerateError> {
        let TemplateFields { continue_final_message, add_generation_prompt, template, variables, documents } = extras;
        if continue_final_message && add_generation_prompt {
            let fault = "continue_final_message needs add_generation_prompt to be false";
            return Err(GenerateError::invalid("continue_final_message", fault));
        }
        if template.is_some() && !settings.trust_request_chat_template {
            let fault = "chat_template is not allowed by this router (--trust-request-chat-template)";
            return Err(GenerateError::invalid("chat_template", fault));
        }
        if let Some(name) = variables.keys().find(|name| RESERVED.contains(&name.as_str())) {
            let field = format!("chat_template_kwargs.{name}");
            let fault = format!("{field} is not a variable of templates: {name} is a field of the request itself");
            return Err(GenerateError::invalid(field, fault));
        }
        let documents = documents.filter(|documents| !documents.is_empty());
        let chat = ChatPrompt {
            messages: messages::parse(messages)?,
            tools: tools.definitions.clone(),
            documents: documents.map(|documents| documents.into_iter().map(Value::from).collect()),
            variables,
            template,
            add_generation_prompt,
            continue_final_message,
        };
        Ok(Self { chat, tools })
    }

    /// Renders and tokenizes the chat, so that it can be answered.
    pub async fn prepare(
        self,
        asked: Asked,
        model: Arc<ServedModel>,
        intake: Intake<'_>,
    ) -> Result<Prepared, GenerateError> {
        let Intake { id, pool, settings, lifetime, mut legs } = intake;
        let Asked { common, max_tokens, at_most_tokens, logprobs, prompt_logprobs, add_special } = asked;
        legs.enter(Leg::Tokenize);
        let rendered = self.render(&model, settings, pool, lifetime).await?;
        let grammar = rendered.grammar(&model, common.sampling.grammar.as_ref())?;
        let Rendered { prompt, format, .. } = rendered;
        let tokens = pool.encode(&model.text, prompt, add_special, lifetime).await?;
        let tokens: Arc<[u32]> = common.truncate(&model, tokens, max_tokens.or(at_most_tokens)).0.into();
        legs.leave();
        let batch = Batch {
            sampling: SamplingParams { logprobs, grammar, ..common.sampling.clone() },
            max_tokens,
            default_max_tokens: at_most_tokens.or(model.text.generation_defaults().max_new_tokens).unwrap_or(u32::MAX),
            prompt_logprobs,
            shown_special: model.text.special_ids(format.markers()).into(),
            model,
            common,
            lifetime,
            spent: legs.times(),
        };
        Ok(Prepared { id, batch, prompt: Prompt { tokens, text: String::new() }, format })
    }

    /// Renders the prompt, and says what to look for in its answer.
    pub async fn render(
        self,
        model: &ServedModel,
        settings: &RequestSettings,
        pool: &TextPool,
        lifetime: Lifetime,
    ) -> Result<Rendered, GenerateError> {
        let Self { chat, tools } = self;
        let reasoning = settings.reasoning_parsers.of(&model.name).flatten();
        // Before the template runs, so that a fault costs little.
        let format = AnswerFormat { reasoning, ..AnswerFormat::default() };
        let format = tools.complete(format, chat.template.as_deref(), model, settings)?;
        for (field, schema) in tools.schemas() {
            constraints::check_grammar(pool, &field, &schema, lifetime).await?;
        }
        let last = || chat.messages.last().and_then(|message| message["content"].as_str()).map(str::to_owned);
        let continued = chat.continue_final_message.then(last).flatten();
        let prompt = pool.render(&model.text, chat, lifetime).await?;
        let position = reasoning.map(|reasoning| reasoning.position(&prompt, continued.as_deref()));
        let format = AnswerFormat {
            reasoning: reasoning.filter(|_| position != Some(ReasoningPosition::After)),
            reasoning_is_open: position == Some(ReasoningPosition::Within),
            ..format
        };
        let grammar = tools.grammar(&format, model)?;
        Ok(Rendered { prompt, format, grammar })
    }
}
