//! Matrices against sums done here.

use crate::common::Case;
use ptx::{Arg, Gpu, Module, Options};

/// Lane 4r+c of matrix m holds the elements (r, 2c) and (r, 2c+1); transposed, (2c, r) and (2c+1, r).
#[test]
fn ldmatrix_and_stmatrix() {
    // Shared memory is filled with 0, 1, 2, ... as 16-bit numbers; row i of matrix m begins at element 64m + 8i.
    let body = |trans: &str| {
        format!(
            ".shared .align 16 .b8 tile[512];\n mov.u32 %r1, tile;\n mad.lo.s32 %r2, %tid, 16, %r1;\n mul.lo.s32 %r3, %tid, 8;\n mov.u32 %r4, 0;\nFILL:\n\
             add.s32 %r5, %r3, %r4;\n cvt.u16.u32 %h1, %r5;\n mad.lo.s32 %r6, %r4, 2, %r2;\n st.shared.u16 [%r6], %h1;\n add.s32 %r4, %r4, 1;\n setp.lt.u32 %p1, %r4, 8;\n @%p1 bra FILL;\n\
             bar.warp.sync -1;\n ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10,%r11,%r12,%r13}}, [%r2];\n bar.warp.sync -1;\n\
             stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2], {{%r13,%r12,%r11,%r10}};\n bar.warp.sync -1;\n ld.shared.u16 %h2, [%r2];\n cvt.u32.u16 %r14, %h2;\n\
             mov.b64 %d1, {{%r11, %r14}};\n st.global.u64 [%o], %d1;\n ret;"
        )
    };
    let case = Case { outputs: 32, ..Case::default() };
    for (trans, step) in [("", 1), (".trans", 8)] {
        for (lane, value) in (0u64..).zip(case.out(&body(trans))) {
            let (r, c) = (lane / 4, lane % 4 * 2);
            let first = 64 + if trans.is_empty() { 8 * r + c } else { 8 * c + r };
            assert_eq!(value & 0xFFFF_FFFF, first | (first + step) << 16, "{trans} lane {lane}");
            // Matrices 3, 2, 1, 0 are stored where 0, 1, 2, 3 were.
            assert_eq!(value >> 32, (3 - lane / 8) * 64 + lane % 8 * 8, "{trans} row {lane}");
        }
    }
    let out = case.out("shl.b32 %r1, %tid, 16;\n or.b32 %r1, %r1, %tid;\n movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;\n cvt.u64.u32 %d1, %r2;\n st.global.u64 [%o], %d1;\n ret;");
    for (lane, value) in (0u64..).zip(out) {
        // The element (i, j) was 4i + j/2.
        let (r, c) = (lane / 4, lane % 4 * 2);
        assert_eq!(value, (4 * c + r / 2) | (4 * (c + 1) + r / 2) << 16);
    }
}

