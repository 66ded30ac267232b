//! Benchmark of the checksum. It is computed over every KV byte twice, once on each side.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use overfill_transport::tcp::frame::{checksum, next_sum};

/// One layer of one block of Llama-3.2-3B in bf16.
const BLOCK_BYTES: usize = 64 << 10;
/// Blocks per frame.
const BLOCKS: usize = 32;

fn sums(criterion: &mut Criterion) {
    let bytes: Vec<u8> = (0..BLOCKS * BLOCK_BYTES).map(|i| (i * 31 % 251) as u8).collect();
    let mut group = criterion.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("layer frame, block by block", |bencher| {
        bencher.iter(|| bytes.chunks(BLOCK_BYTES).fold(0, next_sum));
    });
    group.bench_function("in one piece", |bencher| bencher.iter(|| checksum(&bytes)));
    group.finish();
}

criterion_group!(benches, sums);
criterion_main!(benches);
