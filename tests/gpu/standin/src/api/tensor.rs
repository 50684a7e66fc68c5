//! Descriptions of tensors, of whose boxes kernels make copies.

use crate::c::{Host, Out};
use crate::call::call;
use crate::codes::{Done, INVALID_VALUE, NOT_SUPPORTED};
use crate::driver::complain;

/// The one form that kernels here use: bfloat16, 128-byte swizzle.
const BFLOAT16: u32 = 9;
const SWIZZLE_128B: u32 = 3;

/// Numbers of an array of the caller's.
fn numbers<const N: usize>(array: Host, bytes: usize) -> Done<[u64; N]> {
    if array.0 == 0 {
        return Err(INVALID_VALUE);
    }
    let read = array.copy_in(N * bytes);
    Ok(std::array::from_fn(|i| read[i * bytes..][..bytes].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))))
}

#[unsafe(no_mangle)]
extern "C" fn cuTensorMapEncodeTiled(
    map: Out<[u8; 128]>,
    kind: u32,
    rank: u32,
    address: u64,
    sizes: Host,
    strides: Host,
    of_box: Host,
    steps: Host,
    interleave: u32,
    swizzle: u32,
    _promotion: u32,
    fill: u32,
) -> u32 {
    call("cuTensorMapEncodeTiled", || {
        if (kind, rank, interleave, swizzle, fill) != (BFLOAT16, 2, 0, SWIZZLE_128B, 0) {
            complain("only tensors of two dimensions of bfloat16, with boxes in 128-byte swizzle, can be described");
            return Err(NOT_SUPPORTED);
        }
        let [columns, rows] = numbers(sizes, 8)?;
        let [stride] = numbers(strides, 8)?;
        let [box_columns, box_rows] = numbers(of_box, 4)?;
        if numbers(steps, 4)? != [1, 1] {
            return Err(NOT_SUPPORTED);
        }
        let described = ptx::TensorMap { address, columns, rows, stride, box_columns, box_rows };
        map.set(described.encode().ok_or(INVALID_VALUE)?)
    })
}
