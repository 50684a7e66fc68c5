//! Copies that are waited for, and ones that are not; mbarriers.

use crate::common::Case;
use ptx::FaultKind;

/// Each lane copies 16 bytes; after `wait`, it reads the first word of its neighbour's.
fn copy(wait: &str, sync: &str) -> String {
    format!(
        ".shared .align 16 .b8 tile[512];\n mov.u32 %r1, tile;\n mad.lo.s32 %r2, %tid, 16, %r1;\n mad.wide.u32 %d1, %tid, 16, %in;\n\
         cp.async.cg.shared.global [%r2], [%d1], 16;\n cp.async.commit_group;\n {wait}\n {sync}\n\
         xor.b32 %r3, %tid, 1;\n mad.lo.s32 %r4, %r3, 16, %r1;\n ld.shared.u64 %d2, [%r4];\n st.global.u64 [%o], %d2;\n ret;"
    )
}

fn numbers(n: u64) -> Case<'static> {
    Case { input: (0..n).collect(), outputs: 64, ..Case::default() }
}

#[test]
fn copies_are_there_when_they_were_waited_for() {
    let out = numbers(64).out(&copy("cp.async.wait_group 0;", "bar.warp.sync -1;"));
    assert!(out.iter().take(32).zip(0u64..).all(|(value, lane)| *value == 2 * (lane ^ 1)), "{out:?}");
    assert_eq!(numbers(64).out(&copy("cp.async.wait_all;", "bar.sync 0;")), out);
}

#[test]
fn a_wait_that_is_missing() {
    let twin = copy("cp.async.wait_group 0;", "bar.warp.sync -1;");
    numbers(64).planted(FaultKind::InFlight, &copy("", "bar.sync 0;"), &twin);
    numbers(64).planted(FaultKind::InFlight, &copy("cp.async.wait_group 1;", "bar.sync 0;"), &twin);
    // One's own copies are there; the neighbour's need not be.
    numbers(64).planted(FaultKind::Race, &copy("cp.async.wait_group 0;", ""), &twin);
}

#[test]
fn the_newest_groups_may_be_left() {
    let body = |keep: u32| {
        format!(
            ".shared .align 16 .b8 tile[64];\n cp.async.ca.shared.global [tile], [%in], 8;\n cp.async.commit_group;\n\
             cp.async.ca.shared.global [tile+8], [%in+8], 8;\n cp.async.commit_group;\n cp.async.wait_group {keep};\n\
             ld.shared.u64 %d1, [tile];\n st.global.u64 [%o], %d1;\n ret;"
        )
    };
    Case { block: 1, ..numbers(4) }.planted(FaultKind::InFlight, &body(2), &body(1));
}

#[test]
fn what_is_not_read_is_zero() {
    let body = "mov.u32 %r1, 4;\n .shared .align 16 .b8 tile[64];\n cp.async.cg.shared.global [tile], [%in], 16, %r1;\n mov.u64 %d3, 0;\n mov.u32 %r2, 0;\n\
                cp.async.ca.shared.global [tile+16], [%d3], 8, %r2;\n cp.async.wait_all;\n ld.shared.v2.u64 {%d1, %d2}, [tile];\n\
                ld.shared.u64 %d4, [tile+16];\n or.b64 %d2, %d2, %d4;\n st.global.v2.u64 [%out], {%d1, %d2};\n ret;";
    let out = Case { input: vec![0xFFFF_FFFF_1234_5678, u64::MAX], block: 1, ..Case::default() }.out(body);
    assert_eq!(out[..2], [0x1234_5678, 0]);
}

/// Two warps use the buffer in turn: warp 0 fills it a second time when warp 1 has read it.
fn reuse(before: &str) -> String {
    format!(
        ".shared .align 16 .b8 tile[512];\n mov.u32 %r1, tile;\n and.b32 %r9, %tid, 31;\n mad.lo.s32 %r2, %r9, 16, %r1;\n mad.wide.u32 %d1, %r9, 16, %in;\n\
         setp.gt.u32 %p1, %tid, 31;\n @%p1 bra A;\n cp.async.cg.shared.global [%r2], [%d1], 16;\n cp.async.wait_all;\nA:\n bar.sync 0;\n\
         @!%p1 bra B;\n ld.shared.u32 %r3, [%r2];\nB:\n {before}\n @%p1 bra C;\n cp.async.cg.shared.global [%r2], [%d1], 16;\n cp.async.wait_all;\nC:\n ret;"
    )
}

