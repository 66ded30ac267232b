// Operations on rows of activations: norms, rotation, and what writes keys and values into the cache.
#include "cuda.cuh"

constexpr int NORM_WARPS = 8;

struct RmsNorm {
    // [*, padded].
    const float *x;
    // [padded], zero in the padding; null: no norm, x is only converted.
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

// The factor that makes the mean square of `width` elements 1, up to eps. All threads of a block call it.
template <class T> __device__ float scale_to_one(NormShared &shared, const T *x, int width, float eps) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += NORM_WARPS * WARP) sum += to_float(x[i]) * to_float(x[i]);
    sum = warp_sum(sum);
    if (lane == 0) shared.sums[warp] = sum;
    __syncthreads();
    sum = 0;
    UNROLL(NORM_WARPS) for (int w = 0; w < NORM_WARPS; w++) sum += shared.sums[w];
    return rsqrtf(sum / width + eps);
}

// out = x / rms(x) * weight (Zhang & Sennrich, arXiv 1910.07467). x is zero in the padding, and so is out. Grid: rows.
template <class T> __device__ void rms_norm(const RmsNorm &p) {
    BLOCK_SHARED(NormShared, shared);
    const float *x = p.x + size_t(p.rows ? p.rows[blockIdx.x] : blockIdx.x) * p.padded;
    T *out = static_cast<T *>(p.out) + size_t(blockIdx.x) * p.padded;
    if (!p.weight) {
        for (int i = threadIdx.x; i < p.padded; i += NORM_WARPS * WARP) out[i] = from_float<T>(x[i]);
        return;
    }
    const float scale = scale_to_one(shared, x, p.width, p.eps);
    for (int i = threadIdx.x; i < p.padded; i += NORM_WARPS * WARP) out[i] = from_float<T>(x[i] * scale * p.weight[i]);
}

struct AddNorm {
    // [rows, padded].
    const float *y;
    // [padded], zero in the padding; null: no norm.
    const float *weight;
    // [rows, padded].
    float *x;
    int width;
    int padded;
    float eps;
    float factor;
};

// x += factor * y / rms(y) * weight, or x += factor * y: what attention or MLP add to the residual stream. Grid: rows.
__device__ inline void add_norm(const AddNorm &p) {
    BLOCK_SHARED(NormShared, shared);
    const float *y = p.y + size_t(blockIdx.x) * p.padded;
    float *x = p.x + size_t(blockIdx.x) * p.padded;
    const float scale = p.factor * (p.weight ? scale_to_one(shared, y, p.width, p.eps) : 1.f);
    for (int i = threadIdx.x; i < p.width; i += NORM_WARPS * WARP) x[i] += y[i] * scale * (p.weight ? p.weight[i] : 1.f);
}

struct QueryKeyNorm {
    // [rows, stride] of T: queries, keys, values.
    void *qkv;
    // [query_width] and [key_width].
    const float *query_norm;
    const float *key_norm;
    int query_width;
    int key_width;
    int stride;
    float eps;
};

// Norms over all heads of queries, and over all heads of keys, in place. Grid: rows, 2.
template <class T> __device__ void query_key_norm(const QueryKeyNorm &p) {
    BLOCK_SHARED(NormShared, shared);
    const bool keys = blockIdx.y == 1;
    T *x = static_cast<T *>(p.qkv) + size_t(blockIdx.x) * p.stride + (keys ? p.query_width : 0);
    const float *weight = keys ? p.key_norm : p.query_norm;
    const int width = keys ? p.key_width : p.query_width;
    const float scale = scale_to_one(shared, x, width, p.eps);
    // A thread overwrites only what no other thread reads any more: all have passed the barrier.
    for (int i = threadIdx.x; i < width; i += NORM_WARPS * WARP) x[i] = from_float<T>(to_float(x[i]) * scale * weight[i]);
}

struct SoftCap {
    float *x;
    int count;
    float cap;
};

// x = cap * tanh(x / cap). Grid: rows of `count` elements, count / 8 / threads rounded up.
__device__ inline void soft_cap(const SoftCap &p) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    float *x = p.x + size_t(blockIdx.x) * p.count;
    for (int i = at; i < at + 8 && i < p.count; i++) x[i] = p.cap - 2.f * p.cap / (1.f + expf(x[i] * (2.f / p.cap)));
}

struct RopeTable {
    const int *positions;
    // [ropes, half].
    const float *frequencies;
    // Factors of cosines and sines, [ropes].
    const float *factors;
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
        p.cos[at] = cosf(angle) * p.factors[blockIdx.y];
        p.sin[at] = sinf(angle) * p.factors[blockIdx.y];
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
    // The layer's rope, [rows, rotary_dim / 2]; null: no rotation.
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
    // Leading elements of a head that are rotated.
    int rotary_dim;
    // Elements from one row of `qkv` to the next.
    int stride;
    float eps;
};

