//! Memory of the CPU device: zeroed buffers aligned to cache lines, and shared writing to disjoint parts of one. Knows
//! nothing of what is stored. Invariant: all memory is initialised, so that reading a slot never written gives a number.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A cache line, and the widest vector, in bytes.
const ALIGNMENT: usize = 64;

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
    /// With room to begin at an aligned address. Zeroed memory of this kind costs nothing until it is written, so that a
    /// large KV cache may be made for a small job.
    bytes: Vec<u8>,
    /// Where the elements begin.
    start: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Aligned<T> {
    /// A buffer of `len` zeros.
    pub(super) fn zeroed(len: usize) -> Self {
        let bytes = vec![0; len * size_of::<T>() + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start, len, element: PhantomData }
    }

    /// Makes room for at least `len` elements; what was stored may be lost.
    pub(super) fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len);
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
        // SAFETY: from `start`, aligned, the bytes hold `len` initialised elements, and `Plain` allows any bytes.
        unsafe { std::slice::from_raw_parts(self.bytes[self.start..].as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.bytes[self.start..].as_mut_ptr().cast(), self.len) }
    }
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
