//! What the simple CUDA kernels, sampling and quantised linear layers compute, in the PTX interpreter: against plain formulas in
//! f64, and against the host's own draws.

use crate::cuda_machine::{Machine, Noise, UNMAPPED, assert_near, bytes, module, module_for};
use half::{bf16, f16};
use ptx::{Arg, Module};
use valar::device::batch::{Draw, HeadRow, LogitEdit, Shaping, Want, mask_words};
use valar::device::sample::{self, Scratch};

/// Rounding to bfloat16, and the last places of approximate functions.
pub(crate) const BF16: f64 = 0.004;

#[test]
fn embedding_takes_rows() {
    let (mut m, mut noise) = (Machine::new(), Noise(1));
    for width in [8, 1024, 1032] {
        let table = noise.bf16s(10 * width);
        // Given, and in the second and in the first row of what the step before has drawn, where nothing could be.
        let (given, ids) = ([9u32, 1 << 31 | 1, 1 << 31], [9u32, 4, 0]);
        let drawn = [u32::MAX, 5, 5, 4, 5, 5];
        let (ids_at, drawn_at, table_at, x) = (m.u32s(&given), m.u32s(&drawn), m.bf16s(&table), m.room(4 * 3 * width));
        let (drawn, n_words) = (Arg::U64(drawn_at), Arg::U32(3));
        let args = [Arg::U64(ids_at), drawn, n_words, Arg::U64(table_at), Arg::U64(x), Arg::U32(width as u32), Arg::F32(3.0)];
        m.run(&module("embed"), "embed_bf16", ((3, 1), 128, 0), &args);
        let want: Vec<f32> =
            ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).map(|v| 3.0 * v.to_f32()).collect();
        assert_eq!(m.read_f32s(x, 3 * width), want);
    }
}

#[test]
fn rows_are_gathered() {
    let (mut m, mut noise) = (Machine::new(), Noise(6));
    for width in [4, 512, 516] {
        let x = noise.f32s(5 * width);
        let rows = [4u32, 4, 0];
        let (rows_at, x_at, out) = (m.u32s(&rows), m.f32s(&x), m.room(4 * 3 * width));
        let args = [Arg::U64(rows_at), Arg::U64(x_at), Arg::U64(out), Arg::U32(width as u32)];
        m.run(&module("embed"), "gather_rows", ((3, 1), 128, 0), &args);
        let want: Vec<f32> = rows.iter().flat_map(|&row| &x[row as usize * width..][..width]).copied().collect();
        assert_eq!(m.read_f32s(out, 3 * width), want);
    }
}

/// Norms of rows, with and without a sum before: widths around what a round of threads takes.
#[test]
fn norms() {
    let (program, mut noise) = (module("norm"), Noise(2));
    for (width, rounds) in [(4usize, 1), (576, 1), (1024, 1), (1028, 4), (4096, 4), (4100, 8)] {
        for summed in [false, true] {
            let mut m = Machine::new();
            let (x, y, weight) = (noise.f32s(2 * width), noise.bf16s(2 * width), noise.f32s(width));
            let (x_at, y_at, weight_at) = (m.f32s(&x), m.bf16s(&y), m.f32s(&weight));
            let (x_again, out, ints, scales) = (m.f32s(&x), m.room(4 * width), m.room(2 * width), m.room(8));
            let y_or_none = if summed { y_at } else { 0 };
            let args = |x: u64, out: u64| {
                [x, y_or_none, weight_at, out, scales].map(Arg::U64).into_iter().chain([Arg::U32(width as u32), Arg::F32(1e-5)])
            };
            let plain: Vec<Arg> = args(x_at, out).collect();
            m.run(&program, &format!("add_norm_bf16_{rounds}"), ((2, 1), 256, 0), &plain);
            let quantised: Vec<Arg> = args(x_again, ints).collect();
            m.run(&program, &format!("add_norm_int8_{rounds}"), ((2, 1), 256, 0), &quantised);

            let sums: Vec<f64> = x.iter().zip(&y).map(|(x, y)| f64::from(*x) + if summed { y.to_f64() } else { 0.0 }).collect();
            let normed: Vec<f64> = sums.chunks(width).flat_map(|row| rms_norm(row, &weight)).collect();
            assert_near(m.read_f32s(x_at, 2 * width).into_iter().map(f64::from), &sums, 1e-6, 1e-7, "sums");
            assert_near(m.read_bf16s(out, 2 * width).into_iter().map(bf16::to_f64), &normed, BF16, 1e-6, "norm");
            let scales = m.read_f32s(scales, 2);
            let ints = m.read(ints, 2 * width);
            for (row, &scale) in scales.iter().enumerate() {
                let values = ints[row * width..][..width].iter().map(|&q| f64::from(q.cast_signed()) * f64::from(scale));
                assert_near(values, &normed[row * width..][..width], 0.0, 0.501 * f64::from(scale), "integers");
            }
        }
    }
}

