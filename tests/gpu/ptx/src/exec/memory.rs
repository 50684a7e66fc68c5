//! Loads, stores and atomics.

use crate::block::{Block, Count, Parts};
use crate::counters::{bank_phases, sectors};
use crate::fault::{FaultKind, Wrong, wrong};
use crate::inst::{Address, F1, Lanes, Order, R, Space, Update};
use crate::memory::{LOCAL_BASE, PARAM_BASE, SHARED_BASE, get, put};
use crate::shadow::{Access, Toucher};
use crate::warp::{Warp, lanes};

/// The addresses of a warp's access: each lane's, and the state space that all of them are in.
pub(crate) struct Where {
    pub(crate) space: Space,
    pub(crate) address: Lanes,
    pub(crate) mask: u32,
}

/// The addresses of the lanes. Generic ones are resolved; if they are in different spaces, that is not executed.
pub(crate) fn resolve(warp: &Warp, at: Address, mask: u32) -> Result<Where, Wrong> {
    let mut address = warp.regs[at.base].map(|base| base.wrapping_add_signed(at.offset));
    let mut space = at.space;
    if matches!(space, Space::Shared | Space::Local) {
        address = address.map(|a| a & 0xFFFF_FFFF);
    }
    if space == Space::Generic {
        let of = |a: u64| match a {
            PARAM_BASE.. => Space::Param,
            LOCAL_BASE.. => Space::Local,
            SHARED_BASE.. => Space::Shared,
            _ => Space::Global,
        };
        space = of(address[mask.trailing_zeros() as usize & 31]);
        if let Some(lane) = lanes(mask).find(|&lane| of(address[lane]) != space) {
            return wrong(FaultKind::Unsupported, lane, "generic addresses in different state spaces");
        }
        let base = match space {
            Space::Param => PARAM_BASE,
            Space::Local => LOCAL_BASE,
            Space::Shared => SHARED_BASE,
            _ => 0,
        };
        address = address.map(|a| a.wrapping_sub(base));
    }
    Ok(Where { space, address, mask })
}

fn aligned(address: u64, len: usize, lane: usize) -> Result<(), Wrong> {
    if address.is_multiple_of(len as u64) {
        return Ok(());
    }
    wrong(FaultKind::Misaligned, lane, format!("{len} bytes at {address:#x}"))
}

/// Counts a warp's access of global memory.
pub(crate) fn count_global(parts: &mut Parts, pc: usize, w: &Where, len: usize, access: Access) {
    let mut addresses = [0; 32];
    let mut n = 0;
    for lane in lanes(w.mask) {
        addresses[n] = w.address[lane];
        n += 1;
    }
    let (sectors, bytes) = (sectors(&addresses[..n], len), (n * len) as u64);
    parts.counts[pc].sectors += sectors;
    let totals = &mut parts.totals;
    if access != Access::Write {
        totals.global_read_sectors += sectors;
        totals.global_read_bytes += bytes;
    }
    if access != Access::Read {
        totals.global_written_sectors += sectors;
        totals.global_written_bytes += bytes;
    }
}

/// Counts passes over the banks of shared memory.
pub(crate) fn count_shared(totals: &mut crate::Counters, count: &mut Count, w: &Where, len: usize) {
    let mut accesses = [(0, 0); 32];
    let mut n = 0;
    for lane in lanes(w.mask) {
        accesses[n] = (lane, w.address[lane]);
        n += 1;
    }
    let (phases, conflicts) = bank_phases(&accesses[..n], len);
    totals.shared_phases += phases;
    totals.shared_conflicts += conflicts;
    count.conflicts += conflicts;
}

/// Index into a warp's local memory: each lane has its own part.
fn local(warp: &Warp, address: u64, len: usize, lane: usize) -> Result<usize, Wrong> {
    let size = warp.local.len() / 32;
    aligned(address, len, lane)?;
    if (address as usize).checked_add(len).is_none_or(|end| end > size) {
        return wrong(FaultKind::Bounds, lane, format!("{len} bytes at {address} of {size} bytes of local memory"));
    }
    Ok(lane * size + address as usize)
}

