// Gated activation: out[t][i] = f(gate[t][i]) · up[t][i].
//
// gate_up [T][2F] bfloat16: a token's F gates, then its F ups. out [T][F] bfloat16. F is a multiple of 8.
//   gate_silu: f(x) = x / (1 + e^-x);  gate_gelu: f(x) = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
// Grid: (T, ceil(F / 2048)) blocks of 256 threads, 8 elements each. Reads 4 and writes 2 bytes per element;
// 6.5 operations (silu) or 13.5 (gelu).
#include "prims.cuh"

DEVICE float silu(float x) { return x * reciprocal_approx(1.0f + exp2_approx(-x * LOG2_E)); }

DEVICE float gelu_tanh(float x) {
    float inner = 0.7978845608f * fmaf(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanh_approx(inner));
}

template <typename F> DEVICE void gate(const u16* gate_up, u16* out, u32 width, F f) {
    u32 at = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (at >= width) return;
    const u16* row = gate_up + (u64)blockIdx.x * 2 * width;
    float g[8], up[8];
    unpack8(load16_once(row + at), g);
    unpack8(load16_once(row + width + at), up);
#pragma unroll
    for (int i = 0; i < 8; i++) g[i] = f(g[i]) * up[i];
    store16(out + (u64)blockIdx.x * width + at, pack8(g));
}

extern "C" __global__ void __launch_bounds__(256)
    gate_silu(const u16* __restrict__ gate_up, u16* __restrict__ out, u32 width) {
    gate(gate_up, out, width, silu);
}

extern "C" __global__ void __launch_bounds__(256)
    gate_gelu(const u16* __restrict__ gate_up, u16* __restrict__ out, u32 width) {
    gate(gate_up, out, width, gelu_tanh);
}
