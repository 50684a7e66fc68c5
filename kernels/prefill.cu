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
#include "rows.cuh"

template <int D> struct Shape {
    static const int DIM = D, WARPS = 8;
    static const int SPLIT = D == 256 ? 2 : 1;
    static const int ROWS = 16 * WARPS / SPLIT;
    static const int OUTS = D / 8 / SPLIT;
    // Queries stay in registers where these suffice.
    static const bool KEEPS_QUERIES = D <= 128;
};

// Writes outputs through shared memory, so that rows are stored 16 bytes at a time. A warp reads there what it wrote.
template <int D> DEVICE void store_outputs(const Attention& a, const Item& item, const State& state, const float (&out)[Shape<D>::OUTS][4],
    char* shared) {
    u32 lane = opaque(threadIdx.x) % 32, first = threadIdx.x / 32 * 16 % Shape<D>::ROWS;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float inverse = inverse_sum(state.sum[i]);
        char* row = shared + (first + lane / 4 + 8 * i) * Tile<D>::STRIDE + 2 * first_column<Shape<D>>() + lane % 4 * 4;
#pragma unroll
        for (int j = 0; j < Shape<D>::OUTS; j++)
            *reinterpret_cast<u32*>(row + 16 * j) = to_bf16x2(out[j][2 * i] * inverse, out[j][2 * i + 1] * inverse);
    }
    __syncwarp();
    const u32 pieces = Shape<D>::OUTS;
    for (u32 i = lane; i < 16 * pieces; i += 32) {
        u32 r = first + i / pieces, piece = first_column<Shape<D>>() / 8 + i % pieces;
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
    const int THREADS = 32 * Shape<D>::WARPS;
    extern __shared__ __align__(128) char shared[];
    u32 keys = shared_address(shared), values = keys + Tile<D>::BYTES;
    u32 queries = Shape<D>::KEEPS_QUERIES ? keys : values + Tile<D>::BYTES;
    u32 warp_row = threadIdx.x / 32 * 16 % Shape<D>::ROWS;
    u32 my_queries = rows_then_columns<D>(queries + warp_row * Tile<D>::STRIDE);
    u32 positions[2] = {row_of(a, item, row_of_lane<Shape<D>>(0)).position, row_of(a, item, row_of_lane<Shape<D>>(1)).position};

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
    if (item.flags & RESUMES) load_state<Shape<D>>(a, item, item.key_begin / SEGMENT, state, out);
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
            add_values<D>(out[2 * pair], out[2 * pair + 1], weights, values, first_column<Shape<D>>() / 16 + pair);
        __syncthreads();

        // The end of a segment, or of the item.
        bool is_last = key + TILE >= item.key_end;
        if ((key + TILE) % SEGMENT != 0 && !is_last) continue;
        u32 segment = key / SEGMENT, first_segment = item.key_begin / SEGMENT;
        if (item.flags & TO_PARTS) {
            store_state<Shape<D>>(a, item, segment, state, out);
        } else if (!is_last || segment != first_segment) {
            merge_segment<Shape<D>>(totals, states, segment == first_segment, is_last, state, out);
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
    extern "C" __global__ void __launch_bounds__(32 * Shape<D>::WARPS, 1)                                                  \
        prefill_##D(Attention a, const Item* items, u32 n_items, float* totals, float2* total_states) {                    \
        prefill<D>(a, items, n_items, totals, total_states);                                                               \
    }

PREFILL(64)
PREFILL(80)
PREFILL(96)
PREFILL(128)
PREFILL(256)
