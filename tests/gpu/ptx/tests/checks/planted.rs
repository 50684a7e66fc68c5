//! Bugs in shared memory and barriers, each with its twin.

use crate::common::Case;
use ptx::FaultKind;

/// Threads write their words and read those of the next warp.
fn exchange(between: &str, after: &str) -> String {
    format!(
        ".shared .align 16 .b8 tile[1024];\n mov.u32 %r1, tile;\n mad.lo.s32 %r2, %tid, 4, %r1;\n xor.b32 %r3, %tid, 32;\n mad.lo.s32 %r4, %r3, 4, %r1;\n\
         mov.u32 %r9, 0;\nAGAIN:\n st.shared.u32 [%r2], %tid;\n {between}\n ld.shared.u32 %r5, [%r4];\n {after}\n add.s32 %r9, %r9, 1;\n setp.lt.u32 %p1, %r9, 2;\n @%p1 bra AGAIN;\n\
         cvt.u64.u32 %d1, %r5;\n st.global.u64 [%o], %d1;\n ret;"
    )
}

fn block(n: u32) -> Case<'static> {
    Case { block: n, outputs: n as usize, ..Case::default() }
}

#[test]
fn a_barrier_that_is_missing() {
    let twin = exchange("bar.sync 0;", "bar.sync 0;");
    block(64).planted(FaultKind::Race, &exchange("bar.sync 0;", ""), &twin);
    block(64).planted(FaultKind::Uninitialised, &exchange("bar.warp.sync -1;", "bar.sync 0;"), &twin);
}

/// The word is there from before: it is read too early.
#[test]
fn a_read_that_nothing_orders_after_the_write() {
    let body = |between: &str| {
        format!(
            ".shared .align 16 .b8 tile[1024];\n mov.u32 %r1, tile;\n mad.lo.s32 %r2, %tid, 4, %r1;\n xor.b32 %r3, %tid, 32;\n mad.lo.s32 %r4, %r3, 4, %r1;\n\
             st.shared.u32 [%r2], 0;\n bar.sync 0;\n st.shared.u32 [%r2], %tid;\n {between}\n ld.shared.u32 %r5, [%r4];\n ret;"
        )
    };
    block(64).planted(FaultKind::Race, &body(""), &body("bar.sync 0;"));
}

#[test]
fn two_warps_write_one_word() {
    let body = |address: &str| {
        format!(
            ".shared .align 16 .b8 tile[1024];\n mov.u32 %r1, tile;\n mad.lo.s32 %r2, {address}, 4, %r1;\n st.shared.u32 [%r2], %tid;\n ret;"
        )
    };
    let bug = format!("and.b32 %r9, %tid, 31;\n {}", body("%r9"));
    block(64).planted(FaultKind::Race, &bug, &body("%tid"));
}

#[test]
fn lanes_that_exchange_without_syncwarp() {
    let body = |between: &str| {
        format!(
            ".shared .align 16 .b8 tile[128];\n mov.u32 %r1, tile;\n mad.lo.s32 %r2, %tid, 4, %r1;\n xor.b32 %r3, %tid, 1;\n mad.lo.s32 %r4, %r3, 4, %r1;\n\
             st.shared.u32 [%r2], %tid;\n {between}\n ld.shared.u32 %r5, [%r4];\n ret;"
        )
    };
    block(32).planted(FaultKind::Race, &body(""), &body("bar.warp.sync -1;"));
    let reuse = |between: &str| {
        format!("{}\n", body("bar.warp.sync -1;").replace("ret;", &format!("{between}\n st.shared.u32 [%r2], 77;\n ret;")))
    };
    block(32).planted(FaultKind::Race, &reuse(""), &reuse("bar.warp.sync -1;"));
}

#[test]
fn shared_memory_beyond_its_end() {
    let body = |bytes: u32| {
        format!(
            ".shared .align 16 .b8 tile[{bytes}];\n mov.u32 %r1, tile;\n mad.lo.s32 %r2, %tid, 4, %r1;\n st.shared.u32 [%r2], %tid;\n ret;"
        )
    };
    block(32).planted(FaultKind::Bounds, &body(124), &body(128));
}

#[test]
fn addresses_that_are_not_aligned() {
    let shared = |offset: u32| {
        format!(
            ".shared .align 16 .b8 tile[64];\n mov.u32 %r1, 0;\n st.shared.v4.u32 [tile+{offset}], {{%r1,%r1,%r1,%r1}};\n ret;"
        )
    };
    block(1).planted(FaultKind::Misaligned, &shared(8), &shared(16));
    let global = |offset: u32| format!("ld.global.v2.u64 {{%d1,%d2}}, [%in+{offset}];\n ret;");
    block(32).planted(FaultKind::Misaligned, &global(8), &global(16));
}

#[test]
fn a_barrier_that_some_lanes_pass_by() {
    let body = |n: u32| format!("setp.lt.u32 %p1, %tid, {n};\n @!%p1 bra PAST;\n bar.sync 0;\nPAST:\n ret;");
    block(64).planted(FaultKind::Divergence, &body(40), &body(64));
}

#[test]
fn a_collective_without_some_of_its_members() {
    let body = |n: u32| {
        format!(
            "setp.lt.u32 %p1, %tid, {n};\n @!%p1 bra PAST;\n vote.sync.ballot.b32 %r1, %p1, -1;\nPAST:\n mov.u32 %r2, 0;\n ret;"
        )
    };
    block(32).planted(FaultKind::Divergence, &body(16), &body(32));
    let shuffle = |from: u32| {
        format!(
            "setp.lt.u32 %p1, %tid, 16;\n @!%p1 bra PAST;\n shfl.sync.idx.b32 %r1, %tid, {from}, 31, 0xFFFF;\nPAST:\n mov.u32 %r2, 0;\n ret;"
        )
    };
    block(32).planted(FaultKind::InactiveLane, &shuffle(20), &shuffle(12));
    let matrix = |n: u32| {
        format!("mov.u32 %r1, 0;\n setp.lt.u32 %p1, %tid, {n};\n @%p1 movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;\n ret;")
    };
    block(32).planted(FaultKind::Divergence, &matrix(31), &matrix(32));
}

#[test]
fn a_barrier_that_waits_for_more_warps_than_come() {
    let body = |n: u32| format!("bar.sync 1, {n};\n ret;");
    block(64).planted(FaultKind::Deadlock, &body(96), &body(64));
}

#[test]
fn a_loop_without_end() {
    let body = |step: u32| {
        format!("mov.u32 %r1, 0;\nAGAIN:\n add.s32 %r1, %r1, {step};\n setp.lt.u32 %p1, %r1, 100;\n @%p1 bra AGAIN;\n ret;")
    };
    block(1).planted(FaultKind::Endless, &body(0), &body(1));
}

#[test]
fn a_trap() {
    let body = |n: u32| format!("setp.ge.u32 %p1, %tid, {n};\n @%p1 trap;\n ret;");
    block(32).planted(FaultKind::Trap, &body(31), &body(32));
}
