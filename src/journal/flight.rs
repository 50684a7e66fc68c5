//! A sealed segment on its way to the store, on a thread of its own: the rows after it are answered meanwhile. Invariant: the
//! thread has ended when the flight is dropped.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;

use super::JobDir;
use super::segment::SegmentId;
use crate::storage::Location;

/// See the module.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) id: SegmentId,
    pub(super) at: Location,
    pub(super) sealed: Bytes,
    /// Outcomes in it.
    pub(super) n_rows: u64,
    /// `None` if it has not begun, or has failed.
    pub(super) put: Option<JoinHandle<(Result<()>, Duration)>>,
}

impl Flight {
    /// Begins to put the segment, which must not be there yet. Where a lock keeps others away, there is nobody who could
    /// have put it.
    pub(super) fn begin(&mut self, dir: &JobDir) -> Result<()> {
        let (storage, is_shared) = (dir.storage.clone(), dir.is_shared);
        let (at, sealed) = (self.at.clone(), self.sealed.clone());
        let thread = std::thread::Builder::new().name("commit".into()).spawn(move || {
            let start = Instant::now();
            let put = if is_shared { storage.put_new(&at, &sealed) } else { storage.put(&at, sealed) };
            (put, start.elapsed())
        });
        self.put = Some(thread.context("cannot start the thread that commits")?);
        Ok(())
    }

    /// Whether waiting for it takes no time.
    pub(super) fn is_over(&self) -> bool {
        self.put.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Waits until it is durable; how long the store took. After an error it may begin again.
    pub(super) fn wait(&mut self) -> (Result<()>, Duration) {
        match self.put.take().map(JoinHandle::join) {
            Some(Ok(put)) => put,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => (Ok(()), Duration::ZERO),
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if let Some(put) = self.put.take() {
            // Whoever drops it without waiting does not rely on it.
            let _nobody_asks = put.join();
        }
    }
}
