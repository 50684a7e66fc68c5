//! Names of errors, and the version.

use crate::c::Out;
use crate::codes::{INVALID_VALUE, words};
use std::ffi::c_char;

/// `CUDA_ERROR_...`.
#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(error: u32, name: Out<*const c_char>) -> u32 {
    answer(name, words(error).map(|w| w.0))
}

/// A description.
#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(error: u32, text: Out<*const c_char>) -> u32 {
    answer(text, words(error).map(|w| w.1))
}

fn answer(out: Out<*const c_char>, text: Option<&'static std::ffi::CStr>) -> u32 {
    let pointer = text.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
    match (out.set(pointer), text) {
        (Ok(()), Some(_)) => 0,
        _ => INVALID_VALUE.0,
    }
}
