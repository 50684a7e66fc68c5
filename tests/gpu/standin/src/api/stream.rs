//! Streams.

use crate::c::{Host, HostFunction, Out};
use crate::call::call;
use crate::codes::{INVALID_HANDLE, INVALID_VALUE, NOT_READY};
use crate::driver::{Handle, Stream, driver, in_context};
use crate::run;
use crate::work::{Goal, Op};

const NON_BLOCKING: u32 = 1;

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: Out<Handle>, flags: u32) -> u32 {
    call("cuStreamCreate", || {
        in_context(|driver, device| {
            if flags & !NON_BLOCKING != 0 {
                return Err(INVALID_VALUE);
            }
            let handle = driver.new_handle();
            driver.streams.insert(handle, Stream { device, blocking: flags & NON_BLOCKING == 0, ..Stream::default() });
            stream.set(handle)
        })
    })
}

/// All have the same priority.
#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, _priority: i32) -> u32 {
    cuStreamCreate(stream, flags)
}

/// What is queued is still done.
#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> u32 {
    call("cuStreamDestroy_v2", || {
        driver(|driver| {
            let state = driver.streams.get_mut(&stream).filter(|s| !s.destroyed).ok_or(INVALID_HANDLE)?;
            if state.ops.is_empty() {
                driver.streams.remove(&stream);
            } else {
                state.destroyed = true;
            }
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> u32 {
    call("cuStreamSynchronize", || {
        let goal = in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            driver.not_captured(stream, "nobody can wait for what is only captured")?;
            driver.unsafe_call()?;
            Ok(driver.all_of(stream))
        })?;
        run::until(goal)
    })
}

/// Asking does one operation, so that asking again and again comes to an end.
#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Handle) -> u32 {
    call("cuStreamQuery", || {
        let (device, goal) = in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            driver.not_captured(stream, "nobody can ask for what is only captured")?;
            driver.unsafe_call()?;
            Ok((device, driver.all_of(stream)))
        })?;
        ready(device, goal)
    })
}

/// Fails if the goal is not reached, and does one operation towards it.
pub(crate) fn ready(device: usize, goal: Goal) -> crate::codes::Done {
    let Goal::Stream(stream, done) = goal else { return Ok(()) };
    let there = |driver: &mut crate::driver::Driver| Ok(driver.streams.get(&stream).is_none_or(|s| s.done >= done));
    if driver(there)? {
        return Ok(());
    }
    run::until(Goal::Any(device))?;
    Err(NOT_READY)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) -> u32 {
    call("cuStreamWaitEvent", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            driver.wait_event(stream, event)
        })
    })
}

/// A function of the host, in the stream's order. It may call nothing of the driver.
#[unsafe(no_mangle)]
extern "C" fn cuLaunchHostFunc(stream: Handle, function: Option<HostFunction>, data: Host) -> u32 {
    call("cuLaunchHostFunc", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            let call = function.ok_or(INVALID_VALUE)?;
            driver.push(stream, Op::Host { call, data: data.0 })
        })
    })
}
