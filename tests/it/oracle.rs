//! The model against independent oracles: `transformers` in f32, and itself under other chunkings. Generic over the
//! runner, so that every device answers to the same functions with its own bounds.
//!
//! Golden files: `greedy20_transformers_f32.jsonl` (20 prompts, 128 greedy tokens each, the five likeliest tokens of each
//! step with their log-probabilities) from transformers in f32 on this model's dequantised weights.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests panic on purpose, print what they measured and compare bits"
)]

use crate::common::{golden, model_path};
use crate::model::TinyModel;
use candle_core::quantized::GgmlDType;
use std::ops::Range;
use valar::device::BLOCK_TOKENS;
use valar::device::batch::{Batch, BatchSeq, BlockCopy, Draw, HeadOut, HeadRow, StepOutput, Want};
use valar::device::reference::Reference;
use valar::gguf::Gguf;
use valar::model::{ModelRunner, Runner};

/// Blocks enough for all golden sequences at once, twice.
pub(crate) const N_BLOCKS: usize = 700;
/// Tokens per step in these tests.
pub(crate) const STEP_TOKENS: usize = 512;

/// The golden answer to one prompt.
pub(crate) struct Golden {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    /// The five likeliest tokens before each answer token, most likely first, with log-probabilities.
    top5: Vec<Vec<(u32, f32)>>,
}

/// A sequence and where it lives in the pool.
struct Seq {
    tokens: Vec<u32>,
    table: Vec<u32>,
}

impl Seq {
    fn new(tokens: Vec<u32>, table: Range<u32>) -> Self {
        Self { tokens, table: table.collect() }
    }
}

/// Draws the likeliest token.
const GREEDY: Want =
    Want::Draw(Draw { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0, choice: 0, position: 0, logprob: false });

fn reference() -> Box<dyn Runner> {
    let gguf = Gguf::open(&model_path()).unwrap();
    Box::new(ModelRunner::load(Reference, &gguf, N_BLOCKS, STEP_TOKENS).unwrap())
}

pub(crate) fn golden_answers() -> Vec<Golden> {
    let text = std::fs::read_to_string(golden("greedy20_transformers_f32.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.map(|row| Golden {
        prompt: serde_json::from_value(row["prompt_ids"].clone()).unwrap(),
        answer: serde_json::from_value(row["token_ids"].clone()).unwrap(),
        top5: serde_json::from_value(row["top5"].clone()).unwrap(),
    })
    .collect()
}

/// Adds positions `range` of a sequence to a batch; `want` says what to ask of each position.
fn push(batch: &mut Batch, seq: &Seq, range: Range<usize>, want: impl Fn(usize) -> Option<(Want, u8)>) {
    let token_start = batch.tokens.len() as u32;
    for position in range.clone() {
        if let Some((want, n_top)) = want(position) {
            batch.heads.push(HeadRow::new(batch.tokens.len() as u32, want, n_top));
        }
        batch.tokens.push(seq.tokens[position]);
        batch.positions.push(position as u32);
    }
    batch.seqs.push(BatchSeq {
        token_start,
        n_tokens: range.len() as u32,
        first_position: range.start as u32,
        table_start: batch.block_tables.len() as u32,
        n_blocks: seq.table.len() as u32,
    });
    batch.block_tables.extend(&seq.table);
}

fn run(runner: &mut dyn Runner, batch: &Batch) -> Vec<HeadOut> {
    let mut out = StepOutput::default();
    runner.run(batch, &mut out).unwrap();
    assert!(out.rows.iter().all(|row| !row.is_broken()));
    out.rows
}

