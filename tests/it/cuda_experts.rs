//! The kernels of layers of experts, in the PTX interpreter: what they compute, against plain formulas; that a token's bits do not
//! depend on who else is there; what they ask of memory and of tensor cores, in any order of warps and blocks.

use crate::cuda_laws::{Case, hold_case};
use crate::cuda_machine::{Machine, Noise, assert_near, bytes, module};
use crate::cuda_numbers::{BF16, packed, weight_of};
use half::bf16;
use ptx::Arg;
use valar::device::cuda::costs;
use valar::device::math;

/// Forms of weights: what kernels are called by, and bits.
const FORMS: [(&str, usize); 4] = [("q4", 4), ("q8", 8), ("q6", 6), ("bf16", 16)];

/// The experts of a row of scores and their weights, by number: by definition, but with the one exponential, whose results can be equal
/// where scores are not.
fn chosen(scores: &[f32], n_used: usize, renormalise: bool) -> Vec<(u32, f64)> {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let parts: Vec<f32> = scores.iter().map(|score| math::exp(score - largest)).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| parts[b].total_cmp(&parts[a]).then(a.cmp(&b)));
    order.truncate(n_used);
    let of = |experts: &mut dyn Iterator<Item = usize>| -> f64 { experts.map(|e| f64::from(parts[e])).sum() };
    let total = if renormalise { of(&mut order.iter().copied()) } else { of(&mut (0..scores.len())) };
    order.sort_unstable();
    order.into_iter().map(|e| (e as u32, f64::from(parts[e]) / total)).collect()
}

/// Runs `choose_experts`; experts and weights by use.
fn choose(m: &mut Machine, scores: &[f32], n_experts: usize, n_used: usize, renormalise: bool) -> (Vec<u32>, Vec<f32>) {
    let n_rows = scores.len() / n_experts;
    let (at, experts, weights) = (m.f32s(scores), m.room(4 * n_rows * n_used), m.room(4 * n_rows * n_used));
    let sizes = [n_rows as u32, n_experts as u32, n_used as u32, u32::from(renormalise)].map(Arg::U32);
    let args: Vec<Arg> = [Arg::U64(at)].into_iter().chain(sizes).chain([experts, weights].map(Arg::U64)).collect();
    m.run(&module("experts"), "choose_experts", ((n_rows.div_ceil(4) as u32, 1), 128, 0), &args);
    (read_u32s(m, experts, n_rows * n_used), m.read_f32s(weights, n_rows * n_used))
}

fn read_u32s(m: &mut Machine, at: u64, n: usize) -> Vec<u32> {
    m.read(at, 4 * n).chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn the_likeliest_experts_are_used() {
    let (mut noise, n_rows) = (Noise(21), 9);
    for (n_experts, n_used) in [(1usize, 1usize), (4, 4), (8, 2), (60, 4), (128, 8), (512, 32)] {
        for renormalise in [false, true] {
            let mut scores: Vec<f32> = (0..n_rows * n_experts).map(|_| 4.0 * noise.next()).collect();
            // Ties, within a row and of a whole one.
            scores[..n_experts].iter_mut().for_each(|score| *score = score.round());
            scores[n_experts..2 * n_experts].fill(-1.5);
            let (experts, weights) = choose(&mut Machine::new(), &scores, n_experts, n_used, renormalise);
            for (row, scores) in scores.chunks(n_experts).enumerate() {
                let (want, uses) = (chosen(scores, n_used, renormalise), row * n_used..(row + 1) * n_used);
                assert!(experts[uses.clone()].iter().eq(want.iter().map(|(e, _)| e)), "row {row} of {n_experts} experts");
                let want: Vec<f64> = want.iter().map(|(_, weight)| *weight).collect();
                assert_near(weights[uses].iter().map(|w| f64::from(*w)), &want, 2e-6, 0.0, "weights");
            }
            // Alone, a row has the same bits.
            let alone = choose(&mut Machine::new(), &scores[5 * n_experts..6 * n_experts], n_experts, n_used, renormalise);
            let of_row = 5 * n_used..6 * n_used;
            assert_eq!(alone, (experts[of_row.clone()].to_vec(), weights[of_row].to_vec()));
        }
    }
}

#[test]
fn a_score_that_is_no_number_is_not_lost() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut scores = Noise(22).f32s(2 * 40);
        scores[7] = bad;
        let (experts, weights) = choose(&mut Machine::new(), &scores, 40, 3, true);
        assert!(experts[..3].is_sorted_by(|a, b| a < b) && experts[2] < 40, "{experts:?}");
        assert!(weights[..3].iter().all(|weight| weight.is_nan()) && weights[3..].iter().all(|weight| weight.is_finite()));
    }
}

