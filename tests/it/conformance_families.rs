//! The CPU device's operations that only some families use, against plain arithmetic and against the device's own simpler
//! operations: experts, norms of what is added, scaled embeddings, capped logits.

use crate::conformance::{Matrix, Random, bits, devices, numerics, rows_batch};
use proptest::prelude::*;
use valar::device::batch::{HeadRow, StepOutput, Want};
use valar::device::cpu::{CpuDevice, Hidden, Numerics};
use valar::device::{Activation, Device, Expert, Experts, HeadSpec, math};
use valar::tensor::DType;

const DTYPES: [DType; 6] = [DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::F32, DType::F16, DType::Bf16];

fn hidden(dev: &CpuDevice, values: &[f32], width: usize) -> Hidden {
    let mut hidden = dev.new_hidden(values.len() / width, width);
    hidden.values_mut().copy_from_slice(values);
    hidden
}

fn floats(rng: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.float()).collect()
}

/// A layer of experts in a file's form.
struct Layer {
    router: Matrix,
    /// gate, up, down
    experts: Vec<[Matrix; 3]>,
    norm: Matrix,
    n_used: usize,
    renormalise: bool,
    f: Activation,
    width: usize,
    ffn_width: usize,
}

impl Layer {
    fn random(rng: &mut Random, dtype: DType, n_experts: usize, n_used: usize) -> Self {
        let (width, ffn_width) = (64, 32 * (1 + rng.below(3)));
        let mut expert =
            |_| [(ffn_width, width), (ffn_width, width), (width, ffn_width)].map(|(n, k)| Matrix::random(rng, dtype, n, k));
        let experts = (0..n_experts).map(&mut expert).collect();
        let router_type = [DType::F32, DType::F16][rng.below(2)];
        let router = Matrix::random(rng, router_type, n_experts, width);
        let norm = Matrix::random(rng, DType::F32, 1, width);
        let f = [Activation::Silu, Activation::GeluTanh][rng.below(2)];
        Self { router, experts, norm, n_used, renormalise: rng.below(2) == 0, f, width, ffn_width }
    }

    fn load(&self, dev: &CpuDevice) -> Experts<valar::device::cpu::Weight> {
        let load = |m: &Matrix| dev.load_weight(&[m.tensor()]).unwrap();
        let expert = |[gate, up, down]: &[Matrix; 3]| Expert {
            gate_up: dev.load_gate_up(&gate.tensor(), &up.tensor()).unwrap(),
            down: load(down),
        };
        Experts {
            router: load(&self.router),
            experts: self.experts.iter().map(expert).collect(),
            n_used: self.n_used,
            renormalise: self.renormalise,
        }
    }

    /// What the operation makes of some rows.
    fn run(&self, dev: &CpuDevice, x: &[f32]) -> Vec<f32> {
        let (experts, batch) = (self.load(dev), rows_batch(x.len() / self.width));
        let (mut act, mut x) = (dev.new_act(batch.tokens.len(), self.width), hidden(dev, x, self.width));
        let norm = dev.load_vector(&[self.norm.tensor()]).unwrap();
        dev.norm(&x, &norm, 1e-5, &experts.experts[0].gate_up, &batch, &mut act);
        dev.experts(&act, &experts, self.f, &batch, &mut x);
        x.values().to_vec()
    }

    /// The same from the operations of layers without experts: every expert for every row, then what each row uses.
    fn expected(&self, dev: &CpuDevice, x: &[f32]) -> Vec<f32> {
        let (experts, batch) = (self.load(dev), rows_batch(x.len() / self.width));
        let (n, width) = (batch.tokens.len(), self.width);
        let (mut act, source) = (dev.new_act(n, width), hidden(dev, x, width));
        let norm = dev.load_vector(&[self.norm.tensor()]).unwrap();
        dev.norm(&source, &norm, 1e-5, &experts.experts[0].gate_up, &batch, &mut act);
        let mut scores = dev.new_hidden(n, experts.experts.len());
        dev.linear(&act, &experts.router, &batch, &mut scores);
        let weights: Vec<Vec<f32>> = scores.values().chunks(experts.experts.len()).map(|row| self.weights(row)).collect();
        let mut x = x.to_vec();
        for (e, expert) in experts.experts.iter().enumerate() {
            let (mut gated, mut scratch) = (dev.new_act(n, self.ffn_width), dev.new_hidden(n, 2 * self.ffn_width));
            dev.gate_up(&act, &expert.gate_up, self.f, &expert.down, &batch, &mut scratch, &mut gated);
            let mut y = dev.new_hidden(n, width);
            dev.linear(&gated, &expert.down, &batch, &mut y);
            for (row, weights) in weights.iter().enumerate().filter(|(_, weights)| weights[e] > 0.0) {
                let y = &y.values()[row * width..];
                x[row * width..][..width].iter_mut().zip(y).for_each(|(x, y)| *x += weights[e] * y);
            }
        }
        x
    }

    /// Softmax, 0 for experts that are not used.
    fn weights(&self, scores: &[f32]) -> Vec<f32> {
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f32> = scores.iter().map(|score| math::exp(score - largest)).collect();
        let total = e.iter().fold(0.0, |sum, e| sum + e);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| e[b].total_cmp(&e[a]));
        order.truncate(self.n_used);
        let used = if self.renormalise { order.iter().fold(0.0, |sum, &i| sum + e[i] / total) } else { 1.0 };
        (0..scores.len()).map(|i| if order.contains(&i) { e[i] / total / used } else { 0.0 }).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn experts_are_feed_forward_layers_added_in_order(
        seed: u64,
        dtype in 0usize..6,
        n_experts in 1usize..9,
        n_used in 1usize..4,
        n_rows in 1usize..60,
        numerics in numerics(),
    ) {
        let rng = &mut Random(seed);
        let layer = Layer::random(rng, DTYPES[dtype], n_experts, n_used.min(n_experts));
        let x = floats(rng, n_rows * layer.width);
        let mut truth = None;
        for dev in devices(numerics) {
            let got = layer.run(&dev, &x);
            prop_assert!(bits(&got) == bits(&layer.expected(&dev, &x)), "{}: not the experts' sum", dev.isa().name());
            prop_assert!(truth.get_or_insert_with(|| bits(&got)) == &bits(&got), "{} differs from portable", dev.isa().name());
            // Alone, a row has the bits it has among others.
            let row = rng.below(n_rows);
            let alone = layer.run(&dev, &x[row * layer.width..][..layer.width]);
            prop_assert_eq!(bits(&alone), bits(&got[row * layer.width..][..layer.width]));
        }
    }

