//! What the driver knows: devices, streams, events, modules, memory. One lock for all of it; work is executed without it.

use crate::codes::{Code, Done, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, NOT_INITIALIZED};
use crate::counters::Tally;
use crate::knobs::Knobs;
use crate::work::{Graph, Op};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Instant;

/// What a C caller holds of a stream, an event, ... Numbers are never used again, so one that was destroyed is known as such.
pub(crate) type Handle = usize;

/// Handles of the streams that are always there: the legacy one has 0 and 1.
pub(crate) const LEGACY: Handle = 1;
pub(crate) const PER_THREAD: Handle = 2;
/// Handles of contexts: one for each device, from here.
const FIRST_CONTEXT: Handle = 0x100;
/// Handles of all else.
const FIRST_HANDLE: Handle = 0x1_0000;
/// Bytes of pageable copies that wait, beyond which the driver's staging memory is full and a call waits, too.
pub(crate) const STAGING: usize = 64 << 20;

pub(crate) struct Device {
    pub(crate) gpu: Arc<Mutex<ptx::Gpu>>,
    /// How often the primary context is retained.
    pub(crate) retained: u32,
    /// The context failed with this, for good.
    pub(crate) failed: Option<Code>,
    pub(crate) used: usize,
    pub(crate) staged: usize,
}

#[derive(Default)]
pub(crate) struct Stream {
    pub(crate) device: usize,
    /// Made without `CU_STREAM_NON_BLOCKING`: takes turns with the legacy stream.
    pub(crate) blocking: bool,
    pub(crate) ops: VecDeque<Op>,
    /// Operations that were ever queued, and those of them that are done.
    pub(crate) queued: u64,
    pub(crate) done: u64,
    pub(crate) capture: Option<Handle>,
    /// Goes as soon as its work is done.
    pub(crate) destroyed: bool,
}

pub(crate) struct Event {
    pub(crate) device: usize,
    pub(crate) timed: bool,
    /// The stream and its count of queued operations, the record among them.
    pub(crate) recorded: Option<(Handle, u64)>,
    pub(crate) at: Option<Instant>,
    /// Recorded in a capture.
    pub(crate) capture: Option<Handle>,
}

pub(crate) struct Capture {
    pub(crate) origin: Handle,
    /// 0: no thread may make unsafe calls, 1: not this one, 2: all may.
    pub(crate) mode: u32,
    pub(crate) thread: ThreadId,
    pub(crate) ops: Vec<Op>,
    pub(crate) invalid: bool,
}

/// A graph that can be launched.
pub(crate) struct Exec {
    pub(crate) graph: Arc<Graph>,
    pub(crate) device: usize,
    /// What it takes of the device's memory.
    pub(crate) cost: usize,
}

pub(crate) struct LoadedModule {
    pub(crate) device: usize,
    pub(crate) module: Arc<ptx::Module>,
    /// As `CU_FUNC_ATTRIBUTE_PTX_VERSION` has it.
    pub(crate) target: u32,
}

#[derive(Clone)]
pub(crate) struct Function {
    pub(crate) module: Arc<ptx::Module>,
    pub(crate) module_handle: Handle,
    pub(crate) name: String,
    pub(crate) shape: Arc<ptx::KernelShape>,
    pub(crate) target: u32,
    /// Bytes of dynamic shared memory that launches may ask for.
    pub(crate) most_dynamic: usize,
}

/// Memory of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    pub(crate) device: usize,
    pub(crate) bytes: usize,
    /// What it takes of the device's memory: 0 for a module's variable.
    pub(crate) cost: usize,
}

/// Pinned memory of the host, by its address.
pub(crate) struct Pinned {
    pub(crate) bytes: usize,
    pub(crate) _block: Vec<u8>,
}

pub(crate) struct Driver {
    pub(crate) knobs: Knobs,
    pub(crate) devices: Vec<Device>,
    pub(crate) streams: BTreeMap<Handle, Stream>,
    pub(crate) events: HashMap<Handle, Event>,
    pub(crate) captures: HashMap<Handle, Capture>,
    pub(crate) modules: HashMap<Handle, LoadedModule>,
    pub(crate) functions: HashMap<Handle, Function>,
    pub(crate) graphs: HashMap<Handle, Arc<Graph>>,
    pub(crate) execs: HashMap<Handle, Exec>,
    /// By address.
    pub(crate) memory: BTreeMap<u64, Range>,
    pub(crate) pinned: BTreeMap<usize, Pinned>,
    pub(crate) tally: Tally,
    pub(crate) random: u64,
    next: Handle,
}

static DRIVER: Mutex<Option<Driver>> = Mutex::new(None);

thread_local! {
    /// The current context.
    static CURRENT: Cell<Handle> = const { Cell::new(0) };
}

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn current() -> Handle {
    CURRENT.get()
}

pub(crate) fn set_current(context: Handle) {
    CURRENT.set(context);
}

