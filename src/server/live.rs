//! A model that is served: its tokenizer, template and compiled grammars, which are always there, and its engine's thread,
//! which is there while it is loaded. Knows nothing of HTTP or of any wire form, nor when it is loaded (`residency`). Invariants:
//! a call is answered by exactly the tokens that `valar run` gives the same request; a caller that goes away leaves nothing
//! behind; memory held for a caller that reads slowly is bounded by its answer; what is loaded again has the same bits.

use super::backlog::{Backlog, BatchTicket, Full, Ticket};
use super::fair::Fair;
use super::flow::{Cancel, Flow, Mailbox, Routes, first_id};
use super::models::now;
use super::observed::Observed;
use super::pace::Pace;
use super::receiving::Receiving;
use super::residency::Lease;
use super::windows::Table;
use crate::config::ModelConfig;
use crate::config::serve::ServeLimits;
use crate::engine::handle::EngineHandle;
use crate::engine::{Due, Engine, EngineConfig, EngineStats, Keep, StepLimits, Submission};
use crate::format::openai::Endpoint;
use crate::grammar::Grammars;
use crate::outcome::{ErrorCode, RowError};
use crate::pipeline::hosted::{Link, Seat};
use crate::pipeline::load::{self, MemoryPlan, OpenModel};
use crate::pipeline::meter::Meter;
use crate::prepare::sequences::{PromptMeta, draw_number, n_computed, submission};
use crate::prepare::{Preparer, Prompt, RowForm};
use crate::request::{Params, Request};
use crate::window::Class;
use crate::window::turns::Share;
use anyhow::{Context, Result, ensure};
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
    /// How its calls fare.
    pub observed: Arc<Observed>,
    /// Its place among all that are served.
    pub(super) number: usize,
    config: ModelConfig,
    /// How its memory is shared out, each time that it is loaded.
    memory: MemoryPlan,
    /// Steps are kept to that.
    max_step: Duration,
    /// As `ServeLimits::kept_percent`.
    kept_percent: u8,
    /// Engines that have work, of all that share the machine.
    n_busy: Arc<AtomicUsize>,
    faults: Arc<Faults>,
    routes: Arc<Routes>,
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
    stats: Arc<Mutex<Stats>>,
}

/// The model whose engine has failed, if one has.
pub(super) type Faults = watch::Sender<Option<String>>;

/// What engines have counted.
#[derive(Debug, Default)]
pub(super) struct Stats {
    /// Those that were there before.
    pub(super) before: EngineStats,
    pub(super) now: EngineStats,
}

/// A loaded model's engine.
pub struct AtWork {
    engine: Arc<EngineHandle>,
    /// By class: prompts on their way to the engine, which waits where its queue is full.
    feeds: [Sender<Work>; Class::ALL.len()],
    /// It is to end: that is no fault.
    is_retired: Arc<AtomicBool>,
}

/// What all models of a server share.
pub(super) struct Shared<'a> {
    pub(super) defaults: &'a Params,
    pub(super) limits: &'a ServeLimits,
    /// Engines that have work.
    pub(super) n_busy: &'a Arc<AtomicUsize>,
    pub(super) faults: &'a Arc<Faults>,
}

/// A call's prompts on their way to the engine.
struct Work {
    share: Share,
    submissions: Vec<Submission>,
    cancelled: Arc<AtomicBool>,
    /// Its call counts as waiting while it is here, even if nobody wants it any more.
    _place: Arc<Place>,
}

/// What a call's prompts have in common.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// How soon it is wanted.
    pub class: Class,
    /// It was accepted so long ago.
    pub accepted_ago: Duration,
    /// As `windows::Table::due` takes it.
    pub credit_ms: i64,
    /// What it draws with where it names no seed.
    pub seed: u64,
    /// Whose KV it finds, and how long its own is kept.
    pub keep: Keep,
    /// Whose turn it takes.
    pub share: Share,
}

/// Too many calls wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy;

impl LiveModel {
    /// Opens a model, which rows may also call by these names; [`LiveModel::put`] puts it to work.
    ///
    /// # Errors
    /// No such model, one that can't be used, or one that its memory does not hold.
    pub(super) fn open(
        number: usize,
        config: &ModelConfig,
        names: Vec<String>,
        shared: &Shared<'_>,
    ) -> Result<(Self, OpenModel)> {
        let open = load::open(config)?;
        let (tokenizer, mut model, memory) = (Arc::clone(&open.tokenizer), open.local.clone(), open.memory);
        model.names.extend(names);
        let preparer = Preparer {
            form: RowForm::Requests,
            grammars: Arc::new(Grammars::new(Arc::clone(&tokenizer))),
            tokenizer,
            template: open.template.clone(),
            model,
            result_columns: Vec::new(),
            kept_columns: None,
            defaults: shared.defaults.clone(),
            max_context: memory.max_context,
            max_context_reason: memory.max_context_reason,
        };
        let limits = shared.limits;
        let live = Self {
            preparer: Arc::new(preparer),
            fingerprint: open.fingerprint.to_string(),
            observed: Arc::new(Observed::new(limits.windows.targets())),
            number,
            config: config.clone(),
            memory,
            max_step: limits.max_step,
            n_busy: Arc::clone(shared.n_busy),
            faults: Arc::clone(shared.faults),
            routes: Arc::default(),
            n_queued: Default::default(),
            max_queued: limits.max_queued,
            backlog: Arc::default(),
            windows: limits.windows.clone(),
            kept_percent: limits.kept_percent,
            preparing: Semaphore::new(config.n_threads),
            next_id: AtomicU64::new(0),
            next_job: AtomicU64::new(0),
            stats: Arc::default(),
        };
        Ok((live, open))
    }

