//! The head of the CPU device against norm, product and draw one after the other: the same bits on every path, for rows of all
//! kinds in any mix.

use crate::conformance::{Matrix, Random, devices, hidden, random_rows, rows_batch};
use valar::device::batch::{Batch, Draw, HeadOut, HeadRow, LogitEdit, StepOutput, Want, mask_words};
use valar::device::cpu::{CpuDevice, Hidden, Isa, Numerics, Weight};
use valar::device::{Device, HeadSpec, sample};
use valar::tensor::DType;

/// Three pieces of the vocabulary, the last one not whole.
const N_VOCAB: usize = 2500;
const N_TOKENS: usize = 400;
/// Its values are no numbers.
const BROKEN_TOKEN: u32 = 7;

/// A head row of any kind.
fn head_row(rng: &mut Random, batch: &mut Batch, token_idx: u32) -> HeadRow {
    let kind = rng.below(6);
    let draw = Draw {
        temperature: if kind == 0 { 0.8 } else { 0.0 },
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        seed: 1,
        choice: 0,
        position: token_idx,
        logprob: rng.below(2) == 0,
    };
    let n_top = [0, 0, 1, 5, 20][rng.below(5)];
    if kind < 2 {
        // Ends of pieces and of the vocabulary, too.
        let token = [0, 1023, 1024, 2499, rng.below(N_VOCAB)][rng.below(5)] as u32;
        return HeadRow::new(token_idx, Want::Score { token }, n_top);
    }
    let mut row = HeadRow::new(token_idx, Want::Draw(draw), n_top);
    if kind == 2 {
        (row.edits_start, row.n_edits) = (batch.edits.len() as u32, 2);
        let token = rng.below(N_VOCAB / 2) as u32;
        batch.edits.push(LogitEdit { token, penalty: 1.5, bias: 3.0 });
        batch.edits.push(LogitEdit { token: token + 1, penalty: 1.0, bias: f32::NEG_INFINITY });
    } else if kind == 3 {
        row.mask = Some((batch.masks.len() / mask_words(N_VOCAB)) as u32);
        batch.masks.extend((0..mask_words(N_VOCAB)).map(|_| rng.next() as u32 | 1));
    }
    row
}

/// A step with a head row of any kind for each token, in no order.
fn batch(rng: &mut Random) -> Batch {
    let mut batch = rows_batch(N_TOKENS);
    let mut heads: Vec<HeadRow> = (0..N_TOKENS as u32).map(|token_idx| head_row(rng, &mut batch, token_idx)).collect();
    for i in (1..heads.len()).rev() {
        heads.swap(i, rng.below(i + 1));
    }
    batch.heads = heads;
    batch
}

/// As text: a number that was not asked for is NaN, which equals nothing.
fn texts(rows: &[HeadOut]) -> Vec<String> {
    rows.iter().map(|row| format!("{row:?}")).collect()
}

struct Case {
    x: Hidden,
    norm: valar::device::cpu::Vector,
    weight: Weight,
    spec: HeadSpec,
}

impl Case {
    fn head(&self, dev: &CpuDevice, batch: &Batch) -> Vec<String> {
        let mut out = StepOutput::default();
        dev.head(&self.x, &self.norm, &self.weight, &self.spec, batch, &mut out);
        texts(&out.rows)
    }

    /// Norm, product, draw: with all logits there.
    fn obvious(&self, dev: &CpuDevice, batch: &Batch, k: usize) -> Vec<String> {
        let (mut act, mut logits) = (dev.new_act(N_TOKENS, k), dev.new_hidden(N_TOKENS, N_VOCAB));
        dev.norm(&self.x, &self.norm, self.spec.eps, &self.weight, batch, &mut act);
        dev.linear(&act, &self.weight, batch, &mut logits);
        let mut scratch = sample::Scratch::new(N_VOCAB);
        let rows = batch.heads.iter().map(|head| {
            let logits = &mut logits.values()[head.token_idx as usize * N_VOCAB..][..N_VOCAB].to_vec();
            sample::draw(logits, head, batch.shaping(head, N_VOCAB), &mut scratch)
        });
        texts(&rows.collect::<Vec<_>>())
    }
}

