//! Shuffles, votes, matches, reductions; barriers with counts.

use crate::common::Case;

/// Each lane's own number is shuffled; the result and whether it was in range.
fn shuffled(mode: &str, b: &str, c: u32) -> Vec<(u64, bool)> {
    let body = format!(
        "shfl.sync.{mode}.b32 %r1|%p1, %tid, {b}, {c}, -1;\n selp.b32 %r2, 1, 0, %p1;\n mov.b64 %d1, {{%r1, %r2}};\n st.global.u64 [%o], %d1;\n ret;"
    );
    let out = Case { outputs: 32, ..Case::default() }.out(&body);
    out.into_iter().map(|x| (x & 0xFFFF_FFFF, x >> 32 == 1)).collect()
}

#[test]
fn shuffles() {
    for (lane, got) in (0u64..).zip(shuffled("bfly", "5", 0x1F)) {
        assert_eq!(got, (lane ^ 5, true));
    }
    for (lane, got) in (0u64..).zip(shuffled("up", "3", 0)) {
        assert_eq!(got, if lane < 3 { (lane, false) } else { (lane - 3, true) });
    }
    for (lane, got) in (0u64..).zip(shuffled("down", "3", 0x1F)) {
        assert_eq!(got, if lane > 28 { (lane, false) } else { (lane + 3, true) });
    }
    assert!(shuffled("idx", "7", 0x1F).iter().all(|got| *got == (7, true)));
    // In segments of eight lanes: the mask of segments is 0x18, its last lane 0x1F or, upwards, 0.
    for (lane, got) in (0u64..).zip(shuffled("idx", "3", 0x181F)) {
        assert_eq!(got, (lane / 8 * 8 + 3, true));
    }
    for (lane, got) in (0u64..).zip(shuffled("down", "6", 0x181F)) {
        assert_eq!(got, if lane % 8 > 1 { (lane, false) } else { (lane + 6, true) });
    }
    for (lane, got) in (0u64..).zip(shuffled("up", "6", 0x1800)) {
        assert_eq!(got, if lane % 8 < 6 { (lane, false) } else { (lane - 6, true) });
    }
}

#[test]
fn votes_and_reductions() {
    let out = Case { outputs: 32, ..Case::default() }.out(
        "setp.lt.u32 %p1, %tid, 5;\n vote.sync.ballot.b32 %r1, %p1, -1;\n vote.sync.any.pred %p2, %p1, -1;\n vote.sync.all.pred %p3, %p1, -1;\n\
         vote.sync.uni.pred %p4, %p1, -1;\n selp.b32 %r2, 1, 0, %p2;\n selp.b32 %r3, 2, 0, %p3;\n selp.b32 %r4, 4, 0, %p4;\n or.b32 %r2, %r2, %r3;\n or.b32 %r2, %r2, %r4;\n\
         mov.b64 %d1, {%r1, %r2};\n st.global.u64 [%o], %d1;\n ret;",
    );
    assert!(out.iter().all(|x| *x == 0x1_0000_001F), "{out:x?}");
    for (op, right) in [("add.u32", 496), ("max.s32", 31), ("min.u32", 0), ("or.b32", 31), ("and.b32", 0), ("xor.b32", 0)] {
        let out = Case { outputs: 32, ..Case::default() }
            .out(&format!("redux.sync.{op} %r1, %tid, -1;\n cvt.u64.u32 %d1, %r1;\n st.global.u64 [%o], %d1;\n ret;"));
        assert!(out.iter().all(|x| *x == right), "{op}: {out:?}");
    }
}

#[test]
fn matches_and_elections() {
    let out = Case { outputs: 32, ..Case::default() }.out(
        "and.b32 %r1, %tid, 1;\n match.any.sync.b32 %r2, %r1, -1;\n match.all.sync.b32 %r3|%p1, %r1, -1;\n mov.b64 %d1, {%r2, %r3};\n st.global.u64 [%o], %d1;\n ret;",
    );
    for (lane, value) in out.iter().enumerate() {
        assert_eq!(*value, if lane % 2 == 0 { 0x5555_5555 } else { 0xAAAA_AAAA });
    }
    let out = Case { outputs: 32, ..Case::default() }
        .out("elect.sync %r1|%p1, -1;\n selp.b64 %d1, 1, 0, %p1;\n st.global.u64 [%o], %d1;\n ret;");
    assert_eq!(out.iter().sum::<u64>(), 1);
    assert_eq!(out[0], 1);
}

/// Warps 0 and 1 meet at barrier 1, where warp 0 does not wait; all four at barrier 0.
#[test]
fn barriers_of_some_warps() {
    let out = Case { block: 128, outputs: 128, ..Case::default() }.out(
        ".shared .align 4 .b8 tile[512];\n shr.u32 %r1, %tid, 5;\n shl.b32 %r2, %tid, 2;\n mov.u32 %r3, tile;\n add.s32 %r2, %r2, %r3;\n\
         setp.eq.u32 %p1, %r1, 0;\n setp.eq.u32 %p2, %r1, 1;\n @!%p1 bra NEXT;\n st.shared.u32 [%r2], %tid;\n bar.arrive 1, 64;\nNEXT:\n\
         @!%p2 bra LAST;\n bar.sync 1, 64;\n ld.shared.u32 %r4, [%r2+-128];\n st.shared.u32 [%r2], %r4;\nLAST:\n bar.sync 0;\n\
         and.b32 %r5, %tid, 63;\n shl.b32 %r5, %r5, 2;\n add.s32 %r5, %r5, %r3;\n ld.shared.u32 %r6, [%r5];\n cvt.u64.u32 %d1, %r6;\n st.global.u64 [%o], %d1;\n ret;",
    );
    assert!(out.iter().zip(0u64..).all(|(value, i)| *value == i % 32), "{out:?}");
}

#[test]
fn barriers_that_count() {
    let out = Case { block: 64, outputs: 64, ..Case::default() }.out(
        "setp.lt.u32 %p1, %tid, 40;\n barrier.sync.aligned 0;\n bar.red.popc.u32 %r1, 0, %p1;\n bar.red.and.pred %p2, 0, %p1;\n bar.red.or.pred %p3, 0, %p1;\n\
         selp.b32 %r2, 1, 0, %p2;\n selp.b32 %r3, 2, 0, %p3;\n or.b32 %r2, %r2, %r3;\n mov.b64 %d1, {%r1, %r2};\n st.global.u64 [%o], %d1;\n ret;",
    );
    assert!(out.iter().all(|x| *x == 0x2_0000_0028), "{out:x?}");
}
