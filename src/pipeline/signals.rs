//! SIGTERM and Ctrl-C -> an event of the job. Invariant: the first signal asks for an orderly end, a second one ends the
//! process at once (everything committed by then is safe either way).

use anyhow::{Context, Result};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::signal::unix::{SignalKind, signal};

use super::collect::Event;

const SIGINT: u8 = 2;
const SIGTERM: u8 = 15;

/// Listens, for the rest of the process.
pub(super) struct Signals {
    /// Whoever collects the job's events, once somebody does.
    collector: Arc<Mutex<Option<Sender<Event>>>>,
}

impl Signals {
    /// Starts listening. As long as nobody collects, the first signal calls `leave` and ends the process.
    ///
    /// # Errors
    /// The machine can't start a thread.
    pub(super) fn listen(leave: impl FnOnce() + Send + 'static) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot listen for signals")?;
        let collector = Arc::new(Mutex::new(None::<Sender<Event>>));
        let told = Arc::clone(&collector);
        let work = async move {
            let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            let mut next = async || {
                tokio::select! {
                    _ = terminate.recv() => SIGTERM,
                    _ = interrupt.recv() => SIGINT,
                }
            };
            let first = next().await;
            let collector = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match collector {
                Some(events) if events.send(Event::Signal(first)).is_ok() => end_now(next().await),
                // Nobody collects any more: everything is committed, and only files are being written.
                Some(_) => end_now(first),
                None => {
                    tokio::select! {
                        _ = tokio::task::spawn_blocking(leave) => {}
                        _ = next() => {}
                    }
                    end_now(first);
                }
            }
            Ok::<(), std::io::Error>(())
        };
        let thread = std::thread::Builder::new().name("signals".into());
        thread.spawn(move || runtime.block_on(work)).context("cannot start the signal thread")?;
        Ok(Self { collector })
    }

    /// From now on the first signal is an event of the job's.
    pub(super) fn tell(&self, events: Sender<Event>) {
        *self.collector.lock().unwrap_or_else(PoisonError::into_inner) = Some(events);
    }
}

#[expect(clippy::exit, reason = "the user asked twice; nothing is left to save")]
fn end_now(signal: u8) {
    std::process::exit(128 + i32::from(signal));
}
