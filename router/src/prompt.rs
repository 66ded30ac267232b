//! Renders chat templates, tokenizes prompts and decodes tokens, for all APIs.

use std::{sync::Arc, thread};

use overfill_kv::Grammar;
use overfill_text::{ChatInput, ChatMessage, GrammarError, TextError, TextModel};
use serde_json::{Map, Value, json};
use tokio::{sync::Semaphore, time::timeout_at};

use crate::{GenerateError, request::Lifetime};

/// Texts longer than this, in bytes, are processed on another thread.
const LONG_TEXT_BYTES: usize = 16 << 10;
/// More tokens than this are decoded on another thread.
const MANY_TOKENS: usize = 4 << 10;
/// Chats with more messages than this are rendered on another thread.
const MANY_MESSAGES: usize = 50;

/// A chat to be rendered. The fields mean what they mean in [`ChatInput`].
pub struct ChatPrompt {
    /// The messages.
    pub messages: Vec<Value>,
    /// Tool definitions in the format of OpenAI's API.
    pub tools: Option<Value>,
    /// Documents for retrieval-augmented generation.
    pub documents: Option<Value>,
    /// Other variables of the template.
    pub variables: Map<String, Value>,
    /// A chat template in place of the model's.
    pub template: Option<String>,
    /// Whether the prompt ends with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends with the text of the last message.
    pub continue_final_message: bool,
}

impl ChatPrompt {
    /// A chat of texts only, to be answered.
    pub fn new(messages: impl Iterator<Item = ChatMessage>) -> Self {
        Self {
            messages: messages.map(|message| json!({"role": message.role, "content": message.content})).collect(),
            tools: None,
            documents: None,
            variables: Map::new(),
            template: None,
            add_generation_prompt: true,
            continue_final_message: false,
        }
    }

    fn input(&self) -> ChatInput<'_> {
        let Self { messages, tools, documents, variables, template: _, add_generation_prompt, continue_final_message } =
            self;
        ChatInput {
            messages,
            tools: tools.as_ref(),
            documents: documents.as_ref(),
            add_generation_prompt: *add_generation_prompt,
            continue_final_message: *continue_final_message,
            variables: Some(variables),
        }
    }
}

/// Processes texts: short texts on the caller's thread, long texts on other threads, one per CPU. Clones share the limit.
#[derive(Clone)]
pub struct TextPool {
    threads: Arc<Semaphore>,
}

impl Default for TextPool {
    /// Uses as many threads as the machine has CPUs.
    fn default() -> Self {
        Self::new(thread::available_parallelism().map_or(1, usize::from))
    }
}

impl TextPool {
    /// Creates a pool that processes at most `threads` long texts at once.
    fn new(threads: usize) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads)) }
    }

    /// Renders a chat with its own or the model's chat template.
    pub async fn render(
        &self,
        model: &Arc<TextModel>,
        chat: ChatPrompt,
        lifetime: Lifetime,
    ) -> Result<String, GenerateError> {
        let input = chat.input();
        if let Some(source) = chat.template.clone() {
            let model = model.clone();
            let rendered = self.run(lifetime, move || Ok(model.render_with(&source, &chat.input()))).await?;
            return rendered.map_err(|e| GenerateError::invalid("chat_template", e.to_string()));
        }
        if input.text_bytes() <= LONG_TEXT_BYTES && chat.messages.len() <= MANY_MESSAGES {
            return Ok(model.render_chat(&input)?);
        }
        let model = model.clone();
        self.run(lifetime, move || model.render_chat(&chat.input())).await
    }

    /// Tokenizes `text`.
    pub async fn encode(
        &self,
        model: &Arc<TextModel>,
        text: String,
        add_special: bool,
        lifetime: Lifetime,
    ) -> Result<Vec<u32>, GenerateError> {
        if text.len() <= LONG_TEXT_BYTES {
            return Ok(model.encode(&text, add_special)?);
        }
        let model = model.clone();
        self.run(lifetime, move || model.encode(&text, add_special)).await
    }

    /// Compiles a grammar without a vocabulary.
    pub async fn check_grammar(
        &self,
        grammar: Grammar,
        lifetime: Lifetime,
    ) -> Result<Result<(), GrammarError>, GenerateError> {
        self.run(lifetime, move || Ok(overfill_text::check_grammar(&grammar))).await
    }

    /// The text of `tokens`, with special tokens.
    pub async fn decode(
        &self,
        model: &Arc<TextModel>,
        tokens: Vec<u32>,
        lifetime: Lifetime,
    ) -> Result<String, GenerateError> {
        if tokens.len() <= MANY_TOKENS {
            return Ok(model.decode(&tokens, false)?);
        }
        let model = model.clone();
        self.run(lifetime, move || model.decode(&tokens, false)).await
    }

    /// Waits for a free thread and runs `work` on it. If the request ends during the wait, `work` does not run. Work that
    /// has begun can't be stopped, and occupies its thread until it ends.
    async fn run<T: Send + 'static>(
        &self,
        lifetime: Lifetime,
        work: impl FnOnce() -> Result<T, TextError> + Send + 'static,
    ) -> Result<T, GenerateError> {
        let late = |_| GenerateError::Deadline(lifetime.time);
        let thread = timeout_at(lifetime.deadline(), self.threads.clone().acquire_owned()).await.map_err(late)?;
        let thread = thread.map_err(|e| GenerateError::Internal(e.to_string()))?;
        let work = tokio::task::spawn_blocking(move || {
            let _thread = thread;
            work()
        });
        let done = timeout_at(lifetime.deadline(), work).await.map_err(late)?;
        Ok(done.map_err(|e| GenerateError::Internal(e.to_string()))??)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use tokio::time::Instant;

    use super::*;

    fn lifetime(time: Duration) -> Lifetime {
        Lifetime { arrived: Instant::now(), time }
    }

    #[tokio::test]
    async fn long_texts_wait_for_a_thread_until_their_deadline() {
        let pool = TextPool::new(1);
        let (release, held) = mpsc::channel::<()>();
        let long = Duration::from_secs(60);
        let first = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(lifetime(long), move || Ok(held.recv().is_ok())).await }
        });
        while pool.threads.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let short = Duration::from_millis(10);
        assert_eq!(pool.run(lifetime(short), || Ok(())).await, Err(GenerateError::Deadline(short)));
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(true));
        assert_eq!(pool.run(lifetime(long), || Ok(2)).await, Ok(2));
    }

    #[tokio::test]
    async fn work_whose_request_has_gone_keeps_its_thread() {
        let pool = TextPool::new(1);
        let (release, held) = mpsc::channel::<()>();
        let short = Duration::from_millis(10);
        let late = pool.run(lifetime(short), move || Ok(held.recv().is_ok())).await;
        assert_eq!(late, Err(GenerateError::Deadline(short)));
        assert_eq!(pool.threads.available_permits(), 0);
        drop(release);
        pool.run(lifetime(Duration::from_secs(60)), || Ok(())).await.unwrap();
    }
}
