// Runs CUDA C++ kernels on the host, for tests. It stands for CUDA's headers when a C++ compiler compiles the kernels.
//
// A CUDA thread is a fiber. All fibers of a block run on one host thread, one at a time, until each waits at a barrier,
// a shuffle or a tensor core product, or ends. The seed decides which fiber and which block goes first, so a missing
// barrier gives wrong numbers under most seeds. Shared memory is filled with NaN before each block.
//
// What it can't show: speed, occupancy, races that need two threads within one statement, and a layout of fragments that
// kernel and emulation have both misread from the manual.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
// Libraries hide all names but these.
#define OF_EXPORT __attribute__((visibility("default")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct int2 {
    int x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
OF_EXPORT float __bfloat162float(__nv_bfloat16 v);
OF_EXPORT __nv_bfloat16 __float2bfloat16(float v);
OF_EXPORT float __half2float(__half v);
OF_EXPORT __half __float2half(float v);
// Converts like CUDA's: to the nearest, ties to even, saturating at 448.
struct __nv_fp8_e4m3 {
    uint8_t bits;
    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float v);
    explicit operator float() const;
};

namespace software_gpu {

// What the threads of a warp do together. All must do the same.
enum class Meeting { shuffle, mma, load_transposed, sync };

extern dim3 thread_index, block_index, block_size, grid_size;

// Waits until all threads of the block are here or have ended.
void block_barrier();
// Waits until all threads of the warp have brought `bytes` bytes. Returns an array of 32 slots with what each brought,
// valid until the thread meets its warp after the next time.
const unsigned char (*meet(Meeting what, const void *bring, size_t bytes))[32];
unsigned lane();
// Memory of `bytes` bytes that the running block's threads share; the same for the same `key`.
void *shared_memory(const void *key, size_t bytes);
[[noreturn]] void fault(const std::string &what);

// Kernels by name.
struct Kernel {
    std::string name;
    size_t params_bytes;
    unsigned max_threads;
    void (*body)(const void *params);
};
struct Register {
    explicit Register(Kernel kernel);
};
const Kernel *find(const std::string &name);
// Runs a kernel to its end.
void launch(const Kernel &kernel, dim3 grid, dim3 block, const void *params);
// Starts the sequence of random decisions.
void set_seed(uint64_t seed);
uint64_t random();

template <class T> T shuffle(T v, unsigned from) {
    static_assert(sizeof(T) <= 32);
    std::memcpy(&v, meet(Meeting::shuffle, &v, sizeof v)[from % 32], sizeof v);
    return v;
}

template <class T> float element(uint32_t pair, int i);
template <> inline float element<__nv_bfloat16>(uint32_t pair, int i) { return __bfloat162float({uint16_t(pair >> 16 * i)}); }
template <> inline float element<__half>(uint32_t pair, int i) { return __half2float({uint16_t(pair >> 16 * i)}); }

} // namespace software_gpu

#define threadIdx software_gpu::thread_index
#define blockIdx software_gpu::block_index
#define blockDim software_gpu::block_size
#define gridDim software_gpu::grid_size

inline void __syncthreads() { software_gpu::block_barrier(); }
inline void __syncwarp() { software_gpu::meet(software_gpu::Meeting::sync, nullptr, 0); }
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return software_gpu::shuffle(v, software_gpu::lane() ^ mask); }
template <class T> T __shfl_sync(unsigned, T v, int from) { return software_gpu::shuffle(v, from); }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)(a) * b >> 64); }

// The fragments are as the PTX manual has them ("Matrix Fragments for mma.m16n8k16 with floating point type").
template <class T> void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using namespace software_gpu;
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    auto all = meet(Meeting::mma, mine, sizeof mine);
    auto register_of = [&](int lane, int i) {
        uint32_t v;
        std::memcpy(&v, all[lane] + 4 * i, 4);
        return v;
    };
    auto left = [&](int row, int k) { return element<T>(register_of(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2), k % 2); };
    auto right = [&](int k, int column) { return element<T>(register_of(column * 4 + k % 8 / 2, 4 + k / 8), k % 2); };
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 16; k++) d[i] += left(g + i / 2 * 8, k) * right(k, 2 * t + i % 2);
    }
}

// ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16
inline void load_transposed(uint32_t (&b)[2], const void *row) {
    using namespace software_gpu;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fault("ldmatrix: a row is not a multiple of 16 bytes");
    auto all = meet(Meeting::load_transposed, &row, sizeof row);
    const int g = lane() / 4, t = lane() % 4;
    for (int matrix = 0; matrix < 2; matrix++) {
        uint16_t two[2];
        for (int i = 0; i < 2; i++) {
            const uint16_t *of;
            std::memcpy(&of, all[matrix * 8 + 2 * t + i], sizeof of);
            two[i] = of[g];
        }
        std::memcpy(&b[matrix], two, 4);
    }
}

#define BLOCK_SHARED(Type, name)                                                                                       \
    static_assert(sizeof(Type) <= 48 * 1024, "a block has 48 KiB of static shared memory");                            \
    static const char name##_key = 0;                                                                                  \
    Type &name = *static_cast<Type *>(software_gpu::shared_memory(&name##_key, sizeof(Type)))
#define KERNEL(name, Params, threads, ...)                                                                             \
    static const software_gpu::Register name##_registered{{#name, sizeof(Params), threads, [](const void *params) {    \
        __VA_ARGS__(*static_cast<const Params *>(params));                                                             \
    }}};