// Elements of pair `at`: of the rotated ones if it is below `rotated`, else of the others.
__device__ inline int first_of_pair(int at, int rotated) { return at < rotated ? at : at + rotated; }
__device__ inline int second_of_pair(int at, int rotated, int half) { return at < rotated ? at + rotated : at + half; }

// Normalises and rotates the heads of queries and keys, and writes keys and values into the cache. Rotation pairs the
// first half of the rotated elements of a head with their second (Su et al., arXiv 2104.09864, in Hugging Face's order).
// Elements that are not rotated are paired in the same way.
//
// A warp for each head. Grid: rows, (heads + 2 * kv_heads) / 4 rounded up.
template <class T, class Kv> __device__ void position(const Position &p) {
    const int lane = threadIdx.x % WARP, head = blockIdx.y * POSITION_WARPS + threadIdx.x / WARP, row = blockIdx.x;
    const int all = p.heads + 2 * p.kv_heads, half = p.head_dim / 2, rotated = p.rotary_dim / 2;
    if (head >= all) return;
    const bool is_query = head < p.heads, is_value = head >= p.heads + p.kv_heads;
    const T *in = static_cast<const T *>(p.qkv) + size_t(row) * p.stride + head * p.head_dim;
    float first[POSITION_PAIRS], second[POSITION_PAIRS];
    float sum = 0;
    UNROLL(POSITION_PAIRS) for (int i = 0; i < POSITION_PAIRS; i++) {
        const int at = lane + i * WARP;
        first[i] = at < half ? to_float(in[first_of_pair(at, rotated)]) : 0.f;
        second[i] = at < half ? to_float(in[second_of_pair(at, rotated, half)]) : 0.f;
        sum += first[i] * first[i] + second[i] * second[i];
    }
    const float *norm = is_query ? p.query_norm : is_value ? nullptr : p.key_norm;
    if (norm) {
        const float scale = rsqrtf(warp_sum(sum) / p.head_dim + p.eps);
        UNROLL(POSITION_PAIRS) for (int i = 0; i < POSITION_PAIRS; i++) {
            const int at = lane + i * WARP;
            if (at < half) {
                first[i] *= scale * norm[first_of_pair(at, rotated)];
                second[i] *= scale * norm[second_of_pair(at, rotated, half)];
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
        if (p.cos && !is_value && at < rotated) {
            const float cos = p.cos[size_t(row) * rotated + at], sin = p.sin[size_t(row) * rotated + at];
            a = first[i] * cos - second[i] * sin;
            b = second[i] * cos + first[i] * sin;
        }
        const int one = first_of_pair(at, rotated), other = second_of_pair(at, rotated, half);
        if (is_query) {
            q[one] = from_float<T>(a);
            q[other] = from_float<T>(b);
        } else {
            kv[one] = from_float<Kv>(a);
            kv[other] = from_float<Kv>(b);
        }
    }
}

struct GateMul {
    // [rows, 2 * width] of T: gates, then ups.
    const void *gate_up;
    // [rows, width] of T.
    void *out;
    int width;
    // 0: silu. 1: gelu, approximated with tanh.
    int gelu;
};

// out = activation(gate) * up (Shazeer, arXiv 2002.05202). Zeros stay zeros. Grid: rows, width / 8 / threads rounded up.
template <class T> __device__ void gate_mul(const GateMul &p) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (at >= p.width) return;
    const T *row = static_cast<const T *>(p.gate_up) + size_t(blockIdx.x) * 2 * p.width;
    const auto gate = *reinterpret_cast<const Eight<T> *>(row + at), up = *reinterpret_cast<const Eight<T> *>(row + p.width + at);
    Eight<T> out;
    UNROLL(8) for (int j = 0; j < 8; j++) {
        const float x = to_float(gate.v[j]);
        // Both activations are x * sigmoid(y).
        const float y = p.gelu ? 1.5957691f * x * (1.f + 0.044715f * x * x) : x;
        out.v[j] = from_float<T>(x / (1.f + expf(-y)) * to_float(up.v[j]));
    }
    *reinterpret_cast<Eight<T> *>(static_cast<T *>(p.out) + size_t(blockIdx.x) * p.width + at) = out;
}

KERNEL(rope_table_f32, RopeTable, 128, rope_table)
KERNEL(add_norm_f32, AddNorm, NORM_WARPS *WARP, add_norm)
KERNEL(soft_cap_f32, SoftCap, 128, soft_cap)
#define OF_TYPE(T)                                                                                                     \
    KERNEL(rms_norm_##T, RmsNorm, NORM_WARPS *WARP, rms_norm<T>)                                                       \
    KERNEL(query_key_norm_##T, QueryKeyNorm, NORM_WARPS *WARP, query_key_norm<T>)                                      \
    KERNEL(gate_mul_##T, GateMul, 128, gate_mul<T>)                                                                    \
    KERNEL(position_##T##_##T, Position, POSITION_WARPS *WARP, position<T, T>)                                         \
    KERNEL(position_##T##_fp8, Position, POSITION_WARPS *WARP, position<T, fp8>)
OF_TYPE(bf16)
OF_TYPE(f16)
#undef OF_TYPE
