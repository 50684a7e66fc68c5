//! Values that are in use at the same time are kept apart, however many registers a text has and wherever its lanes are.

use crate::common::Case;
use std::fmt::Write;

/// A value that only the first turn of a loop writes is still there in the last.
#[test]
fn a_value_of_the_first_turn() {
    let body = "mov.u32 %r0, 0;\n mov.u32 %r9, 0;\n\
        LOOP:\n setp.ne.u32 %p0, %r0, 0;\n @%p0 bra LATER;\n add.s32 %r1, %tid, 7;\n\
        LATER:\n add.s32 %r2, %r0, 3;\n add.s32 %r3, %r2, %r2;\n add.s32 %r9, %r9, %r3;\n add.s32 %r9, %r9, %r1;\n\
        mov.u32 %r4, 5;\n add.s32 %r5, %r4, %r3;\n add.s32 %r9, %r9, %r5;\n\
        add.s32 %r0, %r0, 1;\n setp.lt.u32 %p1, %r0, 4;\n @%p1 bra LOOP;\n\
        cvt.u64.u32 %d0, %r9;\n st.global.u64 [%o], %d0;\n ret;";
    // Of turn i: 2 (i + 3), tid + 7, and 5 + 2 (i + 3).
    let right = |tid: u64| (0..4).map(|i| 4 * (i + 3) + 5 + tid + 7).sum::<u64>();
    let out = Case::default().out(body);
    assert!((0..32).all(|tid| out[tid] == right(tid as u64)), "{out:?}");
}

/// Under a predicate only some lanes get a new value; the others' is kept, also where they are on another way.
#[test]
fn values_of_lanes_on_different_ways() {
    let body = "and.b32 %r0, %tid, 1;\n setp.eq.u32 %p0, %r0, 1;\n mov.u32 %r1, 10;\n @%p0 mov.u32 %r1, 20;\n\
        mul.lo.s32 %r2, %tid, 3;\n @%p0 bra ODD;\n\
        add.s32 %r3, %r2, 1;\n mul.lo.s32 %r4, %r3, 2;\n bra JOIN;\n\
        ODD:\n add.s32 %r5, %r2, 100;\n mul.lo.s32 %r6, %r5, 7;\n mov.u32 %r4, %r6;\n\
        JOIN:\n add.s32 %r7, %r4, %r1;\n cvt.u64.u32 %d0, %r7;\n st.global.u64 [%o], %d0;\n ret;";
    let right = |tid: u64| if tid % 2 == 1 { (3 * tid + 100) * 7 + 20 } else { (3 * tid + 1) * 2 + 10 };
    let out = Case::default().out(body);
    assert!((0..32).all(|tid| out[tid] == right(tid as u64)), "{out:?}");
}

/// The same where the text has the later part first: what is written there under a predicate alone was written before.
#[test]
fn a_part_that_is_executed_later_and_stands_first() {
    let body = "setp.gt.u32 %p0, %tid, 9;\n bra FIRST;\n\
        LATER:\n @%p0 mov.u32 %r1, 20;\n add.s32 %r2, %r1, 1;\n cvt.u64.u32 %d0, %r2;\n st.global.u64 [%o], %d0;\n ret;\n\
        FIRST:\n mov.u32 %r1, 10;\n mov.u32 %r3, 77;\n add.s32 %r4, %r3, 1;\n mul.lo.s32 %r5, %r4, %r4;\n bra LATER;";
    let out = Case::default().out(body);
    assert!((0..32).all(|tid| out[tid] == if tid > 9 { 21 } else { 11 }), "{out:?}");
}

/// A result that nobody reads takes the place of none that somebody does; nor does the next block know of the last.
#[test]
fn results_that_nobody_reads_and_registers_that_nobody_wrote() {
    let body = "mov.u32 %r10, %ctaid.x;\n mul.wide.u32 %d5, %r10, 256;\n add.s64 %o, %o, %d5;\n\
        add.s32 %r0, %tid, 1;\n mov.u32 %r1, 40;\n mov.b64 %d0, {%r0, %r1};\n mov.b64 {%r2, %r3}, %d0;\n\
        add.s32 %r6, %r3, %r0;\n add.s32 %r6, %r6, %r20;\n cvt.u64.u32 %d1, %r6;\n st.global.u64 [%o], %d1;\n ret;";
    let out = Case { grid: 2, ..Case::default() }.out(body);
    assert!((0..64).all(|i| out[i] == 41 + i as u64 % 32), "{out:?}");
}

/// Many values in use at once, read in the other order, beside as many that come and go.
#[test]
fn many_values_at_once() {
    let mut body = ".reg .b32 %v<200>; .reg .b32 %w<200>;\n".to_owned();
    for i in 0..200 {
        writeln!(body, "add.s32 %w{i}, %tid, {};\n mul.lo.s32 %v{i}, %w{i}, {};", i * 11, i + 1).unwrap();
    }
    body += "mov.u32 %r0, 0;\n";
    for i in (0..200).rev() {
        writeln!(body, "mad.lo.s32 %r0, %r0, 3, %v{i};").unwrap();
    }
    body += "cvt.u64.u32 %d0, %r0;\n st.global.u64 [%o], %d0;\n ret;";
    let right = |tid: u32| {
        let value = |i: u32| (tid + 11 * i).wrapping_mul(i + 1);
        (0..200).rev().fold(0u32, |sum, i| sum.wrapping_mul(3).wrapping_add(value(i)))
    };
    let out = Case { block: 64, ..Case::default() }.out(&body);
    assert!((0..64).all(|tid| out[tid as usize] == u64::from(right(tid))), "{out:?}");
}
