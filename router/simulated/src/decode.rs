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
            for _ in 1..request.max_tokens {
                state.step(state.options.token_time).await?;
                let token = continuation.next(logprobs);
                let id = token.token;
                yield event(decode_event::Event::Token(token));
                if request.stop_token_ids.contains(&id) {
                    yield finished(v1::FinishReason::Stop);
                    return;
                }
            }
            yield finished(v1::FinishReason::Length);
        })))
    }
}
