// What happens to q, k and v between their projection and attention: bias, norms of heads, rotation, store.
//
// qkv [T][(Hq + 2 Hkv) · D] bfloat16: q heads, k heads, v heads. bias [(Hq + 2 Hkv) · D] f32 or null. q_norm, k_norm [D] f32
// or null. turns [positions][n_pairs]{cos, sin} f32, the model's scale included. positions [T] u32, slots [T] u32: block · 16 +
// slot, or UNMAPPED for a token that is stored nowhere. q [T][Hq][D] bfloat16; keys, values [n_blocks][Hkv][16][D] bfloat16.
// A head h becomes h + bias, for q and k then h / sqrt(mean(h²) + eps) · norm, then pairs (a, b) of it become (a cos − b sin,
// b cos + a sin): elements 2i and 2i + 1 (`interleaved`) or i and i + n_pairs. Computed in f32 and rounded once.
// Grid: (T, ceil((Hq + 2 Hkv) / 4)) blocks of 128 threads, a warp per head, 8 elements per lane. D is a multiple of 8, at
// most 256. Reads and writes 2 bytes per element, and 8 per pair of turns and head; about 8 operations per element.
#include "prims.cuh"

#define MAX_DIM 256

struct QkvSizes {
    u32 n_heads, n_kv_heads, head_dim, n_pairs, interleaved;
    float eps;
};

extern "C" __global__ void __launch_bounds__(128) finish_qkv(
    const u16* __restrict__ qkv, const float* __restrict__ bias, const float* __restrict__ q_norm,
    const float* __restrict__ k_norm, const float2* __restrict__ turns, const u32* __restrict__ positions,
    const u32* __restrict__ slots, u16* __restrict__ q, u16* __restrict__ keys, u16* __restrict__ values, QkvSizes sizes) {
    __shared__ float heads[4][MAX_DIM];
    u32 lane = threadIdx.x % 32, dim = sizes.head_dim, token = blockIdx.x;
    u32 head = blockIdx.y * 4 + threadIdx.x / 32;
    if (head >= sizes.n_heads + 2 * sizes.n_kv_heads) return;
    bool is_q = head < sizes.n_heads, is_k = !is_q && head < sizes.n_heads + sizes.n_kv_heads;
    bool mine = lane * 8 < dim;
    u64 row = (u64)token * (sizes.n_heads + 2 * sizes.n_kv_heads) * dim;

    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (mine) {
        unpack8(load16_once(qkv + row + head * dim + lane * 8), v);
        if (bias) {
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += bias[head * dim + lane * 8 + i];
        }
    }
    const float* norm = is_q ? q_norm : k_norm;
    if ((is_q || is_k) && norm) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum);
        float inverse = 1.0f / sqrtf(warp_sum(sum) / (float)dim + sizes.eps);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (mine) v[i] = v[i] * inverse * norm[lane * 8 + i];
    }
    if (is_q || is_k) {
        // Partners may be in other lanes.
        float* values_of_head = heads[threadIdx.x / 32];
        const float2* turn = turns + (u64)positions[token] * sizes.n_pairs;
        u32 n_pairs = sizes.n_pairs;
        if (mine) {
#pragma unroll
            for (int i = 0; i < 8; i++) values_of_head[lane * 8 + i] = v[i];
        }
        __syncwarp();
        if (mine) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                u32 e = lane * 8 + i;
                if (e >= 2 * n_pairs) continue;
                bool is_first = sizes.interleaved ? e % 2 == 0 : e < n_pairs;
                u32 pair = sizes.interleaved ? e / 2 : is_first ? e : e - n_pairs;
                u32 distance = sizes.interleaved ? 1 : n_pairs;
                float2 t = turn[pair];
                float partner = values_of_head[is_first ? e + distance : e - distance];
                v[i] = is_first ? fmaf(v[i], t.x, -(partner * t.y)) : fmaf(v[i], t.x, partner * t.y);
            }
        }
    }
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