/// The value of an e4m3: sign, 4 bits of exponent, 3 of mantissa.
fn e4m3(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let value = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
    if byte & 0x80 == 0 { value } else { -value }
}

/// Norms as floats of 8 bits with a scale for each row, which there are from compute capability 8.9 on.
#[test]
fn norms_as_floats_of_eight_bits() {
    let (program, mut noise) = (module_for("norm", "compute_89"), Noise(12));
    for (width, rounds) in [(576usize, 1), (1028, 4)] {
        let mut m = Machine::new();
        let (x, weight) = (noise.f32s(2 * width), noise.f32s(width));
        let (x_at, weight_at, out, scales) = (m.f32s(&x), m.f32s(&weight), m.room(2 * width), m.room(8));
        let args = [x_at, 0, weight_at, out, scales].map(Arg::U64).into_iter().chain([Arg::U32(width as u32), Arg::F32(1e-5)]);
        m.run(&program, &format!("add_norm_e4m3_{rounds}"), ((2, 1), 256, 0), &args.collect::<Vec<_>>());
        let (scales, floats) = (m.read_f32s(scales, 2), m.read(out, 2 * width));
        for ((row, floats), scale) in x.chunks(width).zip(floats.chunks(width)).zip(scales) {
            let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
            let (want, scale) = (rms_norm(&row, &weight), f64::from(scale));
            // Half of the last place: of 4 bits, or of the smallest step.
            assert_near(floats.iter().map(|q| e4m3(*q) * scale), &want, 1.01 / 16.0, scale / 1024.0, "floats");
            let largest = floats.iter().map(|q| e4m3(*q).abs()).fold(0.0, f64::max);
            assert_eq!(largest.to_bits(), 448f64.to_bits(), "the largest value has the largest float");
        }
    }
}

/// Rows as floats of 8 bits with a scale for each; a row of zeros, and one with a value that is no number.
#[test]
fn rows_as_floats_of_eight_bits() {
    let (program, mut noise) = (module_for("norm", "compute_89"), Noise(32));
    for (width, rounds) in [(96usize, 16), (2048, 16), (16400, 32)] {
        let mut m = Machine::new();
        let mut rows = noise.bf16s(4 * width);
        rows[2 * width..3 * width].fill(bf16::ZERO);
        rows[3 * width + 5] = bf16::NAN;
        let (y, out, scales) = (m.bf16s(&rows), m.room(4 * width), m.room(16));
        let args = [y, out, scales].map(Arg::U64).into_iter().chain([Arg::U32(width as u32)]);
        m.run(&program, &format!("quant_rows_e4m3_{rounds}"), ((4, 1), 256, 0), &args.collect::<Vec<_>>());
        let (scales, floats) = (m.read_f32s(scales, 4), m.read(out, 4 * width));
        for ((row, floats), &scale) in rows.chunks(width).zip(floats.chunks(width)).zip(&scales).take(3) {
            let scale = f64::from(scale);
            let want: Vec<f64> = row.iter().map(|x| x.to_f64()).collect();
            assert_near(floats.iter().map(|q| e4m3(*q) * scale), &want, 1.01 / 16.0, scale / 1024.0, "floats");
            let largest = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            assert!((scale * 448.0 - largest).abs() <= 1e-6 * largest, "{scale} for {largest}");
        }
        assert!(scales[3].is_nan(), "a row with a NaN has scale {}", scales[3]);
    }
}

