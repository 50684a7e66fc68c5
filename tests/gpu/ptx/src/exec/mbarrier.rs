//! `mbarrier`: arrivals and bytes of copies are counted, phase by phase.

use super::memory::resolve;
use crate::block::Block;
use crate::fault::{FaultKind, Wrong, wrong};
use crate::inst::{Address, Op, Phase};
use crate::warp::{State, Warp, lanes};

#[derive(Debug)]
pub(crate) struct Mbarrier {
    /// Index into shared memory.
    at: usize,
    /// Arrivals of a phase, and those that this one still needs.
    count: i64,
    pending: i64,
    /// Bytes of copies that this phase still needs.
    bytes: i64,
    phase: u64,
    /// What those that arrived in this phase know, and what waiting for the last one teaches.
    clock: Vec<u32>,
    done: Vec<u32>,
    /// Who made it, and when: others must have been told.
    made: (usize, u32),
    /// It was made before a `fence.mbarrier_init` of who made it.
    fenced: bool,
}

/// After so many failures in a row a warp that only looks is taken to wait.
const MAX_POLLS: u32 = 64;

impl Mbarrier {
    /// The next phase, if this one has all it needs.
    fn turn(&mut self) -> bool {
        if self.pending != 0 || self.bytes != 0 {
            return false;
        }
        self.phase += 1;
        self.pending = self.count;
        self.done = std::mem::take(&mut self.clock);
        true
    }
}

