// What is left to do of a product of floats of 8 bits (e4m3): its rows and columns have scales.
//
// x [R][n]: sums of products, as cuBLASLt gives them. rows [R], columns [n] f32. The scale of an element is rows[r] · columns[c].
//   scale_bf16:  x[r][c] = x[r][c] · scale, bfloat16
//   scale_f32:   x[r][c] = x[r][c] · scale, f32
//   scale_add:   out[r][c] += x[r][c] · scale (fused), f32
// n is a multiple of 4. Grid: R x (n / 1024 rounded up), blocks of 256 threads, 4 elements each.
// Bytes per element: 2, 4 or 4 + 4 read, 2, 4 or 4 written. From the caches: 4 per element (columns), and a sector per warp (rows).
// Operations: 2.5, 2 or 2 per element.
#include "prims.cuh"

// The place of a thread's elements in a row; false past its end.
DEVICE bool place(u32 n, u32& column, u64& at) {
    column = (blockIdx.y * 256 + threadIdx.x) * 4;
    at = (u64)blockIdx.x * n + column;
    return column < n;
}

DEVICE float4 scales(const float* rows, const float* columns, u32 column) {
    float row = rows[blockIdx.x];
    float4 c = *reinterpret_cast<const float4*>(columns + column);
    return make_float4(row * c.x, row * c.y, row * c.z, row * c.w);
}

extern "C" __global__ void __launch_bounds__(256) scale_bf16(u16* x, const float* rows, const float* columns, u32 n) {
    u32 column;
    u64 at;
    if (!place(n, column, at)) return;
    float4 by = scales(rows, columns, column);
    uint2 raw = *reinterpret_cast<uint2*>(x + at);
    *reinterpret_cast<uint2*>(x + at) = make_uint2(
        to_bf16x2(bf16_low(raw.x) * by.x, bf16_high(raw.x) * by.y),
        to_bf16x2(bf16_low(raw.y) * by.z, bf16_high(raw.y) * by.w));
}

extern "C" __global__ void __launch_bounds__(256) scale_f32(float* x, const float* rows, const float* columns, u32 n) {
    u32 column;
    u64 at;
    if (!place(n, column, at)) return;
    float4 by = scales(rows, columns, column);
    float4 v = *reinterpret_cast<float4*>(x + at);
    *reinterpret_cast<float4*>(x + at) = make_float4(v.x * by.x, v.y * by.y, v.z * by.z, v.w * by.w);
}

extern "C" __global__ void __launch_bounds__(256)
    scale_add(float* out, const float* x, const float* rows, const float* columns, u32 n) {
    u32 column;
    u64 at;
    if (!place(n, column, at)) return;
    float4 by = scales(rows, columns, column);
    float4 v = *reinterpret_cast<const float4*>(x + at);
    float4 old = *reinterpret_cast<float4*>(out + at);
    *reinterpret_cast<float4*>(out + at) =
        make_float4(fmaf(v.x, by.x, old.x), fmaf(v.y, by.y, old.y), fmaf(v.z, by.z, old.z), fmaf(v.w, by.w, old.w));
}
