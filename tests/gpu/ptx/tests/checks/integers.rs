//! Integers, bits, shifts.

use crate::common::{Case, check, s};

#[test]
fn sums_wrap_or_saturate() {
    check("add.s32", &[32, 32, 32], &[[0x7FFF_FFFF, 1, 0, 0x8000_0000], [5, 0xFFFF_FFFF, 0, 4]]);
    check("add.sat.s32", &[32, 32, 32], &[[0x7FFF_FFFF, 1, 0, 0x7FFF_FFFF], [0x8000_0000, 0xFFFF_FFFF, 0, 0x8000_0000]]);
    check("sub.s32", &[32, 32, 32], &[[3, 5, 0, 0xFFFF_FFFE]]);
    check("sub.u64", &[64, 64, 64], &[[0, 1, 0, u64::MAX]]);
    check("add.s16", &[16, 16, 16], &[[0x7FFF, 1, 0, 0x8000], [0xFFFF, 2, 0, 1]]);
    check("neg.s32", &[32, 32], &[[5, 0, 0, 0xFFFF_FFFB], [0x8000_0000, 0, 0, 0x8000_0000]]);
    check("abs.s32", &[32, 32], &[[0xFFFF_FFFB, 0, 0, 5], [7, 0, 0, 7]]);
    check("abs.s64", &[64, 64], &[[u64::MAX, 0, 0, 1]]);
}

#[test]
fn products_have_low_high_and_wide_halves() {
    check("mul.lo.s32", &[32, 32, 32], &[[0x1_0001, 0x1_0001, 0, 0x2_0001]]);
    check("mul.hi.u32", &[32, 32, 32], &[[0xFFFF_FFFF, 0xFFFF_FFFF, 0, 0xFFFF_FFFE]]);
    check("mul.hi.s32", &[32, 32, 32], &[[0xFFFF_FFFF, 2, 0, 0xFFFF_FFFF], [0x8000_0000, 0x8000_0000, 0, 0x4000_0000]]);
    check("mul.wide.u32", &[64, 32, 32], &[[0xFFFF_FFFF, 2, 0, 0x1_FFFF_FFFE]]);
    check("mul.wide.s32", &[64, 32, 32], &[[0xFFFF_FFFF, 2, 0, 0xFFFF_FFFF_FFFF_FFFE]]);
    check("mul.wide.u16", &[32, 16, 16], &[[0xFFFF, 0xFFFF, 0, 0xFFFE_0001]]);
    check("mul.wide.s16", &[32, 16, 16], &[[0xFFFF, 3, 0, 0xFFFF_FFFD]]);
    check("mul.hi.u64", &[64, 64, 64], &[[1 << 63, 6, 0, 3]]);
    check("mul.lo.s64", &[64, 64, 64], &[[u64::MAX, 5, 0, u64::MAX - 4]]);
    check("mad.lo.s32", &[32, 32, 32, 32], &[[3, 4, 5, 17]]);
    check("mad.wide.u32", &[64, 32, 32, 64], &[[0xFFFF_FFFF, 2, 3, 0x2_0000_0001]]);
    check("mad.wide.s32", &[64, 32, 32, 64], &[[0xFFFF_FFFF, 2, 3, 1]]);
    check("mad.hi.u32", &[32, 32, 32, 32], &[[0x8000_0000, 4, 7, 9]]);
    check("mad.lo.s64", &[64, 64, 64, 64], &[[1 << 40, 2, 1, (1 << 41) + 1]]);
    check("sad.s32", &[32, 32, 32, 32], &[[0xFFFF_FFFF, 4, 10, 15]]);
    check("dp4a.s32.s32", &[32, 32, 32, 32], &[[0xFF02_0304, 0x0101_0101, 10, 18]]);
    check("dp4a.u32.u32", &[32, 32, 32, 32], &[[0xFF00_0000, 0x0200_0000, 1, 511]]);
}

#[test]
fn quotients_are_cut_towards_zero() {
    check("div.s32", &[32, 32, 32], &[[s(-7), 2, 0, s(-3)]]);
    check("rem.s32", &[32, 32, 32], &[[s(-7), 2, 0, 0xFFFF_FFFF], [7, 0xFFFF_FFFE, 0, 1]]);
    check("div.u32", &[32, 32, 32], &[[0xFFFF_FFFF, 2, 0, 0x7FFF_FFFF], [5, 0, 0, 0xFFFF_FFFF]]);
    check("rem.u32", &[32, 32, 32], &[[17, 5, 0, 2]]);
    check("div.u64", &[64, 64, 64], &[[1 << 40, 3, 0, 366_503_875_925]]);
    check("rem.u64", &[64, 64, 64], &[[1 << 40, 3, 0, 1]]);
    check("min.s32", &[32, 32, 32], &[[0xFFFF_FFFF, 1, 0, 0xFFFF_FFFF]]);
    check("min.u32", &[32, 32, 32], &[[0xFFFF_FFFF, 1, 0, 1]]);
    check("max.s32", &[32, 32, 32], &[[0xFFFF_FFFF, 1, 0, 1]]);
    check("max.u64", &[64, 64, 64], &[[u64::MAX, 1, 0, u64::MAX]]);
}

