//! Registers of a kernel: a text names each value its own, often thousands; here those that are never in use at the same time
//! share one, so that a warp's registers stay in the processor's caches.

use crate::inst::{Const, Factor, Inst, Op, Phase, R, Reduction};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What an instruction does with a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Read,
    Written,
}

/// The registers of a kernel.
pub(crate) struct Registers {
    pub(crate) n: usize,
    /// Those that an instruction may read which nothing wrote: zero when a warp begins.
    pub(crate) unwritten: Vec<R>,
}

/// Gives registers new numbers. Register 0, which nobody reads, stays, and constants have one each, for the whole kernel.
pub(crate) fn share(code: &mut [Inst], constants: &mut [(R, Const)], n: usize) -> Registers {
    const NONE: usize = usize::MAX;
    let mut slots = vec![NONE; n];
    slots[0] = 0;
    for (i, (r, _)) in constants.iter_mut().enumerate() {
        slots[*r] = i + 1;
        *r = i + 1;
    }
    let fixed: Vec<bool> = slots.iter().map(|&slot| slot != NONE).collect();
    let (spans, mut unwritten) = spans(code, &fixed);
    let mut order: Vec<R> = (0..n).filter(|&r| !fixed[r] && spans[r].0 <= spans[r].1).collect();
    order.sort_by_key(|&r| spans[r]);
    let mut n_slots = constants.len() + 1;
    // By the end of what is there; and what is free.
    let mut busy = BinaryHeap::new();
    let mut free = Vec::new();
    for r in order {
        let (start, end) = spans[r];
        while let Some(&Reverse((until, slot))) = busy.peek()
            && until < start
        {
            busy.pop();
            free.push(slot);
        }
        let slot = free.pop().unwrap_or_else(|| {
            n_slots += 1;
            n_slots - 1
        });
        busy.push(Reverse((end, slot)));
        slots[r] = slot;
    }
    for inst in code {
        visit(&mut inst.op, &mut |r, _| *r = slots[*r]);
    }
    for r in &mut unwritten {
        *r = slots[*r];
    }
    Registers { n: n_slots, unwritten }
}

/// From where to where, in instructions, each register may hold what is still read; and registers that are read unwritten.
/// The lanes of a warp may be at different places, but each has values of its own: what holds for one thread is enough.
fn spans(code: &mut [Inst], fixed: &[bool]) -> (Vec<(usize, usize)>, Vec<R>) {
    let mut blocks = blocks(code, fixed.len());
    let mut spans = vec![(usize::MAX, 0); fixed.len()];
    let mut touch = |r: R, at: usize| spans[r] = (spans[r].0.min(at), spans[r].1.max(at));
    for block in &mut blocks {
        for (i, inst) in code.iter_mut().enumerate().take(block.end).skip(block.start) {
            let guarded = inst.guard.is_some();
            let mut writes = Vec::new();
            visit(&mut inst.op, &mut |r, role| {
                if fixed[*r] {
                    return;
                }
                touch(*r, i);
                if role == Role::Read && !block.written.has(*r) {
                    block.live.add(*r);
                }
                // Under a predicate some lanes keep what was there.
                if role == Role::Written && !guarded {
                    writes.push(*r);
                }
            });
            for r in writes {
                block.written.add(r);
            }
        }
    }
    flow(&mut blocks);
    for block in &blocks {
        block.live.each(|r| touch(r, block.start));
        for &next in &block.next {
            blocks[next].live.each(|r| touch(r, block.end - 1));
        }
    }
    let mut unwritten = Vec::new();
    blocks[0].live.each(|r| unwritten.push(r));
    (spans, unwritten)
}

/// Instructions that are executed one after the other.
pub(crate) struct Stretch {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) next: Vec<usize>,
    /// Registers whose values are read from here on, as they are at its beginning; and those that it writes in any case.
    live: Set,
    written: Set,
}

#[derive(Clone, Default, PartialEq)]
pub(crate) struct Set(pub(crate) Vec<u64>);

impl Set {
    pub(crate) fn has(&self, r: R) -> bool {
        self.0[r / 64] >> (r % 64) & 1 == 1
    }

