//! Rows that wait for their turn: into their queues, and out of them again if nobody wants them any more. Invariant: a queue is in
//! the order of [`Sequence::order`].

use super::scheduler::Scheduler;
use super::sequence::{Phase, Sequence};

impl Scheduler {
    /// Puts a row into its class's queue: where [`Sequence::order`] has it; of equal ones a new one stands
    /// behind the others, one that was preempted before them.
    pub(super) fn enqueue(&mut self, row: Sequence) {
        let queue = &mut self.waiting[row.class as usize];
        let own = row.order();
        let place = queue.partition_point(|other| other.order() < own || (other.order() == own && !row.is_admitted));
        queue.insert(place, row);
    }

    /// Forgets a row; its blocks are free at once. Where a step `is_under_way`, its place in the list goes when that is settled.
    /// False if there is none of that name.
    pub(super) fn cancel(&mut self, id: u64, is_under_way: bool) -> bool {
        let mut row = None;
        if let Some(idx) = self.running.iter().position(|s| s.id == id && s.phase == Phase::Live) {
            self.release_blocks(idx);
            self.n_running -= 1;
            if is_under_way {
                self.running[idx].phase = Phase::Finished;
                return true;
            }
            row = Some(self.running.remove(idx));
        }
        for queue in &mut self.waiting {
            if let Some(idx) = queue.iter().position(|s| s.id == id) {
                row = queue.remove(idx);
            }
        }
        let Some(row) = row else { return false };
        if !row.is_admitted {
            let class = row.class as usize;
            self.n_queued[class] -= 1;
            // A turn that was not had is no turn.
            let own = self.waiting[class]
                .iter()
                .filter(|other| !other.is_admitted && other.params.share.owner == row.params.share.owner);
            self.turns[class].keep_until(row.params.share, own.map(|other| other.turn).max());
        }
        self.streams[row.stream_idx].n_live -= 1;
        true
    }

    /// Forgets a stream's rows, and frees its trunk: no submission that shares with earlier ones will come.
    pub(super) fn end_stream(&mut self, id: u32, is_under_way: bool) {
        let Some(idx) = self.streams.iter().position(|s| s.id == id) else { return };
        let rows = self.running.iter().chain(self.waiting.iter().flatten());
        let ids: Vec<u64> = rows.filter(|row| row.stream_idx == idx).map(|row| row.id).collect();
        for id in ids {
            self.cancel(id, is_under_way);
        }
        self.streams[idx].trunk.truncate(0, &mut self.blocks);
    }
}
