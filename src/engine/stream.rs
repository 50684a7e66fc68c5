//! What the rows of one job have in common: a trunk of shared prefix, and how long their outputs get. Knows nothing of
//! classes, queues or steps.
//!
//! The trunk is the engine's only cache: the first `keep_tokens` tokens of the stream's last admitted row (its owner).
//! Rows come in the order of a walk through their prefix tree, so what any later row shares with any earlier one lies in
//! it. Its invariant: positions below `ready` are in the KV cache when attention runs in the step under way; `blocks`
//! covers `len` tokens, one reference each. The last of them may be partly filled and its owner may go on writing it
//! past `len`: so a follower copies such a block and shares only full ones, which nobody writes any more.

use std::sync::Arc;

use super::blocks::Blocks;
use super::sequence::Sequence;
use crate::device::BLOCK_TOKENS;

/// Finished rows after which a stream's own lengths are believed.
const WARM_LENGTHS: u32 = 8;
/// Finished rows that the averages look back on.
const LENGTHS_MEMORY: f32 = 64.0;

/// See the module.
pub(super) struct Stream {
    pub(super) id: u32,
    /// Waiting and running sequences.
    pub(super) n_live: usize,
    pub(super) trunk: Trunk,
    pub(super) lengths: Lengths,
}

impl Stream {
    pub(super) fn new(id: u32, max_context: usize) -> Self {
        let trunk = Trunk { blocks: Vec::with_capacity(max_context.div_ceil(BLOCK_TOKENS)), ..Trunk::default() };
        Self { id, n_live: 0, trunk, lengths: Lengths::default() }
    }

    /// Learns from a row's length, unless the row was told it.
    pub(super) fn note_finished(&mut self, row: &Sequence) {
        if !row.params.ignore_eos {
            self.lengths.record(row.buffers.generated.len());
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Trunk {
    /// The last row admitted, whose prefix it is (or was, before it had to shrink).
    owner: Option<u64>,
    prompt: Arc<[u32]>,
    /// Whose rows may share it.
    shared_by: Option<u64>,
    /// Leading tokens of `prompt` that it holds.
    len: usize,
    /// How many of them may be shared now.
    ready: usize,
    /// `len` / 16, rounded up.
    blocks: Vec<u32>,
}

impl Trunk {
    /// How many leading tokens of the sequence it has ready.
    pub(super) fn common_tokens(&self, seq: &Sequence) -> usize {
        if self.shared_by == seq.shared_by() { seq.common_tokens(&self.prompt[..self.ready]) } else { 0 }
    }

    /// The blocks of its tokens, for reading.
    pub(super) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Tokens held and tokens ready, for audits.
    pub(super) fn lens(&self) -> (usize, usize) {
        (self.len, self.ready)
    }

    /// Whether the sequence is the last row that was admitted.
    pub(super) fn is_owner(&self, id: u64) -> bool {
        self.owner == Some(id)
    }

    /// Keeps the first `len` tokens at most.
    pub(super) fn truncate(&mut self, len: usize, blocks: &mut Blocks) {
        self.len = self.len.min(len);
        self.ready = self.ready.min(len);
        for block in self.blocks.drain(self.len.div_ceil(BLOCK_TOKENS)..) {
            blocks.release(block);
        }
    }

    /// Becomes the prefix of a row that was just given its blocks, of which `row.computed` tokens are ready.
    pub(super) fn grow_from(&mut self, row: &Sequence, blocks: &mut Blocks) {
        self.truncate(0, blocks);
        self.owner = Some(row.id);
        self.prompt = row.prompt.clone();
        self.shared_by = row.shared_by();
        self.len = row.keep_tokens;
        self.ready = row.computed.min(self.len);
        self.blocks.extend_from_slice(&row.buffers.table[..self.len.div_ceil(BLOCK_TOKENS)]);
        self.blocks.iter().for_each(|&block| blocks.share(block));
    }

    /// The row has tokens up to `computed` in this step or before.
    pub(super) fn note_computed(&mut self, row: u64, computed: usize) {
        if self.is_owner(row) {
            self.ready = self.ready.max(computed.min(self.len));
        }
    }

    /// The row gave up its blocks: what it did not compute will not come, unless it is admitted again.
    pub(super) fn note_lost(&mut self, row: u64, blocks: &mut Blocks) {
        if self.is_owner(row) {
            self.truncate(self.ready, blocks);
        }
    }
}

/// Running mean and mean deviation of a stream's output lengths, in tokens.
#[derive(Default)]
pub(super) struct Lengths {
    n_rows: u32,
    mean: f32,
    deviation: f32,
}

impl Lengths {
    /// A row ended by itself after `n_tokens`.
    pub(super) fn record(&mut self, n_tokens: usize) {
        self.n_rows += 1;
        let rate = (1.0 / self.n_rows as f32).max(1.0 / LENGTHS_MEMORY);
        let error = n_tokens as f32 - self.mean;
        self.mean += rate * error;
        self.deviation += rate * (error.abs() - self.deviation);
    }

    /// The length that a row is likely to have; `cold` until enough rows have finished.
    pub(super) fn expected(&self, cold: u32) -> u32 {
        if self.n_rows < WARM_LENGTHS { cold } else { self.mean.ceil() as u32 }
    }

    /// A length that few rows pass; at least `cold` until enough rows have finished.
    pub(super) fn estimate(&self, cold: u32) -> u32 {
        let high = (self.mean + 2.0 * self.deviation).ceil() as u32;
        if self.n_rows < WARM_LENGTHS { high.max(cold) } else { high.max(1) }
    }
}
