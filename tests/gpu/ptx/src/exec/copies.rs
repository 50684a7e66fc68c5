//! Asynchronous copies: begun when they are issued, done as late as they may be.

use super::memory::{Where, count_global, count_shared, resolve};
use crate::block::Block;
use crate::fault::{FaultKind, Wrong, wrong};
use crate::inst::{Address, Cond, Op, R, Space};
use crate::shadow::Access;
use crate::shared::By;
use crate::warp::{Copy, Warp, lanes};

/// What the block's copying unit has still to do.
#[derive(Debug)]
pub(crate) enum Later {
    /// A bulk copy to shared memory, and the mbarrier that counts its bytes.
    In { to: usize, from: u64, bytes: usize, bar: usize, pc: usize },
    /// A box of a tensor: pieces of 16 bytes in shared memory, and how many bytes there are of each in global memory, and where.
    Box { pieces: Vec<(usize, u64, usize)>, bar: usize, pc: usize },
    /// A bulk copy to global memory: of a warp's group.
    Out { to: u64, from: usize, bytes: usize, warp: usize, group: u32, pc: usize },
    /// Copies of a lane, and the mbarrier at which it arrives when they are done.
    Arrive { copies: Vec<Copy>, bar: usize, warp: usize, lane: usize, pc: usize },
}