impl Block<'_> {
    pub(crate) fn load(
        &mut self,
        warp: &mut Warp,
        mask: u32,
        at: Address,
        (d, bytes, extend): (&[Option<R>], usize, F1),
        order: Order,
    ) -> Result<(), Wrong> {
        let w = resolve(warp, at, mask)?;
        let len = bytes * d.len();
        let mut values = [[0u64; 32]; 8];
        match w.space {
            Space::Shared => self.load_shared(warp, &w, (d.len(), bytes), &mut values)?,
            Space::Local => {
                for lane in lanes(mask) {
                    let from = local(warp, w.address[lane], len, lane)?;
                    for (i, value) in values.iter_mut().enumerate().take(d.len()) {
                        value[lane] = get(&warp.local, from + i * bytes, bytes);
                    }
                }
            }
            Space::Param => {
                for lane in lanes(mask) {
                    let (from, size) = (w.address[lane] as usize, self.launch.params.len());
                    if from.checked_add(len).is_none_or(|end| end > size) {
                        return wrong(FaultKind::Bounds, lane, format!("beyond the {size} bytes of parameters"));
                    }
                    for (i, value) in values.iter_mut().enumerate().take(d.len()) {
                        value[lane] = get(&self.launch.params, from + i * bytes, bytes);
                    }
                }
            }
            Space::Global | Space::Const | Space::Generic => self.load_global(warp, &w, (d.len(), bytes), order, &mut values)?,
        }
        for (value, d) in values.iter().zip(d) {
            if let Some(d) = d {
                let Warp { regs, scratch, .. } = warp;
                extend(scratch, value);
                crate::warp::put(&mut regs[*d], scratch, mask);
            }
        }
        Ok(())
    }

    fn load_shared(&mut self, warp: &Warp, w: &Where, (n, bytes): (usize, usize), values: &mut [Lanes; 8]) -> Result<(), Wrong> {
        let parts = &mut *self.parts;
        let mut by = Self::by(&parts.clocks, warp, 0);
        for lane in lanes(w.mask) {
            by.lane = lane;
            let from = parts.shared.locate(w.address[lane], n * bytes, lane)?;
            parts.shared.read(from, n * bytes, &by)?;
            for (i, value) in values.iter_mut().enumerate().take(n) {
                value[lane] = get(&parts.shared.bytes, from + i * bytes, bytes);
            }
        }
        count_shared(&mut parts.totals, &mut parts.counts[warp.pc], w, n * bytes);
        Ok(())
    }

    fn load_global(
        &mut self,
        warp: &mut Warp,
        w: &Where,
        (n, bytes): (usize, usize),
        order: Order,
        values: &mut [Lanes; 8],
    ) -> Result<(), Wrong> {
        let len = n * bytes;
        let strong = !matches!(order, Order::Weak | Order::Constant);
        let (races, parts) = (self.launch.races, &*self.parts);
        let toucher = self.toucher(&parts.clocks, &parts.between, warp.id);
        let mut reads = Vec::new();
        for lane in lanes(w.mask) {
            let address = w.address[lane];
            aligned(address, len, lane)?;
            let (allocation, from) = self.global.find(address, len, lane.into())?;
            if races && !allocation.read_only {
                // Strong reads race with plain writes only.
                if strong {
                    allocation.shadow.peek(from, len, &toucher, lane)?;
                } else {
                    allocation.shadow.touch(from, len, Access::Read, &toucher, lane)?;
                }
                if order == Order::Constant && allocation.shadow.written(from, len, self.launch.first_block) {
                    return wrong(
                        FaultKind::Race,
                        lane,
                        "global memory: read as never written (ld.global.nc), written by this launch",
                    );
                }
            }
            for (i, value) in values.iter_mut().enumerate().take(n) {
                value[lane] = get(&allocation.bytes, from + i * bytes, bytes);
            }
            if strong {
                reads.push(address);
            }
        }
        warp.seen.append(&mut reads);
        if order == Order::Acquire {
            self.parts.between.fence(&mut warp.seen);
        }
        if w.space != Space::Const {
            count_global(self.parts, warp.pc, w, len, Access::Read);
        }
        Ok(())
    }

    pub(crate) fn store(
        &mut self,
        warp: &mut Warp,
        mask: u32,
        at: Address,
        (a, bytes): (&[R], usize),
        order: Order,
    ) -> Result<(), Wrong> {
        let w = resolve(warp, at, mask)?;
        let len = bytes * a.len();
        let value = |warp: &Warp, lane: usize| {
            let mut value = [0u8; 64];
            for (i, r) in a.iter().enumerate() {
                put(&mut value, i * bytes, bytes, warp.regs[*r][lane]);
            }
            value
        };
        match w.space {
            Space::Shared => {
                let parts = &mut *self.parts;
                let mut by = Self::by(&parts.clocks, warp, 0);
                for lane in lanes(mask) {
                    by.lane = lane;
                    let to = parts.shared.locate(w.address[lane], len, lane)?;
                    parts.shared.write(to, &value(warp, lane)[..len], Access::Write, &by)?;
                }
                count_shared(&mut parts.totals, &mut parts.counts[warp.pc], &w, len);
            }
            Space::Local => {
                for lane in lanes(mask) {
                    let to = local(warp, w.address[lane], len, lane)?;
                    let value = value(warp, lane);
                    warp.local[to..to + len].copy_from_slice(&value[..len]);
                }
            }
            Space::Param | Space::Const => return wrong(FaultKind::Bounds, None, "a store to read-only memory"),
            Space::Global | Space::Generic => {
                let access = if order == Order::Weak { Access::Write } else { Access::Atomic };
                self.release(warp, order, lanes(mask).map(|lane| w.address[lane]));
                let parts = &*self.parts;
                let toucher = self.toucher(&parts.clocks, &parts.between, warp.id);
                for lane in lanes(mask) {
                    let bytes = value(warp, lane);
                    store_global(self.global, self.launch.races, (w.address[lane], &bytes[..len]), access, (&toucher, lane))?;
                }
                count_global(self.parts, warp.pc, &w, len, Access::Write);
            }
        }
        Ok(())
    }

    /// Strong writes tell others of what was written before the last fence; ones that release are fences themselves.
    fn release(&mut self, warp: &mut Warp, order: Order, addresses: impl Iterator<Item = u64>) {
        if matches!(order, Order::Release | Order::AcqRel) {
            warp.fence_mark = self.parts.between.fence(&mut Vec::new());
        }
        if order != Order::Weak {
            for address in addresses {
                self.parts.between.release(address, self.serial, warp.fence_mark);
            }
        }
    }

    pub(crate) fn atomic(
        &mut self,
        warp: &mut Warp,
        mask: u32,
        at: Address,
        (d, a, b, bytes, f): (Option<R>, R, R, usize, Update),
        order: Order,
    ) -> Result<(), Wrong> {
        let w = resolve(warp, at, mask)?;
        let mut old = [0; 32];
        if w.space == Space::Shared {
            let parts = &mut *self.parts;
            let mut by = Self::by(&parts.clocks, warp, 0);
            for lane in lanes(mask) {
                by.lane = lane;
                let to = parts.shared.locate(w.address[lane], bytes, lane)?;
                old[lane] = get(&parts.shared.bytes, to, bytes);
                let new = f(old[lane], warp.regs[a][lane], warp.regs[b][lane]);
                parts.shared.write(to, &new.to_le_bytes()[..bytes], Access::Atomic, &by)?;
            }
            count_shared(&mut parts.totals, &mut parts.counts[warp.pc], &w, bytes);
        } else if matches!(w.space, Space::Global | Space::Generic) {
            let addresses = lanes(mask).map(|lane| w.address[lane]);
            self.release(warp, order, addresses.clone());
            let parts = &*self.parts;
            let toucher = self.toucher(&parts.clocks, &parts.between, warp.id);
            for lane in lanes(mask) {
                let (allocation, at) = self.global.find(w.address[lane], bytes, lane.into())?;
                old[lane] = get(&allocation.bytes, at, bytes);
                let new = f(old[lane], warp.regs[a][lane], warp.regs[b][lane]).to_le_bytes();
                store_global(self.global, self.launch.races, (w.address[lane], &new[..bytes]), Access::Atomic, (&toucher, lane))?;
            }
            count_global(self.parts, warp.pc, &w, bytes, Access::Atomic);
            warp.seen.extend(addresses);
            if matches!(order, Order::Acquire | Order::AcqRel) {
                self.parts.between.fence(&mut warp.seen);
            }
        } else {
            return wrong(FaultKind::Unsupported, None, "an atomic operation on memory that is no other thread's");
        }
        if let Some(d) = d {
            warp.set(d, &old, mask);
        }
        self.events += 1;
        Ok(())
    }
}

fn store_global(
    global: &mut crate::memory::Global,
    races: bool,
    (address, value): (u64, &[u8]),
    access: Access,
    (by, lane): (&Toucher, usize),
) -> Result<(), Wrong> {
    aligned(address, value.len(), lane)?;
    let (allocation, to) = global.find(address, value.len(), lane.into())?;
    if allocation.read_only {
        return wrong(FaultKind::Bounds, lane, "a store to constant memory");
    }
    if races {
        allocation.shadow.touch(to, value.len(), access, by, lane)?;
    }
    allocation.bytes[to..to + value.len()].copy_from_slice(value);
    Ok(())
}
