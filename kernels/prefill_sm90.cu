// Attention as in prefill.cu, for GPUs of compute capability 9.0 alone: products of warpgroups (wgmma), keys and values copied as boxes of
// tensors (TMA). The same items, states and results: tiles are folded by the same functions, and products added up over k in the same
// order. Whether the hardware rounds within a product of 16 as mma.sync does is not said anywhere, so where a head's size has these
// kernels, they take the items of decode, too: all attention of a model is computed by one kind of product.
//
// This has never run on a GPU. What is known of it: what it computes, moves and waits for in the interpreter of PTX (tests/gpu/ptx), and
// what the assembler makes of it (tests/gpu/resources.txt).
//
// Names: prefill_sm90_D, for D = 64, 128, 256; other heads are prefill.cu's. Blocks of 256 threads, two warpgroups, take items of at most
// 128 rows: a warpgroup has 64 of them (if it has none, it waits), all keys of a tile, and all columns. For D = 256 items have at most 64
// rows, which both warpgroups have: each computes all scores, and half of the columns. Grid, totals and total_states as in prefill.cu;
// items of decode lie in one segment each.
// keys and values [n_blocks · Hkv · 16][D]: tensors whose boxes are 16 rows of 64 elements, with 128-byte swizzle: a block of a head is
// D / 64 boxes, and what lies outside of the tensor is zero.
// Dynamic shared memory: queries, and two stages of a tile of keys and of values: 2 D (ROWS + 4 · 64) bytes; 32 bytes of mbarriers.
// A stage is filled while the other is in use; one thread starts all copies.
// Reads 4 D bytes per slot of the blocks that an item's keys are in (up to 15 keys more than prefill.cu), 2 D per row; writes as
// prefill.cu. From the caches: four sectors of tables per tile; per warp 4 for the item and positions; merges as there. Operations, for
// all rows of warpgroups that have some, and whole tiles: 4 D per row and key of tensor cores, 6 of others. No bank conflicts.
#include "rows.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int D> struct Wide {
    static const int DIM = D, WARPS = 8;
    static const int SPLIT = D == 256 ? 2 : 1;
    static const int ROWS = 16 * WARPS / SPLIT;
    static const int OUTS = D / 8 / SPLIT;
    static const int THREADS = 32 * WARPS;
    // Panels of 64 columns, each with its rows one after the other; bytes of a tile's, and of all.
    static const u32 PANELS = D / 64;
    static const u32 PANEL = TILE * 128;
    static const u32 TILE_BYTES = PANELS * PANEL;
};

// Shared memory: queries by warpgroups and panels; stages of keys and values by panels; mbarriers of each stage's keys, then values.
template <int D> struct Places {
    u32 queries, stages, barriers;
    __device__ __forceinline__ Places(u32 shared) : queries(shared), stages(shared + 2 * D * Wide<D>::ROWS), barriers(stages + 4 * Wide<D>::TILE_BYTES) {}
    // Of the tile of this number.
    __device__ __forceinline__ u32 keys(u32 tile) const { return stages + tile % 2 * 2 * Wide<D>::TILE_BYTES; }
    __device__ __forceinline__ u32 values(u32 tile) const { return keys(tile) + Wide<D>::TILE_BYTES; }
    __device__ __forceinline__ u32 keys_there(u32 tile) const { return barriers + tile % 2 * 16; }
    __device__ __forceinline__ u32 values_there(u32 tile) const { return keys_there(tile) + 8; }
};

// Starts copying a tile: for one thread. Blocks past the end and unmapped ones are rows before the tensor: zeros.
template <int D>
__device__ __forceinline__ void copy_tile_boxes(const Attention& a, const Item& item, const TensorMap* keys, const TensorMap* values, const Places<D>& to,
    u32 key_start, u32 tile) {
    i32 rows[TILE / BLOCK_TOKENS];
#pragma unroll
    for (u32 i = 0; i < TILE / BLOCK_TOKENS; i++) {
        u32 key = key_start + i * BLOCK_TOKENS;
        u32 block = key < item.key_end ? a.tables[item.table_start + key / BLOCK_TOKENS] : UNMAPPED;
        rows[i] = block == UNMAPPED ? -BLOCK_TOKENS : (i32)((block * a.n_kv_heads + item.kv_head) * BLOCK_TOKENS);
    }
#pragma unroll
    for (int which = 0; which < 2; which++) {
        u32 bar = which == 0 ? to.keys_there(tile) : to.values_there(tile);
        u32 at = which == 0 ? to.keys(tile) : to.values(tile);
        mbarrier_expect(bar, Wide<D>::TILE_BYTES);
#pragma unroll
        for (u32 panel = 0; panel < Wide<D>::PANELS; panel++)
#pragma unroll
            for (u32 i = 0; i < TILE / BLOCK_TOKENS; i++)
                copy_box(at + panel * Wide<D>::PANEL + i * BLOCK_TOKENS * 128, which == 0 ? keys : values, panel * 64, rows[i], bar);
    }
}

