//! Tests of attempts on simulated nodes.

#![allow(clippy::unwrap_used)]

use overfill_simulated::{Options, SimulatedNode};
use tokio::time::timeout;
use tonic::transport::Endpoint;

use super::*;
use crate::{
    attempt::choose::tests::{node, plan},
    node::Node,
};

fn at(simulated: &SimulatedNode, key: u64, role: Role) -> Arc<Node> {
    let Options { schema, .. } = Options::default();
    let described = node(key, role, |info| info.schema = schema);
    let channel = Endpoint::from_shared(simulated.url.clone()).unwrap().connect_lazy();
    Arc::new(Node::new(key, simulated.url.clone(), described.info.clone(), None, channel, described.load()))
}

/// Runs an attempt and returns its token ids. With `patience`, every wait is cancelled after this time and started again.
/// Also returns the number of cancelled waits.
async fn tokens(view: &View, patience: Option<Duration>) -> (Vec<u32>, usize) {
    let mut attempt = Attempt::new(view, &Mutex::new(Affinity::new(64)), plan(20, 30, &[])).unwrap();
    let (mut ids, mut given_up) = (Vec::new(), 0);
    loop {
        let event = match patience {
            None => attempt.next().await,
            Some(patience) => match timeout(patience, attempt.next()).await {
                Ok(event) => event,
                Err(_) => {
                    given_up += 1;
                    continue;
                }
            },
        };
        match event.unwrap() {
            AttemptEvent::Token(token, _) => ids.push(token.token),
            AttemptEvent::Finished(reason) => {
                assert_eq!(reason, FinishReason::Length);
                assert!(attempt.next().await.is_err());
                return (ids, given_up);
            }
            AttemptEvent::Reserved { .. }
            | AttemptEvent::Started { .. }
            | AttemptEvent::PromptLogprobs(_)
            | AttemptEvent::Ready(_) => {}
            AttemptEvent::Judged { .. } | AttemptEvent::Chosen(..) | AttemptEvent::Asked | AttemptEvent::Closed => {
                panic!("the full model has nothing to do in mode draft")
            }
        }
    }
}

#[tokio::test]
async fn waits_that_are_given_up_lose_nothing() {
    let slow = Options {
        prefill_time: Duration::from_millis(20),
        token_time: Duration::from_millis(3),
        report_delay: Duration::from_millis(10),
        ..Options::default()
    };
    let prefill = SimulatedNode::prefill(slow.clone()).await.unwrap();
    let decode = SimulatedNode::decode(slow).await.unwrap();
    let view = View {
        prefill: vec![at(&prefill, 1, Role::Prefill)],
        decode: vec![at(&decode, 2, Role::Decode)],
        ..View::default()
    };
    let (ids, _) = tokens(&view, None).await;
    assert_eq!(ids.len(), 30);
    let (same, given_up) = tokens(&view, Some(Duration::from_micros(100))).await;
    assert!(given_up > 0);
    assert_eq!(same, ids);
    assert_eq!((prefill.taken(), decode.taken()), (2, 2));
}

#[tokio::test]
async fn an_attempt_that_is_dropped_ends_on_both_nodes() {
    let prefill = SimulatedNode::prefill(Options::default()).await.unwrap();
    let decode = SimulatedNode::decode(Options::default()).await.unwrap();
    decode.set_paused(true);
    let view = View {
        prefill: vec![at(&prefill, 1, Role::Prefill)],
        decode: vec![at(&decode, 2, Role::Decode)],
        ..View::default()
    };
    let mut attempt = Attempt::new(&view, &Mutex::new(Affinity::new(64)), plan(20, 30, &[])).unwrap();
    while !matches!(attempt.next().await.unwrap(), AttemptEvent::Ready(_)) {}
    assert_eq!(decode.active(), 1);
    drop(attempt);
    while prefill.active() + decode.active() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn prompts_that_waited_for_room_spread_over_the_prefill_nodes() {
    let nodes = [
        SimulatedNode::prefill(Options::default()).await.unwrap(),
        SimulatedNode::prefill(Options::default()).await.unwrap(),
    ];
    let decode = SimulatedNode::decode(Options::default()).await.unwrap();
    let view = View {
        prefill: vec![at(&nodes[0], 1, Role::Prefill), at(&nodes[1], 2, Role::Prefill)],
        decode: vec![at(&decode, 3, Role::Decode)],
        ..View::default()
    };
    let affinity = Mutex::new(Affinity::new(64));
    // Both are chosen while no prefill node has work.
    let mut attempts = [(); 2].map(|()| Attempt::new(&view, &affinity, plan(10, 30, &[])).unwrap());
    for attempt in &mut attempts {
        assert!(matches!(attempt.next().await.unwrap(), AttemptEvent::Reserved { .. }));
        attempt.choose_prefill_again(&view, &affinity);
        while !matches!(attempt.next().await.unwrap(), AttemptEvent::Started { .. }) {}
    }
    assert_eq!(nodes.each_ref().map(SimulatedNode::taken), [1, 1]);
}