/// Who uses which of so many experts: some often, one never.
fn uses(n_rows: usize, n_used: usize, n_experts: usize, noise: &mut Noise) -> Vec<u32> {
    let row = |_| {
        let mut experts: Vec<u32> = (0..n_experts as u32).filter(|&e| e != 1).collect();
        while experts.len() > n_used {
            let i = (noise.next().abs() * experts.len() as f32) as usize;
            experts.remove(i.min(experts.len() - 1));
        }
        experts
    };
    (0..n_rows).flat_map(row).collect()
}

/// Runs `list_uses`; where lists and counts are.
fn list(m: &mut Machine, chosen: &[u32], n_experts: usize, stride: usize) -> (u64, u64) {
    let (at, lists, counts) = (m.u32s(chosen), m.room(4 * n_experts * stride), m.room(4 * n_experts));
    let args = [Arg::U64(at), Arg::U32(chosen.len() as u32), Arg::U32(stride as u32), Arg::U64(lists), Arg::U64(counts)];
    m.run(&module("experts"), "list_uses", ((n_experts as u32, 1), 256, 0), &args);
    (lists, counts)
}

#[test]
fn uses_are_listed_by_expert_in_their_order() {
    for (n_rows, n_used, n_experts) in [(1usize, 1usize, 2usize), (5, 2, 4), (130, 4, 9), (300, 2, 70)] {
        let chosen = uses(n_rows, n_used, n_experts, &mut Noise(23));
        let mut m = Machine::new();
        let stride = n_rows.next_multiple_of(8);
        let (lists, counts) = list(&mut m, &chosen, n_experts, stride);
        let counts = read_u32s(&mut m, counts, n_experts);
        for (e, &count) in counts.iter().enumerate() {
            let want: Vec<u32> = (0..).zip(&chosen).filter(|(_, of)| **of == e as u32).map(|(i, _)| i).collect();
            assert_eq!(count as usize, want.len());
            assert_eq!(read_u32s(&mut m, lists + 4 * (e * stride) as u64, want.len()), want, "expert {e}");
        }
    }
}

/// What addresses of weights are multiples of.
const ALIGNED: usize = 256;

/// The weights of some experts in a form, and their values.
struct Weights {
    form: &'static str,
    /// Columns, and elements that are added up.
    shape: (usize, usize),
    /// Of each expert: values, then scales, filled up as the loader fills them.
    bytes: Vec<u8>,
    /// Where an expert's scales are in them.
    scales_at: usize,
    /// `[n_experts][n][k]`
    values: Vec<f64>,
}