impl Block<'_> {
    pub(super) fn mbarrier_step(&mut self, warp: &mut Warp, op: &Op, mask: u32) -> Result<(), Wrong> {
        match op {
            Op::BarInit { bar, count } => self.bar_init(warp, *bar, *count, mask),
            Op::BarInvalidate { bar } => {
                for lane in lanes(mask) {
                    let at = self.bar_address(warp, *bar, lane)?;
                    self.find_mbarrier(at, Some((&*warp, lane)))?;
                    self.mbarriers.retain(|m| m.at != at);
                    self.parts.shared.set_barrier(at, false);
                }
                Ok(())
            }
            Op::BarArrive { bar, state, count, expect, arrive, drop } => {
                let mut states = [0; 32];
                for lane in lanes(mask) {
                    let at = self.bar_address(warp, *bar, lane)?;
                    let n = if *arrive { count.map_or(1, |n| i64::from(warp.regs[n][lane] as u32)) } else { 0 };
                    let bytes = expect.map_or(0, |n| i64::from(warp.regs[n][lane] as u32));
                    self.find_mbarrier(at, Some((&*warp, lane)))?;
                    states[lane] = self.arrive(at, (n, bytes, *drop), warp.id, lane)?;
                }
                if let Some(d) = state {
                    warp.set(*d, &states, mask);
                }
                Ok(())
            }
            Op::BarTest { bar, p, by, blocking } => self.bar_test(warp, (*bar, *p, *by, *blocking), mask),
            _ => wrong(FaultKind::Unsupported, None, "an operation that nobody executes"),
        }
    }

    pub(super) fn bar_address(&self, warp: &Warp, bar: Address, lane: usize) -> Result<usize, Wrong> {
        let w = resolve(warp, bar, 1 << lane)?;
        self.parts.shared.locate(w.address[lane], 8, lane)
    }

    /// The mbarrier there. Who uses it must know of its initialisation.
    fn find_mbarrier(&mut self, at: usize, by: Option<(&Warp, usize)>) -> Result<&mut Mbarrier, Wrong> {
        let lane = by.map(|(_, lane)| lane);
        let races = self.launch.races;
        let Some(found) = self.mbarriers.iter_mut().find(|m| m.at == at) else {
            return wrong(FaultKind::Barrier, lane, "an mbarrier that is not initialised");
        };
        if let Some((warp, lane)) = by
            && races
            && found.made.0 != warp.id
            && found.made.1 > self.parts.clocks.known(warp.id)[found.made.0]
        {
            return wrong(
                FaultKind::Race,
                lane,
                format!("an mbarrier that warp {} initialised, without a barrier between", found.made.0),
            );
        }
        Ok(found)
    }

    /// `fence.mbarrier_init`: copies may know of the mbarriers that this warp has made.
    pub(super) fn fence_barriers(&mut self, warp: &Warp) {
        for bar in self.mbarriers.iter_mut().filter(|bar| bar.made.0 == warp.id) {
            bar.fenced = true;
        }
    }

    /// The mbarrier of a copy: what copies must know of it, too.
    pub(super) fn copies_barrier(&mut self, warp: &Warp, bar: Address, lane: usize) -> Result<usize, Wrong> {
        let at = self.bar_address(warp, bar, lane)?;
        let (who, when) = self.find_mbarrier(at, Some((warp, lane)))?.made;
        let is_late = self.launch.races && when > self.parts.clocks.fenced(warp.id)[who];
        if is_late && !self.find_mbarrier(at, None)?.fenced {
            return wrong(FaultKind::Unfenced, lane, "an mbarrier that was initialised without fence.proxy.async between");
        }
        Ok(at)
    }

    fn bar_init(&mut self, warp: &mut Warp, bar: Address, count: usize, mask: u32) -> Result<(), Wrong> {
        for lane in lanes(mask) {
            let at = self.bar_address(warp, bar, lane)?;
            let count = i64::from(warp.regs[count][lane] as u32);
            if self.mbarriers.iter().any(|m| m.at == at) || count == 0 || count >= 1 << 20 {
                return wrong(FaultKind::Barrier, lane, format!("an mbarrier is made for {count} arrivals, or a second time"));
            }
            let made = (warp.id, self.parts.clocks.own(warp.id));
            let (clock, done) = (Vec::new(), Vec::new());
            self.mbarriers.push(Mbarrier { at, count, pending: count, bytes: 0, phase: 0, clock, done, made, fenced: false });
            self.parts.shared.set_barrier(at, true);
        }
        Ok(())
    }

    /// `n` arrivals, and `bytes` more that the phase needs (less, if they have come). The phase before is returned.
    pub(super) fn arrive(
        &mut self,
        at: usize,
        (n, bytes, drop): (i64, i64, bool),
        agent: usize,
        lane: usize,
    ) -> Result<u64, Wrong> {
        let Some(found) = self.mbarriers.iter_mut().find(|m| m.at == at) else {
            return wrong(FaultKind::Barrier, lane, "an mbarrier that is not initialised");
        };
        let before = found.phase;
        found.bytes += bytes;
        found.pending -= n;
        if drop {
            found.count -= n;
        }
        if found.pending < 0 {
            return wrong(FaultKind::Barrier, lane, "more arrivals at an mbarrier than its phase needs");
        }
        self.parts.clocks.release(agent, &mut found.clock);
        if found.turn() {
            self.events += 1;
        }
        Ok(before)
    }

    /// One arrival more is needed in this phase.
    pub(super) fn expect_arrival(&mut self, at: usize, warp: &Warp, lane: usize) -> Result<(), Wrong> {
        self.find_mbarrier(at, Some((warp, lane)))?.pending += 1;
        Ok(())
    }

    fn bar_test(
        &mut self,
        warp: &mut Warp,
        (bar, p, by, blocking): (Address, usize, Phase, bool),
        mask: u32,
    ) -> Result<(), Wrong> {
        let mut done = 0;
        for lane in lanes(mask) {
            let at = self.bar_address(warp, bar, lane)?;
            let found = self.find_mbarrier(at, Some((&*warp, lane)))?;
            let complete = match by {
                Phase::State(r) => found.phase > warp.regs[r][lane],
                Phase::Parity(r) => found.phase & 1 != warp.regs[r][lane] & 1,
            };
            if complete {
                let clock = std::mem::take(&mut found.done);
                self.parts.clocks.acquire(warp.id, &clock);
                self.find_mbarrier(at, None)?.done = clock;
                done |= 1 << lane;
            }
        }
        warp.set_pred(p, done, mask);
        if done == mask {
            warp.polls = 0;
            warp.epoch += 1;
            return Ok(());
        }
        warp.polls += 1;
        if blocking || warp.polls > MAX_POLLS {
            warp.state = State::Polling(self.events);
        }
        Ok(())
    }
}
