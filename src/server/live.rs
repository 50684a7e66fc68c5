//! A loaded model at work: its engine's thread, tokenizer, template and compiled grammars, behind one asynchronous call.
//! Knows nothing of HTTP or of any wire form. Invariants: a call is answered by exactly the tokens that `valar run` gives
//! the same request; a caller that goes away leaves nothing behind; memory held for a caller that reads slowly is bounded
//! by its answer.

use super::backlog::{Backlog, Ticket};
use super::flow::{Flow, Mailbox, Routes, first_id, is_of_job};
use super::metrics::Times;
use super::pace::Pace;
use super::windows::Table;
use crate::config::ModelConfig;
use crate::config::serve::ServeLimits;
use crate::engine::handle::{Delivery, EngineHandle};
use crate::engine::{Due, Engine, EngineConfig, EngineStats, StepLimits, Submission};
use crate::format::openai::Endpoint;
use crate::grammar::Grammars;
use crate::outcome::{ErrorCode, RowError};
use crate::pipeline::hosted::{Link, Seat};
use crate::pipeline::load;
use crate::pipeline::meter::Meter;
use crate::prepare::sequences::{PromptMeta, draw_number, n_computed, submission};
use crate::prepare::{Preparer, Prompt, RowForm};
use crate::request::{Params, Request};
use crate::window::Class;
use anyhow::{Context, Result};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// See the module.
pub struct LiveModel {
    /// What its requests are prepared with.
    pub preparer: Arc<Preparer>,
    /// What its answers' bits depend on, in short.
    pub fingerprint: String,
    /// Times from a call to its first token.
    pub first_tokens: Arc<Times>,
    engine: Arc<EngineHandle>,
    routes: Arc<Routes>,
    /// By class: prompts on their way to the engine, which waits where its queue is full.
    feeds: [Sender<Work>; Class::ALL.len()],
    /// By class: calls that have not begun to run.
    n_queued: [Arc<AtomicUsize>; Class::ALL.len()],
    /// Most of them.
    max_queued: usize,
    /// What is open, and how long it will take.
    backlog: Arc<Backlog>,
    windows: Table,
    /// As many requests as are prepared at a time.
    preparing: Semaphore,
    next_id: AtomicU64,
    next_job: AtomicU64,
    stats: Arc<Mutex<EngineStats>>,
    /// True once the engine has ended, however it did.
    ended: watch::Receiver<bool>,
}

/// A call's prompts on their way to the engine.
struct Work {
    submissions: Vec<Submission>,
    cancelled: Arc<AtomicBool>,
    /// Its call counts as waiting while it is here, even if nobody wants it any more.
    _place: Arc<Place>,
}

/// Batches are to be done so much of their window before its end: a twentieth.
const DEADLINE_MARGIN: u32 = 20;

/// Too many calls wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy;

impl LiveModel {
    /// Loads a model, which rows may also call by these names, and starts its engine. A step takes about
    /// `limits.max_step` at most. `n_busy` counts the engines that share the machine just now.
    ///
    /// # Errors
    /// No such model, one that can't be used, or not enough memory.
    pub fn start(
        config: &ModelConfig,
        names: Vec<String>,
        defaults: Params,
        limits: &ServeLimits,
        n_busy: Arc<AtomicUsize>,
    ) -> Result<Self> {
        let open = load::open(config)?;
        let (tokenizer, mut model, memory) = (Arc::clone(&open.tokenizer), open.local.clone(), open.memory);
        model.names.extend(names);
        let fingerprint = open.fingerprint.to_string();
        let meter = Arc::new(Meter::default());
        let (runner, template) = load::load(open, config, &meter)?;
        let mut engine_config = EngineConfig::for_runner(&runner.limits());
        engine_config.max_running = config.max_running.min(engine_config.max_running);
        engine_config.max_waiting = 2 * engine_config.max_running;
        engine_config.share_floors = limits.windows.share_floors();
        let mut engine = Engine::new(engine_config, runner, Arc::clone(&tokenizer) as _)?;
        let step_limits = Arc::new(StepLimits::default());
        engine.limit_steps(Arc::clone(&step_limits));
        let pace = Pace::new(meter, limits.max_step, step_limits);
        let preparer = Preparer {
            form: RowForm::Requests,
            grammars: Grammars::new(Arc::clone(&tokenizer)),
            tokenizer,
            template,
            model,
            result_columns: Vec::new(),
            kept_columns: None,
            defaults,
            max_context: memory.max_context,
            max_context_reason: memory.max_context_reason,
        };
        let (routes, stats, backlog) = (Arc::new(Routes::default()), Arc::default(), Arc::new(Backlog::default()));
        let (end, ended) = watch::channel(false);
        let own = (Arc::clone(&routes), Arc::clone(&stats), Arc::clone(&backlog));
        let mut receiver = Receiving { routes: own.0, stats: own.1, backlog: own.2, end, pace, n_busy, is_busy: false };
        let engine = Arc::new(EngineHandle::start(engine, Box::new(move |step| receiver.take(step)))?);
        let [asap, standard, batch] = Class::ALL.map(|class| feed(class, Arc::clone(&engine)));
        Ok(Self {
            preparer: Arc::new(preparer),
            fingerprint,
            first_tokens: Arc::default(),
            engine,
            routes,
            feeds: [asap?, standard?, batch?],
            n_queued: Default::default(),
            max_queued: limits.max_queued,
            backlog,
            windows: limits.windows,
            preparing: Semaphore::new(config.n_threads),
            next_id: AtomicU64::new(0),
            next_job: AtomicU64::new(0),
            stats,
            ended,
        })
    }

