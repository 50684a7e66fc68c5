//! Branches, predicates, calls, special registers.

use crate::common::{Case, kernel};
use ptx::{Arg, Gpu, Module, Options};

/// Each lane counts as many turns as its number; they meet behind the loop, where all of them vote.
#[test]
fn lanes_that_loop_differently_meet_again() {
    let out = Case::default().out(
        "mov.u32 %r1, 0;\nLOOP:\n setp.ge.u32 %p1, %r1, %tid;\n @%p1 bra DONE;\n add.s32 %r1, %r1, 1;\n bra LOOP;\nDONE:\n\
         activemask.b32 %r2;\n mov.b64 %d1, {%r1, %r2};\n st.global.u64 [%o], %d1;\n ret;",
    );
    for (lane, value) in (0u64..).zip(out.iter().take(32)) {
        assert_eq!(*value, 0xFFFF_FFFF_0000_0000 | lane);
    }
}

#[test]
fn both_sides_of_a_branch_and_early_exits() {
    let out = Case { outputs: 32, ..Case::default() }.out(
        "mov.u64 %d1, 9;\n st.global.u64 [%o], %d1;\n setp.gt.u32 %p1, %tid, 23;\n @%p1 ret;\n and.b32 %r1, %tid, 1;\n setp.eq.u32 %p2, %r1, 0;\n\
         @!%p2 bra ODD;\n mov.u64 %d1, 100;\n bra.uni JOIN;\nODD:\n mov.u64 %d1, 200;\nJOIN:\n st.global.u64 [%o], %d1;\n ret;",
    );
    for (lane, value) in out.iter().enumerate() {
        assert_eq!(
            *value,
            if lane > 23 {
                9
            } else if lane % 2 == 0 {
                100
            } else {
                200
            }
        );
    }
}

#[test]
fn a_table_of_targets() {
    let out = Case { outputs: 32, ..Case::default() }.out(
        "and.b32 %r1, %tid, 3;\n setp.gt.u32 %p1, %r1, 2;\n @%p1 bra OTHER;\nTS: .branchtargets A, B, C;\n brx.idx %r1, TS;\n\
         A:\n mov.u64 %d1, 10;\n bra END;\nB:\n mov.u64 %d1, 11;\n bra END;\nC:\n mov.u64 %d1, 12;\n bra END;\nOTHER:\n mov.u64 %d1, 13;\n\
         END:\n st.global.u64 [%o], %d1;\n ret;",
    );
    assert!(out.iter().zip(0u64..).all(|(value, lane)| *value == 10 + lane % 4), "{out:?}");
}

#[test]
fn predicates_are_combined() {
    let out = Case { outputs: 32, ..Case::default() }.out(
        "setp.lt.u32 %p1, %tid, 8;\n setp.ge.and.u32 %p2|%p3, %tid, 4, %p1;\n and.pred %p4, %p1, !%p2;\n xor.pred %p5, %p2, %p3;\n\
         mov.pred %p6, -1;\n not.pred %p7, %p6;\n or.pred %p7, %p7, %p4;\n\
         selp.b32 %r1, 1, 0, %p2;\n selp.b32 %r2, 2, 0, %p3;\n selp.b32 %r3, 4, 0, %p4;\n selp.b32 %r4, 8, 0, %p5;\n selp.b32 %r5, 16, 0, %p7;\n\
         or.b32 %r1, %r1, %r2;\n or.b32 %r1, %r1, %r3;\n or.b32 %r1, %r1, %r4;\n or.b32 %r1, %r1, %r5;\n cvt.u64.u32 %d1, %r1;\n st.global.u64 [%o], %d1;\n ret;",
    );
    // p2 = tid >= 4 and tid < 8; p3 = tid < 4 and tid < 8; p4 = p1 and not p2.
    for (lane, value) in out.iter().enumerate() {
        let right = match lane {
            0..4 => 2 + 4 + 8 + 16,
            4..8 => 1 + 8,
            _ => 0,
        };
        assert_eq!(*value, right, "lane {lane}");
    }
}

#[test]
fn functions_are_called_from_several_places() {
    let declared = ".func (.param .b32 result) twice(.param .b32 x)\n{\n .reg .b32 %r<4>; .reg .pred %p<2>;\n ld.param.u32 %r1, [x];\n\
         setp.gt.u32 %p1, %r1, 10;\n @%p1 bra BIG;\n add.s32 %r2, %r1, %r1;\n st.param.b32 [result+0], %r2;\n ret;\nBIG:\n st.param.b32 [result+0], %r1;\n ret;\n}\n";
    let call =
        "{ .param .b32 p0; st.param.b32 [p0+0], %r1; .param .b32 q0; call.uni (q0), twice, (p0); ld.param.b32 %r1, [q0+0]; }\n";
    let body = format!("mov.u32 %r1, %tid;\n {call} {call} cvt.u64.u32 %d1, %r1;\n st.global.u64 [%o], %d1;\n ret;");
    let out = Case { declared, outputs: 32, ..Case::default() }.out(&body);
    let twice = |x: u64| if x > 10 { x } else { 2 * x };
    assert!(out.iter().zip(0u64..).all(|(value, lane)| *value == twice(twice(lane))), "{out:?}");
}

#[test]
fn labels_and_registers_of_a_block_are_its_own() {
    let block = "{ .reg .pred p; .reg .b32 x; mov.u32 x, 3; setp.ne.u32 p, x, 3; @p bra SKIP; add.s32 %r1, %r1, x; SKIP: }\n";
    let out = Case { block: 1, ..Case::default() }
        .out(&format!("mov.u32 %r1, 0;\n {block} {block} cvt.u64.u32 %d1, %r1;\n st.global.u64 [%o], %d1;\n ret;"));
    assert_eq!(out[0], 6);
}

#[test]
fn threads_know_where_they_are() {
    let text = kernel(
        "",
        "mov.u32 %r1, %tid.y;\n mov.u32 %r2, %ntid.x;\n mov.u32 %r3, %tid.x;\n mad.lo.s32 %r4, %r1, %r2, %r3;\n mov.u32 %r5, %ctaid.y;\n\
         mov.u32 %r6, %nctaid.x;\n mov.u32 %r7, %ctaid.x;\n mad.lo.s32 %r8, %r5, %r6, %r7;\n mad.lo.s32 %r9, %r8, 48, %r4;\n mad.wide.u32 %o, %r9, 8, %out;\n\
         mov.u32 %r10, %laneid;\n mov.u32 %r11, %lanemask_lt;\n mov.b64 %d1, {%r10, %r11};\n st.global.u64 [%o], %d1;\n ret;",
    );
    let mut gpu = Gpu::new(Options::default());
    let out = gpu.alloc(6 * 48 * 8);
    let module = Module::parse(&text).unwrap();
    gpu.launch(&module, "k", (3, 2), (8, 6), 0, &[Arg::U64(out), Arg::U64(out), Arg::U32(0)]).unwrap();
    let bytes = gpu.read(out, 6 * 48 * 8).unwrap();
    for (i, value) in bytes.chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).enumerate() {
        let lane = i as u64 % 48 % 32;
        assert_eq!(value, lane | ((1 << lane) - 1) << 32);
    }
}
