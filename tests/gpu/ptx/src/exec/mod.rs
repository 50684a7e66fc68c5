//! Executes one instruction for a warp.

pub(crate) mod barriers;
mod boxes;
mod collective;
pub(crate) mod copies;
pub(crate) mod mbarrier;
mod memory;
mod product;
mod tensor;

use crate::block::Block;
use crate::fault::{FaultKind, Wrong, wrong};
use crate::inst::{Inst, Lanes, Op};
use crate::warp::{Warp, lanes, put};

impl Block<'_> {
    /// `mask`: the lanes whose predicate holds. The warp's place is that of the instruction; afterwards that of the next.
    pub(crate) fn step(&mut self, warp: &mut Warp, inst: &Inst, mask: u32) -> Result<(), Wrong> {
        match &inst.op {
            Op::Branch { target, uniform } => {
                if *uniform && mask != 0 && mask != warp.active {
                    return wrong(FaultKind::Divergence, None, "a branch that is said to be uniform is not");
                }
                warp.pc += 1;
                warp.branch(mask, *target);
                return Ok(());
            }
            Op::BranchTable { index, targets } => return branch_table(warp, *index, targets, mask),
            Op::Exit => {
                warp.pc += 1;
                warp.exit(mask);
                return Ok(());
            }
            _ if mask == 0 => {}
            op => self.lanes_step(warp, op, mask)?,
        }
        warp.advance();
        Ok(())
    }

    fn lanes_step(&mut self, warp: &mut Warp, op: &Op, mask: u32) -> Result<(), Wrong> {
        match op {
            Op::Un { f, g, d, a } => {
                let Warp { regs, scratch, .. } = warp;
                f(scratch, &regs[*a]);
                if let Some(g) = g {
                    let first = *scratch;
                    g(scratch, &first);
                }
                put(&mut regs[*d], scratch, mask);
            }
            Op::Bin { f, d, a, b } => {
                let Warp { regs, scratch, .. } = warp;
                f(scratch, &regs[*a], &regs[*b]);
                put(&mut regs[*d], scratch, mask);
            }
            Op::Tri { f, d, a, b, c } => {
                let Warp { regs, scratch, .. } = warp;
                f(scratch, &regs[*a], &regs[*b], &regs[*c]);
                put(&mut regs[*d], scratch, mask);
            }
            Op::Setp { f, p, q, a, b, with } => {
                let holds = f(&warp.regs[*a], &warp.regs[*b]);
                let (yes, no) = match with {
                    Some((with, cond)) => (with(holds, warp.cond(*cond)), with(!holds, warp.cond(*cond))),
                    None => (holds, !holds),
                };
                warp.set_pred(*p, yes, mask);
                if let Some(q) = q {
                    warp.set_pred(*q, no, mask);
                }
            }
            Op::Logic { f, d, a, b } => {
                let value = f(warp.cond(*a), warp.cond(*b));
                warp.set_pred(*d, value, mask);
            }
            Op::SetPred { d, value } => warp.set_pred(*d, if *value { u32::MAX } else { 0 }, mask),
            Op::Select { d, a, b, cond } => {
                let holds = warp.cond(*cond);
                let value: Lanes = std::array::from_fn(|i| warp.regs[if holds >> i & 1 == 1 { *a } else { *b }][i]);
                warp.set(*d, &value, mask);
            }
            Op::Lop3 { table, d, a, b, c } => {
                let value: Lanes = std::array::from_fn(|i| lop3(*table, warp.regs[*a][i], warp.regs[*b][i], warp.regs[*c][i]));
                warp.set(*d, &value, mask);
            }
            Op::Pack { d, parts, bits } => {
                let part = |lane: usize| (0u32..).zip(parts).fold(0, |all, (i, r)| all | warp.regs[*r][lane] << (i * bits));
                let value: Lanes = std::array::from_fn(part);
                warp.set(*d, &value, mask);
            }
            Op::Unpack { parts, a, bits } => {
                let whole = warp.regs[*a];
                for (i, d) in (0u32..).zip(parts).filter_map(|(i, d)| d.map(|d| (i, d))) {
                    let value = whole.map(|x| x >> (i * bits) & (u64::MAX >> (64 - bits)));
                    warp.set(d, &value, mask);
                }
            }
            Op::Nop => {}
            Op::Trap => return wrong(FaultKind::Trap, None, "a trap, or an assertion that failed"),
            other => return self.memory_step(warp, other, mask),
        }
        Ok(())
    }

    fn memory_step(&mut self, warp: &mut Warp, op: &Op, mask: u32) -> Result<(), Wrong> {
        match op {
            Op::Load { at, d, bytes, extend, order } => self.load(warp, mask, *at, (d.as_slice(), *bytes, *extend), *order),
            Op::Store { at, a, bytes, order } => self.store(warp, mask, *at, (a.as_slice(), *bytes), *order),
            Op::Atomic { at, d, a, b, bytes, f, order } => self.atomic(warp, mask, *at, (*d, *a, *b, *bytes, *f), *order),
            Op::Fence { gpu } => {
                if *gpu {
                    warp.fence_mark = self.parts.between.fence(&mut warp.seen);
                }
                Ok(())
            }
            Op::Shuffle { .. }
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Redux { .. }
            | Op::ActiveMask { .. }
            | Op::Elect { .. }
            | Op::WarpSync { .. } => collective::step(warp, op, mask),
            Op::Bar { .. } => self.bar(warp, op, mask),
            Op::Copy { .. }
            | Op::CopyCommit
            | Op::CopyWait { .. }
            | Op::CopyArrive { .. }
            | Op::Bulk { .. }
            | Op::BulkCommit
            | Op::BulkWait { .. } => self.copy_step(warp, op, mask),
            Op::BulkBox { to, map, place, bar } => self.bulk_box(warp, (*to, *map, *bar), *place, mask),
            Op::FenceAsync { barriers_only } => {
                if *barriers_only {
                    self.fence_barriers(warp);
                } else {
                    self.parts.clocks.fence(warp.id);
                }
                Ok(())
            }
            Op::LoadMatrix { .. } | Op::StoreMatrix { .. } | Op::MoveMatrix { .. } | Op::Mma(_) => {
                whole(mask)?;
                self.tensor_step(warp, op)
            }
            Op::Product(_) | Op::ProductFence | Op::ProductCommit | Op::ProductWait { .. } => {
                whole(mask)?;
                self.product_step(warp, op)
            }
            other => self.mbarrier_step(warp, other, mask),
        }
    }
}

fn whole(mask: u32) -> Result<(), Wrong> {
    if mask == u32::MAX {
        return Ok(());
    }
    wrong(FaultKind::Divergence, None, format!("needs all lanes of the warp, has {mask:#010x}"))
}

fn branch_table(warp: &mut Warp, index: usize, targets: &[usize], mask: u32) -> Result<(), Wrong> {
    let next = warp.pc + 1;
    if let Some(lane) = lanes(mask).find(|&lane| warp.regs[index][lane] >= targets.len() as u64) {
        return wrong(FaultKind::Bounds, lane, "an index beyond the table of branch targets");
    }
    let places = warp.regs[index];
    warp.scatter(|lane| if mask >> lane & 1 == 1 { targets[places[lane] as usize] } else { next });
    Ok(())
}

/// Bit by bit, what the table has at the three bits; the first is the highest.
fn lop3(table: u8, a: u64, b: u64, c: u64) -> u64 {
    (0..8u32).filter(|i| table >> i & 1 == 1).fold(0, |all, i| {
        let pick = |x: u64, bit: u32| if i >> bit & 1 == 1 { x } else { !x };
        all | pick(a, 2) & pick(b, 1) & pick(c, 0)
    }) & 0xFFFF_FFFF
}