    /// Renders, tokenizes and checks a request, away from the threads that serve connections.
    ///
    /// # Errors
    /// As a row's.
    pub async fn prepare(&self, request: Request, endpoint: Endpoint) -> Result<Vec<Prompt>, RowError> {
        let preparer = Arc::clone(&self.preparer);
        // Never closed; held until the request is prepared.
        let _permit = self.preparing.acquire().await;
        let prepared = tokio::task::spawn_blocking(move || preparer.prepare_request(&request, endpoint)).await;
        prepared.unwrap_or_else(|_| Err(RowError::row(ErrorCode::EngineError, "preparing the request failed")))
    }

    /// Counts a call in, if it can be done in its window.
    ///
    /// # Errors
    /// How long it would wait, if that is too long.
    pub fn admit(&self, prompts: &[Prompt], class: Class) -> Result<Ticket, Duration> {
        let sequences = prompts.iter().flat_map(|prompt| {
            let own = (prompt.tokens.len(), prompt.max_tokens);
            std::iter::repeat_n(own, n_computed(prompt))
        });
        self.backlog.enter(class, sequences, self.windows.of(class).ceiling)
    }

    /// Starts a call that was accepted so long ago: its prompts run side by side, in their class. `seed` is what it draws with
    /// where it names no seed.
    ///
    /// # Errors
    /// Too many calls of the class wait already.
    pub fn submit(&self, prompts: &[Prompt], class: Class, accepted_ago: Duration, seed: u64) -> Result<Flow, Busy> {
        let due = self.windows.due(class, self.engine.now_ms(), accepted_ago);
        let queued = &self.n_queued[class as usize];
        if queued.fetch_add(1, Relaxed) >= self.max_queued {
            queued.fetch_sub(1, Relaxed);
            return Err(Busy);
        }
        let metas: Vec<PromptMeta> = prompts.iter().map(|prompt| PromptMeta::new(prompt, || seed)).collect();
        let (mut submissions, mut sequences) = (Vec::new(), Vec::new());
        for (prompt_idx, (prompt, meta)) in prompts.iter().zip(&metas).enumerate() {
            for choice in 0..n_computed(prompt) {
                let id = self.next_id.fetch_add(1, Relaxed);
                // What the last call had in the cache is likely to be useful to the next.
                let keep_tokens = prompt.tokens.len() as u32;
                let draw = (meta.seed, draw_number(prompt, prompt_idx, choice));
                let mut next = submission(id, prompt, draw, keep_tokens);
                (next.class, next.stream, next.params.watch, next.due) = (class, class as u32, true, due);
                submissions.push(next);
                sequences.push((id, prompt_idx));
            }
        }
        let mailbox = Arc::new(Mailbox::new(sequences.len()));
        self.routes.open(&sequences, &mailbox);
        let cancelled = Arc::new(AtomicBool::new(false));
        let cancel = {
            let (engine, cancelled) = (Arc::clone(&self.engine), Arc::clone(&cancelled));
            Box::new(move |ids| {
                cancelled.store(true, SeqCst);
                engine.cancel_all(ids);
            })
        };
        let place = Arc::new(Place(Arc::clone(queued)));
        let flow = Flow::new(
            metas,
            sequences,
            mailbox,
            Arc::clone(&self.routes),
            (cancel, Arc::clone(&place), Arc::clone(&self.first_tokens)),
        );
        // Refused only by an engine that has ended; then its mailboxes are closed.
        drop(self.feeds[class as usize].send(Work { submissions, cancelled, _place: place }));
        Ok(flow)
    }

