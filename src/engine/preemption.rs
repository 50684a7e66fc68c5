//! Room for those that go first: who loses its blocks and places, for whom, and for what. Knows nothing of the order in which
//! a step is filled.
//!
//! Invariants: a row with tokens in the step loses nothing; nobody loses anything to a row of a lower class.

use std::cmp::Reverse;

use super::scheduler::Scheduler;
use super::sequence::{Phase, Sequence};
use crate::window::Class;

impl Scheduler {
    /// Whether the asap rows, with the first of their queue, would fit a pool of their own at their predicted lengths.
    pub(super) fn asap_fits(&self) -> bool {
        let class = Class::Asap;
        let own = self.final_blocks(&self.waiting[class as usize][0]) - self.beginning(class).n_trunk_blocks();
        let asap = self.running.iter().filter(|r| r.phase == Phase::Live && r.class == class);
        let others: usize = asap.map(|r| self.final_blocks(r) + r.n_kept_blocks - r.n_shared_blocks).sum();
        own + others <= self.blocks.n_total()
    }

    /// Frees blocks for the tokens of the first asap row; false if only asap rows have any left, or some come with the step under way.
    pub(super) fn make_room_for_asap(&mut self) -> bool {
        loop {
            let beginning = self.beginning(Class::Asap);
            let n_new = self.waiting[Class::Asap as usize][0].n_blocks() - beginning.n_blocks();
            if self.has_blocks(n_new, beginning) {
                return true;
            }
            if self.drop_idle_trunks() || self.preempt_below_asap() {
                continue;
            }
            // What a step gives back by itself is waited for before rows lose the beginnings that they share.
            if self.blocks_come() || !self.drop_trunks() {
                return false;
            }
        }
    }

    /// Makes room for the first row of the queue, if it is urgent, among batch rows that have time: they are preempted, as
    /// many as it takes. False, and nobody is preempted, if it would not do, or if it is not urgent. A class that is owed loses none, and memory that it waits
    /// for is left to it.
    pub(super) fn make_room_for_urgent(&mut self, class: Class, growth: &mut Option<usize>) -> bool {
        if !self.policy.is_urgent(self.waiting[class as usize][0].rank)
            || [Class::Standard, Class::Batch].into_iter().any(|other| other != class && self.policy.is_owed(other))
        {
            return false;
        }
        let may_lose = |own: &Self, row: &Sequence| {
            let has_time = row.class == Class::Batch && !own.policy.is_urgent(row.rank) && !own.is_ending(row);
            has_time && row.phase == Phase::Live && row.in_step != own.step && row.n_preemptions < own.config.max_preemptions
        };
        // What they alone hold, and what they would have grown by: blocks that a trunk holds too stay in use without them.
        let losers = self.running.iter().filter(|&row| may_lose(self, row));
        let is_own = |block: &&u32| self.blocks.n_tables(**block) == 1;
        let freed = |row: &Sequence| row.buffers.table.iter().filter(is_own).count() + self.growth_of(row);
        let (n_losers, n_freed) = losers.fold((0, 0), |(n, sum), row| (n + 1, sum + freed(row)));
        let n_staying = self.n_running - n_losers;
        let limit = self.blocks_below_asap(n_staying);
        let would_do = |own: &Self| own.forecast(class, own.growth()).saturating_sub(n_freed) <= limit;
        if !self.has_place_below_asap(n_staying) || !(would_do(self) || (self.drop_idle_trunks() && would_do(self))) {
            return false;
        }
        loop {
            let has_place = self.has_place_below_asap(self.n_running);
            let own_growth = self.growth();
            if has_place && self.forecast_fits(class, own_growth) {
                *growth = Some(own_growth);
                return true;
            }
            let Some(victim) = self.worst(|_, row| may_lose(self, row)) else { return false };
            self.preempt(victim);
        }
    }

    /// Who loses its blocks when the row at `needy` has no slot: of the rows without tokens in this step and of no
    /// higher class, the lowest class, then most slack, then the one that costs least to compute again; perhaps `needy` itself. Rows that
    /// were preempted too often are left alone (but not by asap), unless nothing else could go on.
    pub(super) fn victim_for(&self, needy: usize) -> Option<usize> {
        let class = self.running[needy].class;
        let max_preemptions = self.config.max_preemptions;
        let is_candidate = |r: &Sequence| r.phase == Phase::Live && r.in_step != self.step && r.class >= class;
        let may_lose = |r: &Sequence| r.n_preemptions < max_preemptions || (class == Class::Asap && r.class > class);
        let worst = self.worst(|_, r| is_candidate(r) && may_lose(r));
        if worst.is_some() || !self.scheduled.is_empty() {
            return worst;
        }
        self.worst(|idx, r| is_candidate(r) && idx != needy)
    }

    /// Of the rows that go on. One that ends with the step under way has its last token coming: taking its blocks would gain a step,
    /// and cost what is kept of it.
    fn worst(&self, is_candidate: impl Fn(usize, &Sequence) -> bool) -> Option<usize> {
        let rows = self.running.iter().enumerate().filter(|&(idx, row)| !self.is_ending(row) && is_candidate(idx, row));
        let key = |&(idx, row): &(usize, &Sequence)| {
            let (class, slack) = self.policy.expendable(row.class, row.rank);
            // Whose blocks are mostly others', too, would free few of them.
            let is_own = 2 * (row.n_shared_blocks - row.n_kept_blocks) <= row.buffers.table.len();
            (class, is_own, slack, Reverse(row.computed), idx)
        };
        rows.max_by_key(key).map(|(idx, _)| idx)
    }

    /// Whether a row ends with the step under way, and then gives back a block at least: nobody has to lose any for the next one.
    pub(super) fn blocks_come(&self) -> bool {
        let is_own = |block: &u32| self.blocks.n_tables(*block) == 1;
        self.running.iter().any(|row| self.is_ending(row) && row.buffers.table.iter().any(is_own))
    }

    /// Whether a row ends with the step under way: nothing of it is left to be computed, nor in the step that is being filled.
    fn is_ending(&self, row: &Sequence) -> bool {
        row.phase == Phase::Live && row.remaining() == 0 && row.in_step != self.step
    }

    /// Preempts the least row of a class below asap, if there is one; none has tokens in the step yet.
    pub(super) fn preempt_below_asap(&mut self) -> bool {
        let victim = self.worst(|_, r| r.phase == Phase::Live && r.class > Class::Asap);
        if let Some(idx) = victim {
            self.preempt(idx);
        }
        victim.is_some()
    }

    /// Takes a row's blocks; what it has drawn stays.
    pub(super) fn preempt(&mut self, idx: usize) {
        self.release_blocks(idx);
        let row = &mut self.running[idx];
        assert!(row.in_step != self.step, "row {} was preempted in a step that runs it", row.id);
        row.phase = Phase::Preempted;
        row.n_preemptions += 1;
        self.n_running -= 1;
        self.stats.preemptions += 1;
        self.stats.preemptions_of[row.class as usize] += 1;
        self.is_tight = true;
    }
}