/// Teacher-forced differences |log-probability - golden| of the golden five tokens at each answer position. A golden token
/// that is not among the runner's 20 likeliest counts with the 20th's log-probability: at least so far off.
pub(crate) fn golden_differences(runner: &mut dyn Runner, answers: &[Golden]) -> Vec<f32> {
    let mut differences = Vec::new();
    for answer in answers {
        let tokens = [&answer.prompt[..], &answer.answer[..]].concat();
        let n_prompt = answer.prompt.len();
        let seq = Seq::new(tokens, 0..N_BLOCKS as u32 / 2);
        let n_fed = seq.tokens.len() - 1;
        assert!(n_fed <= STEP_TOKENS);
        let mut batch = Batch::default();
        push(&mut batch, &seq, 0..n_fed, |p| (p + 1 >= n_prompt).then(|| (Want::Score { token: seq.tokens[p + 1] }, 20)));
        for (row, top5) in run(runner, &batch).iter().zip(&answer.top5) {
            let top = &row.top[..row.n_top.into()];
            for &(token, want) in top5 {
                let found = top.iter().find(|entry| entry.0 == token).unwrap_or(&top[19]);
                differences.push((found.1 - want).abs());
            }
            assert!(top5.iter().all(|&(t, _)| t != row.token || top.contains(&(t, row.logprob))), "score differs from top");
        }
    }
    differences
}

/// The value that a share `q` of the values does not exceed.
pub(crate) fn quantile(values: &[f32], q: f64) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

/// Decodes all golden prompts greedily, side by side, and compares each answer up to the first step whose two likeliest
/// tokens are within `margin` nats. Returns how many tokens were compared.
pub(crate) fn assert_greedy_answers(runner: &mut dyn Runner, answers: &[Golden], margin: f32) -> usize {
    let blocks_each = N_BLOCKS as u32 / answers.len() as u32;
    let mut seqs: Vec<Seq> =
        (0..).zip(answers).map(|(i, a)| Seq::new(a.prompt.clone(), i * blocks_each..(i + 1) * blocks_each)).collect();
    for seq in &mut seqs {
        let mut batch = Batch::default();
        let last = seq.tokens.len() - 1;
        push(&mut batch, seq, 0..last + 1, |p| (p == last).then_some((GREEDY, 0)));
        let drawn = run(runner, &batch)[0].token;
        seq.tokens.push(drawn);
    }
    for _ in 1..answers[0].answer.len() {
        let mut batch = Batch::default();
        for seq in &seqs {
            push(&mut batch, seq, seq.tokens.len() - 1..seq.tokens.len(), |_| Some((GREEDY, 0)));
        }
        for (seq, row) in seqs.iter_mut().zip(run(runner, &batch)) {
            seq.tokens.push(row.token);
        }
    }
    let mut n_compared = 0;
    for (i, (seq, answer)) in seqs.iter().zip(answers).enumerate() {
        let is_close = |top5: &Vec<(u32, f32)>| top5[0].1 - top5[1].1 < margin;
        let n = answer.top5.iter().position(is_close).unwrap_or(answer.answer.len());
        assert_eq!(seq.tokens[answer.prompt.len()..][..n], answer.answer[..n], "golden answer {i}");
        n_compared += n;
    }
    n_compared
}

/// Perplexity as `llama-perplexity -c 512` counts it: chunks of 512 tokens, each from an empty context and without BOS,
/// the predictions of tokens 257 to 511 scored.
pub(crate) fn perplexity(runner: &mut dyn Runner, tokens: &[u32]) -> f64 {
    let (mut sum, mut n_scored) = (0.0, 0);
    for chunk in tokens.as_chunks::<512>().0 {
        let seq = Seq::new(chunk.to_vec(), 0..32);
        for range in [0..256, 256..511] {
            let mut batch = Batch::default();
            push(&mut batch, &seq, range, |p| (p >= 256).then(|| (Want::Score { token: seq.tokens[p + 1] }, 0)));
            for row in run(runner, &batch) {
                sum -= f64::from(row.logprob);
                n_scored += 1;
            }
        }
    }
    (sum / f64::from(n_scored)).exp()
}

/// Token ids of `ppl_sherlock_20k.txt`, by the Python package `tokenizers` 0.23.3 from the model file's vocabulary and merges.
pub(crate) fn sherlock_tokens() -> Vec<u32> {
    serde_json::from_str(&std::fs::read_to_string(golden("ppl_sherlock_20k.ids.json")).unwrap()).unwrap()
}

/// The same, folded into a smaller vocabulary.
fn sherlock_tokens_below(n_vocab: usize) -> Vec<u32> {
    sherlock_tokens().into_iter().map(|token| token % n_vocab as u32).collect()
}

