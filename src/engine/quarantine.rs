//! What becomes of a step that fails: the device reports an error, or a kernel panics. Its rows are tried again in ever smaller
//! groups, each from its tokens anew, until those that fail alone are found: they end, broken; the others go on where they were.
//! Invariants: a row that ends this way failed in a step of its own; no other row's tokens change, since they never depend on
//! what else is in a step; an engine that can do nothing any more says so instead of giving up row after row (at once, if its
//! device says that it failed: [`Lost`]).

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::anyhow;

use super::ahead::Flight;
use super::handle::panic_message;
use super::scheduler::Scheduler;
use super::sequence::{Phase, Sequence};
use super::{Engine, Finished};
use crate::device::Lost;
use crate::device::batch::{Batch, StepOutput};
use crate::model::Runner;
use crate::outcome::FinishReason;

/// Rows that fail alone, one after the other without a good step between, after which it is not they that are at fault.
const MAX_ACCUSED: usize = 8;

/// Rows that wait while others are tried, by class.
type Aside = [VecDeque<Sequence>; 3];

/// A step of a group failed.
struct Failed {
    /// Rows of the group that had not gained a token.
    left: Vec<u64>,
    /// What the step ran.
    rows: Vec<u64>,
    why: anyhow::Error,
}

impl Engine {
    /// Has the runner begin a step, or run it.
    ///
    /// # Errors
    /// The runner's, or its panic's message.
    pub(super) fn attempt<T>(
        &mut self,
        flight: &mut Flight,
        call: impl FnOnce(&mut dyn Runner, &Batch, &mut StepOutput) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let call = AssertUnwindSafe(|| call(&mut *self.runner, &flight.batch, &mut flight.out));
        let done = catch_unwind(call).unwrap_or_else(|panic| Err(anyhow!("a panic: {}", panic_message(&*panic))));
        self.scheduler.stats.failed_steps += u64::from(done.is_err());
        done
    }

    /// Finds the rows at which a step fails, and ends them; they are `finished` with the next good step.
    /// The others have lost their blocks, and gained a token at least.
    ///
    /// # Errors
    /// So many rows fail alone that the device must be at fault; or it says that it is.
    pub(super) fn isolate(&mut self, flight: Flight, finished: &mut Vec<Finished>) -> anyhow::Result<()> {
        let suspects = flight.ids();
        self.spare.push(flight);
        self.scheduler.withdraw_all();
        // What a device that fails has in its memory is not to be trusted.
        self.scheduler.drop_kept();
        let mut groups = vec![suspects];
        while let Some(group) = groups.pop() {
            let aside = self.scheduler.set_aside(&group);
            let tried = self.try_group(&group, finished);
            self.scheduler.withdraw_all();
            self.scheduler.take_back(aside);
            let Err(Failed { left, rows: failed, why }) = tried else { continue };
            if why.is::<Lost>() {
                return Err(why);
            }
            self.scheduler.drop_kept();
            let rest: Vec<u64> = left.into_iter().filter(|id| !failed.contains(id)).collect();
            groups.extend((!rest.is_empty()).then_some(rest));
            if let &[guilty] = &*failed {
                let row = self.condemn(guilty, &why);
                self.accused.push(row);
                if self.accused.len() >= MAX_ACCUSED {
                    return Err(why.context("row after row fails alone"));
                }
                continue;
            }
            let (first, second) = failed.split_at(failed.len() / 2);
            groups.extend([second.to_vec(), first.to_vec()]);
        }
        self.scheduler.measure();
        self.last.clear();
        Ok(())
    }

    /// Runs steps of these rows alone until each has gained a token or ended.
    ///
    /// # Errors
    /// A step failed.
    fn try_group(&mut self, group: &[u64], finished: &mut Vec<Finished>) -> Result<(), Failed> {
        let mut left: Vec<(u64, usize)> =
            group.iter().filter_map(|&id| Some((id, self.scheduler.find(id)?.buffers.generated.len()))).collect();
        while !left.is_empty() {
            self.scheduler.schedule();
            self.begin();
            let mut flight = self.flights.pop_front().expect("it has begun");
            if let Err(why) = self.land(&mut flight) {
                let failed = Failed { left: left.into_iter().map(|(id, _)| id).collect(), rows: flight.ids(), why };
                self.spare.push(flight);
                return Err(failed);
            }
            self.settle(flight, finished);
            finished.append(&mut self.accused);
            left.retain(|&(id, n)| self.scheduler.find(id).is_some_and(|row| row.buffers.generated.len() == n));
        }
        Ok(())
    }

    /// Ends a row that fails alone.
    fn condemn(&mut self, id: u64, why: &anyhow::Error) -> Finished {
        let mut row = self.scheduler.remove_waiting(id).expect("it was withdrawn");
        let n_generated = row.buffers.generated.len();
        let broken = format!("computing it fails after {n_generated} generated tokens, alone too: {why:#}");
        if row.params.watch {
            self.progress.extend(row.take_progress(true));
        }
        self.scheduler.stats.finished += 1;
        Finished { broken: Some(broken), ..row.output(FinishReason::Stop) }
    }
}

impl Scheduler {
    /// Takes the blocks of all rows; what they have drawn stays. Nothing of the step that was scheduled counts.
    fn withdraw_all(&mut self) {
        for idx in 0..self.running.len() {
            if self.running[idx].phase == Phase::Live {
                self.release_blocks(idx);
                self.running[idx].phase = Phase::Preempted;
                self.n_running -= 1;
            }
        }
        self.settle(&mut []);
        // They would hold what the step was to compute.
        self.drop_trunks();
    }

    /// A row that runs or waits.
    fn find(&self, id: u64) -> Option<&Sequence> {
        self.running.iter().chain(self.waiting.iter().flatten()).find(|row| row.id == id)
    }

    /// Leaves only these rows in the queues.
    fn set_aside(&mut self, group: &[u64]) -> Aside {
        self.waiting.each_mut().map(|queue| {
            let (chosen, others) = queue.drain(..).partition(|row| group.contains(&row.id));
            *queue = chosen;
            others
        })
    }

    /// Puts rows back behind those of their rank, all of which have run before.
    fn take_back(&mut self, aside: Aside) {
        for (queue, mut others) in self.waiting.iter_mut().zip(aside) {
            queue.append(&mut others);
            queue.make_contiguous().sort_by_key(Sequence::order);
        }
    }

    /// Takes a waiting row that has run before out of its queue.
    fn remove_waiting(&mut self, id: u64) -> Option<Sequence> {
        let take = |queue: &mut VecDeque<Sequence>| queue.remove(queue.iter().position(|row| row.id == id)?);
        let row = self.waiting.iter_mut().find_map(take)?;
        self.streams[row.stream_idx].n_live -= 1;
        Some(row)
    }
}
