//! The driver, devices and contexts.

use crate::c::{Host, Out};
use crate::call::call;
use crate::codes::{INVALID_CONTEXT, INVALID_VALUE, NO_DEVICE, UNKNOWN};
use crate::counters::write_down;
use crate::device::attribute;
use crate::driver::{Driver, Handle, begin, complain, context, current, driver, in_context, set_current};
use crate::knobs::Knobs;
use crate::run;
use crate::work::Goal;

unsafe extern "C" {
    safe fn atexit(function: extern "C" fn()) -> i32;
}

/// Reads the knobs; they count from here on.
#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: u32) -> u32 {
    let begun = begin(|| {
        let knobs = Knobs::read(|name| std::env::var(name).ok()).map_err(|words| {
            complain(words);
            UNKNOWN
        })?;
        if knobs.counters.is_some() || knobs.order.is_some() {
            atexit(write_down);
        }
        Ok(Driver::new(knobs))
    });
    if let Err(code) = begun {
        return code.0;
    }
    call("cuInit", || driver(|driver| if driver.devices.is_empty() { Err(NO_DEVICE) } else { Ok(()) }))
}

/// Needs no `cuInit`.
#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: Out<i32>) -> u32 {
    call("cuDriverGetVersion", || {
        let known = driver(|driver| Ok(driver.knobs.driver));
        let read = || Knobs::read(|name| std::env::var(name).ok()).map(|knobs| knobs.driver).map_err(|_| UNKNOWN);
        version.set(known.or_else(|_| read())? as i32)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: Out<i32>) -> u32 {
    call("cuDeviceGetCount", || driver(|driver| count.set(driver.devices.len() as i32)))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: Out<i32>, ordinal: i32) -> u32 {
    call("cuDeviceGet", || driver(|driver| device.set(driver.device(ordinal)? as i32)))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: Host, len: i32, device: i32) -> u32 {
    call("cuDeviceGetName", || {
        driver(|driver| {
            driver.device(device)?;
            let (major, minor) = driver.knobs.capability;
            let full = format!("stand-in (compute capability {major}.{minor})");
            let room = usize::try_from(len).ok().filter(|&len| len > 0 && name.0 != 0).ok_or(INVALID_VALUE)?;
            let mut bytes = full.into_bytes();
            bytes.truncate(room - 1);
            bytes.push(0);
            name.copy_out(&bytes);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: i32) -> u32 {
    call("cuDeviceGetUuid_v2", || {
        driver(|driver| {
            let mut bytes = *b"stand-in device\0";
            bytes[15] = driver.device(device)? as u8;
            uuid.set(bytes)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: i32) -> u32 {
    cuDeviceGetUuid_v2(uuid, device)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: Out<i32>, number: u32, device: i32) -> u32 {
    call("cuDeviceGetAttribute", || {
        driver(|driver| {
            let device = driver.device(device)?;
            value.set(attribute(&driver.knobs, number, device)?)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) -> u32 {
    call("cuDeviceTotalMem_v2", || {
        driver(|driver| {
            driver.device(device)?;
            bytes.set(driver.knobs.memory)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(handle: Out<Handle>, device: i32) -> u32 {
    call("cuDevicePrimaryCtxRetain", || {
        driver(|driver| {
            let device = driver.device(device)?;
            driver.healthy(device)?;
            driver.devices[device].retained += 1;
            handle.set(context(device))
        })
    })
}

/// With the last release the device's memory and all else of the context is gone.
#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> u32 {
    call("cuDevicePrimaryCtxRelease_v2", || {
        let device = driver(|driver| driver.device(device))?;
        let last = driver(|driver| {
            let retained = &mut driver.devices[device].retained;
            *retained = retained.checked_sub(1).ok_or(INVALID_CONTEXT)?;
            Ok(*retained == 0)
        })?;
        if last {
            // A context that failed has no work left.
            _ = run::until(Goal::Device(device));
            driver(|driver| driver.clear(device))?;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(handle: Handle) -> u32 {
    call("cuCtxSetCurrent", || {
        if handle != 0 {
            driver(|driver| driver.context_device(handle))?;
        }
        set_current(handle);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(handle: Out<Handle>) -> u32 {
    call("cuCtxGetCurrent", || driver(|_| handle.set(current())))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: Out<i32>) -> u32 {
    call("cuCtxGetDevice", || driver(|driver| device.set(driver.context_device(current())? as i32)))
}

/// How a thread waits makes no difference here.
#[unsafe(no_mangle)]
extern "C" fn cuCtxSetFlags(_flags: u32) -> u32 {
    call("cuCtxSetFlags", || in_context(|_, _| Ok(())))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) -> u32 {
    call("cuCtxGetStreamPriorityRange", || {
        in_context(|_, _| {
            least.set(0)?;
            greatest.set(-5)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> u32 {
    call("cuCtxSynchronize", || {
        let device = in_context(|driver, device| {
            driver.unsafe_call()?;
            driver.no_capture(device)?;
            Ok(device)
        })?;
        run::until(Goal::Device(device))
    })
}
