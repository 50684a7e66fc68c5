// What kernels of many rows at a time have in common: where a lane's results belong, states of segments that come and go.
//
// A shape says DIM, elements of a head; WARPS of a block, which have 16 rows each; ROWS, of a block; SPLIT, warps that share rows, each
// with its part of the columns; OUTS, accumulators of 8 columns that a warp has.
#pragma once
#include "attention.cuh"

// The first of the columns that a warp adds up.
template <typename S> DEVICE u32 first_column() { return threadIdx.x / 32 / (S::ROWS / 16) * (8 * S::OUTS); }

// The item's row that is a lane's i-th.
template <typename S> DEVICE u32 row_of_lane(int i) {
    u32 thread = opaque(threadIdx.x);
    return thread / 32 * 16 % S::ROWS + thread % 32 / 4 + 8 * i;
}

template <typename S> DEVICE void store_state(const Attention& a, const Item& item, u32 segment, const State& state,
    const float (&out)[S::OUTS][4]) {
    u32 t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        Row row = row_of(a, item, row_of_lane<S>(i));
        if (!row.there || !has_segment(a, row.position, segment)) continue;
        u64 part = part_of(a, row, segment);
        if (t == 0 && first_column<S>() == 0) a.part_state[part] = make_float2(state.largest[i], state.sum[i]);
#pragma unroll
        for (int j = 0; j < S::OUTS; j++)
            *reinterpret_cast<float2*>(a.part_out + part * S::DIM + first_column<S>() + 8 * j + 2 * t) = make_float2(out[j][2 * i], out[j][2 * i + 1]);
    }
}

template <typename S> DEVICE void load_state(const Attention& a, const Item& item, u32 segment, State& state,
    float (&out)[S::OUTS][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        Row row = row_of(a, item, row_of_lane<S>(i));
        if (!row.there) continue;
        u64 part = part_of(a, row, segment);
        float2 had = a.part_state[part];
        state.largest[i] = had.x;
        state.sum[i] = had.y;
#pragma unroll
        for (int j = 0; j < S::OUTS; j++) {
            float2 v = *reinterpret_cast<const float2*>(a.part_out + part * S::DIM + first_column<S>() + 8 * j + 2 * (threadIdx.x % 4));
            out[j][2 * i] = v.x;
            out[j][2 * i + 1] = v.y;
        }
    }
}

// Merges the state of a segment into the block's totals, or begins them. With `is_last`, the totals come back in its place.
template <typename S> DEVICE void merge_segment(float* totals, float2* states, bool is_first, bool is_last, State& state,
    float (&out)[S::OUTS][4]) {
    u32 t = threadIdx.x % 4, row = row_of_lane<S>(0);
    totals += (u64)blockIdx.x * S::ROWS * S::DIM;
    // Each warp has its own, for it reads what it wrote.
    states += blockIdx.x * 16 * S::WARPS + (first_column<S>() == 0 ? 0 : S::ROWS);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float2 part = make_float2(state.largest[i], state.sum[i]);
        float2 had = is_first ? part : states[row + 8 * i];
        Merge m = merge(had, part);
        float2 now = is_first ? part : make_float2(m.largest, m.sum);
        __syncwarp();
        if (t == 0) states[row + 8 * i] = now;
        state.largest[i] = now.x;
        state.sum[i] = now.y;
        float* total = totals + (row + 8 * i) * S::DIM + first_column<S>() + 2 * t;
#pragma unroll
        for (int j = 0; j < S::OUTS; j++) {
            float2* at = reinterpret_cast<float2*>(total + 8 * j);
            float2 v = make_float2(out[j][2 * i], out[j][2 * i + 1]);
            if (!is_first) {
                float2 old = *at;
                v = make_float2(merged(m, old.x, v.x), merged(m, old.y, v.y));
            }
            if (is_last) {
                out[j][2 * i] = v.x;
                out[j][2 * i + 1] = v.y;
            } else {
                *at = v;
            }
        }
    }
    __syncwarp();
}