/// A small deterministic generator for shapes of batches.
struct Rng(u64);

impl Rng {
    /// A number below `n`.
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % n as u64) as usize
    }
}

/// The largest difference between two lists of results in what they score and in their likeliest tokens' values.
fn largest_difference(a: &[HeadOut], b: &[HeadOut]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut worst = 0.0f32;
    for (a, b) in a.iter().zip(b) {
        assert_eq!((a.token, a.n_top), (b.token, b.n_top));
        let pairs = a.top.iter().zip(&b.top).take(a.n_top.into()).map(|(a, b)| (a.1, b.1)).chain([(a.logprob, b.logprob)]);
        worst = pairs.map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
    }
    worst
}

/// Scores the token after each position, and asks for some likeliest ones.
fn score_next(seq: &Seq, position: usize) -> Option<(Want, u8)> {
    seq.tokens.get(position + 1).map(|&token| (Want::Score { token }, 5))
}

/// Runs sequences of `lengths` tokens alone, each in one chunk and in blocks that lie in order; then together, in random
/// chunks (single tokens among them, as in decoding), in scattered blocks. Returns the largest difference.
pub(crate) fn chunking_difference(runner: &mut dyn Runner, lengths: &[usize], seed: u64) -> f32 {
    let limits = runner.limits();
    let text = sherlock_tokens_below(limits.n_vocab);
    let mut rng = Rng(seed);
    let mut blocks: Vec<u32> = (0..limits.n_blocks as u32).collect();
    for i in (1..blocks.len()).rev() {
        blocks.swap(i, rng.below(i + 1));
    }
    let mut alone = Vec::new();
    let mut seqs = Vec::new();
    for &n in lengths {
        let first = rng.below(text.len() - n);
        let n_blocks = n.div_ceil(BLOCK_TOKENS);
        let mut seq = Seq::new(text[first..first + n].to_vec(), 0..n_blocks as u32);
        let mut batch = Batch::default();
        push(&mut batch, &seq, 0..n, |p| score_next(&seq, p));
        alone.push(run(runner, &batch));
        seq.table = blocks.split_off(blocks.len() - n_blocks);
        seqs.push(seq);
    }
    let mut together = vec![Vec::new(); seqs.len()];
    let mut n_done = vec![0; seqs.len()];
    while n_done.iter().zip(&seqs).any(|(&n, seq)| n < seq.tokens.len()) {
        let mut batch = Batch::default();
        let mut owners = Vec::new();
        for (i, seq) in seqs.iter().enumerate() {
            let room = (limits.max_step_tokens - batch.tokens.len()).min(seq.tokens.len() - n_done[i]);
            let largest = [1, 3, 17, 64, 257][rng.below(5)].min(room);
            if largest == 0 || rng.below(4) == 0 {
                continue;
            }
            let n = 1 + rng.below(largest);
            push(&mut batch, seq, n_done[i]..n_done[i] + n, |p| score_next(seq, p));
            owners.resize(batch.heads.len(), i);
            n_done[i] += n;
        }
        for (owner, row) in owners.into_iter().zip(run(runner, &batch)) {
            together[owner].push(row);
        }
    }
    alone.iter().zip(&together).map(|(a, b)| largest_difference(a, b)).fold(0.0, f32::max)
}

