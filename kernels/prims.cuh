// Types and every piece of inline PTX that the kernels use. No header of CUDA or of C++ is included anywhere: NVRTC has none.
//
// Rules of all kernels here:
// - Programs are compiled with -fmad=false: a product and a sum are fused only where the source says fmaf, so that two
//   kernels that say the same thing compute the same bits.
// - bfloat16 is stored as its 16 bits and rounded to nearest, ties to even.
// - What a file's head says of bytes, operations and bank conflicts is what src/device/cuda/costs.rs has as functions, to which tests hold
//   the kernels. Bytes are of whole sectors of 32; "from the caches" is what was asked for before, or is asked for by everybody.
// - A pointer to values that are read 16 bytes at a time must be aligned to 16 bytes; so must be the rows it leads to.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;

#define DEVICE static __device__ __forceinline__

// Bits of what is not there: -infinity as f32, and a table entry that maps to no block.
#define NEG_INF __int_as_float(0xff800000)
#define UNMAPPED 0xffffffffu

// ---- bfloat16 ----

// The f32 of a bfloat16's bits, in the low or the high half of a word.
DEVICE float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two f32 rounded to bfloat16, `low` in the low half.
DEVICE u32 to_bf16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Eight values of 16 bytes of bfloat16.
DEVICE void unpack8(uint4 raw, float (&x)[8]) {
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = bf16_low(words[i]);
        x[2 * i + 1] = bf16_high(words[i]);
    }
}

DEVICE uint4 pack8(const float (&x)[8]) {
    return make_uint4(to_bf16x2(x[0], x[1]), to_bf16x2(x[2], x[3]), to_bf16x2(x[4], x[5]), to_bf16x2(x[6], x[7]));
}

#if __CUDA_ARCH__ >= 890
// Two f32 rounded to e4m3 (largest finite value 448, to which larger ones are clamped), `low` in the low byte.
DEVICE u16 to_e4m3x2(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

// ---- approximate functions: the same input has the same bits on one architecture, whatever kernel asks ----

// 2^x; subnormal results are 0. Largest relative error 2^-22 (PTX ISA, ex2).
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, within one unit in the last place; 0 of infinity, infinity of 0.
DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#define LOG2_E 1.4426950408889634f

// tanh x = 1 - 2 / (1 + e^2x), to 2^-21 of 1.
DEVICE float tanh_approx(float x) {
    return fmaf(-2.0f, reciprocal_approx(1.0f + exp2_approx(x * (2.0f * LOG2_E))), 1.0f);
}

// ---- loads and stores ----

// 16 bytes that nobody writes while the kernel runs.
DEVICE uint4 load16(const void* from) {
    uint4 v;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// As load16, for what is read once: it shall not push other lines out of the caches.
DEVICE uint4 load16_once(const void* from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}

DEVICE void store16(void* to, uint4 v) { *reinterpret_cast<uint4*>(to) = v; }

// ---- shared memory, asynchronous copies ----

// The address in the shared window that ldmatrix and cp.async take.
DEVICE u32 shared_address(const void* p) {
    u64 at;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(at) : "l"(p));
    return (u32)at;
}

// Copies 16 bytes, or writes 16 zeros if not `there` (`from` must be a valid address all the same).
DEVICE void copy16_async(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Ends a group of copies.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N groups of this thread are on their way. Others see the copies after a barrier.
template <int N> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- tensor cores ----

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&m)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
}

// As load_matrices, each matrix transposed.
DEVICE void load_matrices_transposed(u32 (&m)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
}

// c += a · b for a: 16 rows x 16 k, b: 16 k x 8 columns of bfloat16, c in f32. Lane l holds of c, with g = l / 4 and t = l % 4:
// rows g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2t and 2t + 1.
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same number, but one that the compiler can't trace: what depends on it is computed here, not kept from before.
DEVICE u32 opaque(u32 x) {
    u32 y;
    asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// ---- reductions in one fixed tree: all lanes get the same bits ----

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// The larger one; NaN if either is, so that a value that is no number is never quantised to one.
DEVICE float max_or_nan(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}

DEVICE float warp_max_or_nan(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = max_or_nan(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Of the four lanes that hold a row of an mma result.
DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Over a block of whole warps; `scratch` has 32 values. Every thread must call it.
template <typename F> DEVICE float block_fold(float x, float* scratch, F fold) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    float total = scratch[0];
    for (int i = 1; i < n_warps; i++) total = fold(total, scratch[i]);
    __syncthreads();
    return total;
}

DEVICE float block_sum(float x, float* scratch) {
    return block_fold(warp_sum(x), scratch, [](float a, float b) { return a + b; });
}

DEVICE float block_max_or_nan(float x, float* scratch) {
    return block_fold(warp_max_or_nan(x), scratch, [](float a, float b) { return max_or_nan(a, b); });
}
