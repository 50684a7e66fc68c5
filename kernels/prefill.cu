// Attention of chunks of prompts, and of prefixes that several sequences share: many rows at a time.
//
// Names: prefill_D. Blocks of 256 threads take items (attention.cuh) of at most 128 rows, for D = 256 of 64: a warp has 16 rows,
// all keys of a tile, and all columns of the values (for D = 256 half of them: registers hold no more). Grid: any number of blocks up to the number of items; a block takes items blockIdx.x, + gridDim.x, ...
// An item's rows are of one key/value head: a chunk's, or those of neighbouring sequences with one token each over the blocks
// that all of them see (a cascade: then with TO_PARTS, the rest by decode_D with RESUMES). Longest items first.
// totals [gridDim.x][rows][D] f32, total_states [gridDim.x][128]{largest, sum}: where a block merges
// segments; what is there before is not read.
// Dynamic shared memory: 2 tiles of 64 · (2 D + 16) bytes, for D = 256 as much as one of them more for queries.
// Reads 4 D bytes per key and item, 2 D per row; writes 2 D per row, or 4 D + 8 to parts. From the caches, for each warp: two sectors of
// tables per tile, and 4 for the item and positions; and 4 D + 8 per row, twice, for each segment that is merged. Operations, always for
// all rows and whole tiles: 4 D per row and key of tensor cores (6 D for D = 256, where two warps have the same scores), 6 of others.
// Bank conflicts: as in decode.cu.
#include "attention.cuh"

#define WARPS 8

template <int D> struct Shape {
    // Warps that share rows, each with its part of the columns.
    static const int SPLIT = D == 256 ? 2 : 1;
    static const int ROWS = 16 * WARPS / SPLIT;
    // Accumulators of 8 columns.
    static const int OUTS = D / 8 / SPLIT;
    // Queries stay in registers where these suffice.
    static const bool KEEPS_QUERIES = D <= 128;
};

// The first of the columns that a warp adds up.
template <int D> DEVICE u32 first_column() { return threadIdx.x / 32 / (Shape<D>::ROWS / 16) * (8 * Shape<D>::OUTS); }

// The item's row that is a lane's i-th.
template <int D> DEVICE u32 row_of_lane(int i) {
    u32 thread = opaque(threadIdx.x);
    return thread / 32 * 16 % Shape<D>::ROWS + thread % 32 / 4 + 8 * i;
}

template <int D> DEVICE void store_state(const Attention& a, const Item& item, u32 segment, const State& state,
    const float (&out)[Shape<D>::OUTS][4]) {
    u32 t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        Row row = row_of(a, item, row_of_lane<D>(i));
        if (!row.there || !has_segment(a, row.position, segment)) continue;
        u64 part = part_of(a, row, segment);
        if (t == 0 && first_column<D>() == 0) a.part_state[part] = make_float2(state.largest[i], state.sum[i]);
#pragma unroll
        for (int j = 0; j < Shape<D>::OUTS; j++)
            *reinterpret_cast<float2*>(a.part_out + part * D + first_column<D>() + 8 * j + 2 * t) = make_float2(out[j][2 * i], out[j][2 * i + 1]);
    }
}

template <int D> DEVICE void load_state(const Attention& a, const Item& item, u32 segment, State& state,
    float (&out)[Shape<D>::OUTS][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        Row row = row_of(a, item, row_of_lane<D>(i));
        if (!row.there) continue;
        u64 part = part_of(a, row, segment);
        float2 had = a.part_state[part];
        state.largest[i] = had.x;
        state.sum[i] = had.y;
#pragma unroll
        for (int j = 0; j < Shape<D>::OUTS; j++) {
            float2 v = *reinterpret_cast<const float2*>(a.part_out + part * D + first_column<D>() + 8 * j + 2 * (threadIdx.x % 4));
            out[j][2 * i] = v.x;
            out[j][2 * i + 1] = v.y;
        }
    }
}

