//! The `Decode` service of simulated nodes.

use std::sync::Arc;

use async_stream::try_stream;
use overfill_proto::v1::{self, decode_event, decode_server};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::{Active, Continuation, HANDOFFS, State, node::Events};

pub(super) struct Service(pub(super) Arc<State>);

fn event(event: decode_event::Event) -> v1::DecodeEvent {
    v1::DecodeEvent { event: Some(event) }
}

fn finished(reason: v1::FinishReason) -> v1::DecodeEvent {
    event(decode_event::Event::Finished(v1::DecodeFinished { reason: reason.into() }))
}

/// Withdraws the ticket if the request ends before the handoff.
struct Reservation(Vec<u8>);

impl Drop for Reservation {
    fn drop(&mut self) {
        HANDOFFS.lock().remove(&self.0);
    }
}

/// Name of a request that may wait for verdicts.
struct Awaiting(Vec<u8>, Arc<State>);

impl Drop for Awaiting {
    fn drop(&mut self) {
        self.1.verdicts.lock().remove(&self.0);
    }
}

#[tonic::async_trait]
impl decode_server::Decode for Service {
    type DecodeStream = Events<v1::DecodeEvent>;

    async fn decode(&self, request: Request<v1::DecodeRequest>) -> Result<Response<Self::DecodeStream>, Status> {
        let state = self.0.clone();
        let active = Active::new(&state)?;
        let request = request.into_inner();
        Ok(Response::new(Box::pin(try_stream! {
            let _active = active;
            let ticket = rand::random::<[u8; 16]>().to_vec();
            let (sender, receiver) = oneshot::channel();
            HANDOFFS.lock().insert(ticket.clone(), sender);
            let reservation = Reservation(ticket.clone());
            let named = Awaiting(ticket.clone(), state.clone());
            yield event(decode_event::Event::Reserved(v1::Reserved {
                ticket,
                kv_endpoint: None,
                held_tokens: 0,
                kv_schema: Some((&state.options.schema).into()),
            }));
            let handed = receiver.await.map_err(|_| Status::unavailable("the handoff ended"))?;
            drop(reservation);
            let logprobs = request.sampling.as_ref().and_then(|s| s.logprobs);
            let mut continuation =
                Continuation::new(&state.options, &request.prompt_tokens, request.generated_tokens);
            if continuation.next(None).token != handed {
                Err(Status::internal("the first token is not the one expected"))?;
            }
            yield event(decode_event::Event::Ready(v1::HandoffReady {
                transfer: Some(v1::TransferStats { bytes: 1024, seconds: 0.001, exposed_seconds: 0.0 }),
            }));
            let mut tokens: Vec<u32> = request.prompt_tokens.iter().copied().chain([handed]).collect();
            let most = request.prompt_tokens.len() + request.max_tokens as usize;
            while request.mode() == v1::Mode::Exact {
                state.step(state.options.token_time).await?;
                // Two drafts are right, and the third one is wrong.
                let mut ahead = continuation.clone();
                let mut drafts: Vec<u32> = (0..3).map(|_| ahead.next(None).token).collect();
                drafts[2] ^= 1;
                let (sender, verdict) = oneshot::channel();
                state.verdicts.lock().insert(named.0.clone(), sender);
                yield event(decode_event::Event::Extension(v1::Extension {
                    position: tokens.len() as u32 - 1,
                    tokens: tokens.last().copied().into_iter().chain(drafts).collect(),
                    standing_tokens: 1,
                    choose: true,
                    landing: None,
                    handoff_end_tokens: 0,
                }));
                let chosen = verdict.await.map_err(|_| Status::unavailable("the verdict did not come"))?;
                for token in chosen {
                    if continuation.next(None).token != token {
                        Err(Status::internal("the verdict is not the one expected"))?;
                    }
                    tokens.push(token);
                    let stops = request.stop_token_ids.contains(&token);
                    if stops || tokens.len() >= most {
                        yield finished(if stops { v1::FinishReason::Stop } else { v1::FinishReason::Length });
                        return;
                    }
                }
            }
            for _ in 1..request.max_tokens {
                state.step(state.options.token_time).await?;
                let token = continuation.next(logprobs);
                let id = token.token;
                tokens.push(id);
                yield event(decode_event::Event::Token(token));
                if request.mode() == v1::Mode::Refresh && tokens.len().is_multiple_of(4) {
                    yield event(decode_event::Event::Extension(v1::Extension {
                        position: tokens.len() as u32 - 1,
                        tokens: vec![id],
                        standing_tokens: 1,
                        choose: false,
                        landing: None,
                        handoff_end_tokens: 0,
                    }));
                }
                if request.stop_token_ids.contains(&id) {
                    yield finished(v1::FinishReason::Stop);
                    return;
                }
            }
            yield finished(v1::FinishReason::Length);
        })))
    }

    async fn verdict(&self, request: Request<v1::VerdictRequest>) -> Result<Response<v1::VerdictResponse>, Status> {
        let v1::VerdictRequest { ticket, tokens, lost, .. } = request.into_inner();
        if lost && !self.0.verdicts.lock().contains_key(&ticket) {
            // In mode refresh, nothing waits for an extension here.
            return Ok(Response::new(v1::VerdictResponse {}));
        }
        let waiting = self.0.verdicts.lock().remove(&ticket);
        let told = waiting.and_then(|waiting| waiting.send(tokens).ok());
        told.map(|()| Response::new(v1::VerdictResponse {})).ok_or_else(|| Status::not_found("no request waits for it"))
    }
}