/// Begins, if it was not begun.
pub(crate) fn begin(make: impl FnOnce() -> Done<Driver>) -> Done {
    let mut driver = lock(&DRIVER);
    if driver.is_none() {
        *driver = Some(make()?);
    }
    Ok(())
}

pub(crate) fn driver<T>(f: impl FnOnce(&mut Driver) -> Done<T>) -> Done<T> {
    f(lock(&DRIVER).as_mut().ok_or(NOT_INITIALIZED)?)
}

/// The same for a call that needs a context: with the current one's device.
pub(crate) fn in_context<T>(f: impl FnOnce(&mut Driver, usize) -> Done<T>) -> Done<T> {
    driver(|driver| {
        let device = driver.context_device(current())?;
        driver.healthy(device)?;
        f(driver, device)
    })
}

/// At the process's end, when any thread may hold the lock for ever.
pub(crate) fn last_look(f: impl FnOnce(&Driver)) {
    if let Ok(driver) = DRIVER.try_lock()
        && let Some(driver) = &*driver
    {
        f(driver);
    }
}

impl Driver {
    pub(crate) fn new(knobs: Knobs) -> Self {
        let device = |i: usize| {
            let options = ptx::Options {
                seed: knobs.seed,
                races: knobs.races,
                place: (i as u64) << 56,
                lines: false,
                ..ptx::Options::default()
            };
            Device { gpu: Arc::new(Mutex::new(ptx::Gpu::new(options))), retained: 0, failed: None, used: 0, staged: 0 }
        };
        let legacy = |i: usize| (legacy(i), Stream { device: i, blocking: true, ..Stream::default() });
        Self {
            devices: (0..knobs.devices).map(device).collect(),
            streams: (0..knobs.devices).map(legacy).collect(),
            events: HashMap::new(),
            captures: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            graphs: HashMap::new(),
            execs: HashMap::new(),
            memory: BTreeMap::new(),
            pinned: BTreeMap::new(),
            tally: Tally::new(knobs.order.is_some()),
            random: knobs.seed,
            next: FIRST_HANDLE,
            knobs,
        }
    }

    pub(crate) fn new_handle(&mut self) -> Handle {
        self.next += 1;
        self.next
    }

    /// Counts a thing that can be made to fail, and fails if it is its turn.
    pub(crate) fn count(&mut self, what: &str) -> Done {
        let n = self.tally.call(what);
        let planned = self.knobs.fail.get(what).and_then(|all| all.iter().find(|(turn, _)| *turn == n));
        planned.map_or(Ok(()), |&(_, code)| Err(Code(code)))
    }

    pub(crate) fn device(&self, ordinal: i32) -> Done<usize> {
        usize::try_from(ordinal).ok().filter(|&i| i < self.devices.len()).ok_or(INVALID_DEVICE)
    }

    pub(crate) fn context_device(&self, context: Handle) -> Done<usize> {
        let i = context.wrapping_sub(FIRST_CONTEXT);
        self.devices.get(i).filter(|device| device.retained > 0).map(|_| i).ok_or(INVALID_CONTEXT)
    }

    pub(crate) fn healthy(&self, device: usize) -> Done {
        self.devices[device].failed.map_or(Ok(()), Err)
    }

    /// A stream's handle as it is kept.
    pub(crate) fn stream(&self, stream: Handle, device: usize) -> Done<Handle> {
        match stream {
            0 | LEGACY => Ok(legacy(device)),
            PER_THREAD => {
                complain("the per-thread default stream is not there");
                Err(crate::codes::NOT_SUPPORTED)
            }
            _ => self.streams.get(&stream).filter(|s| !s.destroyed).map(|_| stream).ok_or(INVALID_HANDLE),
        }
    }

    /// These bytes are all in one allocation of a device, which is returned.
    pub(crate) fn range(&self, address: u64, bytes: usize) -> Done<usize> {
        let (start, range) = self.memory.range(..=address).next_back().ok_or(INVALID_VALUE)?;
        let fits = (address - start) as usize + bytes <= range.bytes;
        if fits { Ok(range.device) } else { Err(INVALID_VALUE) }
    }

    /// All of these bytes of the host are pinned.
    pub(crate) fn is_pinned(&self, at: usize, bytes: usize) -> bool {
        self.pinned.range(..=at).next_back().is_some_and(|(start, block)| at - start + bytes <= block.bytes)
    }
}

pub(crate) fn context(device: usize) -> Handle {
    FIRST_CONTEXT + device
}

/// The legacy stream of a device, as it is kept.
pub(crate) fn legacy(device: usize) -> Handle {
    FIRST_CONTEXT + 0x10 + device
}

#[expect(clippy::print_stderr, reason = "whoever runs the test must see what no error of the driver says")]
pub(crate) fn complain(words: impl std::fmt::Display) {
    eprintln!("stand-in: {words}");
}
