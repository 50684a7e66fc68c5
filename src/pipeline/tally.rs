//! What the steps of a run compute, counted by part and size, and a few steps of each size as they were, so that kernels can be
//! timed alone on what occurred. Knows no device and no time. Invariant: every token, pair of a query and a key, key and head row
//! is counted once, whichever steps are kept; the memory does not grow with the run.

use crate::device::batch::{Batch, BatchSeq};
use crate::device::{AttentionSpec, BLOCK_TOKENS};
use std::collections::BTreeMap;

/// Most steps that are kept of a class.
const MOST_SAMPLES: usize = 4;

/// What of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// What is done to each token by itself: products, norms, rotations.
    Tokens,
    /// Attention of sequences with several tokens in the step.
    Prompts,
    /// Attention of sequences with one.
    Decoding,
    /// The head.
    Heads,
}

impl Part {
    const ALL: [Self; 4] = [Self::Tokens, Self::Prompts, Self::Decoding, Self::Heads];

    /// Whether a sequence's attention is in it.
    fn has(self, seq: &BatchSeq) -> bool {
        match self {
            Self::Prompts => seq.n_tokens > 1,
            Self::Decoding => seq.n_tokens == 1,
            Self::Tokens | Self::Heads => false,
        }
    }

    /// A step with no more than that part needs.
    fn of(self, batch: &Batch) -> Batch {
        match self {
            Self::Heads => batch.clone(),
            Self::Tokens => Batch { heads: Vec::new(), edits: Vec::new(), masks: Vec::new(), ..batch.clone() },
            Self::Prompts | Self::Decoding => {
                let mut part = Batch::default();
                for seq in batch.seqs.iter().filter(|seq| self.has(seq)) {
                    let (token_start, table_start) = (part.tokens.len() as u32, part.block_tables.len() as u32);
                    let tokens = seq.token_start as usize..(seq.token_start + seq.n_tokens) as usize;
                    part.tokens.extend_from_slice(&batch.tokens[tokens.clone()]);
                    part.positions.extend_from_slice(&batch.positions[tokens]);
                    part.block_tables.extend_from_slice(batch.block_table(seq));
                    part.seqs.push(BatchSeq { token_start, table_start, ..*seq });
                }
                part
            }
        }
    }
}

/// Parts of steps whose kernels should be about as fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Class {
    pub(super) part: Part,
    /// Which half octave [`Amount::rows`] is in.
    size: u32,
    /// Which octave the keys are in that a token sees on average; 0 where it sees none.
    length: u32,
}

/// How much there is of a part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Amount {
    /// Tokens; of the head its rows.
    pub(super) rows: u64,
    /// Pairs of a token and one that it sees, in all layers.
    pub(super) pairs: u64,
    /// Tokens whose keys and values must be read, in all layers: what a sequence shares with the one before it once. Of
    /// sequences that decode alone.
    pub(super) keys: u64,
}

impl std::ops::AddAssign for Amount {
    fn add_assign(&mut self, more: Self) {
        self.rows += more.rows;
        self.pairs += more.pairs;
        self.keys += more.keys;
    }
}

/// What was counted of a class.
#[derive(Debug, Default)]
pub(super) struct Counted {
    /// Steps with such a part.
    pub(super) steps: u64,
    pub(super) amount: Amount,
    /// That part of some steps, evenly spread over them.
    pub(super) samples: Vec<Batch>,
    /// Of `1 << doublings` steps one is kept.
    doublings: u32,
}