    /// What it takes when it is loaded: bytes.
    pub fn n_bytes(&self) -> u64 {
        self.memory.n_bytes
    }

    /// Loads it again, from the files that it was opened from.
    ///
    /// # Errors
    /// They can't be read, or are not the same any more.
    pub(super) fn load(&self) -> Result<AtWork> {
        let name = self.preparer.model.path.to_string_lossy().into_owned();
        // What a GPU has free differs a little from time to time; the model's share of it is to be the same.
        let (memory_bytes, memory_is_given) = match self.config.memory_is_given {
            false if self.memory.n_bytes > 0 => (self.memory.n_bytes, true),
            given => (self.config.memory_bytes, given),
        };
        let open = load::open(&ModelConfig { name, quiet: true, memory_bytes, memory_is_given, ..self.config.clone() })?;
        let is_same = open.fingerprint.to_string() == self.fingerprint && open.memory == self.memory;
        ensure!(is_same, "its files have changed since the server started; start it again to serve what is there now");
        self.put(open)
    }

    /// Puts what was opened into memory, and starts its engine. A step takes about `max_step` at most.
    ///
    /// # Errors
    /// A tensor that the device can't take.
    pub(super) fn put(&self, open: OpenModel) -> Result<AtWork> {
        let meter = Arc::new(Meter::default());
        let (runner, _) = load::load(open, &self.config, &meter)?;
        let mut engine_config = EngineConfig::for_runner(&runner.limits());
        engine_config.max_running = self.config.max_running.min(engine_config.max_running);
        engine_config.max_waiting = 2 * engine_config.max_running;
        engine_config.share_floors = self.windows.share_floors();
        engine_config.max_kept_blocks = runner.limits().n_blocks * usize::from(self.kept_percent) / 100;
        engine_config.asap_reserve = self.windows.asap_reserve();
        let mut engine = Engine::new(engine_config, runner, Arc::clone(&self.preparer.tokenizer) as _)?;
        let step_limits = Arc::new(StepLimits::default());
        engine.limit_steps(Arc::clone(&step_limits));
        let is_retired = Arc::<AtomicBool>::default();
        let mut receiver = Receiving {
            routes: Arc::clone(&self.routes),
            stats: Arc::clone(&self.stats),
            backlog: Arc::clone(&self.backlog),
            pace: Pace::new(meter, self.max_step, step_limits),
            seen: Arc::clone(&self.observed),
            n_busy: Arc::clone(&self.n_busy),
            is_busy: false,
            is_retired: Arc::clone(&is_retired),
            fault: (self.preparer.model.name.clone(), Arc::clone(&self.faults)),
        };
        let engine = Arc::new(EngineHandle::start(engine, Box::new(move |step| receiver.take(step)))?);
        let [asap, standard, batch] = Class::ALL.map(|class| feed(class, Arc::clone(&engine)));
        Ok(AtWork { engine, feeds: [asap?, standard?, batch?], is_retired })
    }