#[test]
fn a_head_row_has_the_bits_of_norm_product_and_draw_in_any_mix() {
    let rng = &mut Random(11);
    let k = 96;
    let x = {
        let mut x = random_rows(rng, N_TOKENS * k);
        x[BROKEN_TOKEN as usize * k + 3] = f32::NAN;
        x
    };
    let norm = Matrix::random(rng, DType::F32, 1, k);
    for dtype in [DType::Q8_0, DType::F16] {
        let table = Matrix::random(rng, dtype, N_VOCAB, k);
        let batch = batch(rng);
        for numerics in Numerics::ALL {
            let mut truth: Option<Vec<String>> = None;
            for dev in devices(numerics) {
                let (norm, weight) = (dev.load_vector(&[norm.tensor()]).unwrap(), dev.load_weight(&[table.tensor()]).unwrap());
                let spec = HeadSpec { eps: 1e-5, soft_cap: None };
                let case = Case { x: hidden(&dev, &x, k), norm, weight, spec };
                let all = case.head(&dev, &batch);
                let who = format!("{dtype} {numerics:?} on {}", dev.isa().name());
                if dev.isa() != Isa::PORTABLE || numerics == Numerics::F32 {
                    assert!(all == case.obvious(&dev, &batch, k), "{who}: the head differs from norm, product and draw");
                }
                for (row, text) in batch.heads.iter().zip(&all) {
                    let broken = format!("{:?}", HeadOut::BROKEN);
                    assert_eq!(*text == broken, row.token_idx == BROKEN_TOKEN, "{who}: {row:?}");
                }
                for n in [1, 2, 47, 49, 97, 193] {
                    let first = rng.below(N_TOKENS - n);
                    let some = Batch { heads: batch.heads[first..first + n].to_vec(), ..batch.clone() };
                    assert!(case.head(&dev, &some) == all[first..first + n], "{who}: {n} rows from {first} differ from all");
                }
                assert!(*truth.get_or_insert_with(|| all.clone()) == all, "{who} differs from portable");
            }
        }
    }
}

#[test]
fn capped_logits_are_capped_piece_by_piece() {
    let rng = &mut Random(5);
    let k = 64;
    let (x, norm) = (random_rows(rng, N_TOKENS * k), Matrix::random(rng, DType::F32, 1, k));
    let table = Matrix::random(rng, DType::F32, N_VOCAB, k);
    let mut batch = batch(rng);
    batch.heads.retain(|row| matches!(row.want, Want::Score { .. }));
    let dev = CpuDevice::new(Isa::detect(), Numerics::F32, 2);
    let (norm, weight) = (dev.load_vector(&[norm.tensor()]).unwrap(), dev.load_weight(&[table.tensor()]).unwrap());
    let spec = HeadSpec { eps: 1e-5, soft_cap: Some(3.0) };
    let case = Case { x: hidden(&dev, &x, k), norm, weight, spec };
    let mut out = StepOutput::default();
    dev.head(&case.x, &case.norm, &case.weight, &spec, &batch, &mut out);
    let (mut act, mut logits) = (dev.new_act(N_TOKENS, k), dev.new_hidden(N_TOKENS, N_VOCAB));
    dev.norm(&case.x, &case.norm, spec.eps, &case.weight, &batch, &mut act);
    dev.linear(&act, &case.weight, &batch, &mut logits);
    for (row, got) in batch.heads.iter().zip(&out.rows) {
        let logits = &logits.values()[row.token_idx as usize * N_VOCAB..][..N_VOCAB];
        let capped = |x: f32| 3.0 * (f64::from(x) / 3.0).tanh();
        let total: f64 = logits.iter().map(|&x| capped(x).exp()).sum();
        let want = capped(logits[got.token as usize]) - total.ln();
        assert!((f64::from(got.logprob) - want).abs() < 1e-5 * (1.0 + want.abs()), "{} is not {want}", got.logprob);
    }
}
