//! NVIDIA's driver: one GPU, its context and one stream, and the few calls that a step is made of. Knows nothing of kernels'
//! meaning, models or rows.
//!
//! Invariant: nothing is opened before it is known that the driver's library is there; whatever a call says is an error in words.

use super::memory::{DeviceMemory, Pinned};
use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::ffi::{CString, c_int, c_void};
use std::ptr::null_mut;

/// The oldest driver interface that is taken: CUDA 12.0, which came with driver 525.
const MIN_DRIVER: i32 = 12_000;
/// The oldest architecture that the kernels are written for (`mma.sync` in bfloat16, `cp.async`).
const MIN_CAPABILITY: (i32, i32) = (8, 0);

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Which one of the machine's.
    pub ordinal: usize,
    /// What its maker calls it.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub n_multiprocessors: u32,
    /// What the driver says it supports: 12080 is CUDA 12.8.
    pub driver: i32,
}

/// A GPU in use: its primary context and a stream.
pub(super) struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    facts: Facts,
}

// SAFETY: the handles are of a context and a stream that any thread may use once it has made the context its own (`enter`);
// whoever owns a `Gpu` is the only one that uses it.
unsafe impl Send for Gpu {}

/// A kernel of a loaded module.
#[derive(Clone, Copy)]
pub(super) struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory, bytes.
    shared: u32,
}

// SAFETY: as of `Gpu`, beside which it is kept.
unsafe impl Send for Function {}

/// A loaded module; unloaded with the context.
#[derive(Clone, Copy)]
pub(super) struct Module(sys::CUmodule);

/// Work that was captured, to be launched as one; destroyed when dropped.
pub(super) struct Graph(sys::CUgraphExec);

// SAFETY: as of `Gpu`, beside which it is kept.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it was made once. A context that has failed may refuse; then it goes with the process.
        let _destroyed = unsafe { result::graph::exec_destroy(self.0) };
    }
}

/// A place in a stream's work, to wait for what stands before it; destroyed when dropped.
pub(super) struct Mark(sys::CUevent);

// SAFETY: as of `Gpu`, beside which it is kept.
unsafe impl Send for Mark {}

impl Mark {
    /// Waits for all that stands before it.
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: it exists.
        said("cuEventSynchronize", unsafe { result::event::synchronize(self.0) })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: as of `Graph`.
        let _destroyed = unsafe { result::event::destroy(self.0) };
    }
}

/// Values that kernels take as they stand in memory.
///
/// # Safety
/// The type has the layout of the kernel's parameter, without bytes that nobody writes.
pub(super) unsafe trait Param {}

// SAFETY: plain numbers.
unsafe impl Param for u32 {}
// SAFETY: plain numbers.
unsafe impl Param for u64 {}
// SAFETY: plain numbers.
unsafe impl Param for f32 {}

/// A tensor of two dimensions, as copies of its boxes are told of it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct TensorMap(sys::CUtensorMap);

// SAFETY: the driver's own words, all of which are written.
unsafe impl Param for TensorMap {}

/// A parameter of a launch.
#[derive(Clone, Copy)]
pub(super) struct Arg<'a>(&'a dyn Param);

/// A parameter.
pub(super) fn arg<T: Param>(value: &T) -> Arg<'_> {
    Arg(value)
}

/// Most parameters of a kernel of ours.
const MAX_ARGS: usize = 12;

/// What a driver's call says, in words.
pub(super) fn said<T>(call: &str, result: Result<T, DriverError>) -> Result<T> {
    result.map_err(|error| anyhow!("{call}: {}", words(error)))
}

fn words(error: DriverError) -> String {
    let name = error.error_name().map_or("unknown".into(), |name| name.to_string_lossy());
    let text = error.error_string().map_or("unknown error".into(), |text| text.to_string_lossy());
    format!("{text} ({name}, {})", error.0 as i32)
}

/// Whether the driver's library is on this machine.
pub fn driver_is_present() -> bool {
    // SAFETY: loads the library by its name, as any program that uses CUDA does; its initialisers have no preconditions.
    unsafe { sys::is_culib_present() }
}

