//! What the driver has for other stand-in libraries: work that they do themselves, in a stream's order. Not NVIDIA's.

use crate::c::{Host, Text};
use crate::call::call;
use crate::codes::{Code, Done, NOT_PERMITTED};
use crate::driver::{Handle, driver, in_context};
use crate::run;
use crate::work::{Native, Op};
use std::ffi::c_void;
use std::sync::Arc;

/// Queues a call with `data`, which is released once, when nothing needs it any more, be it that it can't be queued.
#[unsafe(no_mangle)]
extern "C" fn standin_queue(
    stream: Handle,
    name: Text,
    operations: u64,
    function: extern "C" fn(*const c_void) -> u32,
    release: extern "C" fn(*const c_void),
    data: Host,
) -> u32 {
    let native = |name: String| Native { name, call: function, release, data: data.0, operations };
    let name = name.get().map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned());
    let op = Op::Native(Arc::new(native(name)));
    call("standin_queue", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            driver.push(stream, op)
        })
    })
}

/// Copies from the device's memory, for work that runs.
#[unsafe(no_mangle)]
extern "C" fn standin_read(from: u64, to: Host, bytes: usize) -> u32 {
    inside(|| {
        to.copy_out(&run::read(from, bytes)?);
        driver(|driver| {
            driver.tally.moved(bytes as u64, 0);
            Ok(())
        })
    })
}

/// Copies to the device's memory.
#[unsafe(no_mangle)]
extern "C" fn standin_write(to: u64, from: Host, bytes: usize) -> u32 {
    inside(|| {
        run::write(to, &from.copy_in(bytes))?;
        driver(|driver| {
            driver.tally.moved(0, bytes as u64);
            Ok(())
        })
    })
}

fn inside(body: impl FnOnce() -> Done) -> u32 {
    if run::inside().is_none() {
        return NOT_PERMITTED.0;
    }
    body().err().map_or(0, |Code(code)| code)
}

/// 10 x major + minor; 0 without a driver.
#[unsafe(no_mangle)]
extern "C" fn standin_capability() -> u32 {
    driver(|driver| Ok(driver.knobs.capability.0 * 10 + driver.knobs.capability.1)).unwrap_or(0)
}
