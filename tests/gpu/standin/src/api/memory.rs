//! Memory of devices, and pinned memory of the host.

use crate::c::Out;
use crate::call::call;
use crate::codes::{Done, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY};
use crate::driver::{Driver, Handle, Pinned, Range, complain, driver, in_context, lock};
use crate::run;
use crate::work::{Goal, Op};

/// What an allocation's size is rounded to.
const GRAIN: usize = 512;

impl Driver {
    fn allocate(&mut self, device: usize, bytes: usize) -> Done<u64> {
        let cost = bytes.max(1).next_multiple_of(GRAIN);
        self.take(device, cost).then_some(()).ok_or(OUT_OF_MEMORY)?;
        let address = lock(&self.devices[device].gpu).alloc(bytes);
        self.memory.insert(address, Range { device, bytes, cost });
        Ok(address)
    }

    /// Counts bytes as used, if there are so many.
    pub(crate) fn take(&mut self, device: usize, bytes: usize) -> bool {
        let fits = bytes <= self.free_bytes(device);
        if fits {
            self.devices[device].used += bytes;
            self.note_used();
        }
        fits
    }

    /// Counts them as free.
    pub(crate) fn give_back(&mut self, device: usize, bytes: usize) {
        self.devices[device].used -= bytes;
        self.note_used();
    }

    fn note_used(&mut self) {
        self.tally.used = self.devices.iter().map(|d| d.used).sum();
        self.tally.most_used = self.tally.most_used.max(self.tally.used);
    }

    fn free_bytes(&self, device: usize) -> usize {
        (self.knobs.memory - self.knobs.memory / 64).saturating_sub(self.devices[device].used)
    }

    /// Frees an allocation, by where it begins.
    pub(crate) fn free(&mut self, address: u64) -> Done {
        let range = *self.memory.get(&address).filter(|range| range.cost > 0).ok_or(INVALID_VALUE)?;
        self.memory.remove(&address);
        lock(&self.devices[range.device].gpu).free(address);
        self.give_back(range.device, range.cost);
        Ok(())
    }

    /// The end of a context.
    pub(crate) fn clear(&mut self, device: usize) -> Done {
        let all: Vec<u64> = self.memory.iter().filter(|(_, r)| r.device == device && r.cost > 0).map(|(a, _)| *a).collect();
        all.into_iter().try_for_each(|address| self.free(address))?;
        let cost = self.execs.values().filter(|exec| exec.device == device).map(|exec| exec.cost).sum();
        self.execs.retain(|_, exec| exec.device != device);
        self.give_back(device, cost);
        let modules: Vec<Handle> = self.modules.iter().filter(|(_, m)| m.device == device).map(|(h, _)| *h).collect();
        modules.into_iter().try_for_each(|module| self.unload(module))?;
        self.events.retain(|_, event| event.device != device);
        let own = crate::driver::legacy(device);
        self.streams.retain(|handle, stream| stream.device != device || *handle == own);
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> u32 {
    call("cuMemGetInfo_v2", || {
        in_context(|driver, device| {
            free.set(driver.free_bytes(device))?;
            total.set(driver.knobs.memory)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: Out<u64>, bytes: usize) -> u32 {
    call("cuMemAlloc_v2", || {
        in_context(|driver, device| {
            driver.unsafe_call()?;
            if bytes == 0 {
                return Err(INVALID_VALUE);
            }
            driver.count("alloc")?;
            address.set(driver.allocate(device, bytes)?)
        })
    })
}

/// Waits for all work first, which may use it.
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> u32 {
    call("cuMemFree_v2", || {
        let device = in_context(|driver, device| {
            driver.unsafe_call()?;
            Ok(device)
        })?;
        if address == 0 {
            return Ok(());
        }
        run::until(Goal::Device(device))?;
        driver(|driver| driver.free(address))
    })
}

/// The address is known at once; the memory is there in the stream's order.
#[unsafe(no_mangle)]
extern "C" fn cuMemAllocAsync(address: Out<u64>, bytes: usize, stream: Handle) -> u32 {
    call("cuMemAllocAsync", || {
        let found = in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            driver.not_captured(stream, "an allocation in a graph is not there")?;
            driver.count("alloc")?;
            match driver.allocate(device, bytes) {
                Err(OUT_OF_MEMORY) => Ok(Err(Goal::Device(device))),
                found => found.map(Ok),
            }
        })?;
        match found {
            Ok(found) => address.set(found),
            // The pool waits for what is to be freed before it gives up.
            Err(goal) => {
                run::until(goal)?;
                in_context(|driver, device| address.set(driver.allocate(device, bytes)?))
            }
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeAsync(address: u64, stream: Handle) -> u32 {
    call("cuMemFreeAsync", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            driver.not_captured(stream, "freeing in a graph is not there")?;
            if driver.memory.get(&address).is_none_or(|range| range.cost == 0) {
                return Err(INVALID_VALUE);
            }
            driver.push(stream, Op::Free { address })
        })
    })
}

/// Poisoned, as what nobody wrote is on the device.
#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(pointer: Out<usize>, bytes: usize, flags: u32) -> u32 {
    call("cuMemHostAlloc", || {
        in_context(|driver, _| {
            driver.unsafe_call()?;
            if bytes == 0 {
                return Err(INVALID_VALUE);
            }
            if flags & 2 != 0 {
                complain("memory of the host that the device reads (CU_MEMHOSTALLOC_DEVICEMAP) is not there");
                return Err(NOT_SUPPORTED);
            }
            driver.count("alloc")?;
            // A page more, to begin where one does, as drivers give it.
            let block = vec![0xFF; bytes + PAGE];
            let start = (block.as_ptr() as usize).next_multiple_of(PAGE);
            driver.pinned.insert(start, Pinned { bytes, _block: block });
            pointer.set(start)
        })
    })
}

const PAGE: usize = 4096;

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(pointer: usize) -> u32 {
    call("cuMemFreeHost", || {
        driver(|driver| {
            driver.unsafe_call()?;
            driver.pinned.remove(&pointer).map(|_| ()).ok_or(INVALID_VALUE)
        })
    })
}
