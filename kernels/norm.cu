// Root-mean-square norms of the residual stream, with what comes before (a sum) and after (quantisation).
//
// x [T][H] f32: the residual stream. y [T][H] bfloat16: what a projection gave. weight [H] f32.
//   add_norm_*:  x[t] += y[t] (if y is not null), out[t] = x[t] / sqrt(mean(x[t]²) + eps) · weight
//   norm_add_*:  x[t] += y[t] / sqrt(mean(y[t]²) + eps) · weight
//   quant_rows_*: out[t] = y[t] as integers, or floats of 8 bits, with a scale
// out: `_bf16` [T][H]; `_int8` [T][H] signed bytes and scale [T], value = scale · q, scale = max|value| / 127; `_e4m3` as
// `_int8` with scale = max|value| / 448 (from sm_89 on).
// What a scale multiplies is value · most / max, so the largest is exact. Grid: T blocks of 256 threads. H is a multiple of 4, at most 256 · 4 · ROUNDS; the name ends in ROUNDS, which the caller
// chooses by H alone (more rounds than needed give the same bits). A row stays in registers: each value is read once.
// Bytes per element: 4 (x) + 2 (y) read, 4 (x, if y) + 2 or 1 (out) written; a scale is a sector per row. From the caches: 4 per element
// (weights). Operations: 4 to 8 per element, and 17 for each thread (a sum over the block). No bank conflicts.
#include "prims.cuh"

#define THREADS 256

// 1 / sqrt(mean of squares + eps). Squares are summed per thread in order of rounds, then in a fixed tree.
template <int ROUNDS> DEVICE float inverse_rms(const float (&v)[ROUNDS][4], u32 width, float eps, float* scratch) {
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum = fmaf(v[r][i], v[r][i], sum);
    return 1.0f / sqrtf(block_sum(sum, scratch) / (float)width + eps);
}

// A row of bfloat16 into registers; 0 past its end.
template <int ROUNDS> DEVICE void load_bf16(float (&v)[ROUNDS][4], const u16* row, u32 width) {
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        u32 at = (r * THREADS + threadIdx.x) * 4;
        uint2 raw = at < width ? *reinterpret_cast<const uint2*>(row + at) : make_uint2(0, 0);
        v[r][0] = bf16_low(raw.x);
        v[r][1] = bf16_high(raw.x);
        v[r][2] = bf16_low(raw.y);
        v[r][3] = bf16_high(raw.y);
    }
}

enum Form { BF16, INT8, E4M3 };

template <Form FORM> DEVICE void store4(void* out, u64 at, const float (&v)[4]) {
    if (FORM == BF16) {
        *reinterpret_cast<uint2*>((u16*)out + at) = make_uint2(to_bf16x2(v[0], v[1]), to_bf16x2(v[2], v[3]));
    } else if (FORM == INT8) {
        u32 word = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) word |= ((u32)__float2int_rn(v[i]) & 255) << (8 * i);
        *reinterpret_cast<u32*>((u8*)out + at) = word;
    } else {
#if __CUDA_ARCH__ >= 890
        *reinterpret_cast<u32*>((u8*)out + at) = (u32)to_e4m3x2(v[0], v[1]) | (u32)to_e4m3x2(v[2], v[3]) << 16;
#endif
    }
}

// Writes a row in the form asked for. A row of zeros has scale 0 and integers 0, one with a NaN has scale NaN.
template <Form FORM, int ROUNDS>
DEVICE void store_row(float (&v)[ROUNDS][4], void* out, float* scales, u32 width, float* scratch) {
    float inverse = 1.0f;
    if (FORM != BF16) {
        float largest = 0.0f;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) largest = max_or_nan(largest, fabsf(v[r][i]));
        largest = block_max_or_nan(largest, scratch);
        const float most = FORM == INT8 ? 127.0f : 448.0f;
        if (threadIdx.x == 0) scales[blockIdx.x] = largest / most;
        inverse = largest > 0.0f ? most / largest : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        u32 at = (r * THREADS + threadIdx.x) * 4;
        if (at >= width) continue;
        float scaled[4];
#pragma unroll
        for (int i = 0; i < 4; i++) scaled[i] = FORM == BF16 ? v[r][i] : v[r][i] * inverse;
        store4<FORM>(out, (u64)blockIdx.x * width + at, scaled);
    }
}

