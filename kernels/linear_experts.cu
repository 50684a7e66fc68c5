// Linear layers of experts: each row is multiplied with the weights of the expert that it is of. out[use][n] = Σ_k x[row of use][k] ·
// w[expert][n][k], for the uses that the lists of `list_uses` (experts.cu) name.
//
// Names: linear_experts_FORM_TILES. FORM says how weights are kept: `bf16` is [N][K] bfloat16; `q4`, `q8` and `q6` are packed as linear_q.cu says.
// An expert's weights, and its scales, begin `stride` bytes after those of the one before. x [..][K] bfloat16, K a multiple of 8; the row
// of a use is use / uses_per_row. out [uses][N] bfloat16. lists [n_experts][list_stride], counts [n_experts] u32.
// Grid: (N / 64 rounded up, items) blocks of 128 threads, a warp per 16 columns; an item is 16 · TILES entries of one expert's list, or
// fewer at its end. The host knows how many items there are at most; blocks that find none end. So a step needs no count on
// the host. An output is one chain of products in steps of 16 elements of k (for bf16 in an order of its own): its bits depend on its row,
// expert and column alone, so TILES is the caller's choice, and who else is in the step changes nothing.
//
// Reads 2, or B / 8 + 1/4, bytes per weight of an expert for each of its items, 2 per element of x for each 64 columns (from the caches,
// but for the first), and, from the caches, counts and places in lists; writes 2 per result. Operations, for whole blocks of rows: 2 K N
// of tensor cores; of packed weights 2.5 per weight and item; 0.5 per result. No bank conflicts.
#include "linear_q.cuh"

// Bytes from row to row of activations beside weights in bfloat16: eight lanes read 64 bytes of two rows.
#define DENSE_STRIDE (2 * K_STEP + 64)

struct Sizes {
    u64 stride;
    u32 n, k, n_experts, list_stride, uses_per_row, padding;
};

// A lane's weights for one step of 64 elements of k: of column 8 c + g, elements 32 h + 8 t to 32 h + 8 t + 7.
template <> struct Step<16> {
    uint4 words[2][2];
};

DEVICE void load_dense(Step<16>& step, const u16* w, const Sizes& sizes, u32 panel, u32 s) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = panel * 16 + 8 * c + g, k = s * K_STEP + 32 * h + 8 * t;
            step.words[c][h] = make_uint4(0, 0, 0, 0);
            if (row < sizes.n && k < sizes.k) step.words[c][h] = load16_once(w + (u64)row * sizes.k + k);
        }
}

// Elements of k are taken in the order in which lanes have them: a lane's pairs 0 and 1 stand for k = 2 t and 2 t + 8 of one product, 2 and
// 3 of the next, in weights and activations alike.
template <int TILES> DEVICE void multiply_dense(float (&acc)[TILES][2][4], const Step<16>& step, const char* x) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const char* row = x + (tile * 16 + g) * DENSE_STRIDE + h * 64 + t * 16;
            uint4 low = *reinterpret_cast<const uint4*>(row);
            uint4 high = *reinterpret_cast<const uint4*>(row + 8 * DENSE_STRIDE);
            u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int c = 0; c < 2; c++) {
                multiply_add(acc[tile][c], first, step.words[c][h].x, step.words[c][h].y);
                multiply_add(acc[tile][c], second, step.words[c][h].z, step.words[c][h].w);
            }
        }
}

// Which entries of which expert's list an item has: items are pieces of `rows` entries, one expert's after the other's. False if there
// are not so many items.
DEVICE bool find_item(u32 item, const u32* counts, u32 n_experts, u32 rows, u32& expert, u32& first) {
    u32 lane = threadIdx.x % 32, before = 0;
    for (u32 base = 0; base < n_experts; base += 32) {
        u32 own = base + lane < n_experts ? (counts[base + lane] + rows - 1) / rows : 0, until = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            u32 left = __shfl_up_sync(0xffffffffu, until, step);
            if (lane >= step) until += left;
        }
        u32 n_ended = __popc(__ballot_sync(0xffffffffu, before + until <= item));
        if (n_ended < 32) {
            expert = base + n_ended;
            first = (item - before - __shfl_sync(0xffffffffu, until - own, n_ended)) * rows;
            return true;
        }
        before += __shfl_sync(0xffffffffu, until, 31);
    }
    return false;
}

