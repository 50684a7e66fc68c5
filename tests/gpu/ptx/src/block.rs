//! A block of threads: its warps take turns until all have ended.

use crate::clocks::Clocks;
use crate::exec::barriers::Barrier;
use crate::exec::copies::Later;
use crate::exec::mbarrier::Mbarrier;
use crate::fault::{Fault, FaultKind, Wrong, wrong};
use crate::gpu::{Launch, Random};
use crate::inst::{Const, Inst, Special};
use crate::memory::{Global, SHARED_START, get};
use crate::module::Kernel;
use crate::shadow::{Between, Toucher};
use crate::shared::{By, Shared};
use crate::warp::{State, Warp};

/// Counts by instruction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Count {
    pub(crate) executed: u64,
    pub(crate) sectors: u64,
    pub(crate) conflicts: u64,
}

/// What blocks use one after the other: made once a launch, or once and for all.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub(crate) shared: Shared,
    pub(crate) clocks: Clocks,
    pub(crate) between: Between,
    pub(crate) warps: Vec<Warp>,
    pub(crate) counts: Vec<Count>,
    pub(crate) totals: crate::Counters,
}

pub(crate) struct Block<'l> {
    pub(crate) launch: &'l Launch<'l>,
    pub(crate) kernel: &'l Kernel,
    pub(crate) global: &'l mut Global,
    pub(crate) parts: &'l mut Parts,
    pub(crate) random: &'l mut Random,
    /// `blockIdx`, and a number that no other block of any launch has.
    pub(crate) at: [u32; 3],
    pub(crate) serial: u32,
    pub(crate) barriers: Vec<Barrier>,
    pub(crate) mbarriers: Vec<Mbarrier>,
    pub(crate) later: Vec<Later>,
    /// Of each warpgroup: its products, by instruction and descriptors.
    pub(crate) products: Vec<Vec<(usize, [u64; 2])>>,
    /// Things that happened that a waiting warp may wait for.
    pub(crate) events: u64,
    /// A warp arrived at a barrier.
    pub(crate) arrivals: bool,
    /// Where the instruction is that is at fault.
    pub(crate) blame: usize,
}

