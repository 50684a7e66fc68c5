//! The CPU device's rope, cache and attention against plain arithmetic in f64, and against itself: any mix, order and
//! chunking of sequences, any instruction set, the same bits.

use crate::conformance::{Matrix, Random, bits, devices, numerics};
use half::{bf16, f16};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use valar::device::batch::{Batch, BatchSeq, BlockCopy};
use valar::device::cpu::{Cache, CpuDevice, Isa, Kv, Numerics, Vector};
use valar::device::{AttentionSpec, BLOCK_TOKENS, Device, HeadNorms, QkvExtra, RopeStyle};
use valar::tensor::DType;

const N_BLOCKS: usize = 320;
const EPS: f32 = 1e-5;

/// Sequences of random q, k and v.
struct Case {
    spec: AttentionSpec,
    /// Of q, k and v.
    bias: Option<Matrix>,
    /// Of the heads of q and of k.
    norms: Option<[Matrix; 2]>,
    /// Per sequence, `[positions][q, k, v]`
    seqs: Vec<Vec<Vec<f32>>>,
    /// Consumes the attention's integers (or floats), so that a test sees both forms.
    next: Matrix,
}

/// A head as integers with one scale, and back.
fn as_ints(head: &[f64]) -> Vec<f64> {
    let amax = head.iter().fold(0.0f32, |max, &x| max.max((x as f32).abs()));
    let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
    head.iter().map(|&x| f64::from((x as f32 * inverse).round_ties_even()) * f64::from(amax / 127.0)).collect()
}

/// All devices, with keys and values kept in that way.
fn devices_with(numerics: Numerics, kv: Kv) -> impl Iterator<Item = CpuDevice> {
    devices(numerics).into_iter().map(move |dev| dev.with_kv(kv))
}

/// All numbers that attention is computed in and kept in.
fn all_numbers() -> impl Iterator<Item = (Numerics, Kv)> {
    Numerics::ALL.into_iter().flat_map(|numerics| Kv::ALL.map(|kv| (numerics, kv)))
}

/// What runs at once: (sequence, positions of it) in order, and the copies before attention.
type Step = (Vec<(usize, Range<usize>)>, Vec<BlockCopy>);

/// What a run leaves: per sequence and position, the attention's values and the next weight's products; the keys and
/// values in the sequence's slots.
#[derive(PartialEq)]
struct Trace {
    values: Vec<Vec<Vec<u32>>>,
    products: Vec<Vec<Vec<u32>>>,
    slots: Vec<Vec<u16>>,
}

impl Case {
    fn random(rng: &mut Random, n_kv_heads: usize, group: usize, head_dim: usize, lengths: &[usize]) -> Self {
        let n_heads = n_kv_heads * group;
        // Now and then only a part of a head is rotated.
        let n_pairs = if rng.below(3) == 0 { head_dim.div_ceil(4) } else { head_dim / 2 };
        let spec = AttentionSpec {
            n_heads,
            n_kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            soft_cap: [None, None, Some(3.0)][rng.below(3)],
            window: [None, Some(1 + rng.below(20)), Some(1 + rng.below(150))][rng.below(3)],
            rope_style: [RopeStyle::Interleaved, RopeStyle::Halves][rng.below(2)],
            rope_freqs: (0..n_pairs).map(|i| 10000f32.powf(-(i as f32) / n_pairs as f32)).collect(),
            rope_scale: [1.0, 1.0, 1.2][rng.below(3)],
        };
        let width = (n_heads + 2 * n_kv_heads) * head_dim;
        let mut row = |_| (0..width).map(|_| rng.float() * 3.0).collect();
        let seqs = lengths.iter().map(|&n| (0..n).map(&mut row).collect()).collect();
        let k = n_heads * head_dim;
        let next = Matrix::random(rng, if k.is_multiple_of(32) { DType::Q8_0 } else { DType::F32 }, 3, k);
        let bias = (rng.below(2) == 0).then(|| Matrix::random(rng, DType::F32, 1, width));
        let norms = (rng.below(2) == 0).then(|| [(); 2].map(|()| Matrix::random(rng, DType::F32, 1, head_dim)));
        Self { spec, bias, norms, seqs, next }
    }