/// Sums of products times the scales of their rows and columns; nothing past the rows and columns is touched.
#[test]
fn products_get_their_scales() {
    let (program, mut noise) = (module("scale"), Noise(33));
    for n in [16usize, 1024, 1040] {
        let (rows, columns) = (noise.f32s(3), noise.f32s(n));
        let scale = |i: usize| f64::from(rows[i / n] * columns[i % n]);
        let mut m = Machine::new();
        let (halves, floats, before) = (noise.bf16s(4 * n), noise.f32s(4 * n), noise.f32s(4 * n));
        let (rows_at, columns_at) = (m.f32s(&rows), m.f32s(&columns));
        let (halves_at, floats_at, waiting, sums_at) = (m.bf16s(&halves), m.f32s(&floats), m.f32s(&floats), m.f32s(&before));
        let grid = ((3, (n as u32).div_ceil(1024)), 256, 0);
        let mut run = |kernel: &str, pointers: &[u64]| {
            let args = pointers.iter().copied().map(Arg::U64).chain([rows_at, columns_at].map(Arg::U64));
            m.run(&program, kernel, grid, &args.chain([Arg::U32(n as u32)]).collect::<Vec<_>>());
        };
        run("scale_bf16", &[halves_at]);
        run("scale_f32", &[floats_at]);
        run("scale_add", &[sums_at, waiting]);
        let (halves_now, floats_now, sums) =
            (m.read_bf16s(halves_at, 4 * n), m.read_f32s(floats_at, 4 * n), m.read_f32s(sums_at, 4 * n));
        let want: Vec<f64> = (0..3 * n).map(|i| halves[i].to_f64() * scale(i)).collect();
        assert_near(halves_now[..3 * n].iter().map(|x| x.to_f64()), &want, BF16, 1e-9, "bfloat16");
        let want: Vec<f64> = (0..3 * n).map(|i| f64::from(floats[i]) * scale(i)).collect();
        assert_near(floats_now[..3 * n].iter().map(|&x| f64::from(x)), &want, 1e-6, 1e-12, "f32");
        let want: Vec<f64> = want.iter().zip(&before).map(|(product, before)| product + f64::from(*before)).collect();
        assert_near(sums[..3 * n].iter().map(|&x| f64::from(x)), &want, 1e-6, 1e-7, "sums");
        assert_eq!(
            (&halves_now[3 * n..], &floats_now[3 * n..], &sums[3 * n..]),
            (&halves[3 * n..], &floats[3 * n..], &before[3 * n..])
        );
    }
}

fn rms_norm(row: &[f64], weight: &[f32]) -> Vec<f64> {
    let inverse = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + 1e-5).sqrt();
    row.iter().zip(weight).map(|(x, w)| x * inverse * f64::from(*w)).collect()
}

#[test]
fn gates() {
    let (program, mut noise) = (module("gate"), Noise(3));
    for width in [8usize, 2048, 2056] {
        let mut m = Machine::new();
        let values: Vec<bf16> = (0..4 * width).map(|_| bf16::from_f32(8.0 * noise.next())).collect();
        let (at, out) = (m.bf16s(&values), m.room(4 * width));
        let args = [Arg::U64(at), Arg::U64(out), Arg::U32(width as u32)];
        for (kernel, f) in [("gate_silu", silu as fn(f64) -> f64), ("gate_gelu", gelu)] {
            m.run(&program, kernel, ((2, (width as u32).div_ceil(2048)), 256, 0), &args);
            let rows = values.chunks(2 * width).map(|row| row.split_at(width));
            let want: Vec<f64> =
                rows.flat_map(|(gate, up)| gate.iter().zip(up).map(|(g, u)| f(g.to_f64()) * u.to_f64())).collect();
            assert_near(m.read_bf16s(out, 2 * width).into_iter().map(bf16::to_f64), &want, BF16, 1e-5, kernel);
        }
    }
}

