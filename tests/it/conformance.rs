//! The CPU device against plain arithmetic in f64, and against itself: every instruction set, any number of rows and
//! threads, the same bits.

use half::{bf16, f16};
use proptest::prelude::*;
use valar::device::batch::{Batch, BatchSeq};
use valar::device::cpu::{CpuDevice, Hidden, Isa, Numerics};
use valar::device::{Activation, Device};
use valar::tensor::{DTYPES, DType, GROUP, Tensor};

/// `SplitMix64`: the random numbers of these tests.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// -1 to 1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A matrix in a file's format.
pub(crate) struct Matrix {
    dtype: DType,
    n: usize,
    k: usize,
    bytes: Vec<u8>,
}

/// Plain floats among all types.
const FLOATS: std::ops::Range<usize> = 0..3;

/// A float of 8 bits, by its definition.
fn e4m3(byte: u8) -> f32 {
    let (sign, exponent, mantissa) = (byte >> 7, i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if sign == 1 { -size } else { size }
}

/// Where the f16 scales of a block stand.
fn halves(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q2K => &[80, 82],
        DType::Q3K => &[108],
        DType::Q6K => &[208],
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        _ => &[0],
    }
}

/// `n_blocks` blocks of 32 elements, or of as many as the largest block of these types has.
fn width(n_blocks: usize, dtypes: &[DType]) -> usize {
    n_blocks * dtypes.iter().map(|dtype| dtype.block_elements()).max().unwrap_or(1).max(32)
}

impl Matrix {
    pub(crate) fn random(rng: &mut Random, dtype: DType, n: usize, k: usize) -> Self {
        let mut bytes = Vec::new();
        for _ in 0..n * k / dtype.block_elements() {
            let x = rng.float();
            match dtype {
                DType::F32 => bytes.extend(x.to_le_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
                DType::Bf16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
                DType::E4m3 => {
                    bytes.extend((x * 0.1).to_le_bytes());
                    // All but NaN.
                    bytes.extend((0..GROUP).map(|_| (rng.below(2) << 7 | rng.below(0x7f)) as u8));
                }
                _ => {
                    // Extremes of the integers now and then: what saturating instructions would get wrong.
                    let extreme = [None, None, Some(0x00), Some(0xff), Some(0x80), Some(0x7f)][rng.below(6)];
                    let start = bytes.len();
                    bytes.extend((0..dtype.block_bytes()).map(|_| extreme.unwrap_or(rng.next() as u8)));
                    if dtype == DType::Q4Z {
                        bytes[start..start + 4].copy_from_slice(&(x * 0.1).to_le_bytes());
                        continue;
                    }
                    for (i, at) in halves(dtype).iter().enumerate() {
                        let scale = f16::from_f32(if i == 0 { x * 0.1 } else { rng.float() });
                        bytes[start + at..][..2].copy_from_slice(&scale.to_le_bytes());
                    }
                }
            }
        }
        Self { dtype, n, k, bytes }
    }

    pub(crate) fn tensor(&self) -> Tensor<'_> {
        Tensor { name: "random", dtype: self.dtype, shape: vec![self.n, self.k], bytes: (&self.bytes).into() }
    }

    /// (d, integer, m) of a quantised element, (1, value, 0) or (d, value, 0) of a float: the value is d · integer + m.
    fn element(&self, row: usize, i: usize) -> (f32, f32, f32) {
        let index = row * self.k + i;
        let b = &self.bytes[index / self.dtype.block_elements() * self.dtype.block_bytes()..][..self.dtype.block_bytes()];
        let half = |i: usize| f16::from_le_bytes([b[i], b[i + 1]]).to_f32();
        let i = index % self.dtype.block_elements();
        match self.dtype {
            DType::F32 => (1.0, f32::from_le_bytes([b[0], b[1], b[2], b[3]]), 0.0),
            DType::F16 => (1.0, half(0), 0.0),
            DType::Bf16 => (1.0, bf16::from_le_bytes([b[0], b[1]]).to_f32(), 0.0),
            DType::E4m3 => (f32::from_le_bytes([b[0], b[1], b[2], b[3]]), e4m3(b[4 + i]), 0.0),
            dtype => {
                let group = dtype.group(b, i / GROUP);
                (group.d[i % GROUP / 16], f32::from(group.q[i % GROUP]), group.m[i % GROUP / 16])
            }
        }
    }

    pub(crate) fn value(&self, row: usize, i: usize) -> f32 {
        let (d, q, m) = self.element(row, i);
        d * q + m
    }

