// Attention of few rows over many keys: sequences that decode, or that verify a few drafted tokens.
//
// Names: decode_D. Grid: one block of 128 threads per item (attention.cuh) of at most 16 rows and of one segment of keys (so
// that rows · segments, not rows, fill the device; the cut depends on positions alone). Of a tile, warp w multiplies keys
// 16 w .. 16 w + 15, then all warps fold all scores, each alike, and warp w adds columns 16 (w + 4 i) .. of the values.
// An item that holds all of its rows' keys writes outputs; others (TO_PARTS) leave parts for merge_D.
// Dynamic shared memory: 2 tiles of 64 · (2 D + 16) bytes, 16 · (2 D + 16) for queries, 16 · 72 · 4 for scores.
// Reads 4 D bytes per key and item, once for all heads of a group, and 2 D per row; writes 2 D per row, or 4 D + 8 to parts. From the
// caches, for each warp: two sectors of tables per tile, and 4 or 6 (the item, positions, parts). Operations, always for 16 rows and
// whole tiles: 4 D per row and key of tensor cores; 6 per row, key and warp of others.
// Bank conflicts: none, but in copies for D = 80 and 96. Rows of shared memory are 16 bytes longer than D elements (without that, every
// ldmatrix would conflict); of eight 16-byte pieces that go on in the next row, the first and the last meet. That is one more pass for
// 3 in 5 of the groups of eight, and for 1 in 3.
#include "attention.cuh"

#define WARPS 4
#define THREADS (32 * WARPS)
// f32 from one row of scores to the next: rows start 8 banks apart.
#define SCORE_STRIDE 72

// Pairs of 8 columns of values that a warp adds up.
template <int D> struct Shape {
    static const int PAIRS_OF_WARP = (D / 16 + WARPS - 1) / WARPS;
};

// Calls f(i-th accumulator of this warp, its first column) for the two columns of each that this lane has.
template <int D, typename F> DEVICE void each_column(F f) {
    u32 warp = threadIdx.x / 32, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < Shape<D>::PAIRS_OF_WARP; i++) {
        u32 pair = warp + WARPS * i;
        if (pair < D / 16) {
            f(2 * i, 16 * pair + 2 * t);
            f(2 * i + 1, 16 * pair + 8 + 2 * t);
        }
    }
}

template <int D> DEVICE void load_state(const Attention& a, const Row (&rows)[2], u32 segment, State& state,
    float (&out)[2 * Shape<D>::PAIRS_OF_WARP][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!rows[i].there) continue;
        u64 part = part_of(a, rows[i], segment);
        float2 had = a.part_state[part];
        state.largest[i] = had.x;
        state.sum[i] = had.y;
        each_column<D>([&](int j, u32 column) {
            float2 v = *reinterpret_cast<const float2*>(a.part_out + part * D + column);
            out[j][2 * i] = v.x;
            out[j][2 * i + 1] = v.y;
        });
    }
}

template <int D> DEVICE void store(const Attention& a, const Item& item, const Row (&rows)[2], const State& state,
    const float (&out)[2 * Shape<D>::PAIRS_OF_WARP][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!rows[i].there) continue;
        if (item.flags & TO_PARTS) {
            u32 segment = item.key_begin / SEGMENT;
            if (!has_segment(a, rows[i].position, segment)) continue;
            u64 part = part_of(a, rows[i], segment);
            if (threadIdx.x < 32 && threadIdx.x % 4 == 0) a.part_state[part] = make_float2(state.largest[i], state.sum[i]);
            each_column<D>([&](int j, u32 column) {
                *reinterpret_cast<float2*>(a.part_out + part * D + column) = make_float2(out[j][2 * i], out[j][2 * i + 1]);
            });
        } else {
            float inverse = inverse_sum(state.sum[i]);
            u16* row = a.out + ((u64)rows[i].token * a.n_heads + rows[i].head) * D;
            each_column<D>([&](int j, u32 column) {
                *reinterpret_cast<u32*>(row + column) = to_bf16x2(out[j][2 * i] * inverse, out[j][2 * i + 1] * inverse);
            });
        }
    }
}

template <int D> DEVICE void decode(const Attention& a, const Item& item) {
    if (item.n_rows == 0) return;
    extern __shared__ __align__(128) char shared[];
    u32 keys = shared_address(shared), values = keys + Tile<D>::BYTES, queries = values + Tile<D>::BYTES;
    float* scores = reinterpret_cast<float*>(shared + 2 * Tile<D>::BYTES + 16 * Tile<D>::STRIDE);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    Row rows[2] = {row_of(a, item, g), row_of(a, item, g + 8)};
    u32 positions[2] = {rows[0].position, rows[1].position};

    copy_queries<D, THREADS>(a, item, 16, queries);
    copy_tile<D, THREADS>(a, item, a.keys, item.key_begin, keys);
    copies_commit();
    State state;
    float out[2 * Shape<D>::PAIRS_OF_WARP][4] = {};
    clear(state);
    if (item.flags & RESUMES) load_state<D>(a, rows, item.key_begin / SEGMENT, state, out);
    for (u32 key = item.key_begin; key < item.key_end; key += TILE) {
        copy_tile<D, THREADS>(a, item, a.values, key, values);
        copies_commit();
        copies_wait<1>();
        __syncthreads();
        float mine[2][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            u32 q[4], b[4];
            load_matrices(q, rows_then_columns<D>(queries) + k * 32);
            load_matrices(b, columns_then_rows<D>(keys) + warp * 16 * Tile<D>::STRIDE + k * 32);
            multiply_add(mine[0], q, b[0], b[1]);
            multiply_add(mine[1], q, b[2], b[3]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<float2*>(scores + (g + 8 * i) * SCORE_STRIDE + warp * 16 + 8 * j + 2 * t) =
                    make_float2(mine[j][2 * i], mine[j][2 * i + 1]);
        __syncthreads();
        if (key + TILE < item.key_end) copy_tile<D, THREADS>(a, item, a.keys, key + TILE, keys);
        copies_commit();

        float s[PAIRS][4];
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 v = *reinterpret_cast<const float2*>(scores + (g + 8 * i) * SCORE_STRIDE + 8 * j + 2 * t);
                s[j][2 * i] = v.x;
                s[j][2 * i + 1] = v.y;
            }
        u32 weights[PAIRS][2];
        float decay[2];
        fold_scores(a, s, positions, key, needs_mask(a, positions, key), state, decay, weights);
#pragma unroll
        for (int j = 0; j < 2 * Shape<D>::PAIRS_OF_WARP; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) out[j][c] *= decay[c / 2];
        copies_wait<1>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Shape<D>::PAIRS_OF_WARP; i++) {
            u32 pair = warp + WARPS * i;
            if (pair < D / 16) add_values<D>(out[2 * i], out[2 * i + 1], weights, values, pair);
        }
        __syncthreads();
    }
    store<D>(a, item, rows, state, out);
}

#define DECODE(D)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) decode_##D(Attention a, const Item* items) {                     \
        decode<D>(a, load_item(items + blockIdx.x));                                                                                   \
    }

DECODE(64)
DECODE(80)
DECODE(96)
DECODE(128)
DECODE(256)
