// Operations on rows of activations: norms, rotation, and what writes keys and values into the cache.
#include "cuda.cuh"

constexpr int NORM_WARPS = 8;

struct RmsNorm {
    // [*, padded].
    const float *x;
    // [padded], zero in the padding.
    const float *weight;
    // [rows, padded] of T.
    void *out;
    // Rows of x to normalise, [rows]; null: all, in order.
    const int *rows;
    // Number of elements that the mean is over.
    int width;
    int padded;
    float eps;
};

struct NormShared {
    float sums[NORM_WARPS];
};

// out = x / rms(x) * weight (Zhang & Sennrich, arXiv 1910.07467). x is zero in the padding, and so is out. Grid: rows.
template <class T> __device__ void rms_norm(const RmsNorm &p) {
    BLOCK_SHARED(NormShared, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const float *x = p.x + size_t(p.rows ? p.rows[blockIdx.x] : blockIdx.x) * p.padded;
    float sum = 0;
    for (int i = threadIdx.x; i < p.width; i += NORM_WARPS * WARP) sum += x[i] * x[i];
    sum = warp_sum(sum);
    if (lane == 0) shared.sums[warp] = sum;
    __syncthreads();
    sum = 0;
    UNROLL(NORM_WARPS) for (int w = 0; w < NORM_WARPS; w++) sum += shared.sums[w];
    const float scale = rsqrtf(sum / p.width + p.eps);
    T *out = static_cast<T *>(p.out) + size_t(blockIdx.x) * p.padded;
    for (int i = threadIdx.x; i < p.padded; i += NORM_WARPS * WARP) out[i] = from_float<T>(x[i] * scale * p.weight[i]);
}

struct RopeTable {
    const int *positions;
    // [ropes, half].
    const float *frequencies;
    // [ropes, rows, half].
    float *cos;
    float *sin;
    int rows;
    int half;
};

// Angles of all rows, once a step rather than once a layer. Grid: rows, ropes.
__device__ inline void rope_table(const RopeTable &p) {
    for (int i = threadIdx.x; i < p.half; i += blockDim.x) {
        const float angle = float(p.positions[blockIdx.x]) * p.frequencies[blockIdx.y * p.half + i];
        const size_t at = (size_t(blockIdx.y) * p.rows + blockIdx.x) * p.half + i;
        p.cos[at] = cosf(angle);
        p.sin[at] = sinf(angle);
    }
}

constexpr int POSITION_WARPS = 4;
// Pairs of elements per lane, for heads of up to 256.
constexpr int POSITION_PAIRS = 4;

struct Position {
    // [rows, stride] of T: queries, keys, values.
    const void *qkv;
    // Norms of the heads of queries and keys, [head_dim]; null: none.
    const float *query_norm;
    const float *key_norm;
    // The layer's rope, [rows, head_dim / 2]; null: no rotation.
    const float *cos;
    const float *sin;
    // Where a row's key and value go: block * 16 + token. Below 0: nowhere.
    const int *slots;
    // [rows, heads * head_dim] of T.
    void *q;
    // The layer's cache, [blocks][K|V][kv_heads][16][head_dim] of Kv.
    void *kv;
    int heads;
    int kv_heads;
    int head_dim;
    // Elements from one row of `qkv` to the next.
    int stride;
    float eps;
};

// Normalises and rotates the heads of queries and keys, and writes keys and values into the cache. Rotation pairs the
// first half of a head with its second (Su et al., arXiv 2104.09864, in Hugging Face's order).
//
// A warp for each head. Grid: rows, (heads + 2 * kv_heads) / 4 rounded up.
template <class T, class Kv> __device__ void position(const Position &p) {
    const int lane = threadIdx.x % WARP, head = blockIdx.y * POSITION_WARPS + threadIdx.x / WARP, row = blockIdx.x;
    const int all = p.heads + 2 * p.kv_heads, half = p.head_dim / 2;
    if (head >= all) return;
    const bool is_query = head < p.heads, is_value = head >= p.heads + p.kv_heads;
    const T *in = static_cast<const T *>(p.qkv) + size_t(row) * p.stride + head * p.head_dim;
    float first[POSITION_PAIRS], second[POSITION_PAIRS];
    float sum = 0;
    UNROLL(POSITION_PAIRS) for (int i = 0; i < POSITION_PAIRS; i++) {
        const int at = lane + i * WARP;
        first[i] = at < half ? to_float(in[at]) : 0.f;
        second[i] = at < half ? to_float(in[at + half]) : 0.f;
        sum += first[i] * first[i] + second[i] * second[i];
    }
    const float *norm = is_query ? p.query_norm : is_value ? nullptr : p.key_norm;
    if (norm) {
        const float scale = rsqrtf(warp_sum(sum) / p.head_dim + p.eps);
        UNROLL(POSITION_PAIRS) for (int i = 0; i < POSITION_PAIRS; i++) {
            const int at = lane + i * WARP;
            if (at < half) {
                first[i] *= scale * norm[at];
                second[i] *= scale * norm[at + half];
            }
        }
    }
    const int slot = is_query ? 0 : p.slots[row];
    if (slot < 0) return;
    const int kv_head = head - p.heads - (is_value ? p.kv_heads : 0);
    const size_t page = ((size_t(slot / BLOCK_TOKENS) * 2 + is_value) * p.kv_heads + kv_head) * BLOCK_TOKENS + slot % BLOCK_TOKENS;
    T *q = static_cast<T *>(p.q) + (size_t(row) * p.heads + head) * p.head_dim;
    Kv *kv = static_cast<Kv *>(p.kv) + page * p.head_dim;
    UNROLL(POSITION_PAIRS) for (int i = 0; i < POSITION_PAIRS; i++) {
        const int at = lane + i * WARP;
        if (at >= half) break;
        float a = first[i], b = second[i];
        if (p.cos && !is_value) {
            const float cos = p.cos[size_t(row) * half + at], sin = p.sin[size_t(row) * half + at];
            a = first[i] * cos - second[i] * sin;
            b = second[i] * cos + first[i] * sin;
        }
        if (is_query) {
            q[at] = from_float<T>(a);
            q[at + half] = from_float<T>(b);
        } else {
            kv[at] = from_float<Kv>(a);
            kv[at + half] = from_float<Kv>(b);
        }
    }
}

struct SiluMul {
    // [rows, 2 * width] of T: gates, then ups.
    const void *gate_up;
    // [rows, width] of T.
    void *out;
    int width;
};

// out = silu(gate) * up (Shazeer, arXiv 2002.05202). Zeros stay zeros. Grid: rows, width / 8 / threads rounded up.
template <class T> __device__ void silu_mul(const SiluMul &p) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (at >= p.width) return;
    const T *row = static_cast<const T *>(p.gate_up) + size_t(blockIdx.x) * 2 * p.width;
    const auto gate = *reinterpret_cast<const Eight<T> *>(row + at), up = *reinterpret_cast<const Eight<T> *>(row + p.width + at);
    Eight<T> out;
    UNROLL(8) for (int j = 0; j < 8; j++) {
        const float x = to_float(gate.v[j]);
        out.v[j] = from_float<T>(x / (1.f + expf(-x)) * to_float(up.v[j]));
    }
    *reinterpret_cast<Eight<T> *>(static_cast<T *>(p.out) + size_t(blockIdx.x) * p.width + at) = out;
}

KERNEL(rope_table_f32, RopeTable, 128, rope_table)
#define OF_TYPE(T)                                                                                                     \
    KERNEL(rms_norm_##T, RmsNorm, NORM_WARPS *WARP, rms_norm<T>)                                                       \
    KERNEL(silu_mul_##T, SiluMul, 128, silu_mul<T>)                                                                    \
    KERNEL(position_##T##_##T, Position, POSITION_WARPS *WARP, position<T, T>)                                         \
    KERNEL(position_##T##_fp8, Position, POSITION_WARPS *WARP, position<T, fp8>)
OF_TYPE(bf16)
OF_TYPE(f16)
#undef OF_TYPE