/// All bfloat16 to f16, all f16 to bfloat16, where they were; what does not fit is infinite, NaN stays NaN.
#[test]
fn values_are_cast() {
    let (program, all) = (module("cast"), (0..=u16::MAX).collect::<Vec<u16>>());
    let cast = |kernel: &str, to_other: bool| {
        let mut m = Machine::new();
        let x = m.put(&bytes(all.iter().map(|bits| bits.to_le_bytes())));
        let out = if to_other { m.room(2 << 16) } else { x };
        // A block more than there are values for.
        m.run(&program, kernel, ((33, 1), 256, 0), &[Arg::U64(x), Arg::U64(out), Arg::U32(1 << 16)]);
        m.read(out, 2 << 16).as_chunks().0.iter().map(|bits| u16::from_le_bytes(*bits)).collect::<Vec<u16>>()
    };
    for (bits, got) in all.iter().zip(cast("bf16_to_f16", true)) {
        let (got, want) = (f16::from_bits(got), f16::from_f32(bf16::from_bits(*bits).to_f32()));
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got}, not {want}");
    }
    for (bits, got) in all.iter().zip(cast("f16_to_bf16", false)) {
        let (got, want) = (bf16::from_bits(got), bf16::from_f32(f16::from_bits(*bits).to_f32()));
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got}, not {want}");
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
}

/// Every slot and element: bias, norms of heads, both ways of pairing, part of a head rotated, a token that is stored nowhere.
#[test]
fn qkv_is_finished() {
    let program = module("qkv");
    for dim in [64usize, 80, 96, 128, 256] {
        for (interleaved, n_pairs, normed) in [(0, dim / 2, true), (1, dim / 2, false), (0, dim / 4, false), (1, dim / 4, true)] {
            finish_qkv(&program, dim, interleaved, n_pairs, normed);
        }
    }
}

fn finish_qkv(program: &Module, dim: usize, interleaved: u32, n_pairs: usize, normed: bool) {
    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    let (mut m, mut noise) = (Machine::new(), Noise(dim as u32));
    let (width, positions, slots) = ((HEADS + 2 * KV_HEADS) * dim, [0u32, 5, 17], [3u32, UNMAPPED, 16 * 2 + 7]);
    let (qkv, bias, norms) = (noise.bf16s(3 * width), noise.f32s(width), [noise.f32s(dim), noise.f32s(dim)]);
    let angle = |position: usize, pair: usize| position as f64 * 10_000f64.powf(-(pair as f64) / n_pairs as f64);
    let turns: Vec<f32> = (0..20 * n_pairs)
        .flat_map(|i| {
            let (sin, cos) = angle(i / n_pairs, i % n_pairs).sin_cos();
            [cos as f32, sin as f32]
        })
        .collect();
    let marked = vec![bf16::from_bits(0x1234); 3 * KV_HEADS * 16 * dim];
    let pointers = [
        m.bf16s(&qkv),
        if normed { m.f32s(&bias) } else { 0 },
        if normed { m.f32s(&norms[0]) } else { 0 },
        if normed { m.f32s(&norms[1]) } else { 0 },
        m.f32s(&turns),
        m.u32s(&positions),
        m.u32s(&slots),
        m.room(2 * 3 * HEADS * dim),
        m.bf16s(&marked),
        m.bf16s(&marked),
    ];
    let mut sizes = bytes([HEADS as u32, KV_HEADS as u32, dim as u32, n_pairs as u32, interleaved].map(u32::to_le_bytes));
    sizes.extend(1e-5f32.to_le_bytes());
    let args: Vec<Arg> = pointers.map(Arg::U64).into_iter().chain([Arg::Bytes(sizes)]).collect();
    m.run(program, "finish_qkv", ((3, 2), 128, 0), &args);
    let got = (
        m.read_bf16s(pointers[7], 3 * HEADS * dim),
        m.read_bf16s(pointers[8], marked.len()),
        m.read_bf16s(pointers[9], marked.len()),
    );

    let mut n_written = [0, 0];
    for (token, head) in (0..3).flat_map(|token| (0..HEADS + 2 * KV_HEADS).map(move |head| (token, head))) {
        let added = |i: usize| if normed { f64::from(bias[head * dim + i]) } else { 0.0 };
        let mut want: Vec<f64> = (0..dim).map(|i| qkv[token * width + head * dim + i].to_f64() + added(i)).collect();
        let kind = if head < HEADS { 0 } else { 1 + usize::from(head >= HEADS + KV_HEADS) };
        if kind < 2 {
            if normed {
                want = rms_norm(&want, &norms[kind]);
            }
            for pair in 0..n_pairs {
                let (a, b) = if interleaved == 1 { (2 * pair, 2 * pair + 1) } else { (pair, pair + n_pairs) };
                let (sin, cos) = angle(positions[token] as usize, pair).sin_cos();
                (want[a], want[b]) = (want[a] * cos - want[b] * sin, want[a] * sin + want[b] * cos);
            }
        }
        let (values, at) = match (kind, slots[token] as usize) {
            (0, _) => (&got.0, (token * HEADS + head) * dim),
            (_, slot) if slot == UNMAPPED as usize => continue,
            (kind, slot) => {
                n_written[kind - 1] += dim;
                let kv_head = (head - HEADS) % KV_HEADS;
                (if kind == 1 { &got.1 } else { &got.2 }, ((slot / 16 * KV_HEADS + kv_head) * 16 + slot % 16) * dim)
            }
        };
        assert_near(values[at..at + dim].iter().map(|x| x.to_f64()), &want, BF16, 2e-5, &format!("head {head} of {dim}"));
    }
    // Nothing else was touched.
    for (cells, n_written) in [&got.1, &got.2].into_iter().zip(n_written) {
        let n_changed = cells.iter().filter(|x| x.to_bits() != 0x1234).count();
        assert!(n_changed <= n_written && n_changed > n_written / 2, "{n_changed} cells changed, {n_written} were written");
    }
}