#[test]
fn shifts_are_clamped() {
    check("shl.b32", &[32, 32, 32], &[[1, 31, 0, 1 << 31], [1, 32, 0, 0], [3, 1000, 0, 0]]);
    check("shl.b64", &[64, 64, 32], &[[1, 63, 0, 1 << 63], [1, 64, 0, 0]]);
    check("shl.b16", &[16, 16, 32], &[[0x8001, 1, 0, 2]]);
    check("shr.u32", &[32, 32, 32], &[[0x8000_0000, 31, 0, 1], [0x8000_0000, 32, 0, 0]]);
    check("shr.s32", &[32, 32, 32], &[[0x8000_0000, 40, 0, 0xFFFF_FFFF], [0x8000_0000, 4, 0, 0xF800_0000]]);
    check("shr.s64", &[64, 64, 32], &[[1 << 63, 63, 0, u64::MAX]]);
    // The 64 bits (b, a): here 0x8765432112345678.
    let (a, b) = (0x1234_5678, 0x8765_4321);
    check("shf.l.wrap.b32", &[32, 32, 32, 32], &[[a, b, 8, 0x6543_2112], [a, b, 32, b]]);
    check("shf.l.clamp.b32", &[32, 32, 32, 32], &[[a, b, 40, a]]);
    check("shf.r.wrap.b32", &[32, 32, 32, 32], &[[a, b, 8, 0x2112_3456], [a, b, 32, a]]);
    check("shf.r.clamp.b32", &[32, 32, 32, 32], &[[a, b, 32, b]]);
}

#[test]
fn bits_are_counted_and_found() {
    check("popc.b32", &[32, 32], &[[0xF0F0_0001, 0, 0, 9]]);
    check("popc.b64", &[32, 64], &[[u64::MAX, 0, 0, 64]]);
    check("clz.b32", &[32, 32], &[[0, 0, 0, 32], [0x0080_0000, 0, 0, 8]]);
    check("clz.b64", &[32, 64], &[[1, 0, 0, 63]]);
    check("brev.b32", &[32, 32], &[[1, 0, 0, 0x8000_0000], [0xC000_0000, 0, 0, 3]]);
    check("bfind.u32", &[32, 32], &[[0x10, 0, 0, 4], [0, 0, 0, 0xFFFF_FFFF]]);
    check("bfind.shiftamt.u32", &[32, 32], &[[0x10, 0, 0, 27]]);
    check("bfind.s32", &[32, 32], &[[0xFFFF_FFFF, 0, 0, 0xFFFF_FFFF], [0xFFFF_FFEF, 0, 0, 4]]);
    check("not.b32", &[32, 32], &[[0xFFFF_0000, 0, 0, 0xFFFF]]);
    check("cnot.b32", &[32, 32], &[[0, 0, 0, 1], [9, 0, 0, 0]]);
    check("xor.b64", &[64, 64, 64], &[[0xFF00, 0x0FF0, 0, 0xF0F0]]);
    check("and.b16", &[16, 16, 16], &[[0xFF0F, 0x0FF0, 0, 0x0F00]]);
    check("or.b32", &[32, 32, 32], &[[0xFF00, 0x0FF0, 0, 0xFFF0]]);
}

#[test]
fn fields_are_taken_and_put() {
    check("bfe.u32", &[32, 32, 32, 32], &[[0x1234_5678, 8, 8, 0x56], [0x1234_5678, 28, 8, 1], [0xFF, 0, 0, 0]]);
    check("bfe.s32", &[32, 32, 32, 32], &[[0x0000_8000, 8, 8, 0xFFFF_FF80], [0x8000_0000, 28, 8, 0xFFFF_FFF8]]);
    check("bfe.u64", &[64, 64, 32, 32], &[[0x1234_5678_9ABC_DEF0, 32, 16, 0x5678]]);
    let put = |opcode: &str, out: u32| {
        let body = format!(
            "ld.global.u{out} %{r}1, [%i];\n ld.global.u{out} %{r}2, [%i+8];\n mov.u32 %r8, 8;\n mov.u32 %r9, 12;\n\
             {opcode} %{r}3, %{r}1, %{r}2, %r8, %r9;\n mov.u64 %d9, 0;\n st.global.u64 [%o], %d9;\n st.global.u{out} [%o], %{r}3;\n ret;",
            r = if out == 32 { "r" } else { "d" }
        );
        Case { input: vec![0xABC, 0xFFFF_FFFF], block: 1, ..Case::default() }.out(&body)[0]
    };
    assert_eq!(put("bfi.b32", 32), 0xFFFA_BCFF);
    assert_eq!(put("bfi.b64", 64), 0xFFFA_BCFF);
    // Bytes 0..3 are those of a, 4..7 those of b; 8 more: the byte's sign.
    check(
        "prmt.b32",
        &[32, 32, 32, 32],
        &[
            [0x3322_1100, 0x7766_5544, 0x7410, 0x7744_1100],
            [0x3322_1180, 0x7766_5544, 0x0008, 0x8080_80FF],
            [0x3322_1100, 0x7766_5544, 0x3210, 0x3322_1100],
        ],
    );
}

#[test]
fn lop3_looks_up_its_table() {
    // The table of an expression is the expression of 0xF0, 0xCC and 0xAA.
    let (a, b, c) = (0xF0F0_1234, 0x0FF0_5678, 0xAAAA_9ABC);
    for (table, right) in
        [(0xF0 & 0xCC, a & b), (0xF0 ^ 0xCC ^ 0xAA, a ^ b ^ c), ((0xF0 & 0xCC) | (!0xF0 & 0xAA), a & b | !a & c)]
    {
        let body = format!(
            "mov.u32 %r1, {a};\n mov.u32 %r2, {b};\n mov.u32 %r3, {c};\n lop3.b32 %r4, %r1, %r2, %r3, {};\n\
             cvt.u64.u32 %d1, %r4;\n st.global.u64 [%o], %d1;\n ret;",
            table & 0xFF
        );
        assert_eq!(Case { block: 1, ..Case::default() }.out(&body)[0], right & 0xFFFF_FFFF, "table {table:#x}");
    }
}
