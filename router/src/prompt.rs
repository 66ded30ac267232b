//! The text side of a prompt: chat template and tokenizer. Both APIs make their prompts here.

use std::{sync::Arc, thread};

use overfill_text::{ChatMessage, TextError, TextModel};
use tokio::{sync::Semaphore, time::timeout_at};

use crate::{GenerateError, request::Lifetime};

/// Texts longer than this are processed on a thread of their own.
const LONG_TEXT_BYTES: usize = 16 << 10;
/// Chats of more messages are rendered on a thread of their own.
const MANY_MESSAGES: usize = 50;

/// Processes texts: short ones where the caller is, long ones on other threads, one per processor. Clones share the
/// threads.
#[derive(Clone)]
pub struct TextPool {
    threads: Arc<Semaphore>,
}

impl Default for TextPool {
    /// As many threads as the machine has processors.
    fn default() -> Self {
        Self::new(thread::available_parallelism().map_or(1, usize::from))
    }
}

impl TextPool {
    /// At most `threads` long texts are processed at once.
    fn new(threads: usize) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads)) }
    }

    /// The text that the model's chat template makes of `messages`.
    pub async fn render(
        &self,
        model: &Arc<TextModel>,
        messages: Vec<ChatMessage>,
        add_generation_prompt: bool,
        lifetime: Lifetime,
    ) -> Result<String, GenerateError> {
        let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        if bytes <= LONG_TEXT_BYTES && messages.len() <= MANY_MESSAGES {
            return Ok(model.apply_chat_template(&messages, add_generation_prompt)?);
        }
        let model = model.clone();
        self.run(lifetime, move || model.apply_chat_template(&messages, add_generation_prompt)).await
    }

    /// The token ids of `text`.
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

    /// Runs `work` on another thread, when one is free. A request that ends while it waits takes no thread. Work that
    /// has begun can't be stopped, and keeps its thread to the end.
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
