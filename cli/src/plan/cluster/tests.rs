//! The simulated cluster against what queueing theory knows exactly.

use proptest::prelude::*;

use super::super::{curve::Point, mix::tests::drawn, profile::tests::round};
use super::*;

fn limits() -> EngineLimits {
    EngineLimits {
        max_batch_tokens: 512,
        step_target: Duration::from_secs(1),
        prefill_running: 16,
        decode_running: 32,
        router_running: 100_000,
    }
}

fn setup(layout: Layout, change: impl FnOnce(&mut Profile)) -> Setup {
    let mut profile = round();
    change(&mut profile);
    Setup {
        layout,
        prefill: NodeModel::new(&profile, &profile.full).unwrap(),
        decode: NodeModel::new(&profile, profile.decoder()).unwrap(),
        transfer_bytes_per_second: profile.transfer_bytes_per_second,
        kv_bytes_per_token: profile.kv_bytes_per_token,
        limits: limits(),
        one_machine: false,
    }
}

pub fn two_stage(prefill: usize, decode: usize) -> Setup {
    setup(Layout::TwoStage { prefill, decode }, |_| {})
}

pub fn load(rate: f64, measured: usize) -> Load {
    Load { rate, warm_up: measured / 5, measured, seed: 1, even: false }
}

/// Prompts of 32 tokens take 4.2 ms, and one at a time is computed.
fn one_at_a_time(nodes: usize) -> Setup {
    let mut setup = two_stage(nodes, 1);
    setup.limits.prefill_running = 1;
    setup
}

#[test]
fn one_node_waits_as_m_d_1() {
    for busy in [0.3, 0.6, 0.8] {
        let service = 4.2e-3;
        let outcome = run(&one_at_a_time(1), &drawn("32", "1"), &load(busy / service, 60_000));
        let mean = outcome.first_tokens.iter().map(|legs| legs.iter().sum::<f64>()).sum::<f64>() / 60_000.0;
        // Pollaczek-Khinchine for a constant service time.
        let expected = service * (1.0 + busy / (2.0 * (1.0 - busy)));
        assert!((mean / expected - 1.0).abs() < 0.05, "at {busy}: {mean} instead of {expected}");
        assert!((outcome.means.prefill_busy_nodes / busy - 1.0).abs() < 0.08, "{:?}", outcome.means);
    }
}

#[test]
fn a_decode_node_holds_as_many_requests_as_littles_law_says() {
    let outcome = run(&two_stage(4, 1), &drawn("64", "uniform:50,150"), &load(10.0, 3000));
    // What a request does on the decode node: prefill, handoff, and 99 steps on average.
    let seconds = outcome.itl.mean() * outcome.itl.count() as f64 / 3000.0 + 7.4e-3;
    let expected = 10.0 * seconds;
    assert!((outcome.means.seated_requests / expected - 1.0).abs() < 0.1, "{:?} {expected}", outcome.means);
    let batch = outcome.decode_rows / outcome.decode_steps;
    assert!((2.0..32.0).contains(&batch), "{batch}");
}

#[test]
fn a_request_alone_takes_what_its_steps_take() {
    let outcome = run(&two_stage(1, 1), &drawn("100", "11"), &load(1e-3, 20));
    // 64 tokens in the first step, since the node does not know its pace; all at once later.
    let ttft = outcome.ttft(0.5);
    assert!((ttft - 11e-3).abs() < 1e-9, "{ttft}");
    // 5 ms and half a millisecond per sequence; before the second token, 0.1 MB at 1 GB/s of which all but nothing is
    // hidden.
    assert!((outcome.itl.quantile(0.5) / 5.5e-3 - 1.0).abs() < 0.01, "{}", outcome.itl.quantile(0.5));
    assert_eq!((outcome.itl.count(), outcome.first_gap.count(), outcome.preemptions), (200, 20, 0));
}

#[test]
fn a_slow_link_delays_the_second_token_only() {
    let slow = setup(Layout::TwoStage { prefill: 1, decode: 1 }, |p| p.transfer_bytes_per_second = 1e5);
    let outcome = run(&slow, &drawn("100", "3"), &load(1e-3, 20));
    // 100 kB take one second, of which the 11 ms of the prefill are hidden.
    assert!((outcome.first_gap.mean() - (1.0 - 11e-3 + 5.5e-3)).abs() < 1e-3, "{}", outcome.first_gap.mean());
    assert!((outcome.ttft(0.5) - 11e-3).abs() < 1e-9);
}

#[test]
fn a_full_cache_delays_or_preempts_and_every_request_ends() {
    let small = setup(Layout::TwoStage { prefill: 2, decode: 1 }, |p| p.kv_pool_tokens = 640);
    let outcome = run(&small, &drawn("64", "200"), &load(4.0, 300));
    assert!(outcome.preemptions > 0, "{:?}", outcome.means);
    assert!(outcome.legs(0.95)[2] > 0.0, "no request waited for room");
    assert_eq!(outcome.first_tokens.len(), 300);
}