// The first row of a warpgroup, and of a warp.
template <int D> DEVICE u32 warpgroup_row() { return threadIdx.x / 128 * 64 % Wide<D>::ROWS; }
template <int D> DEVICE u32 warp_row() { return threadIdx.x / 32 * 16 % Wide<D>::ROWS; }

// Where 16 bytes of one of the item's rows are.
template <int D> DEVICE u32 place_in_rows(u32 row, u32 piece) {
    return (row / 64 * Wide<D>::PANELS + piece / 8) * Wide<D>::PANEL + swizzled(row % 64, piece % 8);
}

template <int D> DEVICE void copy_item_queries(const Attention& a, const Item& item, u32 to) {
    const u32 pieces = D / 8;
    for (u32 i = threadIdx.x; i < Wide<D>::ROWS * pieces; i += Wide<D>::THREADS) {
        Row row = row_of(a, item, i / pieces);
        const u16* from = a.q + ((u64)row.token * a.n_heads + row.head) * D + i % pieces * 8;
        copy16_async(to + place_in_rows<D>(i / pieces, i % pieces), from, row.there);
    }
    copies_commit();
    copies_wait<0>();
    fence_async();
}

// Values of slots past the end of the item's last block: whatever they hold, times 0, must be 0.
template <int D> DEVICE void clear_values(const Item& item, char* values) {
    const u32 pieces = D / 8;
    u32 first = item.key_end % TILE, n = BLOCK_TOKENS - first % BLOCK_TOKENS;
    for (u32 i = threadIdx.x; i < n * pieces; i += Wide<D>::THREADS)
        *reinterpret_cast<uint4*>(values + i % pieces / 8 * Wide<D>::PANEL + swizzled(first + i / pieces, i % pieces % 8)) = make_uint4(0, 0, 0, 0);
    fence_async();
    __syncthreads();
}

// Folds a tile into the state of a warpgroup's rows.
template <int D>
DEVICE void fold_tile(const Attention& a, const Places<D>& at, const u32 (&positions)[2], u32 key, u32 tile, State& state,
    float (&out)[Wide<D>::OUTS][4]) {
    u32 parity = tile / 2 % 2, queries = at.queries + warpgroup_row<D>() / 64 * Wide<D>::TILE_BYTES;
    u32 values = at.values(tile) + first_column<Wide<D>>() / 64 * Wide<D>::PANEL;
    float s[PAIRS][4] = {};
    mbarrier_wait(at.keys_there(tile), parity);
    settle(s);
    products_begin();
#pragma unroll
    for (u32 k = 0; k < D / 16; k++) {
        u32 offset = k / 4 * Wide<D>::PANEL + k % 4 * 32;
        multiply_add_64(s, 0, describe(queries + offset), describe(at.keys(tile) + offset));
    }
    products_wait();
    settle(s);

    u32 weights[PAIRS][2];
    float decay[2];
    fold_scores(a, s, positions, key, needs_mask(a, positions, key), state, decay, weights);
#pragma unroll
    for (int j = 0; j < Wide<D>::OUTS; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) out[j][c] *= decay[c / 2];
    mbarrier_wait(at.values_there(tile), parity);
    settle(out);
    products_begin();
#pragma unroll
    for (u32 k = 0; k < TILE / 16; k++) {
        u32 p[4] = {weights[2 * k][0], weights[2 * k][1], weights[2 * k + 1][0], weights[2 * k + 1][1]};
#pragma unroll
        for (u32 panel = 0; panel < Wide<D>::PANELS / Wide<D>::SPLIT; panel++)
            multiply_add_64(out, 8 * panel, p, describe(values + panel * Wide<D>::PANEL + k * 16 * 128));
    }
    products_wait();
    settle(out);
}