/// In order: the second copies what the first wrote.
#[test]
fn blocks_are_copied_in_order() {
    let (program, mut noise) = (module("copy"), Noise(4));
    for dim in [64usize, 80, 256] {
        let mut m = Machine::new();
        let copies = [[0u32, 1, 5], [1, 4, 3], [2, 3, 16]];
        let mut cells = [noise.bf16s(5 * 3 * 16 * dim), noise.bf16s(5 * 3 * 16 * dim)];
        let at = [m.bf16s(&cells[0]), m.bf16s(&cells[1])];
        let list = m.u32s(copies.as_flattened());
        let args = [Arg::U64(at[0]), Arg::U64(at[1]), Arg::U64(list), Arg::U32(3), Arg::U32(dim as u32)];
        m.run(&program, "copy_blocks", ((3, 2), 256, 0), &args);
        for (cells, at) in cells.iter_mut().zip(at) {
            for ([src, dst, n_slots], head) in copies.iter().flat_map(|copy| (0..3).map(move |head| (copy, head))) {
                let start = |block: u32| (block as usize * 3 + head) * 16 * dim;
                cells.copy_within(start(*src)..start(*src) + *n_slots as usize * dim, start(*dst));
            }
            assert_eq!(&m.read_bf16s(at, cells.len()), cells);
        }
    }
}

/// One row of logits, and what is to be done with it.
struct Case {
    logits: Vec<f32>,
    row: HeadRow,
    edits: Vec<LogitEdit>,
    mask: Option<Vec<u32>>,
}

fn cases(n_vocab: usize) -> Vec<Case> {
    let mut noise = Noise(n_vocab as u32);
    let mut cases = Vec::new();
    for i in 0..48usize {
        let mut logits: Vec<f32> = (0..n_vocab).map(|_| 12.0 * noise.next()).collect();
        if i % 7 == 0 {
            // Ties.
            for logit in &mut logits {
                *logit = logit.round();
            }
        }
        let draw = Draw {
            temperature: [0.0, 0.7, 1.0, 2.5][i % 4],
            top_p: [1.0, 0.9, 0.3][i % 3],
            top_k: [0, 1, 40, n_vocab as u32][i / 2 % 4],
            min_p: [0.0, 0.0, 0.05][i / 3 % 3],
            seed: (i as u64).wrapping_mul(0x1234_5678_9abc_def1),
            choice: i as u32 % 3,
            position: i as u32,
            logprob: i % 2 == 0,
        };
        let want = if i % 10 == 9 { Want::Score { token: n_vocab as u32 / 2 } } else { Want::Draw(draw) };
        let edit = |token| LogitEdit { token, penalty: 1.3, bias: -0.5 };
        let edits = if i % 4 == 1 { (0..n_vocab as u32).step_by(3).take(9).map(edit).collect() } else { Vec::new() };
        let word = |_| (noise.next().to_bits() << 7) | 1;
        let mask = (i % 6 == 5).then(|| (0..mask_words(n_vocab)).map(word).collect());
        cases.push(Case { logits, row: HeadRow::new(0, want, if i % 5 == 0 { 20 } else { 0 }), edits, mask });
    }
    cases
}

