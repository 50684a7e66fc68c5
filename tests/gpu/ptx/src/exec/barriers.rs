//! Barriers of a block: `bar` and `barrier`.

use crate::block::Block;
use crate::fault::{FaultKind, Wrong, wrong};
use crate::inst::{Cond, Op, Reduction};
use crate::warp::{State, Warp};

/// One of the block's sixteen barriers.
#[derive(Debug, Default)]
pub(crate) struct Barrier {
    warps: u32,
    /// Threads that are waited for, where the instruction says so; else all that have not ended.
    expected: Option<u32>,
    waiting: Vec<usize>,
    clock: Vec<u32>,
    fence_mark: u32,
    reductions: Vec<(usize, u32, Reduction, usize)>,
    popc: u32,
    all: bool,
}

impl Block<'_> {
    pub(super) fn bar(&mut self, warp: &mut Warp, op: &Op, mask: u32) -> Result<(), Wrong> {
        let Op::Bar { id, threads, waits, reduce } = op else {
            return wrong(FaultKind::Unsupported, None, "no barrier");
        };
        let first = mask.trailing_zeros() as usize;
        if mask != warp.live {
            let message = format!("a barrier that lanes {mask:#010x} of the warp reach, and {:#010x} do not", warp.live & !mask);
            return wrong(FaultKind::Divergence, first, message);
        }
        let id = warp.regs[*id][first] as usize;
        let expected = threads.map(|n| warp.regs[n][first] as u32);
        if id > 15 || expected.is_some_and(|n| n == 0 || !n.is_multiple_of(32)) {
            return wrong(FaultKind::Barrier, first, format!("barrier {id} for {expected:?} threads"));
        }
        self.barriers.resize_with(16, || Barrier { all: true, ..Barrier::default() });
        let barrier = &mut self.barriers[id];
        if barrier.warps > 0 && barrier.expected != expected {
            let message = format!("barrier {id} for {expected:?} threads, where others wait for {:?}", barrier.expected);
            return wrong(FaultKind::Barrier, first, message);
        }
        barrier.expected = expected;
        barrier.warps += 1;
        if expected.is_some_and(|n| barrier.warps > n / 32) {
            return wrong(FaultKind::Barrier, first, format!("barrier {id} has more warps than it waits for"));
        }
        self.parts.clocks.release(warp.id, &mut barrier.clock);
        barrier.fence_mark = barrier.fence_mark.max(warp.fence_mark);
        if let Some((how, cond, d)) = reduce {
            barrier.contribute(warp, (*how, *cond, *d), mask);
        }
        if *waits {
            barrier.waiting.push(warp.id);
            warp.state = State::Waiting(id);
        }
        self.arrivals = true;
        Ok(())
    }

    /// Barriers at which everybody is let their warps go on. To be called after a warp arrived or ended.
    pub(crate) fn open_barriers(&mut self, n_warps: usize) {
        self.arrivals = false;
        let live = self.parts.warps[..n_warps].iter().filter(|w| w.state != State::Done).count() as u32;
        for barrier in &mut self.barriers {
            if barrier.warps == 0 || barrier.warps < barrier.expected.map_or(live, |n| n / 32) {
                continue;
            }
            let done = std::mem::replace(barrier, Barrier { all: true, ..Barrier::default() });
            for &(w, mask, how, d) in &done.reductions {
                let warp = &mut self.parts.warps[w];
                match how {
                    Reduction::Popc => warp.set(d, &[u64::from(done.popc); 32], mask),
                    Reduction::And => warp.set_pred(d, if done.all { u32::MAX } else { 0 }, mask),
                    Reduction::Or => warp.set_pred(d, if done.popc > 0 { u32::MAX } else { 0 }, mask),
                }
            }
            for w in done.waiting {
                self.parts.clocks.acquire(w, &done.clock);
                let warp = &mut self.parts.warps[w];
                warp.state = State::Ready;
                warp.epoch += 1;
                warp.fence_mark = warp.fence_mark.max(done.fence_mark);
            }
            self.events += 1;
        }
    }
}

impl Barrier {
    fn contribute(&mut self, warp: &Warp, (how, cond, d): (Reduction, Cond, usize), mask: u32) {
        let holds = warp.cond(cond) & mask;
        self.popc += holds.count_ones();
        self.all &= holds == mask;
        self.reductions.push((warp.id, mask, how, d));
    }
}
