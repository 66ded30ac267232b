//! One pass of a request over one decode and one prefill node.

use std::{sync::Arc, time::Duration};

use async_stream::try_stream;
use futures::Stream;
use overfill_kv::{BLOCK_TOKENS, OutputToken, blocks_for};
use overfill_proto::v1::{self, decode_event, prefill_event};
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::{
    affinity::Affinity,
    node::{Node, View},
    nodes::Nodes,
    pick,
    request::Generation,
};

/// After the prefill node failed behind its first token, the decode node is given this long to show that it has all
/// of the KV: the last confirmation may have been what got lost.
const GRACE: Duration = Duration::from_secs(2);

/// What happens during an attempt.
#[derive(Debug)]
pub enum Event {
    /// The decode node has reserved room, holding so many prompt tokens already.
    Reserved {
        /// Its name.
        node: String,
        /// Tokens held.
        held_tokens: u32,
    },
    /// The prefill node has begun.
    Started {
        /// Its name.
        node: String,
        /// Prompt tokens that it had.
        cached_tokens: u32,
    },
    /// Of prompt tokens 1, 2, ...
    PromptLogprobs(Vec<OutputToken>),
    /// The next token.
    Token(OutputToken, v1::Role),
    /// The KV is on the decode node.
    Ready(Option<v1::TransferStats>),
    /// The decode node has ended the text. (The end by the first token is for the caller to see.)
    Finished(v1::FinishReason),
}

/// How an attempt failed.
#[derive(Debug)]
pub enum AttemptError {
    /// No node of this role is up, or all are to be avoided.
    NoNode(v1::Role),
    /// A node refused for want of room, or because it is about to end.
    NoRoom {
        /// Which node.
        node: u64,
        /// What it said.
        message: String,
    },
    /// The request itself is at fault: no other node would take it.
    Refused(String),
    /// A node that drains has given the request away.
    Moved {
        /// Which node.
        node: u64,
        /// What it said.
        message: String,
    },
    /// A node failed; these should be avoided.
    Failed {
        /// Node keys.
        nodes: Vec<u64>,
        /// What happened.
        message: String,
    },
    /// The request's own deadline.
    Deadline,
}

/// What an attempt is to do.
pub struct Plan {
    /// The request.
    pub generation: Arc<Generation>,
    /// Prompt and earlier output.
    pub tokens: Arc<[u32]>,
    /// Of these, the earlier output.
    pub generated: u32,
    /// Tokens still to generate.
    pub remaining: u32,
    /// Report the prompt's log-probabilities?
    pub prompt_logprobs: bool,
    /// Nodes to avoid.
    pub avoid: Vec<u64>,
    /// Longest time without a token from a decode node that has begun, and for any node to take a request.
    pub progress_timeout: Duration,
}

/// Chooses a prefill node among `candidates`; gives its index and the tokens that it has probably cached.
fn pick_prefill(candidates: &[&Arc<Node>], affinity: &Mutex<Affinity>, tokens: &[u32]) -> Option<(usize, u64)> {
    let producer = candidates.first()?.schema.full_model.clone().unwrap_or_default();
    let hashes = overfill_kv::block_hashes(tokens, &producer);
    let mut affinity = affinity.lock();
    let matched = |node: &Arc<Node>| (affinity.matched(&hashes, node.key) * BLOCK_TOKENS) as u64;
    let loads: Vec<_> = candidates.iter().map(|node| node.prefill_candidate(matched(node))).collect();
    let chosen = pick::prefill(tokens.len() as u64, &loads)?;
    affinity.record(&hashes, candidates[chosen].key);
    Some((chosen, loads[chosen].matched_tokens))
}

