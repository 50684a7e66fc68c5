// What happens to q, k and v between their projection and attention: bias, norms of heads, rotation, store.
//
// qkv [T][(Hq + 2 Hkv) · D] bfloat16: q heads, k heads, v heads. bias [(Hq + 2 Hkv) · D] f32 or null. q_norm, k_norm [D] f32
// or null. turns [positions][n_pairs]{cos, sin} f32, the model's scale included. positions [T] u32, slots [T] u32: block · 16 +
// slot, or UNMAPPED for a token that is stored nowhere. q [T][Hq][D] bfloat16; keys, values [n_blocks][Hkv][16][D] bfloat16.
// A head h becomes h + bias, for q and k then h / sqrt(mean(h²) + eps) · norm, then pairs (a, b) of it become (a cos − b sin,
// b cos + a sin): elements 2i and 2i + 1 (`interleaved`) or i and i + n_pairs. Computed in f32 and rounded once.
// Grid: (T, ceil((Hq + 2 Hkv) / 4)) blocks of 128 threads, a warp per head, 8 elements per lane. D is a multiple of 8, at
// most 256. Reads and writes 2 bytes per element. From the caches: 8 per pair and turned head; 8 per element for bias and norms (a lane
// has eight elements side by side, so that each of its two loads asks for half of a sector); a sector for a warp's position and slot.
// Operations: 4 per pair, and some 4 per element with bias and norms. No bank conflicts.
#include "prims.cuh"

#define MAX_DIM 256

struct QkvSizes {
    u32 n_heads, n_kv_heads, head_dim, n_pairs, interleaved;
    float eps;
};

// Where element `e` of a head stands in shared memory: pieces of four are moved so that neither lanes with eight elements each nor
// lanes with neighbouring ones meet in a bank.
DEVICE u32 place(u32 e) {
    u32 piece = e / 4;
    return (piece ^ (piece / 8 & 1)) * 4 + e % 4;
}

// Eight values of f32 that stand side by side, aligned to 16 bytes.
DEVICE void load8(const float* from, float (&x)[8]) {
    float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// Turns the pairs of a head, which lanes have eight elements each of: a lane takes pairs lane, lane + 32 ..
DEVICE void turn(float* head, float (&v)[8], const float2* turns, const QkvSizes& sizes) {
    u32 lane = threadIdx.x % 32, at = lane * 8;
    bool mine = at < sizes.head_dim;
    if (mine) {
        *reinterpret_cast<float4*>(head + place(at)) = make_float4(v[0], v[1], v[2], v[3]);
        *reinterpret_cast<float4*>(head + place(at + 4)) = make_float4(v[4], v[5], v[6], v[7]);
    }
    __syncwarp();
    for (u32 pair = lane; pair < sizes.n_pairs; pair += 32) {
        float2 t = turns[pair];
        if (sizes.interleaved) {
            float2* both = reinterpret_cast<float2*>(head + place(2 * pair));
            float a = both->x, b = both->y;
            *both = make_float2(fmaf(a, t.x, -(b * t.y)), fmaf(b, t.x, a * t.y));
        } else {
            float *first = head + place(pair), *second = head + place(pair + sizes.n_pairs);
            float a = *first, b = *second;
            *first = fmaf(a, t.x, -(b * t.y));
            *second = fmaf(b, t.x, a * t.y);
        }
    }
    __syncwarp();
    if (mine) {
        float4 low = *reinterpret_cast<float4*>(head + place(at)), high = *reinterpret_cast<float4*>(head + place(at + 4));
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
}

extern "C" __global__ void __launch_bounds__(128) finish_qkv(
    const u16* __restrict__ qkv, const float* __restrict__ bias, const float* __restrict__ q_norm,
    const float* __restrict__ k_norm, const float2* __restrict__ turns, const u32* __restrict__ positions,
    const u32* __restrict__ slots, u16* __restrict__ q, u16* __restrict__ keys, u16* __restrict__ values, QkvSizes sizes) {
    __shared__ __align__(16) float heads[4][MAX_DIM];
    u32 lane = threadIdx.x % 32, dim = sizes.head_dim, token = blockIdx.x;
    u32 head = blockIdx.y * 4 + threadIdx.x / 32;
    if (head >= sizes.n_heads + 2 * sizes.n_kv_heads) return;
    bool is_q = head < sizes.n_heads, is_k = !is_q && head < sizes.n_heads + sizes.n_kv_heads;
    bool mine = lane * 8 < dim;
    u64 row = (u64)token * (sizes.n_heads + 2 * sizes.n_kv_heads) * dim;

    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, by[8];
    if (mine) {
        unpack8(load16_once(qkv + row + head * dim + lane * 8), v);
        if (bias) {
            load8(bias + head * dim + lane * 8, by);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += by[i];
        }
    }
    const float* norm = is_q ? q_norm : k_norm;
    if ((is_q || is_k) && norm) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum);
        float inverse = 1.0f / sqrtf(warp_sum(sum) / (float)dim + sizes.eps);
        if (mine) {
            load8(norm + lane * 8, by);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = v[i] * inverse * by[i];
        }
    }
    // Partners may be in other lanes.
    if (is_q || is_k) turn(heads[threadIdx.x / 32], v, turns + (u64)positions[token] * sizes.n_pairs, sizes);
    if (!mine) return;
    if (is_q) {
        store16(q + ((u64)token * sizes.n_heads + head) * dim + lane * 8, pack8(v));
        return;
    }
    u32 slot = slots[token];
    if (slot == UNMAPPED) return;
    u32 kv_head = head - sizes.n_heads - (is_k ? 0 : sizes.n_kv_heads);
    u64 at = (((u64)(slot / 16) * sizes.n_kv_heads + kv_head) * 16 + slot % 16) * dim + lane * 8;
    store16((is_k ? keys : values) + at, pack8(v));
}
