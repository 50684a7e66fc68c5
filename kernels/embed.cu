// Rows by their numbers. embed_bf16: x[t] = scale · table[ids[t]]; gather_rows: out[r] = x[rows[r]], f32.
//
// ids [T] u32, table [V][H] bfloat16, x [T][H] f32. H is a multiple of 8; ids are under V. One with the highest bit is no id: the
// rest is a row of drawn [R][drawn_words] u32, which begins with the id, or with all bits if nothing could be drawn: then it is 0.
// Grid: T blocks of 128 threads. Reads 2 and writes 4 bytes per element of x; each of a block's warps reads its number (a sector). One
// multiplication per element. (Where an id was drawn, a sector more per warp.)
// gather_rows: rows [R] u32, x [T][H] f32, out [R][H] f32. H is a multiple of 4. Grid: R blocks of 128 threads. Reads and writes
// 4 bytes per element, and numbers as above.
#include "prims.cuh"

extern "C" __global__ void __launch_bounds__(128) embed_bf16(
    const u32* __restrict__ ids, const u32* __restrict__ drawn, u32 drawn_words, const u16* __restrict__ table,
    float* __restrict__ x, u32 width, float scale) {
    u32 id = ids[blockIdx.x];
    if (id >> 31) {
        id = drawn[(u64)(id & 0x7fffffffu) * drawn_words];
        if (id == 0xffffffffu) id = 0;
    }
    const u16* row = table + (u64)id * width;
    float* out = x + (u64)blockIdx.x * width;
    // Four elements a lane, so that a warp's store is of whole sectors.
    for (u32 i = threadIdx.x * 4; i < width; i += 128 * 4) {
        uint2 raw = *reinterpret_cast<const uint2*>(row + i);
        *reinterpret_cast<float4*>(out + i) = make_float4(
            bf16_low(raw.x) * scale, bf16_high(raw.x) * scale, bf16_low(raw.y) * scale, bf16_high(raw.y) * scale);
    }
}

extern "C" __global__ void __launch_bounds__(128)
    gather_rows(const u32* __restrict__ rows, const float* __restrict__ x, float* __restrict__ out, u32 width) {
    const float* from = x + (u64)rows[blockIdx.x] * width;
    float* to = out + (u64)blockIdx.x * width;
    for (u32 i = threadIdx.x * 4; i < width; i += 128 * 4) store16(to + i, load16(from + i));
}
