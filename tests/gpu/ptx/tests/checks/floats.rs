//! f32, f64, f16 and bf16.

use crate::common::{Case, check, f};

const NAN: u64 = 0x7FFF_FFFF;

#[test]
fn sums_and_products_are_rounded_as_asked() {
    let tiny = f32::from_bits(0x3300_0000); // 2^-25: less than half of one's last bit
    check("add.rn.f32", &[32, 32, 32], &[[f(1.0), f(tiny), 0, f(1.0)], [f(f32::INFINITY), f(f32::NEG_INFINITY), 0, NAN]]);
    check("add.rz.f32", &[32, 32, 32], &[[f(1.0), f(-tiny), 0, f(1.0) - 1]]);
    check("add.rp.f32", &[32, 32, 32], &[[f(1.0), f(tiny), 0, f(1.0) + 1]]);
    check("add.rm.f32", &[32, 32, 32], &[[f(-1.0), f(-tiny), 0, f(-1.0) + 1]]);
    check("sub.f32", &[32, 32, 32], &[[f(1.5), f(0.25), 0, f(1.25)]]);
    check("mul.rn.f32", &[32, 32, 32], &[[f(1.5), f(-2.0), 0, f(-3.0)]]);
    check("mul.rz.f32", &[32, 32, 32], &[[f(1.0) + 1, f(1.0) + 1, 0, f(1.0) + 2]]);
    check("mul.rp.f32", &[32, 32, 32], &[[f(1.0) + 1, f(1.0) + 1, 0, f(1.0) + 3]]);
    check("add.sat.f32", &[32, 32, 32], &[[f(0.75), f(0.75), 0, f(1.0)], [f(-1.0), f(0.5), 0, 0]]);
    check("add.ftz.f32", &[32, 32, 32], &[[1, 1, 0, 0], [0x8000_0001, 0, 0, 0]]);
    check("add.f32", &[32, 32, 32], &[[1, 1, 0, 2]]);
    check("add.f64", &[64, 64, 64], &[[1.5f64.to_bits(), 2f64.to_bits(), 0, 3.5f64.to_bits()]]);
}

#[test]
fn fma_rounds_once() {
    // (1 + 2^-23)^2 = 1 + 2^-22 + 2^-46: what is left after 1 + 2^-22 is taken away is not lost.
    let (x, c) = (f(1.0) + 1, f(-(1.0 + f32::EPSILON * 2.0)));
    check("fma.rn.f32", &[32, 32, 32, 32], &[[x, x, c, f(2f32.powi(-46))], [f(2.0), f(3.0), f(4.0), f(10.0)]]);
    check("fma.rz.f32", &[32, 32, 32, 32], &[[f(1.0), f(1.0), f(-(2f32.powi(-30))), f(1.0) - 1]]);
    check("fma.rm.f32", &[32, 32, 32, 32], &[[f(1.0), f(-1.0), f(-(2f32.powi(-30))), f(-1.0) + 1]]);
    check("fma.rp.f32", &[32, 32, 32, 32], &[[f(1.0), f(1.0), f(2f32.powi(-30)), f(1.0) + 1]]);
    check("fma.rn.f64", &[64, 64, 64, 64], &[[2f64.to_bits(), 3f64.to_bits(), 1f64.to_bits(), 7f64.to_bits()]]);
}

/// Numbers of all sizes: the result is that of the host's fused multiplication and addition.
#[test]
fn fma_is_exact_for_many_numbers() {
    let mut state = 12345u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Exponents near one another, so that sums cancel and round; sometimes any bits at all.
        let bits = (state >> 32) as u32;
        if bits.is_multiple_of(8) { bits } else { bits & 0x81FF_FFFF | 0x3E00_0000 }
    };
    for _ in 0..300 {
        let cases: Vec<[u64; 4]> = (0..32)
            .map(|_| {
                let [a, b, c] = [random(), random(), random()].map(f32::from_bits);
                let right = a.mul_add(b, c);
                [f(a), f(b), f(c), if right.is_nan() { NAN } else { f(right) }]
            })
            .collect();
        check("fma.rn.f32", &[32, 32, 32, 32], &cases);
    }
}