/// Runs one attempt. Dropping the stream drops the streams to both nodes, which ends the request there.
pub fn run(
    nodes: Nodes,
    affinity: Arc<Mutex<Affinity>>,
    plan: Plan,
) -> impl Stream<Item = Result<Event, AttemptError>> + Send {
    try_stream! {
        let generation = &*plan.generation;
        let deadline = generation.deadline();
        let view = nodes.view();
        let usable = |node: &&Arc<Node>| node.admits() && !plan.avoid.contains(&node.key);
        let progress = plan.progress_timeout;
        let length = plan.tokens.len() as u32 + plan.remaining;
        let fits = |node: &&Arc<Node>| node.info.max_context_tokens >= length;
        let decoders: Vec<_> = view
            .decode
            .iter()
            .filter(|node| node.info.model == generation.model.name)
            .filter(|d| view.prefill.iter().any(|p| View::check_pair(p, d).is_ok()))
            .filter(usable)
            .filter(fits)
            .collect();
        let needed = blocks_for(length as usize) as u32;
        let loads: Vec<_> = decoders.iter().map(|node| node.decode_candidate()).collect();
        let chosen = pick::decode(needed, &loads).ok_or(AttemptError::NoNode(v1::Role::Decode))?;
        let decoder = decoders[chosen].clone();

        let prefillers: Vec<_> =
            view.prefill.iter().filter(|p| View::check_pair(p, &decoder).is_ok()).filter(usable).filter(fits).collect();
        let (chosen, matched) =
            pick_prefill(&prefillers, &affinity, &plan.tokens).ok_or(AttemptError::NoNode(v1::Role::Prefill))?;
        let prefiller = prefillers[chosen].clone();
        let both = [&decoder, &prefiller];

        // One token is all that is wanted: the decode node has no part in it.
        let with_handoff = plan.remaining > 1;
        let mut decode = None;
        let mut handoff = None;
        if with_handoff {
            let placed = decoder.place(0);
            let request = v1::DecodeRequest {
                request_id: generation.request_id.0.clone(),
                prompt_tokens: plan.tokens.to_vec(),
                sampling: Some((&generation.sampling).into()),
                max_tokens: plan.remaining,
                stop_token_ids: generation.stop_token_ids.to_vec(),
                deadline_seconds: seconds_until(deadline),
                generated_tokens: plan.generated,
                producer: prefiller.schema.full_model.clone().unwrap_or_default(),
                incarnation: decoder.info.incarnation.clone(),
            };
            let mut client = decoder.decode_client();
            let mut stream = answer(&decoder, deadline, Some(progress), client.decode(request)).await?.into_inner();
            // It may have to wait there until others have ended.
            let event = answer(&decoder, deadline, None, stream.message()).await?;
            let Some(decode_event::Event::Reserved(reserved)) = event.and_then(|e| e.event) else {
                Err(unexpected(&decoder, "no reservation"))?;
                return;
            };
            yield Event::Reserved { node: decoder.info.node_id.clone(), held_tokens: reserved.held_tokens };
            handoff = Some(v1::HandoffTarget {
                ticket: reserved.ticket,
                kv_endpoint: reserved.kv_endpoint,
                kv_schema: reserved.kv_schema,
                held_tokens: reserved.held_tokens,
            });
            decode = Some((stream, placed));
        }

        let mut placed = prefiller.place((plan.tokens.len() as u64).saturating_sub(matched));
        let request = v1::PrefillRequest {
            request_id: generation.request_id.0.clone(),
            prompt_tokens: plan.tokens.to_vec(),
            sampling: Some((&generation.sampling).into()),
            handoff,
            prompt_logprobs: plan.prompt_logprobs,
            deadline_seconds: seconds_until(deadline),
            generated_tokens: plan.generated,
            incarnation: prefiller.info.incarnation.clone(),
        };
        let mut client = prefiller.prefill_client();
        let mut prefill = answer(&prefiller, deadline, Some(progress), client.prefill(request)).await?.into_inner();

        // Until the first token the prefill node speaks. The decode node gets that token by another way, with the KV,
        // and may be the first to say so: its words wait until the client has seen the first token.
        let mut early = None;
        loop {
            let event = tokio::select! {
                biased;
                event = prefill.message() => event.map_err(|status| failed(&prefiller, at_prefill(&both, &status, with_handoff), status)),
                event = next_decode(&mut decode), if early.is_none() => {
                    let status = match event {
                        Ok(Some(event)) => {
                            early = Some(event);
                            continue;
                        }
                        Ok(None) => Status::unknown("the stream ended before the first token"),
                        Err(status) => status,
                    };
                    // Its handoff may have failed because of the prefill node: avoid both, if others are there.
                    Err(failed(&decoder, &both, status))
                }
                () = prefiller.left() => Err(left(&prefiller)),
                () = decoder.left(), if with_handoff => Err(left(&decoder)),
                () = tokio::time::sleep_until(deadline) => Err(AttemptError::Deadline),
            };
            let event = event?;
            match event.and_then(|e| e.event) {
                Some(prefill_event::Event::Started(started)) => {
                    yield Event::Started { node: prefiller.info.node_id.clone(), cached_tokens: started.cached_tokens };
                }
                Some(prefill_event::Event::PromptLogprobs(logprobs)) => {
                    yield Event::PromptLogprobs(logprobs.tokens.into_iter().map(OutputToken::from).collect());
                }
                Some(prefill_event::Event::FirstToken(first)) => {
                    placed.prefilled();
                    // A prompt that is computed and does not arrive is of no use.
                    if !with_handoff {
                        prefiller.succeeded();
                    }
                    let Some(token) = first.token else { Err(unexpected(&prefiller, "a first token without id"))?; return; };
                    yield Event::Token(token.into(), v1::Role::Prefill);
                    break;
                }
                Some(prefill_event::Event::Transferred(_)) | None => {
                    Err(unexpected(&prefiller, "the end before the first token"))?;
                    return;
                }
            }
        }

        // From here on the decode node speaks; the prefill node ends its transfer.
        let Some((mut stream, _placed)) = decode else { return };
        let mut prefill = Some((prefill, placed));
        let mut trouble: Option<(AttemptError, Instant)> = None;
        let mut ready = false;
        let mut last_progress = Instant::now();
        loop {
            let give_up = match &trouble {
                _ if ready => last_progress + progress,
                Some((_, at)) => *at,
                None => deadline,
            };
            let event = tokio::select! {
                biased;
                event = next_event(&mut early, &mut stream) => {
                    let blamed = if ready { &both[..1] } else { &both[..] };
                    event.map_err(|status| failed(&decoder, blamed, status))
                }
                () = decoder.left() => Err(left(&decoder)),
                event = next_prefill(&mut prefill) => {
                    match event {
                        Ok(Some(_)) => {}
                        Ok(None) => prefill = None,
                        Err(status) => {
                            // Before its place is given up: a probe has failed then, and not been abandoned.
                            let error = failed(&prefiller, at_prefill(&both, &status, true), status);
                            prefill = None;
                            trouble = Some((error, Instant::now() + GRACE));
                        }
                    }
                    continue;
                }
                () = prefiller.left(), if prefill.is_some() => {
                    prefill = None;
                    trouble = Some((left(&prefiller), Instant::now() + GRACE));
                    continue;
                }
                () = tokio::time::sleep_until(give_up.min(deadline)) => Err(match trouble.take() {
                    _ if deadline <= give_up => AttemptError::Deadline,
                    _ if ready => silent(&decoder, progress),
                    Some((error, _)) => error,
                    None => AttemptError::Deadline,
                }),
            };
            let event = event?;
            last_progress = Instant::now();
            match event.and_then(|e| e.event) {
                Some(decode_event::Event::Ready(event)) => {
                    ready = true;
                    prefiller.succeeded();
                    decoder.succeeded();
                    yield Event::Ready(event.transfer);
                }
                Some(decode_event::Event::Token(token)) => yield Event::Token(token.into(), v1::Role::Decode),
                Some(decode_event::Event::Finished(finished)) => {
                    yield Event::Finished(finished.reason());
                    return;
                }
                Some(decode_event::Event::Reserved(_)) => { Err(unexpected(&decoder, "a second reservation"))?; return; }
                None => { Err(unexpected(&decoder, "the end of the stream before the end of the text"))?; return; }
            }
        }
    }
}