template <Form FORM, int ROUNDS>
DEVICE void add_norm(float* x, const u16* y, const float* weight, void* out, float* scales, u32 width, float eps) {
    __shared__ float scratch[32];
    float v[ROUNDS][4];
    float* row = x + (u64)blockIdx.x * width;
    if (y) {
        load_bf16(v, y + (u64)blockIdx.x * width, width);
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        u32 at = (r * THREADS + threadIdx.x) * 4;
        float4 old = at < width ? *reinterpret_cast<float4*>(row + at) : make_float4(0, 0, 0, 0);
        float had[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
        for (int i = 0; i < 4; i++) v[r][i] = y ? had[i] + v[r][i] : had[i];
        if (y && at < width) *reinterpret_cast<float4*>(row + at) = make_float4(v[r][0], v[r][1], v[r][2], v[r][3]);
    }
    float inverse = inverse_rms(v, width, eps, scratch);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        u32 at = (r * THREADS + threadIdx.x) * 4;
        if (at >= width) continue;
        float4 w = *reinterpret_cast<const float4*>(weight + at);
        float by[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; i++) v[r][i] = v[r][i] * inverse * by[i];
    }
    store_row<FORM>(v, out, scales, width, scratch);
}

template <int ROUNDS> DEVICE void norm_add(const u16* y, const float* weight, float* x, u32 width, float eps) {
    __shared__ float scratch[32];
    float v[ROUNDS][4];
    load_bf16(v, y + (u64)blockIdx.x * width, width);
    float inverse = inverse_rms(v, width, eps, scratch);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        u32 at = (r * THREADS + threadIdx.x) * 4;
        if (at >= width) continue;
        float4 w = *reinterpret_cast<const float4*>(weight + at);
        float4* to = reinterpret_cast<float4*>(x + (u64)blockIdx.x * width + at);
        float4 old = *to;
        *to = make_float4(
            old.x + v[r][0] * inverse * w.x,
            old.y + v[r][1] * inverse * w.y,
            old.z + v[r][2] * inverse * w.z,
            old.w + v[r][3] * inverse * w.w);
    }
}

template <Form FORM, int ROUNDS> DEVICE void quant_rows(const u16* y, void* out, float* scales, u32 width) {
    __shared__ float scratch[32];
    float v[ROUNDS][4];
    load_bf16(v, y + (u64)blockIdx.x * width, width);
    store_row<FORM>(v, out, scales, width, scratch);
}

#define ADD_NORM(NAME, FORM, ROUNDS)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                            \
        float* x, const u16* y, const float* weight, void* out, float* scales, u32 width, float eps) {                     \
        add_norm<FORM, ROUNDS>(x, y, weight, out, scales, width, eps);                                                     \
    }
#define ROUNDED(ROUNDS)                                                                                                    \
    ADD_NORM(add_norm_bf16_##ROUNDS, BF16, ROUNDS)                                                                         \
    ADD_NORM(add_norm_int8_##ROUNDS, INT8, ROUNDS)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
        norm_add_##ROUNDS(const u16* y, const float* weight, float* x, u32 width, float eps) {                             \
        norm_add<ROUNDS>(y, weight, x, width, eps);                                                                        \
    }

ROUNDED(1)
ROUNDED(4)
ROUNDED(8)
ROUNDED(16)

// Rows as long as those between a model's projections.
#define QUANT_ROWS(NAME, FORM, ROUNDS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const u16* y, void* out, float* scales, u32 width) {        \
        quant_rows<FORM, ROUNDS>(y, out, scales, width);                                                                   \
    }

QUANT_ROWS(quant_rows_int8_16, INT8, 16)
QUANT_ROWS(quant_rows_int8_32, INT8, 32)

#if __CUDA_ARCH__ >= 890
ADD_NORM(add_norm_e4m3_1, E4M3, 1)
ADD_NORM(add_norm_e4m3_4, E4M3, 4)
ADD_NORM(add_norm_e4m3_8, E4M3, 8)
ADD_NORM(add_norm_e4m3_16, E4M3, 16)
QUANT_ROWS(quant_rows_e4m3_16, E4M3, 16)
QUANT_ROWS(quant_rows_e4m3_32, E4M3, 32)
#endif