    /// What is done to q, k and v, on a device.
    fn extra(&self, dev: &CpuDevice) -> QkvExtra<Vector> {
        let vector = |m: &Matrix| dev.load_vector(&[m.tensor()]).expect("a plain vector");
        let norms = self.norms.as_ref().map(|[q, k]| HeadNorms { q: vector(q), k: vector(k), eps: EPS });
        QkvExtra { bias: self.bias.as_ref().map(vector), norms }
    }

    /// A head with its bias and norm, in f64. `head` counts the heads of q, then k, then v.
    fn finished(&self, seq: usize, position: usize, head: usize) -> Vec<f64> {
        let AttentionSpec { n_heads, n_kv_heads, head_dim, .. } = self.spec;
        let row = &self.seqs[seq][position];
        let with_bias = |i: usize| f64::from(row[i]) + self.bias.as_ref().map_or(0.0, |bias| f64::from(bias.value(0, i)));
        let values: Vec<f64> = (head * head_dim..(head + 1) * head_dim).map(with_bias).collect();
        let Some(norms) = self.norms.as_ref().filter(|_| head < n_heads + n_kv_heads) else { return values };
        let norm = &norms[usize::from(head >= n_heads)];
        let mean = values.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
        (0..head_dim).map(|i| values[i] / (mean + f64::from(EPS)).sqrt() * f64::from(norm.value(0, i))).collect()
    }

    fn row_width(&self) -> usize {
        (self.spec.n_heads + 2 * self.spec.n_kv_heads) * self.spec.head_dim
    }

