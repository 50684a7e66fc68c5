// Between bfloat16 and f16: cuBLASLt multiplies weights in f16 with activations in f16 alone, and gives f16.
//
// Names: bf16_to_f16 (rounded to nearest; beyond 65504 infinite; x and out apart), f16_to_bf16 (rounded to nearest; out may be x).
// x, out [n], n a multiple of 8. Grid: n / 2048 rounded up, blocks of 256 threads, 8 elements each. Reads and writes 2 bytes per
// element; 0.5 or 1.5 operations.
#include "prims.cuh"

extern "C" __global__ void __launch_bounds__(256) bf16_to_f16(const u16* __restrict__ x, u16* __restrict__ out, u32 n) {
    u32 at = (blockIdx.x * 256 + threadIdx.x) * 8;
    if (at >= n) return;
    float v[8];
    unpack8(load16(x + at), v);
    store16(out + at, make_uint4(to_f16x2(v[0], v[1]), to_f16x2(v[2], v[3]), to_f16x2(v[4], v[5]), to_f16x2(v[6], v[7])));
}

// A thread writes where it alone has read, so x may be written: no load here may be one of what nobody writes.
extern "C" __global__ void __launch_bounds__(256) f16_to_bf16(const u16* x, u16* out, u32 n) {
    u32 at = (blockIdx.x * 256 + threadIdx.x) * 8;
    if (at >= n) return;
    uint4 raw = *reinterpret_cast<const uint4*>(x + at);
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    float v[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = from_f16(words[i] & 0xffffu);
        v[2 * i + 1] = from_f16(words[i] >> 16);
    }
    store16(out + at, pack8(v));
}
