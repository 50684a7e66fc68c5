//! Verifies segments of earlier runs while the job goes on: a disk that has changed a byte is to be noticed before a night's
//! work is added to it, but nobody waits for that. Invariant: nothing is changed, whatever is found.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{Builder, JoinHandle};

use anyhow::{Context as _, Result, bail};

use super::{Journal, segment};
use crate::storage::Location;

/// Whether segments are verified.
#[derive(Debug)]
pub(super) enum Checking {
    /// There is nothing to verify any more.
    None,
    /// Until something is added to them.
    Waits,
    /// They are being verified.
    Runs(Run),
}

/// The thread at it. Ends early when this is dropped.
#[derive(Debug)]
pub(super) struct Run {
    thread: Option<JoinHandle<Result<()>>>,
    stop: Arc<AtomicBool>,
}

impl Journal {
    /// Begins to verify the segments that are there, or says what was found since.
    pub(super) fn check(&mut self) -> Result<()> {
        match &mut self.checking {
            Checking::Waits => self.checking = Checking::Runs(Run::begin(self)?),
            Checking::Runs(Run { thread, .. }) => {
                if let Some(thread) = thread.take_if(|thread| thread.is_finished()) {
                    self.checking = Checking::None;
                    return thread.join().unwrap_or_else(|_| bail!("verifying the journal panicked"));
                }
            }
            Checking::None => {}
        }
        Ok(())
    }
}

impl Run {
    fn begin(journal: &Journal) -> Result<Self> {
        let places: Vec<Location> = journal.segments.iter().map(|&id| journal.dir.segment(id)).collect::<Result<_>>()?;
        let (storage, job) = (journal.dir.storage.clone(), journal.job.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let must_stop = Arc::clone(&stop);
        let check = move || {
            for at in places.iter().take_while(|_| !must_stop.load(Relaxed)) {
                let Some(content) = storage.get(at)? else { bail!("{} is gone", at.url) };
                segment::verify(&content, &job).with_context(|| at.url.to_string())?;
            }
            Ok(())
        };
        let thread = Builder::new().name("segment-check".into()).spawn(check);
        Ok(Self { thread: Some(thread.context("cannot start the thread that verifies the journal")?), stop })
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it reads may be removed next.
            drop(thread.join());
        }
    }
}