    /// The rows of one position in f64: rotated q per head, and k and v per kv head as the cache keeps them.
    fn stored(&self, (numerics, kv): (Numerics, Kv), seq: usize, position: usize) -> [Vec<Vec<f64>>; 3] {
        let AttentionSpec { n_heads, n_kv_heads, rope_scale, .. } = self.spec;
        let n_pairs = self.spec.rope_freqs.len();
        let heads: Vec<Vec<f64>> = (0..n_heads + 2 * n_kv_heads).map(|head| self.finished(seq, position, head)).collect();
        let rotate = |head: &Vec<f64>| {
            let mut out = head.clone();
            for (i, &freq) in self.spec.rope_freqs.iter().enumerate() {
                let (a, b) = match self.spec.rope_style {
                    RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                    RopeStyle::Halves => (i, i + n_pairs),
                };
                let (sin, cos) = (position as f64 * f64::from(freq)).sin_cos();
                let (sin, cos) = (sin * f64::from(rope_scale), cos * f64::from(rope_scale));
                (out[a], out[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
            out
        };
        let round = |x| if numerics.has_bf16_cache() { bf16::from_f64(x).to_f64() } else { f16::from_f64(x).to_f64() };
        let half = |head: Vec<f64>| head.into_iter().map(round).collect::<Vec<f64>>();
        let q = heads[..n_heads].iter().map(rotate);
        let q = q.map(|head| if numerics.has_bf16_cache() { half(head) } else { head }).collect();
        let kept = |head: Vec<f64>| match kv {
            Kv::Floats => half(head),
            Kv::Int8 => {
                let head = as_ints(&head);
                if numerics.has_bf16_cache() { half(head) } else { head }
            }
        };
        let k = heads[n_heads..n_heads + n_kv_heads].iter().map(rotate).map(kept).collect();
        [q, k, heads[n_heads + n_kv_heads..].iter().cloned().map(kept).collect()]
    }

    /// The attention of one sequence in f64, `[positions][n_heads · head_dim]`.
    fn expected(&self, numbers: (Numerics, Kv), seq: usize) -> Vec<Vec<f64>> {
        let AttentionSpec { n_heads, n_kv_heads, head_dim, scale, .. } = self.spec;
        let stored: Vec<_> = (0..self.seqs[seq].len()).map(|position| self.stored(numbers, seq, position)).collect();
        let row = |position: usize| {
            let mut row = Vec::new();
            for head in 0..n_heads {
                let kv_head = head / (n_heads / n_kv_heads);
                let dot = |k: &[f64]| stored[position][0][head].iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                let cap = |score: f64| self.spec.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                let first = self.spec.window.map_or(0, |window| (position + 1).saturating_sub(window));
                let seen = &stored[first..=position];
                let scores: Vec<f64> = seen.iter().map(|s| cap(dot(&s[1][kv_head]) * f64::from(scale))).collect();
                let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                row.extend(
                    (0..head_dim).map(|i| weights.iter().zip(seen).map(|(w, s)| w * s[2][kv_head][i]).sum::<f64>() / total),
                );
            }
            row
        };
        (0..stored.len()).map(row).collect()
    }

    /// Runs steps, in blocks named by `tables`.
    fn run(&self, dev: &CpuDevice, tables: &[Vec<u32>], steps: &[Step]) -> Trace {
        let width = self.row_width();
        let (n_heads, head_dim) = (self.spec.n_heads, self.spec.head_dim);
        let next = dev.load_weight(&[self.next.tensor()]).expect("the tensor is well-formed");
        let mut cache = dev.new_cache(&self.spec, N_BLOCKS);
        // Garbage in every slot: none that was not written may show.
        let garbage = if dev.numerics().has_bf16_cache() { bf16::NAN.to_bits() } else { f16::NAN.to_bits() };
        cache.cells_mut().fill(garbage);
        cache.scales_mut().fill(f32::NAN);
        let mut trace = Trace {
            values: self.seqs.iter().map(|seq| vec![Vec::new(); seq.len()]).collect(),
            products: self.seqs.iter().map(|seq| vec![Vec::new(); seq.len()]).collect(),
            slots: Vec::new(),
        };
        for (step, copies) in steps {
            let mut batch = Batch { copies: copies.clone(), ..Batch::default() };
            let mut values = Vec::new();
            for (seq, positions) in step {
                batch.seqs.push(BatchSeq {
                    token_start: batch.tokens.len() as u32,
                    n_tokens: positions.len() as u32,
                    first_position: positions.start as u32,
                    table_start: batch.block_tables.len() as u32,
                    n_blocks: tables[*seq].len() as u32,
                });
                batch.block_tables.extend(&tables[*seq]);
                for position in positions.clone() {
                    batch.tokens.push(0);
                    batch.positions.push(position as u32);
                    values.extend(&self.seqs[*seq][position]);
                }
            }
            batch.check(N_BLOCKS, 1);
            let n_tokens = batch.tokens.len();
            let mut qkv = dev.new_hidden(n_tokens, width);
            qkv.values_mut().copy_from_slice(&values);
            let (mut act, mut out) = (dev.new_act(n_tokens, n_heads * head_dim), dev.new_hidden(n_tokens, 3));
            dev.finish_qkv(&mut qkv, &self.extra(dev), &self.spec, &batch, &mut cache);
            dev.attention(&qkv, &self.spec, &cache, &next, &batch, &mut act);
            dev.linear(&act, &next, &batch, &mut out);
            let plain = bits(out.values());
            act.keep_values();
            dev.attention(&qkv, &self.spec, &cache, &next, &batch, &mut act);
            dev.linear(&act, &next, &batch, &mut out);
            assert_eq!(bits(out.values()), plain, "it matters whether values are kept");
            let rows = act.values().chunks(n_heads * head_dim).zip(out.values().chunks(3));
            let places = step.iter().flat_map(|(seq, positions)| positions.clone().map(|p| (*seq, p)));
            for ((seq, position), (values, products)) in places.zip(rows) {
                trace.values[seq][position] = bits(values);
                trace.products[seq][position] = bits(products);
            }
        }
        trace.slots = tables.iter().zip(&self.seqs).map(|(table, seq)| self.slots(&cache, table, seq.len())).collect();
        trace
    }

    /// What a sequence's slots hold, keys and values of each position.
    fn slots(&self, cache: &Cache, table: &[u32], n: usize) -> Vec<u16> {
        let slot = |position: usize, head| cache.slot(table[position / BLOCK_TOKENS], position % BLOCK_TOKENS, head);
        let heads = (0..n).flat_map(|position| (0..self.spec.n_kv_heads).map(move |head| (position, head)));
        heads.flat_map(|(position, head)| <[Vec<u16>; 2]>::from(slot(position, head)).concat()).collect()
    }

    /// Each sequence alone, in one chunk, in blocks that lie in order.
    fn run_alone(&self, dev: &CpuDevice) -> Trace {
        let mut first = 0;
        let tables: Vec<Vec<u32>> = self
            .seqs
            .iter()
            .map(|seq| {
                let start = first;
                first += seq.len().div_ceil(BLOCK_TOKENS) as u32;
                (start..first).collect()
            })
            .collect();
        let steps: Vec<_> = self.seqs.iter().enumerate().map(|(i, seq)| (vec![(i, 0..seq.len())], vec![])).collect();
        self.run(dev, &tables, &steps)
    }

    /// All sequences together, in random chunks (single tokens among them, as in decoding) and scattered blocks.
    fn run_mixed(&self, dev: &CpuDevice, rng: &mut Random) -> Trace {
        let mut blocks: Vec<u32> = (0..N_BLOCKS as u32).collect();
        (1..N_BLOCKS).rev().for_each(|i| blocks.swap(i, rng.below(i + 1)));
        // A table may name more blocks than the sequence has reached: they are not read.
        let tables: Vec<_> =
            self.seqs.iter().map(|seq| blocks.split_off(blocks.len() - seq.len().div_ceil(BLOCK_TOKENS) - 1)).collect();
        let mut n_done = vec![0; self.seqs.len()];
        let mut steps = Vec::new();
        while n_done.iter().zip(&self.seqs).any(|(&n, seq)| n < seq.len()) {
            let mut step = Vec::new();
            for (i, seq) in self.seqs.iter().enumerate() {
                let n = [1, 2, 5, 17, 70][rng.below(5)].min(seq.len() - n_done[i]);
                if n > 0 && rng.below(3) > 0 {
                    step.push((i, n_done[i]..n_done[i] + n));
                    n_done[i] += n;
                }
            }
            (1..step.len()).rev().for_each(|i| step.swap(i, rng.below(i + 1)));
            if !step.is_empty() {
                steps.push((step, vec![]));
            }
        }
        self.run(dev, &tables, &steps)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attention_is_right_and_the_same_for_every_mix(
        seed: u64,
        heads in (1usize..4, 1usize..5),
        head_dim in prop::sample::select(vec![2usize, 16, 20, 32, 64, 80, 96, 128]),
        lengths in prop::collection::vec(1usize..90, 1..4),
        long in prop::sample::select(vec![1usize, 15, 16, 17, 63, 64, 65, 128, 129, 200]),
        numerics in numerics(),
        kv in prop::sample::select(Kv::ALL.to_vec()),
    ) {
        let rng = &mut Random(seed);
        let lengths = [&lengths[..], &[long]].concat();
        let case = Case::random(rng, heads.0, heads.1, head_dim, &lengths);
        // A machine whose dot products are its own says so in its fingerprint.
        let mut truths = BTreeMap::new();
        for dev in devices_with(numerics, kv) {
            let alone = case.run_alone(&dev);
            prop_assert!(case.run_mixed(&dev, rng) == alone, "{}: another mix, other bits", dev.isa().name());
            let same = truths.entry(dev.fingerprint()).or_insert_with(|| case.run_alone(&dev)) == &alone;
            prop_assert!(same, "{} differs from portable", dev.isa().name());
        }
        for (seq, rows) in truths.values().flat_map(|truth| truth.values.iter().enumerate()) {
            for (position, (got, want)) in rows.iter().zip(case.expected((numerics, kv), seq)).enumerate() {
                for (&got, want) in got.iter().zip(want) {
                    let got = f64::from(f32::from_bits(got));
                    // A key or value whose exact value lies between two halves may round to either; probabilities are
                    // rounded to bfloat16 too, which `expected` leaves out.
                    // (The steps between integers are wider.)
                    let tolerance = if kv == Kv::Int8 { 8e-2 } else if numerics.has_bf16_cache() { 4e-2 } else { 4e-3 };
                    prop_assert!((got - want).abs() <= tolerance, "sequence {seq}, position {position}: {got}, not {want}");
                }
            }
        }
    }
}

/// Decoding sequences go together, a whole group of heads of each, and fold the tiles they share once: each gets the bits it
/// has alone.
#[test]
fn sequences_that_decode_together_have_the_bits_they_have_alone() {
    // Tokens that sequences share with the first one, in its own blocks: no tile, one, three.
    const SHARED: [usize; 3] = [0, 64, 192];
    for (seed, (group, head_dim)) in [(3, 64), (5, 64), (7, 128), (12, 80), (16, 32)].into_iter().enumerate() {
        for ((numerics, kv), window) in all_numbers().flat_map(|numbers| [(numbers, None), (numbers, Some(100))]) {
            let rng = &mut Random(seed as u64);
            let lengths: Vec<usize> = (0..37).map(|i| if i == 0 { 200 } else { SHARED[i / 13] + 1 + rng.below(31) }).collect();
            let mut case = Case::random(rng, 3, group, head_dim, &lengths);
            case.spec.window = window;
            let mut tables: Vec<Vec<u32>> = vec![(0..13).collect()];
            let mut next = 13;
            for i in 1..case.seqs.len() {
                let n_shared = SHARED[i / 13];
                let own = case.seqs[i].split_off(n_shared);
                case.seqs[i] = [&case.seqs[0][..n_shared], &own].concat();
                let n_own = own.len().div_ceil(BLOCK_TOKENS) as u32;
                tables.push((0..n_shared as u32 / 16).chain(next..next + n_own).collect());
                next += n_own;
            }
            let n = |i: usize| case.seqs[i].len();
            let all = 0..case.seqs.len();
            let begin =
                all.clone().map(|i| (i, if i == 0 { 0 } else { SHARED[i / 13] }..n(i) - 1)).filter(|(_, p)| !p.is_empty());
            let steps = [(begin.collect(), vec![]), (all.clone().map(|i| (i, n(i) - 1..n(i))).collect(), vec![])];
            let dev = CpuDevice::new(Isa::detect(), numerics, 1).with_kv(kv);
            let (together, alone) = (case.run(&dev, &tables, &steps), case.run_alone(&dev));
            for i in all {
                let same = together.values[i][n(i) - 1] == alone.values[i][n(i) - 1];
                assert!(
                    same,
                    "groups of {group} heads of {head_dim}, {numerics:?}, {kv:?}, window {window:?}: sequence {i} differs"
                );
            }
        }
    }
}

/// A sequence that begins as another takes its whole blocks and a copy of the partly shared one, in the same step as the
/// other's stores or later, whatever the number of threads.
#[test]
fn a_shared_prefix_gives_the_bits_of_a_computed_one() {
    for n_slots in [1, 3, 15] {
        let rng = &mut Random(n_slots as u64);
        let mut case = Case::random(rng, 3, 3, 64, &[100, 90]);
        let n_shared = 64 + n_slots;
        case.seqs[1] = [&case.seqs[0][..n_shared], &case.seqs[1][..20]].concat();
        let n = case.seqs[1].len();
        let copies = vec![BlockCopy { src: 4, dst: 20, n_slots: n_slots as u32 }];
        let tables = [(0..7).collect(), vec![0, 1, 2, 3, 20, 21, 22]];
        for dev in all_numbers().flat_map(|(numerics, kv)| devices_with(numerics, kv)) {
            let alone = case.run_alone(&dev);
            let same_step = vec![(vec![(0, 0..100), (1, n_shared..n)], copies.clone())];
            let later = vec![(vec![(0, 0..100)], vec![]), (vec![(1, n_shared..n)], copies.clone())];
            for steps in [same_step, later] {
                let shared = case.run(&dev, &tables, &steps);
                assert!(shared.values[1][n_shared..] == alone.values[1][n_shared..], "{} slots, {}", n_slots, dev.isa().name());
                assert!(shared.slots == alone.slots, "{} slots, {}: the copy is no copy", n_slots, dev.isa().name());
            }
        }
    }
}

/// The tolerance of the test against f64 is that of rounding keys and values; with numbers that halves hold exactly and
/// no rotation, the device is much nearer.
#[test]
fn attention_is_exact_to_f32_where_the_cache_rounds_nothing() {
    let rng = &mut Random(3);
    let mut case = Case::random(rng, 2, 3, 64, &[150]);
    case.spec.rope_freqs.fill(0.0);
    case.spec.rope_scale = 1.0;
    (case.bias, case.norms) = (None, None);
    for x in case.seqs[0].iter_mut().flatten() {
        *x = f16::from_f32(*x).to_f32();
    }
    let want = case.expected((Numerics::F32, Kv::Floats), 0);
    for dev in devices(Numerics::F32) {
        for (got, want) in case.run_alone(&dev).values[0].iter().flatten().zip(want.iter().flatten()) {
            let got = f64::from(f32::from_bits(*got));
            assert!((got - want).abs() <= 2e-5, "{}: {got}, not {want}", dev.isa().name());
        }
    }
}

/// The same of integers: with keys and values that are whole multiples of a scale that is a power of two, and 127 of it among
/// them, integers hold them exactly.
#[test]
fn attention_is_exact_to_f32_where_integers_round_nothing() {
    let rng = &mut Random(4);
    let mut case = Case::random(rng, 2, 3, 64, &[150]);
    case.spec.rope_freqs.fill(0.0);
    case.spec.rope_scale = 1.0;
    (case.bias, case.norms) = (None, None);
    for row in &mut case.seqs[0] {
        for head in row.chunks_mut(64) {
            for x in &mut *head {
                *x = (*x * 42.0).round() / 64.0;
            }
            head[rng.below(64)] = if rng.below(2) == 0 { 127.0 } else { -127.0 } / 64.0;
        }
    }
    let want = case.expected((Numerics::F32, Kv::Floats), 0);
    for dev in devices_with(Numerics::F32, Kv::Int8) {
        for (got, want) in case.run_alone(&dev).values[0].iter().flatten().zip(want.iter().flatten()) {
            let got = f64::from(f32::from_bits(*got));
            assert!((got - want).abs() <= 2e-5, "{}: {got}, not {want}", dev.isa().name());
        }
    }
}

/// A key or value that is no number reaches those that see it, and no token before it.
#[test]
fn what_is_no_number_is_seen_by_those_alone_that_see_it() {
    for (numerics, kv) in all_numbers() {
        let rng = &mut Random(9);
        let mut case = Case::random(rng, 2, 2, 64, &[90, 40]);
        case.spec.window = None;
        let dev = CpuDevice::new(Isa::detect(), numerics, 2).with_kv(kv);
        let clean = case.run_alone(&dev);
        // The last value of the second head of one position.
        *case.seqs[0][70].last_mut().unwrap() = f32::NAN;
        let broken = case.run_alone(&dev);
        for (seq, (clean, broken)) in clean.values.iter().zip(&broken.values).enumerate() {
            for (position, (clean, broken)) in clean.iter().zip(broken).enumerate() {
                let sees = seq == 0 && position >= 70;
                let has_nan = broken.iter().any(|&x| f32::from_bits(x).is_nan());
                assert!(has_nan == sees && (sees || clean == broken), "{numerics:?} {kv:?}: sequence {seq}, position {position}");
            }
        }
    }
}
