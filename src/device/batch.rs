//! What one step runs: flat arrays, filled by the engine, read by a device. Knows nothing of requests or text.
//! Invariant: every index is in range and every sequence's tokens are contiguous (`Batch::check` asserts it).

use super::BLOCK_TOKENS;
use crate::request::MAX_TOP_LOGPROBS;

/// One step's work. Capacity is reserved once; a step only clears and refills.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    /// Token ids, `[T]`.
    pub tokens: Vec<u32>,
    /// Those of them that the step before draws, which may still be under way, by the order of tokens: `tokens` says 0 of them.
    pub drawn: Vec<Drawn>,
    /// Absolute position of each token in its sequence, `[T]`.
    pub positions: Vec<u32>,
    /// The sequences that have tokens in this step, in the order of their tokens.
    pub seqs: Vec<BatchSeq>,
    /// Block tables of all sequences, one after the other; entry i of a sequence's table holds its positions
    /// 16 i to 16 i + 15.
    pub block_tables: Vec<u32>,
    /// Partly shared blocks to copy, in order, in each layer after this step's stores and before attention.
    pub copies: Vec<BlockCopy>,
    /// Tokens whose next-token distribution is wanted.
    pub heads: Vec<HeadRow>,
    /// Changes to logits, of all head rows, one row's after the other's.
    pub edits: Vec<LogitEdit>,
    /// Masks of allowed tokens, one after the other, [`mask_words`] of them each: bit `i % 32` of word `i / 32` is token i.
    pub masks: Vec<u32>,
}

/// A token that is what the step before draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drawn {
    /// Index in `Batch::tokens`.
    pub token_idx: u32,
    /// Which of the head rows of the step before. One that can't be computed draws nothing; whatever this step gives such a sequence
    /// is not used.
    pub head_idx: u32,
}

/// Words of a mask over the vocabulary.
pub const fn mask_words(n_vocab: usize) -> usize {
    n_vocab.div_ceil(32)
}

/// A change to one token's logit before a draw: first a repetition penalty (a positive logit is divided by it, a
/// negative one multiplied), then a sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitEdit {
    /// The token.
    pub token: u32,
    /// 1 changes nothing.
    pub penalty: f32,
    /// 0 changes nothing; −infinity forbids the token.
    pub bias: f32,
}

/// What a draw does to the logits first. Log-probabilities are of the model's own, before it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shaping<'a> {
    /// Each token at most once.
    pub edits: &'a [LogitEdit],
    /// Allowed tokens; all if `None`.
    pub mask: Option<&'a [u32]>,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSeq {
    /// Index of its first token in `Batch::tokens`.
    pub token_start: u32,
    /// Its tokens in this step (1 when decoding, a chunk when prefilling).
    pub n_tokens: u32,
    /// Absolute position of the first of them: keys `0..first_position` are in the cache already (or arrive by a copy).
    pub first_position: u32,
    /// Where its block table starts in `Batch::block_tables`.
    pub table_start: u32,
    /// Entries of its block table; they cover positions up to `first_position + n_tokens`.
    pub n_blocks: u32,
}

/// Copies the first `n_slots` slots of one block to another (never the rest: this step may have stored there).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Block to read.
    pub src: u32,
    /// Block to write.
    pub dst: u32,
    /// Slots to copy, 1 to 15.
    pub n_slots: u32,
}

/// A token whose next-token distribution is wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadRow {
    /// Index in `Batch::tokens`.
    pub token_idx: u32,
    /// What to do with the distribution.
    pub want: Want,
    /// How many of the likeliest tokens to report (at most [`MAX_TOP_LOGPROBS`]).
    pub n_top: u8,
    /// Where its edits start in `Batch::edits`.
    pub edits_start: u32,
    /// How many there are.
    pub n_edits: u32,
    /// Which of `Batch::masks` holds; all tokens are allowed if `None`.
    pub mask: Option<u32>,
}

impl HeadRow {
    /// A row whose logits stay as they are.
    pub const fn new(token_idx: u32, want: Want, n_top: u8) -> Self {
        Self { token_idx, want, n_top, edits_start: 0, n_edits: 0, mask: None }
    }
}

/// What to do with a next-token distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Want {
    /// Draw the next token.
    Draw(Draw),
    /// Report the log-probability of this token.
    Score {
        /// The token to score.
        token: u32,
    },
}

