//! What the stand-in `libcuda.so` has for this library alone.

use crate::attributes::{Done, NOT_INITIALIZED};
use libloading::os::unix::Library;
use std::ffi::{CString, c_char, c_void};
use std::sync::OnceLock;

type Queue =
    extern "C" fn(usize, *const c_char, u64, extern "C" fn(*const c_void) -> u32, extern "C" fn(*const c_void), usize) -> u32;
type Read = extern "C" fn(u64, *mut u8, usize) -> u32;
type Write = extern "C" fn(u64, *const u8, usize) -> u32;
type Capability = extern "C" fn() -> u32;

pub(crate) struct Driver {
    queue: Queue,
    read: Read,
    write: Write,
    capability: Capability,
    _library: Library,
}

/// The library that the process has loaded. Fails on a real driver.
pub(crate) fn driver() -> Done<&'static Driver> {
    static FOUND: OnceLock<Option<Driver>> = OnceLock::new();
    FOUND.get_or_init(|| ["libcuda.so", "libcuda.so.1"].into_iter().find_map(open)).as_ref().ok_or(NOT_INITIALIZED)
}

fn open(name: &str) -> Option<Driver> {
    // SAFETY: the stand-in's initialisers do nothing, and the symbols, which no other library has, are of these types.
    unsafe {
        let library = Library::new(name).ok()?;
        Some(Driver {
            queue: *library.get::<Queue>(b"standin_queue").ok()?,
            read: *library.get::<Read>(b"standin_read").ok()?,
            write: *library.get::<Write>(b"standin_write").ok()?,
            capability: *library.get::<Capability>(b"standin_capability").ok()?,
            _library: library,
        })
    }
}

/// Work that a stream does in its turn.
pub(crate) trait Work: Send + Sync + Sized + 'static {
    /// Returns the driver's error, or 0.
    fn run(&self, driver: &Driver) -> u32;
}

extern "C" fn run<W: Work>(data: *const c_void) -> u32 {
    // SAFETY: `Driver::queue` made this pointer of a box of that type, and it is not released yet.
    let work = unsafe { &*data.cast::<W>() };
    driver().map_or(999, |driver| work.run(driver))
}

extern "C" fn release<W: Work>(data: *const c_void) {
    // SAFETY: as in `run`; the driver calls this once, at the end.
    drop(unsafe { Box::from_raw(data.cast_mut().cast::<W>()) });
}

impl Driver {
    /// Queues work. `operations`: its multiplications and additions.
    pub(crate) fn queue<W: Work>(&self, stream: usize, name: &str, operations: u64, work: W) -> u32 {
        let Ok(name) = CString::new(name) else { return 1 };
        (self.queue)(stream, name.as_ptr(), operations, run::<W>, release::<W>, Box::into_raw(Box::new(work)) as usize)
    }

    /// Bytes of the device's memory, for work that runs.
    pub(crate) fn read(&self, from: u64, bytes: usize) -> Result<Vec<u8>, u32> {
        let mut found = vec![0; bytes];
        match (self.read)(from, found.as_mut_ptr(), bytes) {
            0 => Ok(found),
            code => Err(code),
        }
    }

    pub(crate) fn write(&self, to: u64, bytes: &[u8]) -> Result<(), u32> {
        match (self.write)(to, bytes.as_ptr(), bytes.len()) {
            0 => Ok(()),
            code => Err(code),
        }
    }

    /// 10 x major + minor.
    pub(crate) fn capability(&self) -> u32 {
        (self.capability)()
    }
}
