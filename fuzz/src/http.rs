//! Target for the bodies of HTTP requests: `router/src/openai/` and `router/src/anthropic/`.

use std::cell::RefCell;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::Bytes;
use overfill_router::parts::{BodyLimits, HttpApi, ServedModel, check_body};
use tokio::runtime::{Builder, Runtime};

use crate::text::model;

const LIMITS: BodyLimits = BodyLimits { sequences: 256, time: Duration::from_secs(9) };

const APIS: [HttpApi; 4] = [HttpApi::Completions, HttpApi::ChatCompletions, HttpApi::Responses, HttpApi::Messages];

/// A served model with a golden tokenizer.
pub(crate) static MODEL: LazyLock<Arc<ServedModel>> = LazyLock::new(|| {
    Arc::new(ServedModel {
        name: "m".into(),
        full_model: "m".into(),
        text: model(),
        vocab_size: 320,
        max_context_tokens: 512,
        windows: overfill_kv::Windows::NONE,
        eos_token_ids: [1].into(),
        created: 0,
    })
});

thread_local! {
    /// Runtime for tasks that a request starts. All inputs share it, since starting one takes longer than reading a
    /// body.
    static RUNTIME: RefCell<Option<Runtime>> = const { RefCell::new(None) };
}

/// Reads a body of the API that the first byte names. Every accepted sequence must keep the
/// limits, and every rejection must have a message.
pub fn http_bodies(data: &[u8]) {
    let Some((first, body)) = data.split_first() else { return };
    let body = Bytes::copy_from_slice(body);
    let checked = RUNTIME.with_borrow_mut(|runtime| {
        let runtime = runtime.get_or_insert_with(|| {
            Builder::new_current_thread().enable_time().build().expect("a runtime for this thread")
        });
        runtime.block_on(check_body(&body, APIS[usize::from(first % 4)], &MODEL, LIMITS))
    });
    match checked {
        Ok(generations) => {
            assert!((1..=LIMITS.sequences).contains(&generations.len()));
            for generation in generations {
                assert!(!generation.prompt.is_empty());
                assert!(generation.prompt.iter().all(|id| *id < MODEL.vocab_size));
                let tokens = generation.prompt.len() as u64 + u64::from(generation.max_tokens);
                assert!(tokens <= u64::from(MODEL.max_context_tokens));
                assert_eq!(generation.sampling.validate(MODEL.vocab_size as usize), Ok(()));
                assert!(generation.stop.iter().all(|stop| !stop.is_empty()));
                assert_eq!(generation.time, LIMITS.time);
            }
        }
        Err(error) => {
            let body = error.body();
            let message = body["error"]["message"].as_str().expect("a message");
            // The message may quote a value once.
            assert!(!message.is_empty() && message.len() <= 1024 + 8 * data.len(), "{} bytes", message.len());
        }
    }
}
