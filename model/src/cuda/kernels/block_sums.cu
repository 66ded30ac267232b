// Checksums of KV blocks where they lie, so that a handoff does not copy blocks to the host only to sum them.
#include "cuda.cuh"

// XXH3 with 64 bits, no seed and the default secret, for inputs of more than 240 bytes (Collet, XXH3 in the xxHash
// specification, version 0.2). An input is read in stripes of 64 bytes. Each adds to eight accumulators, so the order of
// the stripes between two scrambles does not matter.
constexpr int SUM_WARPS = 4;
constexpr int STRIPE = 64;
// Stripes between two scrambles.
constexpr int STRIPES = 16;
// Stripes that a warp reads at once: eight lanes for each.
constexpr int PARTS = WARP / 8;

// The default secret, as little-endian words.
__device__ constexpr uint64_t SECRET[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82,
    0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5,
    0x49daf0b751dd0d17, 0x9e68d429265516d3, 0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
constexpr uint64_t P32_1 = 0x9e3779b1, P32_2 = 0x85ebca77, P32_3 = 0xc2b2ae3d;
constexpr uint64_t P64_1 = 0x9e3779b185ebca87, P64_2 = 0xc2b2ae3d27d4eb4f, P64_3 = 0x165667b19e3779f9;
constexpr uint64_t P64_4 = 0x85ebca77c2b2ae63, P64_5 = 0x27d4eb2f165667c5;
__device__ constexpr uint64_t FIRST[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

// Eight bytes of the secret at any byte but a multiple of 8.
__device__ inline uint64_t secret_between(int byte) {
    const int shift = byte % 8 * 8;
    return SECRET[byte / 8] >> shift | SECRET[byte / 8 + 1] << (64 - shift);
}

struct BlockSums {
    // A layer's blocks. Eight-byte words.
    const uint64_t *blocks;
    // Numbers of the blocks to sum, [count].
    const int *ids;
    // [count].
    uint64_t *sums;
    // More than 240, a multiple of 8.
    int block_bytes;
    int count;
};

// What a word adds to its own accumulator, and to its neighbour's.
struct Added {
    uint64_t own = 0, other = 0;
    __device__ void add(uint64_t word, uint64_t key) {
        key ^= word;
        own += (key & 0xffffffff) * (key >> 32);
        other += word;
    }
};

// A warp for each block. A lane has accumulator lane % 8, and every fourth stripe. Grid: count / 4 rounded up.
__device__ inline void block_sums(const BlockSums &p) {
    const int lane = threadIdx.x % WARP, i = lane % 8, part = lane / 8, at = blockIdx.x * SUM_WARPS + threadIdx.x / WARP;
    if (at >= p.count) return;
    const int words = p.block_bytes / 8, stripes = (p.block_bytes - 1) / STRIPE;
    const uint64_t *block = p.blocks + size_t(p.ids[at]) * words;
    uint64_t keys[STRIPES / PARTS];
    UNROLL(STRIPES / PARTS) for (int k = 0; k < STRIPES / PARTS; k++) keys[k] = SECRET[k * PARTS + part + i];
    uint64_t sum = FIRST[i];
    for (int first = 0; first <= stripes; first += STRIPES) {
        Added added;
        UNROLL(STRIPES / PARTS) for (int k = 0; k < STRIPES / PARTS; k++) {
            const int stripe = first + k * PARTS + part;
            if (stripe < stripes) added.add(block[stripe * (STRIPE / 8) + i], keys[k]);
        }
        // The last stripe ends with the block, and may overlap the one before.
        const bool last = first + STRIPES > stripes;
        if (last && part == 0) added.add(block[words - STRIPE / 8 + i], secret_between(121 + 8 * i));
        uint64_t all = added.own + __shfl_xor_sync(~0u, added.other, 1);
        UNROLL(2) for (int o = 8; o < WARP; o *= 2) all += __shfl_xor_sync(~0u, all, o);
        sum += all;
        if (!last) sum = (sum ^ sum >> 47 ^ SECRET[16 + i]) * P32_1;
    }
    // Pairs of accumulators are multiplied to 128 bits and folded.
    const uint64_t mine = sum ^ secret_between(11 + 8 * i), other = __shfl_xor_sync(~0u, mine, 1);
    uint64_t folded = mine * other ^ __umul64hi(mine, other);
    folded += __shfl_xor_sync(~0u, folded, 2);
    folded += __shfl_xor_sync(~0u, folded, 4);
    uint64_t result = uint64_t(p.block_bytes) * P64_1 + folded;
    result = (result ^ result >> 37) * 0x165667919e3779f9;
    if (lane == 0) p.sums[at] = result ^ result >> 32;
}

KERNEL(block_sums_xxh3, BlockSums, SUM_WARPS *WARP, block_sums)
