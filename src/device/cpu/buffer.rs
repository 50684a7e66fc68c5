//! Memory of the CPU device: zeroed buffers aligned to cache lines, and shared writing to disjoint parts of one. Knows
//! nothing of what is stored. Invariant: all memory is initialised, so that reading a slot never written gives a number.

use memmap2::MmapMut;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A cache line, and the widest vector, in bytes: buffers are aligned to it.
pub(super) const LINE: usize = 64;

/// Element types of which any bit pattern is a value.
///
/// # Safety
/// Every bit pattern of the type's size must be valid, and its alignment must divide 64.
pub(super) unsafe trait Plain: Copy {}
// SAFETY: any four bytes are an f32.
unsafe impl Plain for f32 {}
// SAFETY: any bytes are an integer.
unsafe impl Plain for u8 {}
// SAFETY: any bytes are an integer.
unsafe impl Plain for i8 {}
// SAFETY: any bytes are an integer.
unsafe impl Plain for u16 {}
// SAFETY: any bytes are an integer.
unsafe impl Plain for i32 {}

/// A buffer of `len` elements, its start aligned to 64 bytes.
pub(super) struct Aligned<T> {
    memory: Memory,
    /// Where the elements begin, bytes.
    start: usize,
    len: usize,
    element: PhantomData<T>,
}

/// Zeroed bytes. Neither kind costs anything until it is written, so that a large KV cache may be made for a small job.
enum Memory {
    Small(Vec<u8>),
    /// On huge pages where the system has them: weights and caches are read at random or once per step, and with pages of
    /// 4 KiB a reader waits for the page tables more than for the memory.
    Large(MmapMut),
}

/// From this size on, bytes, memory is asked for in huge pages.
const LARGE: usize = 4 << 20;

impl<T: Plain> Aligned<T> {
    /// A buffer of `len` zeros.
    ///
    /// # Panics
    /// If the system has no memory left to give.
    pub(super) fn zeroed(len: usize) -> Self {
        let n_bytes = len * size_of::<T>();
        if n_bytes < LARGE {
            let bytes = vec![0; n_bytes + LINE];
            let start = bytes.as_ptr().align_offset(LINE);
            return Self { memory: Memory::Small(bytes), start, len, element: PhantomData };
        }
        let map = MmapMut::map_anon(n_bytes).expect("the system gives memory");
        // An advice: where it is not taken, pages are small.
        #[cfg(target_os = "linux")]
        drop(map.advise(memmap2::Advice::HugePage));
        Self { memory: Memory::Large(map), start: 0, len, element: PhantomData }
    }

    /// Lets the pages, none of which was touched yet, go round some nodes of memory: an advice, and nothing for small buffers.
    pub(super) fn spread_over(&mut self, nodes: &[usize]) {
        if let Memory::Large(map) = &mut self.memory {
            spread(map, nodes);
        }
    }

    /// Makes room for at least `len` elements; what was stored may be lost.
    pub(super) fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len);
        }
    }

    /// The first element's address.
    fn as_mut_bytes(&mut self) -> *mut u8 {
        match &mut self.memory {
            Memory::Small(bytes) => bytes[self.start..].as_mut_ptr(),
            Memory::Large(map) => map.as_mut_ptr(),
        }
    }
}

impl<T: Plain> Default for Aligned<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Plain> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let start = match &self.memory {
            Memory::Small(bytes) => bytes[self.start..].as_ptr(),
            Memory::Large(map) => map.as_ptr(),
        };
        // SAFETY: from `start`, aligned (maps are to pages), the bytes hold `len` initialised elements, and `Plain` allows
        // any bytes.
        unsafe { std::slice::from_raw_parts(start.cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_bytes().cast(), self.len) }
    }
}

/// Lets the pages of a map go round nodes. Whether the system did.
#[cfg(target_os = "linux")]
fn spread(map: &mut MmapMut, nodes: &[usize]) -> bool {
    // From linux/mempolicy.h, which the crate does not have.
    const MPOL_INTERLEAVE: libc::c_long = 3;
    // As many as Linux can be built for.
    const MAX_NODES: usize = 1024;
    let mut mask = [0u64; MAX_NODES / 64];
    for &node in nodes.iter().filter(|&&node| node < MAX_NODES) {
        mask[node / 64] |= 1 << (node % 64);
    }
    if mask.iter().all(|&word| word == 0) {
        return false;
    }
    // SAFETY: the range is the map's, the mask has as many bits as is said; where pages lie changes nothing of what they hold.
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, map.as_mut_ptr(), map.len(), MPOL_INTERLEAVE, mask.as_ptr(), MAX_NODES, 0 as libc::c_long)
    };
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn spread(_: &mut MmapMut, _: &[usize]) -> bool {
    false
}

/// A slice that several workers write at once, each its own part.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is through `part` and `write`, whose callers promise that no two threads touch one element.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: it is a mutable borrow of T, which may be sent.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Borrows a slice for shared writing.
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// `len` elements from `start` on.
    ///
    /// # Safety
    /// While the result lives, nobody else may touch these elements.
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: in range (just asserted); exclusive (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// Where `len` elements from `start` on stand. Whoever writes there must be alone with them.
    pub(super) fn at(&self, start: usize, len: usize) -> *mut T {
        assert!(start <= self.len && len <= self.len - start, "elements {start}+{len} of {}", self.len);
        self.start.wrapping_add(start)
    }

    /// Writes one element.
    ///
    /// # Safety
    /// Nobody else may touch this element at the same time.
    pub(super) unsafe fn write(&self, i: usize, value: T) {
        assert!(i < self.len, "element {i} of {}", self.len);
        // SAFETY: in range (just asserted); exclusive (the caller's promise).
        unsafe { self.start.add(i).write(value) }
    }
}

/// Asks for memory that will be read soon.
#[inline(always)]
pub(super) fn prefetch<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(slice)).step_by(LINE) {
        let p = slice.as_ptr().wrapping_byte_add(line).cast();
        // SAFETY: every x86-64 machine has the instruction, and it reads nothing that the program sees.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p) };
    }
    #[cfg(target_arch = "aarch64")]
    for line in (0..size_of_val(slice)).step_by(LINE) {
        let p = slice.as_ptr().wrapping_byte_add(line);
        // SAFETY: every machine has the instruction, and it reads nothing that the program sees.
        unsafe { std::arch::asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags)) };
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = slice;
}

/// Asks for memory that will be read later, but for the nearest cache: what is needed before stays there.
#[inline(always)]
pub(super) fn prefetch_far<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(slice)).step_by(LINE) {
        let p = slice.as_ptr().wrapping_byte_add(line).cast();
        // SAFETY: as in `prefetch`.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As far as a machine of one node can tell: the system takes the call, and says so of the map.
    #[test]
    #[cfg(target_os = "linux")]
    fn pages_are_spread_where_the_system_lets_them() {
        let mut buffer = Aligned::<f32>::zeroed(LARGE / size_of::<f32>());
        let start = buffer.as_ptr() as usize;
        let Memory::Large(map) = &mut buffer.memory else { unreachable!("it is a large one") };
        assert!(!spread(map, &[]), "no nodes");
        if spread(map, &[0])
            // Some systems take the call and tell nothing.
            && let Ok(maps) = std::fs::read_to_string("/proc/self/numa_maps")
        {
            let line = maps.lines().find(|line| line.starts_with(&format!("{start:x} "))).unwrap();
            assert!(line.contains("interleave"), "{line}");
        }
        buffer.fill(1.0);
        assert!(buffer.iter().all(|x| x.to_bits() == 1.0f32.to_bits()));
    }
}
