//! Launches, and how many blocks a multiprocessor would hold.

use crate::c::{Host, Out};
use crate::call::call;
use crate::codes::{Done, INVALID_HANDLE, INVALID_VALUE, LAUNCH_OUT_OF_RESOURCES, NOT_SUPPORTED};
use crate::device::{REGISTERS, SHARED_RESERVED, limits};
use crate::driver::{Driver, Function, Handle, complain, in_context};
use crate::work::{Launch, Op};
use std::sync::Arc;

/// Checks a launch as the driver does before it is queued.
fn check(driver: &Driver, function: &Function, launch: &Launch) -> Done {
    let (grid, block) = (launch.grid, launch.block);
    let threads = u64::from(block.0) * u64::from(block.1) * u64::from(block.2);
    let blocks = u64::from(grid.0) * u64::from(grid.1) * u64::from(grid.2);
    if blocks == 0 || grid.0 > i32::MAX as u32 || grid.1 > 65535 || grid.2 > 65535 {
        complain(format_args!("{}: a grid of {grid:?}", launch.kernel));
        return Err(INVALID_VALUE);
    }
    if threads == 0 || threads > 1024 || block.2 > 64 {
        complain(format_args!("{}: blocks of {block:?}", launch.kernel));
        return Err(INVALID_VALUE);
    }
    if function.shape.max_threads.is_some_and(|most| threads > u64::from(most)) {
        complain(format_args!("{}: {threads} threads of a block, more than it is compiled for", launch.kernel));
        return Err(INVALID_VALUE);
    }
    if launch.dynamic > function.most_dynamic {
        complain(format_args!(
            "{}: {} bytes of dynamic shared memory, of {} that it may have",
            launch.kernel, launch.dynamic, function.most_dynamic
        ));
        return Err(INVALID_VALUE);
    }
    if launch.dynamic + function.shape.static_shared > limits(driver.knobs.capability).shared_block {
        return Err(LAUNCH_OUT_OF_RESOURCES);
    }
    Ok(())
}

/// Values of the arguments, by an array of pointers to them.
fn arguments(function: &Function, pointers: Host) -> Done<Vec<ptx::Arg>> {
    let parameters = &function.shape.parameters;
    if pointers.0 == 0 && !parameters.is_empty() {
        return Err(INVALID_VALUE);
    }
    Ok((0..).zip(parameters).map(|(i, &(_, size))| ptx::Arg::Bytes(pointers.nth(i).copy_in(size))).collect())
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    dynamic: u32,
    stream: Handle,
    parameters: Host,
    extra: Host,
) -> u32 {
    call("cuLaunchKernel", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            let function = driver.functions.get(&function).ok_or(INVALID_HANDLE)?;
            if extra.0 != 0 {
                complain("arguments in one buffer are not there");
                return Err(NOT_SUPPORTED);
            }
            let launch = Launch {
                module: function.module.clone(),
                kernel: function.name.clone(),
                grid: (grid_x, grid_y, grid_z),
                block: (block_x, block_y, block_z),
                dynamic: dynamic as usize,
                args: arguments(function, parameters)?,
            };
            check(driver, function, &launch)?;
            driver.push(stream, Op::Launch(Arc::new(launch)))
        })
    })
}

/// Blocks of so many threads that a multiprocessor holds, by threads, shared memory and (as if a kernel had 64) registers.
fn active_blocks(driver: &Driver, function: Handle, threads: i32, dynamic: usize) -> Done<u32> {
    let function = driver.functions.get(&function).ok_or(INVALID_HANDLE)?;
    let threads = u32::try_from(threads).ok().filter(|n| (1..=1024).contains(n)).ok_or(INVALID_VALUE)?.next_multiple_of(32);
    let limits = limits(driver.knobs.capability);
    let shared = function.shape.static_shared + dynamic + SHARED_RESERVED;
    let by_shared = (limits.shared_multiprocessor / shared) as u32;
    let by_registers = 65536 / (REGISTERS * threads);
    Ok(limits.blocks.min(limits.threads / threads).min(by_shared).min(by_registers))
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(n: Out<i32>, function: Handle, threads: i32, dynamic: usize) -> u32 {
    call("cuOccupancyMaxActiveBlocksPerMultiprocessor", || {
        in_context(|driver, _| n.set(active_blocks(driver, function, threads, dynamic)?.cast_signed()))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    n: Out<i32>,
    function: Handle,
    threads: i32,
    dynamic: usize,
    _flags: u32,
) -> u32 {
    cuOccupancyMaxActiveBlocksPerMultiprocessor(n, function, threads, dynamic)
}
