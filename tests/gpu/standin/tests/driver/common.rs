//! A process with the stand-in, and short words for cudarc's calls.

use cudarc::driver::result::{self, DriverError, stream::StreamKind};
use cudarc::driver::sys::{self, CUfunction, CUmodule, CUstream};
use std::cell::Cell;
use std::ffi::{CString, c_void};
use std::process::Command;

thread_local! {
    /// Calls of `alone` in this test so far.
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

/// Runs a body in a process of its own, with these knobs: that process runs the same test, and of it only this call's body.
/// Returns what it said on stderr; in that process itself, `None`.
pub(crate) fn alone(knobs: &[(&str, &str)], body: impl FnOnce()) -> Option<String> {
    let call = CALLS.get().to_string();
    CALLS.set(CALLS.get() + 1);
    if let Ok(wanted) = std::env::var("STANDIN_TEST") {
        if wanted == call {
            body();
        }
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    standin::install(folder.path()).unwrap();
    standin_blas::install(folder.path()).unwrap();
    let name = std::thread::current().name().unwrap().to_owned();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &name, "--nocapture", "--test-threads=1"]);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("STANDIN_")) {
        command.env_remove(name);
    }
    command.env("LD_LIBRARY_PATH", folder.path()).env("STANDIN_TEST", call).envs(knobs.iter().copied());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{:?}\n{told}\n{said}", output.status);
    assert!(told.contains("1 passed"), "no such test as {name}:\n{told}");
    Some(said)
}

/// The number of the error that a call must end with.
pub(crate) fn code<T>(result: Result<T, DriverError>) -> u32 {
    result.err().map_or(0, |error| error.0 as u32)
}

/// A context on the first device, and a stream.
pub(crate) struct Gpu {
    pub(crate) stream: CUstream,
    pub(crate) device: i32,
}

/// The kernels of this file's text, loaded.
#[derive(Clone, Copy)]
pub(crate) struct Kernels(pub(crate) CUmodule);

impl Gpu {
    pub(crate) fn new() -> Self {
        Self::of(0)
    }

    pub(crate) fn of(ordinal: i32) -> Self {
        result::init().unwrap();
        let device = result::device::get(ordinal).unwrap();
        // SAFETY: the context that is retained here is never released.
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()).unwrap() };
        Self { stream: result::stream::create(StreamKind::NonBlocking).unwrap(), device }
    }

    pub(crate) fn attribute(&self, which: sys::CUdevice_attribute) -> i32 {
        // SAFETY: the device is one.
        unsafe { result::device::get_attribute(self.device, which) }.unwrap()
    }

    pub(crate) fn sync(&self) -> Result<(), DriverError> {
        sync(self.stream)
    }

    pub(crate) fn write<T>(&self, to: u64, data: &[T]) -> Result<(), DriverError> {
        // SAFETY: tests give room for the data, or want to see an error; pageable data is read at once, and pinned data
        // lives on.
        unsafe { result::memcpy_htod_async(to, data, self.stream) }
    }

    pub(crate) fn read<T: Copy + Default>(&self, from: u64, n: usize) -> Result<Vec<T>, DriverError> {
        let mut data = vec![T::default(); n];
        self.read_to(from, &mut data).map(|()| data)
    }

    pub(crate) fn read_to<T>(&self, from: u64, data: &mut [T]) -> Result<(), DriverError> {
        // SAFETY: as in `write`.
        unsafe { result::memcpy_dtoh_async(data, from, self.stream) }
    }

    /// `n` floats on the device.
    pub(crate) fn floats(&self, data: &[f32]) -> u64 {
        let at = alloc(4 * data.len()).unwrap();
        self.write(at, data).unwrap();
        at
    }

    pub(crate) fn launch(&self, f: CUfunction, grid: u32, block: u32, args: &[u64]) -> Result<(), DriverError> {
        launch(self.stream, f, (grid, 1, 1), (block, 1, 1), 0, args)
    }

    /// Begins a capture that this thread must not disturb.
    pub(crate) fn capture(&self) {
        // SAFETY: the stream exists.
        unsafe { result::stream::begin_capture(self.stream, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) }
            .unwrap();
    }

    pub(crate) fn end_capture(&self) -> Result<sys::CUgraphExec, DriverError> {
        // SAFETY: the stream exists, and so does the graph where there is one.
        unsafe {
            let graph = result::stream::end_capture(self.stream)?;
            result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0))
        }
    }

    pub(crate) fn replay(&self, graph: sys::CUgraphExec) -> Result<(), DriverError> {
        // SAFETY: the graph exists.
        unsafe { result::graph::launch(graph, self.stream) }
    }
}

pub(crate) fn sync(stream: CUstream) -> Result<(), DriverError> {
    // SAFETY: handles that don't exist are known as such.
    unsafe { result::stream::synchronize(stream) }
}

pub(crate) fn alloc(bytes: usize) -> Result<u64, DriverError> {
    // SAFETY: only asks for memory.
    unsafe { result::malloc_sync(bytes) }
}

/// Pinned memory for `n` floats, which is never freed by itself.
pub(crate) fn pinned(n: usize) -> Result<&'static mut [f32], DriverError> {
    // SAFETY: the memory is as large and is nobody else's.
    unsafe { result::malloc_host(4 * n, 0).map(|at| std::slice::from_raw_parts_mut(at.cast(), n)) }
}

/// Each argument is in 8 bytes, of which a smaller parameter takes the first.
pub(crate) fn launch(
    stream: CUstream,
    f: CUfunction,
    grid: (u32, u32, u32),
    block: (u32, u32, u32),
    shared: u32,
    args: &[u64],
) -> Result<(), DriverError> {
    let mut pointers: Vec<*mut c_void> = args.iter().map(|arg| std::ptr::from_ref(arg).cast_mut().cast()).collect();
    // SAFETY: there is a pointer for each parameter of the tests' kernels, to as many bytes.
    unsafe { result::launch_kernel(f, grid, block, shared, stream, &mut pointers) }
}

impl Kernels {
    pub(crate) fn load() -> Self {
        Self::of(TEXT.as_bytes()).unwrap()
    }

    pub(crate) fn of(image: &[u8]) -> Result<Self, DriverError> {
        let image = CString::new(image).unwrap();
        // SAFETY: the image ends with a zero byte.
        unsafe { result::module::load_data(image.as_ptr().cast()) }.map(Self)
    }

    pub(crate) fn get(self, name: &str) -> CUfunction {
        self.find(name).unwrap()
    }

    pub(crate) fn find(self, name: &str) -> Result<CUfunction, DriverError> {
        // SAFETY: handles that don't exist are known as such.
        unsafe { result::module::get_function(self.0, CString::new(name).unwrap()) }
    }
}

/// Kernels with the parameters p (a pointer) and n. `index` is the thread's of all, `place` the address of its float in p.
pub(crate) const TEXT: &str = include_str!("kernels.ptx");
