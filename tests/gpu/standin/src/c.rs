//! What C callers pass: places to write to, strings, memory of the host.

use crate::codes::{Done, INVALID_VALUE};
use std::ffi::{CStr, c_char, c_void};

/// Where a result goes. Only callers of the C interface make one.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub(crate) fn set(self, value: T) -> Done {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the interface asks of its callers that this is null or a place for a `T`.
        unsafe { self.0.write(value) };
        Ok(())
    }
}

/// A string that ends with a zero byte, or null.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Text(*const c_char);

impl Text {
    pub(crate) fn get(self) -> Done<&'static CStr> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the interface asks of its callers that this is null or such a string; what is borrowed is not kept
        // beyond the call.
        Ok(unsafe { CStr::from_ptr(self.0) })
    }
}

/// Memory of the host, by address: queued work must be able to go to another thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Host(pub(crate) usize);

impl Host {
    pub(crate) fn copy_out(self, bytes: &[u8]) {
        // SAFETY: the caller of the copy gave as many bytes to write to; pinned memory, which is written later, is looked
        // up again right before.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0 as *mut u8, bytes.len()) };
    }

    pub(crate) fn copy_in(self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: as in `copy_out`, for reading.
        unsafe { std::ptr::copy_nonoverlapping(self.0 as *const u8, bytes.as_mut_ptr(), len) };
        bytes
    }

    /// A pointer from an array of pointers.
    pub(crate) fn nth(self, i: usize) -> Self {
        // SAFETY: the interface asks for an array with a pointer for each parameter.
        Self(unsafe { *(self.0 as *const usize).add(i) })
    }
}

/// `CUhostFn`.
pub(crate) type HostFunction = extern "C" fn(*mut c_void);