impl Counted {
    fn add(&mut self, amount: Amount, sample: impl FnOnce() -> Batch) {
        let place = self.steps;
        self.steps += 1;
        self.amount += amount;
        let is_due = |doublings: u32| place.is_multiple_of(1 << doublings);
        if is_due(self.doublings) && self.samples.len() == MOST_SAMPLES {
            self.doublings += 1;
            let mut is_even = false;
            self.samples.retain(|_| {
                is_even = !is_even;
                is_even
            });
        }
        if is_due(self.doublings) {
            self.samples.push(sample());
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Windows of attention, and how many layers have them.
    windows: Vec<(Option<usize>, u64)>,
    classes: BTreeMap<Class, Counted>,
}

impl Tally {
    /// Of a model with such layers.
    pub(super) fn new(layers: &[AttentionSpec]) -> Self {
        let mut windows: Vec<(Option<usize>, u64)> = Vec::new();
        for layer in layers {
            match windows.iter_mut().find(|(window, _)| *window == layer.window) {
                Some((_, n_layers)) => *n_layers += 1,
                None => windows.push((layer.window, 1)),
            }
        }
        Self { windows, classes: BTreeMap::new() }
    }

    /// Counts a step.
    pub(super) fn add(&mut self, batch: &Batch) {
        let n_layers: u64 = self.windows.iter().map(|(_, n_layers)| n_layers).sum();
        for part in Part::ALL {
            let amount = self.amount(part, batch);
            if amount.rows == 0 {
                continue;
            }
            let seen = amount.pairs / (amount.rows * n_layers.max(1));
            let class = Class { part, size: half_octave(amount.rows), length: seen.checked_ilog2().unwrap_or(0) };
            self.classes.entry(class).or_default().add(amount, || part.of(batch));
        }
    }

    /// How much there is of a part in a step.
    pub(super) fn amount(&self, part: Part, batch: &Batch) -> Amount {
        match part {
            Part::Tokens => Amount { rows: batch.tokens.len() as u64, ..Amount::default() },
            Part::Heads => Amount { rows: batch.heads.len() as u64, ..Amount::default() },
            Part::Prompts | Part::Decoding => {
                let mut amount = Amount::default();
                let mut before = None;
                for seq in batch.seqs.iter().filter(|seq| part.has(seq)) {
                    amount.rows += u64::from(seq.n_tokens);
                    let shared = before.map_or(0, |before| shared_tokens(batch, before, seq));
                    for &(window, n_layers) in &self.windows {
                        amount.pairs += n_layers * pairs(seq, window);
                        if part == Part::Decoding {
                            let seen = u64::from(seq.first_position) + 1;
                            // Windows of different sequences begin at different positions.
                            amount.keys += n_layers * window.map_or(seen - shared.min(seen), |window| seen.min(window as u64));
                        }
                    }
                    before = Some(seq);
                }
                amount
            }
        }
    }

    /// What was counted, by class.
    pub(super) fn classes(&self) -> impl Iterator<Item = (Class, &Counted)> {
        self.classes.iter().map(|(class, counted)| (*class, counted))
    }

    /// What was counted of a part, and in how many steps.
    pub(super) fn total(&self, part: Part) -> (Amount, u64) {
        let mut total = (Amount::default(), 0);
        for (_, counted) in self.classes().filter(|(class, _)| class.part == part) {
            total.0 += counted.amount;
            total.1 += counted.steps;
        }
        total
    }
}

/// In a layer, the pairs of a sequence's tokens of the step and the tokens that they see.
fn pairs(seq: &BatchSeq, window: Option<usize>) -> u64 {
    let triangle = |n: u64| n * (n + 1) / 2;
    // Of all tokens before a position.
    let before = |position: u64| match window {
        Some(window) if position > window as u64 => triangle(window as u64) + (position - window as u64) * window as u64,
        _ => triangle(position),
    };
    let first = u64::from(seq.first_position);
    before(first + u64::from(seq.n_tokens)) - before(first)
}

/// Tokens at the beginning of two sequences that lie in the same blocks.
fn shared_tokens(batch: &Batch, a: &BatchSeq, b: &BatchSeq) -> u64 {
    let blocks = batch.block_table(a).iter().zip(batch.block_table(b)).take_while(|(a, b)| a == b);
    (blocks.count() * BLOCK_TOKENS) as u64
}

/// The number of half octaves up to a number of at least 1: 1, √2, 2, 2·√2 and so on begin one.
fn half_octave(n: u64) -> u32 {
    let octave = n.ilog2();
    2 * octave + u32::from(u128::from(n).pow(2) >= 1 << (2 * octave + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::RopeStyle;
    use crate::device::batch::{Draw, HeadRow, Want};

    /// Layers with these windows.
    fn tally(windows: &[Option<usize>]) -> Tally {
        let layer = |&window: &Option<usize>| AttentionSpec {
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 16,
            scale: 0.25,
            soft_cap: None,
            window,
            rope_style: RopeStyle::Halves,
            rope_freqs: vec![1.0; 8],
            rope_scale: 1.0,
        };
        Tally::new(&windows.iter().map(layer).collect::<Vec<_>>())
    }

    /// A step of sequences given by first position, tokens and blocks.
    fn step(seqs: &[(u32, u32, &[u32])]) -> Batch {
        let mut batch = Batch::default();
        for &(first_position, n_tokens, blocks) in seqs {
            let (token_start, table_start) = (batch.tokens.len() as u32, batch.block_tables.len() as u32);
            let n_blocks = blocks.len() as u32;
            batch.seqs.push(BatchSeq { token_start, n_tokens, first_position, table_start, n_blocks });
            batch.positions.extend(first_position..first_position + n_tokens);
            batch.tokens.extend((0..n_tokens).map(|i| first_position + i));
            batch.block_tables.extend_from_slice(blocks);
        }
        batch.check(100, 1000);
        batch
    }

    fn amount(rows: u64, pairs: u64, keys: u64) -> Amount {
        Amount { rows, pairs, keys }
    }

    #[test]
    fn a_step_is_counted_token_by_token() {
        let mut tally = tally(&[None, Some(20), None]);
        // A prompt's end, one that decodes, a whole prompt, one that decodes and shares two blocks with the other.
        let mut batch = step(&[(30, 10, &[1, 2, 3]), (40, 1, &[4, 5, 6]), (0, 5, &[7]), (36, 1, &[4, 5, 8])]);
        let draw = Draw { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0, choice: 0, position: 0, logprob: false };
        batch.heads = [9, 10, 15].map(|token| HeadRow::new(token, Want::Draw(draw), 0)).to_vec();
        tally.add(&batch);
        // Token by token, layer by layer, from what each sees.
        let seen = |first: u64, n: u64, window: u64| (first..first + n).map(|p| (p + 1).min(window)).sum::<u64>();
        let all = u64::MAX;
        let prompts = 2 * (seen(30, 10, all) + seen(0, 5, all)) + seen(30, 10, 20) + seen(0, 5, 20);
        let decoding = 2 * (41 + 37) + 20 + 20;
        assert_eq!(tally.total(Part::Tokens), (amount(17, 0, 0), 1));
        assert_eq!(tally.total(Part::Prompts), (amount(15, prompts, 0), 1));
        assert_eq!(tally.total(Part::Decoding), (amount(2, decoding, 2 * (41 + 37 - 32) + 20 + 20), 1));
        assert_eq!(tally.total(Part::Heads), (amount(3, 0, 0), 1));
        // A sequence that shares all of its blocks reads none; one after it nothing of what is not its neighbour's.
        let batch = step(&[(31, 1, &[1, 2]), (31, 1, &[1, 2]), (10, 1, &[3]), (31, 1, &[1, 2])]);
        assert_eq!(tally.amount(Part::Decoding, &batch).keys, 2 * (32 + 11 + 32) + 20 + 20 + 11 + 20);
    }

    #[test]
    fn windows_begin_where_they_should() {
        for window in [1, 2, 7, 16] {
            for (first, n) in [(0, 1), (0, 7), (3, 4), (5, 9), (7, 1), (40, 3)] {
                let seq = BatchSeq { token_start: 0, n_tokens: n, first_position: first, table_start: 0, n_blocks: 0 };
                let by_token: u64 = (first..first + n).map(|p| u64::from(p + 1).min(window)).sum();
                assert_eq!(pairs(&seq, Some(window as usize)), by_token, "{n} tokens from {first}, window {window}");
            }
        }
    }

    #[test]
    fn steps_of_a_size_are_kept_evenly_and_every_one_is_counted() {
        let mut tally = tally(&[None]);
        for i in 0..1000 {
            tally.add(&step(&[(200 + i % 50, 1, &[0; 16]), (0, 100, &[i % 99; 7])]));
        }
        assert_eq!(tally.total(Part::Tokens).0.rows, 101_000);
        let (decoding, n_steps) = tally.total(Part::Decoding);
        assert_eq!((decoding.rows, n_steps), (1000, 1000));
        let (_, counted) = tally.classes().find(|(class, _)| class.part == Part::Prompts).unwrap();
        let kept: Vec<u32> = counted.samples.iter().map(|sample| sample.block_tables[0]).collect();
        assert_eq!(kept, [0, 256 % 99, 512 % 99, 768 % 99]);
        assert!(tally.classes().all(|(_, counted)| (1..=MOST_SAMPLES).contains(&counted.samples.len())));
        // What is kept is the part alone, and a step that can be run.
        for sample in &counted.samples {
            sample.check(100, 1000);
            assert_eq!((sample.tokens.len(), sample.seqs.len(), sample.block_tables.len()), (100, 1, 7));
        }
    }

    #[test]
    fn half_octaves_begin_at_powers_of_the_root_of_2() {
        assert_eq!([1, 2, 3, 4, 5, 6, 11, 12, 16, 22, 23].map(half_octave), [0, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9]);
        assert_eq!(half_octave(u64::from(u32::MAX)), 63);
    }
}
