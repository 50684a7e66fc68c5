// The one exponential, the one logarithm and the counter-based generator of draws, operation by operation those of
// src/device/math.rs and src/device/sample.rs: IEEE arithmetic in a fixed order, so that the bits are the host's.
#pragma once
#include "prims.cuh"

// 2^n for -126 <= n <= 127.
DEVICE float power_of_two(i32 n) { return __int_as_float((n + 127) << 23); }

// e^x; within one unit in the last place.
DEVICE float exp_exact(float x) {
    const float shift = 12582912.0f;
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    float shifted = fmaf(x, 1.44269504088896340736f, shift);
    float n = shifted - shift;
    float r = fmaf(n, -1.4286068e-6f, fmaf(n, -0.69314575f, x));
    float q = 0.0013814467f;
    q = fmaf(q, r, 0.008368781f);
    q = fmaf(q, r, 0.041668393f);
    q = fmaf(q, r, 0.1666652f);
    q = fmaf(q, r, 0.49999994f);
    float y = fmaf(q, r * r, r) + 1.0f;
    i32 e = __float_as_int(shifted) - __float_as_int(shift);
    i32 half = e >> 1;
    return y * power_of_two(half) * power_of_two(e - half);
}

// The natural logarithm of a positive normal number, computed in f64 and rounded once.
DEVICE float ln_exact(float x) {
    u32 bits = __float_as_uint(x);
    i32 e = (i32)(bits - 0x3f3504f3u) >> 23;
    double m = __uint_as_float(bits - ((u32)e << 23));
    double s = (m - 1.0) / (m + 1.0), s2 = s * s, series = 0.0;
    for (int k = 9; k >= 0; k--) series = series * s2 + 1.0 / (double)(2 * k + 1);
    return (float)((double)e * 0.693147180559945309417232121458 + 2.0 * s * series);
}

// 52 random bits that depend on (seed, choice, position) alone: Philox4x32-10.
DEVICE u64 random_bits(u64 seed, u32 choice, u32 position) {
    u32 c[4] = {position, choice, 0, 0}, key[2] = {(u32)seed, (u32)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        u64 first = (u64)0xd2511f53u * c[0], second = (u64)0xcd9e8d57u * c[2];
        c[0] = (u32)(second >> 32) ^ c[1] ^ key[0];
        c[1] = (u32)second;
        c[2] = (u32)(first >> 32) ^ c[3] ^ key[1];
        c[3] = (u32)first;
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
    return ((u64)c[0] << 32 | c[1]) >> 12;
}
