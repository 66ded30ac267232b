// What attention over paged keys and values shares.
#pragma once
#include "cuda.cuh"

// The tokens of one sequence in a batch.
struct Slice {
    // Row of its first token in the batch.
    int row;
    // Position of its first token in the sequence.
    int start;
    // Number of tokens; 0: no slice, only padding.
    int count;
    // Index of its first block in the batch's block tables.
    int table;
};

struct Attention {
    // [rows, heads, head_dim] of T.
    const void *q;
    // The layer's cache, [blocks][K|V][kv_heads][16][head_dim] of Kv.
    const void *kv;
    const Slice *slices;
    // Block ids of all slices.
    const int *tables;
    // Decode: partial results, [slices, heads, splits, head_dim + 2]. Prefill: unused.
    float *partial;
    // Prefill: the slice and the first token of each tile. Decode: unused.
    const int2 *tiles;
    // [rows, out_stride] of T, of which heads * head_dim are written.
    void *out;
    int heads;
    int kv_heads;
    // Decode: blocks that share the keys of a sequence.
    int splits;
    int head_dim;
    // Elements from one row of `out` to the next.
    int out_stride;
    // Number of keys that a query attends to, itself included.
    int window;
    // Factor of the scores, times log2(e): exponentials have base 2.
    float scale;
    // Soft cap of the scores, times log2(e); 0: none.
    float cap;
};

// cap * tanh(score / cap), where score and cap are multiplied by log2(e).
__device__ inline float soft_cap(float score, float cap) {
    constexpr float TWICE = 2.88539008f;
    return cap - 2.f * cap / (1.f + exp2f(score * (TWICE / cap)));
}

// Position of the first key that the query at a position attends to.
__device__ inline int first_visible(const Attention &p, int position) {
    return position < p.window ? 0 : position + 1 - p.window;
}

// How the elements of a head are read. `D` is the width that a kernel computes with. EXACT: it is the head's width, and
// rows are multiples of 16 bytes. Otherwise the head is narrower, and elements are read one by one.
template <int D_, bool EXACT> struct Head {
    static constexpr int D = D_;

    // Elements of a row.
    __device__ static int width(const Attention &p) { return EXACT ? D : p.head_dim; }

    // Reads elements at .. at + N of a row, as T. Elements past the head's width are zeros.
    template <int N, class T, class Kv> struct Elements {
        struct alignas((N & (N - 1)) == 0 ? N * sizeof(Kv) : sizeof(Kv)) Raw {
            Kv v[N];
        };
        T v[N];
        __device__ Elements(const Attention &p, const Kv *row, int at) {
            if (EXACT) {
                const Raw raw = *reinterpret_cast<const Raw *>(row + at);
                UNROLL(N) for (int i = 0; i < N; i++) v[i] = from_float<T>(to_float(raw.v[i]));
            } else {
                UNROLL(N) for (int i = 0; i < N; i++) v[i] = from_float<T>(at + i < p.head_dim ? to_float(row[at + i]) : 0.f);
            }
        }
    };
};

// Heads with kernels: the common widths exactly, all others up to 256 in a wider one.
#define OF_EACH_HEAD(X, ...)                                                                                           \
    X(32, true, 32, __VA_ARGS__)                                                                                       \
    X(64, true, 64, __VA_ARGS__)                                                                                       \
    X(96, true, 96, __VA_ARGS__)                                                                                       \
    X(128, true, 128, __VA_ARGS__)                                                                                     \
    X(256, true, 256, __VA_ARGS__)                                                                                     \
    X(32, false, up_to_32, __VA_ARGS__)                                                                                \
    X(64, false, up_to_64, __VA_ARGS__)                                                                                \
    X(128, false, up_to_128, __VA_ARGS__)                                                                              \
    X(256, false, up_to_256, __VA_ARGS__)
