//! The threads of a job: the engine's, the feed's, that of later steps, and the listener for signals; all tell the collecting
//! side what happens. Invariant: however one of them ends, the collecting side hears of it.

use super::collect::Event;
use super::feed::Feed;
use super::signals::Signals;
use super::stepper::Stepper;
use crate::config::Config;
use crate::engine::handle::{Delivery, EngineHandle, panic_message};
use crate::engine::{Engine, EngineConfig, TokenTable};
use crate::model::Runner;
use anyhow::{Context, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// The job's threads, once they run.
pub(super) struct Threads {
    pub(super) engine: Arc<EngineHandle>,
    feed: std::thread::JoinHandle<()>,
    stepper: std::thread::JoinHandle<()>,
    pub(super) events: Receiver<Event>,
}

impl Threads {
    /// Starts the engine's thread and the feed's.
    pub(super) fn start(
        config: &Config,
        signals: &Signals,
        runner: Box<dyn Runner>,
        tokens: Arc<dyn TokenTable>,
        feed: impl FnOnce(Arc<EngineHandle>, Sender<Event>) -> Result<(Feed, Stepper)>,
    ) -> Result<Self> {
        let (sender, events) = channel();
        let mut engine_config = EngineConfig::for_runner(&runner.limits());
        engine_config.max_running = config.spec.engine.max_running.min(engine_config.max_running);
        engine_config.max_waiting = 2 * engine_config.max_running;
        let engine = Engine::new(engine_config, runner, tokens)?;
        let to_collector = EngineEvents(sender.clone());
        let deliver = Box::new(move |step: Delivery<'_>| to_collector.step(step));
        let engine = Arc::new(EngineHandle::start(engine, deliver)?);
        let (feed, stepper) = feed(Arc::clone(&engine), sender.clone())?;
        let stepper = std::thread::Builder::new().name("steps".into()).spawn(move || {
            let events = stepper.events.clone();
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| stepper.run())) {
                let error = anyhow::anyhow!("preparing a later step panicked: {}", panic_message(&*panic));
                // The collector may be gone already, after a signal.
                let _nobody_listens = events.send(Event::FeedEnded(Err(error)));
            }
        });
        let stepper = stepper.context("cannot start the thread of later steps")?;
        signals.tell(sender.clone());
        let thread = std::thread::Builder::new().name("feed".into()).spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| feed.run()));
            let result =
                result.unwrap_or_else(|panic| Err(anyhow::anyhow!("reading the rows panicked: {}", panic_message(&*panic))));
            // The collector may be gone already, after a signal.
            let _nobody_listens = sender.send(Event::FeedEnded(result));
        });
        Ok(Self { engine, feed: thread.context("cannot start the feed thread")?, stepper, events })
    }

    /// Ends the threads; the error is the engine's.
    pub(super) fn end(self) -> Result<()> {
        self.engine.abort();
        drop(self.events);
        self.feed.join().map_err(|_| anyhow::anyhow!("the feed thread panicked"))?;
        self.stepper.join().map_err(|_| anyhow::anyhow!("the thread of later steps panicked"))?;
        let engine = Arc::into_inner(self.engine).context("the feed has ended and let go of the engine")?;
        engine.drain().map(drop)
    }
}

/// Hands the engine's results to the collector; tells it when the engine's thread is gone, however it ended.
struct EngineEvents(Sender<Event>);

impl EngineEvents {
    fn step(&self, step: Delivery<'_>) {
        // Nobody listens after a stop; the rows are computed again later.
        let _nobody_listens = self.0.send(Event::Finished(step.finished, *step.stats));
        if !step.checkpoints.is_empty() {
            let _nobody_listens = self.0.send(Event::Checkpoints(step.checkpoints));
        }
    }
}

impl Drop for EngineEvents {
    fn drop(&mut self) {
        let _nobody_listens = self.0.send(Event::EngineEnded);
    }
}
