//! `cvt`.

use crate::common::{check, f, s};

#[test]
fn integers_are_cut_and_extended() {
    check("cvt.u32.u64", &[32, 64], &[[0x1_2345_6789, 0, 0, 0x2345_6789]]);
    check("cvt.u64.u32", &[64, 32], &[[0xFFFF_FFFF, 0, 0, 0xFFFF_FFFF]]);
    check("cvt.s64.s32", &[64, 32], &[[0xFFFF_FFFF, 0, 0, u64::MAX]]);
    check("cvt.s32.s8", &[32, 32], &[[0x80, 0, 0, 0xFFFF_FF80]]);
    check("cvt.u32.u8", &[32, 32], &[[0x1FF, 0, 0, 0xFF]]);
    check("cvt.u16.u32", &[16, 32], &[[0x1_2345, 0, 0, 0x2345]]);
    check("cvt.s8.s32", &[32, 32], &[[0x1FF, 0, 0, 0xFFFF_FFFF]]);
    check("cvt.sat.s8.s32", &[16, 32], &[[300, 0, 0, 127], [s(-300), 0, 0, 0xFF80]]);
    check("cvt.sat.u8.s32", &[16, 32], &[[300, 0, 0, 255], [0xFFFF_FFFF, 0, 0, 0]]);
}

#[test]
fn floats_to_integers_are_rounded_and_clamped() {
    check(
        "cvt.rni.s32.f32",
        &[32, 32],
        &[[f(2.5), 0, 0, 2], [f(3.5), 0, 0, 4], [f(-0.6), 0, 0, 0xFFFF_FFFF], [f(1e20), 0, 0, 0x7FFF_FFFF]],
    );
    check("cvt.rzi.s32.f32", &[32, 32], &[[f(-2.9), 0, 0, 0xFFFF_FFFE], [0x7FC0_0000, 0, 0, 0]]);
    check("cvt.rmi.s32.f32", &[32, 32], &[[f(-2.1), 0, 0, 0xFFFF_FFFD]]);
    check("cvt.rpi.s32.f32", &[32, 32], &[[f(2.1), 0, 0, 3]]);
    check("cvt.rzi.u32.f32", &[32, 32], &[[f(-1.0), 0, 0, 0], [f(5e9), 0, 0, 0xFFFF_FFFF]]);
    check("cvt.rzi.s64.f32", &[64, 32], &[[f(-3.0), 0, 0, u64::MAX - 2], [0x7FC0_0000, 0, 0, 1 << 63]]);
    check("cvt.rzi.s32.f64", &[32, 64], &[[7.9f64.to_bits(), 0, 0, 7]]);
}

#[test]
fn integers_to_floats_are_rounded_to_even() {
    check("cvt.rn.f32.s32", &[32, 32], &[[0xFFFF_FFFF, 0, 0, f(-1.0)], [16_777_217, 0, 0, f(16_777_216.0)]]);
    check("cvt.rn.f32.u32", &[32, 32], &[[0xFFFF_FFFF, 0, 0, f(4_294_967_296.0)]]);
    check("cvt.rz.f32.u32", &[32, 32], &[[0xFFFF_FFFF, 0, 0, 0x4F7F_FFFF]]);
    check("cvt.rn.f32.u64", &[32, 64], &[[1 << 40, 0, 0, f(1_099_511_627_776.0)]]);
    check("cvt.rn.f64.s64", &[64, 64], &[[u64::MAX, 0, 0, (-1f64).to_bits()]]);
    check("cvt.rn.f32.u16", &[32, 16], &[[0xFFFF, 0, 0, f(65535.0)]]);
}

#[test]
fn floats_to_floats() {
    check("cvt.f64.f32", &[64, 32], &[[f(1.5), 0, 0, 1.5f64.to_bits()]]);
    check("cvt.rn.f32.f64", &[32, 64], &[[1.000_000_01f64.to_bits(), 0, 0, f(1.0)]]);
    check("cvt.rni.f32.f32", &[32, 32], &[[f(2.5), 0, 0, f(2.0)]]);
    check("cvt.rmi.f32.f32", &[32, 32], &[[f(-2.5), 0, 0, f(-3.0)]]);
    check("cvt.rzi.f32.f32", &[32, 32], &[[f(-2.5), 0, 0, f(-2.0)]]);
    check("cvt.rpi.f32.f32", &[32, 32], &[[f(2.5), 0, 0, f(3.0)]]);
    check("cvt.sat.f32.f32", &[32, 32], &[[f(2.5), 0, 0, f(1.0)], [f(-2.5), 0, 0, 0], [0x7FC0_0000, 0, 0, 0]]);
    check("cvt.rna.tf32.f32", &[32, 32], &[[0x3F80_1000, 0, 0, 0x3F80_2000], [0x3F80_0FFF, 0, 0, 0x3F80_0000]]);
}

#[test]
fn halves_and_eighths() {
    check("cvt.rn.bf16.f32", &[16, 32], &[[0x3F80_8000, 0, 0, 0x3F80], [0x3F81_8000, 0, 0, 0x3F82], [0x7FC0_0000, 0, 0, 0x7FFF]]);
    // The first operand is the upper half.
    check("cvt.rn.bf16x2.f32", &[32, 32, 32], &[[f(1.0), f(2.0), 0, 0x3F80_4000]]);
    check("cvt.rn.relu.bf16x2.f32", &[32, 32, 32], &[[f(-1.0), f(2.0), 0, 0x4000]]);
    check("cvt.rn.f16x2.f32", &[32, 32, 32], &[[f(1.0), f(-2.0), 0, 0x3C00_C000]]);
    // 65520 is halfway between the largest number and the next; 2^-25 is halfway between zero and the smallest.
    check(
        "cvt.rn.f16.f32",
        &[16, 32],
        &[
            [f(65519.0), 0, 0, 0x7BFF],
            [f(65520.0), 0, 0, 0x7C00],
            [0x3300_0000, 0, 0, 0],
            [0x3300_0001, 0, 0, 1],
            [f(2f32.powi(-14)), 0, 0, 0x400],
        ],
    );
    check(
        "cvt.f32.f16",
        &[32, 16],
        &[[0x3555, 0, 0, 0x3EAA_A000], [1, 0, 0, f(2f32.powi(-24))], [0xFC00, 0, 0, f(f32::NEG_INFINITY)]],
    );
    check("cvt.f32.bf16", &[32, 16], &[[0x4049, 0, 0, 0x4049_0000]]);
    // e4m3: 1.0 is 0x38, 448 is 0x7E and the largest; 2^-9 is the smallest. e5m2: 1.0 is 0x3C, 57344 is 0x7B.
    check(
        "cvt.rn.satfinite.e4m3x2.f32",
        &[16, 32, 32],
        &[
            [f(1.0), f(448.0), 0, 0x387E],
            [f(1e9), f(-1e9), 0, 0x7EFE],
            [f(2f32.powi(-9)), f(1.0625), 0, 0x0138],
            [f(1.1875), f(0.0), 0, 0x3A00],
        ],
    );
    check("cvt.rn.satfinite.e5m2x2.f32", &[16, 32, 32], &[[f(1.0), f(1e9), 0, 0x3C7B]]);
    check("cvt.rn.f16x2.e4m3x2", &[32, 16], &[[0x387E, 0, 0, 0x3C00_5F00], [0x0180, 0, 0, 0x1800_8000]]);
    check("cvt.rn.f16x2.e5m2x2", &[32, 16], &[[0x3C7B, 0, 0, 0x3C00_7B00]]);
}
