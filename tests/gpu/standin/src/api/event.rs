//! Events: marks in streams.

use crate::api::stream::ready;
use crate::c::Out;
use crate::call::call;
use crate::codes::{Done, INVALID_CONTEXT, INVALID_HANDLE, NOT_READY, STREAM_CAPTURE_ISOLATION, STREAM_CAPTURE_UNSUPPORTED};
use crate::driver::{Driver, Event, Handle, complain, driver, in_context};
use crate::run;
use crate::work::{Goal, Op};

const DISABLE_TIMING: u32 = 2;

impl Driver {
    fn record(&mut self, handle: Handle, stream: Handle) -> Done {
        let capture = self.streams.get(&stream).ok_or(INVALID_HANDLE)?.capture;
        let device = self.streams[&stream].device;
        let event = self.events.get(&handle).ok_or(INVALID_HANDLE)?;
        if event.device != device {
            return Err(INVALID_CONTEXT);
        }
        self.push(stream, Op::Record { event: handle })?;
        let queued = self.streams[&stream].queued;
        if let Some(event) = self.events.get_mut(&handle) {
            event.capture = capture;
            event.at = None;
            event.recorded = capture.is_none().then_some((stream, queued));
        }
        Ok(())
    }

    /// What follows on the stream waits for what is recorded now; an event that was never recorded is over.
    pub(crate) fn wait_event(&mut self, stream: Handle, event: Handle) -> Done {
        let event = self.events.get(&event).ok_or(INVALID_HANDLE)?;
        let (captured, recorded) = (event.capture, event.recorded);
        let capturing = self.streams.get(&stream).and_then(|s| s.capture);
        match (capturing, captured) {
            (None, None) => recorded.map_or(Ok(()), |(other, done)| self.push(stream, Op::Wait { stream: other, done })),
            // In the order of the calls already.
            (Some(own), Some(theirs)) if own == theirs => Ok(()),
            (Some(own), None) if recorded.is_some() => {
                self.invalidate(own);
                Err(STREAM_CAPTURE_ISOLATION)
            }
            (Some(_), None) => Ok(()),
            (_, Some(theirs)) => {
                complain("a capture of several streams is not there");
                self.invalidate(theirs);
                Err(STREAM_CAPTURE_UNSUPPORTED)
            }
        }
    }

    /// What must be done before the event has happened.
    fn goal_of(&mut self, handle: Handle) -> Done<(usize, Option<Goal>)> {
        let event = self.events.get(&handle).ok_or(INVALID_HANDLE)?;
        let (device, capture, recorded) = (event.device, event.capture, event.recorded);
        self.healthy(device)?;
        if let Some(capture) = capture.filter(|capture| self.captures.contains_key(capture)) {
            self.invalidate(capture);
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        Ok((device, recorded.map(|(stream, done)| Goal::Stream(stream, done))))
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: Out<Handle>, flags: u32) -> u32 {
    call("cuEventCreate", || {
        in_context(|driver, device| {
            let handle = driver.new_handle();
            let timed = flags & DISABLE_TIMING == 0;
            driver.events.insert(handle, Event { device, timed, recorded: None, at: None, capture: None });
            event.set(handle)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> u32 {
    call("cuEventDestroy_v2", || driver(|driver| driver.events.remove(&event).map(|_| ()).ok_or(INVALID_HANDLE)))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> u32 {
    call("cuEventRecord", || {
        in_context(|driver, device| {
            let stream = driver.stream(stream, device)?;
            driver.record(event, stream)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> u32 {
    call("cuEventQuery", || {
        let (device, goal) = driver(|driver| {
            driver.unsafe_call()?;
            driver.goal_of(event)
        })?;
        goal.map_or(Ok(()), |goal| ready(device, goal))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> u32 {
    call("cuEventSynchronize", || {
        let (_, goal) = driver(|driver| {
            driver.unsafe_call()?;
            driver.goal_of(event)
        })?;
        goal.map_or(Ok(()), run::until)
    })
}

/// Milliseconds of this machine, which say nothing of a device.
#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) -> u32 {
    call("cuEventElapsedTime", || {
        driver(|driver| {
            let at = |event: Handle| match driver.events.get(&event) {
                Some(event) if event.timed && event.recorded.is_some() => event.at.ok_or(NOT_READY),
                _ => Err(INVALID_HANDLE),
            };
            let (start, end) = (at(start)?, at(end)?);
            milliseconds.set(end.saturating_duration_since(start).as_secs_f32() * 1e3)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) -> u32 {
    cuEventElapsedTime(milliseconds, start, end)
}
