use overfill_kv::block_hashes;
use overfill_node::NodeMetrics;
use overfill_transport::MemoryStore;

use super::*;
use std::time::Duration;

struct Node {
    pool: BlockPool,
    load: Arc<LoadState>,
}

fn node(blocks: usize) -> Node {
    let pool = BlockPool::new(blocks);
    Node { load: LoadState::new(pool.clone(), NodeMetrics::new("m", "p").unwrap(), None, Duration::MAX), pool }
}

/// Limits of a node whose layers have these windows.
fn limits(windows: &[Option<usize>]) -> EngineLimits {
    let limits = overfill_node::RequestLimits::of_a_small_node(overfill_kv::Role::Decode);
    let mut schema = limits.identity.schema.clone();
    schema.layer_attention = windows.iter().map(|window| schema.rope.of_layer(*window)).collect();
    EngineLimits { max_running: 4, max_waiting: 1, windows: schema.windows() }
}

fn job(node: &Node, tokens: Vec<u32>) -> (Box<Job>, mpsc::Receiver<SequenceEvent>) {
    let (events, receiver) = mpsc::channel(CLIENT_EVENTS);
    let request = Request {
        id: RequestId("r".into()),
        variant: 0,
        generated: 0,
        sampling: SamplingParams::greedy(),
        constraint: None,
        max_tokens: 200,
        stop_token_ids: vec![9],
        producer: Some("full".into()),
        deadline: Instant::now(),
        mode: Mode::Draft,
        tokens,
    };
    let hashes = block_hashes(&request.tokens, "full");
    let waiting = node.load.try_wait(1).unwrap();
    (Box::new(Job { arrival: 0, request, hashes, events, waiting }), receiver)
}

fn decoding(node: &Node, tokens: Vec<u32>) -> (Sequence, mpsc::Receiver<SequenceEvent>) {
    let (job, mut receiver) = job(node, tokens);
    let Ok(reserved) = job.reserve(&node.pool, 0, &limits(&[]), &node.load) else { panic!("no room") };
    assert!(matches!(receiver.try_recv(), Ok(SequenceEvent::Reserved { .. })));
    (reserved.ready(5, &node.pool, Windows::NONE), receiver)
}

fn token(token: u32) -> OutputToken {
    OutputToken { token, logprob: f32::NAN, top: Vec::new() }
}

#[test]
fn a_request_waits_for_room_and_gives_all_back() {
    let node = node(3);
    let (first, _first_client) = decoding(&node, vec![1; 32]);
    let (second, second_client) = job(&node, vec![2; 32]);
    let Err(second) = second.reserve(&node.pool, 1, &limits(&[]), &node.load) else { panic!("there is no room") };
    assert_eq!((node.load.load().running, node.load.load().waiting), (1, 1));
    drop(first);
    let Ok(second) = second.reserve(&node.pool, 0, &limits(&[]), &node.load) else { panic!("there is room") };
    assert_eq!((node.pool.in_use(), node.load.load().running), (2, 1));
    drop((second, second_client));
    assert_eq!(node.pool.in_use(), 0);
    assert_eq!((node.load.load().running, node.load.load().waiting), (0, 0));
}

#[test]
fn a_prompt_is_found_again_but_not_what_was_decoded_behind_it() {
    let node = node(8);
    let (mut sequence, _client) = decoding(&node, vec![1; 40]);
    for _ in 0..30 {
        sequence.flow.push(token(1));
    }
    drop(sequence);
    let hashes = block_hashes(&[1; 70], "full");
    assert_eq!(node.pool.lookup(&hashes).len(), 2);
    assert!(node.pool.lookup(&block_hashes(&[1; 70], "another")).is_empty());
}

#[test]
fn a_client_that_does_not_read_makes_its_sequence_sit_out() {
    let node = node(8);
    let (mut sequence, mut client) = decoding(&node, vec![1; 3]);
    while sequence.steps() {
        sequence.flow.push(token(2));
        if sequence.seat().lacks_block {
            sequence.grow(node.pool.allocate(1).unwrap());
        }
    }
    assert!(sequence.seat().sits_out);
    for _ in 0..3 {
        client.try_recv().unwrap();
    }
    assert!(sequence.steps());
    sequence.flow.push(token(9));
    assert_eq!(sequence.flow.finish(), Some(FinishReason::Stop));
    sequence.flow.tell(SequenceEvent::Finished(FinishReason::Stop));
    let heard = std::iter::from_fn(|| client.try_recv().ok()).last();
    assert!(matches!(heard, Some(SequenceEvent::Finished(FinishReason::Stop))), "{heard:?}");
}

