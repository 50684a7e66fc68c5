// Merges the parts of rows whose keys were cut into segments, from left to right: out = Σ part · 2^(largest − M) / Σ sums.
//
// merge_parts: grid (T, ceil(Hq / 4)) blocks of 128 threads, a warp per row, head size D. A token whose part_starts is UNMAPPED
// has its output already. Reads 4 D bytes per part, writes 2 D per row. From the caches: a sector for the state of each part, two per row.
// Operations: 2 D per part, and 7 for each lane.
#include "attention.cuh"

#define MAX_DIM 256

extern "C" __global__ void __launch_bounds__(128) merge_parts(Attention a, u32 head_dim) {
    u32 lane = threadIdx.x % 32, token = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / 32;
    if (head >= a.n_heads || a.part_starts[token] == UNMAPPED) return;
    Row row = {token, head, a.positions[token], true};
    u32 first_key = a.window != 0 && row.position >= a.window ? row.position - a.window + 1 : 0;
    u32 first = first_key / SEGMENT, last = row.position / SEGMENT;
    float2 total;
    float out[MAX_DIM / 64][2];
    for (u32 segment = first; segment <= last; segment++) {
        u64 part = part_of(a, row, segment);
        float2 state = a.part_state[part];
        Merge m = merge(total, state);
        total = segment == first ? state : make_float2(m.largest, m.sum);
#pragma unroll
        for (int i = 0; i < MAX_DIM / 64; i++) {
            u32 column = 64 * i + 2 * lane;
            if (column >= head_dim) continue;
            float2 v = *reinterpret_cast<const float2*>(a.part_out + part * head_dim + column);
            out[i][0] = segment == first ? v.x : merged(m, out[i][0], v.x);
            out[i][1] = segment == first ? v.y : merged(m, out[i][1], v.y);
        }
    }
    float inverse = inverse_sum(total.y);
#pragma unroll
    for (int i = 0; i < MAX_DIM / 64; i++) {
        u32 column = 64 * i + 2 * lane;
        if (column >= head_dim) continue;
        u16* to = a.out + ((u64)token * a.n_heads + head) * head_dim + column;
        *reinterpret_cast<u32*>(to) = to_bf16x2(out[i][0] * inverse, out[i][1] * inverse);
    }
}
