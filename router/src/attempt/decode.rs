//! The stream to the decode node of an attempt, with protobuf conversions of its request and events.

use std::sync::Arc;

use overfill_kv::{FinishReason, KvSchema, OutputToken, Ticket, TransferStats};
use overfill_proto::{
    InvalidField, ticket_from_wire,
    v1::{self, decode_event},
};
use tonic::Status;

use super::{
    Plan,
    blame::Fault,
    stream::{NodeStream, traced},
};
use crate::node::{Node, Slot};

/// Reserved room on a decode node, and what the prefill node needs to write into it.
#[derive(Debug)]
pub(super) struct Reservation {
    pub ticket: Ticket,
    /// Address at which the decode node receives KV. It is passed on unchanged, so the router need not support the
    /// transport.
    pub kv_endpoint: Option<v1::KvEndpoint>,
    /// The decode node's schema.
    pub kv_schema: KvSchema,
    /// Number of leading prompt tokens whose KV the decode node already holds.
    pub held_tokens: u32,
}

/// An event of a decode node after its reservation.
#[derive(Debug)]
pub(super) enum DecodeEvent {
    /// The KV is complete and verified.
    Ready(Option<TransferStats>),
    Token(OutputToken),
    /// The node wants the full model to go on.
    Extension(Box<v1::Extension>),
    Finished(FinishReason),
}

/// A request on a decode node.
pub(super) struct DecodeStream {
    stream: NodeStream<v1::DecodeEvent>,
    /// A message that arrived before the first token was returned to the client.
    early: Option<v1::DecodeEvent>,
    _slot: Slot,
}

impl DecodeStream {
    /// Opens a stream on which `node` decodes the plan's request over KV that `prefiller` computes.
    pub fn open(node: &Arc<Node>, prefiller: &Node, plan: &Plan) -> Self {
        let generation = &plan.generation;
        let request = v1::DecodeRequest {
            request_id: generation.request_id.0.clone(),
            prompt_tokens: plan.tokens.to_vec(),
            sampling: Some((&generation.sampling).into()),
            max_tokens: plan.remaining,
            stop_token_ids: generation.stop_token_ids.to_vec(),
            deadline_seconds: plan.seconds_left(),
            generated_tokens: plan.generated,
            producer: prefiller.info.schema.full_model.clone().unwrap_or_default(),
            incarnation: node.info.incarnation.clone(),
            mode: v1::Mode::from(generation.mode()).into(),
            model: generation.model.name.clone(),
        };
        let (mut client, request) = (node.decode_client(), traced(request));
        Self {
            stream: NodeStream::new(async move { client.decode(request).await }),
            early: None,
            _slot: node.occupy(0),
        }
    }

    /// Resolves when the node has accepted the request. Cancel safe.
    pub async fn opened(&mut self) -> Result<(), Fault> {
        Ok(self.stream.opened().await?)
    }

    /// The node's reservation. It may have to wait on the node until other requests have ended. Cancel safe.
    pub async fn reserved(&mut self) -> Result<Reservation, Fault> {
        match self.stream.message().await?.and_then(|message| message.event) {
            Some(decode_event::Event::Reserved(reserved)) => {
                Reservation::try_from(reserved).map_err(|e| Fault::Unexpected(e.to_string()))
            }
            Some(
                decode_event::Event::Ready(_)
                | decode_event::Event::Token(_)
                | decode_event::Event::Extension(_)
                | decode_event::Event::Finished(_),
            )
            | None => Err(Fault::unexpected("the stream did not begin with a reservation")),
        }
    }

    /// Resolves when a message of the node has arrived, which is kept for [`next`](Self::next). Resolves only once; later
    /// calls are pending forever. Cancel safe.
    pub async fn spoken(&mut self) -> Result<(), Fault> {
        if self.early.is_some() {
            return std::future::pending().await;
        }
        match self.stream.message().await? {
            Some(message) => {
                self.early = Some(message);
                Ok(())
            }
            None => Err(Status::unknown("the stream ended before the first token").into()),
        }
    }

    /// The next event after the reservation. Cancel safe.
    pub async fn next(&mut self) -> Result<DecodeEvent, Fault> {
        let message = match self.early.take() {
            Some(message) => Some(message),
            None => self.stream.message().await?,
        };
        match message.and_then(|message| message.event) {
            Some(decode_event::Event::Ready(ready)) => Ok(DecodeEvent::Ready(ready.transfer.map(Into::into))),
            Some(decode_event::Event::Token(token)) => Ok(DecodeEvent::Token(token.into())),
            Some(decode_event::Event::Extension(extension)) => Ok(DecodeEvent::Extension(Box::new(extension))),
            Some(decode_event::Event::Finished(finished)) => {
                let reason = FinishReason::try_from(finished.reason());
                Ok(DecodeEvent::Finished(reason.map_err(|e| Fault::Unexpected(e.to_string()))?))
            }
            Some(decode_event::Event::Reserved(_)) => Err(Fault::unexpected("there was a second reservation")),
            None => Err(Fault::unexpected("the stream ended before the text")),
        }
    }
}

impl TryFrom<v1::Reserved> for Reservation {
    type Error = InvalidField;

    fn try_from(wire: v1::Reserved) -> Result<Self, InvalidField> {
        let v1::Reserved { ticket, kv_endpoint, held_tokens, kv_schema } = wire;
        let kv_schema = kv_schema.ok_or_else(|| InvalidField::new("kv_schema", "present", "nothing"))?;
        Ok(Self {
            ticket: ticket_from_wire(&ticket)?,
            kv_endpoint,
            kv_schema: KvSchema::try_from(kv_schema)?,
            held_tokens,
        })
    }
}
