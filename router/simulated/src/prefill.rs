//! The `Prefill` service of simulated nodes.

use std::sync::{Arc, atomic::Ordering};

use async_stream::try_stream;
use overfill_proto::v1::{self, prefill_event, prefill_server};
use tonic::{Request, Response, Status};

use super::{Active, Continuation, HANDOFFS, State, node::Events, output};

pub(super) struct Service(pub(super) Arc<State>);

fn event(event: prefill_event::Event) -> v1::PrefillEvent {
    v1::PrefillEvent { event: Some(event) }
}

/// Keeps a prefill open.
struct Open(Arc<State>, Vec<u8>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.lock().remove(&self.1);
    }
}

#[tonic::async_trait]
impl prefill_server::Prefill for Service {
    type PrefillStream = Events<v1::PrefillEvent>;

    async fn model_files(&self, _: Request<v1::ModelFilesRequest>) -> Result<Response<v1::ModelFilesResponse>, Status> {
        let files = self.0.options.files.clone();
        Ok(Response::new(v1::ModelFilesResponse {
            tokenizer_json: files.tokenizer_json,
            tokenizer_config_json: files.tokenizer_config_json.unwrap_or_default(),
            chat_template: files.chat_template.unwrap_or_default(),
            generation_config_json: files.generation_config_json.unwrap_or_default(),
            special_tokens_map_json: files.special_tokens_map_json.unwrap_or_default(),
        }))
    }

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        let state = self.0.clone();
        let active = Active::new(&state)?;
        let request = request.into_inner();
        Ok(Response::new(Box::pin(try_stream! {
            let _active = active;
            yield event(prefill_event::Event::Started(v1::PrefillStarted { cached_tokens: 0, queue_seconds: 0.0 }));
            state.step(state.options.prefill_time).await?;
            let logprobs = request.sampling.as_ref().and_then(|s| s.logprobs);
            if request.prompt_logprobs {
                let tokens = request.prompt_tokens.iter().skip(1).map(|t| output(*t, logprobs.or(Some(0)))).collect();
                yield event(prefill_event::Event::PromptLogprobs(v1::PromptLogprobs { tokens }));
            }
            let mut continuation =
                Continuation::new(&state.options, &request.prompt_tokens, request.generated_tokens);
            let token = continuation.next(logprobs);
            let first = token.token;
            let first_token = prefill_event::Event::FirstToken(v1::FirstToken { token: Some(token), prefill_seconds: 0.0 });
            let delay = state.options.report_delay;
            let mut first_token = Some(event(first_token));
            if delay.is_zero() && let Some(first_token) = first_token.take() {
                yield first_token;
            }
            let with_handoff = request.handoff.is_some();
            if let Some(target) = request.handoff {
                if state.losing.load(Ordering::SeqCst) {
                    Err(Status::unavailable("simulated loss of the handoff"))?;
                }
                let receiver = HANDOFFS.lock().remove(&target.ticket);
                receiver
                    .and_then(|receiver| receiver.send(first).ok())
                    .ok_or_else(|| Status::failed_precondition("the ticket is not valid"))?;
            }
            if let Some(first_token) = first_token {
                tokio::time::sleep(delay).await;
                yield first_token;
            }
            let kept = (!request.lease.is_empty()).then(|| {
                let tokens = (request.prompt_tokens.clone(), request.generated_tokens);
                state.open.lock().insert(request.lease.clone(), tokens);
                Open(state.clone(), request.lease)
            });
            if with_handoff {
                yield event(prefill_event::Event::Transferred(v1::TransferStats::default()));
            }
            if let Some(_open) = kept {
                state.stop.cancelled().await;
            }
        })))
    }

    async fn extend(&self, request: Request<v1::ExtendRequest>) -> Result<Response<v1::ExtendResponse>, Status> {
        let (state, request) = (self.0.clone(), request.into_inner());
        state.step(state.options.prefill_time).await?;
        let mut open = state.open.lock();
        let known = open.get_mut(&request.lease).filter(|(tokens, _)| request.position as usize <= tokens.len());
        let Some((tokens, generated)) = known else { return Err(Status::not_found("no open prefill has this lease")) };
        let (standing, drafts) = request.tokens.split_at(request.standing_tokens as usize);
        *generated = *generated + request.position + standing.len() as u32 - tokens.len() as u32;
        tokens.truncate(request.position as usize);
        tokens.extend(standing);
        let mut chosen = Vec::new();
        if request.choose {
            let mut continuation = Continuation::new(&state.options, tokens, *generated);
            loop {
                let next = continuation.next(Some(0));
                let stands = drafts.get(chosen.len()) == Some(&next.token);
                chosen.push(next);
                if !stands {
                    break;
                }
            }
        }
        Ok(Response::new(v1::ExtendResponse { tokens: chosen, ..Default::default() }))
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let (state, request) = (self.0.clone(), request.into_inner());
        state.step(state.options.prefill_time).await?;
        let prompt = request.tokens.len() - request.generated_tokens as usize;
        let choose = |generated: u32| {
            let before = &request.tokens[..prompt + generated as usize];
            Continuation::new(&state.options, before, generated).next(None).token
        };
        Ok(Response::new(v1::ScoreResponse {
            choices: (0..request.generated_tokens).map(choose).collect(),
            logprobs: vec![-1.5; request.generated_tokens as usize],
        }))
    }
}