template <int BITS, int TILES>
DEVICE void linear(const u16* x, const u8* weights, const u8* scales, const u32* lists, const u32* counts, u16* out,
                   const Sizes& sizes) {
    const u32 stride = BITS == 16 ? DENSE_STRIDE : X_STRIDE, room = 16 * TILES * stride;
    __shared__ __align__(16) char rows[2][room];
    u32 expert, first;
    if (!find_item(blockIdx.y, counts, sizes.n_experts, 16 * TILES, expert, first)) return;
    const u32* list = lists + (u64)expert * sizes.list_stride + first;
    u32 n_rows = counts[expert] - first;
    const u8* w = weights + expert * sizes.stride;
    const float2* by = (const float2*)(scales + expert * sizes.stride);
    u32 panel = blockIdx.x * (COLUMNS / 16) + threadIdx.x / 32;
    u32 k_steps = (sizes.k + K_STEP - 1) / K_STEP;
    u32 to = shared_address(rows) + threadIdx.x / 8 * stride + threadIdx.x % 8 * 16;
    // A thread copies the same piece of the same rows in each step.
    u32 piece = threadIdx.x % 8 * 8;
    u32 from[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        u32 row = tile * 16 + threadIdx.x / 8;
        from[tile] = row < n_rows ? list[row] / sizes.uses_per_row : UNMAPPED;
    }
    auto copy_rows = [&](u32 s) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            u32 k = s * K_STEP + piece;
            bool there = from[tile] != UNMAPPED && k < sizes.k;
            copy16_async(to + s % 2 * room + tile * 16 * stride, x + (there ? (u64)from[tile] * sizes.k + k : 0), there);
        }
        copies_commit();
    };
    auto load = [&](Step<BITS>& step, u32 s) {
        if constexpr (BITS == 16) load_dense(step, (const u16*)w, sizes, panel, s);
        else load_step<BITS>(step, w, by, panel, k_steps, s);
    };
    float acc[TILES][2][4] = {};
    Step<BITS> now, next;
    copy_rows(0);
    load(now, 0);
    for (u32 s = 0; s < k_steps; s++) {
        bool more = s + 1 < k_steps;
        if (more) {
            copy_rows(s + 1);
            load(next, s + 1);
        } else {
            copies_commit();
        }
        copies_wait<1>();
        __syncthreads();
        if constexpr (BITS == 16) multiply_dense<TILES>(acc, now, rows[s % 2]);
        else multiply_step<BITS, TILES>(acc, now, shared_address(rows) + s % 2 * room);
        __syncthreads();
        if (more) now = next;
    }
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float v[4];
            side_by_side(acc[tile], i, v);
            u32 row = tile * 16 + g + 8 * i;
            if (row < n_rows) store4<false>(out, (u64)list[row] * sizes.n, panel * 16 + first_column(t), sizes.n, v);
        }
}

#define LINEAR(BITS, NAME, TILES)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) linear_experts_##NAME##_##TILES(                                 \
        const u16* __restrict__ x, const u8* __restrict__ weights, const u8* __restrict__ scales,                          \
        const u32* __restrict__ lists, const u32* __restrict__ counts, u16* __restrict__ out, Sizes sizes) {               \
        linear<BITS, TILES>(x, weights, scales, lists, counts, out, sizes);                                                \
    }

LINEAR(16, bf16, 1)
LINEAR(16, bf16, 4)
LINEAR(4, q4, 1)
LINEAR(4, q4, 4)
LINEAR(8, q8, 1)
LINEAR(8, q8, 4)
LINEAR(6, q6, 1)
LINEAR(6, q6, 4)
