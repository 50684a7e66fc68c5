// Linear layers whose weights are 4- or 8-bit integers with a scale and a minimum per 32 elements of k, or a scale per 16, for activations in
// bfloat16: out[m][n] = Σ_k x[m][k] · w[n][k], w = bfloat16(scale · q + minimum), or bfloat16(scale · q).
//
// Names: linear_qB_OUT_TILES: B bits (6: up to 8, kept as 8, with a scale per 16); OUT is `bf16` (out [M][N] bfloat16 is written) or `add` (out [M][N] f32 is added to); a block
// has 16 · TILES rows. x [M][K] bfloat16, K a multiple of 8. Grid: (N / 64 rounded up, M / (16 · TILES) rounded up) blocks of 128
// threads, a warp per 16 columns. An output is one chain of products in steps of 16 elements of k: its bits depend on
// its row and column alone, so TILES is the caller's choice.
//
// Packed by whoever loads them, with K up to a multiple of 64 and N up to one of 64, padded with scale 0 and minimum 0:
//   q [N / 16][K / 64][B / 4 pieces][32 lanes][16 bytes], a lane's pieces one after the other: value 8 s + 4 c + j of lane 4 g + t is q of
//     column 8 c + g, element 16 s + 2 t + {0, 1, 8, 9}[j] of k; 4-bit values (0 to 15) are 2 in a byte, the low one first; 8-bit ones
//     are signed.
//   scales [N / 16][K / 32][16 columns]{scale, minimum} f32; of 6 bits {scale of the first 16 elements, of the last}.
// GGUF: Q4_0 is scale d, minimum −8 d; Q4_1 and Q4_K as they are; Q3_K and Q6_K as 6-bit integers, others as 8-bit ones. GPTQ and AWQ: scale s, minimum −s ·
// zero, repeated over their groups. Elements of k in an order of their own (GPTQ's act-order) are x's to gather.
// Reads (B / 8 + 1/4) bytes per weight for each 16 · TILES rows, 2 per element of x for each 64 columns (from the caches, but for the
// first); writes 2 or 4 per result (4 read, if added to). Operations, for whole blocks of rows: 2 M N K of tensor cores; 2.5 per weight
// and block of rows, 0.5 or 1 per result. No bank conflicts.
#include "linear_q.cuh"

struct Sizes {
    u32 m, n, k;
};

// Starts copying 64 elements of k of a block's rows; what is not there becomes 0.
template <int TILES> DEVICE void copy_rows(const u16* x, const Sizes& sizes, u32 first_row, u32 k, u32 to) {
#pragma unroll
    for (u32 i = threadIdx.x; i < 16 * TILES * (K_STEP / 8); i += THREADS) {
        u32 row = i / (K_STEP / 8), piece = i % (K_STEP / 8);
        bool there = first_row + row < sizes.m && k + piece * 8 < sizes.k;
        copy16_async(to + row * X_STRIDE + piece * 16, x + (there ? (u64)(first_row + row) * sizes.k + k + piece * 8 : 0), there);
    }
}

template <int BITS, bool ADD, int TILES>
DEVICE void linear(const u16* x, const u8* q, const float2* scales, void* out, const Sizes& sizes) {
    __shared__ __align__(16) char rows[2][16 * TILES * X_STRIDE];
    u32 panel = blockIdx.x * (COLUMNS / 16) + threadIdx.x / 32, first_row = blockIdx.y * 16 * TILES;
    u32 k_steps = (sizes.k + K_STEP - 1) / K_STEP;
    u32 to = shared_address(rows);
    float acc[TILES][2][4] = {};
    Step<BITS> now, next;
    copy_rows<TILES>(x, sizes, first_row, 0, to);
    copies_commit();
    load_step<BITS>(now, q, scales, panel, k_steps, 0);
    for (u32 s = 0; s < k_steps; s++) {
        bool more = s + 1 < k_steps;
        if (more) {
            copy_rows<TILES>(x, sizes, first_row, (s + 1) * K_STEP, to + (s + 1) % 2 * (16 * TILES * X_STRIDE));
            load_step<BITS>(next, q, scales, panel, k_steps, s + 1);
        }
        copies_commit();
        copies_wait<1>();
        __syncthreads();
        multiply_step<BITS, TILES>(acc, now, to + s % 2 * (16 * TILES * X_STRIDE));
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
            u32 row = first_row + tile * 16 + g + 8 * i;
            if (row < sizes.m) store4<ADD>(out, (u64)row * sizes.n, panel * 16 + first_column(t), sizes.n, v);
        }
}

#define LINEAR(BITS, NAME, ADD, TILES)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_q##BITS##_##NAME##_##TILES(                               \
        const u16* __restrict__ x, const u8* __restrict__ q, const float2* __restrict__ scales, void* out, Sizes sizes) {  \
        linear<BITS, ADD, TILES>(x, q, scales, out, sizes);                                                                \
    }

LINEAR(4, bf16, false, 1)
LINEAR(4, bf16, false, 4)
LINEAR(4, add, true, 1)
LINEAR(4, add, true, 4)
LINEAR(8, bf16, false, 1)
LINEAR(8, bf16, false, 4)
LINEAR(8, add, true, 1)
LINEAR(8, add, true, 4)
LINEAR(6, bf16, false, 1)
LINEAR(6, bf16, false, 4)
LINEAR(6, add, true, 1)
LINEAR(6, add, true, 4)