    #[test]
    fn norms_are_added(seed: u64, width in 1usize..200, n_rows in 1usize..20, numerics in numerics()) {
        let rng = &mut Random(seed);
        let (base, y, weight) = (floats(rng, n_rows * width), floats(rng, n_rows * width), Matrix::random(rng, DType::F32, 1, width));
        let (next, mut truth) = (Matrix::random(rng, DType::F32, 1, width), None);
        for dev in devices(numerics) {
            let (mut x, y) = (hidden(&dev, &base, width), hidden(&dev, &y, width));
            let (norm, batch) = (dev.load_vector(&[weight.tensor()]).unwrap(), rows_batch(n_rows));
            dev.norm_add(&y, &norm, 1e-5, &batch, &mut x);
            let mut act = dev.new_act(n_rows, width);
            act.keep_values();
            dev.norm(&y, &norm, 1e-5, &dev.load_weight(&[next.tensor()]).unwrap(), &batch, &mut act);
            let want: Vec<f32> = base.iter().zip(act.values()).map(|(x, y)| x + y).collect();
            prop_assert_eq!(bits(x.values()), bits(&want), "{}", dev.isa().name());
            prop_assert_eq!(truth.get_or_insert_with(|| bits(&want)), &bits(&want));
        }
    }

    #[test]
    fn embeddings_are_scaled(seed: u64, dtype in 0usize..6, n_tokens in 1usize..30, numerics in numerics()) {
        let rng = &mut Random(seed);
        let table = Matrix::random(rng, DTYPES[dtype], 50, 64);
        let mut batch = rows_batch(n_tokens);
        batch.tokens.fill_with(|| rng.below(50) as u32);
        for dev in devices(numerics) {
            let table = dev.load_weight(&[table.tensor()]).unwrap();
            let (mut plain, mut scaled) = (dev.new_hidden(n_tokens, 64), dev.new_hidden(n_tokens, 64));
            dev.embed(&table, 1.0, &batch, &mut plain);
            dev.embed(&table, 5.3, &batch, &mut scaled);
            let want: Vec<f32> = plain.values().iter().map(|x| x * 5.3).collect();
            prop_assert_eq!(bits(scaled.values()), bits(&want));
        }
    }

    #[test]
    fn logits_are_capped(seed: u64, n_vocab in 1usize..70, cap in 0.5f32..40.0, numerics in numerics()) {
        let rng = &mut Random(seed);
        let (table, norm) = (Matrix::random(rng, DType::F32, n_vocab, 64), Matrix::random(rng, DType::F32, 1, 64));
        let x = floats(rng, 64);
        let mut batch = rows_batch(1);
        let token = rng.below(n_vocab) as u32;
        batch.heads = vec![HeadRow::new(0, Want::Score { token }, 0)];
        let mut truth = None;
        for dev in devices(numerics) {
            let (weight, norm) = (dev.load_weight(&[table.tensor()]).unwrap(), dev.load_vector(&[norm.tensor()]).unwrap());
            let (x, mut act, mut logits) = (hidden(&dev, &x, 64), dev.new_act(1, 64), dev.new_hidden(1, n_vocab));
            dev.norm(&x, &norm, 1e-5, &weight, &batch, &mut act);
            dev.linear(&act, &weight, &batch, &mut logits);
            let mut out = StepOutput::default();
            dev.head(&x, &norm, &weight, &HeadSpec { eps: 1e-5, soft_cap: Some(cap) }, &batch, &mut out);
            let capped: Vec<f64> = logits.values().iter().map(|&x| f64::from(cap) * (f64::from(x) / f64::from(cap)).tanh()).collect();
            let want = capped[token as usize] - capped.iter().map(|x| x.exp()).sum::<f64>().ln();
            let got = out.rows[0].logprob;
            prop_assert!((f64::from(got) - want).abs() <= 4e-5, "{}: {got}, not {want}", dev.isa().name());
            prop_assert_eq!(truth.get_or_insert(got.to_bits()), &got.to_bits());
        }
    }
}

/// A router's NaN reaches its own row and no other, and the step goes on.
#[test]
fn a_nan_among_scores_stays_in_its_row() {
    let rng = &mut Random(9);
    let layer = Layer::random(rng, DType::Q8_0, 4, 2);
    let mut x = floats(rng, 3 * layer.width);
    for dev in Numerics::ALL.into_iter().flat_map(devices) {
        let clean = layer.run(&dev, &x);
        let healthy = std::mem::replace(&mut x[layer.width + 5], f32::NAN);
        let got = layer.run(&dev, &x);
        x[layer.width + 5] = healthy;
        let rows: Vec<_> = got.chunks(layer.width).collect();
        assert!(rows[1].iter().all(|x| x.is_nan()), "{}", dev.isa().name());
        assert_eq!(bits(rows[0]), bits(&clean[..layer.width]));
        assert_eq!(bits(rows[2]), bits(&clean[2 * layer.width..]));
    }
}