#[test]
fn a_buffer_that_is_filled_while_others_read_it() {
    let case = Case { block: 64, ..numbers(64) };
    for seed in 0..8 {
        // Found as a race, or as a copy in flight, as the order has it.
        let fault = Case { seed, input: case.input.clone(), ..case }.run(&reuse("")).err().unwrap();
        assert!(matches!(fault.kind, FaultKind::Race | FaultKind::InFlight), "{fault}");
        Case { seed, input: case.input.clone(), ..case }.out(&reuse("bar.sync 0;"));
    }
}

/// Lane 0 of warp 0 orders a bulk copy of 256 bytes; all 64 threads wait for it. `expect`: the bytes that are announced.
fn bulk(init: &str, expect: u32, wait: &str, sync: &str) -> String {
    format!(
        ".shared .align 16 .b8 tile[256];\n .shared .align 8 .b64 bar;\n mov.u32 %r1, tile;\n mov.u32 %r2, bar;\n setp.ne.u32 %p1, %tid, 0;\n @%p1 bra A;\n\
         {init}\nA:\n {sync}\n @%p1 bra B;\n mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {expect};\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%in], 256, [%r2];\nB:\n {wait}\n\
         mad.lo.s32 %r3, %tid, 4, %r1;\n ld.shared.u32 %r4, [%r3];\n cvt.u64.u32 %d1, %r4;\n st.global.u64 [%o], %d1;\n ret;"
    )
}

const INIT: &str = "mbarrier.init.shared::cta.b64 [%r2], 1;\n fence.mbarrier_init.release.cluster;";
const WAIT: &str = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;\n @!%p2 bra W;";
const SYNC: &str = "bar.sync 0;";

fn bytes() -> Case<'static> {
    Case { input: (0..32).collect(), block: 64, outputs: 64, ..Case::default() }
}

#[test]
fn bulk_copies_arrive_at_an_mbarrier() {
    let out = bytes().out(&bulk(INIT, 256, WAIT, SYNC));
    assert!(out.iter().zip(0u64..).all(|(value, i)| *value == if i % 2 == 0 { i / 2 } else { 0 }), "{out:?}");
}

#[test]
fn mbarriers_that_are_used_wrongly() {
    let twin = bulk(INIT, 256, WAIT, SYNC);
    bytes().planted(FaultKind::Barrier, &bulk("", 256, WAIT, SYNC), &twin);
    bytes().planted(FaultKind::Deadlock, &bulk(INIT, 272, WAIT, SYNC), &twin);
    bytes().planted(FaultKind::Deadlock, &bulk(&INIT.replace("], 1", "], 2"), 256, WAIT, SYNC), &twin);
    bytes().planted(FaultKind::InFlight, &bulk(INIT, 256, SYNC, SYNC), &twin);
    let twice = format!("{INIT}\n{INIT}");
    bytes().planted(FaultKind::Barrier, &bulk(&twice, 256, WAIT, SYNC), &twin);
    let odd = twin.replace("[%r1], [%in], 256", "[%r1], [%in], 250");
    bytes().planted(FaultKind::Misaligned, &odd, &twin);
    let touched = bulk(INIT, 256, &format!("{WAIT}\n ld.shared.u32 %r7, [%r2];"), SYNC);
    bytes().planted(FaultKind::Barrier, &touched, &twin);
    let fences = INIT.replace("fence.mbarrier_init.release.cluster", "fence.proxy.async.shared::cta");
    bytes().out(&bulk(&fences, 256, WAIT, SYNC));
    let unfenced = INIT.replace("fence.mbarrier_init.release.cluster;", "");
    bytes().planted(FaultKind::Unfenced, &bulk(&unfenced, 256, WAIT, SYNC), &twin);
}

/// What threads wrote is overwritten by a copy: it must know of that.
#[test]
fn bulk_copies_over_what_was_written() {
    let write = |fence: &str| {
        let written = format!("{INIT}\nA:\n mad.lo.s32 %r3, %tid, 4, %r1;\n st.shared.u32 [%r3], 1;\n {fence}");
        bulk(INIT, 256, WAIT, SYNC).replace(&format!("{INIT}\nA:\n"), &written)
    };
    bytes().planted(FaultKind::Unfenced, &write(""), &write("fence.proxy.async.shared::cta;"));
}