impl Gpu {
    /// Opens a GPU of this machine by its number.
    ///
    /// # Errors
    /// No driver, an old one, no such GPU, or one that the kernels are not for.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        ensure!(driver_is_present(), "no NVIDIA driver is found (libcuda.so): CUDA needs one, version 525 or newer");
        said("cuInit", result::init())?;
        let mut driver: c_int = 0;
        // SAFETY: the pointer is to an integer.
        said("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut driver) }.result())?;
        let version = |n: i32| format!("{}.{}", n / 1000, n % 1000 / 10);
        ensure!(
            driver >= MIN_DRIVER,
            "the NVIDIA driver is for CUDA {}; {} is needed, that is driver 525 or newer",
            version(driver),
            version(MIN_DRIVER)
        );
        let n_devices = said("cuDeviceGetCount", result::device::get_count())?;
        ensure!(
            i32::try_from(ordinal).is_ok_and(|ordinal| ordinal < n_devices),
            "there is no GPU {ordinal}: this machine has {n_devices}, counted from 0"
        );
        let device = said("cuDeviceGet", result::device::get(ordinal as i32))?;
        let attribute = |which| {
            // SAFETY: the device was named by the driver.
            said("cuDeviceGetAttribute", unsafe { result::device::get_attribute(device, which) })
        };
        let capability = (
            attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let n_multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let name = said("cuDeviceGetName", result::device::get_name(device))?;
        ensure!(
            capability >= MIN_CAPABILITY,
            "{name} has compute capability {}.{}: the kernels need {}.{} or newer",
            capability.0,
            capability.1,
            MIN_CAPABILITY.0,
            MIN_CAPABILITY.1
        );
        // SAFETY: the device is one of the driver's; the context is released when this is dropped.
        let context = said("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        let facts = Facts { ordinal, name, capability, n_multiprocessors, driver };
        let mut gpu = Self { device, context, stream: null_mut(), facts };
        gpu.enter()?;
        gpu.stream = said("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        Ok(gpu)
    }

    /// What it is.
    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The stream's handle.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes its context this thread's.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        said("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }

    /// Free and all memory, bytes.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = said("cuMemGetInfo", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }

    /// Memory of the device, whose contents nobody has written.
    pub(super) fn allocate(&self, n_bytes: usize) -> Result<DeviceMemory> {
        self.enter()?;
        // SAFETY: nobody reads it before it is written: kernels and copies alone do, in the order of the stream.
        let at = said("cuMemAlloc", unsafe { result::malloc_sync(n_bytes.max(1)) })?;
        Ok(DeviceMemory::new(at, n_bytes))
    }

    /// Memory of the host that the device copies from and to on its own.
    pub(super) fn pinned(&self, n_words: usize) -> Result<Pinned> {
        self.enter()?;
        let n_bytes = n_words.max(1) * size_of::<u32>();
        // SAFETY: it is written before it is read, as `Pinned` begins with zeros.
        let at = said("cuMemHostAlloc", unsafe { result::malloc_host(n_bytes, 0) })?;
        // SAFETY: so many bytes were allocated just now, aligned to a page, and nobody else knows of them.
        Ok(unsafe { Pinned::new(at.cast(), n_words) })
    }

    /// Loads an image: machine code, or PTX ended by a zero. `None` if the driver takes no such image for this GPU (error 209).
    pub(super) fn load(&self, image: &[u8]) -> Result<Option<Module>> {
        self.enter()?;
        // SAFETY: the image is an ELF file, whose header says its length, or text that ends in a zero.
        match unsafe { result::module::load_data(image.as_ptr().cast()) } {
            Ok(module) => Ok(Some(Module(module))),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)) => Ok(None),
            Err(error) => said("cuModuleLoadData", Err(error)),
        }
    }

    /// A kernel of a module, which is launched with so much dynamic shared memory.
    pub(super) fn function(&self, module: Module, name: &str, shared: u32) -> Result<Function> {
        self.enter()?;
        let c_name = CString::new(name)?;
        // SAFETY: modules stay loaded as long as the context.
        let handle = said("cuModuleGetFunction", unsafe { result::module::get_function(module.0, c_name) });
        let handle = handle.with_context(|| format!("kernel {name}"))?;
        if shared > 0 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was found just now.
            let set = unsafe { result::function::set_function_attribute(handle, attribute, shared as i32) };
            said("cuFuncSetAttribute", set).with_context(|| format!("kernel {name}: {shared} bytes of shared memory"))?;
        }
        Ok(Function { handle, shared })
    }

    /// Copies bytes to the device and waits. On our stream: the driver's call without one returns when it has read the bytes,
    /// which may be before they are there, and a stream like ours does not wait for it.
    pub(super) fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: `to` is memory of as many bytes of this device: callers take it from the arena by that number. The bytes are
        // borrowed until the stream was waited for, below.
        said("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(to, bytes, self.stream) })?;
        self.wait()
    }

    /// Has the words copied to the device; they must stay until the stream, or a mark behind this, has been waited for.
    pub(super) fn upload_later(&self, to: u64, words: &[u32]) -> Result<()> {
        if words.is_empty() {
            return Ok(());
        }
        // SAFETY: as `upload`; that the words stay is the caller's part: they are in pinned memory that is written again only
        // after the stream or a mark was waited for.
        said("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(to, words, self.stream) })
    }

    /// Has words copied from the device, after all that the stream has to do; they must stay, and are not to be read, until the
    /// stream, or a mark behind this, has been waited for.
    pub(super) fn download_later(&self, from: u64, to: &mut [u32]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `from` is memory of as many bytes; the rest is the caller's part: they are in pinned memory that is read only
        // after the stream or a mark was waited for.
        said("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(to, from, self.stream) })
    }

    /// Has bytes become 0.
    pub(super) fn clear_later(&self, at: u64, n_bytes: usize) -> Result<()> {
        // SAFETY: as `upload`.
        said("cuMemsetD8Async", unsafe { result::memset_d8_async(at, 0, n_bytes, self.stream) })
    }

    /// Rows of bfloat16 from that address on, `(rows, columns)`, of which boxes of so many rows and columns are copied with 128-byte
    /// swizzle, zeros for what lies outside.
    pub(super) fn tensor_map(&self, at: u64, (rows, columns): (usize, usize), of_box: (u32, u32)) -> Result<TensorMap> {
        self.enter()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, strides) = ([columns as u64, rows as u64], [2 * columns as u64]);
        let (of_box, steps) = ([of_box.1, of_box.0], [1, 1]);
        // SAFETY: arrays have as many numbers as the tensor has dimensions (strides one less); the address is looked at only by copies.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                at as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                of_box.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        said("cuTensorMapEncodeTiled", made.result())?;
        Ok(TensorMap(map))
    }

    /// Has a kernel run.
    ///
    /// # Safety
    /// The parameters are those of the kernel, in its order, and addresses among them are of memory as large as the kernel
    /// uses, which lives until the stream has been waited for.
    pub(super) unsafe fn launch(&self, f: Function, grid: (u32, u32), threads: u32, args: &[Arg<'_>]) -> Result<()> {
        assert!(args.len() <= MAX_ARGS, "a kernel of {} parameters", args.len());
        let mut pointers = [null_mut::<c_void>(); MAX_ARGS];
        for (pointer, Arg(value)) in pointers.iter_mut().zip(args) {
            *pointer = (&raw const **value).cast::<c_void>().cast_mut();
        }
        let (grid, block) = ((grid.0, grid.1, 1), (threads, 1, 1));
        // SAFETY: the driver copies the parameters during the call; the rest is the caller's promise.
        let launched =
            unsafe { result::launch_kernel(f.handle, grid, block, f.shared, self.stream, &mut pointers[..args.len()]) };
        said("cuLaunchKernel", launched)
    }

    /// Captures what is put on the stream from now on, instead of doing it.
    pub(super) fn begin_capture(&self) -> Result<()> {
        // Only this thread is kept from calls that may wait.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        said("cuStreamBeginCapture", unsafe { result::stream::begin_capture(self.stream, mode) })
    }

    /// Ends that; what was captured, if it is wanted.
    fn captured(&self) -> Result<sys::CUgraph> {
        // SAFETY: as above.
        said("cuStreamEndCapture", unsafe { result::stream::end_capture(self.stream) })
    }

    /// Ends that, with what was captured and the memory it takes (by what is free before and after: others may use the GPU, too).
    pub(super) fn end_capture(&self) -> Result<(Graph, u64)> {
        let graph = self.captured()?;
        let (before, _) = self.memory()?;
        // SAFETY: the graph was made just now, and is destroyed once; what is made of it does not need it.
        let made = unsafe {
            let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _destroyed = result::graph::destroy(graph);
            made
        };
        let graph = Graph(said("cuGraphInstantiate", made)?);
        // SAFETY: both exist.
        said("cuGraphUpload", unsafe { result::graph::upload(graph.0, self.stream) })?;
        let (after, _) = self.memory()?;
        Ok((graph, before.saturating_sub(after)))
    }

    /// Ends a capture that something went wrong in.
    pub(super) fn give_up_capture(&self) {
        if let Ok(graph) = self.captured() {
            // SAFETY: as above.
            let _destroyed = unsafe { result::graph::destroy(graph) };
        }
    }

    /// Has work run that was captured on this stream; what it uses must live until the stream has been waited for.
    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: both exist; of what was captured, `launch` and others were promised that its memory lives.
        said("cuGraphLaunch", unsafe { result::graph::launch(graph.0, self.stream) })
    }

    /// A mark that is nowhere yet.
    pub(super) fn new_mark(&self) -> Result<Mark> {
        self.enter()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        Ok(Mark(said("cuEventCreate", result::event::create(flags))?))
    }

    /// Puts a mark behind all that the stream has to do now.
    pub(super) fn put_mark(&self, mark: &Mark) -> Result<()> {
        // SAFETY: both exist.
        said("cuEventRecord", unsafe { result::event::record(mark.0, self.stream) })
    }

    /// Waits for all that the stream has to do.
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        said("cuStreamSynchronize", unsafe { result::stream::synchronize(self.stream) })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        if !self.stream.is_null() {
            // What a context that failed says to this is of no use any more.
            // SAFETY: both were made by `open`, and nothing uses them after this.
            let _ended = unsafe { result::stream::synchronize(self.stream).and_then(|()| result::stream::destroy(self.stream)) };
        }
        // SAFETY: it was retained once, by `open`.
        let _released = unsafe { result::primary_ctx::release(self.device) };
    }
}