#[test]
fn quotients_and_roots() {
    check("div.rn.f32", &[32, 32, 32], &[[f(1.0), f(3.0), 0, 0x3EAA_AAAB], [f(1.0), 0, 0, f(f32::INFINITY)]]);
    check("rcp.rn.f32", &[32, 32], &[[f(4.0), 0, 0, f(0.25)]]);
    check("rcp.approx.ftz.f32", &[32, 32], &[[f(4.0), 0, 0, f(0.25)], [1, 0, 0, f(f32::INFINITY)]]);
    check("sqrt.rn.f32", &[32, 32], &[[f(2.0), 0, 0, 0x3FB5_04F3], [f(-1.0), 0, 0, NAN]]);
    check("rsqrt.approx.f32", &[32, 32], &[[f(4.0), 0, 0, f(0.5)], [0, 0, 0, f(f32::INFINITY)]]);
    check("ex2.approx.ftz.f32", &[32, 32], &[[f(3.0), 0, 0, f(8.0)], [f(f32::NEG_INFINITY), 0, 0, 0]]);
    check("lg2.approx.f32", &[32, 32], &[[f(8.0), 0, 0, f(3.0)]]);
    check("sqrt.rn.f64", &[64, 64], &[[9f64.to_bits(), 0, 0, 3f64.to_bits()]]);
    check("sin.approx.f32", &[32, 32], &[[0, 0, 0, 0]]);
    check("cos.approx.f32", &[32, 32], &[[0, 0, 0, f(1.0)]]);
    check("tanh.approx.f32", &[32, 32], &[[0, 0, 0, 0]]);
}

#[test]
fn the_smaller_and_the_larger() {
    let minus_zero = f(-0.0);
    check(
        "min.f32",
        &[32, 32, 32],
        &[[f(1.0), f(-2.0), 0, f(-2.0)], [NAN, f(3.0), 0, f(3.0)], [0, minus_zero, 0, minus_zero], [NAN, NAN, 0, NAN]],
    );
    check("max.f32", &[32, 32, 32], &[[f(1.0), f(-2.0), 0, f(1.0)], [f(3.0), NAN, 0, f(3.0)], [minus_zero, 0, 0, 0]]);
    check("max.NaN.f32", &[32, 32, 32], &[[f(3.0), NAN, 0, NAN], [f(3.0), f(4.0), 0, f(4.0)]]);
    check("abs.f32", &[32, 32], &[[f(-2.5), 0, 0, f(2.5)]]);
    check("neg.f32", &[32, 32], &[[f(2.5), 0, 0, f(-2.5)]]);
    check("copysign.f32", &[32, 32, 32], &[[f(-1.0), f(2.0), 0, f(-2.0)]]);
}

#[test]
fn halves() {
    // 1.0 is 0x3C00 as f16 and 0x3F80 as bf16.
    check("add.f16", &[16, 16, 16], &[[0x3C00, 0x3C00, 0, 0x4000]]);
    check("fma.rn.f16", &[16, 16, 16, 16], &[[0x4000, 0x4200, 0x3C00, 0x4700]]);
    check("mul.f16x2", &[32, 32, 32], &[[0x4000_3C00, 0x4200_C000, 0, 0x4600_C000]]);
    check("add.rn.bf16x2", &[32, 32, 32], &[[0x3F80_4000, 0x3F80_3F80, 0, 0x4000_4040]]);
    check("fma.rn.bf16", &[16, 16, 16, 16], &[[0x4000, 0x4040, 0x3F80, 0x40E0]]);
    check("max.bf16x2", &[32, 32, 32], &[[0x3F80_C000, 0x4000_3F80, 0, 0x4000_3F80]]);
    check("neg.f16x2", &[32, 32], &[[0x3C00_BC00, 0, 0, 0xBC00_3C00]]);
}

#[test]
fn comparisons_know_nan() {
    let holds = |how: &str, a: u64, b: u64| {
        let body = format!(
            "mov.b32 %f1, {a};\n mov.b32 %f2, {b};\n setp.{how}.f32 %p1, %f1, %f2;\n selp.b64 %d1, 1, 0, %p1;\n st.global.u64 [%o], %d1;\n ret;"
        );
        Case { block: 1, ..Case::default() }.out(&body)[0] == 1
    };
    for (how, less, equal, greater, nan) in [
        ("eq", false, true, false, false),
        ("ne", true, false, true, false),
        ("lt", true, false, false, false),
        ("le", true, true, false, false),
        ("gt", false, false, true, false),
        ("ge", false, true, true, false),
        ("equ", false, true, false, true),
        ("neu", true, false, true, true),
        ("ltu", true, false, false, true),
        ("leu", true, true, false, true),
        ("gtu", false, false, true, true),
        ("geu", false, true, true, true),
        ("num", true, true, true, false),
        ("nan", false, false, false, true),
    ] {
        let got = [holds(how, f(1.0), f(2.0)), holds(how, f(2.0), f(2.0)), holds(how, f(3.0), f(2.0)), holds(how, NAN, f(2.0))];
        assert_eq!(got, [less, equal, greater, nan], "{how}");
    }
}