/// The fields of struct Want of sample.cu.
fn want_bytes(case: &Case) -> Vec<u8> {
    let (draw, score) = match case.row.want {
        Want::Draw(draw) => (draw, UNMAPPED),
        Want::Score { token } => {
            let none =
                Draw { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0, choice: 0, position: 0, logprob: true };
            (none, token)
        }
    };
    let mut out = bytes([draw.temperature, draw.top_p, draw.min_p].map(f32::to_le_bytes));
    out.extend(draw.top_k.to_le_bytes());
    out.extend(draw.seed.to_le_bytes());
    let mask = if case.mask.is_some() { 0 } else { UNMAPPED };
    let (n_top, n_edits) = (u32::from(case.row.n_top), case.edits.len() as u32);
    out.extend(bytes(
        [draw.choice, draw.position, score, u32::from(draw.logprob), n_top, 0, n_edits, mask].map(u32::to_le_bytes),
    ));
    out
}

/// The kernel draws the tokens that the host draws; log-probabilities agree to 4e-6 (sums are rounded differently).
#[test]
fn draws_are_those_of_the_host() {
    let program = module("sample");
    for n_vocab in [5, 33, 1000, 5000] {
        for (i, case) in cases(n_vocab).iter().enumerate() {
            let mut m = Machine::new();
            let edits = bytes(
                case.edits
                    .iter()
                    .map(|e| e.token.to_le_bytes())
                    .zip(&case.edits)
                    .flat_map(|(token, e)| [token, e.penalty.to_le_bytes(), e.bias.to_le_bytes()]),
            );
            let (logits, wants) = (m.f32s(&case.logits), m.put(&want_bytes(case)));
            let (edits, masks) = (m.put(&edits), m.u32s(case.mask.as_deref().unwrap_or(&[])));
            let (kept, out) = (m.room(4 * case.edits.len()), m.room(172));
            let mut args = vec![Arg::U64(logits), Arg::U32(n_vocab as u32), Arg::F32(0.0)];
            args.extend([wants, edits, masks, kept, out].map(Arg::U64));
            m.run(&program, "sample", ((1, 1), 512, 0), &args);

            let shaping = Shaping { edits: &case.edits, mask: case.mask.as_deref() };
            let want = sample::draw(&mut case.logits.clone(), &case.row, shaping, &mut Scratch::new(n_vocab));
            let head = m.read(out, 12);
            let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            assert_eq!((word(0), word(8)), (want.token, u32::from(want.n_top)), "row {i} of {n_vocab}");
            let logprob = f32::from_bits(word(4));
            let near = (logprob - want.logprob).abs() < 4e-6 || logprob.to_bits() == want.logprob.to_bits();
            assert!(near || (logprob.is_nan() && want.logprob.is_nan()), "{logprob}, not {}", want.logprob);
            let n_top = usize::from(want.n_top);
            let tokens = m.read(out + 12, 4 * n_top);
            let tokens = tokens.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            assert!(tokens.eq(want.top[..n_top].iter().map(|top| top.0)), "top tokens of row {i} of {n_vocab}");
        }
    }
}

