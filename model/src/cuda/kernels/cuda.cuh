// What all kernels share: element types, 16-byte loads, warp reductions and tensor cores.
//
// nvcc compiles the kernels for GPUs. For tests, a C++ compiler compiles the same files for the host; there,
// software_gpu.h stands for CUDA's headers. So kernels use only what both have: barriers, shuffles, shared memory,
// mma.sync and ldmatrix.
//
// Conventions: a kernel has one parameter, a struct of pointers and sizes that launch.rs mirrors field by field.
// Matrices are row-major. `T` is the type of activations, bf16 or f16. Sums are f32.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cstdint>
// Shared memory of a block, of a given type.
#define BLOCK_SHARED(Type, name) __shared__ Type name
// Makes a kernel known under a name: `kernel<...>` with the parameters `Params` and blocks of `threads`.
#define KERNEL(name, Params, threads, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(threads) name(const Params p) { __VA_ARGS__(p); }
#define UNROLL(n) _Pragma("unroll")
#else
#include "software_gpu.h"
#define UNROLL(n)
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;
using fp8 = __nv_fp8_e4m3;

constexpr int WARP = 32;
// Tokens of a KV block.
constexpr int BLOCK_TOKENS = 16;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(f16 v) { return __half2float(v); }
__device__ inline float to_float(fp8 v) { return float(v); }

template <class T> __device__ T from_float(float v);
template <> __device__ inline float from_float<float>(float v) { return v; }
template <> __device__ inline bf16 from_float<bf16>(float v) { return __float2bfloat16(v); }
// Values beyond the largest f16 become that one, not infinity: an infinity would turn later sums into NaN.
template <> __device__ inline f16 from_float<f16>(float v) { return __float2half(fminf(fmaxf(v, -65504.f), 65504.f)); }
// Conversion to fp8 saturates.
template <> __device__ inline fp8 from_float<fp8>(float v) { return fp8(v); }

// Eight elements, 16 bytes for the types of activations.
template <class T> struct alignas(8 * sizeof(T)) Eight {
    T v[8];
};

// The bits of two neighbouring elements, as tensor cores want them.
template <class T> __device__ inline uint32_t pair(T low, T high) {
    static_assert(sizeof(T) == 2, "tensor cores take pairs of 2 bytes");
    struct alignas(4) Two {
        T low, high;
    } two{low, high};
    uint32_t bits;
    memcpy(&bits, &two, 4);
    return bits;
}

// Elements 2 * i and 2 * i + 1 of `e`.
template <class T> __device__ inline uint32_t pair_of(const Eight<T> &e, int i) {
    return pair(e.v[2 * i], e.v[2 * i + 1]);
}

__device__ inline float warp_sum(float v) {
    UNROLL(5) for (int o = WARP / 2; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
    return v;
}

// Reads 16 bytes that no other block reads, past the L1 cache. `p` is a multiple of 16.
__device__ inline uint4 stream16(const void *p) {
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
#else
    return *static_cast<const uint4 *>(p);
#endif
}

// d += a * b on tensor cores, for one warp: a is 16 x 16, b is 16 x 8, d is 16 x 8 in f32.
//
// With g = lane / 4 and t = lane % 4, a lane holds (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a: rows g and g + 8; columns 2t, 2t + 1, then 2t + 8, 2t + 9: {(g, low), (g + 8, low), (g, high), (g + 8, high)}
//   b: column g; rows 2t, 2t + 1, then 2t + 8, 2t + 9
//   d: columns 2t, 2t + 1; row g, then row g + 8
#ifdef __CUDACC__
template <class T> __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define OVERFILL_MMA(T, name)                                                                                          \
    template <> __device__ inline void mma<T>(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {            \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                            \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                      \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
    }
OVERFILL_MMA(bf16, "bf16")
OVERFILL_MMA(f16, "f16")
#undef OVERFILL_MMA
#endif

// Reads two 8 x 8 matrices of 2-byte elements from shared memory, transposed. Lane i < 16 gives the address of a row of
// 16 bytes: rows of the first matrix from lanes 0 to 7, of the second from lanes 8 to 15. A lane gets the elements
// (2t, g) and (2t + 1, g) of each, which is how `mma` wants a `b` that is stored row by row.
#ifdef __CUDACC__
__device__ inline void load_transposed(uint32_t (&b)[2], const void *row) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(address)
                 : "memory");
}
#endif
