//! Counters.

use crate::common::Case;

#[test]
fn sectors_of_global_memory() {
    for (stride, sectors) in [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)] {
        let case = Case { input: vec![0; 512], ..Case::default() };
        let counters =
            case.run(&format!("mad.wide.u32 %d1, %tid, {stride}, %in;\n ld.global.u32 %r1, [%d1];\n ret;")).unwrap().counters;
        assert_eq!((counters.global_read_sectors, counters.global_read_bytes), (sectors, 128), "stride {stride}");
        assert_eq!(counters.global_written_sectors, 0);
    }
    let written = Case { outputs: 128, ..Case::default() }
        .run("mad.wide.u32 %d1, %tid, 16, %out;\n mov.u64 %d2, 0;\n st.global.v2.u64 [%d1], {%d2, %d2};\n ret;")
        .unwrap()
        .counters;
    assert_eq!((written.global_written_sectors, written.global_written_bytes, written.global_read_bytes), (16, 512, 0));
}

#[test]
fn banks_of_shared_memory() {
    let count = |width: &str, stride: u32| {
        let body = format!(
            ".shared .align 16 .b8 tile[8192];\n mov.u32 %r1, tile;\n mad.lo.s32 %r2, %tid, {stride}, %r1;\n mov.u32 %r3, 0;\n st.shared.{width};\n ret;"
        );
        let counters = Case::default().run(&body).unwrap().counters;
        (counters.shared_phases, counters.shared_conflicts)
    };
    let (word, four) = ("u32 [%r2], %r3", "v4.u32 [%r2], {%r3,%r3,%r3,%r3}");
    // Adjacent words; every second: two words a bank; every 32nd: all in one bank; one word: no conflict.
    assert_eq!([count(word, 4), count(word, 8), count(word, 128), count(word, 0)], [(1, 0), (1, 1), (1, 31), (1, 0)]);
    // 16 bytes a lane: a quarter of the warp at a time.
    assert_eq!([count(four, 16), count(four, 128), count(four, 144)], [(4, 0), (4, 28), (4, 0)]);
}

#[test]
fn instructions_by_opcode_and_line() {
    let done = Case { block: 64, ..Case::default() }
        .run("mov.u32 %r1, 0;\nAGAIN:\n add.s32 %r1, %r1, 1;\n setp.lt.u32 %p1, %r1, 5;\n @%p1 bra AGAIN;\n ret;")
        .unwrap();
    assert_eq!(done.counters.instructions["add.s32"], 10);
    let line = done.counters.lines.iter().find(|line| line.opcode == "add.s32").unwrap();
    assert_eq!(line.executed, 10);
    assert_eq!(done.counters.total_instructions(), done.counters.lines.iter().map(|line| line.executed).sum::<u64>());
}
