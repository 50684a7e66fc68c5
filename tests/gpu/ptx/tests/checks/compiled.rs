//! Kernels as NVRTC 12.9 compiled them (`compiled.cu`, for `compute_80`, with line numbers), against the same in Rust.

use ptx::{Arg, Counters, FaultKind, Gpu, Module, Options};

const TEXT: &str = include_str!("compiled.ptx");

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn bf16(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect()
}

/// Numbers that bf16 has.
fn some(n: usize, salt: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + salt) % 61) as f32 / 16.0 - 1.75).collect()
}

#[test]
fn rms_norm() {
    let module = Module::parse(TEXT).unwrap();
    let (rows, n) = (3, 264);
    let (x, w) = (some(rows * n, 1), some(n, 5));
    for seed in 0..4 {
        let mut gpu = Gpu::new(Options { seed, ..Options::default() });
        let (xp, wp, yp) = (gpu.alloc(rows * n * 2), gpu.alloc(n * 2), gpu.alloc(rows * n * 2));
        gpu.write(xp, &bf16(&x)).unwrap();
        gpu.write(wp, &bf16(&w)).unwrap();
        let args = [Arg::U64(xp), Arg::U64(wp), Arg::U64(yp), Arg::I32(n as i32), Arg::F32(1e-5)];
        let counters = gpu.launch(&module, "rmsnorm", rows as u32, 128, 0, &args).unwrap();
        // x is read twice, w once a row.
        assert_eq!(counters.global_read_bytes, (rows * n * 2 * 3) as u64);
        let y = gpu.read(yp, rows * n * 2).unwrap();
        for (i, y) in y.chunks(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).enumerate() {
            let row = &x[i / n * n..][..n];
            let mean = row.iter().map(|x| f64::from(x * x)).sum::<f64>() / n as f64;
            let right = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(w[i % n]);
            assert!((f64::from(y) - right).abs() <= right.abs() * 0.005 + 1e-6, "{i}: {y}, not {right}");
        }
    }
}

fn product(gpu: &mut Gpu, text: &str, k: usize) -> Result<(Vec<f32>, Counters), ptx::Fault> {
    let module = Module::parse(text).unwrap();
    let (a, b) = (some(16 * k, 3), some(8 * k, 11));
    let (ap, bp, cp) = (gpu.alloc(a.len() * 2), gpu.alloc(b.len() * 2), gpu.alloc(512));
    gpu.write(ap, &bf16(&a)).unwrap();
    gpu.write(bp, &bf16(&b)).unwrap();
    let counters = gpu.launch(&module, "mm", 1, 32, 0, &[Arg::U64(ap), Arg::U64(bp), Arg::U64(cp), Arg::I32(k as i32)])?;
    let c = floats(&gpu.read(cp, 512).unwrap());
    for row in 0..16 {
        for column in 0..8 {
            let right: f64 = (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[column * k + i])).sum();
            let got = f64::from(c[row * 8 + column]);
            assert!((got - right).abs() < 1e-3, "({row}, {column}): {got}, not {right}");
        }
    }
    Ok((c, counters))
}

#[test]
fn a_product_with_copies_in_two_stages() {
    let (_, counters) = product(&mut Gpu::new(Options::default()), TEXT, 96).unwrap();
    assert_eq!(counters.tensor_flops, 2 * 16 * 8 * 96);
    assert_eq!(counters.global_read_bytes, (16 + 8) * 96 * 2);
}

/// The waits and barriers of the compiled text taken away, one kind at a time.
#[test]
fn what_is_planted_in_compiled_text_is_found() {
    let start = TEXT.find(".entry mm(").unwrap();
    let without = |opcode: &str| {
        let (head, tail) = TEXT.split_at(start);
        format!("{head}{}", tail.replace(opcode, "// "))
    };
    for (opcode, kinds) in
        [("cp.async.wait_group", &[FaultKind::InFlight][..]), ("bar.sync", &[FaultKind::Race, FaultKind::InFlight])]
    {
        let fault = product(&mut Gpu::new(Options::default()), &without(opcode), 96).err().unwrap();
        assert!(kinds.contains(&fault.kind), "{opcode}: {fault}");
        assert!(fault.source.as_ref().is_some_and(|(_, line)| *line > 0), "{fault}");
    }
}

