use overfill_kv::block_hashes;
use overfill_node::NodeMetrics;
use overfill_transport::MemoryStore;

use super::*;

struct Node {
    pool: BlockPool,
    load: Arc<LoadState>,
}

fn node(blocks: usize) -> Node {
    let pool = BlockPool::new(blocks);
    Node { load: LoadState::new(pool.clone(), NodeMetrics::new("m", "p").unwrap(), None, Duration::MAX), pool }
}

fn job(node: &Node, tokens: Vec<u32>) -> (Box<Job>, mpsc::Receiver<SequenceEvent>) {
    let (events, receiver) = mpsc::channel(CLIENT_EVENTS);
    let request = Request {
        id: RequestId("r".into()),
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
    let Ok(reserved) = job.reserve(&node.pool, 0, 4, &node.load) else { panic!("no room") };
    assert!(matches!(receiver.try_recv(), Ok(SequenceEvent::Reserved { .. })));
    (reserved.ready(5, &node.pool), receiver)
}

fn token(token: u32) -> OutputToken {
    OutputToken { token, logprob: f32::NAN, top: Vec::new() }
}

#[test]
fn a_request_waits_for_room_and_gives_all_back() {
    let node = node(3);
    let (first, _first_client) = decoding(&node, vec![1; 32]);
    let (second, second_client) = job(&node, vec![2; 32]);
    let Err(second) = second.reserve(&node.pool, 1, 4, &node.load) else { panic!("there is no room") };
    assert_eq!((node.load.load().running, node.load.load().waiting), (1, 1));
    drop(first);
    let Ok(second) = second.reserve(&node.pool, 0, 4, &node.load) else { panic!("there is room") };
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
    while sequence.steps(Duration::ZERO) {
        sequence.flow.push(token(2));
        if sequence.seat(Duration::ZERO).lacks_block {
            sequence.grow(node.pool.allocate(1).unwrap());
        }
    }
    assert!(sequence.seat(Duration::ZERO).sits_out);
    for _ in 0..3 {
        client.try_recv().unwrap();
    }
    assert!(sequence.steps(Duration::ZERO));
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
