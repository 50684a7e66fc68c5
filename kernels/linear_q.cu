// Linear layers whose weights are 4- or 8-bit integers with a scale and a minimum per 32 elements of k, for activations in
// bfloat16: out[m][n] = Σ_k x[m][k] · w[n][k], w = bfloat16(scale · q + minimum).
//
// Names: linear_qB_OUT_TILES: B bits; OUT is `bf16` (out [M][N] bfloat16 is written) or `add` (out [M][N] f32 is added to); a block
// has 16 · TILES rows. x [M][K] bfloat16, K a multiple of 8. Grid: (N / 64 rounded up, M / (16 · TILES) rounded up) blocks of 128
// threads, a warp per 16 columns. An output is one chain of products in steps of 16 elements of k: its bits depend on
// its row and column alone, so TILES is the caller's choice.
//
// Packed by whoever loads them, with K up to a multiple of 64 and N up to one of 64, padded with scale 0 and minimum 0:
//   q [N / 16][K / 64][B / 4 pieces][32 lanes][16 bytes], a lane's pieces one after the other: value 8 s + 4 c + j of lane 4 g + t is q of
//     column 8 c + g, element 16 s + 2 t + {0, 1, 8, 9}[j] of k; 4-bit values (0 to 15) are 2 in a byte, the low one first; 8-bit ones
//     are signed.
//   scales [N / 16][K / 32][16 columns]{scale, minimum} f32.
// GGUF: Q4_0 is scale d, minimum −8 d; Q4_1 and Q4_K as they are; others as 8-bit integers. GPTQ and AWQ: scale s, minimum −s ·
// zero, repeated over their groups. Elements of k in an order of their own (GPTQ's act-order) are x's to gather.
// Reads (B / 8 + 1/4) bytes per weight for each 16 · TILES rows, 2 per element of x for each 64 columns (from the caches, but for the
// first); writes 2 or 4 per result (4 read, if added to). Operations, for whole blocks of rows: 2 M N K of tensor cores; 2.5 per weight
// and block of rows, 0.5 or 1 per result. No bank conflicts.
#include "prims.cuh"

#define K_STEP 64
#define COLUMNS 64
#define THREADS 128
// Bytes from row to row of activations in shared memory: rows start in different banks.
#define X_STRIDE (2 * K_STEP + 16)

struct Sizes {
    u32 m, n, k;
};

template <int BITS> struct Packed {
    static const int WORDS = BITS == 4 ? 1 : 2;
    uint4 words[WORDS];
};

// A lane's integers and scales for one step of 64 elements of k.
template <int BITS> struct Step {
    Packed<BITS> q;
    float2 scales[2][2];
};

template <int BITS> DEVICE void load_step(Step<BITS>& step, const u8* q, const float2* scales, u32 panel, u32 k_steps, u32 s) {
    u32 lane = threadIdx.x % 32, g = lane / 4;
    const u8* from = q + ((u64)panel * k_steps + s) * (512 * Packed<BITS>::WORDS) + lane * 16;
#pragma unroll
    for (int i = 0; i < Packed<BITS>::WORDS; i++) step.q.words[i] = load16_once(from + 512 * i);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int c = 0; c < 2; c++) step.scales[half][c] = scales[(((u64)panel * k_steps + s) * 2 + half) * 16 + 8 * c + g];
}

// Value i of a lane.
template <int BITS> DEVICE float integer(const Packed<BITS>& q, int i) {
    if (BITS == 4) {
        u32 words[4] = {q.words[0].x, q.words[0].y, q.words[0].z, q.words[0].w};
        return (float)(words[i / 8] >> (i % 8 * 4) & 15);
    }
    const uint4& v = q.words[i / 16 % Packed<BITS>::WORDS];
    u32 words[4] = {v.x, v.y, v.z, v.w};
    return (float)((i32)(words[i / 4 % 4] << (24 - i % 4 * 8)) >> 24);
}

// Starts copying 64 elements of k of a block's rows; what is not there becomes 0.
template <int TILES> DEVICE void copy_rows(const u16* x, const Sizes& sizes, u32 first_row, u32 k, u32 to) {
#pragma unroll
    for (u32 i = threadIdx.x; i < 16 * TILES * (K_STEP / 8); i += THREADS) {
        u32 row = i / (K_STEP / 8), piece = i % (K_STEP / 8);
        bool there = first_row + row < sizes.m && k + piece * 8 < sizes.k;
        copy16_async(to + row * X_STRIDE + piece * 16, x + (there ? (u64)(first_row + row) * sizes.k + k + piece * 8 : 0), there);
    }
}

template <int BITS, int TILES>
DEVICE void multiply_step(float (&acc)[TILES][2][4], const Step<BITS>& step, u32 x) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < K_STEP / 16; s++) {
        u32 w[2][2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float2 by = step.scales[s / 2][c];
            float v[4];
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = fmaf(integer<BITS>(step.q, 8 * s + 4 * c + j), by.x, by.y);
            w[c][0] = to_bf16x2(v[0], v[1]);
            w[c][1] = to_bf16x2(v[2], v[3]);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            u32 a[4];
            load_matrices(a, x + (tile * 16 + lane % 16) * X_STRIDE + lane / 16 * 16 + s * 32);
            multiply_add(acc[tile][0], a, w[0][0], w[0][1]);
            multiply_add(acc[tile][1], a, w[1][0], w[1][1]);
        }
    }
}

// Four columns of a row, side by side.
template <bool ADD> DEVICE void store4(void* out, u64 row, u32 column, u32 n, const float (&v)[4]) {
    bool whole = n % 4 == 0 && column < n;
    if (ADD) {
        float* to = (float*)out + row + column;
        if (whole) {
            float4 old = *reinterpret_cast<float4*>(to);
            *reinterpret_cast<float4*>(to) = make_float4(old.x + v[0], old.y + v[1], old.z + v[2], old.w + v[3]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (column + i < n) to[i] += v[i];
        }
    } else {
        u16* to = (u16*)out + row + column;
        uint2 words = make_uint2(to_bf16x2(v[0], v[1]), to_bf16x2(v[2], v[3]));
        if (whole) {
            *reinterpret_cast<uint2*>(to) = words;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (column + i < n) to[i] = (u16)((i < 2 ? words.x : words.y) >> i % 2 * 16);
        }
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
            // Neighbours trade pairs, so that each has four columns side by side and a warp stores whole sectors.
            bool odd = t % 2 != 0;
            float v[4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float low = acc[tile][0][2 * i + j], high = acc[tile][1][2 * i + j];
                float got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
                v[j] = odd ? got : low;
                v[2 + j] = odd ? high : got;
            }
            u32 row = first_row + tile * 16 + g + 8 * i;
            if (row < sizes.m) store4<ADD>(out, (u64)row * sizes.n, panel * 16 + t % 2 * 8 + t / 2 * 4, sizes.n, v);
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