/// How to draw a token. The draw is keyed by (seed, choice, position) alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// 0 is greedy: the largest logit, the lowest id on ties.
    pub temperature: f32,
    /// Nucleus probability; 1 is off.
    pub top_p: f32,
    /// Likeliest tokens to keep; 0 is off.
    pub top_k: u32,
    /// Tokens whose probability is under this share of the likeliest's are left out; 0 is off.
    pub min_p: f32,
    /// Seed of the row.
    pub seed: u64,
    /// Which of the row's completions (0 unless n > 1).
    pub choice: u32,
    /// Absolute position of the token that is drawn.
    pub position: u32,
    /// Whether the token's log-probability is wanted (a greedy draw without it needs no softmax).
    pub logprob: bool,
}

/// What a step gives back: one entry per `Batch::heads`, in order.
#[derive(Debug, Default, Clone)]
pub struct StepOutput {
    /// One entry per head row.
    pub rows: Vec<HeadOut>,
}

/// One head row's result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadOut {
    /// The drawn (or scored) token.
    pub token: u32,
    /// Its log-probability in nats under the model's own distribution; NaN where it was not asked for.
    pub logprob: f32,
    /// The likeliest tokens, most likely first, ties to the lower id; the first `n_top` are valid.
    pub top: [(u32, f32); MAX_TOP_LOGPROBS],
    /// Valid entries of `top`.
    pub n_top: u8,
}

impl HeadOut {
    /// What a head row gets whose logits hold a NaN or +infinity, or nothing finite: the row can't be computed. The token
    /// is no token of any vocabulary, so it can't be taken for one; compare with [`HeadOut::is_broken`].
    pub const BROKEN: Self = Self { token: u32::MAX, logprob: f32::NAN, top: [(0, f32::NAN); MAX_TOP_LOGPROBS], n_top: 0 };

    /// Whether the row could not be computed.
    pub fn is_broken(&self) -> bool {
        self.token == u32::MAX
    }
}

impl Batch {
    /// Empties the batch, keeping its capacity.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.drawn.clear();
        self.positions.clear();
        self.seqs.clear();
        self.block_tables.clear();
        self.copies.clear();
        self.heads.clear();
        self.edits.clear();
        self.masks.clear();
    }

    /// What a head row's draw does to the logits.
    pub fn shaping(&self, row: &HeadRow, n_vocab: usize) -> Shaping<'_> {
        let n_words = mask_words(n_vocab);
        Shaping {
            edits: &self.edits[row.edits_start as usize..][..row.n_edits as usize],
            mask: row.mask.map(|mask| &self.masks[mask as usize * n_words..][..n_words]),
        }
    }

    /// The block table of a sequence, `[n_blocks]`.
    pub fn block_table(&self, seq: &BatchSeq) -> &[u32] {
        &self.block_tables[seq.table_start as usize..][..seq.n_blocks as usize]
    }

    /// Asserts that the arrays agree with each other.
    ///
    /// # Panics
    /// If they do not: a bug in whoever built the batch.
    pub fn check(&self, n_blocks: usize, n_vocab: usize) {
        assert_eq!(self.tokens.len(), self.positions.len());
        assert!(self.tokens.iter().all(|&t| (t as usize) < n_vocab), "token id outside the vocabulary of {n_vocab}");
        assert!(self.drawn.iter().is_sorted_by(|a, b| a.token_idx < b.token_idx));
        assert!(self.drawn.iter().all(|drawn| self.tokens.get(drawn.token_idx as usize) == Some(&0)));
        let mut next = 0;
        for seq in &self.seqs {
            assert_eq!(seq.token_start, next, "sequences must be contiguous");
            assert!(seq.n_tokens > 0);
            next += seq.n_tokens;
            let end = (seq.first_position + seq.n_tokens) as usize;
            assert!(self.block_table(seq).len() * BLOCK_TOKENS >= end, "block table too short for position {end}");
            let positions = &self.positions[seq.token_start as usize..next as usize];
            assert!(positions.iter().copied().eq(seq.first_position..end as u32), "positions from {}", seq.first_position);
        }
        assert_eq!(next as usize, self.tokens.len());
        assert!(self.block_tables.iter().all(|&b| (b as usize) < n_blocks), "block id outside the pool of {n_blocks}");
        for copy in &self.copies {
            assert!((copy.src as usize) < n_blocks && (copy.dst as usize) < n_blocks && copy.src != copy.dst);
            assert!(copy.n_slots as usize > 0 && (copy.n_slots as usize) < BLOCK_TOKENS);
        }
        for head in &self.heads {
            assert!((head.token_idx as usize) < self.tokens.len() && head.n_top as usize <= MAX_TOP_LOGPROBS);
            let shaping = self.shaping(head, n_vocab);
            assert!(shaping.edits.iter().all(|edit| (edit.token as usize) < n_vocab && edit.penalty > 0.0));
        }
    }
}
