//! Loads, stores, state spaces, atomics.

use crate::common::Case;
use ptx::{Gpu, Options};

const SHARED: &str = ".shared .align 16 .b8 tile[1024];";

#[test]
fn loads_extend_as_their_type_says() {
    let case = Case { input: vec![0xFFEE_DDCC_8899_AA80], block: 1, outputs: 4, ..Case::default() };
    let out = case.out(
        "ld.global.s8 %r1, [%in];\n ld.global.u8 %r2, [%in];\n ld.global.s16 %d1, [%in+4];\n ld.global.nc.L1::no_allocate.u16 %h1, [%in+6];\n\
         mov.b64 %d2, {%r1, %r2};\n cvt.u64.u16 %d3, %h1;\n st.global.v2.u64 [%out], {%d2, %d1};\n st.global.u64 [%out+16], %d3;\n ret;",
    );
    assert_eq!(out[..3], [0x80_FFFF_FF80, 0xFFFF_FFFF_FFFF_DDCC, 0xFFEE]);
}

#[test]
fn vectors_are_packed_and_unpacked() {
    let case = Case { input: vec![0x0004_0003_0002_0001, 0x8877_6655_4433_2211], block: 1, outputs: 3, ..Case::default() };
    let out = case.out(
        "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%in];\n ld.global.v2.u16 {%h1,%h2}, [%in+4];\n mov.b32 %r5, {%h2, %h1};\n\
         mov.b64 {%r6, _}, %d1;\n ld.global.u64 %d2, [%in+8];\n mov.b64 {_, %r7}, %d2;\n\
         mov.b64 %d3, {%r5, %r7};\n st.global.u64 [%out], %d3;\n st.global.v2.u32 [%out+8], {%r4, %r1};\n\
         mov.b64 {%h3,%h4,%h5,%h6}, %d2;\n mov.b64 %d4, {%h6,%h5,%h4,%h3};\n st.global.u64 [%out+16], %d4;\n ret;",
    );
    assert_eq!(out, [0x8877_6655_0003_0004, 0x0002_0001_8877_6655, 0x2211_4433_6655_8877]);
}

#[test]
fn generic_addresses_reach_shared_local_and_constant_memory() {
    let declared = ".const .align 4 .u32 table[3] = {7, 8, 9};\n.global .align 4 .b8 bytes[4] = {1, 2, 3, 4};";
    let case = Case { declared, block: 1, outputs: 5, ..Case::default() };
    let out = case.out(
        ".shared .align 8 .b8 tile[64];\n .local .align 8 .b8 depot[16];\n .reg .b64 %SP; .reg .b64 %SPL;\n\
         mov.u64 %d1, tile;\n cvta.shared.u64 %d2, %d1;\n st.u32 [%d2+8], 11;\n ld.shared.u32 %r1, [tile+8];\n\
         cvta.to.shared.u64 %d3, %d2;\n cvt.u32.u64 %r9, %d3;\n ld.shared.u32 %r5, [%r9+8];\n\
         mov.u64 %SPL, depot;\n cvta.local.u64 %SP, %SPL;\n st.u32 [%SP+4], 12;\n ld.local.u32 %r2, [%SPL+4];\n\
         mov.u64 %d4, table;\n cvta.const.u64 %d5, %d4;\n ld.u32 %r3, [%d5+8];\n ld.const.u32 %r6, [table+4];\n\
         ld.global.u8 %r4, [bytes+2];\n\
         st.global.v2.u32 [%out], {%r1, %r5};\n st.global.v2.u32 [%out+8], {%r2, %r3};\n st.global.v2.u32 [%out+16], {%r4, %r6};\n ret;",
    );
    assert_eq!(out[..3], [0xB_0000_000B, 0x9_0000_000C, 0x8_0000_0003]);
}

#[test]
fn dynamic_shared_memory_lies_behind_the_declared() {
    let case = Case { declared: ".extern .shared .align 16 .b8 dyn[];", dynamic: 64, block: 1, outputs: 2, ..Case::default() };
    let out = case.out(
        ".shared .align 4 .b8 fixed[20];\n st.shared.u32 [dyn+60], 5;\n mov.u32 %r1, dyn;\n mov.u32 %r2, fixed;\n sub.s32 %r3, %r1, %r2;\n\
         ld.shared.u32 %r4, [%r1+60];\n st.global.v2.u32 [%out], {%r3, %r4};\n mov.u32 %r5, %dynamic_smem_size;\n cvt.u64.u32 %d1, %r5;\n st.global.u64 [%out+8], %d1;\n ret;",
    );
    assert_eq!(out, [0x5_0000_0020, 64]);
}

#[test]
fn atomics_return_what_was_there() {
    for (op, start, operand, right) in [
        ("add.u32", 5, "3", 8),
        ("min.s32", 5, "-3", 0xFFFF_FFFD),
        ("max.u32", 5, "-3", 0xFFFF_FFFD),
        ("and.b32", 6, "3", 2),
        ("or.b32", 6, "3", 7),
        ("xor.b32", 6, "3", 5),
        ("exch.b32", 6, "3", 3),
        ("cas.b32", 6, "6, 9", 9),
        ("cas.b32", 6, "7, 9", 6),
        ("inc.u32", 6, "6", 0),
        ("inc.u32", 5, "6", 6),
        ("dec.u32", 0, "6", 6),
        ("dec.u32", 7, "6", 6),
        ("add.f32", 0x3F80_0000, "0f40000000", 0x4040_0000),
    ] {
        let case = Case { input: vec![start], block: 1, outputs: 2, ..Case::default() };
        let out = case.out(&format!(
            "atom.global.{op} %r1, [%in], {operand};\n ld.global.u32 %r2, [%in];\n st.global.v2.u32 [%out], {{%r1, %r2}};\n ret;"
        ));
        assert_eq!(out[0], right << 32 | start, "{op} {operand}");
        if !op.starts_with("cas") && !op.starts_with("exch") {
            let out = case.out(&format!(
                "{SHARED}\n st.shared.u32 [tile], {start};\n red.shared.{op} [tile], {operand};\n ld.shared.u32 %r2, [tile];\n st.global.u32 [%out], %r2;\n ret;"
            ));
            assert_eq!(out[0] & 0xFFFF_FFFF, right, "red.{op} {operand}");
        }
    }
}

/// 128 threads of four blocks add to one counter.
#[test]
fn atomics_of_all_threads_add_up() {
    let case = Case { input: vec![0], grid: 4, block: 128, outputs: 512, ..Case::default() };
    let out = case.out(
        "mov.u32 %r1, %ctaid.x;\n mov.u32 %r2, %ntid.x;\n mad.lo.s32 %r3, %r1, %r2, %tid;\n mad.wide.u32 %o, %r3, 8, %out;\n\
         atom.global.add.u64 %d1, [%in], 1;\n st.global.u64 [%o], %d1;\n ret;",
    );
    let mut out = out;
    out.sort_unstable();
    assert_eq!(out, (0..512).collect::<Vec<u64>>());
}

/// All of it, wherever it is touched first.
#[test]
fn memory_that_nobody_wrote_holds_the_poison() {
    let mut gpu = Gpu::new(Options { poison: 0xA5, ..Options::default() });
    let n = 300_000;
    let at = gpu.alloc(n);
    gpu.write(at + 131_071, &[1, 2]).unwrap();
    let mut right = vec![0xA5; n];
    right[131_071..131_073].copy_from_slice(&[1, 2]);
    assert_eq!(gpu.read(at, n).unwrap(), right);
}