impl Block<'_> {
    pub(super) fn copy_step(&mut self, warp: &mut Warp, op: &Op, mask: u32) -> Result<(), Wrong> {
        match op {
            Op::Copy { to, from, bytes, read, ignore } => self.copy(warp, (*to, *from, *bytes), (*read, *ignore), mask),
            Op::CopyCommit => {
                for lane in lanes(mask) {
                    warp.groups[lane] += 1;
                }
                Ok(())
            }
            Op::CopyWait { keep } => self.copy_wait(warp, *keep, mask),
            Op::CopyArrive { bar, counted } => {
                for lane in lanes(mask) {
                    let at = self.bar_address(warp, *bar, lane)?;
                    if *counted {
                        self.expect_arrival(at, warp, lane)?;
                    }
                    let (copies, rest) = warp.copies.iter().partition(|copy| copy.lane == lane);
                    warp.copies = rest;
                    self.later.push(Later::Arrive { copies, bar: at, warp: warp.id, lane, pc: warp.pc });
                }
                Ok(())
            }
            Op::Bulk { to, from, bytes, bar } => self.bulk(warp, (*to, *from, *bytes), *bar, mask),
            Op::BulkCommit => {
                warp.bulk_group += 1;
                Ok(())
            }
            Op::BulkWait { keep } => {
                let (id, limit) = (warp.id, warp.bulk_group.saturating_sub(*keep));
                let due = |later: &Later| matches!(later, Later::Out { warp, group, .. } if *warp == id && *group < limit);
                while let Some(at) = self.later.iter().position(due) {
                    self.land(at)?;
                }
                Ok(())
            }
            _ => wrong(FaultKind::Unsupported, None, "no copy"),
        }
    }

    fn copy(
        &mut self,
        warp: &mut Warp,
        (to, from, bytes): (Address, Address, usize),
        (read, ignore): (Option<R>, Option<Cond>),
        mask: u32,
    ) -> Result<(), Wrong> {
        let (to, from) = (resolve(warp, to, mask)?, resolve(warp, from, mask)?);
        let ignored = ignore.map_or(0, |cond| warp.cond(cond));
        let parts = &mut *self.parts;
        let mut reading = 0;
        for lane in lanes(mask) {
            let wanted = read.map_or(bytes, |r| warp.regs[r][lane] as u32 as usize);
            let read = if ignored >> lane & 1 == 1 { 0 } else { wanted };
            let address = from.address[lane];
            if !address.is_multiple_of(bytes as u64) {
                return wrong(FaultKind::Misaligned, lane, format!("{bytes} bytes copied from {address:#x}"));
            }
            if read > bytes {
                return wrong(FaultKind::Unsupported, lane, format!("{read} bytes are read for a copy of {bytes}"));
            }
            let target = parts.shared.locate(to.address[lane], bytes, lane)?;
            if read > 0 {
                reading |= 1 << lane;
                let (allocation, at) = self.global.find(address, read, lane.into())?;
                if self.launch.races && !allocation.read_only {
                    let (clocks, between) = (&parts.clocks, &parts.between);
                    let by = crate::shadow::Toucher {
                        block: self.serial,
                        first_block: self.launch.first_block,
                        tick: between.tick,
                        warp: warp.id,
                        clock: clocks.own(warp.id),
                        known: clocks.known(warp.id),
                        acquired: &between.acquired,
                    };
                    allocation.shadow.touch(at, read, Access::Read, &by, lane)?;
                }
            }
            let by = Self::by(&parts.clocks, warp, lane);
            parts.shared.begin_copy(target, bytes, &by)?;
            let group = warp.groups[lane];
            warp.copies.push(Copy { lane, group, to: target, from: address, bytes, read, pc: warp.pc });
        }
        count_shared(&mut parts.totals, &mut parts.counts[warp.pc], &to, bytes);
        if reading != 0 {
            let read = Where { space: Space::Global, address: from.address, mask: reading };
            count_global(self.parts, warp.pc, &read, bytes, Access::Read);
        }
        Ok(())
    }

    fn copy_wait(&mut self, warp: &mut Warp, keep: Option<u32>, mask: u32) -> Result<(), Wrong> {
        let id = warp.id;
        while let Some(at) =
            self.later.iter().position(|l| matches!(l, Later::Arrive { warp, lane, .. } if *warp == id && mask >> lane & 1 == 1))
        {
            self.land(at)?;
        }
        let due = |copy: &Copy, groups: &[u32; 32]| {
            mask >> copy.lane & 1 == 1 && keep.is_none_or(|keep| copy.group + keep < groups[copy.lane])
        };
        let copies = std::mem::take(&mut warp.copies);
        let (due, rest): (Vec<_>, Vec<_>) = copies.into_iter().partition(|copy| due(copy, &warp.groups));
        warp.copies = rest;
        for copy in due {
            self.blame = copy.pc;
            let value = self.source(&copy)?;
            let parts = &mut *self.parts;
            let by = Self::by(&parts.clocks, warp, copy.lane);
            parts.shared.end_copy(copy.to, &value[..copy.bytes], &by);
        }
        Ok(())
    }

    /// What a copy puts: the bytes that are read, then zeros.
    fn source(&mut self, copy: &Copy) -> Result<[u8; 16], Wrong> {
        let mut value = [0; 16];
        if copy.read > 0 {
            let (source, at) = self.global.find(copy.from, copy.read, copy.lane.into())?;
            value[..copy.read].copy_from_slice(&source.bytes[at..at + copy.read]);
        }
        Ok(value)
    }

    fn bulk(
        &mut self,
        warp: &mut Warp,
        (to, from, bytes): (Address, Address, R),
        bar: Option<Address>,
        mask: u32,
    ) -> Result<(), Wrong> {
        let incoming = to.space == Space::Shared;
        let (to, from) = (resolve(warp, to, mask)?, resolve(warp, from, mask)?);
        for lane in lanes(mask) {
            let bytes = warp.regs[bytes][lane] as u32 as usize;
            let (to, from) = (to.address[lane], from.address[lane]);
            if bytes == 0 || !bytes.is_multiple_of(16) || !to.is_multiple_of(16) || !from.is_multiple_of(16) {
                let message = format!("a bulk copy of {bytes} bytes from {from:#x} to {to:#x}: all must be multiples of 16");
                return wrong(FaultKind::Misaligned, lane, message);
            }
            let (inside, outside) = if incoming { (to, from) } else { (from, to) };
            let last = self.parts.shared.locate(inside + bytes as u64 - 16, 16, lane)?;
            let inside = self.parts.shared.locate(inside, 16, lane)?.min(last);
            let access = if incoming { Access::Read } else { Access::Write };
            self.touch_global(outside, bytes, access, warp.id, lane)?;
            let parts = &mut *self.parts;
            let by = Self::by(&parts.clocks, warp, lane);
            let totals = &mut parts.totals;
            let sectors = bytes as u64 / 32 + u64::from(!bytes.is_multiple_of(32) || !outside.is_multiple_of(32));
            parts.counts[warp.pc].sectors += sectors;
            if let Some(bar) = bar {
                totals.global_read_bytes += bytes as u64;
                totals.global_read_sectors += sectors;
                parts.shared.behind_fence(inside, bytes, parts.clocks.fenced(warp.id), lane)?;
                parts.shared.begin_copy(inside, bytes, &by)?;
                let bar = self.copies_barrier(warp, bar, lane)?;
                self.later.push(Later::In { to: inside, from, bytes, bar, pc: warp.pc });
            } else {
                totals.global_written_bytes += bytes as u64;
                totals.global_written_sectors += sectors;
                parts.shared.behind_fence(inside, bytes, parts.clocks.fenced(warp.id), lane)?;
                parts.shared.read(inside, bytes, &by)?;
                self.later.push(Later::Out { to, from: inside, bytes, warp: warp.id, group: warp.bulk_group, pc: warp.pc });
            }
        }
        Ok(())
    }

    pub(super) fn touch_global(
        &mut self,
        address: u64,
        bytes: usize,
        access: Access,
        warp: usize,
        lane: usize,
    ) -> Result<(), Wrong> {
        let parts = &*self.parts;
        let toucher = self.toucher(&parts.clocks, &parts.between, warp);
        let (allocation, at) = self.global.find(address, bytes, lane.into())?;
        if self.launch.races && !allocation.read_only {
            allocation.shadow.touch(at, bytes, access, &toucher, lane)?;
        }
        Ok(())
    }

    /// Does one of the things that the copying unit has to do.
    pub(crate) fn land(&mut self, index: usize) -> Result<(), Wrong> {
        let agent = self.launch.threads().div_ceil(32) as usize;
        self.events += 1;
        match self.later.swap_remove(index) {
            Later::In { to, from, bytes, bar, pc } => {
                self.blame = pc;
                let (source, at) = self.global.find(from, bytes, None)?;
                let value = source.bytes[at..at + bytes].to_vec();
                self.arrived(agent, to, &value);
                self.arrive(bar, (0, -(bytes.cast_signed() as i64), false), agent, 0)?;
            }
            Later::Box { pieces, bar, pc } => {
                self.blame = pc;
                let bytes = 16 * pieces.len() as i64;
                for (to, from, there) in pieces {
                    let mut value = [0; 16];
                    if there > 0 {
                        let (source, at) = self.global.find(from, there, None)?;
                        value[..there].copy_from_slice(&source.bytes[at..at + there]);
                    }
                    self.arrived(agent, to, &value);
                }
                self.arrive(bar, (0, -bytes, false), agent, 0)?;
            }
            Later::Out { to, from, bytes, pc, .. } => {
                self.blame = pc;
                let (target, at) = self.global.find(to, bytes, None)?;
                target.bytes[at..at + bytes].copy_from_slice(&self.parts.shared.bytes[from..from + bytes]);
            }
            Later::Arrive { copies, bar, lane, pc, .. } => {
                self.blame = pc;
                for copy in copies {
                    let value = self.source(&copy)?;
                    self.arrived(agent, copy.to, &value[..copy.bytes]);
                }
                self.arrive(bar, (1, 0, false), agent, lane)?;
            }
        }
        Ok(())
    }

    /// Bytes of a copy in shared memory: written by the copying unit.
    fn arrived(&mut self, agent: usize, to: usize, value: &[u8]) {
        let parts = &mut *self.parts;
        let (clock, known) = (parts.clocks.own(agent), parts.clocks.known(agent));
        parts.shared.end_copy(to, value, &By { agent, lane: 0, epoch: 0, clock, known });
    }
}
