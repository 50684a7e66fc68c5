//! Errors of the driver, by their numbers.

use std::ffi::CStr;

/// A driver's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) u32);

pub(crate) type Done<T = ()> = Result<T, Code>;

macro_rules! codes {
    (
        { $($name:ident = $number:literal, $words:literal;)* }
        named { $($other:ident = $other_number:literal, $other_words:literal;)* }
    ) => {
        $(pub(crate) const $name: Code = Code($number);)*

        /// The name and a description of an error.
        pub(crate) fn words(code: u32) -> Option<(&'static CStr, &'static CStr)> {
            let bytes: (&str, &str) = match code {
                0 => ("CUDA_SUCCESS\0", "no error\0"),
                $($number => (concat!("CUDA_ERROR_", stringify!($name), "\0"), concat!($words, "\0")),)*
                $($other_number => (concat!("CUDA_ERROR_", stringify!($other), "\0"), concat!($other_words, "\0")),)*
                _ => return None,
            };
            Some((CStr::from_bytes_with_nul(bytes.0.as_bytes()).ok()?, CStr::from_bytes_with_nul(bytes.1.as_bytes()).ok()?))
        }
    };
}

codes!({
    INVALID_VALUE = 1, "invalid argument";
    OUT_OF_MEMORY = 2, "out of memory";
    NOT_INITIALIZED = 3, "initialization error";
    NO_DEVICE = 100, "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "invalid device ordinal";
    INVALID_CONTEXT = 201, "invalid device context";
    NO_BINARY_FOR_GPU = 209, "no kernel image is available for execution on the device";
    INVALID_PTX = 218, "a PTX JIT compilation failed";
    UNSUPPORTED_PTX_VERSION = 222, "the provided PTX was compiled with an unsupported toolchain";
    FILE_NOT_FOUND = 301, "file not found";
    INVALID_HANDLE = 400, "invalid resource handle";
    NOT_FOUND = 500, "named symbol not found";
    NOT_READY = 600, "device not ready";
    ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered";
    LAUNCH_OUT_OF_RESOURCES = 701, "too many resources requested for launch";
    LAUNCH_TIMEOUT = 702, "the launch timed out and was terminated";
    ILLEGAL_INSTRUCTION = 715, "an illegal instruction was encountered";
    MISALIGNED_ADDRESS = 716, "misaligned address";
    LAUNCH_FAILED = 719, "unspecified launch failure";
    NOT_PERMITTED = 800, "operation not permitted";
    NOT_SUPPORTED = 801, "operation not supported";
    STREAM_CAPTURE_UNSUPPORTED = 900, "operation not permitted when stream is capturing";
    STREAM_CAPTURE_INVALIDATED = 901, "operation failed due to a previous error during capture";
    STREAM_CAPTURE_UNMATCHED = 903, "capture was not ended in the same stream as it began";
    STREAM_CAPTURE_ISOLATION = 905, "dependency created on uncaptured work in another stream";
    STREAM_CAPTURE_IMPLICIT = 906, "operation would make the legacy stream depend on a capturing blocking stream";
    STREAM_CAPTURE_WRONG_THREAD = 908, "attempt to terminate a thread-local capture sequence from another thread";
    UNKNOWN = 999, "unknown error";
} named {
    // Only `STANDIN_FAIL` makes these.
    ASSERT = 710, "device-side assert triggered";
    SYSTEM_NOT_READY = 802, "system not yet initialized";
    SYSTEM_DRIVER_MISMATCH = 803, "system has unsupported display driver / cuda driver combination";
    ECC_UNCORRECTABLE = 214, "uncorrectable ECC error encountered";
    STREAM_CAPTURE_MERGE = 902, "operation would result in a merge of separate capture sequences";
    STREAM_CAPTURE_UNJOINED = 904, "capturing stream has unjoined work";
});
