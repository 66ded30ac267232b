//! Benchmarks of the block pool (allocate, publish, look up, free) and of block hashing. Every request does these on
//! both nodes.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use overfill_kv::{BlockPool, block_hashes, blocks_for};

/// Prompt length in tokens.
const TOKENS: usize = 8192;
/// Pool size in blocks.
const POOL: usize = 16 * 1024;

fn prompt(seed: u32) -> Vec<u32> {
    (0..TOKENS as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed) % 128_256).collect()
}

fn blocks(criterion: &mut Criterion) {
    let count = blocks_for(TOKENS);
    let mut group = criterion.benchmark_group("pool");
    group.throughput(Throughput::Elements(count as u64));
    let pool = BlockPool::new(POOL);
    group.bench_function("allocate and free", |bencher| bencher.iter(|| pool.allocate(count)));

    // Every block of this pool is cached, so each allocation evicts and each iteration publishes again.
    let pool = BlockPool::new(POOL);
    let mut seed = 0;
    let mut fill = move || {
        seed += 1;
        block_hashes(&prompt(seed), "bench")
    };
    let publish = |hashes: &[overfill_kv::BlockHash]| {
        if let Ok(lease) = pool.allocate(count) {
            pool.publish(lease.blocks(), hashes);
        }
    };
    (0..POOL / count).for_each(|_| publish(&fill()));
    group.bench_function("evict, publish and free", |bencher| {
        bencher.iter_batched(&mut fill, |hashes| publish(&hashes), BatchSize::SmallInput);
    });

    let pool = BlockPool::new(POOL);
    let hashes = block_hashes(&prompt(0), "bench");
    if let Ok(lease) = pool.allocate(count) {
        pool.publish(lease.blocks(), &hashes);
    }
    group.bench_function("look up and free", |bencher| bencher.iter(|| pool.lookup(&hashes)));
    group.finish();

    let mut group = criterion.benchmark_group("prefix");
    group.throughput(Throughput::Elements(TOKENS as u64));
    let tokens = prompt(0);
    group.bench_function("block hashes", |bencher| bencher.iter(|| block_hashes(&tokens, "bench")));
    group.finish();
}

criterion_group!(benches, blocks);
criterion_main!(benches);