// Writes outputs through shared memory, where the queries were. A warp reads there what it wrote.
template <int D> DEVICE void store_rows(const Attention& a, const Item& item, const State& state, const float (&out)[Wide<D>::OUTS][4],
    char* queries) {
    u32 lane = opaque(threadIdx.x) % 32, first = warp_row<D>(), first_piece = first_column<Wide<D>>() / 8;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float inverse = inverse_sum(state.sum[i]);
        u32 row = first + lane / 4 + 8 * i;
#pragma unroll
        for (int j = 0; j < Wide<D>::OUTS; j++)
            *reinterpret_cast<u32*>(queries + place_in_rows<D>(row, first_piece + j) + lane % 4 * 4) =
                to_bf16x2(out[j][2 * i] * inverse, out[j][2 * i + 1] * inverse);
    }
    __syncwarp();
    const u32 pieces = Wide<D>::OUTS;
    for (u32 i = lane; i < 16 * pieces; i += 32) {
        u32 r = first + i / pieces, piece = first_piece + i % pieces;
        Row row = row_of(a, item, r);
        if (!row.there) continue;
        uint4 v = *reinterpret_cast<const uint4*>(queries + place_in_rows<D>(r, piece));
        store16(a.out + ((u64)row.token * a.n_heads + row.head) * D + piece * 8, v);
    }
}

// `tile`: how many tiles the block has had.
template <int D>
DEVICE void attend(const Attention& a, const Item& item, const TensorMap* keys, const TensorMap* values, float* totals, float2* states,
    char* shared, u32& tile) {
    Places<D> at(shared_address(shared));
    if (threadIdx.x == 0) {
        copy_tile_boxes<D>(a, item, keys, values, at, item.key_begin, tile);
        if (item.key_begin + TILE < item.key_end) copy_tile_boxes<D>(a, item, keys, values, at, item.key_begin + TILE, tile + 1);
    }
    copy_item_queries<D>(a, item, at.queries);
    __syncthreads();
    bool has_rows = warpgroup_row<D>() < item.n_rows;
    u32 positions[2] = {row_of(a, item, row_of_lane<Wide<D>>(0)).position, row_of(a, item, row_of_lane<Wide<D>>(1)).position};
    State state;
    float out[Wide<D>::OUTS][4] = {};
    clear(state);
    if (item.flags & RESUMES) load_state<Wide<D>>(a, item, item.key_begin / SEGMENT, state, out);
    for (u32 key = item.key_begin; key < item.key_end; key += TILE, tile++) {
        bool is_last = key + TILE >= item.key_end;
        if (is_last && item.key_end % BLOCK_TOKENS != 0) {
            mbarrier_wait(at.values_there(tile), tile / 2 % 2);
            clear_values<D>(item, shared + (at.values(tile) - at.queries));
        }
        if (has_rows) fold_tile<D>(a, at, positions, key, tile, state, out);
        __syncthreads();
        if (threadIdx.x == 0 && key + 2 * TILE < item.key_end)
            copy_tile_boxes<D>(a, item, keys, values, at, key + 2 * TILE, tile);
        if ((key + TILE) % SEGMENT != 0 && !is_last) continue;

        // The end of a segment, or of the item.
        u32 segment = key / SEGMENT, first_segment = item.key_begin / SEGMENT;
        if (has_rows) {
            if (item.flags & TO_PARTS) {
                store_state<Wide<D>>(a, item, segment, state, out);
            } else if (!is_last || segment != first_segment) {
                merge_segment<Wide<D>>(totals, states, segment == first_segment, is_last, state, out);
            }
        }
        if (is_last) {
            tile++;
            break;
        }
        clear(state);
#pragma unroll
        for (int j = 0; j < Wide<D>::OUTS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) out[j][c] = 0.0f;
    }
    if (has_rows && !(item.flags & TO_PARTS)) store_rows<D>(a, item, state, out, shared);
    __syncthreads();
}

template <int D>
DEVICE void prefill(const Attention& a, const Item* items, u32 n_items, float* totals, float2* states, const TensorMap* keys,
    const TensorMap* values) {
    extern __shared__ __align__(1024) char shared[];
    Places<D> at(shared_address(shared));
    if (threadIdx.x < 4) mbarrier_init(at.barriers + 8 * threadIdx.x, 1);
    fence_async();
    __syncthreads();
    u32 tile = 0;
    for (u32 i = blockIdx.x; i < n_items; i += gridDim.x) {
        Item item = load_item(items + i);
        if (item.n_rows != 0) attend<D>(a, item, keys, values, totals, states, shared, tile);
    }
}

#define PREFILL_SM90(D)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(Wide<D>::THREADS, 1)                                                       \
        prefill_sm90_##D(Attention a, const Item* items, u32 n_items, float* totals, float2* total_states,                  \
            const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values) {                             \
        prefill<D>(a, items, n_items, totals, total_states, &keys, &values);                                                \
    }

PREFILL_SM90(64)
PREFILL_SM90(128)
PREFILL_SM90(256)

#endif