type DecodeStream = (tonic::Streaming<v1::DecodeEvent>, crate::node::Placed);
type PrefillStream = (tonic::Streaming<v1::PrefillEvent>, crate::node::Placed);

/// The decode node's next event; waits for ever where there is no decode node.
async fn next_decode(stream: &mut Option<DecodeStream>) -> Result<Option<v1::DecodeEvent>, Status> {
    match stream {
        Some((stream, _)) => stream.message().await,
        None => std::future::pending().await,
    }
}

/// The decode node's next event, which may have come before its time.
async fn next_event(
    early: &mut Option<v1::DecodeEvent>,
    stream: &mut tonic::Streaming<v1::DecodeEvent>,
) -> Result<Option<v1::DecodeEvent>, Status> {
    match early.take() {
        Some(event) => Ok(Some(event)),
        None => stream.message().await,
    }
}

async fn next_prefill(stream: &mut Option<PrefillStream>) -> Result<Option<v1::PrefillEvent>, Status> {
    match stream {
        Some((stream, _)) => stream.message().await,
        None => std::future::pending().await,
    }
}

fn seconds_until(deadline: Instant) -> f64 {
    // 0 would mean "the node's default".
    deadline.saturating_duration_since(Instant::now()).as_secs_f64().max(0.001)
}