/// Sequence B begins as A does, for a block and a part of the next: it takes the whole block from A and a copy of the
/// part, once while A is being computed in the same step, once from a later step. Returns the largest difference from B
/// computed alone.
pub(crate) fn copied_prefix_difference(runner: &mut dyn Runner, n_slots: usize) -> f32 {
    let text = sherlock_tokens_below(runner.limits().n_vocab);
    let n_shared = BLOCK_TOKENS + n_slots;
    let a = Seq::new(text[..50].to_vec(), 10..14);
    let b_tokens = [&text[..n_shared], &text[1000..1020]].concat();
    let n_b = b_tokens.len();
    let b_alone = Seq::new(b_tokens.clone(), 20..24);
    let mut batch = Batch::default();
    push(&mut batch, &b_alone, 0..n_b, |p| score_next(&b_alone, p));
    let alone = run(runner, &batch);

    let mut worst = 0.0f32;
    for in_same_step in [true, false] {
        let first_block = if in_same_step { 30 } else { 40 };
        let b = Seq { tokens: b_tokens.clone(), table: [10].into_iter().chain(first_block..first_block + 3).collect() };
        let mut batch = Batch::default();
        if in_same_step {
            push(&mut batch, &a, 0..a.tokens.len(), |_| None);
        }
        push(&mut batch, &b, n_shared..n_b, |p| score_next(&b, p));
        batch.copies.push(BlockCopy { src: 11, dst: first_block, n_slots: n_slots as u32 });
        worst = worst.max(largest_difference(&run(runner, &batch), &alone[n_shared..]));
    }
    worst
}

/// The default run takes 4 of the 20 answers, as this is f32 arithmetic without hurry; the ignored test takes all.
#[test]
fn reference_matches_transformers_log_probabilities() {
    assert_log_probabilities(&golden_answers()[..4]);
}

#[test]
#[ignore = "minutes of f32 arithmetic"]
fn reference_matches_all_transformers_log_probabilities() {
    assert_log_probabilities(&golden_answers());
}

fn assert_log_probabilities(answers: &[Golden]) {
    let differences = golden_differences(&mut *reference(), answers);
    assert_eq!(differences.len(), answers.len() * 128 * 5);
    let worst = quantile(&differences, 1.0);
    println!("median {:.6} p99 {:.6} worst {worst:.6}", quantile(&differences, 0.5), quantile(&differences, 0.99));
    assert!(worst <= 0.01, "{worst} nats off");
}

/// The beginning of one of the 20 answers; the ignored test takes all.
#[test]
fn reference_gives_transformers_greedy_answers() {
    let mut answer = golden_answers().swap_remove(0);
    answer.answer.truncate(40);
    answer.top5.truncate(40);
    let n_compared = assert_greedy_answers(&mut *reference(), &[answer], 0.01);
    assert!(n_compared > 20, "only {n_compared} tokens came before a near tie");
}

#[test]
#[ignore = "minutes of f32 arithmetic"]
fn reference_gives_all_transformers_greedy_answers() {
    let n_compared = assert_greedy_answers(&mut *reference(), &golden_answers(), 0.01);
    println!("{n_compared} tokens compared");
    assert!(n_compared > 2000, "only {n_compared} tokens came before a near tie");
}

/// Many shapes on a small model, where they cost little, and one on the real one.
#[test]
fn reference_chunks_and_blocks_do_not_matter() {
    let mut small = ModelRunner::load(Reference, &TinyModel::new(GgmlDType::Q8_0).write(), 120, 320).unwrap();
    for seed in 0..40 {
        let worst = chunking_difference(&mut small, &[1, 2, 15, 16, 17, 33, 100, 300], seed);
        assert!(worst <= 1e-4, "seed {seed}: {worst} nats");
    }
    let worst = chunking_difference(&mut *reference(), &[1, 17, 50], 0);
    assert!(worst <= 1e-4, "the real model: {worst} nats");
}

#[test]
fn reference_copies_partly_shared_blocks() {
    let mut small = ModelRunner::load(Reference, &TinyModel::new(GgmlDType::Q8_0).write(), 50, 256).unwrap();
    for n_slots in 1..BLOCK_TOKENS {
        let worst = copied_prefix_difference(&mut small, n_slots);
        assert!(worst <= 1e-4, "{n_slots} slots: {worst} nats");
    }
    let worst = copied_prefix_difference(&mut *reference(), 5);
    assert!(worst <= 1e-4, "the real model: {worst} nats");
}

/// The perplexity that transformers in f32 has on the same tokens.
#[test]
#[ignore = "minutes of f32 arithmetic"]
fn reference_perplexity() {
    let value = perplexity(&mut *reference(), &sherlock_tokens());
    println!("perplexity {value:.4}");
    assert!((value / 25.8477 - 1.0).abs() < 1e-4, "perplexity {value}");
}
