// What kernels of linear layers share: weights packed as integers, as the head of linear_q.cu says, and how a warp multiplies with them
// and stores what it gets.
#pragma once
#include "prims.cuh"

#define K_STEP 64
#define COLUMNS 64
#define THREADS 128
// Bytes from row to row of activations in shared memory: rows start in different banks.
#define X_STRIDE (2 * K_STEP + 16)

// BITS is 4, 8, or 6: integers of up to 8 bits with two scales, where there are else a scale and a minimum.
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
            for (int j = 0; j < 4; j++) {
                float q = integer<BITS>(step.q, 8 * s + 4 * c + j);
                v[j] = BITS == 6 ? q * (s % 2 ? by.y : by.x) : fmaf(q, by.x, by.y);
            }
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

// Row g + 8 i of a tile's results: neighbours trade pairs, so that each has four columns side by side, from `first_column` on, and a warp
// stores whole sectors.
DEVICE void side_by_side(const float (&acc)[2][4], int i, float (&v)[4]) {
    bool odd = threadIdx.x % 2 != 0;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float low = acc[0][2 * i + j], high = acc[1][2 * i + j];
        float got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
        v[j] = odd ? got : low;
        v[2 + j] = odd ? high : got;
    }
}

// Of lane 4 g + t.
DEVICE u32 first_column(u32 t) { return t % 2 * 8 + t / 2 * 4; }