    /// Ends an engine that nobody uses; when this returns, it is out of memory.
    ///
    /// # Errors
    /// Why it ended before that.
    pub(super) fn stop(&self, work: &AtWork) -> Result<()> {
        work.is_retired.store(true, SeqCst);
        let stopped = work.engine.stop();
        let mut stats = self.stats();
        (stats.blocks_used, stats.blocks_kept, stats.blocks_total) = (0, 0, 0);
        (stats.running, stats.waiting) = (0, 0);
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = Stats { before: stats, now: EngineStats::default() };
        stopped
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
    /// It would wait too long.
    pub fn admit(&self, prompts: &[Prompt], class: Class) -> Result<Ticket, Full> {
        let sequences = prompts.iter().flat_map(|prompt| {
            let own = (prompt.tokens.len(), prompt.max_tokens);
            std::iter::repeat_n(own, n_computed(prompt))
        });
        let ticket = self.backlog.enter(class, sequences, self.windows.of(class).ceiling)?;
        self.observed.calls[class as usize].note_accepted();
        Ok(ticket)
    }

    /// Counts a call in that was accepted before: about so many tokens of its prompt, and the most of its answer.
    pub fn count_in(&self, class: Class, asked: (usize, u32)) -> Ticket {
        self.backlog.count_in(class, asked)
    }

    /// A place among the calls of a class that have not begun to run.
    ///
    /// # Errors
    /// Too many wait already.
    pub(super) fn queue(&self, class: Class) -> Result<Place, Busy> {
        let queued = &self.n_queued[class as usize];
        let place = Place(Arc::clone(queued));
        // Given back at once if it is one too many.
        if queued.fetch_add(1, Relaxed) >= self.max_queued { Err(Busy) } else { Ok(place) }
    }

    /// Starts a call: its prompts run side by side, in their class.
    pub(super) fn submit(&self, (lease, place): (Lease, Place), prompts: &[Prompt], terms: Terms) -> Flow {
        let Terms { class, accepted_ago, credit_ms, seed, keep, share } = terms;
        let engine = Arc::clone(&lease.work.engine);
        let due = self.windows.due(class, engine.now_ms(), accepted_ago, credit_ms);
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
                (next.params.keep, next.params.share) = (Some(keep), share);
                submissions.push(next);
                sequences.push((id, prompt_idx));
            }
        }
        let mailbox = Arc::new(Mailbox::new(sequences.len()));
        self.routes.open(&sequences, &mailbox);
        let cancelled = Arc::new(AtomicBool::new(false));
        let cancel: Cancel = {
            let cancelled = Arc::clone(&cancelled);
            Box::new(move |ids| {
                cancelled.store(true, SeqCst);
                engine.cancel_all(ids);
            })
        };
        let place = Arc::new(place);
        // Refused only by an engine that has ended; then its mailboxes are closed.
        drop(lease.work.feeds[class as usize].send(Work { share, submissions, cancelled, _place: Arc::clone(&place) }));
        let seen = (Arc::clone(&self.observed), class);
        Flow::new(metas, sequences, mailbox, (Arc::clone(&self.routes), lease), (cancel, place), seen)
    }

    /// A place for a job on the engine, in class batch. Its sequences' ends go to the link until the place is dropped.
    /// Their shares of the machine's time are added to `machine_ns`, and what they do is taken from `ticket`. It is `due` then (unix
    /// seconds), in a window of so many seconds. Without a lease it can only be ended.
    pub(super) fn seat(
        &self,
        lease: Option<Lease>,
        link: &Link,
        (machine_ns, ticket): (&Arc<AtomicU64>, Option<Arc<BatchTicket>>),
        (due, window_s, share): (u64, u64, Share),
    ) -> JobPlace {
        let number = self.next_job.fetch_add(1, Relaxed);
        let engine = lease.as_ref().map(|lease| Arc::clone(&lease.work.engine));
        let left_ms = (due as i64).saturating_sub(now() as i64).saturating_mul(1000);
        let own = engine.as_ref().map(|engine| (due, engine.now_ms().saturating_add(left_ms)));
        let at_ms = self.routes.open_job(number, link, (machine_ns, ticket), own);
        let seat = Seat {
            preparer: Arc::clone(&self.preparer),
            engine,
            fingerprint: self.fingerprint.clone(),
            first_id: first_id(number),
            // Calls of each class have a stream of their own.
            stream: Class::ALL.len() as u32 + number as u32,
            due: Due::window(at_ms, 1000 * window_s as i64),
            share,
        };
        JobPlace { seat, routes: Arc::clone(&self.routes), number, _lease: lease }
    }

    /// The engine's counters, as of its last step.
    pub fn stats(&self) -> EngineStats {
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.now.after(stats.before)
    }

    /// Calls of a class that have not begun to run.
    pub fn n_queued(&self, class: Class) -> usize {
        self.n_queued[class as usize].load(Relaxed)
    }

    /// How long a call of the class would wait, if it came now.
    pub fn wait(&self, class: Class) -> Duration {
        self.backlog.wait(class)
    }

    /// The work that is open.
    pub fn backlog(&self) -> &Arc<Backlog> {
        &self.backlog
    }

    /// Sequences that somebody waits for.
    pub fn n_open(&self) -> usize {
        self.routes.n_open()
    }
}

/// A job's place on an engine.
pub struct JobPlace {
    /// What the job needs of it.
    pub seat: Seat,
    routes: Arc<Routes>,
    number: u64,
    _lease: Option<Lease>,
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

/// The call whose turn it is; waits for one. `None`: none will come.
fn next(work: &Receiver<Work>, waiting: &mut Fair<Work>) -> Option<Work> {
    loop {
        for new in work.try_iter() {
            waiting.push(new.share, new);
        }
        waiting.skip(|next| !next.cancelled.load(SeqCst));
        if let Some(next) = waiting.pop() {
            return Some(next);
        }
        let new = work.recv().ok()?;
        waiting.push(new.share, new);
    }
}

/// The thread that hands a class's prompts to the engine, of several keys by turns.
fn feed(class: Class, engine: Arc<EngineHandle>) -> Result<Sender<Work>> {
    let (sender, work): (_, Receiver<Work>) = channel();
    let thread = std::thread::Builder::new().name(format!("feed-{class:?}").to_lowercase());
    let run = move || {
        let mut waiting = Fair::default();
        while let Some(Work { submissions, cancelled, .. }) = next(&work, &mut waiting) {
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