#[test]
fn calls_and_mathematics() {
    let module = Module::parse(TEXT).unwrap();
    let mut gpu = Gpu::new(Options::default());
    let x = some(32, 0);
    let p = gpu.alloc(128);
    gpu.write(p, &bytes_of(&x)).unwrap();
    gpu.launch(&module, "calls", 1, 32, 0, &[Arg::U64(p), Arg::I32(10)]).unwrap();
    for (x, y) in x.iter().zip(floats(&gpu.read(p, 128).unwrap())) {
        assert!((y - 45.0 * x).abs() < 1e-3, "{y} of {x}");
    }
    mathematics(&module, &mut gpu);
}

/// `misc`: what CUDA's library makes of a few functions, among them the slow paths of sine and cosine.
fn mathematics(module: &Module, gpu: &mut Gpu) {
    let x: Vec<f32> = (0..32).map(|i| 0.3 + i as f32 * 0.11).collect();
    let k: Vec<i32> = (0..32).map(|i| i * 1237 - 9000).collect();
    let [o, a, b, d, bytes, signed] = [160, 128, 128, 256, 32, 32].map(|n| gpu.alloc(n));
    gpu.write(o, &[0; 160]).unwrap();
    gpu.write(a, &bytes_of(&x)).unwrap();
    gpu.write(b, &k.iter().flat_map(|k| k.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    gpu.write(signed, &[1; 32]).unwrap();
    let args = [Arg::U64(o), Arg::U64(a), Arg::U64(b), Arg::U64(32), Arg::U64(d), Arg::U64(bytes), Arg::U64(signed)];
    gpu.launch(module, "misc", 1, 32, 0, &args).unwrap();
    let doubles = gpu.read(d, 256).unwrap();
    for (i, got) in doubles.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).enumerate() {
        let big = (i64::from(k[i]) as u64).wrapping_mul(32) / (i as u64 + 1) + 32 % (i as u64 + 3) + 1 + 58;
        let right = f64::from(x[i]).sqrt() * 2.0 + big as f64;
        assert!((got - right).abs() <= right.abs() * 1e-15, "{i}: {got}, not {right}");
    }
    let quotients = gpu.read(bytes, 32).unwrap();
    for (i, got) in quotients.iter().enumerate() {
        let k = k[i];
        let u = k.cast_unsigned();
        let dot = k.to_le_bytes().iter().fold(1, |sum, b| sum + i32::from(b.cast_signed()) * i32::from(b.cast_signed()));
        let [k0, k1, ..] = k.to_le_bytes();
        let [t0, t1, ..] = k.wrapping_mul(3).to_le_bytes();
        let mixed = u32::from_le_bytes([k0, k1, t0, t1]).cast_signed();
        let find = if k == 0 { 0 } else { u.trailing_zeros() + 1 };
        let high = ((i64::from(k) * i64::from(k)) >> 32) as i32;
        let terms = [
            k / 7,
            k % 5,
            k >> 2,
            k << 3,
            u.count_ones() as i32,
            u.leading_zeros() as i32,
            find as i32,
            u.reverse_bits().cast_signed(),
            high,
            k.abs(),
            k.min(3),
            k.max(9),
            dot,
            mixed,
            u.rotate_left(3).cast_signed(),
        ];
        let right = terms.iter().fold(0i32, |sum, term| sum.wrapping_add(*term)).to_le_bytes()[0];
        assert_eq!(*got, right, "{i}: of {k}");
    }
    let sums: Vec<u8> = gpu.read(signed, 32).unwrap();
    assert!(sums.iter().zip(&k).all(|(got, k)| *got == (k + 1).to_le_bytes()[0]));
}