    pub(crate) fn add(&mut self, r: R) {
        self.0[r / 64] |= 1 << (r % 64);
    }

    fn each(&self, mut f: impl FnMut(R)) {
        for (i, &word) in self.0.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                f(64 * i + left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
    }
}

pub(crate) fn blocks(code: &[Inst], n_registers: usize) -> Vec<Stretch> {
    let mut starts = vec![false; code.len() + 1];
    starts[0] = true;
    for (i, inst) in code.iter().enumerate() {
        let targets: &[usize] = match &inst.op {
            Op::Branch { target, .. } => std::slice::from_ref(target),
            Op::BranchTable { targets, .. } => targets,
            Op::Exit => &[],
            _ => continue,
        };
        for &target in targets {
            starts[target] = true;
        }
        starts[i + 1] = true;
    }
    let bounds: Vec<usize> = (0..code.len()).filter(|&i| starts[i]).collect();
    let index = |at: usize| bounds.partition_point(|&start| start < at);
    let empty = Set(vec![0; n_registers.div_ceil(64)]);
    let stretch = |(i, &start): (usize, &usize)| {
        let end = bounds.get(i + 1).copied().unwrap_or(code.len());
        let last = &code[end - 1];
        let mut next: Vec<usize> = match &last.op {
            Op::Branch { target, .. } => vec![index(*target)],
            Op::BranchTable { targets, .. } => targets.iter().map(|&target| index(target)).collect(),
            _ => Vec::new(),
        };
        let leaves = matches!(last.op, Op::Branch { .. } | Op::BranchTable { .. } | Op::Exit) && last.guard.is_none();
        if !leaves && end < code.len() {
            next.push(i + 1);
        }
        next.retain(|&next| next < bounds.len());
        Stretch { start, end, next, live: empty.clone(), written: empty.clone() }
    };
    bounds.iter().enumerate().map(stretch).collect()
}

/// What is read later is live before, but where it is written between.
fn flow(blocks: &mut [Stretch]) {
    let mut changed = true;
    while changed {
        changed = false;
        for i in (0..blocks.len()).rev() {
            for n in 0..blocks[i].next.len() {
                let later = std::mem::take(&mut blocks[blocks[i].next[n]].live);
                let block = &mut blocks[i];
                // A stretch that follows itself adds nothing to itself.
                for ((live, later), written) in block.live.0.iter_mut().zip(&later.0).zip(&block.written.0) {
                    let now = *live | later & !written;
                    changed |= now != *live;
                    *live = now;
                }
                let next = blocks[i].next[n];
                blocks[next].live = later;
            }
        }
    }
}

/// All registers of an operation.
pub(crate) fn visit(op: &mut Op, f: &mut impl FnMut(&mut R, Role)) {
    use Role::{Read, Written};
    let mut all = |read: &mut [&mut R], written: Option<&mut R>| {
        for r in read {
            f(r, Read);
        }
        if let Some(r) = written {
            f(r, Written);
        }
    };
    match op {
        Op::Nop
        | Op::Logic { .. }
        | Op::SetPred { .. }
        | Op::Branch { .. }
        | Op::Exit
        | Op::Trap
        | Op::Fence { .. }
        | Op::CopyCommit
        | Op::CopyWait { .. }
        | Op::FenceAsync { .. }
        | Op::ProductFence
        | Op::ProductCommit
        | Op::ProductWait { .. }
        | Op::BulkCommit
        | Op::BulkWait { .. } => {}
        Op::Un { d, a, .. } | Op::MoveMatrix { d, a } => all(&mut [a], Some(d)),
        Op::Bin { d, a, b, .. } | Op::Select { d, a, b, .. } => all(&mut [a, b], Some(d)),
        Op::Tri { d, a, b, c, .. } | Op::Lop3 { d, a, b, c, .. } => all(&mut [a, b, c], Some(d)),
        Op::Setp { a, b, .. } => all(&mut [a, b], None),
        Op::BranchTable { index, .. } => all(&mut [index], None),
        Op::ActiveMask { d } => all(&mut [], Some(d)),
        Op::Redux { d, a, members, .. } | Op::Match { d, a, members, .. } => all(&mut [a, members], Some(d)),
        Op::Vote { d, members, .. } | Op::Elect { d, members, .. } => all(&mut [members], Some(d)),
        Op::Shuffle { d, a, b, c, members, .. } => all(&mut [a, b, c, members], Some(d)),
        Op::WarpSync { members } => all(&mut [members], None),
        Op::Atomic { at, d, a, b, .. } => all(&mut [&mut at.base, a, b], d.as_mut()),
        Op::BarInit { bar, count } => all(&mut [&mut bar.base, count], None),
        Op::CopyArrive { bar, .. } | Op::BarInvalidate { bar } => all(&mut [&mut bar.base], None),
        Op::BarTest { bar, by: Phase::State(r) | Phase::Parity(r), .. } => all(&mut [&mut bar.base, r], None),
        Op::Bar { id, threads, reduce, .. } => {
            all(&mut [id], None);
            if let Some(r) = threads {
                f(r, Read);
            }
            // The others' result is a predicate.
            if let Some((Reduction::Popc, _, d)) = reduce {
                f(d, Written);
            }
        }
        other => visit_many(other, f),
    }
}

/// Those with addresses and lists of registers.
fn visit_many(op: &mut Op, f: &mut impl FnMut(&mut R, Role)) {
    use Role::{Read, Written};
    let mut each = |list: &mut [R], role: Role| {
        for r in list {
            f(r, role);
        }
    };
    let one = std::slice::from_mut::<R>;
    match op {
        Op::Pack { d, parts, .. } => {
            each(parts, Read);
            each(one(d), Written);
        }
        Op::Unpack { parts, a, .. } => {
            each(one(a), Read);
            for r in parts.iter_mut().flatten() {
                each(one(r), Written);
            }
        }
        Op::Load { at, d, .. } => {
            each(one(&mut at.base), Read);
            for r in d.iter_mut().flatten() {
                each(one(r), Written);
            }
        }
        Op::Store { at, a, .. } | Op::StoreMatrix { at, a, .. } => {
            each(one(&mut at.base), Read);
            each(a, Read);
        }
        Op::LoadMatrix { at, d, .. } => {
            each(one(&mut at.base), Read);
            each(d, Written);
        }
        Op::Mma(mma) => {
            for list in [&mut mma.a, &mut mma.b, &mut mma.c] {
                each(list, Read);
            }
            each(&mut mma.d, Written);
        }
        Op::Product(product) => {
            match &mut product.a {
                Factor::Shared(descriptor) => each(one(descriptor), Read),
                Factor::Registers(a) => each(a, Read),
            }
            each(one(&mut product.b), Read);
            // They are written, too; but not instead of what was there.
            each(&mut product.d, Read);
        }
        other => visit_copies(other, &mut each),
    }
}

/// Those that copy memory, or wait for copies.
fn visit_copies(op: &mut Op, each: &mut impl FnMut(&mut [R], Role)) {
    use Role::{Read, Written};
    let one = std::slice::from_mut::<R>;
    match op {
        Op::BulkBox { to, map, place, bar } => {
            for address in [to, map, bar] {
                each(one(&mut address.base), Read);
            }
            each(place, Read);
        }
        Op::Copy { to, from, read, .. } => {
            each(one(&mut to.base), Read);
            each(one(&mut from.base), Read);
            if let Some(r) = read {
                each(one(r), Read);
            }
        }
        Op::Bulk { to, from, bytes, bar } => {
            each(one(&mut to.base), Read);
            each(one(&mut from.base), Read);
            each(one(bytes), Read);
            if let Some(bar) = bar {
                each(one(&mut bar.base), Read);
            }
        }
        Op::BarArrive { bar, state, count, expect, .. } => {
            each(one(&mut bar.base), Read);
            for r in [count, expect].into_iter().flatten() {
                each(one(r), Read);
            }
            if let Some(r) = state {
                each(one(r), Written);
            }
        }
        // An operation that is forgotten here is a bug of this crate.
        other => unreachable!("{other:?}"),
    }
}
