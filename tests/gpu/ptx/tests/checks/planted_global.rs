//! Bugs in global memory, each with its twin.

use crate::common::Case;
use ptx::{Arg, FaultKind, Gpu, Module, Options};

fn blocks(grid: u32, block: u32) -> Case<'static> {
    Case { grid, block, outputs: 256, ..Case::default() }
}

#[test]
fn an_entry_of_a_table_that_points_nowhere() {
    let body =
        |scale: u64| format!("ld.global.u64 %d1, [%in];\n mad.lo.s64 %d2, %d1, {scale}, %in;\n ld.global.u32 %r1, [%d2];\n ret;");
    let case = Case { input: vec![u64::MAX, 0], block: 32, ..Case::default() };
    case.planted(FaultKind::Bounds, &body(4096), &body(0));
    let end = |offset: u32| format!("ld.global.u32 %r1, [%in+{offset}];\n ret;");
    case.planted(FaultKind::Bounds, &end(16), &end(12));
}

#[test]
fn memory_that_was_given_back() {
    let module = Module::parse(&crate::common::kernel("", "ld.global.u32 %r1, [%in];\n ret;")).unwrap();
    let mut gpu = Gpu::new(Options::default());
    let p = gpu.alloc(8);
    let args = [Arg::U64(p), Arg::U64(p), Arg::U32(0)];
    gpu.launch(&module, "k", 1, 1, 0, &args).unwrap();
    assert!(gpu.free(p) && !gpu.free(p));
    assert_eq!(gpu.launch(&module, "k", 1, 1, 0, &args).unwrap_err().kind, FaultKind::Bounds);
}

#[test]
fn blocks_that_write_the_same_word() {
    let body = |index: &str| {
        format!(
            "mov.u32 %r1, {index};\n mad.wide.u32 %d1, %r1, 8, %out;\n mov.u32 %r2, %ctaid.x;\n st.global.u32 [%d1], %r2;\n ret;"
        )
    };
    blocks(4, 1).planted(FaultKind::Race, &body("%tid.x"), &body("%ctaid.x"));
}

/// Each block adds to its word of the input, in place, having read its neighbour's too.
#[test]
fn a_block_that_reads_what_another_writes() {
    let body = |neighbour: u32| {
        format!(
            "mov.u32 %r1, %ctaid.x;\n xor.b32 %r2, %r1, {neighbour};\n mad.wide.u32 %d1, %r1, 8, %in;\n mad.wide.u32 %d2, %r2, 8, %in;\n\
             ld.global.u32 %r3, [%d2];\n add.s32 %r3, %r3, 1;\n st.global.u32 [%d1], %r3;\n ret;"
        )
    };
    blocks(4, 1).planted(FaultKind::Race, &body(1), &body(0));
}

#[test]
fn warps_of_a_block_that_nothing_orders() {
    let body = |between: &str| {
        format!(
            "st.global.u32 [%o], %tid;\n {between}\n xor.b32 %r1, %tid, 32;\n mad.wide.u32 %d1, %r1, 8, %out;\n ld.global.u32 %r2, [%d1];\n ret;"
        )
    };
    blocks(1, 64).planted(FaultKind::Race, &body(""), &body("bar.sync 0;"));
}

/// The last block to come adds up what all have written: `ticket` is the atomic that tells which is last.
fn last_block(before: &str, after: &str) -> String {
    format!(
        ".shared .align 4 .b8 flag[4];\n mov.u32 %r1, %ctaid.x;\n mad.lo.s32 %r2, %r1, 32, %tid;\n mad.wide.u32 %d1, %r2, 8, %out;\n st.global.u32 [%d1], %r2;\n\
         {before}\n bar.sync 0;\n setp.ne.u32 %p1, %tid, 0;\n @%p1 bra WAIT;\n atom.global.add.u32 %r3, [%in], 1;\n {after}\n st.shared.u32 [flag], %r3;\nWAIT:\n bar.sync 0;\n\
         ld.shared.u32 %r4, [flag];\n setp.ne.u32 %p2, %r4, 3;\n @%p2 ret;\n mov.u32 %r5, 0;\n mov.u32 %r6, 0;\nSUM:\n mad.lo.s32 %r7, %r5, 32, %tid;\n mad.wide.u32 %d2, %r7, 8, %out;\n\
         ld.global.u32 %r8, [%d2];\n add.s32 %r6, %r6, %r8;\n add.s32 %r5, %r5, 1;\n setp.lt.u32 %p3, %r5, 4;\n @%p3 bra SUM;\n ret;"
    )
}

#[test]
fn the_last_block_needs_fences() {
    let case = Case { input: vec![0], grid: 4, block: 32, outputs: 128, ..Case::default() };
    let twin = last_block("membar.gl;", "fence.acq_rel.gpu;");
    case.planted(FaultKind::Race, &last_block("", "membar.gl;"), &twin);
    case.planted(FaultKind::Race, &last_block("membar.gl;", ""), &twin);
}

#[test]
fn constant_memory_is_not_written() {
    let case = Case { declared: ".const .align 4 .u32 table[2] = {1, 2};", block: 1, ..Case::default() };
    let body = |target: &str| format!("mov.u64 %d1, table;\n st.global.u32 [{target}], 1;\n ret;");
    case.planted(FaultKind::Bounds, &body("%d1"), &body("%out"));
}

#[test]
fn the_read_only_cache_is_for_what_nobody_writes() {
    let body = |how: &str| format!("st.global.u32 [%o], 1;\n ld.global{how}.u32 %r1, [%o];\n ret;");
    blocks(1, 32).planted(FaultKind::Race, &body(".nc"), &body(""));
}
