//! How many blocks rows will need, and what is kept free for asap rows, so that most of them begin at once and nobody loses
//! what it has computed to them. Knows nothing of who is admitted. Invariants: what asap rows hold counts as part of what is kept; one row of a lower class may
//! always run, whatever is kept.

use super::scheduler::Scheduler;
use super::sequence::{Phase, Sequence};
use crate::window::Class;

/// Demand is told apart in so many parts of the whole.
const PARTS: usize = 64;
/// Steps after which those before count half.
const MEMORY: u32 = 4096;
/// Most that is kept of the whole: asap rows that want more preempt others, as they would without a reserve.
const MOST: f64 = 0.5;

/// How much asap rows want at a time of something that there is so much of.
#[derive(Debug)]
struct Demand {
    n_total: usize,
    /// Of late, steps with asap rows by how many parts they wanted, rounded up.
    seen: [u32; PARTS + 1],
}

impl Demand {
    fn new(n_total: usize) -> Self {
        Self { n_total, seen: [0; PARTS + 1] }
    }

    fn note(&mut self, n: usize) {
        self.seen[(n.min(self.n_total) * PARTS).div_ceil(self.n_total)] += 1;
        if self.seen.iter().sum::<u32>() >= MEMORY {
            self.seen.iter_mut().for_each(|n_steps| *n_steps /= 2);
        }
    }

    /// What 99 of 100 steps with asap rows do with; 0 if there were none.
    fn p99(&self) -> usize {
        let n_steps: u32 = self.seen.iter().sum();
        let mut n_more = n_steps;
        for (parts, n) in self.seen.iter().enumerate() {
            n_more -= n;
            if 100 * n_more <= n_steps {
                return (parts * self.n_total).div_ceil(PARTS);
            }
        }
        self.n_total
    }

    /// The percent that is kept at least, or the demand, if that is more.
    fn kept(&self, percent: u8) -> usize {
        let least = (self.n_total as f64 * f64::from(percent) / 100.0).ceil() as usize;
        // Where there is little of something, the others have it.
        let most = (self.n_total as f64 * MOST) as usize;
        least.max(self.p99()).min(most)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Reserve {
    /// Of everything; 0: nothing is kept.
    percent: u8,
    blocks: Demand,
    places: Demand,
    /// Asap rows that run.
    n_asap: usize,
    /// What is kept and not in use by asap rows.
    free_blocks: usize,
    free_places: usize,
}

impl Reserve {
    pub(super) fn new(percent: u8, n_blocks: usize, n_places: usize) -> Self {
        let (blocks, places) = (Demand::new(n_blocks), Demand::new(n_places));
        Self { percent, blocks, places, n_asap: 0, free_blocks: 0, free_places: 0 }
    }
}

impl Scheduler {
    /// Blocks that a row will hold at its end.
    pub(super) fn final_blocks(&self, row: &Sequence) -> usize {
        let estimate = self.streams[row.stream_idx].lengths.estimate(self.config.cold_output_tokens);
        row.final_blocks(estimate, self.limits.max_context)
    }

    /// Blocks that a running row will need besides those it has.
    pub(super) fn growth_of(&self, row: &Sequence) -> usize {
        self.final_blocks(row).saturating_sub(row.buffers.table.len())
    }

    /// Blocks that the running rows will need besides those they have.
    pub(super) fn growth(&self) -> usize {
        self.running.iter().filter(|r| r.phase == Phase::Live).map(|r| self.growth_of(r)).sum()
    }

    /// Blocks in use once the running rows, which need `growth` more, and the first of the queue have grown to their
    /// predicted lengths.
    pub(super) fn forecast(&self, class: Class, growth: usize) -> usize {
        let new = self.final_blocks(&self.waiting[class as usize][0]) - self.beginning(class).n_used_blocks();
        self.blocks.n_used() + growth + new
    }

    /// Whether the forecast with the first row of the queue, which is below asap, fits what its class may have of the pool; frees
    /// trunks for it as far as that is right.
    pub(super) fn forecast_fits(&mut self, class: Class, growth: usize) -> bool {
        let limit = self.blocks_below_asap(self.n_running);
        let fits = |own: &Self| own.forecast(class, growth) <= limit;
        if fits(self) || (self.drop_idle_trunks() && fits(self)) {
            return true;
        }
        if self.n_running > 0 {
            return false;
        }
        self.drop_trunks();
        assert!(fits(self), "a row alone doesn't fit the pool");
        true
    }

    /// Reckons what is kept in this step, after the asap rows have had their part of it.
    pub(super) fn keep_for_asap(&mut self) {
        if self.reserve.percent == 0 {
            return;
        }
        let own = |row: &Sequence| self.final_blocks(row).max(row.buffers.table.len()) + row.n_kept_blocks - row.n_shared_blocks;
        let running = self.running.iter().filter(|row| row.phase == Phase::Live && row.class == Class::Asap);
        let (n_asap, n_blocks) = running.fold((0, 0), |(n, sum), row| (n + 1, sum + own(row)));
        let waiting = &self.waiting[Class::Asap as usize];
        let n_wanted: usize = waiting.iter().map(own).sum();
        let (n_waiting, reserve) = (waiting.len(), &mut self.reserve);
        if n_asap + n_waiting > 0 {
            reserve.blocks.note(n_blocks + n_wanted);
            reserve.places.note(n_asap + n_waiting);
        }
        reserve.n_asap = n_asap;
        reserve.free_blocks = reserve.blocks.kept(reserve.percent).saturating_sub(n_blocks);
        reserve.free_places = reserve.places.kept(reserve.percent).saturating_sub(n_asap);
    }

    /// Blocks that rows below asap may fill the pool up to, if so many rows run.
    pub(super) fn blocks_below_asap(&self, n_running: usize) -> usize {
        let is_alone = n_running <= self.reserve.n_asap;
        self.blocks.n_total() - if is_alone { 0 } else { self.reserve.free_blocks }
    }

    /// Whether a row below asap may have another place, if so many rows run.
    pub(super) fn has_place_below_asap(&self, n_running: usize) -> bool {
        let is_alone = n_running <= self.reserve.n_asap;
        n_running + if is_alone { 0 } else { self.reserve.free_places } < self.config.max_running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_the_demand_of_nearly_all_steps() {
        let mut demand = Demand::new(640);
        assert_eq!((demand.p99(), demand.kept(5), demand.kept(0)), (0, 32, 0));
        (0..990).for_each(|_| demand.note(95));
        (0..10).for_each(|_| demand.note(640));
        assert_eq!((demand.p99(), demand.kept(5)), (100, 100), "one step of a hundred may want more");
        demand.note(640);
        assert_eq!((demand.p99(), demand.kept(5)), (640, 320), "never more than half");
        (0..10 * MEMORY).for_each(|_| demand.note(5));
        assert_eq!(demand.kept(5), 32, "what was long ago is forgotten");
        assert_eq!((Demand::new(1).kept(5), Demand::new(2).kept(5)), (0, 1));
    }
}