impl Weights {
    fn new((form, bits): (&'static str, usize), n_experts: usize, shape: (usize, usize), noise: &mut Noise) -> Self {
        let (n, k) = shape;
        let mut own = Self { form, shape, bytes: Vec::new(), scales_at: 0, values: Vec::new() };
        for _ in 0..n_experts {
            if bits == 16 {
                let values = noise.bf16s(n * k);
                own.values.extend(values.iter().map(|v| v.to_f64()));
                own.bytes.extend(bytes(values.iter().map(|v| v.to_le_bytes())));
            } else {
                let (most, shift) = if bits == 4 { (7.99, 1.0) } else { (127.0, 0.0) };
                let q: Vec<i32> = (0..n * k).map(|_| ((noise.next() + shift) * most) as i32).collect();
                let groups = k.div_ceil(32);
                let scales: Vec<(f32, f32)> = (0..n * groups).map(|_| (0.1 * noise.next(), 0.3 * noise.next())).collect();
                let value = |i: usize| weight_of(bits, q[i], scales[i / k * groups + i % k / 32], i % k);
                own.values.extend((0..n * k).map(value));
                let (q, scales) = packed(bits, shape, &q, &scales);
                own.scales_at = q.len().next_multiple_of(ALIGNED);
                own.bytes.extend(q);
                own.bytes.resize(own.bytes.len().next_multiple_of(ALIGNED), 0);
                own.bytes.extend(bytes(scales.into_iter().map(f32::to_le_bytes)));
            }
            own.bytes.resize(own.bytes.len().next_multiple_of(ALIGNED), 0);
        }
        own
    }

    /// A launch over rows of x, the experts of whose uses these are.
    fn case(&self, m: &mut Machine, x: &[bf16], chosen: &[u32], (tiles, n_items, per_row): (usize, usize, usize)) -> Case {
        let ((n, k), n_experts) = (self.shape, self.values.len() / self.shape.0 / self.shape.1);
        let stride = chosen.len().next_multiple_of(8);
        let (lists, counts) = list(m, chosen, n_experts, stride);
        let (x, weights, out) = (m.bf16s(x), m.put(&self.bytes), m.room(2 * chosen.len() * n));
        let scales = weights + self.scales_at as u64;
        let mut sizes = (self.bytes.len() as u64 / n_experts as u64).to_le_bytes().to_vec();
        sizes.extend(bytes([n, k, n_experts, stride, per_row, 0].map(|v| (v as u32).to_le_bytes())));
        let args = [x, weights, scales, lists, counts, out].map(Arg::U64).into_iter().chain([Arg::Bytes(sizes)]).collect();
        let grid = (n.div_ceil(64) as u32, n_items as u32);
        assert!(tiles == 1 || tiles == 4);
        Case { launch: (grid, 128, 0), args, outs: vec![(out, 2 * chosen.len() * n)] }
    }

    /// What comes of the uses.
    fn multiply(&self, x: &[bf16], chosen: &[u32], tiles: usize, per_row: usize) -> Vec<bf16> {
        let mut m = Machine::new();
        // More than there are: who finds none ends.
        let case = self.case(&mut m, x, chosen, (tiles, chosen.len(), per_row));
        m.run(&module("linear_experts"), &format!("linear_experts_{}_{tiles}", self.form), case.launch, &case.args);
        m.read_bf16s(case.outs[0].0, chosen.len() * self.shape.0)
    }
}

/// Near the reference; the same bits whatever rows an item has, and whoever else is there.
#[test]
fn rows_are_multiplied_with_their_experts() {
    let mut noise = Noise(24);
    let (n_experts, n_used) = (5usize, 2usize);
    for (form, shape) in FORMS.into_iter().flat_map(|form| [(16usize, 64usize), (72, 96), (33, 200)].map(|shape| (form, shape))) {
        let (weights, (n, k)) = (Weights::new(form, n_experts, shape, &mut noise), shape);
        for (n_rows, per_row) in [(1, n_used), (45, n_used), (45, 1)] {
            let chosen = uses(n_rows, n_used, n_experts, &mut noise);
            let x = noise.bf16s(chosen.len() / per_row * k);
            let found = weights.multiply(&x, &chosen, 1, per_row);
            let value = |i: usize| -> f64 {
                let (use_, column) = (i / n, i % n);
                let (row, expert) = (use_ / per_row, chosen[use_] as usize);
                (0..k).map(|c| x[row * k + c].to_f64() * weights.values[(expert * n + column) * k + c]).sum()
            };
            let want: Vec<f64> = (0..chosen.len() * n).map(value).collect();
            assert_near(found.iter().map(|v| v.to_f64()), &want, BF16, 2e-3, weights.form);
            assert!(found == weights.multiply(&x, &chosen, 4, per_row), "{}: rows of an item change bits", weights.form);
            let (row, last) = (n_rows - 1, chosen.len() - n_used);
            let own = if per_row == 1 { &x[last * k..] } else { &x[row * k..] };
            let alone = weights.multiply(own, &chosen[last..], 1, per_row);
            assert!(alone == found[last * n..], "{}: others change a row's bits", weights.form);
        }
    }
}

/// `add_experts` over rows; what x is then.
fn add(y: &[bf16], weights: &[f32], x: &[f32], width: usize) -> Vec<f32> {
    let mut m = Machine::new();
    let (n_rows, n_used) = (x.len() / width, weights.len() * width / x.len());
    let (y, weights, x_at) = (m.bf16s(y), m.f32s(weights), m.f32s(x));
    let args = [Arg::U64(y), Arg::U64(weights), Arg::U64(x_at), Arg::U32(width as u32), Arg::U32(n_used as u32)];
    m.run(&module("experts"), "add_experts", ((n_rows as u32, width.div_ceil(512) as u32), 128, 0), &args);
    m.read_f32s(x_at, x.len())
}

#[test]
fn what_experts_give_is_added_in_their_order() {
    let (mut noise, n_rows) = (Noise(25), 3);
    for (width, n_used) in [(8usize, 1usize), (512, 2), (520, 8)] {
        let (y, weights) = (noise.bf16s(n_rows * n_used * width), noise.f32s(n_rows * n_used));
        let x = noise.f32s(n_rows * width);
        let found = add(&y, &weights, &x, width);
        let value = |i: usize| {
            let uses = i / width * n_used..(i / width + 1) * n_used;
            uses.fold(x[i], |sum, use_| weights[use_].mul_add(y[use_ * width + i % width].to_f32(), sum))
        };
        assert_eq!(found, (0..x.len()).map(value).collect::<Vec<_>>());
    }
}

#[test]
fn who_uses_which_expert_is_found_in_one_pass() {
    for (rows, n_experts, n_used, renormalise) in [(6usize, 64usize, 8usize, true), (5, 128, 8, false)] {
        let cost = costs::choose_experts(rows as u64, n_experts as u64, n_used as u64, renormalise);
        hold_case("experts", "choose_experts", &format!("{rows} rows, {n_used} of {n_experts}"), &cost, |m| {
            let scores = m.f32s(&Noise(26).f32s(rows * n_experts));
            let (experts, weights) = (m.room(4 * rows * n_used), m.room(4 * rows * n_used));
            let sizes = [rows as u32, n_experts as u32, n_used as u32, u32::from(renormalise)].map(Arg::U32);
            let args = [Arg::U64(scores)].into_iter().chain(sizes).chain([experts, weights].map(Arg::U64)).collect();
            let outs = vec![(experts, 4 * rows * n_used), (weights, 4 * rows * n_used)];
            Case { launch: ((rows.div_ceil(4) as u32, 1), 128, 0), args, outs }
        });
    }
    // Eight experts by turns: each has uses among any 32.
    let n_uses = 640u64;
    hold_case("experts", "list_uses", "640 uses of 8", &costs::list_uses(n_uses, 8, 8 * n_uses / 32), |m| {
        let chosen: Vec<u32> = (0..n_uses as u32).map(|i| i % 8).collect();
        let (at, lists, counts) = (m.u32s(&chosen), m.room(8 * 80 * 4), m.room(8 * 4));
        let args = [Arg::U64(at), Arg::U32(n_uses as u32), Arg::U32(80), Arg::U64(lists), Arg::U64(counts)];
        Case { launch: ((8, 1), 256, 0), args: args.to_vec(), outs: vec![(lists, 8 * 80 * 4), (counts, 8 * 4)] }
    });
    for (rows, width, n_used) in [(3usize, 1024usize, 2usize), (2, 2048, 8)] {
        let cost = costs::add_experts(rows as u64, width as u64, n_used as u64);
        hold_case("experts", "add_experts", &format!("{n_used} for each of {rows} rows of {width}"), &cost, |m| {
            let mut noise = Noise(27);
            let (y, weights) = (m.bf16s(&noise.bf16s(rows * n_used * width)), m.f32s(&noise.f32s(rows * n_used)));
            let x = m.f32s(&noise.f32s(rows * width));
            let args = [Arg::U64(y), Arg::U64(weights), Arg::U64(x), Arg::U32(width as u32), Arg::U32(n_used as u32)];
            let grid = (rows as u32, width.div_ceil(512) as u32);
            Case { launch: (grid, 128, 0), args: args.to_vec(), outs: vec![(x, 4 * rows * width)] }
        });
    }
}

#[test]
fn experts_weights_are_read_once_for_each_of_their_items() {
    let (n_experts, n, k) = (4usize, 128usize, 256usize);
    for (form, bits) in FORMS {
        let weights = Weights::new((form, bits), n_experts, (n, k), &mut Noise(28));
        for (tiles, rows) in [(1usize, [18usize, 0, 16, 6]), (4, [70, 0, 64, 10])] {
            let chosen: Vec<u32> = (0..).zip(rows).flat_map(|(e, n)| std::iter::repeat_n(e, n)).collect();
            let n_items = chosen.len().div_ceil(16 * tiles) + n_experts;
            let counts = rows.map(|n| n as u64);
            let cost = costs::linear_experts(
                if bits == 6 { 8 } else { bits as u64 },
                (n as u64, k as u64),
                &counts,
                tiles as u64,
                n_items as u64,
            );
            let kernel = format!("linear_experts_{form}_{tiles}");
            hold_case("linear_experts", &kernel, &format!("{rows:?} rows"), &cost, |m| {
                let x = Noise(29).bf16s(chosen.len() * k);
                weights.case(m, &x, &chosen, (tiles, n_items, 1))
            });
        }
    }
}