    /// A place for a job on the engine, in class batch. Its sequences' ends go to the link until the place is dropped.
    /// Their shares of the machine's time are added to `machine_ns`. It has so much time `left` of its window.
    pub fn seat(&self, link: &Link, machine_ns: &Arc<AtomicU64>, (left, window): (Duration, Duration)) -> JobPlace {
        // What is only just done in time is done too late when a row takes longer than others.
        let left = left.saturating_sub(window / DEADLINE_MARGIN);
        let number = self.next_job.fetch_add(1, Relaxed);
        self.routes.open_job(number, link, machine_ns);
        let seat = Seat {
            preparer: Arc::clone(&self.preparer),
            engine: Arc::clone(&self.engine),
            fingerprint: self.fingerprint.clone(),
            first_id: first_id(number),
            // Calls of each class have a stream of their own.
            stream: Class::ALL.len() as u32 + number as u32,
            due: Due::window(self.engine.now_ms() + left.as_millis() as i64, window.as_millis() as i64),
        };
        JobPlace { seat, routes: Arc::clone(&self.routes), number }
    }

    /// The engine's counters, as of its last step.
    pub fn stats(&self) -> EngineStats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls of a class that have not begun to run.
    pub fn n_queued(&self, class: Class) -> usize {
        self.n_queued[class as usize].load(Relaxed)
    }

    /// How long a call of the class would wait, if it came now.
    pub fn wait(&self, class: Class) -> Duration {
        self.backlog.wait(class)
    }

    /// Sequences that somebody waits for.
    pub fn n_open(&self) -> usize {
        self.routes.n_open()
    }

    /// Whether the engine has ended.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Returns when the engine has ended, which it does only by a fault.
    pub async fn ended(&self) {
        // An error means that the sender is gone: ended too.
        drop(self.ended.clone().wait_for(|ended| *ended).await);
    }
}

/// A job's place on an engine.
pub struct JobPlace {
    /// What the job needs of it.
    pub seat: Seat,
    routes: Arc<Routes>,
    number: u64,
}

impl Drop for JobPlace {
    fn drop(&mut self) {
        self.routes.close_job(self.number);
    }
}

/// A call's place among those that have not begun to run; given back when it is dropped.
pub(super) struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The receiving end of the engine, on its thread.
struct Receiving {
    routes: Arc<Routes>,
    stats: Arc<Mutex<EngineStats>>,
    backlog: Arc<Backlog>,
    end: watch::Sender<bool>,
    pace: Pace,
    /// Engines that have work, of all that share the machine.
    n_busy: Arc<AtomicUsize>,
    is_busy: bool,
}

impl Receiving {
    fn take(&mut self, step: Delivery<'_>) {
        let time = self.pace.note(step.stats);
        if step.stats.waiting > 0 {
            self.backlog.note_full_step(time, step.step.iter().map(|share| share.n_tokens).sum());
        }
        for done in step.finished.iter().filter(|done| !is_of_job(done.id)) {
            self.backlog.note_finished(done.tokens.len());
        }
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = *step.stats;
        let is_busy = !step.step.is_empty();
        match (self.is_busy, is_busy) {
            (false, true) => drop(self.n_busy.fetch_add(1, Relaxed)),
            (true, false) => drop(self.n_busy.fetch_sub(1, Relaxed)),
            _ => {}
        }
        self.is_busy = is_busy;
        // Engines that work at the same time share the machine.
        let machine_ns = time.as_nanos() as u64 / self.n_busy.load(Relaxed).max(1) as u64;
        self.routes.deliver(step, machine_ns);
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        // First, so that whoever finds a call closed finds out why.
        self.end.send_replace(true);
        self.routes.close();
    }
}

/// The thread that hands a class's prompts to the engine.
fn feed(class: Class, engine: Arc<EngineHandle>) -> Result<Sender<Work>> {
    let (sender, work): (_, Receiver<Work>) = channel();
    let thread = std::thread::Builder::new().name(format!("feed-{class:?}").to_lowercase());
    let run = move || {
        for Work { submissions, cancelled, .. } in work {
            let ids: Vec<u64> = submissions.iter().map(|next| next.id).collect();
            let wanted = submissions.into_iter().take_while(|_| !cancelled.load(SeqCst));
            if !engine.submit_all(wanted) {
                return;
            }
            // Whoever cancelled it before it was there cancelled nothing.
            if cancelled.load(SeqCst) {
                engine.cancel_all(ids);
            }
        }
    };
    thread.spawn(run).context("cannot start the thread that feeds the engine")?;
    Ok(sender)
}
