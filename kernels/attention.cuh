// What prefill, decode and shared-prefix attention have in common. All of them compute the same bits for a row (one query
// of one head), so a work list may give any row to any of them:
// - keys are taken in tiles of TILE at multiples of TILE, in segments of SEGMENT at multiples of SEGMENT;
// - within a segment the state (largest score, sum, output) is a left fold over tiles (fold_scores, then P·V in k-steps of 16);
// - a row's segments are merged from left to right (merge).
// A tile of which a row sees nothing leaves its state as it is (times 1, plus 0). Scores are in units of log2.
//
// q [T][Hq][D], out [T][Hq][D], keys and values [n_blocks][Hkv][16][D]: bfloat16. Row r of an item is token
// token_start + r / group, head kv_head · group + r % group: packed, so that a group's heads share each load of a key.
#pragma once
#include "prims.cuh"

#define TILE 64
#define SEGMENT 1024
#define BLOCK_TOKENS 16

// Scores of one row that a lane holds: eight pairs of columns of a tile.
#define PAIRS (TILE / 8)

// A piece of work: rows row_start .. row_start + n_rows of the packed rows, keys key_begin .. key_end; none of both is empty. An item
// without rows is none: it fills up a list.
struct Item {
    u32 kv_head, token_start, row_start, n_rows;
    // Where its sequence's block table starts.
    u32 table_start;
    // A multiple of TILE, and the number of keys that are there.
    u32 key_begin, key_end;
    u32 flags;
};
// The states of the item's rows go to the parts of their segments (an item without it writes outputs).
#define TO_PARTS 1u
// The fold goes on from the state that stands in the part of the first segment.
#define RESUMES 2u

// An item in registers: otherwise it would be read again after every copy, for all the compiler knows.
DEVICE Item load_item(const Item* from) {
    uint4 first = load16(from), second = load16(reinterpret_cast<const uint4*>(from) + 1);
    return {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
}

struct Attention {
    const u16 *q, *keys, *values;
    u16* out;
    // [n_blocks of all sequences]; UNMAPPED where no row sees the block.
    const u32* tables;
    // [T]
    const u32* positions;
    // [T] where a token's parts start: part (start + segment) · Hq + head, in 32 bits that wrap (a window's first segments have none).
    const u32* part_starts;
    // [parts][D] and [parts]{largest, sum}
    float* part_out;
    float2* part_state;
    u32 n_heads, n_kv_heads;
    // Multiplies scores: scale · log2(e); with a cap, scale / cap.
    float scale;
    // cap · log2(e), or 0.
    float cap;
    // Positions that a row sees, its own included; 0 sees all.
    u32 window;
};

// A row as its lanes know it.
struct Row {
    u32 token, head, position;
    bool there;
};

DEVICE Row row_of(const Attention& a, const Item& item, u32 row) {
    u32 group = a.n_heads / a.n_kv_heads, r = item.row_start + row;
    Row out;
    out.there = row < item.n_rows;
    out.token = item.token_start + (out.there ? r / group : 0);
    out.head = item.kv_head * group + (out.there ? r % group : 0);
    out.position = a.positions[out.token];
    return out;
}

DEVICE bool sees(const Attention& a, u32 position, u32 key) {
    return key <= position && (a.window == 0 || position - key < a.window);
}

// Whether some key of a segment is one that a row sees: only then the row has a part for it.
DEVICE bool has_segment(const Attention& a, u32 position, u32 segment) {
    u32 first = a.window != 0 && position >= a.window ? position - a.window + 1 : 0;
    return segment >= first / SEGMENT && segment <= position / SEGMENT;
}

// A row of shared memory: D elements and 16 bytes, so that the eight rows of an ldmatrix start in different banks.
template <int D> struct Tile {
    static const u32 STRIDE = 2 * D + 16;
    static const u32 BYTES = TILE * STRIDE;
};

// Starts copying the keys (or values) of a tile. Slots past key_end and unmapped blocks become zeros. A warp reads the tile's four
// entries of the table once; pieces of a tile are a multiple of 32, so its lanes are together in every round.
template <int D, int THREADS>
DEVICE void copy_tile(const Attention& a, const Item& item, const u16* cells, u32 key_start, u32 to) {
    const u32 pieces = D / 8;
    u32 mine = key_start + threadIdx.x % (TILE / BLOCK_TOKENS) * BLOCK_TOKENS;
    u32 entry = mine < item.key_end ? a.tables[item.table_start + mine / BLOCK_TOKENS] : UNMAPPED;
#pragma unroll 4
    for (u32 i = opaque(threadIdx.x); i < TILE * pieces; i += THREADS) {
        u32 slot = i / pieces, piece = i % pieces, key = key_start + slot;
        u32 block = __shfl_sync(0xffffffffu, entry, slot / BLOCK_TOKENS);
        bool there = key < item.key_end && block != UNMAPPED;
        u64 at = (((u64)(there ? block : 0) * a.n_kv_heads + item.kv_head) * BLOCK_TOKENS + key % BLOCK_TOKENS) * D;
        copy16_async(to + slot * Tile<D>::STRIDE + piece * 16, cells + (there ? at + piece * 8 : 0), there);
    }
}

// Starts copying the queries of N rows; rows that are not there become zeros.
template <int D, int THREADS> DEVICE void copy_queries(const Attention& a, const Item& item, u32 n, u32 to) {
    const u32 pieces = D / 8;
    for (u32 i = threadIdx.x; i < n * pieces; i += THREADS) {
        u32 r = i / pieces, piece = i % pieces;
        Row row = row_of(a, item, r);
        const u16* from = a.q + ((u64)row.token * a.n_heads + row.head) * D + piece * 8;
        copy16_async(to + r * Tile<D>::STRIDE + piece * 16, from, row.there);
    }
}

// Where a lane's row starts in an operand whose 8x8 matrices lie (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15):
// queries, and values (transposed).
template <int D> DEVICE u32 rows_then_columns(u32 at) {
    u32 lane = threadIdx.x % 32;
    return at + lane % 16 * Tile<D>::STRIDE + lane / 16 * 16;
}

// The same for (rows 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15): keys.
template <int D> DEVICE u32 columns_then_rows(u32 at) {
    u32 lane = threadIdx.x % 32;
    return at + (lane % 8 + lane / 16 * 8) * Tile<D>::STRIDE + lane / 8 % 2 * 16;
}

// The state of the two rows of a lane: g and g + 8.
struct State {
    float largest[2], sum[2];
};

DEVICE void clear(State& state) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        state.largest[i] = NEG_INF;
        state.sum[i] = 0.0f;
    }
}

