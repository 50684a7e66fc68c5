// Layers of experts, around their products (linear_experts.cu): which experts a token uses, who uses an expert, and the sum of what a
// token's experts give. A use is token · n_used + i: the token's i-th expert, in the order of the experts' numbers.
#include "exact.cuh"

// Experts of a layer are at most 32 times so many.
#define MOST_ROUNDS 16

// choose_experts: of each row those with the largest softmax of their scores, ties to the lower number, and their weights in the sum: that
// softmax, divided by the sum of those used if `renormalise`. A score that is NaN makes all weights NaN.
// scores [T][n_experts] f32, n_experts at most 512. chosen [T][n_used] u32, ascending, weights [T][n_used] f32; n_used is at most 32.
// Grid: (T / 4 rounded up) blocks of 128 threads, a warp per row. Reads 4 bytes per score; writes 8 per use. Operations, of a warp
// each: 16 for each 32 experts, 10, 2 per use.
extern "C" __global__ void __launch_bounds__(128)
    choose_experts(const float* __restrict__ scores, u32 n_rows, u32 n_experts, u32 n_used, u32 renormalise, u32* chosen,
                   float* weights) {
    u32 lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= n_rows) return;
    const float* own = scores + (u64)row * n_experts;
    float x[MOST_ROUNDS], largest = NEG_INF;
#pragma unroll
    for (u32 i = 0; i < MOST_ROUNDS; i++) {
        if (i * 32 >= n_experts) break;
        x[i] = i * 32 + lane < n_experts ? own[i * 32 + lane] : NEG_INF;
        // A NaN is not the larger one.
        largest = fmaxf(largest, x[i]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    float total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < MOST_ROUNDS; i++) {
        if (i * 32 >= n_experts) break;
        x[i] = exp_exact(x[i] - largest);
        total += i * 32 + lane < n_experts ? x[i] : 0.0f;
    }
    total = warp_sum(total);
    // Not negative, so their bits are in their order; a NaN, which has no place in it, is last. None is 0, which a taken one is.
    u32 taken = 0, use = 0;
    float used_total = 0.0f, weight = 0.0f;
    for (u32 j = 0; j < n_used; j++) {
        u64 best = 0;
#pragma unroll
        for (u32 i = 0; i < MOST_ROUNDS; i++) {
            if (i * 32 >= n_experts) break;
            u32 bits = x[i] == x[i] ? __float_as_uint(x[i]) : 0;
            bool free = i * 32 + lane < n_experts && !(taken >> i & 1);
            u64 key = free ? (u64)bits << 32 | ~(i * 32 + lane) : 0;
            best = key > best ? key : best;
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            u64 other = (u64)__shfl_xor_sync(0xffffffffu, (u32)(best >> 32), step) << 32 |
                        __shfl_xor_sync(0xffffffffu, (u32)best, step);
            best = other > best ? other : best;
        }
        u32 expert = ~(u32)best;
        float part = __uint_as_float((u32)(best >> 32)) / total;
        used_total += part;
        if (lane == expert % 32) taken |= 1u << expert / 32;
        if (lane == j) {
            use = expert;
            weight = part;
        }
    }
    if (renormalise) weight = weight / used_total;
    u32 place = 0;
    for (u32 j = 0; j < n_used; j++) place += __shfl_sync(0xffffffffu, use, j) < use ? 1 : 0;
    if (lane >= n_used) return;
    chosen[(u64)row * n_used + place] = use;
    weights[(u64)row * n_used + place] = weight;
}

// list_uses: of each expert, the uses that are of it, in their order.
// chosen [n_uses] u32. lists [n_experts][list_stride] u32, list_stride at least the number of tokens; counts [n_experts] u32.
// Grid: (n_experts) blocks of 256 threads. Reads 4 bytes per use, for all experts but the first from the caches; writes 4 per use, and
// a count each.
extern "C" __global__ void __launch_bounds__(256)
    list_uses(const u32* __restrict__ chosen, u32 n_uses, u32 list_stride, u32* lists, u32* counts) {
    __shared__ u32 found[8];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = 0;
    u32* list = lists + (u64)blockIdx.x * list_stride;
    for (u32 first = 0; first < n_uses; first += 256) {
        u32 use = first + threadIdx.x;
        bool own = use < n_uses && chosen[use] == blockIdx.x;
        u32 lanes = __ballot_sync(0xffffffffu, own);
        if (lane == 0) found[warp] = __popc(lanes);
        __syncthreads();
        u32 before = n;
        for (u32 i = 0; i < 8; i++) {
            if (i < warp) before += found[i];
            n += found[i];
        }
        if (own) list[before + __popc(lanes & ((1u << lane) - 1))] = use;
        __syncthreads();
    }
    if (threadIdx.x == 0) counts[blockIdx.x] = n;
}

// add_experts: x[t] += Σ weight · y[use] over a token's uses, one after the other.
// y [T · n_used][W] bfloat16, weights [T · n_used] f32, x [T][W] f32; W is a multiple of 4.
// Grid: (T, W / 512 rounded up) blocks of 128 threads, 4 elements each. Reads 2 bytes per element of y, reads and writes 4 per element
// of x; from the caches, each warp each weight. One operation per element of y.
extern "C" __global__ void __launch_bounds__(128)
    add_experts(const u16* __restrict__ y, const float* __restrict__ weights, float* x, u32 width, u32 n_used) {
    u32 at = (blockIdx.y * 128 + threadIdx.x) * 4;
    if (at >= width) return;
    float4* to = reinterpret_cast<float4*>(x + (u64)blockIdx.x * width + at);
    float4 sum = *to;
    for (u32 j = 0; j < n_used; j++) {
        u64 use = (u64)blockIdx.x * n_used + j;
        float weight = weights[use];
        uint2 v = *reinterpret_cast<const uint2*>(y + use * width + at);
        sum.x = fmaf(weight, bf16_low(v.x), sum.x);
        sum.y = fmaf(weight, bf16_high(v.x), sum.y);
        sum.z = fmaf(weight, bf16_low(v.y), sum.z);
        sum.w = fmaf(weight, bf16_high(v.y), sum.w);
    }
    *to = sum;
}
