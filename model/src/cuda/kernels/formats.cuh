// How weights are stored: 16-bit elements as they are, or quantised with a scale for each 32 inputs of an output.
//
// A quantised row is stored in runs of 64 bytes. A run holds RUN = 4 * LANE inputs. Within a run, the 16 bytes of lane t
// hold inputs c * 32 + t * 8 + j for each chunk c of the run and j < 8, in this order. So a lane of `gemv` reads 16 bytes
// at once, and its 8 inputs of a chunk belong to one scale. cuda/pack.rs writes this layout. Rows are padded with zeros
// to whole runs. The 16-bit formats are the same with one chunk a run, which is plain row-major order.
#pragma once
#include "cuda.cuh"

// Inputs that share a scale.
constexpr int SCALE_INPUTS = 32;

// Elements of the type of activations.
template <class T> struct Plain {
    // Inputs in 16 bytes.
    static constexpr int LANE = 8;
    static constexpr bool SCALED = false;
    __device__ static Eight<T> decode(const uint4 &raw, int) {
        Eight<T> out;
        memcpy(&out, &raw, 16);
        return out;
    }
};

// Signed bytes. bf16 and f16 represent all of them exactly.
template <class T> struct Int8 {
    static constexpr int LANE = 16;
    static constexpr bool SCALED = true;
    __device__ static Eight<T> decode(const uint4 &raw, int chunk) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        Eight<T> out;
        UNROLL(8) for (int j = 0; j < 8; j++) {
            uint32_t word = chunk == 0 ? words[j / 4] : words[2 + j / 4];
            out.v[j] = from_float<T>(float(int8_t(word >> (j % 4 * 8) & 0xff)));
        }
        return out;
    }
};

// Two halves of a byte, offset by 8: inputs 0 to 3 in the low halves of four bytes, 4 to 7 in the high ones.
template <class T> struct Int4 {
    static constexpr int LANE = 32;
    static constexpr bool SCALED = true;
    __device__ static Eight<T> decode(const uint4 &raw, int chunk) {
        uint32_t word = chunk == 0 ? raw.x : chunk == 1 ? raw.y : chunk == 2 ? raw.z : raw.w;
        Eight<T> out;
        UNROLL(8) for (int j = 0; j < 8; j++) {
            int value = int(word >> (j % 4 * 8 + j / 4 * 4) & 0xf) - 8;
            out.v[j] = from_float<T>(float(value));
        }
        return out;
    }
};

// 8-bit floats with 4 bits of exponent and 3 of mantissa. bf16 and f16 represent all of them exactly.
template <class T> struct Fp8 {
    static constexpr int LANE = 16;
    static constexpr bool SCALED = true;
    __device__ static Eight<T> decode(const uint4 &raw, int chunk) {
        fp8 bytes[16];
        memcpy(bytes, &raw, 16);
        Eight<T> out;
        UNROLL(8) for (int j = 0; j < 8; j++) out.v[j] = from_float<T>(to_float(chunk == 0 ? bytes[j] : bytes[8 + j]));
        return out;
    }
};

// A matrix of weights, [outputs, inputs]. Both are padded with zeros to multiples of 16.
struct Matrix {
    const unsigned char *bytes;
    // [outputs, row_bytes / 64 * chunks of a run]; null for 16-bit formats.
    const f16 *scales;
    // A multiple of 16; of 64 for quantised formats.
    int row_bytes;
    int inputs;
};

// Eight inputs of a row, before scaling. `at` is a multiple of 8.
template <class F> __device__ inline auto eight_of(const Matrix &m, int row, int at) {
    constexpr int RUN = 4 * F::LANE;
    int chunk = at % RUN / 32, lane = at % 32 / 8;
    const unsigned char *raw = m.bytes + size_t(row) * m.row_bytes + at / RUN * 64 + lane * 16;
    return F::decode(*reinterpret_cast<const uint4 *>(raw), chunk);
}

// The scale of input `at` of a row.
template <class F> __device__ inline float scale_of(const Matrix &m, int row, int at) {
    if (!F::SCALED) return 1.f;
    return to_float(m.scales[size_t(row) * (m.row_bytes / 64 * (F::LANE / 8)) + at / SCALE_INPUTS]);
}