// One step of the fold: turns products q·k of a tile into weights (as operands of P·V), and brings the state up to date.
// `decay` is what outputs so far must be multiplied by.
DEVICE void fold_scores(const Attention& a, float (&s)[PAIRS][4], const u32 (&positions)[2], u32 key_start, bool masked,
    State& state, float (&decay)[2], u32 (&weights)[PAIRS][2]) {
#pragma unroll
    for (int j = 0; j < PAIRS; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[j][c] *= a.scale;
    if (a.cap > 0.0f) {
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) s[j][c] = tanh_approx(s[j][c]) * a.cap;
    }
    if (masked) {
        u32 first = key_start + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (!sees(a, positions[c / 2], first + 8 * j + c % 2)) s[j][c] = NEG_INF;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float largest = NEG_INF;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) largest = fmaxf(largest, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
        largest = fmaxf(state.largest[i], quad_max(largest));
        // Nothing seen so far: any finite number will do.
        float base = largest == NEG_INF ? 0.0f : largest;
        decay[i] = exp2_approx(state.largest[i] - base);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            float low = exp2_approx(s[j][2 * i] - base), high = exp2_approx(s[j][2 * i + 1] - base);
            sum += low;
            sum += high;
            weights[j][i] = to_bf16x2(low, high);
        }
        state.sum[i] = fmaf(state.sum[i], decay[i], quad_sum(sum));
        state.largest[i] = largest;
    }
}

// Whether some of these rows don't see all keys of a tile.
DEVICE bool needs_mask(const Attention& a, const u32 (&positions)[2], u32 key_start) {
    bool some = false;
#pragma unroll
    for (int i = 0; i < 2; i++) some |= !sees(a, positions[i], key_start + TILE - 1) || !sees(a, positions[i], key_start);
    return __any_sync(0xffffffffu, some);
}

// out[i] of the columns 16·pair .. += weights · values, over the tile's keys in order.
template <int D>
DEVICE void add_values(float (&low)[4], float (&high)[4], const u32 (&weights)[PAIRS][2], u32 values, u32 pair) {
    u32 at = rows_then_columns<D>(values) + pair * 32;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        u32 p[4] = {weights[2 * k][0], weights[2 * k][1], weights[2 * k + 1][0], weights[2 * k + 1][1]};
        u32 v[4];
        load_matrices_transposed(v, at + k * 16 * Tile<D>::STRIDE);
        multiply_add(low, p, v[0], v[1]);
        multiply_add(high, p, v[2], v[3]);
    }
}

// How a merge multiplies two states of a row, and what their sum of weights becomes. A state that has seen nothing
// changes nothing.
struct Merge {
    float largest, sum, by_total, by_part;
};

DEVICE Merge merge(float2 total, float2 part) {
    Merge m;
    bool nothing = part.x == NEG_INF;
    m.largest = nothing ? total.x : fmaxf(total.x, part.x);
    float base = m.largest == NEG_INF ? 0.0f : m.largest;
    m.by_total = nothing ? 1.0f : exp2_approx(total.x - base);
    m.by_part = nothing ? 0.0f : exp2_approx(part.x - base);
    m.sum = nothing ? total.y : fmaf(total.y, m.by_total, part.y * m.by_part);
    return m;
}

DEVICE float merged(const Merge& m, float total, float part) { return fmaf(total, m.by_total, part * m.by_part); }

// What outputs are multiplied by in the end. A row that sees nothing gets zeros.
DEVICE float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : reciprocal_approx(sum); }

DEVICE u64 part_of(const Attention& a, const Row& row, u32 segment) {
    return (u64)(u32)(a.part_starts[row.token] + segment) * a.n_heads + row.head;
}
