// Causal attention of many tokens of a sequence, on tensor cores (FlashAttention-2, Dao, arXiv 2307.08691), over paged
// keys and values. The batch's own keys and values are in the cache already.
#include "attention.cuh"

constexpr int PREFILL_WARPS = 4;
// Tokens of a tile: 16 a warp.
constexpr int PREFILL_QUERIES = 16 * PREFILL_WARPS;
// Keys that are in shared memory at a time. Of wide heads, 64 would not fit.
template <int D> constexpr int PREFILL_KEYS = D > 128 ? 32 : 64;

// Rows are 16 bytes longer than needed. So the eight rows that a tensor core reads at once lie in different banks.
template <class T, int D> struct PrefillShared {
    alignas(16) T keys[PREFILL_KEYS<D>][D + 8];
    alignas(16) T values[PREFILL_KEYS<D>][D + 8];
};

// A tile of 64 tokens of one head. A warp has 16 of the tokens, and all keys. Grid: heads, tiles.
template <class T, class Kv, class H> __device__ void prefill_attention(const Attention &p) {
    constexpr int D = H::D, KEYS = PREFILL_KEYS<D>;
    const int width = H::width(p);
    using Shared = PrefillShared<T, D>;
    BLOCK_SHARED(Shared, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int head = blockIdx.x, kv_head = head / (p.heads / p.kv_heads);
    const int2 tile = p.tiles[blockIdx.y];
    const Slice slice = p.slices[tile.x];
    // Token of the slice in row g of the warp's products; row g + 8 has the token 8 later.
    const int token = tile.y + warp * 16 + g;
    const T *q = static_cast<const T *>(p.q) + (size_t(slice.row) * p.heads + head) * width;
    uint32_t queries[D / 16][4];
    UNROLL(16) for (int k = 0; k < D / 16; k++) UNROLL(4) for (int i = 0; i < 4; i++) {
        const int row = token + i % 2 * 8;
        queries[k][i] = 0;
        if (row < slice.count) {
            const typename H::template Elements<2, T, T> of(p, q + size_t(row) * p.heads * width, k * 16 + i / 2 * 8 + 2 * t);
            queries[k][i] = pair(of.v[0], of.v[1]);
        }
    }
    float out[D / 8][4];
    UNROLL(32) for (int n = 0; n < D / 8; n++) UNROLL(4) for (int i = 0; i < 4; i++) out[n][i] = 0;
    // Of rows g and g + 8. Not -inf: a row may see none of the first keys, and its score less this one must be a number.
    float greatest[2] = {-1e30f, -1e30f}, sum[2] = {0, 0};

    const int last = tile.y + PREFILL_QUERIES < slice.count ? tile.y + PREFILL_QUERIES : slice.count;
    const int visible = slice.start + last;
    const int first = first_visible(p, slice.start + tile.y);
    for (int key = first / KEYS * KEYS; key < visible; key += KEYS) {
        for (int i = threadIdx.x; i < KEYS * (D / 8); i += PREFILL_WARPS * WARP) {
            const int row = i / (D / 8), column = i % (D / 8) * 8, at = key + row;
            // Zeros outside of all windows: a weight of 0 times what happens to be in memory may be NaN.
            Eight<T> k, v;
            memset(&k, 0, sizeof k);
            memset(&v, 0, sizeof v);
            if (at >= first && at < visible) {
                const int id = p.tables[slice.table + at / BLOCK_TOKENS];
                const size_t page = (size_t(id) * 2 * p.kv_heads + kv_head) * BLOCK_TOKENS + at % BLOCK_TOKENS;
                const Kv *from = static_cast<const Kv *>(p.kv) + page * width;
                using Row = typename H::template Elements<8, T, Kv>;
                const Row keys(p, from, column), values(p, from + size_t(p.kv_heads) * BLOCK_TOKENS * width, column);
                memcpy(&k, keys.v, sizeof k);
                memcpy(&v, values.v, sizeof v);
            }
            *reinterpret_cast<Eight<T> *>(&shared.keys[row][column]) = k;
            *reinterpret_cast<Eight<T> *>(&shared.values[row][column]) = v;
        }
        __syncthreads();
        float scores[KEYS / 8][4];
        UNROLL(8) for (int n = 0; n < KEYS / 8; n++) {
            UNROLL(4) for (int i = 0; i < 4; i++) scores[n][i] = 0;
            UNROLL(16) for (int k = 0; k < D / 16; k++) {
                const T *from = &shared.keys[n * 8 + g][k * 16 + 2 * t];
                const uint32_t keys[2] = {pair(from[0], from[1]), pair(from[8], from[9])};
                mma<T>(scores[n], queries[k], keys);
            }
        }
        UNROLL(8) for (int n = 0; n < KEYS / 8; n++) UNROLL(4) for (int i = 0; i < 4; i++) scores[n][i] *= p.scale;
        if (p.cap > 0) {
            UNROLL(8) for (int n = 0; n < KEYS / 8; n++) UNROLL(4) for (int i = 0; i < 4; i++) scores[n][i] = soft_cap(scores[n][i], p.cap);
        }
        UNROLL(2) for (int half = 0; half < 2; half++) {
            const int position = slice.start + token + half * 8, from = first_visible(p, position);
            float most = greatest[half];
            UNROLL(8) for (int n = 0; n < KEYS / 8; n++) UNROLL(2) for (int i = 0; i < 2; i++) {
                float &score = scores[n][2 * half + i];
                const int at = key + n * 8 + 2 * t + i;
                score = at <= position && at >= from ? score : -INFINITY;
                most = fmaxf(most, score);
            }
            // The four lanes with the same g share a row.
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float factor = exp2f(greatest[half] - most);
            greatest[half] = most;
            sum[half] *= factor;
            UNROLL(32) for (int n = 0; n < D / 8; n++) UNROLL(2) for (int i = 0; i < 2; i++) out[n][2 * half + i] *= factor;
            UNROLL(8) for (int n = 0; n < KEYS / 8; n++) UNROLL(2) for (int i = 0; i < 2; i++) {
                float &score = scores[n][2 * half + i];
                score = exp2f(score - most);
                sum[half] += score;
            }
        }
        // The result of one product has the layout of the left side of the next.
        UNROLL(4) for (int k = 0; k < KEYS / 16; k++) {
            uint32_t weights[4];
            UNROLL(4) for (int i = 0; i < 4; i++) {
                const float *of = &scores[2 * k + i / 2][i % 2 * 2];
                weights[i] = pair(from_float<T>(of[0]), from_float<T>(of[1]));
            }
            UNROLL(32) for (int n = 0; n < D / 8; n++) {
                uint32_t values[2];
                load_transposed(values, &shared.values[k * 16 + lane % 16][n * 8]);
                mma<T>(out[n], weights, values);
            }
        }
        // The next keys overwrite these.
        __syncthreads();
    }
    UNROLL(2) for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        const int row = token + half * 8;
        if (row >= slice.count) continue;
        T *to = static_cast<T *>(p.out) + size_t(slice.row + row) * p.out_stride + head * width;
        UNROLL(32) for (int n = 0; n < D / 8; n++) UNROLL(2) for (int i = 0; i < 2; i++) {
            const int d = n * 8 + 2 * t + i;
            if (d < width) to[d] = from_float<T>(out[n][2 * half + i] / sum[half]);
        }
    }
}

#define OF_HEAD(D, exact, name, T)                                                                                     \
    KERNEL(prefill_attention_##T##_##T##_##name, Attention, PREFILL_WARPS *WARP, prefill_attention<T, T, Head<D, exact>>) \
    KERNEL(prefill_attention_##T##_fp8_##name, Attention, PREFILL_WARPS *WARP, prefill_attention<T, fp8, Head<D, exact>>)
OF_EACH_HEAD(OF_HEAD, bf16)
OF_EACH_HEAD(OF_HEAD, f16)
#undef OF_HEAD