// Merges the state of a segment into the block's totals, or begins them. With `is_last`, the totals come back in its place.
template <int D> DEVICE void merge_segment(float* totals, float2* states, bool is_first, bool is_last, State& state,
    float (&out)[Shape<D>::OUTS][4]) {
    u32 t = threadIdx.x % 4, row = row_of_lane<D>(0);
    totals += (u64)blockIdx.x * Shape<D>::ROWS * D;
    // Each warp has its own, for it reads what it wrote.
    states += blockIdx.x * 16 * WARPS + (first_column<D>() == 0 ? 0 : Shape<D>::ROWS);
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
        float* total = totals + (row + 8 * i) * D + first_column<D>() + 2 * t;
#pragma unroll
        for (int j = 0; j < Shape<D>::OUTS; j++) {
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

// Writes outputs through shared memory, so that rows are stored 16 bytes at a time. A warp reads there what it wrote.
template <int D> DEVICE void store_outputs(const Attention& a, const Item& item, const State& state, const float (&out)[Shape<D>::OUTS][4],
    char* shared) {
    u32 lane = opaque(threadIdx.x) % 32, first = threadIdx.x / 32 * 16 % Shape<D>::ROWS;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float inverse = inverse_sum(state.sum[i]);
        char* row = shared + (first + lane / 4 + 8 * i) * Tile<D>::STRIDE + 2 * first_column<D>() + lane % 4 * 4;
#pragma unroll
        for (int j = 0; j < Shape<D>::OUTS; j++)
            *reinterpret_cast<u32*>(row + 16 * j) = to_bf16x2(out[j][2 * i] * inverse, out[j][2 * i + 1] * inverse);
    }
    __syncwarp();
    const u32 pieces = Shape<D>::OUTS;
    for (u32 i = lane; i < 16 * pieces; i += 32) {
        u32 r = first + i / pieces, piece = first_column<D>() / 8 + i % pieces;
        Row row = row_of(a, item, r);
        if (!row.there) continue;
        uint4 v = *reinterpret_cast<const uint4*>(shared + r * Tile<D>::STRIDE + piece * 16);
        store16(a.out + ((u64)row.token * a.n_heads + row.head) * D + piece * 8, v);
    }
}

template <int D> DEVICE void multiply_keys(float (&s)[PAIRS][4], const u32 (&q)[4], u32 keys, int k) {
#pragma unroll
    for (int j = 0; j < PAIRS / 2; j++) {
        u32 b[4];
        load_matrices(b, columns_then_rows<D>(keys) + j * 16 * Tile<D>::STRIDE + k * 32);
        multiply_add(s[2 * j], q, b[0], b[1]);
        multiply_add(s[2 * j + 1], q, b[2], b[3]);
    }
}

template <int D> DEVICE void attend(const Attention& a, const Item& item, float* totals, float2* states) {
    const int THREADS = 32 * WARPS;
    extern __shared__ __align__(128) char shared[];
    u32 keys = shared_address(shared), values = keys + Tile<D>::BYTES;
    u32 queries = Shape<D>::KEEPS_QUERIES ? keys : values + Tile<D>::BYTES;
    u32 warp_row = threadIdx.x / 32 * 16 % Shape<D>::ROWS;
    u32 my_queries = rows_then_columns<D>(queries + warp_row * Tile<D>::STRIDE);
    u32 positions[2] = {row_of(a, item, row_of_lane<D>(0)).position, row_of(a, item, row_of_lane<D>(1)).position};

    copy_queries<D, THREADS>(a, item, Shape<D>::ROWS, queries);
    u32 q[Shape<D>::KEEPS_QUERIES ? D / 16 : 1][4];
    if (Shape<D>::KEEPS_QUERIES) {
        copies_commit();
        copies_wait<0>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < D / 16; k++) load_matrices(q[Shape<D>::KEEPS_QUERIES ? k : 0], my_queries + k * 32);
        __syncthreads();
    }

    State state;
    float out[Shape<D>::OUTS][4] = {};
    clear(state);
    if (item.flags & RESUMES) load_state<D>(a, item, item.key_begin / SEGMENT, state, out);
    copy_tile<D, THREADS>(a, item, a.keys, item.key_begin, keys);
    copies_commit();
    for (u32 key = item.key_begin; key < item.key_end; key += TILE) {
        copy_tile<D, THREADS>(a, item, a.values, key, values);
        copies_commit();
        copies_wait<1>();
        __syncthreads();
        float s[PAIRS][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            u32 from_shared[4];
            if (!Shape<D>::KEEPS_QUERIES) load_matrices(from_shared, my_queries + k * 32);
            multiply_keys<D>(s, Shape<D>::KEEPS_QUERIES ? q[Shape<D>::KEEPS_QUERIES ? k : 0] : from_shared, keys, k);
        }
        __syncthreads();
        if (key + TILE < item.key_end) copy_tile<D, THREADS>(a, item, a.keys, key + TILE, keys);
        copies_commit();

        u32 weights[PAIRS][2];
        float decay[2];
        fold_scores(a, s, positions, key, needs_mask(a, positions, key), state, decay, weights);
#pragma unroll
        for (int j = 0; j < Shape<D>::OUTS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) out[j][c] *= decay[c / 2];
        copies_wait<1>();
        __syncthreads();
#pragma unroll
        for (int pair = 0; pair < Shape<D>::OUTS / 2; pair++)
            add_values<D>(out[2 * pair], out[2 * pair + 1], weights, values, first_column<D>() / 16 + pair);
        __syncthreads();

        // The end of a segment, or of the item.
        bool is_last = key + TILE >= item.key_end;
        if ((key + TILE) % SEGMENT != 0 && !is_last) continue;
        u32 segment = key / SEGMENT, first_segment = item.key_begin / SEGMENT;
        if (item.flags & TO_PARTS) {
            store_state<D>(a, item, segment, state, out);
        } else if (!is_last || segment != first_segment) {
            merge_segment<D>(totals, states, segment == first_segment, is_last, state, out);
        }
        if (is_last) break;
        clear(state);
#pragma unroll
        for (int j = 0; j < Shape<D>::OUTS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) out[j][c] = 0.0f;
    }
    if (!(item.flags & TO_PARTS)) store_outputs<D>(a, item, state, out, shared);
    __syncthreads();
}

template <int D>
DEVICE void prefill(const Attention& a, const Item* items, u32 n_items, float* totals, float2* total_states) {
    for (u32 i = blockIdx.x; i < n_items; i += gridDim.x) {
        Item item = load_item(items + i);
        if (item.n_rows != 0) attend<D>(a, item, totals, total_states);
    }
}

#define PREFILL(D)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)                                                  \
        prefill_##D(Attention a, const Item* items, u32 n_items, float* totals, float2* total_states) {                    \
        prefill<D>(a, items, n_items, totals, total_states);                                                               \
    }

PREFILL(64)
PREFILL(80)
PREFILL(96)
PREFILL(128)
PREFILL(256)
