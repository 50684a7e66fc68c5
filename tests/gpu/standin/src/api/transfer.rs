//! Copies and fills.

use crate::c::Host;
use crate::call::call;
use crate::codes::{Done, INVALID_VALUE, STREAM_CAPTURE_UNSUPPORTED};
use crate::driver::{Driver, Handle, STAGING, complain, driver, in_context};
use crate::run;
use crate::work::{Goal, Op};

impl Driver {
    /// A pageable buffer can't be part of a graph.
    fn pageable(&mut self, stream: Handle, what: &str) -> Done {
        if let Some(capture) = self.streams.get(&stream).and_then(|s| s.capture) {
            complain(format_args!("{what} pageable memory while the stream is captured"));
            self.invalidate(capture);
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        Ok(())
    }

    /// The goal of a call that waits for all that is queued on the stream so far.
    pub(crate) fn all_of(&self, stream: Handle) -> Goal {
        Goal::Stream(stream, self.streams.get(&stream).map_or(0, |s| s.queued))
    }
}

/// To the device. Pageable memory is read now, pinned memory when it is the copy's turn. A call that waits, waits for pinned memory
/// alone: pageable memory has been read, and may still be on its way from where the driver has put it (CUDA's "API synchronization
/// behavior").
fn write(to: u64, from: Host, bytes: usize, stream: Handle, wait: bool) -> Done {
    if bytes == 0 {
        return in_context(|driver, device| driver.stream(stream, device).map(|_| ()));
    }
    let goal = in_context(|driver, device| {
        let stream = driver.stream(stream, device)?;
        driver.range(to, bytes)?;
        if from.0 == 0 {
            return Err(INVALID_VALUE);
        }
        driver.tally.add("bytes to the device", bytes as u64);
        let is_pinned = driver.is_pinned(from.0, bytes);
        if is_pinned {
            driver.push(stream, Op::WritePinned { to, from, bytes })?;
        } else {
            driver.pageable(stream, "a copy from")?;
            driver.push(stream, Op::Write { to, bytes: from.copy_in(bytes).into() })?;
        }
        let full = driver.devices[device].staged > STAGING;
        Ok((wait && is_pinned || full).then(|| driver.all_of(stream)))
    })?;
    goal.map_or(Ok(()), run::until)
}

/// From the device. A copy to pageable memory is done when the call returns.
fn read(to: Host, from: u64, bytes: usize, stream: Handle, wait: bool) -> Done {
    if bytes == 0 {
        return in_context(|driver, device| driver.stream(stream, device).map(|_| ()));
    }
    let goal = in_context(|driver, device| {
        let stream = driver.stream(stream, device)?;
        driver.range(from, bytes)?;
        if to.0 == 0 {
            return Err(INVALID_VALUE);
        }
        driver.tally.add("bytes from the device", bytes as u64);
        let pinned = driver.is_pinned(to.0, bytes);
        if !pinned {
            driver.pageable(stream, "a copy to")?;
        }
        driver.push(stream, Op::Read { from, to, bytes, pinned })?;
        Ok((wait || !pinned).then(|| driver.all_of(stream)))
    })?;
    goal.map_or(Ok(()), run::until)
}

fn copy(to: u64, from: u64, bytes: usize, stream: Handle) -> Done {
    in_context(|driver, device| {
        let stream = driver.stream(stream, device)?;
        if bytes == 0 {
            return Ok(());
        }
        driver.range(to, bytes)?;
        driver.range(from, bytes)?;
        driver.tally.add("bytes copied on the device", bytes as u64);
        driver.push(stream, Op::Copy { to, from, bytes })
    })
}

fn fill(to: u64, pattern: [u8; 4], width: usize, n: usize, stream: Handle) -> Done {
    in_context(|driver, device| {
        let stream = driver.stream(stream, device)?;
        if n == 0 {
            return Ok(());
        }
        if !to.is_multiple_of(width as u64) {
            return Err(INVALID_VALUE);
        }
        driver.range(to, n.checked_mul(width).ok_or(INVALID_VALUE)?)?;
        driver.push(stream, Op::Fill { to, pattern, width, n })
    })
}

/// Calls without a stream may wait, and are none that a capture goes on beside.
fn synchronous(body: impl FnOnce() -> Done) -> Done {
    driver(Driver::unsafe_call)?;
    body()
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: Host, bytes: usize, stream: Handle) -> u32 {
    call("cuMemcpyHtoDAsync_v2", || write(to, from, bytes, stream, false))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(to: u64, from: Host, bytes: usize) -> u32 {
    call("cuMemcpyHtoD_v2", || synchronous(|| write(to, from, bytes, 0, true)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: Host, from: u64, bytes: usize, stream: Handle) -> u32 {
    call("cuMemcpyDtoHAsync_v2", || read(to, from, bytes, stream, false))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(to: Host, from: u64, bytes: usize) -> u32 {
    call("cuMemcpyDtoH_v2", || synchronous(|| read(to, from, bytes, 0, true)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> u32 {
    call("cuMemcpyDtoDAsync_v2", || copy(to, from, bytes, stream))
}

/// Does not wait: the host can't see the difference.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> u32 {
    call("cuMemcpyDtoD_v2", || synchronous(|| copy(to, from, bytes, 0)))
}

/// Between devices; addresses say which.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeerAsync(to: u64, _: Handle, from: u64, _: Handle, bytes: usize, stream: Handle) -> u32 {
    call("cuMemcpyPeerAsync", || copy(to, from, bytes, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: u64, value: u8, n: usize, stream: Handle) -> u32 {
    call("cuMemsetD8Async", || fill(to, [value; 4], 1, n, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(to: u64, value: u8, n: usize) -> u32 {
    call("cuMemsetD8_v2", || synchronous(|| fill(to, [value; 4], 1, n, 0)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD32Async(to: u64, value: u32, n: usize, stream: Handle) -> u32 {
    call("cuMemsetD32Async", || fill(to, value.to_le_bytes(), 4, n, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD32_v2(to: u64, value: u32, n: usize) -> u32 {
    call("cuMemsetD32_v2", || synchronous(|| fill(to, value.to_le_bytes(), 4, n, 0)))
}
