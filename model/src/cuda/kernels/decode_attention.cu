// Attention of the newest token of each sequence: flash decoding (Dao et al., 2023) over paged keys and values.
#include "attention.cuh"

constexpr int DECODE_WARPS = 4;
// Query heads of a block, at most: the width of a tensor core's result.
constexpr int DECODE_HEADS = 8;

template <int D> struct DecodeShared {
    // Weights of one block of keys, and the factor of earlier sums.
    float weights[DECODE_WARPS][BLOCK_TOKENS][DECODE_HEADS];
    float factor[DECODE_WARPS][DECODE_HEADS];
    // Results of the warps: greatest score, sum of weights, weighted values.
    float greatest[DECODE_WARPS][DECODE_HEADS];
    float sum[DECODE_WARPS][DECODE_HEADS];
    float values[DECODE_WARPS][DECODE_HEADS][D];
};

// The sequence's blocks are split between thread blocks, and those of a thread block between its warps. A block of 16
// keys times up to 8 query heads of a group is one tensor core product. Values are few operations per byte, so they need
// no tensor cores.
//
// Grid: splits, kv_heads * (group / 8 rounded up), slices.
template <class T, class Kv, class H> __device__ void decode_attention(const Attention &p) {
    // Elements of a row that a lane reads at once, the number of such reads, and values of a lane.
    constexpr int D = H::D, E = 8, READS = D / (4 * E), V = D / WARP;
    const int width = H::width(p);
    BLOCK_SHARED(DecodeShared<D>, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int group = p.heads / p.kv_heads, parts = (group + DECODE_HEADS - 1) / DECODE_HEADS;
    const int kv_head = blockIdx.y / parts, first = blockIdx.y % parts * DECODE_HEADS;
    const int heads = group - first < DECODE_HEADS ? group - first : DECODE_HEADS, head = kv_head * group + first;
    const Slice slice = p.slices[blockIdx.z];
    const int length = slice.count == 0 ? 0 : slice.start + 1, blocks = (length + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    // Keys before this one are outside of the window.
    const int visible = first_visible(p, slice.start), begin = visible / BLOCK_TOKENS;
    const int each = (blocks - begin + p.splits - 1) / p.splits;
    const int end = begin + (int(blockIdx.x) + 1) * each < blocks ? begin + (blockIdx.x + 1) * each : blocks;

    // The queries are the right side of the product: column g is head g. They stay in registers.
    uint32_t queries[READS][E / 4][2];
    UNROLL(READS) for (int i = 0; i < READS; i++) UNROLL(2) for (int half = 0; half < E / 4; half++) {
        queries[i][half][0] = queries[i][half][1] = 0;
        if (g < heads && length > 0) {
            const T *q = static_cast<const T *>(p.q) + (size_t(slice.row) * p.heads + head + g) * width;
            const typename H::template Elements<4, T, T> of(p, q, (i * 4 + t) * E + 4 * half);
            queries[i][half][0] = pair(of.v[0], of.v[1]);
            queries[i][half][1] = pair(of.v[2], of.v[3]);
        }
    }
    // Of heads 2t and 2t + 1. All lanes with the same t agree on the greatest score; each sums its own keys.
    float greatest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    float values[DECODE_HEADS][V];
    UNROLL(8) for (int h = 0; h < DECODE_HEADS; h++) UNROLL(V) for (int i = 0; i < V; i++) values[h][i] = 0;

    for (int block = begin + blockIdx.x * each + warp; block < end; block += DECODE_WARPS) {
        const int id = p.tables[slice.table + block], left = length - block * BLOCK_TOKENS;
        const int tokens = left < BLOCK_TOKENS ? left : BLOCK_TOKENS, hidden = visible - block * BLOCK_TOKENS;
        const Kv *keys = static_cast<const Kv *>(p.kv) + (size_t(id) * 2 * p.kv_heads + kv_head) * BLOCK_TOKENS * width;
        float scores[4] = {0, 0, 0, 0};
        UNROLL(READS) for (int i = 0; i < READS; i++) {
            using Keys = typename H::template Elements<E, T, Kv>;
            const Keys low(p, keys + g * width, (i * 4 + t) * E), high(p, keys + (g + 8) * width, (i * 4 + t) * E);
            UNROLL(2) for (int half = 0; half < E / 4; half++) {
                const int j = 4 * half;
                const uint32_t left_side[4] = {pair(low.v[j], low.v[j + 1]), pair(high.v[j], high.v[j + 1]),
                                               pair(low.v[j + 2], low.v[j + 3]), pair(high.v[j + 2], high.v[j + 3])};
                mma<T>(scores, left_side, queries[i][half]);
            }
        }
        // scores: keys g, g, g + 8, g + 8 of heads 2t, 2t + 1, 2t, 2t + 1. Keys past the end may be anything.
        UNROLL(4) for (int i = 0; i < 4; i++) scores[i] *= p.scale;
        if (p.cap > 0) UNROLL(4) for (int i = 0; i < 4; i++) scores[i] = soft_cap(scores[i], p.cap);
        UNROLL(4) for (int i = 0; i < 4; i++) {
            const int key = g + i / 2 * 8;
            scores[i] = key < tokens && key >= hidden ? scores[i] : -INFINITY;
        }
        UNROLL(2) for (int i = 0; i < 2; i++) {
            float most = fmaxf(scores[i], scores[i + 2]);
            UNROLL(3) for (int o = 4; o < WARP; o *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
            most = fmaxf(most, greatest[i]);
            const float factor = exp2f(greatest[i] - most);
            greatest[i] = most;
            const float low = exp2f(scores[i] - most), high = exp2f(scores[i + 2] - most);
            sum[i] = sum[i] * factor + low + high;
            shared.weights[warp][g][2 * t + i] = low;
            shared.weights[warp][g + 8][2 * t + i] = high;
            if (g == 0) shared.factor[warp][2 * t + i] = factor;
        }
        __syncwarp();
        UNROLL(8) for (int h = 0; h < DECODE_HEADS; h++) {
            if (h < heads) UNROLL(V) for (int i = 0; i < V; i++) values[h][i] *= shared.factor[warp][h];
        }
        const Kv *rows = keys + size_t(p.kv_heads) * BLOCK_TOKENS * width;
        for (int token = hidden > 0 ? hidden : 0; token < tokens; token++) {
            const typename H::template Elements<V, float, Kv> of(p, rows + token * width, lane * V);
            UNROLL(8) for (int h = 0; h < DECODE_HEADS; h++) {
                if (h < heads) UNROLL(V) for (int i = 0; i < V; i++) values[h][i] += shared.weights[warp][token][h] * of.v[i];
            }
        }
        // The next block overwrites the weights.
        __syncwarp();
    }
    UNROLL(2) for (int i = 0; i < 2; i++) {
        UNROLL(3) for (int o = 4; o < WARP; o *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], o);
        if (g == 0) {
            shared.greatest[warp][2 * t + i] = greatest[i];
            shared.sum[warp][2 * t + i] = sum[i];
        }
    }
    UNROLL(8) for (int h = 0; h < DECODE_HEADS; h++) UNROLL(V) for (int i = 0; i < V; i++) shared.values[warp][h][lane * V + i] = values[h][i];
    __syncthreads();
    for (int i = threadIdx.x; i < heads * width; i += DECODE_WARPS * WARP) {
        const int h = i / width, d = i % width;
        float most = -INFINITY, total = 0, value = 0;
        UNROLL(4) for (int w = 0; w < DECODE_WARPS; w++) most = fmaxf(most, shared.greatest[w][h]);
        UNROLL(4) for (int w = 0; w < DECODE_WARPS; w++) {
            const float factor = shared.greatest[w][h] == -INFINITY ? 0.f : exp2f(shared.greatest[w][h] - most);
            total += factor * shared.sum[w][h];
            value += factor * shared.values[w][h][d];
        }
        float *out = p.partial + ((size_t(blockIdx.z) * p.heads + head + h) * p.splits + blockIdx.x) * (width + 2);
        out[2 + d] = value;
        if (d == 0) {
            out[0] = most;
            out[1] = total;
        }
    }
}

// Combines the splits of decode_attention. Grid: slices, heads.
template <class T> __device__ void combine(const Attention &p) {
    const int width = p.head_dim, row = width + 2;
    const Slice slice = p.slices[blockIdx.x];
    if (slice.count == 0) return;
    const float *partial = p.partial + (size_t(blockIdx.x) * p.heads + blockIdx.y) * p.splits * row;
    float most = -INFINITY, total = 0;
    for (int s = 0; s < p.splits; s++) most = fmaxf(most, partial[s * row]);
    for (int s = 0; s < p.splits; s++) total += partial[s * row + 1] * exp2f(partial[s * row] - most);
    T *out = static_cast<T *>(p.out) + size_t(slice.row) * p.out_stride + blockIdx.y * width;
    for (int d = threadIdx.x; d < width; d += blockDim.x) {
        float value = 0;
        for (int s = 0; s < p.splits; s++) value += partial[s * row + 2 + d] * exp2f(partial[s * row] - most);
        out[d] = from_float<T>(value / total);
    }
}

#define OF_HEAD(D, exact, name, T)                                                                                     \
    KERNEL(decode_attention_##T##_##T##_##name, Attention, DECODE_WARPS *WARP, decode_attention<T, T, Head<D, exact>>)  \
    KERNEL(decode_attention_##T##_fp8_##name, Attention, DECODE_WARPS *WARP, decode_attention<T, fp8, Head<D, exact>>)
OF_EACH_HEAD(OF_HEAD, bf16)
OF_EACH_HEAD(OF_HEAD, f16)
#undef OF_HEAD
KERNEL(combine_bf16, Attention, 128, combine<bf16>)
KERNEL(combine_f16, Attention, 128, combine<f16>)