/// Whoever did not wait at the barrier does not know that there is an mbarrier.
#[test]
fn an_mbarrier_whose_initialisation_nobody_told_of() {
    let case = Case { block: 64, ..Case::default() };
    let body = |sync: &str| {
        format!(
            ".shared .align 8 .b64 bar;\n mov.u32 %r2, bar;\n setp.ne.u32 %p1, %tid, 0;\n @!%p1 mbarrier.init.shared.b64 [%r2], 64;\n {sync}\n\
             mbarrier.arrive.shared.b64 %d1, [%r2];\nW: mbarrier.test_wait.shared.b64 %p2, [%r2], %d1;\n @!%p2 bra W;\n ret;"
        )
    };
    case.out(&body(SYNC));
    for seed in 0..8 {
        let fault = Case { seed, input: vec![0], ..case }.run(&body("")).err().unwrap();
        assert!(matches!(fault.kind, FaultKind::Race | FaultKind::Barrier), "{fault}");
    }
}

#[test]
fn mbarriers_order_what_they_should() {
    // Warp 0 writes and arrives; warp 1 waits and reads.
    let body = |wait: &str| {
        format!(
            ".shared .align 8 .b64 bar;\n .shared .align 4 .b8 tile[128];\n mov.u32 %r2, bar;\n mov.u32 %r3, tile;\n and.b32 %r4, %tid, 31;\n mad.lo.s32 %r3, %r4, 4, %r3;\n\
             setp.eq.u32 %p1, %tid, 0;\n @%p1 mbarrier.init.shared.b64 [%r2], 32;\n st.shared.u32 [%r3], 0;\n bar.sync 0;\n\
             setp.gt.u32 %p2, %tid, 31;\n @%p2 bra READ;\n st.shared.u32 [%r3], 5;\n mbarrier.arrive.shared.b64 _, [%r2];\n ret;\n\
             READ:\n {wait}\n ld.shared.u32 %r5, [%r3];\n cvt.u64.u32 %d1, %r5;\n st.global.u64 [%o], %d1;\n ret;"
        )
    };
    // The zeros are written by both warps: one value, but twice.
    let wait = WAIT.replace("%p2", "%p3");
    let fix = |body: String| {
        body.replace(
            "st.shared.u32 [%r3], 0;\n bar.sync 0;",
            "setp.lt.u32 %p4, %tid, 32;\n @%p4 st.shared.u32 [%r3], 0;\n bar.sync 0;",
        )
    };
    Case { block: 64, ..Case::default() }.planted(FaultKind::Race, &fix(body("")), &fix(body(&wait)));
}

#[test]
fn copies_arrive_for_their_lane() {
    let out = numbers(64).out(
        ".shared .align 16 .b8 tile[512];\n .shared .align 8 .b64 bar;\n mov.u32 %r1, tile;\n mov.u32 %r2, bar;\n setp.eq.u32 %p1, %tid, 0;\n\
         @%p1 mbarrier.init.shared.b64 [%r2], 32;\n bar.sync 0;\n mad.lo.s32 %r3, %tid, 16, %r1;\n mad.wide.u32 %d1, %tid, 16, %in;\n\
         cp.async.cg.shared.global [%r3], [%d1], 16;\n cp.async.mbarrier.arrive.noinc.shared.b64 [%r2];\n\
         W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;\n @!%p2 bra W;\n\
         xor.b32 %r4, %tid, 3;\n mad.lo.s32 %r4, %r4, 16, %r1;\n ld.shared.u64 %d2, [%r4];\n st.global.u64 [%o], %d2;\n ret;",
    );
    assert!(out.iter().take(32).zip(0u64..).all(|(value, lane)| *value == 2 * (lane ^ 3)), "{out:?}");
}

#[test]
fn bulk_copies_to_global_memory() {
    let fence = "fence.proxy.async;";
    let body = |fence: &str, wait: &str| {
        format!(
            ".shared .align 16 .b8 tile[32];\n mov.u32 %r1, tile;\n st.shared.u64 [tile], 7;\n st.shared.u64 [tile+8], 8;\n {fence}\n\
             cp.async.bulk.global.shared::cta.bulk_group [%out], [%r1], 16;\n cp.async.bulk.commit_group;\n {wait}\n st.shared.u64 [tile], 9;\n ret;"
        )
    };
    let case = Case { block: 1, ..Case::default() };
    assert_eq!(case.out(&body(fence, "cp.async.bulk.wait_group 0;"))[..2], [7, 8]);
    // The copy is done as late as it may be: it takes what was written after it.
    assert_eq!(case.out(&body(fence, ""))[..2], [9, 8]);
    case.planted(FaultKind::Unfenced, &body("", "cp.async.bulk.wait_group 0;"), &body(fence, "cp.async.bulk.wait_group 0;"));
}
