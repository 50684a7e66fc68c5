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

// ---- f16 ----

// Two f32 rounded to f16, to infinity beyond 65504, `low` in the low half.
DEVICE u32 to_f16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The f32 of an f16's bits.
DEVICE float from_f16(u32 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)bits));
    return x;
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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// ---- compute capability 9.0: copies of boxes of tensors, mbarriers, products of warpgroups (four warps each) ----

// What the driver makes of a tensor's address and sizes (cuTensorMapEncodeTiled). A kernel's parameter, `const __grid_constant__`.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Makes an mbarrier whose phases end after `n` arrivals and all bytes that were announced. Others see it after a barrier; copies, if
// fence_async comes before that.
DEVICE void mbarrier_init(u32 bar, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(n) : "memory"); }

// Arrives, and announces bytes of copies.
DEVICE void mbarrier_expect(u32 bar, u32 n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(n_bytes) : "memory");
}

// Waits until the phase of this parity has ended; what its copies put is seen then.
DEVICE void mbarrier_wait(u32 bar, u32 parity) {
    u32 is_done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(is_done)
                     : "r"(bar), "r"(parity)
                     : "memory");
    } while (is_done == 0);
}

// What was written to shared memory before is seen by products and copies of boxes that are ordered behind this.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Starts copying the box of a tensor of rows that begins in this column and row; elements outside of the tensor become zeros.
DEVICE void copy_box(u32 to, const TensorMap* map, i32 column, i32 row, u32 bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(bar)
                 : "memory");
}

// Where byte `piece` * 16 of row `row` lies in rows of 128 bytes as boxes of 128-byte swizzle put them, and products read them.
DEVICE u32 swizzled(u32 row, u32 piece) { return row * 128 + (piece ^ row % 8) * 16; }

// Describes an operand of rows of 128 bytes, swizzled, 8 of them after 8 others; `at` is in the first 8, which begin at a multiple of
// 1024. Its rows are those of a matrix of 16 columns or, transposed, of one of 64: of neither is there a next one beside it, and how far
// that would be does not matter.
DEVICE u64 describe(u32 at) { return 1ull << 62 | (u64)(1024 / 16) << 32 | (1024 / 16) << 16 | (at & 0x3ffff) / 16; }

// Orders what was done with registers before products of which they are operands.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products, and waits for all.
DEVICE void products_wait() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// The compiler has these values in their registers here: none that comes before products is computed after, none after them before.
template <int N> DEVICE void settle(float (&c)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[j][i])::"memory");
}

// The accumulators of a product of 64 columns, from one on, as operands 0 to 31.
#define FOUR(c, j) "+f"((c)[j][0]), "+f"((c)[j][1]), "+f"((c)[j][2]), "+f"((c)[j][3])
#define ACCUMULATORS(c, first) \
    FOUR(c, first), FOUR(c, first + 1), FOUR(c, first + 2), FOUR(c, first + 3), \
    FOUR(c, first + 4), FOUR(c, first + 5), FOUR(c, first + 6), FOUR(c, first + 7)
#define PLACES \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

// c += a · b for a: 64 rows x 16 k, b: 16 k x 64 columns of bfloat16 (as 64 rows of k), c in f32: the eight accumulators from `first` on.
// Warp w of the warpgroup has rows 16 w .., its lanes as in multiply_add.
template <int N> DEVICE void multiply_add_64(float (&c)[N][4], int first, u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES ", "
        "%32, %33, 1, 1, 1, 0, 0;"
        : ACCUMULATORS(c, first)
        : "l"(a), "l"(b));
}

// The same, a warp's 16 rows of a in registers as multiply_add has them, b as 16 rows of 64 columns.
template <int N> DEVICE void multiply_add_64(float (&c)[N][4], int first, const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES ", "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : ACCUMULATORS(c, first)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

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
