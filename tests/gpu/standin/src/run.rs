//! Executes queued work, one operation at a time, on the thread of a call that waits for it.

use crate::c::Host;
use crate::codes::{
    Code, Done, ILLEGAL_ADDRESS, ILLEGAL_INSTRUCTION, LAUNCH_FAILED, LAUNCH_TIMEOUT, MISALIGNED_ADDRESS, UNKNOWN,
};
use crate::driver::{complain, driver, lock};
use crate::work::{Goal, Launch, Native, Next, Op};
use ptx::FaultKind;
use std::cell::Cell;
use std::sync::Mutex;
use std::time::Instant;

/// One thread executes at a time: what others wait for is done when they get here, or still to do.
static RUNNING: Mutex<()> = Mutex::new(());

thread_local! {
    /// In a host function, where no call is permitted, and the device whose work it is.
    static INSIDE: Cell<Option<usize>> = const { Cell::new(None) };
}

pub(crate) fn inside() -> Option<usize> {
    INSIDE.get()
}

/// Executes until the goal is reached, or fails with what failed.
pub(crate) fn until(goal: Goal) -> Done {
    let _one = lock(&RUNNING);
    loop {
        let (device, stream, op) = match driver(|driver| driver.next(goal))? {
            Next::Nothing => return Ok(()),
            Next::Run { device, stream, op } => (device, stream, op),
        };
        let result = execute(device, &op);
        driver(|driver| {
            match result {
                Ok(()) => driver.finish(stream),
                Err(code) => driver.fail(device, code),
            }
            Ok(())
        })?;
        if matches!(goal, Goal::Any(_)) {
            return result;
        }
    }
}

fn execute(device: usize, op: &Op) -> Done {
    let slow = driver(|driver| Ok(driver.knobs.slow))?;
    if !slow.is_zero() {
        std::thread::sleep(slow);
    }
    match op {
        Op::Write { to, bytes } => write(*to, bytes),
        Op::WritePinned { to, from, bytes } => {
            let data = pinned(*from, *bytes, || from.copy_in(*bytes))?;
            write(*to, &data)
        }
        Op::Read { from, to, bytes, pinned: is_pinned } => {
            let data = read(*from, *bytes)?;
            if *is_pinned {
                pinned(*to, *bytes, || to.copy_out(&data))
            } else {
                to.copy_out(&data);
                Ok(())
            }
        }
        Op::Copy { to, from, bytes } => {
            let data = read(*from, *bytes)?;
            write(*to, &data)
        }
        Op::Fill { to, pattern, width, n } => write(*to, &pattern[..*width].repeat(*n)),
        Op::Free { address } => driver(|driver| driver.free(*address)),
        Op::Launch(launch) => run_kernel(device, launch),
        Op::Host { call, data } => {
            INSIDE.set(Some(device));
            call(*data as *mut std::ffi::c_void);
            INSIDE.set(None);
            Ok(())
        }
        Op::Native(native) => run_native(device, native),
        Op::Record { event } => driver(|driver| {
            if let Some(event) = driver.events.get_mut(event) {
                event.at = Some(Instant::now());
            }
            Ok(())
        }),
        Op::Wait { .. } => Ok(()),
        Op::Graph(graph) => graph.ops.iter().try_for_each(|op| {
            if matches!(op, Op::Launch(_) | Op::Native(_)) {
                driver(|driver| {
                    driver.tally.add("launch in a graph", 1);
                    Ok(())
                })?;
            }
            execute(device, op)
        }),
    }
}

fn run_kernel(device: usize, launch: &Launch) -> Done {
    let gpu = driver(|driver| {
        driver.count("launch")?;
        Ok(driver.devices[device].gpu.clone())
    })
    .inspect_err(|code| complain(format_args!("{} fails with {} as it was told to", launch.kernel, code.0)))?;
    let result = lock(&gpu).launch(&launch.module, &launch.kernel, launch.grid, launch.block, launch.dynamic, &launch.args);
    match result {
        Ok(counters) => driver(|driver| {
            driver.tally.launched(&launch.kernel, &counters);
            Ok(())
        }),
        Err(fault) => {
            let code = code_of(fault.kind);
            complain(format_args!("error {} of a launch: {fault}", code.0));
            Err(code)
        }
    }
}

/// What a device would say of a fault, as far as it would notice.
fn code_of(kind: FaultKind) -> Code {
    match kind {
        FaultKind::Bounds => ILLEGAL_ADDRESS,
        FaultKind::Misaligned => MISALIGNED_ADDRESS,
        FaultKind::Endless => LAUNCH_TIMEOUT,
        FaultKind::Unsupported => ILLEGAL_INSTRUCTION,
        _ => LAUNCH_FAILED,
    }
}

fn run_native(device: usize, native: &Native) -> Done {
    driver(|driver| driver.count("launch"))
        .inspect_err(|code| complain(format_args!("{} fails with {} as it was told to", native.name, code.0)))?;
    INSIDE.set(Some(device));
    let code = (native.call)(native.data as *const std::ffi::c_void);
    INSIDE.set(None);
    if code != 0 {
        complain(format_args!("error {code} of {}", native.name));
        return Err(Code(code));
    }
    driver(|driver| {
        driver.tally.worked(&native.name, native.operations);
        Ok(())
    })
}

/// Bytes of a device's memory.
pub(crate) fn read(from: u64, bytes: usize) -> Done<Vec<u8>> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let gpu = gpu_at(from, bytes)?;
    let found = lock(&gpu).read(from, bytes);
    found.map_err(|fault| {
        complain(format_args!("a copy: {fault}"));
        ILLEGAL_ADDRESS
    })
}

pub(crate) fn write(to: u64, bytes: &[u8]) -> Done {
    if bytes.is_empty() {
        return Ok(());
    }
    let gpu = gpu_at(to, bytes.len())?;
    let done = lock(&gpu).write(to, bytes);
    done.map_err(|fault| {
        complain(format_args!("a copy: {fault}"));
        ILLEGAL_ADDRESS
    })
}

/// Whose memory this is. It may have been freed since the copy was queued.
fn gpu_at(address: u64, bytes: usize) -> Done<std::sync::Arc<Mutex<ptx::Gpu>>> {
    driver(|driver| {
        let Ok(device) = driver.range(address, bytes) else {
            complain(format_args!("a copy of {bytes} bytes at {address:#x}, where nothing is allocated"));
            return Err(ILLEGAL_ADDRESS);
        };
        Ok(driver.devices[device].gpu.clone())
    })
}

/// Touches pinned memory, which must still be there, and can't be freed meanwhile.
fn pinned<T>(at: Host, bytes: usize, touch: impl FnOnce() -> T) -> Done<T> {
    driver(|driver| {
        if !driver.is_pinned(at.0, bytes) {
            complain(format_args!("a copy to or from pinned memory that was freed before the copy was done"));
            return Err(UNKNOWN);
        }
        Ok(touch())
    })
}
