//! Copies of boxes of tensors.

use ptx::{Arg, Counters, Fault, FaultKind, Gpu, Module, Options, TensorMap};

const COLUMNS: u64 = 80;
const ROWS: u64 = 40;
/// Elements from row to row: there are more than the tensor's.
const STRIDE: u64 = 88;

/// A box of 16 rows of 64 columns, copied by thread 0 and read by all 64.
fn text(init: &str, n_bytes: u32, wait: &str, shift: u32) -> String {
    format!(
        ".version 8.8\n.target sm_90a\n.address_size 64\n\
         .visible .entry k(.param .align 64 .b8 map[128], .param .u64 out, .param .u32 x, .param .u32 y)\n{{\n\
         .reg .b32 %r<20>; .reg .b64 %d<10>; .reg .pred %p<4>;\n .shared .align 1024 .b8 tile[3072];\n .shared .align 8 .b64 bar;\n\
         mov.b64 %d1, map;\n cvta.param.u64 %d2, %d1;\n ld.param.u64 %d3, [out];\n ld.param.u32 %r1, [x];\n ld.param.u32 %r2, [y];\n\
         mov.u32 %r3, tile;\n mov.u32 %r4, bar;\n mov.u32 %r5, %tid.x;\n setp.ne.u32 %p1, %r5, 0;\n @%p1 bra A;\n {init}\nA:\n bar.sync 0;\n @%p1 bra B;\n\
         add.s32 %r6, %r3, {shift};\n mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], {n_bytes};\n\
         cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%d2, {{%r1, %r2}}], [%r4];\nB:\n {wait}\n\
         mad.wide.u32 %d4, %r5, 32, %d3;\n mad.lo.s32 %r7, %r5, 32, %r3;\n ld.shared.v2.u64 {{%d5,%d6}}, [%r7];\n st.global.v2.u64 [%d4], {{%d5,%d6}};\n\
         ld.shared.v2.u64 {{%d5,%d6}}, [%r7+16];\n st.global.v2.u64 [%d4+16], {{%d5,%d6}};\n ret;\n}}\n"
    )
}

const INIT: &str = "mbarrier.init.shared::cta.b64 [%r4], 1;\n fence.proxy.async.shared::cta;";
const WAIT: &str = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;\n @!%p2 bra W;";

fn twin() -> String {
    text(INIT, 2048, WAIT, 0)
}

fn run(text: &str, (x, y): (i32, i32), seed: u64, damage: bool) -> Result<(Vec<u16>, Counters), Fault> {
    let module = Module::parse(text).unwrap();
    let mut gpu = Gpu::new(Options { seed, max_steps: 100_000, ..Options::default() });
    let values: Vec<u8> = (0..ROWS * STRIDE).flat_map(|i| (i as u16 + 1).to_le_bytes()).collect();
    let (address, out) = (gpu.alloc(values.len()), gpu.alloc(2048));
    gpu.write(address, &values).unwrap();
    let map = TensorMap { address, columns: COLUMNS, rows: ROWS, stride: 2 * STRIDE, box_columns: 64, box_rows: 16 };
    let mut map = map.encode().unwrap();
    map[0] ^= u8::from(damage);
    let args = [Arg::Bytes(map.to_vec()), Arg::U64(out), Arg::I32(x), Arg::I32(y)];
    let counters = gpu.launch(&module, "k", 1, 64, 0, &args)?;
    let bytes = gpu.read(out, 2048).unwrap();
    Ok((bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect(), counters))
}

/// Row r of the box has its 16-byte pieces exchanged by r mod 8; what lies outside of the tensor is 0.
#[test]
fn boxes_are_swizzled_and_filled_up() {
    // Within; over the last columns; before the first row, after the last; nowhere.
    for (x, y, sectors) in [(0, 8, 16 * 4), (64, 0, 16), (0, -8, 8 * 4), (0, 30, 10 * 4), (0, -16, 0), (64, 40, 0)] {
        for seed in 0..4 {
            let (got, counters) = run(&twin(), (x, y), seed, false).unwrap_or_else(|fault| panic!("{x} {y}: {fault}"));
            for (row, column) in (0..16).flat_map(|row| (0..64).map(move |column| (row, column))) {
                let (in_row, in_column) = (y + row, x + column);
                let there = (0..ROWS as i32).contains(&in_row) && (0..COLUMNS as i32).contains(&in_column);
                let right = if there { in_row * STRIDE as i32 + in_column + 1 } else { 0 };
                let at = row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8;
                assert_eq!(i32::from(got[at as usize]), right, "box at ({x}, {y}): ({row}, {column})");
            }
            // Rows begin at multiples of 16 bytes: at every second, half a sector more is touched.
            let touched = counters.global_read_sectors;
            assert!(touched >= sectors && touched <= sectors * 3 / 2, "{touched} sectors, not {sectors}");
        }
    }
}

fn planted(kind: FaultKind, bug: &str) {
    for seed in 0..8 {
        let fault = run(bug, (0, 0), seed, false).err().unwrap();
        assert_eq!(fault.kind, kind, "{fault}");
        assert!(run(&twin(), (0, 0), seed, false).is_ok());
    }
}

#[test]
fn boxes_that_are_copied_wrongly() {
    planted(FaultKind::Deadlock, &text(INIT, 2064, WAIT, 0));
    planted(FaultKind::Deadlock, &text(INIT, 1920, WAIT, 0));
    planted(FaultKind::InFlight, &text(INIT, 2048, "bar.sync 0;", 0));
    planted(FaultKind::Misaligned, &text(INIT, 2048, WAIT, 128));
    planted(FaultKind::Unfenced, &text(&INIT.replace("fence.proxy.async.shared::cta;", ""), 2048, WAIT, 0));
    planted(FaultKind::Barrier, &text("", 2048, WAIT, 0));
    // The bytes are there, but nobody has told warp 1.
    planted(FaultKind::Deadlock, &text(&INIT.replace("], 1", "], 2"), 2048, WAIT, 0));
    assert_eq!(run(&twin(), (0, 0), 0, true).err().unwrap().kind, FaultKind::Bounds);
}

#[test]
fn tensors_that_there_cannot_be() {
    let right = TensorMap { address: 4096, columns: 64, rows: 100, stride: 128, box_columns: 64, box_rows: 16 };
    assert!(right.encode().is_some());
    for wrong in [
        TensorMap { address: 4104, ..right },
        TensorMap { stride: 120, ..right },
        TensorMap { stride: 136, ..right },
        TensorMap { box_columns: 128, ..right },
        TensorMap { box_rows: 257, ..right },
        TensorMap { rows: 0, ..right },
    ] {
        assert!(wrong.encode().is_none(), "{wrong:?}");
    }
}
