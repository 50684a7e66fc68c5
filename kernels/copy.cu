// Copies of KV blocks, in order: the first n_slots slots of block src become those of block dst.
//
// keys, values: [n_blocks][n_kv_heads][16][D] bfloat16. copies [n]{src, dst, n_slots} u32.
// Grid: (n_kv_heads, 2) blocks of 256 threads; y is keys or values. A thread copies the same 16-byte pieces of a slot in every
// copy, so a copy that reads what an earlier one wrote finds it there. Reads and writes 2 bytes per element. From the caches: a sector for
// each warp and word of the list.
#include "prims.cuh"

struct BlockCopy {
    u32 src, dst, n_slots;
};

extern "C" __global__ void __launch_bounds__(256)
    copy_blocks(u16* keys, u16* values, const BlockCopy* __restrict__ copies, u32 n_copies, u32 head_dim) {
    u32 pieces = head_dim / 8;
    u64 head_cells = (u64)16 * head_dim;
    u16* cells = (blockIdx.y == 0 ? keys : values) + blockIdx.x * head_cells;
    for (u32 i = 0; i < n_copies; i++) {
        BlockCopy copy = copies[i];
        const u16* from = cells + copy.src * gridDim.x * head_cells;
        u16* to = cells + copy.dst * gridDim.x * head_cells;
        for (u32 piece = threadIdx.x; piece < copy.n_slots * pieces; piece += 256)
            store16(to + piece * 8, *reinterpret_cast<const uint4*>(from + piece * 8));
    }
}
