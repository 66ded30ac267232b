//! The stream to the prefill node of an attempt, with protobuf conversions of its request and events.

use std::sync::Arc;

use overfill_kv::OutputToken;
use overfill_proto::v1::{self, prefill_event};
use tonic::Status;

use super::{
    Plan,
    blame::Fault,
    decode::Reservation,
    stream::{NodeStream, traced},
};
use crate::node::{Node, Slot};

/// An event of a prefill node, up to its first token.
#[derive(Debug)]
pub(super) enum PrefillEvent {
    /// The computation has begun.
    Started {
        /// Number of prompt tokens whose KV the node had cached.
        cached_tokens: u32,
    },
    /// The log-probabilities of prompt tokens 1, 2, ...
    PromptLogprobs(Vec<OutputToken>),
    FirstToken(OutputToken),
}

/// A request on a prefill node.
pub(super) struct PrefillStream {
    stream: NodeStream<v1::PrefillEvent>,
    slot: Slot,
}

impl PrefillStream {
    /// Opens a stream on which `node` prefills the plan's tokens. `matched`: number of tokens that it has probably cached.
    /// The KV is sent to `reservation`. Without a reservation only the first token is computed. With a `lease` that is not
    /// empty, the node keeps the request open afterwards.
    pub fn open(node: &Arc<Node>, matched: u64, plan: &Plan, reservation: Option<Reservation>, lease: Vec<u8>) -> Self {
        let request = v1::PrefillRequest {
            request_id: plan.generation.request_id.0.clone(),
            prompt_tokens: plan.tokens.to_vec(),
            sampling: Some((&plan.generation.sampling).into()),
            handoff: reservation.map(Into::into),
            prompt_logprobs: plan.prompt_logprobs,
            deadline_seconds: plan.seconds_left(),
            generated_tokens: plan.generated,
            incarnation: node.info.incarnation.clone(),
            lease,
        };
        let (mut client, request) = (node.prefill_client(), traced(request));
        Self {
            stream: NodeStream::new(async move { client.prefill(request).await }),
            slot: node.occupy((plan.tokens.len() as u64).saturating_sub(matched)),
        }
    }

    /// Resolves when the node has accepted the request. Cancel safe.
    pub async fn opened(&mut self) -> Result<(), Fault> {
        Ok(self.stream.opened().await?)
    }

    /// The next event before the end of the prefill. Cancel safe.
    pub async fn next(&mut self) -> Result<PrefillEvent, Fault> {
        match self.stream.message().await?.and_then(|message| message.event) {
            Some(prefill_event::Event::Started(v1::PrefillStarted { cached_tokens, queue_seconds: _ })) => {
                Ok(PrefillEvent::Started { cached_tokens })
            }
            Some(prefill_event::Event::PromptLogprobs(logprobs)) => {
                Ok(PrefillEvent::PromptLogprobs(logprobs.tokens.into_iter().map(OutputToken::from).collect()))
            }
            Some(prefill_event::Event::FirstToken(v1::FirstToken { token, prefill_seconds: _ })) => {
                self.slot.prefilled();
                let token = token.ok_or_else(|| Fault::unexpected("the first token has no id"))?;
                Ok(PrefillEvent::FirstToken(token.into()))
            }
            Some(prefill_event::Event::Transferred(_)) | None => {
                Err(Fault::unexpected("the stream ended before the first token"))
            }
        }
    }

    /// Resolves when the node has ended its transfer, which also ends the stream. Cancel safe.
    pub async fn transferred(&mut self) -> Result<(), Status> {
        while self.stream.message().await?.is_some() {}
        Ok(())
    }
}

impl From<Reservation> for v1::HandoffTarget {
    fn from(Reservation { ticket, kv_endpoint, kv_schema, held_tokens }: Reservation) -> Self {
        Self { ticket: ticket.0.to_vec(), kv_endpoint, kv_schema: Some((&kv_schema).into()), held_tokens }
    }
}
