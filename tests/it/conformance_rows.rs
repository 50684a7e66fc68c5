//! What a layer does to many rows by themselves, some rows at a time on each thread, against its operations one after the other over all
//! rows: the same bits.

use crate::conformance::{Matrix, Random, bits, hidden, random_rows, rows_batch};
use valar::device::cpu::{CpuDevice, Isa, Numerics};
use valar::device::{Activation, AfterAttention, AttentionSpec, BeforeAttention, Device, QkvExtra, RopeStyle};
use valar::tensor::DType;

const EPS: f32 = 1e-5;

/// A layer's matrices, and what its rows are.
struct Layer {
    spec: AttentionSpec,
    ffn_width: usize,
    /// q, k and v, the attention's output, gate, up, down
    matrices: [Matrix; 7],
    norm: Matrix,
}

impl Layer {
    /// Of types `[q, k, v, the others]`.
    fn random(rng: &mut Random, width: usize, ffn_width: usize, head_dim: usize, dtypes: [DType; 4]) -> Self {
        let spec = AttentionSpec {
            n_heads: 4,
            n_kv_heads: 2,
            head_dim,
            scale: 0.2,
            soft_cap: None,
            window: None,
            rope_style: RopeStyle::Halves,
            rope_freqs: (0..head_dim / 2).map(|i| 0.9f32.powf(i as f32)).collect(),
            rope_scale: 1.0,
        };
        let [q, k, v, other] = dtypes;
        let (q_width, kv_width) = (4 * head_dim, 2 * head_dim);
        let shapes = [
            (q, q_width, width),
            (k, kv_width, width),
            (v, kv_width, width),
            (other, width, q_width),
            (other, ffn_width, width),
            (other, ffn_width, width),
            (other, width, ffn_width),
        ];
        let matrices = shapes.map(|(dtype, n, k)| Matrix::random(rng, dtype, n, k));
        Self { spec, ffn_width, matrices, norm: Matrix::random(rng, DType::F32, 1, width) }
    }

    /// x, q, k and v, and what attention makes of them, after both halves; in one call each, or operation by operation.
    fn run(&self, dev: &CpuDevice, x: &[f32], in_one: bool) -> [Vec<u32>; 3] {
        let [q, k, v, output, gate, up, down] = self.matrices.each_ref().map(Matrix::tensor);
        let (width, spec) = (output.shape[0], &self.spec);
        let batch = rows_batch(x.len() / width);
        let n_rows = batch.tokens.len();
        let qkv_weight = dev.load_weight(&[q, k, v]).unwrap();
        let attn_output = dev.load_weight(&[output]).unwrap();
        let gate_up = dev.load_gate_up(&gate, &up).unwrap();
        let down = dev.load_weight(&[down]).unwrap();
        let norm = dev.load_vector(&[self.norm.tensor()]).unwrap();
        let extra = QkvExtra { bias: None, norms: None };
        let mut cache = dev.new_cache(spec, n_rows.div_ceil(16));
        let mut x = hidden(dev, x, width);
        let mut qkv = dev.new_hidden(n_rows, 8 * spec.head_dim);
        let (mut normed, mut attended) = (dev.new_act(n_rows, width), dev.new_act(n_rows, 4 * spec.head_dim));
        let (mut scratch, mut gated) = (dev.new_hidden(n_rows, 2 * self.ffn_width), dev.new_act(n_rows, self.ffn_width));
        if in_one {
            let layer = BeforeAttention { norm: &norm, eps: EPS, qkv: &qkv_weight, extra: &extra };
            dev.before_attention(&layer, spec, &batch, &x, &mut normed, &mut qkv, &mut cache);
        } else {
            dev.norm(&x, &norm, EPS, &qkv_weight, &batch, &mut normed);
            dev.linear(&normed, &qkv_weight, &batch, &mut qkv);
            dev.finish_qkv(&mut qkv, &extra, spec, &batch, &mut cache);
        }
        dev.attention(&qkv, spec, &cache, &attn_output, &batch, &mut attended);
        let before = bits(x.values());
        if in_one {
            let (norm, activation) = (&norm, Activation::Silu);
            let layer = AfterAttention { attn_output: &attn_output, norm, eps: EPS, gate_up: &gate_up, activation, down: &down };
            dev.after_attention(&layer, &attended, &batch, &mut x, &mut normed, &mut scratch, &mut gated);
        } else {
            dev.linear_add(&attended, &attn_output, &batch, &mut x);
            dev.norm(&x, &norm, EPS, &gate_up, &batch, &mut normed);
            dev.gate_up(&normed, &gate_up, Activation::Silu, &down, &batch, &mut scratch, &mut gated);
            dev.linear_add(&gated, &down, &batch, &mut x);
        }
        assert_ne!(bits(x.values()), before);
        [bits(x.values()), bits(qkv.values()), before]
    }
}

#[test]
fn rows_have_the_same_bits_some_at_a_time_as_operation_by_operation() {
    let rng = &mut Random(7);
    let quantised = [DType::Q4_0, DType::Q8_0, DType::Q5_1, DType::Q4_1];
    // Widths that are no whole tiles, panels or vectors; q, k and v of several types.
    let floats = [DType::F32, DType::F16, DType::Bf16, DType::F32];
    let layers = [
        Layer::random(rng, 64, 96, 16, quantised),
        Layer::random(rng, 40, 56, 12, floats),
        Layer::random(rng, 48, 80, 8, floats),
    ];
    for (i, layer) in layers.iter().enumerate() {
        let width = layer.matrices[0].tensor().shape[1];
        for (n_threads, n_rows) in [(1, 128), (1, 1030), (2, 257), (2, 301), (3, 600)] {
            let x = random_rows(rng, n_rows * width);
            for numerics in Numerics::ALL {
                let dev = CpuDevice::new(Isa::detect(), numerics, n_threads);
                let (together, apart) = (layer.run(&dev, &x, true), layer.run(&dev, &x, false));
                assert!(together == apart, "layer {i}, {n_rows} rows, {n_threads} threads, {numerics:?}");
            }
        }
    }
}