    /// Σ weight · activation in f64 (weights and activations rounded as the device promises), and Σ |terms|.
    fn product(&self, numerics: Numerics, row: usize, act: &[f32]) -> (f64, f64) {
        let round = |x: f32| if numerics == Numerics::Bf16 { bf16::from_f32(x).to_f32() } else { x };
        let act: Vec<f64> = if !numerics.has_int8_products() || !self.dtype.is_quantised() {
            act.iter().map(|&x| round(x).into()).collect()
        } else {
            act.chunks(32).flat_map(quantised).collect()
        };
        let terms = act.iter().enumerate().map(|(i, x)| {
            if !numerics.has_int8_products() {
                let term = f64::from(round(self.value(row, i))) * x;
                return (term, term.abs());
            }
            let (d, q, m) = self.element(row, i);
            let (a, b) = (f64::from(d) * f64::from(q) * x, f64::from(m) * x);
            (a + b, a.abs() + b.abs())
        });
        terms.fold((0.0, 0.0), |sum, term| (sum.0 + term.0, sum.1 + term.1))
    }
}

/// A block of 32 activations after quantisation, by its definition.
fn quantised(x: &[f32]) -> Vec<f64> {
    let amax = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
    x.iter().map(|x| f64::from((x * inverse).round_ties_even()) * f64::from(amax / 127.0)).collect()
}

/// A batch of `n` tokens of one sequence: all that operations on rows look at.
pub(crate) fn rows_batch(n: usize) -> Batch {
    let n_blocks = n.div_ceil(16) as u32;
    Batch {
        tokens: vec![0; n],
        positions: (0..n as u32).collect(),
        seqs: vec![BatchSeq { token_start: 0, n_tokens: n as u32, first_position: 0, table_start: 0, n_blocks }],
        block_tables: (0..n_blocks).collect(),
        ..Batch::default()
    }
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// All instruction sets of this machine with a few thread counts, the portable one first.
pub(crate) fn devices(numerics: Numerics) -> Vec<CpuDevice> {
    let mut isas = Isa::available();
    isas.reverse();
    assert_eq!(isas[0], Isa::PORTABLE);
    [3, 1, 5, 2].into_iter().cycle().zip(isas).map(|(n_threads, isa)| CpuDevice::new(isa, numerics, n_threads)).collect()
}

/// Any of them.
pub(crate) fn numerics() -> impl Strategy<Value = Numerics> {
    prop::sample::select(Numerics::ALL.to_vec())
}

pub(crate) fn hidden(dev: &CpuDevice, values: &[f32], width: usize) -> Hidden {
    let mut hidden = dev.new_hidden(values.len() / width, width);
    hidden.values_mut().copy_from_slice(values);
    hidden
}

pub(crate) fn random_rows(rng: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.float() * if rng.below(40) == 0 { 20.0 } else { 1.0 }).collect()
}

