//! The devices that there can be: what the driver says of each.

use crate::codes::{Done, INVALID_VALUE};
use crate::driver::complain;
use crate::knobs::Knobs;

/// Limits of a compute capability; bytes.
pub(crate) struct Limits {
    pub(crate) multiprocessors: u32,
    /// Shared memory of a block that asks for more than 48 KiB, and of a multiprocessor.
    pub(crate) shared_block: usize,
    pub(crate) shared_multiprocessor: usize,
    pub(crate) threads: u32,
    pub(crate) blocks: u32,
    l2: u32,
}

/// Shared memory of a block without asking.
pub(crate) const SHARED_DEFAULT: usize = 48 << 10;
/// What the system takes of a block's shared memory.
pub(crate) const SHARED_RESERVED: usize = 1 << 10;
/// A kernel's registers: PTX doesn't say.
pub(crate) const REGISTERS: u32 = 64;

/// From the table of technical specifications in the CUDA programming guide; multiprocessors and L2 of a product of each.
pub(crate) fn limits(capability: (u32, u32)) -> Limits {
    let (multiprocessors, block, multiprocessor, threads, blocks, l2) = match capability {
        (7, _) => (40, 64, 64, 1024, 16, 4),
        (8, 0) => (108, 163, 164, 2048, 32, 40),
        (8, 6) => (84, 99, 100, 1536, 16, 6),
        (8, _) => (128, 99, 100, 1536, 24, 72),
        (9, _) => (132, 227, 228, 2048, 32, 50),
        (10, _) => (148, 227, 228, 2048, 32, 126),
        _ => (170, 99, 100, 1536, 24, 96),
    };
    Limits {
        multiprocessors,
        shared_block: block << 10,
        shared_multiprocessor: multiprocessor << 10,
        threads,
        blocks,
        l2: l2 << 20,
    }
}

/// `CUdevice_attribute` by number.
pub(crate) fn attribute(knobs: &Knobs, number: u32, device: usize) -> Done<i32> {
    let limits = limits(knobs.capability);
    let shared = |bytes: usize| bytes as u32;
    let value: u32 = match number {
        1..=3 => 1024,
        4 => 64,
        5 => i32::MAX as u32,
        6 | 7 => 65535,
        8 => shared(SHARED_DEFAULT),
        10 => 32,
        // Constant memory; registers of a block, and of a multiprocessor.
        9 | 12 | 82 => 65536,
        13 => 1_500_000,
        16 => knobs.multiprocessors.unwrap_or(limits.multiprocessors),
        // A kernel's time is not limited; the device is not part of the processor; anyone may use it. Cooperative launches are
        // not there, nor is memory that the host and the device share.
        17 | 18 | 20 | 32 | 34 | 35 | 50 | 83 | 84 | 88 | 89 | 95 => 0,
        // Work of several kinds at a time, pinned memory, one space of addresses, priorities, caches, pools.
        15 | 19 | 31 | 41 | 78 | 79 | 80 | 115 => 1,
        33 => device as u32 + 1,
        36 => 1_200_000,
        37 => 5120,
        38 => limits.l2,
        39 => limits.threads,
        40 => 2,
        75 => knobs.capability.0,
        76 => knobs.capability.1,
        81 => shared(limits.shared_multiprocessor),
        97 => shared(limits.shared_block),
        106 => limits.blocks,
        108 => limits.l2 / 2,
        111 => shared(SHARED_RESERVED),
        _ => {
            complain(format_args!("attribute {number} of a device is not known"));
            return Err(INVALID_VALUE);
        }
    };
    i32::try_from(value).map_err(|_| INVALID_VALUE)
}
