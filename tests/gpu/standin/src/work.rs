//! Work on a stream: what it is, how it gets there, and when it is done.

use crate::c::{Host, HostFunction};
use crate::codes::{Code, Done, STREAM_CAPTURE_IMPLICIT, STREAM_CAPTURE_INVALIDATED};
use crate::driver::{Driver, Handle, legacy};
use std::sync::Arc;

/// One operation. What it needs is copied into it when it is queued, but for pinned memory.
#[derive(Clone)]
pub(crate) enum Op {
    Write {
        to: u64,
        bytes: Arc<[u8]>,
    },
    WritePinned {
        to: u64,
        from: Host,
        bytes: usize,
    },
    /// To pinned memory, or to pageable memory of a call that waits for it.
    Read {
        from: u64,
        to: Host,
        bytes: usize,
        pinned: bool,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Fill {
        to: u64,
        pattern: [u8; 4],
        width: usize,
        n: usize,
    },
    Free {
        address: u64,
    },
    Launch(Arc<Launch>),
    Host {
        call: HostFunction,
        data: usize,
    },
    Native(Arc<Native>),
    Record {
        event: Handle,
    },
    Wait {
        stream: Handle,
        done: u64,
    },
    Graph(Arc<Graph>),
}

/// A launch, with its arguments' values.
pub(crate) struct Launch {
    pub(crate) module: Arc<ptx::Module>,
    pub(crate) kernel: String,
    pub(crate) grid: (u32, u32, u32),
    pub(crate) block: (u32, u32, u32),
    pub(crate) dynamic: usize,
    pub(crate) args: Vec<ptx::Arg>,
}

/// Work of another library, which it does on the host.
pub(crate) struct Native {
    pub(crate) name: String,
    pub(crate) call: extern "C" fn(*const std::ffi::c_void) -> u32,
    pub(crate) release: extern "C" fn(*const std::ffi::c_void),
    pub(crate) data: usize,
    /// Multiplications and additions.
    pub(crate) operations: u64,
}

impl Drop for Native {
    fn drop(&mut self) {
        (self.release)(self.data as *const std::ffi::c_void);
    }
}

/// What was captured, in the order of the calls.
pub(crate) struct Graph {
    pub(crate) ops: Vec<Op>,
}

/// What is to be done until a call returns.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    /// So many operations of a stream.
    Stream(Handle, u64),
    Device(usize),
    /// Any one operation.
    Any(usize),
}

/// What comes next.
pub(crate) enum Next {
    Nothing,
    Run { device: usize, stream: Handle, op: Op },
}

impl Driver {
    /// Queues work, or adds it to what the stream captures.
    pub(crate) fn push(&mut self, stream: Handle, op: Op) -> Done {
        let Some(state) = self.streams.get(&stream) else { return Err(crate::codes::INVALID_HANDLE) };
        let (device, blocking) = (state.device, state.blocking);
        if let Some(capture) = state.capture {
            let capture = self.captures.get_mut(&capture).ok_or(STREAM_CAPTURE_INVALIDATED)?;
            if capture.invalid {
                return Err(STREAM_CAPTURE_INVALIDATED);
            }
            capture.ops.push(op);
            return Ok(());
        }
        self.healthy(device)?;
        if blocking {
            self.take_turns(stream, device)?;
        }
        if let Op::Write { bytes, .. } = &op {
            self.devices[device].staged += bytes.len();
        }
        self.enqueue(stream, op);
        Ok(())
    }

    fn enqueue(&mut self, stream: Handle, op: Op) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.ops.push_back(op);
            stream.queued += 1;
        }
    }

    /// The legacy stream waits for all work of blocking streams, and they for its.
    fn take_turns(&mut self, stream: Handle, device: usize) -> Done {
        let own = legacy(device);
        let others: Vec<Handle> = if stream == own {
            let others = self.streams.iter().filter(|(h, s)| **h != own && s.device == device && s.blocking);
            others.map(|(h, _)| *h).collect()
        } else {
            vec![own]
        };
        for other in others {
            let state = &self.streams[&other];
            if let Some(capture) = state.capture {
                if let Some(capture) = self.captures.get_mut(&capture) {
                    capture.invalid = true;
                }
                return Err(STREAM_CAPTURE_IMPLICIT);
            }
            if state.done < state.queued {
                let wait = Op::Wait { stream: other, done: state.queued };
                self.enqueue(stream, wait);
            }
        }
        Ok(())
    }

    /// Takes the next operation to run towards a goal. Waits that are over are passed on the way.
    pub(crate) fn next(&mut self, goal: Goal) -> Done<Next> {
        loop {
            let Some(mut stream) = self.towards(goal)? else { return Ok(Next::Nothing) };
            // A stream that waits for another: that one first.
            while let Some(Op::Wait { stream: other, done }) = self.streams.get(&stream).and_then(|s| s.ops.front()) {
                match self.streams.get(other) {
                    Some(state) if state.done < *done => stream = *other,
                    _ => break,
                }
            }
            let Some(state) = self.streams.get_mut(&stream) else { return Ok(Next::Nothing) };
            let device = state.device;
            match state.ops.pop_front() {
                Some(Op::Wait { .. }) => self.finish(stream),
                Some(op) => {
                    if let Op::Write { bytes, .. } = &op {
                        self.devices[device].staged -= bytes.len();
                    }
                    return Ok(Next::Run { device, stream, op });
                }
                None => return Ok(Next::Nothing),
            }
        }
    }

    /// A stream with work to do for the goal.
    fn towards(&mut self, goal: Goal) -> Done<Option<Handle>> {
        match goal {
            Goal::Stream(stream, done) => {
                let Some(state) = self.streams.get(&stream) else { return Ok(None) };
                self.healthy(state.device)?;
                Ok((state.done < done).then_some(stream))
            }
            Goal::Device(device) | Goal::Any(device) => {
                self.healthy(device)?;
                let busy = self.streams.iter().filter(|(_, s)| s.device == device && !s.ops.is_empty());
                let busy: Vec<Handle> = busy.map(|(h, _)| *h).collect();
                let pick = self.below(busy.len());
                Ok(busy.get(pick).copied())
            }
        }
    }

    /// An operation of the stream is done.
    pub(crate) fn finish(&mut self, stream: Handle) {
        if let Some(state) = self.streams.get_mut(&stream) {
            state.done += 1;
            if state.destroyed && state.ops.is_empty() {
                self.streams.remove(&stream);
            }
        }
    }

    /// The context is lost, and with it all that waits.
    pub(crate) fn fail(&mut self, device: usize, code: Code) {
        self.devices[device].failed.get_or_insert(code);
        for state in self.streams.values_mut().filter(|s| s.device == device) {
            state.ops.clear();
            state.done = state.queued;
        }
        self.devices[device].staged = 0;
    }

    /// A number below `n`, drawn.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.random >> 33) as usize).checked_rem(n).unwrap_or(0)
    }
}
