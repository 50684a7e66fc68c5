//! Captures of streams, and graphs.

use crate::c::Out;
use crate::call::call;
use crate::codes::{
    Done, INVALID_HANDLE, INVALID_VALUE, OUT_OF_MEMORY, STREAM_CAPTURE_INVALIDATED, STREAM_CAPTURE_UNMATCHED,
    STREAM_CAPTURE_UNSUPPORTED, STREAM_CAPTURE_WRONG_THREAD,
};
use crate::driver::{Capture, Driver, Exec, Handle, complain, driver, in_context, legacy};
use crate::work::{Graph, Op};
use std::sync::Arc;
use std::thread::current;

const GLOBAL: u32 = 0;
const THREAD_LOCAL: u32 = 1;
const RELAXED: u32 = 2;

impl Driver {
    /// A call that may wait for streams in its own way: a capture that forbids it is lost by it.
    pub(crate) fn unsafe_call(&mut self) -> Done {
        let here = current().id();
        let forbids = |c: &&mut Capture| c.mode == GLOBAL || c.mode == THREAD_LOCAL && c.thread == here;
        let mut found = false;
        for capture in self.captures.values_mut().filter(forbids) {
            capture.invalid = true;
            found = true;
        }
        if found {
            complain("a call that may synchronise, while a stream is captured");
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        Ok(())
    }

    /// A call that no stream that is captured can take part in.
    pub(crate) fn not_captured(&mut self, stream: Handle, why: &str) -> Done {
        match self.streams.get(&stream).and_then(|s| s.capture) {
            Some(capture) => {
                complain(format_args!("while the stream is captured: {why}"));
                self.invalidate(capture);
                Err(STREAM_CAPTURE_UNSUPPORTED)
            }
            None => Ok(()),
        }
    }

    /// The same for all streams of a device.
    pub(crate) fn no_capture(&mut self, device: usize) -> Done {
        let capturing = self.streams.iter().find(|(_, s)| s.device == device && s.capture.is_some()).map(|(h, _)| *h);
        capturing.map_or(Ok(()), |stream| self.not_captured(stream, "nobody can wait for what is only captured"))
    }

    pub(crate) fn invalidate(&mut self, capture: Handle) {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.invalid = true;
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) -> u32 {
    call("cuStreamBeginCapture_v2", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            let busy = driver.streams.get(&stream).is_none_or(|s| s.capture.is_some());
            if mode > RELAXED || stream == legacy(device) || busy {
                return Err(if mode > RELAXED { INVALID_VALUE } else { STREAM_CAPTURE_UNSUPPORTED });
            }
            let handle = driver.new_handle();
            let capture = Capture { origin: stream, mode, thread: current().id(), ops: Vec::new(), invalid: false };
            driver.captures.insert(handle, capture);
            if let Some(state) = driver.streams.get_mut(&stream) {
                state.capture = Some(handle);
            }
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: Handle, graph: Out<Handle>) -> u32 {
    call("cuStreamEndCapture", || {
        graph.set(0)?;
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            let capture = driver.streams.get(&stream).and_then(|s| s.capture).ok_or(STREAM_CAPTURE_UNMATCHED)?;
            let state = driver.captures.get(&capture).ok_or(STREAM_CAPTURE_UNMATCHED)?;
            if state.mode != RELAXED && state.thread != current().id() {
                return Err(STREAM_CAPTURE_WRONG_THREAD);
            }
            let state = driver.captures.remove(&capture).ok_or(STREAM_CAPTURE_UNMATCHED)?;
            if let Some(origin) = driver.streams.get_mut(&state.origin) {
                origin.capture = None;
            }
            if state.invalid {
                return Err(STREAM_CAPTURE_INVALIDATED);
            }
            let handle = driver.new_handle();
            driver.graphs.insert(handle, Arc::new(Graph { ops: state.ops }));
            graph.set(handle)
        })
    })
}

/// 0: no capture, 1: a capture, 2: one that is invalid.
#[unsafe(no_mangle)]
extern "C" fn cuStreamIsCapturing(stream: Handle, status: Out<u32>) -> u32 {
    call("cuStreamIsCapturing", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            let capture = driver.streams.get(&stream).and_then(|s| s.capture).and_then(|c| driver.captures.get(&c));
            status.set(capture.map_or(0, |c| if c.invalid { 2 } else { 1 }))
        })
    })
}

/// Flags that change nothing here: memory that is freed at a launch, and priorities.
const KNOWN_FLAGS: u64 = 1 | 8;
/// What an operation of a graph that can be launched takes of the device's memory. (A device's driver does not say; that it is
/// something, is.)
const OP_BYTES: usize = 4096;

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(exec: Out<Handle>, graph: Handle, flags: u64) -> u32 {
    call("cuGraphInstantiateWithFlags", || {
        in_context(|driver, device| {
            if flags & !KNOWN_FLAGS != 0 {
                return Err(INVALID_VALUE);
            }
            let graph = driver.graphs.get(&graph).cloned().ok_or(INVALID_HANDLE)?;
            let cost = graph.ops.len() * OP_BYTES;
            driver.take(device, cost).then_some(()).ok_or(OUT_OF_MEMORY)?;
            let handle = driver.new_handle();
            driver.execs.insert(handle, Exec { graph, device, cost });
            exec.set(handle)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphUpload(exec: Handle, stream: Handle) -> u32 {
    call("cuGraphUpload", || {
        in_context(|driver, device| {
            driver.stream(stream, device)?;
            driver.execs.get(&exec).map(|_| ()).ok_or(INVALID_HANDLE)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(exec: Handle, stream: Handle) -> u32 {
    call("cuGraphLaunch", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            let graph = driver.execs.get(&exec).map(|exec| exec.graph.clone()).ok_or(INVALID_HANDLE)?;
            driver.push(stream, Op::Graph(graph))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(exec: Handle) -> u32 {
    call("cuGraphExecDestroy", || {
        driver(|driver| {
            let exec = driver.execs.remove(&exec).ok_or(INVALID_HANDLE)?;
            driver.give_back(exec.device, exec.cost);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: Handle) -> u32 {
    call("cuGraphDestroy", || driver(|driver| driver.graphs.remove(&graph).map(|_| ()).ok_or(INVALID_HANDLE)))
}
