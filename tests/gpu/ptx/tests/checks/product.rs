//! Products of warpgroups against sums done here, and what can be wrong around them.

use crate::common::{Case, kernel};
use ptx::{FaultKind, Module};

/// Bytes of shared memory: of A, whose 16 columns are the second 32 bytes of its rows of 128, and of B behind it.
const A_BYTES: usize = 64 * 128;
const BYTES: usize = A_BYTES + 9 * 1024;

fn a(row: usize, k: usize) -> i32 {
    (row * 7 + k * 3) as i32 % 5 - 2
}

fn b(k: usize, column: usize) -> i32 {
    (k * 5 + column * 3) as i32 % 7 - 3
}

fn bf16(x: i32) -> u16 {
    ((x as f32).to_bits() >> 16) as u16
}

/// Where 128-byte swizzle has an element of rows of 64: the ISA's table, eight rows of eight pieces of 16 bytes, the pieces of row r
/// exchanged by r.
fn place(row: usize, column: usize) -> usize {
    row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2
}

/// Shared memory with both, then each thread's registers of A.
fn input(n: usize, by_columns: bool) -> Vec<u64> {
    let mut bytes = vec![0u8; BYTES];
    let mut put = |at: usize, x: i32| bytes[at..at + 2].copy_from_slice(&bf16(x).to_le_bytes());
    for k in 0..16 {
        for row in 0..64 {
            put(place(row, 16 + k), a(row, k));
        }
        for column in 0..n {
            // By columns: 64 of them in a panel, whose rows are k.
            let at = if by_columns { column / 64 * 2048 + place(k, column % 64) } else { place(column, k) };
            put(A_BYTES + at, b(k, column));
        }
    }
    for thread in 0..128 {
        let (g, t) = (thread % 32 / 4, thread % 4);
        for i in 0..4 {
            let (row, k) = (thread / 32 * 16 + g + 8 * (i % 2), 2 * t + i / 2 * 8);
            bytes.extend([a(row, k), a(row, k + 1)].map(bf16).into_iter().flat_map(u16::to_le_bytes));
        }
    }
    bytes.chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
}

/// A kernel of 128 threads. What stands at its places may be changed.
struct Text {
    n: usize,
    in_registers: bool,
    by_columns: bool,
    adds: &'static str,
    /// What comes after shared memory was filled; before the product; after it; to wait.
    filled: &'static str,
    fence: &'static str,
    after: &'static str,
    wait: &'static str,
    /// Bytes that B begins later.
    shift: u64,
}

const TEXT: Text = Text {
    n: 72,
    in_registers: false,
    by_columns: false,
    adds: "1",
    filled: "fence.proxy.async.shared::cta;",
    fence: "wgmma.fence.sync.aligned;",
    after: "wgmma.commit_group.sync.aligned;",
    wait: "wgmma.wait_group.sync.aligned 0;",
    shift: 0,
};

impl Text {
    fn body(&self) -> String {
        let Self { n, in_registers, by_columns, adds, filled, fence, after, wait, shift } = *self;
        let n_sums = n / 2;
        let sums = (0..n_sums).map(|i| format!("%f{i}")).collect::<Vec<_>>().join(",");
        let lines = |line: &dyn Fn(usize) -> String| (0..n_sums).map(line).collect::<Vec<_>>().join("\n");
        let ones = lines(&|i| format!("mov.f32 %f{i}, 0f3F800000;"));
        let stores = lines(&|i| format!("st.global.f32 [%o+{}], %f{i};", 4 * i));
        // Swizzle of 128 bytes, 1024 from eight rows to the next, 2048 from panel to panel.
        let form = 1u64 << 62 | (1024 / 16) << 32 | (2048 / 16) << 16;
        let (a_form, b_form) = (form + 32 / 16, form + (A_BYTES as u64 + shift) / 16);
        let a = if in_registers { "{%r10,%r11,%r12,%r13}" } else { "%d4" };
        let flags = format!("{adds}, 1, 1{}, {}", if in_registers { "" } else { ", 0" }, u8::from(by_columns));
        let product = format!("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{sums}}}, {a}, %d5, {flags};\n");
        format!(
            ".shared .align 1024 .b8 tile[{BYTES}];\n mov.u32 %r1, tile;\n mov.u32 %r2, 0;\n mad.lo.s32 %r3, %tid, 8, %r1;\n mov.u64 %d1, %i;\nFILL:\n\
             ld.global.u64 %d2, [%d1];\n st.shared.u64 [%r3], %d2;\n add.s64 %d1, %d1, 1024;\n add.s32 %r3, %r3, 1024;\n add.s32 %r2, %r2, 1;\n\
             setp.lt.u32 %p1, %r2, {rounds};\n @%p1 bra FILL;\n {filled}\n bar.sync 0;\n mad.wide.u32 %d1, %tid, 16, %in;\n\
             ld.global.v4.u32 {{%r10,%r11,%r12,%r13}}, [%d1+{BYTES}];\n shr.u32 %r4, %r1, 4;\n cvt.u64.u32 %d3, %r4;\n add.s64 %d4, %d3, {a_form};\n\
             add.s64 %d5, %d3, {b_form};\n setp.eq.u32 %p2, %tid, 999;\n setp.eq.u32 %p3, %tid, 0;\n setp.gt.u32 %p4, %tid, 95;\n mov.u64 %d6, 0x4040404040404040;\n\
             {ones}\n {fence}\n {product}{product}{after}\n {wait}\n mad.wide.u32 %o, %tid, 144, %out;\n{stores}\nPAST:\n ret;",
            rounds = BYTES / 1024
        )
    }

