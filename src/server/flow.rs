//! What comes of one call, from the engine's thread to the task that answers. Knows nothing of HTTP. Invariants: what is
//! gained and not yet read is joined, so that it takes no more memory than the answer; a flow that is dropped cancels
//! what is left of it.

use super::backlog::{BatchTicket, Ticket};
use super::live::Place;
use super::observed::Observed;
use super::residency::Lease;
use super::spans::Times;
use crate::engine::handle::Delivery;
use crate::engine::{Finished, Progress, Scheduled, SeqLogprob};
use crate::outcome::{Completion, ErrorCode, RowError, Usage};
use crate::pipeline::hosted::Link;
use crate::prepare::sequences::PromptMeta;
use crate::text::tokenizer::Tokenizer;
use crate::window::Class;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// What one sequence gained since it was last looked at.
#[derive(Debug, Default)]
pub struct Gained {
    /// Its place among the call's sequences.
    pub sequence: usize,
    /// Tokens drawn.
    pub tokens: Vec<u32>,
    /// Text.
    pub text: String,
    /// As `Finished::logprobs`.
    pub logprobs: Vec<SeqLogprob>,
    cached_tokens: u32,
    finished: Option<Finished>,
}

/// Where the engine's thread leaves what a call gained.
pub(super) struct Mailbox {
    pending: Mutex<Pending>,
    bell: Notify,
    /// The call's share of the machine's time.
    machine_ns: AtomicU64,
    /// When something came of it.
    times: Mutex<Times>,
    /// Its part of the work that is open, until all of its sequences have finished; and how many have not.
    work: Mutex<(Option<Ticket>, usize)>,
}

struct Pending {
    /// By sequence.
    gained: Vec<Option<Gained>>,
    is_closed: bool,
}

impl Mailbox {
    pub(super) fn new(n_sequences: usize) -> Self {
        let gained = (0..n_sequences).map(|_| None).collect();
        let (pending, work) = (Mutex::new(Pending { gained, is_closed: false }), Mutex::new((None, n_sequences)));
        Self { pending, bell: Notify::new(), machine_ns: AtomicU64::new(0), times: Mutex::default(), work }
    }