/// Packs weights as `linear_q.cu` says: integers q `[n][k]`, scales and minimums, or two scales, `[n][k / 32]`.
pub(crate) fn packed(bits: usize, (n, k): (usize, usize), q: &[i32], scales: &[(f32, f32)]) -> (Vec<u8>, Vec<f32>) {
    let (n_padded, k_padded) = (n.next_multiple_of(64), k.next_multiple_of(64));
    let stored = if bits == 4 { 4 } else { 8 };
    let mut out = vec![0u8; n_padded * k_padded * stored / 8];
    let mut out_scales = vec![0.0; n_padded * k_padded / 32 * 2];
    for (row, column) in (0..n).flat_map(|row| (0..k).map(move |column| (row, column))) {
        let within = column % 16;
        let lane = 4 * (row % 8) + within % 8 / 2;
        let value = 8 * (column % 64 / 16) + 4 * (row % 16 / 8) + within % 2 + within / 8 * 2;
        let step = row / 16 * (k_padded / 64) + column / 64;
        let integer = q[row * k + column] as u8;
        if bits == 4 {
            out[(step * 32 + lane) * 16 + value / 2] |= integer << (value % 2 * 4);
        } else {
            out[((step * 2 + value / 16) * 32 + lane) * 16 + value % 16] = integer;
        }
        let group = (row / 16 * (k_padded / 32) + column / 32) * 16 + row % 16;
        let (scale, minimum) = scales[row * k.div_ceil(32) + column / 32];
        (out_scales[2 * group], out_scales[2 * group + 1]) = (scale, minimum);
    }
    (out, out_scales)
}

/// The value of an integer in some column, with a scale and a minimum, or two scales.
pub(crate) fn weight_of(bits: usize, q: i32, (first, second): (f32, f32), column: usize) -> f64 {
    let q = q as f32;
    let value = match (bits, column % 32 / 16) {
        (6, 0) => q * first,
        (6, _) => q * second,
        _ => q.mul_add(first, second),
    };
    bf16::from_f32(value).to_f64()
}

/// Near the reference, and the same bits whatever rows a block has.
#[test]
fn quantised_linear_layers() {
    let (program, mut noise) = (module("linear_q"), Noise(5));
    for bits in [4usize, 8, 6] {
        for (m_rows, n, k) in [(1usize, 64usize, 64usize), (16, 72, 96), (17, 136, 200), (65, 33, 320)] {
            let most = if bits == 4 { 7.99 } else { 127.0 };
            let shift = if bits == 4 { 1.0 } else { 0.0 };
            let q: Vec<i32> = (0..n * k).map(|_| ((noise.next() + shift) * most) as i32).collect();
            let scales: Vec<(f32, f32)> = (0..n * k.div_ceil(32)).map(|_| (0.1 * noise.next(), 0.3 * noise.next())).collect();
            let x = noise.bf16s(m_rows * k);
            let (weights, packed_scales) = packed(bits, (n, k), &q, &scales);
            let mut m = Machine::new();
            let (x_at, weights, packed_scales) = (m.bf16s(&x), m.put(&weights), m.f32s(&packed_scales));
            let mut results = Vec::new();
            for tiles in [1u32, 4] {
                let out = m.room(2 * m_rows * n);
                let sizes = Arg::Bytes(bytes([m_rows, n, k].map(|v| (v as u32).to_le_bytes())));
                let args = [Arg::U64(x_at), Arg::U64(weights), Arg::U64(packed_scales), Arg::U64(out), sizes];
                let grid = ((n as u32).div_ceil(64), (m_rows as u32).div_ceil(16 * tiles));
                m.run(&program, &format!("linear_q{bits}_bf16_{tiles}"), (grid, 128, 0), &args);
                results.push(m.read_bf16s(out, m_rows * n));
            }
            let weight = |row: usize, column: usize| {
                let (scale, minimum) = scales[row * k.div_ceil(32) + column / 32];
                weight_of(bits, q[row * k + column], (scale, minimum), column)
            };
            let product = |i: usize| (0..k).map(|c| x[i / n * k + c].to_f64() * weight(i % n, c)).sum::<f64>();
            let want: Vec<f64> = (0..m_rows * n).map(product).collect();
            assert_near(results[0].iter().map(|x| x.to_f64()), &want, BF16, 1e-3, "linear");
            assert!(results[0].iter().zip(&results[1]).all(|(a, b)| a.to_bits() == b.to_bits()), "rows of a block change bits");
        }
    }
}
