//! A warp: registers, which lanes are where, what it waits for.

use crate::inst::{Cond, Lanes, P, R};
use crate::module::Kernel;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum State {
    #[default]
    Ready,
    /// At the barrier of this number.
    Waiting(usize),
    /// An mbarrier's phase was not complete when this many things had happened in the block.
    Polling(u64),
    Done,
}

/// A copy of `cp.async` that was not waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copy {
    pub(crate) lane: usize,
    /// Which of the lane's groups.
    pub(crate) group: u32,
    /// Index into shared memory.
    pub(crate) to: usize,
    pub(crate) from: u64,
    pub(crate) bytes: usize,
    /// Bytes that are read; the rest are zeros.
    pub(crate) read: usize,
    pub(crate) pc: usize,
}

/// A product of a warpgroup that was not waited for, a warp's part of it.
#[derive(Debug)]
pub(crate) struct UnderWay {
    /// Which of the warp's groups.
    pub(crate) group: u32,
    /// The product's instruction.
    pub(crate) pc: usize,
    /// What it reads of shared memory: indexes, and what was there.
    pub(crate) reads: Vec<(usize, [u8; 16])>,
}

#[derive(Debug, Default)]
pub(crate) struct Warp {
    pub(crate) id: usize,
    /// The first block of the launch whose constants are in its registers.
    pub(crate) launch: u32,
    pub(crate) regs: Vec<Lanes>,
    pub(crate) preds: Vec<u32>,
    pub(crate) scratch: Lanes,
    pub(crate) pc: usize,
    /// Lanes that execute at `pc`; lanes that have not ended.
    pub(crate) active: u32,
    pub(crate) live: u32,
    /// Lanes that are elsewhere, and the lowest of their places.
    others: Vec<(usize, u32)>,
    nearest: usize,
    pub(crate) state: State,
    pub(crate) local: Vec<u8>,
    /// Count of what orders its lanes' accesses of memory.
    pub(crate) epoch: u32,
    /// The block's count of fences at its last one, and addresses of atomics since.
    pub(crate) fence_mark: u32,
    pub(crate) seen: Vec<u64>,
    pub(crate) copies: Vec<Copy>,
    /// Each lane's number of groups of copies that are committed.
    pub(crate) groups: [u32; 32],
    /// Number of its groups of bulk copies that are committed.
    pub(crate) bulk_group: u32,
    /// Products under way; how many groups of them are committed; how many products there have been.
    pub(crate) products: Vec<UnderWay>,
    pub(crate) product_group: u32,
    pub(crate) n_products: usize,
    pub(crate) polls: u32,
    pub(crate) steps: u64,
}

impl Warp {
    /// For a new block. `live`: its lanes that are threads.
    pub(crate) fn reset(&mut self, id: usize, live: u32, kernel: &Kernel) {
        self.id = id;
        self.regs.resize(kernel.n_registers, [0; 32]);
        for &r in &kernel.unwritten {
            self.regs[r] = [0; 32];
        }
        self.preds.clear();
        self.preds.resize(kernel.n_predicates, 0);
        self.local.clear();
        self.local.resize(kernel.local * 32, 0xFF);
        (self.pc, self.active, self.live) = (0, live, live);
        self.others.clear();
        self.nearest = usize::MAX;
        self.state = State::Ready;
        (self.epoch, self.fence_mark, self.polls, self.steps) = (1, 0, 0, 0);
        self.seen.clear();
        self.copies.clear();
        (self.groups, self.bulk_group) = ([0; 32], 0);
        self.products.clear();
        (self.product_group, self.n_products) = (0, 0);
    }

    /// Some lanes go elsewhere, the rest go on. Those at the lowest place are executed first, so that lanes that
    /// took a detour meet the others again where their ways join.
    pub(crate) fn branch(&mut self, taken: u32, target: usize) {
        let rest = self.active & !taken;
        if rest == 0 {
            self.pc = target;
        } else if taken != 0 {
            self.others.push((target, taken));
            self.active = rest;
        }
        self.meet();
    }

    /// These lanes go to where `place` says, by lane.
    pub(crate) fn scatter(&mut self, place: impl Fn(usize) -> usize) {
        let mask = self.active;
        let first = place(mask.trailing_zeros() as usize);
        (self.pc, self.active) = (first, 0);
        for lane in lanes(mask) {
            let target = place(lane);
            if target == first {
                self.active |= 1 << lane;
            } else {
                self.others.push((target, 1 << lane));
            }
        }
        self.meet();
    }

    /// These lanes have ended.
    pub(crate) fn exit(&mut self, ended: u32) {
        self.live &= !ended;
        self.active &= !ended;
        if self.active == 0 {
            match self.others.pop() {
                Some((pc, mask)) => (self.pc, self.active) = (pc, mask),
                None => self.state = State::Done,
            }
        }
        self.meet();
    }

    /// Takes in lanes that are at the same place; goes on with those at the lowest.
    pub(crate) fn meet(&mut self) {
        if self.others.is_empty() {
            self.nearest = usize::MAX;
            return;
        }
        if let Some((at, &(pc, _))) = self.others.iter().enumerate().min_by_key(|(_, (pc, _))| *pc)
            && pc < self.pc
        {
            let (pc, mask) = self.others.swap_remove(at);
            self.others.push((self.pc, self.active));
            (self.pc, self.active) = (pc, mask);
        }
        let (pc, active) = (self.pc, &mut self.active);
        self.others.retain(|(at, mask)| {
            if *at == pc {
                *active |= mask;
            }
            *at != pc
        });
        self.nearest = self.others.iter().map(|(pc, _)| *pc).min().unwrap_or(usize::MAX);
    }

    /// To the next instruction.
    pub(crate) fn advance(&mut self) {
        self.pc += 1;
        if self.pc >= self.nearest {
            self.meet();
        }
    }

    pub(crate) fn set(&mut self, d: R, value: &Lanes, mask: u32) {
        put(&mut self.regs[d], value, mask);
    }

    pub(crate) fn set_pred(&mut self, p: P, value: u32, mask: u32) {
        self.preds[p] = self.preds[p] & !mask | value & mask;
    }

    pub(crate) fn cond(&self, cond: Cond) -> u32 {
        self.preds[cond.p] ^ if cond.negate { u32::MAX } else { 0 }
    }
}

/// Writes the lanes of a mask.
pub(crate) fn put(to: &mut Lanes, value: &Lanes, mask: u32) {
    if mask == u32::MAX {
        *to = *value;
        return;
    }
    for (i, (to, from)) in to.iter_mut().zip(value).enumerate() {
        // No branch: whole vectors are chosen from.
        let keep = u64::from(mask >> i & 1).wrapping_sub(1);
        *to = *to & keep | *from & !keep;
    }
}

/// The lanes of a mask, lowest first.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> + Clone {
    let mut left = mask;
    std::iter::from_fn(move || {
        let lane = left.trailing_zeros() as usize;
        left &= left.wrapping_sub(1);
        (lane < 32).then_some(lane)
    })
}