impl Block<'_> {
    pub(crate) fn run(&mut self) -> Result<(), Fault> {
        let n_warps = self.launch.threads().div_ceil(32) as usize;
        self.begin(n_warps);
        loop {
            let ready: Vec<usize> = (0..n_warps).filter(|&w| self.is_ready(w)).collect();
            if !ready.is_empty() {
                let w = ready[self.random.below(ready.len())];
                let mut warp = std::mem::take(&mut self.parts.warps[w]);
                let result = self.turn(&mut warp);
                let place = (warp.id, warp.active);
                self.parts.warps[w] = warp;
                result.map_err(|wrong| self.fault(wrong, place.0, place.1))?;
                if self.arrivals || self.parts.warps[w].state == State::Done {
                    self.open_barriers(n_warps);
                }
            } else if !self.later.is_empty() {
                let next = self.random.below(self.later.len());
                self.land(next).map_err(|wrong| self.fault(wrong, 0, 0))?;
            } else if self.parts.warps[..n_warps].iter().all(|w| w.state == State::Done) {
                return self.products_were_together().map_err(|wrong| self.fault(wrong, 0, 0));
            } else {
                return Err(self.deadlock(n_warps));
            }
        }
    }

    fn begin(&mut self, n_warps: usize) {
        let parts = &mut *self.parts;
        parts.clocks.reset(n_warps + 1);
        parts.shared.reset(self.launch.shared, n_warps + 1, self.launch.poison);
        parts.between.new_block();
        parts.warps.resize_with(n_warps, Warp::default);
        for (w, warp) in parts.warps.iter_mut().enumerate() {
            let threads = (self.launch.threads() as usize - w * 32).min(32);
            let live = u32::MAX >> (32 - threads);
            warp.reset(w, live, self.kernel);
            // Most constants are those of the block before.
            let known = std::mem::replace(&mut warp.launch, self.launch.first_block) == self.launch.first_block;
            for (r, constant) in &self.kernel.constants {
                match constant {
                    _ if known && !matches!(constant, Const::Special(Special::Ctaid(_))) => {}
                    Const::Special(_) => {
                        warp.regs[*r] = std::array::from_fn(|lane| constant_value(constant, self.launch, self.at, w * 32 + lane));
                    }
                    _ => warp.regs[*r] = [constant_value(constant, self.launch, self.at, w * 32); 32],
                }
            }
        }
    }

    fn is_ready(&self, w: usize) -> bool {
        match self.parts.warps[w].state {
            State::Ready => true,
            State::Polling(events) => events != self.events,
            State::Waiting(_) | State::Done => false,
        }
    }

    /// Executes a warp until it waits, ends, or was at it for long.
    fn turn(&mut self, warp: &mut Warp) -> Result<(), Wrong> {
        warp.state = State::Ready;
        let kernel = self.kernel;
        for _ in 0..1000 + self.random.below(4000) {
            let pc = warp.pc;
            let inst: &Inst = &kernel.code[pc];
            self.parts.counts[pc].executed += 1;
            let mask = inst.guard.map_or(warp.active, |guard| warp.active & warp.cond(guard));
            self.blame = pc;
            if !inst.held.is_empty() && !warp.products.is_empty() {
                self.touches_products(warp, &inst.held)?;
            }
            self.step(warp, inst, mask)?;
            if warp.state != State::Ready {
                return Ok(());
            }
            warp.steps += 1;
        }
        if warp.steps > self.launch.max_steps {
            return wrong(FaultKind::Endless, None, format!("no end after {} instructions of a warp", warp.steps));
        }
        Ok(())
    }

    fn deadlock(&self, n_warps: usize) -> Fault {
        let mut waiting = Vec::new();
        let mut pc = 0;
        for warp in &self.parts.warps[..n_warps] {
            match warp.state {
                State::Done => continue,
                State::Waiting(id) => waiting.push(format!("warp {} at barrier {id}", warp.id)),
                _ => waiting.push(format!("warp {} for an mbarrier", warp.id)),
            }
            pc = warp.pc.saturating_sub(1);
        }
        let message = format!("every warp waits and no copy is in flight: {}", waiting.join(", "));
        self.fault_at(Wrong { kind: FaultKind::Deadlock, lane: None, message }, pc, 0)
    }

    fn fault(&self, wrong: Wrong, warp: usize, active: u32) -> Fault {
        // A fault of all lanes together is told of the first.
        let lane = wrong.lane.unwrap_or(if active == 0 { 0 } else { active.trailing_zeros() as usize });
        self.fault_at(wrong, self.blame, warp * 32 + lane)
    }

    fn fault_at(&self, wrong: Wrong, pc: usize, thread: usize) -> Fault {
        let inst = &self.kernel.code[pc];
        let [x, y, _] = self.launch.block.map(|n| n as usize);
        let thread = [thread % x, thread / x % y, thread / (x * y)].map(|i| i as u32);
        Fault {
            kind: wrong.kind,
            message: wrong.message.into(),
            kernel: self.kernel.name.as_str().into(),
            ptx_line: inst.line,
            opcode: self.kernel.opcodes[inst.opcode].as_str().into(),
            source: source(self.kernel, inst),
            block: self.at,
            thread: (wrong.kind != FaultKind::Deadlock).then_some(thread),
        }
    }

    pub(crate) fn by<'a>(clocks: &'a Clocks, warp: &Warp, lane: usize) -> By<'a> {
        By { agent: warp.id, lane, epoch: warp.epoch, clock: clocks.own(warp.id), known: clocks.known(warp.id) }
    }

    pub(crate) fn toucher<'a>(&self, clocks: &'a Clocks, between: &'a Between, warp: usize) -> Toucher<'a> {
        Toucher {
            block: self.serial,
            first_block: self.launch.first_block,
            tick: between.tick,
            warp,
            clock: clocks.own(warp),
            known: clocks.known(warp),
            acquired: &between.acquired,
        }
    }
}

/// File and line of an instruction.
pub(crate) fn source(kernel: &Kernel, inst: &Inst) -> Option<(String, u32)> {
    kernel.files.get(&inst.loc.0).map(|file| (file.clone(), inst.loc.1))
}

/// `thread`: its index in the block, as warps count.
fn constant_value(constant: &Const, launch: &Launch, at: [u32; 3], thread: usize) -> u64 {
    let [x, y, z] = launch.block.map(|n| n as usize);
    let lane = thread % 32;
    match constant {
        Const::Value(value) => *value,
        Const::Variable(index, offset) => launch.variables[*index].wrapping_add_signed(*offset),
        Const::Dynamic(offset) => (SHARED_START + launch.static_shared as u64).wrapping_add_signed(*offset),
        Const::Param(at, bytes) => get(&launch.params, *at, *bytes),
        Const::Special(special) => match special {
            Special::Tid(0) => (thread % x) as u64,
            Special::Tid(1) => (thread / x % y) as u64,
            Special::Tid(_) => (thread / (x * y) % z) as u64,
            Special::Ntid(axis) => u64::from(launch.block[*axis]),
            Special::Ctaid(axis) => u64::from(at[*axis]),
            Special::Nctaid(axis) => u64::from(launch.grid[*axis]),
            Special::Lane => lane as u64,
            Special::Warp => (thread / 32) as u64,
            Special::Nwarp => (x * y * z).div_ceil(32) as u64,
            Special::MaskEq => 1 << lane,
            Special::MaskLt => (1 << lane) - 1,
            Special::MaskLe => (2 << lane) - 1,
            Special::MaskGt => 0xFFFF_FFFF & !((2u64 << lane) - 1),
            Special::MaskGe => 0xFFFF_FFFF & !((1u64 << lane) - 1),
            Special::DynamicSharedSize => launch.dynamic as u64,
            Special::TotalSharedSize => launch.shared as u64,
        },
    }
}