#[test]
fn kv_survives_host_memory() {
    let node = node(6);
    let store = MemoryStore::new(2, 6, 64);
    let (sequence, _client) = decoding(&node, vec![1; 40]);
    for layer in 0..2 {
        let fill = &mut |i: usize, block: &mut [u8]| block.fill((layer * 10 + i) as u8);
        store.write(layer, &sequence.blocks, fill).unwrap();
    }
    let tokens = sequence.flow.tokens.clone();
    let Ok(swapped) = sequence.swap_out(&store, &node.load) else { panic!("reading failed") };
    assert_eq!((node.pool.in_use(), node.load.load().running, node.load.load().waiting), (0, 0, 1));
    let elsewhere = node.pool.allocate(2).unwrap();
    let lease = node.pool.allocate(swapped.blocks).unwrap();
    let sequence = swapped.swap_in(lease, &store, &node.load).unwrap();
    drop(elsewhere);
    assert_eq!(sequence.flow.tokens, tokens);
    assert_eq!((node.load.load().running, node.load.load().waiting), (1, 0));
    for layer in 0..2 {
        let check = &mut |i: usize, block: &[u8]| assert!(block.iter().all(|b| *b == (layer * 10 + i) as u8));
        store.read(layer, &sequence.blocks, check).unwrap();
    }
}

/// The first decode step feeds position 100. A window of 40 tokens shows it the blocks from the fourth on.
#[test]
fn blocks_that_no_layer_needs_are_neither_reserved_nor_kept() {
    let node = node(8);
    let limits = limits(&[Some(40), Some(17)]);
    let (job, mut client) = job(&node, vec![1; 100]);
    let Ok(reserved) = job.reserve(&node.pool, 0, &limits, &node.load) else { panic!("no room") };
    assert_eq!((reserved.to_fill().1.len(), node.pool.in_use()), (4, 4));
    assert!(matches!(client.try_recv(), Ok(SequenceEvent::Reserved { held_blocks: 3, cached_blocks: 0, .. })));
    let mut sequence = reserved.ready(5, &node.pool, limits.windows);
    let store = MemoryStore::new(1, 8, 64);
    for tokens in 101..=400 {
        sequence.forget(limits.windows);
        if sequence.seat().lacks_block {
            sequence.grow(node.pool.allocate(1).unwrap());
        }
        let position = tokens - 1;
        let needed = limits.windows.needed_from(position);
        let own = &sequence.blocks[needed..];
        assert_eq!((sequence.forgotten, sequence.blocks.len()), (needed, position / 16 + 1));
        assert_eq!(own.len(), node.pool.in_use());
        // The KV of a position is where it was written, also after a preemption.
        let mark = |i: usize| (needed + i) as u8;
        store.write(0, &own[own.len() - 1..], &mut |_, block| block.fill(mark(own.len() - 1))).unwrap();
        if tokens % 50 == 0 {
            let Ok(swapped) = sequence.swap_out(&store, &node.load) else { panic!("reading failed") };
            assert_eq!(node.pool.in_use(), 0);
            let lease = node.pool.allocate(swapped.blocks).unwrap();
            sequence = swapped.swap_in(lease, &store, &node.load).unwrap();
        }
        if tokens > 160 {
            store.read(0, &sequence.blocks[needed..], &mut |i, block| assert_eq!(block, [mark(i); 64])).unwrap();
        }
        let _ = client.try_recv();
        sequence.flow.computed = sequence.flow.tokens.len();
        sequence.flow.push(token(1));
    }
    drop(sequence);
    assert_eq!(node.pool.in_use(), 0);
}

/// Of a prompt of 100 tokens, a layer with a window of 40 has the blocks from the fourth on.
#[test]
fn a_block_without_all_layers_is_found_only_where_they_do_not_need_it() {
    let node = node(32);
    let limits = limits(&[Some(40), None]);
    let cached = |tokens: usize| job(&node, vec![1; tokens]).0.cached(&node.pool, limits.windows).len();
    let (job, _client) = job(&node, vec![1; 100]);
    let Ok(reserved) = job.reserve(&node.pool, 0, &limits, &node.load) else { panic!("no room") };
    drop(reserved.ready(5, &node.pool, limits.windows));
    assert_eq!([100, 101, 130, 999].map(cached), [6; 4]);
    // Position 80 sees the third block, position 87 does not.
    assert_eq!([80, 86, 87, 99].map(cached), [2, 2, 5, 6]);
    assert_eq!([40, 20].map(cached), [0, 0]);
}