/// The activations that a device makes of x for a weight (a norm of weight 1), and weight · these.
fn project(dev: &CpuDevice, x: &[f32], parts: &[Tensor<'_>]) -> (Vec<f32>, Vec<f32>) {
    let k = parts[0].shape[1];
    let n = parts.iter().map(|part| part.shape[0]).sum();
    let batch = rows_batch(x.len() / k);
    let weight = dev.load_weight(parts).expect("the tensors are well-formed");
    let ones = Matrix { dtype: DType::F32, n: 1, k, bytes: 1.0f32.to_le_bytes().repeat(k) };
    let ones = dev.load_vector(&[ones.tensor()]).expect("a plain vector");
    let mut act = dev.new_act(batch.tokens.len(), k);
    act.keep_values();
    dev.norm(&hidden(dev, x, k), &ones, 1e-5, &weight, &batch, &mut act);
    let mut out = dev.new_hidden(batch.tokens.len(), n);
    dev.linear(&act, &weight, &batch, &mut out);
    let stored = bits(out.values());
    let mut other = dev.new_act(batch.tokens.len(), k);
    dev.norm(&hidden(dev, x, k), &ones, 1e-5, &weight, &batch, &mut other);
    dev.linear(&other, &weight, &batch, &mut out);
    assert_eq!(bits(out.values()), stored, "it matters whether values are kept");
    dev.linear_add(&act, &weight, &batch, &mut out);
    let twice: Vec<_> = stored.iter().map(|&y| (f32::from_bits(y) * 2.0).to_bits()).collect();
    assert_eq!(bits(out.values()), twice, "linear_add is not linear added");
    (act.values().to_vec(), stored.into_iter().map(f32::from_bits).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_are_right_and_the_same_on_every_instruction_set(
        seed: u64,
        ns in prop::collection::vec(1usize..70, 1..4),
        n_blocks in 1usize..5,
        n_rows in 1usize..40,
        numerics in numerics(),
    ) {
        let rng = &mut Random(seed);
        let dtypes: Vec<_> = ns.iter().map(|_| DTYPES[rng.below(DTYPES.len())]).collect();
        let k = width(n_blocks, &dtypes);
        let matrices: Vec<_> = ns.iter().zip(&dtypes).map(|(&n, &dtype)| Matrix::random(rng, dtype, n, k)).collect();
        let tensors: Vec<_> = matrices.iter().map(Matrix::tensor).collect();
        let x = random_rows(rng, n_rows * k);
        let mut truth: Option<Vec<u32>> = None;
        for dev in devices(numerics) {
            let (act, out) = project(&dev, &x, &tensors);
            if let Some(truth) = &truth {
                prop_assert_eq!(&bits(&out), truth, "{} differs from portable", dev.isa().name());
                continue;
            }
            for (act, out) in act.chunks(k).zip(out.chunks(ns.iter().sum())) {
                let rows = matrices.iter().flat_map(|matrix| (0..matrix.n).map(move |row| matrix.product(numerics, row, act)));
                for ((want, size), &got) in rows.zip(out) {
                    prop_assert!((f64::from(got) - want).abs() <= 2e-6 * size, "{got}, not {want} (of terms {size})");
                }
            }
            truth = Some(bits(&out));
        }
    }

    #[test]
    fn float_products_take_any_width(seed: u64, k in 1usize..100, n in 1usize..70, n_rows in 1usize..20, dtype in FLOATS, numerics in numerics()) {
        let rng = &mut Random(seed);
        let matrix = Matrix::random(rng, DTYPES[dtype], n, k);
        let x = random_rows(rng, n_rows * k);
        let mut truth: Option<Vec<u32>> = None;
        for dev in devices(numerics) {
            let (act, out) = project(&dev, &x, &[matrix.tensor()]);
            for (i, &got) in out.iter().enumerate() {
                let (want, size) = matrix.product(numerics, i % n, &act[i / n * k..][..k]);
                prop_assert!((f64::from(got) - want).abs() <= 1e-5 * size, "{got}, not {want} (of terms {size})");
            }
            prop_assert_eq!(truth.get_or_insert_with(|| bits(&out)), &bits(&out), "{}", dev.isa().name());
        }
    }

    #[test]
    fn norms_are_right(seed: u64, width in 1usize..200, n_rows in 1usize..20, numerics in numerics()) {
        let rng = &mut Random(seed);
        let (x, weight) = (random_rows(rng, n_rows * width), Matrix::random(rng, DType::F32, 1, width));
        let next = Matrix::random(rng, DType::F32, 1, width);
        let mut truth: Option<Vec<u32>> = None;
        for dev in devices(numerics) {
            let mut act = dev.new_act(n_rows, width);
            act.keep_values();
            let next = dev.load_weight(&[next.tensor()]).unwrap();
            let weights = dev.load_vector(&[weight.tensor()]).unwrap();
            dev.norm(&hidden(&dev, &x, width), &weights, 1e-5, &next, &rows_batch(n_rows), &mut act);
            for (i, (&got, &x_i)) in act.values().iter().zip(&x).enumerate() {
                let row = &x[i / width * width..][..width];
                let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
                let want = f64::from(x_i) / (mean + f64::from(1e-5f32)).sqrt() * f64::from(weight.value(0, i % width));
                prop_assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs() + 1e-30, "{got}, not {want}");
            }
            prop_assert_eq!(truth.get_or_insert_with(|| bits(act.values())), &bits(act.values()), "{}", dev.isa().name());
        }
    }

    #[test]
    fn gated_products_are_right(
        seed: u64,
        n_blocks in 1usize..3,
        n in prop::sample::select(vec![1usize, 17, 32, 64, 96, 160, 256]),
        n_rows in 1usize..40,
        types in (0..DTYPES.len(), 0..DTYPES.len(), prop::bool::weighted(0.8), 0..DTYPES.len()),
        f in prop::sample::select(vec![Activation::Silu, Activation::GeluTanh]),
        numerics in numerics(),
    ) {
        let rng = &mut Random(seed);
        let up_type = if types.2 { types.0 } else { types.1 };
        let k = width(n_blocks, &[DTYPES[types.0], DTYPES[up_type]]);
        let gate = Matrix::random(rng, DTYPES[types.0], n, k);
        let up = Matrix::random(rng, DTYPES[up_type], n, k);
        let next = Matrix::random(rng, if n % DTYPES[types.3].block_elements() == 0 && n % 32 == 0 { DTYPES[types.3] } else { DType::F32 }, 5, n);
        let x = random_rows(rng, n_rows * k);
        let batch = rows_batch(n_rows);
        let mut truth = None;
        for dev in devices(numerics) {
            let weight = dev.load_gate_up(&gate.tensor(), &up.tensor()).unwrap();
            let next_weight = dev.load_weight(&[next.tensor()]).unwrap();
            let ones = Matrix { dtype: DType::F32, n: 1, k, bytes: 0.1f32.to_le_bytes().repeat(k) };
            let (mut act, mut gated) = (dev.new_act(n_rows, k), dev.new_act(n_rows, n));
            act.keep_values();
            dev.norm(&hidden(&dev, &x, k), &dev.load_vector(&[ones.tensor()]).unwrap(), 1e-5, &weight, &batch, &mut act);
            let (mut scratch, mut out) = (dev.new_hidden(n_rows, 2 * n), dev.new_hidden(n_rows, 5));
            dev.gate_up(&act, &weight, f, &next_weight, &batch, &mut scratch, &mut gated);
            dev.linear(&gated, &next_weight, &batch, &mut out);
            let plain = bits(out.values());
            gated.keep_values();
            dev.gate_up(&act, &weight, f, &next_weight, &batch, &mut scratch, &mut gated);
            dev.linear(&gated, &next_weight, &batch, &mut out);
            prop_assert_eq!(bits(out.values()), plain, "it matters whether values are kept");
            for (i, &got) in gated.values().iter().enumerate() {
                let act = &act.values()[i / n * k..][..k];
                // Where the types differ both are computed from floats.
                let products = if gate.dtype == up.dtype || !numerics.has_int8_products() { [gate.product(numerics, i % n, act), up.product(numerics, i % n, act)] } else {
                    [&gate, &up].map(|m| (0..k).map(|c| f64::from(m.value(i % n, c)) * f64::from(act[c])).fold((0.0, 0.0), |s, t| (s.0 + t, s.1 + t.abs())))
                };
                let [(g, g_size), (u, u_size)] = products;
                let cubic = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
                let want = u * if f == Activation::Silu { g / (1.0 + (-g).exp()) } else { g / 2.0 * (1.0 + cubic.tanh()) };
                let tolerance = 4e-6 * (g_size * (u.abs() + 1.0) + u_size * (g.abs() + 1.0)) + 1e-6 * want.abs();
                prop_assert!((f64::from(got) - want).abs() <= tolerance, "{got}, not {want}");
            }
            for (i, &got) in out.values().iter().enumerate() {
                let (want, size) = next.product(numerics, i % 5, &gated.values()[i / 5 * n..][..n]);
                // AMX takes sums under 2^-126 for 0, the others don't.
                prop_assume!(size == 0.0 || size > 1e-36);
                prop_assert!((f64::from(got) - want).abs() <= 1e-5 * size, "{got}, not {want} (of terms {size})");
            }
            let got = (bits(gated.values()), bits(out.values()));
            prop_assert_eq!(truth.get_or_insert_with(|| got.clone()), &got, "{}", dev.isa().name());
        }
    }

    #[test]
    fn quantised_weights_in_bf16_are_their_floats(seed: u64, dtype in FLOATS.end..DTYPES.len(), n in 1usize..100, n_blocks in 1usize..5, n_tokens in 1usize..70) {
        let rng = &mut Random(seed);
        let k = width(n_blocks, &[DTYPES[dtype]]);
        let packed = Matrix::random(rng, DTYPES[dtype], n, k);
        let bytes = (0..n * k).flat_map(|i| packed.value(i / k, i % k).to_le_bytes()).collect();
        let floats = Matrix { dtype: DType::F32, n, k, bytes };
        let x = random_rows(rng, n_tokens * k);
        for dev in devices(Numerics::Bf16) {
            let [of_packed, of_floats] = [&packed, &floats].map(|matrix| bits(&project(&dev, &x, &[matrix.tensor()]).1));
            prop_assert_eq!(of_packed, of_floats, "{}", dev.isa().name());
        }
    }

    #[test]
    fn embeddings_are_the_files_values(seed: u64, dtype in 0..DTYPES.len(), n_vocab in 1usize..100, n_tokens in 1usize..30, numerics in numerics()) {
        let rng = &mut Random(seed);
        let k = width(2, &[DTYPES[dtype]]);
        let table = Matrix::random(rng, DTYPES[dtype], n_vocab, k);
        let mut batch = rows_batch(n_tokens);
        batch.tokens.fill_with(|| rng.below(n_vocab) as u32);
        for dev in devices(numerics) {
            let mut x = dev.new_hidden(n_tokens, k);
            dev.embed(&dev.load_weight(&[table.tensor()]).unwrap(), 1.0, &batch, &mut x);
            let want: Vec<_> = batch.tokens.iter().flat_map(|&t| (0..k).map(move |i| (t as usize, i))).map(|(t, i)| table.value(t, i)).collect();
            let want: Vec<_> = if numerics == Numerics::Bf16 { want.iter().map(|&x: &f32| bf16::from_f32(x).to_f32()).collect() } else { want };
            prop_assert_eq!(x.values(), &want[..]);
        }
    }
}

/// R1: every kernel switch (rows at once, unpacked panels, tiles) gives a row the bits it has alone.
#[test]
fn a_rows_bits_do_not_depend_on_how_many_rows_there_are() {
    let n = 100;
    for (seed, dtype) in DTYPES.into_iter().enumerate() {
        let k = if dtype.block_elements() == 256 { 768 } else { 576 };
        let rng = &mut Random(seed as u64);
        let matrix = Matrix::random(rng, dtype, n, k);
        let x = random_rows(rng, 257 * k);
        for dev in Numerics::ALL.into_iter().flat_map(devices) {
            let (_, all) = project(&dev, &x, &[matrix.tensor()]);
            let portable = dev.isa() == Isa::PORTABLE;
            let counts: &[usize] = if portable { &[1, 3, 7] } else { &[1, 2, 3, 4, 5, 6, 7, 12, 13, 63, 64, 65, 255, 256] };
            for &n_rows in counts {
                let first = rng.below(257 - n_rows + 1);
                let (_, some) = project(&dev, &x[first * k..][..n_rows * k], &[matrix.tensor()]);
                let want = bits(&all[first * n..][..n_rows * n]);
                assert!(
                    bits(&some) == want,
                    "{dtype:?} on {} {:?}: {n_rows} rows from {first} differ",
                    dev.isa().name(),
                    dev.numerics()
                );
            }
        }
    }
}

/// Where activations are too many for a cache, k comes in blocks and several panels' sums wait: more panels than fit in one share.
#[test]
fn rows_have_the_bits_they_have_alone_where_their_sums_wait() {
    let (n_rows, n, k) = (352, 3104, 1536);
    let rng = &mut Random(26);
    let matrix = Matrix::random(rng, DType::Q8_0, n, k);
    let x = random_rows(rng, n_rows * k);
    let fastest = Isa::available()[0];
    for n_threads in [1, 2] {
        let dev = CpuDevice::new(fastest, Numerics::Bf16, n_threads);
        let (_, all) = project(&dev, &x, &[matrix.tensor()]);
        for first in [0, 320] {
            let (_, some) = project(&dev, &x[first * k..][..32 * k], &[matrix.tensor()]);
            assert!(
                bits(&some) == bits(&all[first * n..][..32 * n]),
                "rows from {first}, {n_threads} threads, {}",
                fastest.name()
            );
        }
    }
}

#[test]
fn a_nan_or_an_infinity_reaches_its_own_rows_result_and_no_other() {
    let rng = &mut Random(5);
    for dtype in DTYPES {
        let k = width(2, &[dtype]);
        let matrix = Matrix::random(rng, dtype, 40, k);
        let mut x = random_rows(rng, 3 * k);
        for dev in Numerics::ALL.into_iter().flat_map(devices) {
            let clean = project(&dev, &x, &[matrix.tensor()]).1;
            for poison in [f32::NAN, -f32::NAN, f32::INFINITY] {
                let healthy = std::mem::replace(&mut x[k + 7], poison);
                let out = project(&dev, &x, &[matrix.tensor()]).1;
                x[k + 7] = healthy;
                assert!(out[40..80].iter().all(|y| y.is_nan()), "{dtype:?} on {}: {poison} was lost", dev.isa().name());
                assert_eq!(bits(&out[..40]), bits(&clean[..40]));
                assert_eq!(bits(&out[80..]), bits(&clean[80..]));
            }
        }
    }
}