/// Multiplies matrices of small whole numbers, whose sums are exact in every format, in the fragments of the ISA: given and
/// taken by the formulas of its text, written down here once more.
fn multiply(shape: usize, types: [&str; 4], encode: fn(i32) -> u32, per_register: usize) {
    let (a, b): (Vec<i32>, Vec<i32>) =
        ((0..16 * shape as i32).map(|i| i * 7 % 5 - 2).collect(), (0..8 * shape as i32).map(|i| i * 3 % 7 - 3).collect());
    let (n_a, n_b) = (16 * shape / 32 / per_register, 8 * shape / 32 / per_register);
    let width = 32 / per_register;
    let integers = types[0] == "s32";
    let half = types[0] == "f16";
    let mut input = Vec::new();
    for lane in 0..32 {
        let (group, thread) = (lane / 4, lane % 4);
        let word = |at: &dyn Fn(usize) -> i32| {
            (0..per_register).fold(0u32, |word, e| word | (encode(at(e)) & (u32::MAX >> (32 - width))) << (e * width))
        };
        for i in 0..4 {
            let (row, start) = (if i % 2 == 0 { group } else { group + 8 }, if i < 2 { 0 } else { 4 * per_register });
            input.push(if i < n_a { word(&|e| a[row * shape + start + thread * per_register + e]) } else { 0 });
        }
        for i in 0..2 {
            let start = i * 4 * per_register;
            input.push(if i < n_b { word(&|e| b[(start + thread * per_register + e) * 8 + group]) } else { 0 });
        }
    }
    let list = |from: usize, n: usize| (from..from + n).map(|i| format!("%r{i}")).collect::<Vec<_>>().join(",");
    let sums = if half { 2 } else { 4 };
    let one = if integers {
        "1".to_owned()
    } else if half {
        "0x3C003C00".to_owned()
    } else {
        "0x3F800000".to_owned()
    };
    let ones: String = ["%r10", "%r11", "%r12", "%r13"].map(|r| format!("mov.b32 {r}, {one};\n")).concat();
    let [d, at, bt, c] = types;
    let body = format!(
        "mad.wide.u32 %i, %tid, 24, %in;\n ld.global.v2.u32 {{%r1,%r2}}, [%i];\n ld.global.v2.u32 {{%r3,%r4}}, [%i+8];\n ld.global.v2.u32 {{%r5,%r6}}, [%i+16];\n {ones}\
         mov.u32 %r22, 0; mov.u32 %r23, 0;\n mma.sync.aligned.m16n8k{shape}.row.col.{d}.{at}.{bt}.{c} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n\
         mad.wide.u32 %o, %tid, 16, %out;\n st.global.v4.u32 [%o], {{%r20,%r21,%r22,%r23}};\n ret;",
        list(20, sums),
        list(1, n_a),
        list(5, n_b),
        list(10, sums)
    );
    let module = Module::parse(&crate::common::kernel("", &body)).unwrap();
    let mut gpu = Gpu::new(Options::default());
    let (p, out) = (gpu.alloc(input.len() * 4), gpu.alloc(512));
    gpu.write(p, &input.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let counters = gpu.launch(&module, "k", 1, 32, 0, &[Arg::U64(p), Arg::U64(out), Arg::U32(0)]).unwrap();
    assert_eq!(counters.tensor_flops, 2 * 16 * 8 * shape as u64);
    let out = gpu.read(out, 512).unwrap();
    for row in 0..16 {
        for column in 0..8 {
            let sum: i32 = 1 + (0..shape).map(|k| a[row * shape + k] * b[k * 8 + column]).sum::<i32>();
            let lane = row % 8 * 4 + column / 2;
            let at = |i: usize| u32::from_le_bytes(out[16 * lane + 4 * i..][..4].try_into().unwrap());
            let got = match (integers, half) {
                (true, _) => at(row / 8 * 2 + column % 2).cast_signed() as f32,
                (_, true) => f16((at(row / 8) >> (16 * (column % 2))) as u16),
                _ => f32::from_bits(at(row / 8 * 2 + column % 2)),
            };
            assert!((got - sum as f32).abs() < 0.5, "{types:?} k {shape}: ({row}, {column}) is {got}, not {sum}");
        }
    }
}

/// Normal numbers and zero of f16, by definition.
fn f16(bits: u16) -> f32 {
    let magnitude = if matches!(bits, 0 | 0x8000) {
        0.0
    } else {
        (1.0 + f32::from(bits & 0x3FF) / 1024.0) * 2f32.powi(i32::from(bits >> 10 & 31) - 15)
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}

#[test]
fn products_of_bf16_and_f16() {
    // -3..3 as bf16 and f16.
    fn bf16(x: i32) -> u32 {
        (x as f32).to_bits() >> 16
    }
    fn f16(x: i32) -> u32 {
        [0xC200, 0xC000, 0xBC00, 0, 0x3C00, 0x4000, 0x4200][(x + 3) as usize]
    }
    for k in [8, 16] {
        multiply(k, ["f32", "bf16", "bf16", "f32"], bf16, 2);
        multiply(k, ["f32", "f16", "f16", "f32"], f16, 2);
        multiply(k, ["f16", "f16", "f16", "f16"], f16, 2);
    }
    for k in [4, 8] {
        multiply(k, ["f32", "tf32", "tf32", "f32"], |x| (x as f32).to_bits(), 1);
    }
}

#[test]
fn products_of_bytes() {
    fn e4m3(x: i32) -> u32 {
        [0xC4, 0xC0, 0xB8, 0, 0x38, 0x40, 0x44][(x + 3) as usize]
    }
    fn e5m2(x: i32) -> u32 {
        [0xC2, 0xC0, 0xBC, 0, 0x3C, 0x40, 0x42][(x + 3) as usize]
    }
    for k in [16, 32] {
        multiply(k, ["s32", "s8", "s8", "s32"], i32::cast_unsigned, 4);
    }
    multiply(32, ["f32", "e4m3", "e4m3", "f32"], e4m3, 4);
    multiply(32, ["f32", "e5m2", "e5m2", "f32"], e5m2, 4);
}
