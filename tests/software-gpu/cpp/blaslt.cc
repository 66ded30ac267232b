// A test double of cuBLASLt: the product that the engine asks for, D = A^T B (+ D) (+ bias), with operands by columns.
// It refuses operands that the real library is slow with or refuses: addresses and rows that are not multiples of 16 bytes.
#include "driver.h"
#include <cmath>
#include <memory>

namespace {

enum Status { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { F32 = 0, F16 = 2, BF16 = 14 };

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};

struct Description {
    int transpose_a = 0;
    int epilogue = 1;
    const void *bias = nullptr;
    int bias_type = -1;
};

size_t size_of(int type) { return type == F32 ? 4 : 2; }

float load(const void *from, int type, size_t at) {
    switch (type) {
    case F32: return static_cast<const float *>(from)[at];
    case F16: return __half2float(static_cast<const __half *>(from)[at]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16 *>(from)[at]);
    }
}

void store(void *to, int type, size_t at, float value) {
    switch (type) {
    case F32: static_cast<float *>(to)[at] = value; break;
    case F16: static_cast<__half *>(to)[at] = __float2half(value); break;
    default: static_cast<__nv_bfloat16 *>(to)[at] = __float2bfloat16(value);
    }
}

bool aligned(const void *at, const Layout &layout) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && layout.stride * size_of(layout.type) % 16 == 0;
}

bool inside(const void *at, const Layout &layout) {
    return software_gpu_is_device_memory(at, layout.stride * layout.columns * size_of(layout.type));
}

} // namespace

#define EXPORT extern "C" OF_EXPORT int

EXPORT cublasLtCreate(void **handle) { *handle = new int(0); return OK; }
EXPORT cublasLtDestroy(void *handle) { delete static_cast<int *>(handle); return OK; }
EXPORT cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = new Layout{type, rows, columns, stride};
    return OK;
}
EXPORT cublasLtMatrixLayoutDestroy(void *layout) { delete static_cast<Layout *>(layout); return OK; }
EXPORT cublasLtMatmulDescCreate(void **description, int compute_type, int scale_type) {
    // CUBLAS_COMPUTE_32F, with f32 factors.
    if (compute_type != 68 || scale_type != F32) return NOT_SUPPORTED;
    *description = new Description;
    return OK;
}
EXPORT cublasLtMatmulDescDestroy(void *description) { delete static_cast<Description *>(description); return OK; }
EXPORT cublasLtMatmulDescSetAttribute(void *description, int attribute, const void *value, size_t bytes) {
    auto *d = static_cast<Description *>(description);
    auto set = [&](auto &field) {
        if (bytes != sizeof field) return int(INVALID_VALUE);
        std::memcpy(&field, value, bytes);
        return int(OK);
    };
    switch (attribute) {
    case 3: return set(d->transpose_a);
    case 7: return set(d->epilogue);
    case 8: return set(d->bias);
    case 26: return set(d->bias_type);
    default: return NOT_SUPPORTED;
    }
}
EXPORT cublasLtMatmulPreferenceCreate(void **preference) { *preference = new int(0); return OK; }
EXPORT cublasLtMatmulPreferenceDestroy(void *preference) { delete static_cast<int *>(preference); return OK; }
EXPORT cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t bytes) { return bytes == 8 ? OK : INVALID_VALUE; }

// cublasLtMatmulHeuristicResult_t.
struct Found {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

EXPORT cublasLtMatmulAlgoGetHeuristic(void *, void *description, void *a, void *b, void *c, void *d, void *, int wanted,
                                      Found *found, int *count) {
    const auto &left = *static_cast<Layout *>(a), &right = *static_cast<Layout *>(b), &out = *static_cast<Layout *>(d);
    *count = 0;
    if (wanted < 1 || c != d || static_cast<Description *>(description)->transpose_a != 1) return NOT_SUPPORTED;
    if (left.rows != right.rows || left.columns != out.rows || right.columns != out.columns) return INVALID_VALUE;
    *found = Found{};
    *count = 1;
    return OK;
}

EXPORT cublasLtMatmul(void *, void *description, const float *alpha, const void *a, void *a_layout, const void *b,
                      void *b_layout, const float *beta, const void *c, void *, void *d, void *d_layout, const void *,
                      void *workspace, size_t workspace_bytes, void *stream) {
    const Description of = *static_cast<Description *>(description);
    const Layout left = *static_cast<Layout *>(a_layout), right = *static_cast<Layout *>(b_layout), out = *static_cast<Layout *>(d_layout);
    if (!aligned(a, left) || !aligned(b, right) || !aligned(d, out)) return NOT_SUPPORTED;
    if (!inside(a, left) || !inside(b, right) || !inside(d, out) || c != d) return INVALID_VALUE;
    if (!software_gpu_is_device_memory(workspace, workspace_bytes)) return INVALID_VALUE;
    const bool biased = of.epilogue == 4;
    if (biased && (of.bias_type != out.type || !software_gpu_is_device_memory(of.bias, out.rows * size_of(out.type)))) return INVALID_VALUE;
    const float factor = *alpha, keep = *beta;
    software_gpu_enqueue(stream, [=] {
        std::vector<float> l(left.rows), r(left.rows * right.columns);
        for (uint64_t j = 0; j < right.columns; j++) {
            for (uint64_t k = 0; k < right.rows; k++) r[j * right.rows + k] = load(b, right.type, j * right.stride + k);
        }
        for (uint64_t i = 0; i < out.rows; i++) {
            for (uint64_t k = 0; k < left.rows; k++) l[k] = load(a, left.type, i * left.stride + k);
            const float bias = biased ? load(of.bias, of.bias_type, i) : 0.f;
            for (uint64_t j = 0; j < out.columns; j++) {
                float sum = 0;
                for (uint64_t k = 0; k < left.rows; k++) sum += l[k] * r[j * left.rows + k];
                const size_t at = j * out.stride + i;
                store(d, out.type, at, factor * sum + (keep == 0 ? 0 : keep * load(d, out.type, at)) + bias);
            }
        }
    });
    return OK;
}