    fn case(&self) -> Case<'static> {
        Case { input: input(self.n, self.by_columns), outputs: 128 * 18, block: 128, ..Case::default() }
    }
}

/// Two products, added to ones or to nothing. Thread 32w+4g+t has of columns 8j.. the rows 16w+g, then 16w+g+8, columns 8j+2t, +1.
#[test]
fn products_of_warpgroups() {
    for (n, in_registers, by_columns) in
        [(72, false, false), (72, false, true), (72, true, false), (72, true, true), (8, false, false), (16, true, true)]
    {
        for (adds, first, times) in [("1", 1, 2), ("0", 0, 1), ("%p2", 0, 1), ("!%p2", 1, 2)] {
            let text = Text { n, in_registers, by_columns, adds, ..TEXT };
            let done =
                text.case().run(&text.body()).unwrap_or_else(|fault| panic!("{n} {in_registers} {by_columns} {adds}: {fault}"));
            assert_eq!(done.counters.tensor_flops, 2 * 2 * 64 * 16 * n as u64);
            for (row, column) in (0..64).flat_map(|row| (0..n).map(move |column| (row, column))) {
                let thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
                let i = thread * 36 + column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
                let got = f32::from_bits((done.out[i / 2] >> (32 * (i % 2))) as u32);
                let right = first + times * (0..16).map(|k| a(row, k) * b(k, column)).sum::<i32>();
                assert!(
                    (got - right as f32).abs() < 0.5,
                    "{n} {in_registers} {by_columns} {adds}: ({row}, {column}) is {got}, not {right}"
                );
            }
        }
    }
}

fn planted(kind: FaultKind, bug: &Text) {
    let twin = Text { n: bug.n, in_registers: bug.in_registers, by_columns: bug.by_columns, ..TEXT };
    bug.case().planted(kind, &bug.body(), &twin.body());
}

#[test]
fn registers_that_are_not_fenced() {
    planted(FaultKind::Unfenced, &Text { fence: "", ..TEXT });
    planted(FaultKind::Unfenced, &Text { fence: "wgmma.fence.sync.aligned;\n mov.f32 %f3, 0f40000000;", ..TEXT });
    planted(FaultKind::Unfenced, &Text { in_registers: true, fence: "wgmma.fence.sync.aligned;\n mov.b32 %r12, 0;", ..TEXT });
    // On one of two ways.
    planted(FaultKind::Unfenced, &Text { fence: "@%p2 bra OVER;\n wgmma.fence.sync.aligned;\nOVER:", ..TEXT });
}

#[test]
fn registers_of_a_product_under_way() {
    planted(FaultKind::InFlight, &Text { wait: "", ..TEXT });
    planted(FaultKind::InFlight, &Text { wait: "wgmma.wait_group.sync.aligned 1;", ..TEXT });
    // What is not committed is not waited for.
    planted(FaultKind::InFlight, &Text { after: "", ..TEXT });
    planted(
        FaultKind::InFlight,
        &Text { in_registers: true, after: "mov.b32 %r11, 0;\n wgmma.commit_group.sync.aligned;", ..TEXT },
    );
    let sums = (1..37).map(|i| format!("%f{i}")).collect::<Vec<_>>().join(",");
    let other = TEXT.body().replace(
        "PAST:",
        &format!("wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {{{sums}}}, %d4, %d5, 1, 1, 1, 0, 0;\nPAST:"),
    );
    let early = other.replace(TEXT.wait, "").replace("st.global.f32", "// st.global.f32");
    TEXT.case().planted(FaultKind::InFlight, &early, &TEXT.body());
}