    fn work<T>(&self, change: impl FnOnce(&mut (Option<Ticket>, usize)) -> T) -> T {
        change(&mut self.work.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn times(&self, change: impl FnOnce(&mut Times)) {
        change(&mut self.times.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// One of its sequences has finished.
    fn note_finished(&self, now: Instant) {
        self.times(|times| times.ended = Some(now));
        let done = self.work(|(ticket, n_open)| {
            *n_open = n_open.saturating_sub(1);
            ticket.take_if(|_| *n_open == 0)
        });
        drop(done);
    }

    fn update(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        self.bell.notify_one();
    }
}

impl Pending {
    fn of(&mut self, sequence: usize) -> &mut Gained {
        self.gained[sequence].get_or_insert_with(|| Gained { sequence, ..Gained::default() })
    }

    fn note(&mut self, sequence: usize, progress: Progress) {
        let gained = self.of(sequence);
        gained.tokens.extend(progress.tokens);
        gained.text.push_str(&progress.text);
        gained.logprobs.extend(progress.logprobs);
        gained.cached_tokens = progress.cached_tokens;
    }
}

/// Sequences from this name on are those of jobs: each has so many names as its shift says.
const JOB_IDS: u64 = 1 << 61;
const JOB_SHIFT: u32 = 40;

/// Whether a sequence is of a job.
pub(super) fn is_of_job(id: u64) -> bool {
    id >= JOB_IDS
}

/// The job that a sequence is of.
fn job_of(id: u64) -> u64 {
    (id - JOB_IDS) >> JOB_SHIFT
}

/// The first name of a job's sequences.
pub(super) fn first_id(job: u64) -> u64 {
    JOB_IDS + (job << JOB_SHIFT)
}

/// Whose each running sequence is.
#[derive(Default)]
pub(super) struct Routes(Mutex<Table>);

#[derive(Default)]
struct Table {
    /// By the engine's name of the sequence.
    routes: HashMap<u64, (Arc<Mailbox>, usize)>,
    /// By number.
    jobs: HashMap<u64, Job>,
    is_closed: bool,
}

/// A job on the engine.
struct Job {
    link: Link,
    /// Where its share of the machine's time is added up.
    machine_ns: Arc<AtomicU64>,
    /// Its part of the work that is open.
    ticket: Option<Arc<BatchTicket>>,
    /// When it is due: unix seconds, and milliseconds of the engine's clock.
    due: Option<(u64, i64)>,
}

impl Routes {
    fn with<T>(&self, work: impl FnOnce(&mut Table) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn open(&self, sequences: &[(u64, usize)], mailbox: &Arc<Mailbox>) {
        let is_closed = self.with(|table| {
            let routes = sequences.iter().enumerate().map(|(place, &(id, _))| (id, (Arc::clone(mailbox), place)));
            table.routes.extend(routes);
            table.is_closed
        });
        if is_closed {
            mailbox.update(|pending| pending.is_closed = true);
        }
    }

    /// Sequences of a job's are its own from now on. It is `due` then, in unix seconds and by the engine's clock: by that clock,
    /// what this gives. Those that are due in the same second are due in the same millisecond, or they would not take turns.
    pub(super) fn open_job(
        &self,
        number: u64,
        link: &Link,
        (machine_ns, ticket): (&Arc<AtomicU64>, Option<Arc<BatchTicket>>),
        due: Option<(u64, i64)>,
    ) -> i64 {
        let (is_closed, due) = self.with(|table| {
            let same = table.jobs.values().filter_map(|other| other.due).find(|other| due.is_some_and(|own| own.0 == other.0));
            let due = same.or(due);
            table.jobs.insert(number, Job { link: link.clone(), machine_ns: Arc::clone(machine_ns), ticket, due });
            (table.is_closed, due)
        });
        if is_closed {
            link.engine_ended();
        }
        due.map_or(0, |(_, at_ms)| at_ms)
    }

    /// The job has ended.
    pub(super) fn close_job(&self, number: u64) {
        self.with(|table| table.jobs.remove(&number));
    }

    /// Hands on what came of a step that began then and has just ended, of its share of the machine's time, and of how many tokens it
    /// computed of rows that had left by then.
    pub(super) fn deliver(&self, step: Delivery<'_>, began: Instant, (machine_ns, n_unused): (u64, u64)) {
        let now = Instant::now();
        let Delivery { finished, progress, step, stats, .. } = step;
        let (mut of_jobs, finished): (Vec<Finished>, Vec<Finished>) = finished.into_iter().partition(|done| done.id >= JOB_IDS);
        self.with(|table| {
            table.share_out(step, began, (machine_ns, n_unused));
            while let Some(last) = of_jobs.last().map(|done| job_of(done.id)) {
                // Those of one job stand together.
                let first = of_jobs.iter().rposition(|done| job_of(done.id) != last).map_or(0, |other| other + 1);
                let own = of_jobs.split_off(first);
                if let Some(job) = table.jobs.get(&last) {
                    job.link.step(own, *stats);
                }
            }
            for next in progress {
                if let Some((mailbox, sequence)) = table.routes.get(&next.id) {
                    mailbox.times(|times| times.first_token = times.first_token.or((!next.tokens.is_empty()).then_some(now)));
                    mailbox.update(|pending| pending.note(*sequence, next));
                }
            }
            for done in finished {
                if let Some((mailbox, sequence)) = table.routes.remove(&done.id) {
                    mailbox.note_finished(now);
                    mailbox.update(|pending| pending.of(sequence).finished = Some(done));
                }
            }
        });
    }

    /// Nothing will come any more.
    pub(super) fn close(&self) {
        self.with(|table| {
            table.is_closed = true;
            for (mailbox, _) in table.routes.values() {
                mailbox.update(|pending| pending.is_closed = true);
            }
            table.jobs.values().for_each(|job| job.link.engine_ended());
        });
    }

    pub(super) fn n_open(&self) -> usize {
        self.with(|table| table.routes.len())
    }

    /// Forgets a call's sequences; those that had not finished.
    fn forget(&self, sequences: &[(u64, usize)]) -> Vec<u64> {
        self.with(|table| sequences.iter().map(|&(id, _)| id).filter(|id| table.routes.remove(id).is_some()).collect())
    }
}

impl Table {
    /// Gives everybody who had tokens in a step that part of its time; the parts are the whole, but for that of rows that had left,
    /// which is nobody's.
    fn share_out(&self, step: &[Scheduled], began: Instant, (machine_ns, n_unused): (u64, u64)) {
        let n_tokens = step.iter().map(|share| share.n_tokens).sum::<usize>() as u64 + n_unused;
        let (mut before, mut n_before) = (0, 0);
        for share in step {
            n_before += share.n_tokens;
            let until = (u128::from(machine_ns) * n_before as u128 / u128::from(n_tokens)) as u64;
            let part = until - before;
            before = until;
            if share.id >= JOB_IDS {
                if let Some(job) = self.jobs.get(&job_of(share.id)) {
                    job.machine_ns.fetch_add(part, Relaxed);
                    job.ticket.iter().for_each(|ticket| ticket.spend(share.n_tokens));
                }
            } else if let Some((mailbox, _)) = self.routes.get(&share.id) {
                mailbox.machine_ns.fetch_add(part, Relaxed);
                mailbox.times(|times| _ = times.began.get_or_insert(began));
                mailbox.work(|(ticket, _)| ticket.iter_mut().for_each(|ticket| ticket.spend(share.n_tokens)));
            }
        }
    }
}

/// Called with the sequences that are not wanted any more.
pub(super) type Cancel = Box<dyn Fn(Vec<u64>) + Send + Sync>;

/// One call at work. Dropping it cancels what has not finished.
pub struct Flow {
    metas: Vec<PromptMeta>,
    /// (the engine's name, the prompt that it completes)
    sequences: Vec<(u64, usize)>,
    /// By sequence, when it has.
    finished: Vec<Option<Finished>>,
    mailbox: Arc<Mailbox>,
    routes: Arc<Routes>,
    cancel: Cancel,
    /// Until it begins to run.
    place: Option<Arc<Place>>,
    submitted: Instant,
    first_token: Option<Duration>,
    /// Where that is noted, and for which class.
    seen: (Arc<Observed>, Class),
    /// Tokens that were told, once for each of the choices that have them: as they are charged when the answer is whole.
    n_told: u64,
    /// By prompt: whether anything came of it.
    has_begun: Vec<bool>,
    has_failed: bool,
    /// Its engine stays where it is until all of it has finished, or was cancelled.
    lease: Option<Lease>,
}

/// Why a call has no completion.
const ENGINE_ENDED: &str = "the engine has stopped";

impl Flow {
    pub(super) fn new(
        metas: Vec<PromptMeta>,
        sequences: Vec<(u64, usize)>,
        mailbox: Arc<Mailbox>,
        (routes, lease): (Arc<Routes>, Lease),
        (cancel, place): (Cancel, Arc<Place>),
        seen: (Arc<Observed>, Class),
    ) -> Self {
        let finished = sequences.iter().map(|_| None).collect();
        let (place, submitted, has_begun) = (Some(place), Instant::now(), vec![false; metas.len()]);
        Self {
            metas,
            sequences,
            finished,
            mailbox,
            routes,
            cancel,
            place,
            submitted,
            first_token: None,
            seen,
            n_told: 0,
            has_begun,
            has_failed: false,
            lease: Some(lease),
        }
    }

    /// What it counts as among the work that is open, from now on.
    pub(super) fn count_as(&self, ticket: Option<Ticket>) {
        self.mailbox.work(|(held, n_open)| *held = ticket.filter(|_| *n_open > 0));
    }

    /// What is known of each prompt.
    pub fn prompts(&self) -> &[PromptMeta] {
        &self.metas
    }

    /// The completions that a sequence stands for, by their index in the answer: one that is computed once may be
    /// several.
    pub fn choices_of(&self, sequence: usize) -> std::ops::Range<usize> {
        let prompt = self.sequences[sequence].1;
        let before: usize = self.metas[..prompt].iter().map(|meta| meta.n_choices).sum();
        let first = self.sequences.iter().position(|&(_, other)| other == prompt).unwrap_or(sequence);
        let n_computed = self.sequences.iter().filter(|&&(_, other)| other == prompt).count();
        if n_computed == 1 {
            before..before + self.metas[prompt].n_choices
        } else {
            before + sequence - first..before + sequence - first + 1
        }
    }

    /// The prompt that a sequence completes.
    pub fn prompt_of(&self, sequence: usize) -> &PromptMeta {
        &self.metas[self.sequences[sequence].1]
    }

    /// The call's share of the machine's time, so far.
    pub fn machine_ns(&self) -> u64 {
        self.mailbox.machine_ns.load(Relaxed)
    }

    /// What was told of it, if it is whole or its caller has broken it off; nothing if the engine failed.
    pub fn told(&self) -> Option<Usage> {
        let begun = self.metas.iter().zip(&self.has_begun).filter(|&(_, &has_begun)| has_begun);
        let usage = begun.fold(Usage::default(), |sum, (meta, _)| sum.plus(meta.usage(&[])));
        (self.n_told > 0 && !self.has_failed).then_some(Usage { completion_tokens: self.n_told as u32, ..usage })
    }

    /// What was computed of it by now for a caller that waits for all of it; nothing before its first token, or if the engine
    /// failed.
    pub fn drawn(&mut self) -> Option<Usage> {
        let (gained, _) = self.gained();
        self.take(gained).ok()?;
        self.told()
    }

    /// What its prompts come to.
    pub(super) fn prompt_usage(&self) -> Usage {
        self.metas.iter().fold(Usage::default(), |sum, meta| sum.plus(meta.usage(&[])))
    }

    /// Whether the engine failed, or one of its sequences can't be completed.
    pub(super) fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// When something came of it.
    pub(super) fn times(&self) -> Times {
        *self.mailbox.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all of it has come.
    pub fn is_whole(&self) -> bool {
        self.finished.iter().all(Option::is_some)
    }

    /// Time from the call to its first token, once there is one.
    pub fn first_token(&self) -> Option<Duration> {
        self.first_token
    }

    /// Waits for more; `None` when everything has finished and was told.
    ///
    /// # Errors
    /// The engine stopped, or a sequence can't be completed.
    pub async fn next(&mut self) -> Result<Option<Vec<Gained>>, RowError> {
        loop {
            if self.finished.iter().all(Option::is_some) {
                self.lease = None;
                return Ok(None);
            }
            let (gained, is_closed) = self.gained();
            if gained.is_empty() {
                if is_closed {
                    self.has_failed = true;
                    return Err(RowError::row(ErrorCode::EngineError, ENGINE_ENDED));
                }
                self.mailbox.bell.notified().await;
                continue;
            }
            return self.take(gained).map(Some);
        }
    }

    /// What the engine has left since the last time, and whether it ended.
    fn gained(&self) -> (Vec<Gained>, bool) {
        let mut pending = self.mailbox.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let gained = pending.gained.iter_mut().filter_map(Option::take).collect();
        (gained, pending.is_closed)
    }

    /// Takes in what was gained.
    fn take(&mut self, mut gained: Vec<Gained>) -> Result<Vec<Gained>, RowError> {
        self.place = None;
        if self.first_token.is_none() && gained.iter().any(|next| !next.tokens.is_empty()) {
            let time = self.submitted.elapsed();
            let (seen, class) = &self.seen;
            seen.first_tokens[*class as usize].note(time.as_secs_f64());
            self.first_token = Some(time);
        }
        for next in &mut gained {
            self.n_told += (next.tokens.len() * self.choices_of(next.sequence).len()) as u64;
            let prompt = self.sequences[next.sequence].1;
            self.has_begun[prompt] = true;
            // A prompt counts once, and so does what its first sequence found in the cache.
            if self.sequences[..next.sequence].iter().all(|&(_, other)| other != prompt) {
                self.metas[prompt].cached_tokens = self.metas[prompt].cached_tokens.max(next.cached_tokens);
            }
            if let Some(finished) = next.finished.take() {
                if let Some(why) = &finished.broken {
                    self.has_failed = true;
                    return Err(RowError::row(ErrorCode::EngineError, why.clone()));
                }
                self.finished[next.sequence] = Some(finished);
            }
        }
        Ok(gained)
    }

    /// Waits for all of it.
    ///
    /// # Errors
    /// As [`Flow::next`].
    pub async fn complete(&mut self, tokenizer: &Tokenizer) -> Result<Completion, RowError> {
        while self.next().await?.is_some() {}
        Ok(self.completion(tokenizer))
    }

    /// What has finished, as an answer; of use once [`Flow::next`] gave `None`.
    pub fn completion(&self, tokenizer: &Tokenizer) -> Completion {
        let mut usage = Usage::default();
        let mut choices = Vec::new();
        for (prompt, meta) in self.metas.iter().enumerate() {
            let own = self.sequences.iter().zip(&self.finished).filter(|((_, of), _)| *of == prompt);
            let finished: Vec<Finished> = own.filter_map(|(_, finished)| finished.clone()).collect();
            usage = usage.plus(meta.usage(&finished));
            choices.extend(meta.choices(&finished, tokenizer));
        }
        Completion { choices, usage, seed: self.metas.iter().find_map(|meta| meta.seed) }
    }

    /// What a sequence came to, if it has finished.
    pub fn finished(&self, sequence: usize) -> Option<&Finished> {
        self.finished[sequence].as_ref()
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let unwanted = self.routes.forget(&self.sequences);
        if !unwanted.is_empty() {
            (self.cancel)(unwanted);
        }
    }
}