fn describe(node: &Node, status: &Status) -> String {
    format!("{} ({}): {:?}: {}", node.info.node_id, node.url, status.code(), status.message())
}

fn unexpected(node: &Node, what: &str) -> AttemptError {
    node.failed();
    AttemptError::Failed { nodes: vec![node.key], message: format!("{} ({}): {what}", node.info.node_id, node.url) }
}

fn left(node: &Node) -> AttemptError {
    let message = format!("{} ({}) can't be used any more", node.info.node_id, node.url);
    AttemptError::Failed { nodes: vec![node.key], message }
}

fn silent(node: &Node, limit: Duration) -> AttemptError {
    unexpected(node, &format!("no progress within {} s", limit.as_secs_f64()))
}

/// A node's answer, for as long as the node is there and the request has time. `opening`: the answer is whether it takes
/// the request at all, which should not take longer.
async fn answer<T>(
    node: &Arc<Node>,
    deadline: Instant,
    opening: Option<Duration>,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, AttemptError> {
    let give_up = opening.map_or(deadline, |limit| deadline.min(Instant::now() + limit));
    tokio::select! {
        biased;
        answer = call => answer.map_err(|status| match status.code() {
            // Nothing has begun there, so nothing has failed.
            Code::Unavailable if opening.is_some() && !is_broken(&status) => {
                AttemptError::NoRoom { node: node.key, message: describe(node, &status) }
            }
            _ => failed(node, &[node], status),
        }),
        () = node.left() => Err(left(node)),
        () = tokio::time::sleep_until(give_up) => Err(match opening {
            Some(limit) if give_up < deadline => silent(node, limit),
            _ => AttemptError::Deadline,
        }),
    }
}

/// Who may be to blame for what a prefill node says, of the decode and the prefill node.
fn at_prefill<'a, 'b>(both: &'a [&'b Arc<Node>; 2], status: &Status, with_handoff: bool) -> &'a [&'b Arc<Node>] {
    match status.code() {
        // The handoff has failed, and that takes two.
        Code::Unavailable if with_handoff => both,
        _ => &both[1..],
    }
}

/// Did the connection fail, rather than the node refuse? Then nobody else is to blame.
fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// Tells the breakers of those who may have failed.
fn note(blamed: &[&Arc<Node>], status: &Status) {
    match blamed {
        [node] if is_broken(status) || status.code() == Code::Unavailable => node.failed(),
        _ => blamed.iter().for_each(|node| node.suspected()),
    }
}

/// What a node's status means for the request.
fn failed(node: &Arc<Node>, blamed: &[&Arc<Node>], status: Status) -> AttemptError {
    let message = describe(node, &status);
    match status.code() {
        Code::ResourceExhausted => AttemptError::NoRoom { node: node.key, message },
        Code::Aborted => AttemptError::Moved { node: node.key, message },
        Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => {
            AttemptError::Refused(status.message().to_owned())
        }
        // The time is the request's own.
        Code::DeadlineExceeded if !is_broken(&status) => AttemptError::Deadline,
        _ => {
            let blamed = if is_broken(&status) { std::slice::from_ref(&node) } else { blamed };
            note(blamed, &status);
            AttemptError::Failed { nodes: blamed.iter().map(|node| node.key).collect(), message }
        }
    }
}