#[test]
fn answers_of_a_colocated_node_wait_for_prompts() {
    let colocated = setup(Layout::Colocated { nodes: 2 }, |_| {});
    let mix = drawn("lognormal:200,1500", "100");
    let (together, apart) = (run(&colocated, &mix, &load(4.0, 1000)), run(&two_stage(1, 1), &mix, &load(4.0, 1000)));
    assert!(together.itl.quantile(0.99) > 1.5 * apart.itl.quantile(0.99), "{}", together.itl.quantile(0.99));
    assert_eq!((together.first_tokens.len(), together.itl.count()), (1000, 99_000));
}

#[test]
fn the_spread_of_steps_is_the_spread_of_tokens() {
    let spread = setup(Layout::TwoStage { prefill: 1, decode: 1 }, |p| p.decode_spread = vec![0.5, 1.0, 3.0]);
    let outcome = run(&spread, &drawn("16", "100"), &load(1e-3, 50));
    for (share, factor) in [(0.2, 0.5), (0.5, 1.0), (0.9, 3.0)] {
        let itl = outcome.itl.quantile(share);
        assert!((itl / (factor * 5.5e-3) - 1.0).abs() < 0.01, "{share}: {itl}");
    }
}

#[test]
fn what_serving_adds_is_added() {
    let added = setup(Layout::TwoStage { prefill: 1, decode: 1 }, |p| {
        p.overhead.request_seconds = vec![1.0, 3.0];
        p.overhead.handoff_seconds = vec![0.5];
        p.overhead.steps = vec![Point { rows: 1, context_tokens: 0, seconds: 1e-3 }];
    });
    let outcome = run(&added, &drawn("100", "3"), &load(1e-3, 50));
    let [ttft, late] = [0.1, 0.9].map(|share| outcome.ttft(share));
    assert!((ttft - 1.011).abs() < 1e-9 && (late - 3.011).abs() < 1e-9, "{ttft} {late}");
    assert!((outcome.first_gap.mean() - 0.5065).abs() < 1e-4, "{}", outcome.first_gap.mean());
    assert!((outcome.itl.quantile(0.1) / 6.5e-3 - 1.0).abs() < 0.01, "{}", outcome.itl.quantile(0.1));
}

#[test]
fn nodes_of_one_machine_slow_each_other_down() {
    let mut shared = two_stage(1, 1);
    shared.one_machine = true;
    let mix = drawn("500", "60");
    let (apart, together) = (run(&two_stage(1, 1), &mix, &load(4.0, 800)), run(&shared, &mix, &load(4.0, 800)));
    assert!(together.ttft(0.5) > 1.2 * apart.ttft(0.5), "{}", together.ttft(0.5));
    assert!(together.itl.mean() > 1.1 * apart.itl.mean());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    /// Every measured request is answered once and in full, and no faster than alone.
    #[test]
    fn nothing_is_lost_and_nothing_is_free(
        (low, more, output) in (1_usize..200, 0_usize..900, 1_usize..60),
        (prefill, decode, colocated) in (1_usize..4, 1_usize..4, any::<bool>()),
        pool in 1500_usize..20_000,
        rate in 0.1_f64..60.0,
        hits in 0.0_f64..1.0,
    ) {
        let layout = if colocated { Layout::Colocated { nodes: prefill } } else { Layout::TwoStage { prefill, decode } };
        let setup = setup(layout, |p| p.kv_pool_tokens = pool);
        let mut mix = drawn(&format!("uniform:{low},{}", low + more), &output.to_string());
        mix.hit_rate = Some(hits);
        let outcome = run(&setup, &mix, &Load { rate, warm_up: 20, measured: 100, seed: 9, even: false });
        prop_assert_eq!(outcome.first_tokens.len(), 100);
        prop_assert_eq!(outcome.itl.count(), 100 * (output as u64 - 1));
        prop_assert!(outcome.first_tokens.iter().flatten().all(|leg| *leg >= 0.0));
        prop_assert!(outcome.first_tokens.is_sorted_by(|a, b| a.iter().sum::<f64>() <= b.iter().sum::<f64>()));
        prop_assert!(outcome.ttft(0.0) > 1e-3, "faster than a step: {}", outcome.ttft(0.0));
        let blocks = setup.prefill.kv_blocks * if colocated { prefill } else { decode };
        prop_assert!(outcome.means.used_blocks <= blocks as f64);
        let nodes = prefill as f64;
        prop_assert!(outcome.means.prefill_busy_nodes <= nodes && outcome.means.sending_nodes <= nodes);
        // The same seed gives the same run.
        let again = run(&setup, &mix, &Load { rate, warm_up: 20, measured: 100, seed: 9, even: false });
        prop_assert_eq!(again.first_tokens, outcome.first_tokens);
    }
}
