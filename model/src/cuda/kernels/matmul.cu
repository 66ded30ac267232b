// Products with few rows, and what turns stored weights back into plain ones.
#include "formats.cuh"

constexpr int GEMV_WARPS = 8;
// Rows of x that one call multiplies, at most: the width of a tensor core's result.
constexpr int GEMV_ROWS = 8;
// Outputs of a block.
constexpr int GEMV_OUTPUTS = 16;

struct Gemv {
    Matrix weights;
    // [rows, inputs] of T.
    const void *x;
    // [outputs], of the type of `out`; may be null.
    const void *bias;
    // [rows, stride].
    void *out;
    int rows;
    int stride;
};

// What a product does with its result.
template <class Element> struct Store {
    using Type = Element;
    __device__ static void put(Element *out, float sum) { *out = from_float<Element>(sum); }
};
struct Add {
    using Type = float;
    __device__ static void put(float *out, float sum) { *out += sum; }
};

struct GemvShared {
    float sums[GEMV_WARPS][GEMV_OUTPUTS][GEMV_ROWS];
};

// out[r, o] = x[r] . weights[o] + bias[o] for up to 8 rows. A decode step is bound by reading the weights, so each is
// read once, 16 bytes at a time. Tensor cores multiply: they leave the other units to conversion and addresses.
//
// A block computes 16 outputs; its warps share the inputs. The order in which a tensor core sums is free, so a lane may
// take 8 consecutive inputs where the fragment's layout has 2 + 2 + 2 + 2: weights and x are permuted in the same way.
//
// Grid: outputs / 16.
template <class F, class T, class Out> __device__ void gemv(const Gemv &p) {
    constexpr int RUN = 4 * F::LANE;
    BLOCK_SHARED(GemvShared, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * GEMV_OUTPUTS, row_bytes = p.weights.row_bytes, inputs = p.weights.inputs;
    const unsigned char *low = p.weights.bytes + size_t(first + g) * row_bytes + t * 16, *high = low + size_t(8) * row_bytes;
    const T *x = static_cast<const T *>(p.x) + size_t(g) * inputs;
    float sums[4] = {0, 0, 0, 0};
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (int run = warp; run * 64 < row_bytes; run += GEMV_WARPS) {
        uint4 raw_low = {0, 0, 0, 0}, raw_high = {0, 0, 0, 0};
        // The last run of a 16-bit row may be half a run.
        if (run * 64 + t * 16 < row_bytes) {
            raw_low = stream16(low + run * 64);
            raw_high = stream16(high + run * 64);
        }
        UNROLL(4) for (int chunk = 0; chunk < F::LANE / 8; chunk++) {
            const int at = run * RUN + chunk * 32 + t * 8;
            Eight<T> b;
            memset(&b, 0, sizeof b);
            if (g < p.rows && at < inputs) b = *reinterpret_cast<const Eight<T> *>(x + at);
            const Eight<T> a = F::decode(raw_low, chunk), a8 = F::decode(raw_high, chunk);
            float products[4] = {0, 0, 0, 0};
            UNROLL(2) for (int half = 0; half < 2; half++) {
                const int i = 2 * half;
                const uint32_t left[4] = {pair_of(a, i), pair_of(a8, i), pair_of(a, i + 1), pair_of(a8, i + 1)};
                const uint32_t right[2] = {pair_of(b, i), pair_of(b, i + 1)};
                mma<T>(F::SCALED ? products : sums, left, right);
            }
            if (F::SCALED) {
                const float scale = scale_of<F>(p.weights, first + g, at), scale8 = scale_of<F>(p.weights, first + g + 8, at);
                sums[0] += scale * products[0];
                sums[1] += scale * products[1];
                sums[2] += scale8 * products[2];
                sums[3] += scale8 * products[3];
            }
        }
    }
    UNROLL(4) for (int i = 0; i < 4; i++) shared.sums[warp][g + i / 2 * 8][2 * t + i % 2] = sums[i];
    __syncthreads();
    const int o = threadIdx.x / GEMV_ROWS, r = threadIdx.x % GEMV_ROWS;
    if (o < GEMV_OUTPUTS && r < p.rows) {
        using Type = typename Out::Type;
        float sum = p.bias ? to_float(static_cast<const Type *>(p.bias)[first + o]) : 0.f;
        for (int w = 0; w < GEMV_WARPS; w++) sum += shared.sums[w][o][r];
        Out::put(static_cast<Type *>(p.out) + size_t(r) * p.stride + first + o, sum);
    }
}

struct Dequantize {
    Matrix weights;
    // [outputs, inputs] of T.
    void *out;
};

// Writes quantised weights as plain ones, for products with many rows.
//
// Grid: outputs, inputs / 8 / threads rounded up.
template <class F, class T> __device__ void dequantize(const Dequantize &p) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8, row = blockIdx.x;
    if (at >= p.weights.inputs) return;
    const float scale = scale_of<F>(p.weights, row, at);
    Eight<T> values = eight_of<F>(p.weights, row, at);
    UNROLL(8) for (int j = 0; j < 8; j++) values.v[j] = from_float<T>(scale * to_float(values.v[j]));
    *reinterpret_cast<Eight<T> *>(static_cast<T *>(p.out) + size_t(row) * p.weights.inputs + at) = values;
}

struct Embed {
    Matrix table;
    const int *tokens;
    // [rows, inputs] of f32.
    float *out;
    // Factor of the values.
    float factor;
};

// Looks up the rows of tokens. Grid: rows, inputs / 8 / threads rounded up.
template <class F> __device__ void embed(const Embed &p) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8, row = p.tokens[blockIdx.x];
    if (at >= p.table.inputs) return;
    const float scale = p.factor * scale_of<F>(p.table, row, at);
    const auto values = eight_of<F>(p.table, row, at);
    UNROLL(8) for (int j = 0; j < 8; j++) p.out[size_t(blockIdx.x) * p.table.inputs + at + j] = scale * to_float(values.v[j]);
}

#define OF_FORMAT(T, F, format)                                                                                        \
    KERNEL(gemv_##T##_##format, Gemv, GEMV_WARPS *WARP, gemv<F<T>, T, Store<T>>)                                       \
    KERNEL(gemv_f32_##T##_##format, Gemv, GEMV_WARPS *WARP, gemv<F<T>, T, Store<float>>)                               \
    KERNEL(gemv_add_##T##_##format, Gemv, GEMV_WARPS *WARP, gemv<F<T>, T, Add>)                                        \
    KERNEL(embed_##T##_##format, Embed, 128, embed<F<T>>)
#define OF_TYPE(T)                                                                                                     \
    OF_FORMAT(T, Plain, plain)                                                                                         \
    OF_FORMAT(T, Int8, int8)                                                                                           \
    OF_FORMAT(T, Int4, int4)                                                                                           \
    OF_FORMAT(T, Fp8, fp8)                                                                                             \
    KERNEL(dequantize_##T##_int8, Dequantize, 128, dequantize<Int8<T>, T>)                                             \
    KERNEL(dequantize_##T##_int4, Dequantize, 128, dequantize<Int4<T>, T>)                                             \
    KERNEL(dequantize_##T##_fp8, Dequantize, 128, dequantize<Fp8<T>, T>)
OF_TYPE(bf16)
OF_TYPE(f16)
#undef OF_FORMAT
#undef OF_TYPE
