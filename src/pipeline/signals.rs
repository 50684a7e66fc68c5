//! SIGTERM and Ctrl-C -> an event of the job. Invariant: the first signal asks for an orderly end, a second one ends the
//! process at once (everything committed by then is safe either way).

use anyhow::{Context, Result};
use std::sync::mpsc::Sender;
use tokio::signal::unix::{SignalKind, signal};

use super::collect::Event;

const SIGINT: u8 = 2;
const SIGTERM: u8 = 15;

/// Starts listening, for the rest of the process.
pub(super) fn listen(events: Sender<Event>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot listen for signals")?;
    let thread = std::thread::Builder::new().name("signals".into());
    let work = async move {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => SIGTERM,
                _ = interrupt.recv() => SIGINT,
            }
        };
        let first = next().await;
        if events.send(Event::Signal(first)).is_err() {
            // Nobody collects any more: everything is committed, and only files are being written.
            end_now(first);
        }
        end_now(next().await);
        Ok::<(), std::io::Error>(())
    };
    thread.spawn(move || runtime.block_on(work)).context("cannot start the signal thread")?;
    Ok(())
}

#[expect(clippy::exit, reason = "the user asked twice; nothing is left to save")]
fn end_now(signal: u8) {
    std::process::exit(128 + i32::from(signal));
}
