//! Counts the scheduler's books again from scratch. Changes nothing.

use super::scheduler::Scheduler;
use super::sequence::{Phase, Sequence};
use crate::device::BLOCK_TOKENS;

impl Scheduler {
    /// Asserts, between steps, that references add up, that no block has two writers, and that the counters agree with
    /// the lists they count. `is_under_way`: a step has begun.
    pub(super) fn check(&self, is_under_way: bool) {
        self.blocks.check(&self.count_references());
        self.check_writers();
        assert!(self.held.is_empty(), "copy sources are held past their step");
        assert_eq!(self.n_running, self.running.iter().filter(|row| row.phase == Phase::Live).count());
        assert!(self.n_running <= self.config.max_running);
        let mut n_live = vec![0; self.streams.len()];
        for row in &self.running {
            // Cancelled, or all of its tokens are in that step.
            assert!((row.phase == Phase::Live && row.remaining() > 0) || is_under_way);
            assert!(row.is_admitted && row.pending.is_none());
            assert!(row.buffers.table.len() >= row.computed.div_ceil(BLOCK_TOKENS));
            assert!(row.n_tokens() < self.limits.max_context);
            n_live[row.stream_idx] += 1;
        }
        for (queue, &n_queued) in self.waiting.iter().zip(&self.n_queued) {
            assert_eq!(queue.iter().filter(|r| !r.is_admitted).count(), n_queued);
            assert!(queue.iter().map(Sequence::order).is_sorted(), "by rank, preempted rows before new ones, then by turns");
            assert!(queue.iter().all(|r| r.phase == Phase::Live && r.computed == 0 && r.buffers.table.is_empty()));
            for row in queue {
                n_live[row.stream_idx] += 1;
            }
        }
        assert!(self.streams.iter().map(|s| s.n_live).eq(n_live), "live rows of a stream");
    }

    /// References per block, from the tables and trunks. `[n_blocks]`
    fn count_references(&self) -> Vec<u32> {
        let mut refs = vec![0; self.blocks.n_total()];
        let tables = self.running.iter().flat_map(|r| &r.buffers.table);
        let trunks = self.streams.iter().flat_map(|s| s.trunk.blocks());
        for &block in tables.chain(trunks) {
            refs[block as usize] += 1;
        }
        self.kept.audit().for_each(|block| refs[block as usize] += 1);
        for stream in &self.streams {
            let (len, ready) = stream.trunk.lens();
            assert!(ready <= len && stream.trunk.blocks().len() == len.div_ceil(BLOCK_TOKENS));
        }
        refs
    }

    /// A block that is one row's own (past its shared ones) is in no other row's table, unless it is full.
    fn check_writers(&self) {
        let mut writer = vec![None; self.blocks.n_total()];
        for row in &self.running {
            for (i, &block) in row.buffers.table.iter().enumerate().skip(row.n_shared_blocks) {
                let is_full = row.computed >= (i + 1) * BLOCK_TOKENS;
                assert!(writer[block as usize].is_none(), "block {block} has two writers");
                writer[block as usize] = Some(is_full);
            }
        }
        for row in &self.running {
            for &block in &row.buffers.table[..row.n_shared_blocks] {
                assert!(writer[block as usize] != Some(false), "block {block} is shared and not full");
            }
        }
        assert!(self.kept.audit().all(|block| writer[block as usize] != Some(false)), "a block is kept and not full");
        assert!(self.blocks.n_idle() <= self.config.max_kept_blocks, "more is kept than may be");
    }
}