#[test]
fn shared_memory_of_a_product_under_way() {
    for bug in [
        "@%p3 st.shared.u64 [tile+8192], %d6;\n wgmma.commit_group.sync.aligned;",
        "bar.sync 0;\n @%p3 st.shared.u64 [tile+8192], %d6;\n wgmma.commit_group.sync.aligned;",
    ] {
        let text = Text { after: bug, ..TEXT };
        for seed in 0..8 {
            let fault = Case { seed, ..text.case() }.run(&text.body()).err().unwrap();
            assert!(matches!(fault.kind, FaultKind::InFlight | FaultKind::Race), "{fault}");
        }
    }
    let text = Text { wait: "wgmma.wait_group.sync.aligned 0;\n bar.sync 0;\n @%p3 st.shared.u64 [tile+8192], %d6;", ..TEXT };
    text.case().out(&text.body());
}

#[test]
fn shared_memory_that_the_tensor_cores_do_not_see() {
    planted(FaultKind::Unfenced, &Text { filled: "", ..TEXT });
    // A fence behind the barrier does as well: it is behind all that the barrier orders.
    let text = Text { filled: "bar.sync 0;\n fence.proxy.async.shared::cta;", ..TEXT };
    text.case().out(&text.body());
    // One of the writers has none.
    let bug = TEXT.body().replace(TEXT.filled, "@!%p1 bra OVER;\n fence.proxy.async.shared::cta;\nOVER:").replace(
        "setp.lt.u32 %p1, %r2, 17;\n @%p1 bra FILL;",
        "setp.lt.u32 %p1, %r2, 17;\n @%p1 bra FILL;\n setp.gt.u32 %p1, %tid, 31;",
    );
    TEXT.case().planted(FaultKind::Unfenced, &bug, &TEXT.body());
    // Nor is there anything to see before all have written.
    let early = TEXT.body().replace("bar.sync 0;", "");
    for seed in 0..8 {
        let fault = Case { seed, ..TEXT.case() }.run(&early).err().unwrap();
        assert!(matches!(fault.kind, FaultKind::Race | FaultKind::Uninitialised), "{fault}");
    }
}

#[test]
fn descriptors_that_are_wrong() {
    planted(FaultKind::Misaligned, &Text { shift: 128, ..TEXT });
    planted(FaultKind::Misaligned, &Text { shift: 112, ..TEXT });
    planted(FaultKind::Misaligned, &Text { shift: 32, by_columns: true, ..TEXT });
    planted(FaultKind::Bounds, &Text { shift: 8192, ..TEXT });
    let lanes = TEXT
        .body()
        .replace("setp.eq.u32 %p2", "@%p3 add.s64 %d5, %d5, 64;\n setp.eq.u32 %p2")
        .replace("mov.u64 %d6", "mov.u64 %d7");
    let lanes = lanes.replace("@%p3 add", "setp.eq.u32 %p3, %tid, 0;\n @%p3 add");
    TEXT.case().planted(FaultKind::Divergence, &lanes, &TEXT.body());
}

#[test]
fn warps_that_do_not_take_part() {
    planted(FaultKind::Divergence, &Text { fence: "@%p4 bra PAST;\n wgmma.fence.sync.aligned;", ..TEXT });
    planted(FaultKind::Divergence, &Text { fence: "@%p3 bra PAST;\n wgmma.fence.sync.aligned;", ..TEXT });
    let few = Case { block: 96, ..TEXT.case() }.run(&TEXT.body());
    assert!(few.is_err_and(|fault| matches!(fault.kind, FaultKind::Divergence | FaultKind::Uninitialised)));
}

/// What is not executed is refused when it is read.
#[test]
fn forms_that_are_not_known() {
    let parse = |text: &str| Module::parse(&kernel("", text));
    let right = TEXT.body();
    assert!(parse(&right).is_ok());
    for (known, not) in [
        (", 1, 1, 1, 0, 0;", ", 1, -1, 1, 0, 0;"),
        (", 1, 1, 1, 0, 0;", ", 1, 1, 1, 1, 0;"),
        (", 1, 1, 1, 0, 0;", ", 1, 1, 1, 0;"),
        (".f32.bf16.bf16", ".f32.f16.f16"),
        (".f32.bf16.bf16", ".f16.bf16.bf16"),
        ("m64n72k16", "m64n64k16"),
        ("m64n72k16", "m64n72k8"),
        ("wgmma.fence.sync.aligned", "wgmma.fence.sync"),
    ] {
        assert!(right.contains(known) && parse(&right.replace(known, not)).is_err(), "{not}");
    }
}
