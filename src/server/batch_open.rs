//! The batches that are open: how far each is, and how it is told to end early or to leave its place. What they do is in
//! `batch_runs`. Invariant: the first reason to end is the one that it ends for.

use super::backlog::BatchTicket;
use super::budgets::Spending;
use super::places::Places;
use super::prices::Price;
use crate::pipeline::hosted::{Ending, Link, Totals};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, oneshot};

/// The batches that are open.
pub struct Batches {
    open: Mutex<HashMap<String, Arc<Open>>>,
    pub(super) places: Places,
    /// For whoever checks lines.
    pub(super) checking: Semaphore,
    is_closed: AtomicBool,
}

impl Default for Batches {
    fn default() -> Self {
        let (open, places) = (Mutex::default(), Places::default());
        Self { open, places, checking: Semaphore::new(1), is_closed: AtomicBool::new(false) }
    }
}

/// A batch that is open.
#[derive(Default)]
pub(super) struct Open {
    progress: Mutex<Progress>,
    /// Its share of the machine's time that is in no book yet.
    pub(super) machine_ns: Arc<AtomicU64>,
    /// Its part of the work that is open.
    ticket: Mutex<Option<Arc<BatchTicket>>>,
    /// What it costs, until it is charged, whether or not its job runs.
    spending: Mutex<Option<Arc<Spending>>>,
    control: Mutex<Control>,
}

/// How far a batch is.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// (completed, failed) of its rows.
    counts: (u64, u64),
    /// The same with their tokens, once its job has run since the server started.
    totals: Option<Totals>,
    /// Since when its job runs, and how many of its rows were done before.
    since: Option<(Instant, u64)>,
}

#[derive(Default)]
struct Control {
    ending: Option<Ending>,
    /// To its job, while it runs.
    link: Option<Link>,
    /// To its wait for a place and an engine.
    wake: Option<oneshot::Sender<()>>,
    /// Whether it should give its place back, and wait.
    must_leave: bool,
    /// What is said of its key's budget, as long as it waits for that.
    waits_for_budget: Option<String>,
}

/// What a batch is called that costs what it may.
pub(super) const OVER_COST: &str = "max_cost_reached";
/// What one is called that waits until its key's budget has some again.
const PAUSED: &str = "paused_budget";

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Progress {
    fn n_done(&self) -> u64 {
        self.counts.0 + self.counts.1
    }

    /// Of `n_rows`, by the speed of those that were done since its job runs.
    fn shown(&self, n_rows: u64, (price, paused): (Option<Price>, Option<String>), now: Instant) -> Value {
        let eta_s = self.since.and_then(|(since, n_before)| {
            let n_here = self.n_done().checked_sub(n_before).filter(|&n| n > 0)?;
            let a_row = now.saturating_duration_since(since).as_secs_f64() / n_here as f64;
            Some((a_row * n_rows.saturating_sub(self.n_done()) as f64).ceil() as u64)
        });
        let tokens_done = self.totals.map(|totals| totals.prompt_tokens + totals.completion_tokens);
        let cost = self.totals.zip(price).map(|(totals, price)| Spending::cost(price, totals).to_string());
        let paused = paused.map(|message| json!({"code": PAUSED, "message": message}));
        json!({"tokens_done": tokens_done, "eta_s": eta_s, "cost": cost, "paused": paused})
    }
}

impl Open {
    /// With its part of the work that is open, if it was just accepted.
    fn new(ticket: Option<Arc<BatchTicket>>) -> Self {
        Self { ticket: Mutex::new(ticket), ..Self::default() }
    }

    /// Its part of the work that is open.
    pub(super) fn ticket(&self) -> Option<Arc<BatchTicket>> {
        lock(&self.ticket).clone()
    }

    /// What it costs, if anything limits that and its job has run since the server started.
    pub(super) fn spending(&self) -> Option<Arc<Spending>> {
        lock(&self.spending).clone()
    }

    /// The same, before its job runs.
    pub(super) fn spend(&self, new: impl FnOnce() -> Option<Spending>) -> Option<Arc<Spending>> {
        let mut spending = lock(&self.spending);
        if spending.is_none() {
            *spending = new().map(Arc::new);
        }
        spending.clone()
    }

    /// Counts it in as work that is open.
    pub(super) fn count_as(&self, ticket: BatchTicket) {
        *lock(&self.ticket) = Some(Arc::new(ticket));
    }

    /// (completed, failed) of its rows.
    pub(super) fn counts(&self) -> (u64, u64) {
        lock(&self.progress).counts
    }

    /// So many of its rows were completed, or have failed, before its job runs.
    pub(super) fn note_counts(&self, counts: (u64, u64)) {
        lock(&self.progress).counts = counts;
    }

    /// Its job has come to this; one that costs what it may ends, and one whose key may not be charged more makes room.
    pub(super) fn note(&self, totals: Totals, spending: Option<&Spending>) {
        {
            let mut progress = lock(&self.progress);
            (progress.counts, progress.totals) = ((totals.n_ok, totals.n_failed), Some(totals));
        }
        let Some(spending) = spending else { return };
        if spending.note(totals) && self.ending().is_none() {
            let message = "the batch had cost what it may, its max_cost, before this request ran";
            self.end(Ending::Rest(OVER_COST, message.into()));
        }
        if spending.used_up().is_some() {
            self.leave();
        }
    }

    /// It waits for its key's budget, of which that is said, or does no more.
    pub(super) fn wait_for_budget(&self, said: Option<String>) {
        self.ticket().iter().for_each(|ticket| ticket.put_aside(said.is_some()));
        lock(&self.control).waits_for_budget = said;
    }

    /// It ends early; the first reason stays.
    pub(super) fn end(&self, ending: Ending) {
        let mut control = lock(&self.control);
        control.ending.get_or_insert(ending);
        if let Some(link) = &control.link {
            link.halt();
        }
        drop(control.wake.take());
    }

    pub(super) fn ending(&self) -> Option<Ending> {
        lock(&self.control).ending.clone()
    }

    /// Ends, without a word, when it is to end or to leave; `None`: it is to end now.
    pub(super) fn wake(&self) -> Option<oneshot::Receiver<()>> {
        let (wake, woken) = oneshot::channel();
        let mut control = lock(&self.control);
        if control.ending.is_some() {
            return None;
        }
        control.wake = Some(wake);
        Some(woken)
    }

    /// Returns after a time, or when it is to end.
    pub(super) async fn pause(&self, time: Duration) {
        if let Some(woken) = self.wake() {
            // Nobody sends: it is dropped.
            let _passed = tokio::time::timeout(time, woken).await;
        }
    }

    /// Leaves its place, and waits for one again.
    pub(super) fn leave(&self) {
        let mut control = lock(&self.control);
        control.must_leave = true;
        if let Some(link) = &control.link {
            link.halt();
        }
        drop(control.wake.take());
    }

    /// Whether it was to leave, which it has done now.
    pub(super) fn take_leave(&self) -> bool {
        std::mem::take(&mut lock(&self.control).must_leave)
    }

    /// Why its job stops here, if it does.
    pub(super) fn stop(&self) -> Option<Ending> {
        let control = lock(&self.control);
        control.ending.clone().or_else(|| control.must_leave.then_some(Ending::Pause))
    }

    /// Its job runs, and is told by `link` to stop.
    pub(super) fn begin_run(&self, link: Link) {
        {
            let mut progress = lock(&self.progress);
            progress.since = Some((Instant::now(), progress.n_done()));
        }
        let mut control = lock(&self.control);
        if control.ending.is_some() || control.must_leave {
            link.halt();
        }
        control.link = Some(link);
    }

    /// Its job runs no more.
    pub(super) fn end_run(&self) {
        lock(&self.control).link = None;
        lock(&self.progress).since = None;
    }
}

impl Batches {
    fn open(&self, id: &str) -> Option<Arc<Open>> {
        lock(&self.open).get(id).cloned()
    }

    /// (completed, failed) of an open batch's rows.
    pub(super) fn counts(&self, id: &str) -> Option<(u64, u64)> {
        self.open(id).map(|open| open.counts())
    }

    /// How far an open batch of so many rows is: `{tokens_done, eta_s, cost, paused}`, each null where it is not known, the last
    /// where it is not so.
    pub(super) fn progress(&self, id: &str, n_rows: u64, price: Option<Price>) -> Option<Value> {
        self.open(id).map(|open| {
            let paused = lock(&open.control).waits_for_budget.clone();
            lock(&open.progress).shown(n_rows, (price, paused), Instant::now())
        })
    }

    /// What the open ones have taken of the machine's time, that is in no book yet.
    pub(super) fn meters(&self) -> Vec<(String, Arc<AtomicU64>)> {
        lock(&self.open).iter().map(|(id, open)| (id.clone(), Arc::clone(&open.machine_ns))).collect()
    }

    /// Ends a batch early.
    pub(super) fn end(&self, id: &str, ending: Ending) {
        if let Some(open) = self.open(id) {
            open.end(ending);
        }
    }

    /// The server ends: all are gone on with at the next start.
    pub(super) fn pause_all(&self) {
        self.is_closed.store(true, SeqCst);
        lock(&self.open).values().for_each(|open| open.end(Ending::Pause));
    }

    /// Notes a batch that is taken up.
    pub(super) fn begin(&self, id: &str, ticket: Option<Arc<BatchTicket>>) -> Arc<Open> {
        let open = Arc::new(Open::new(ticket));
        lock(&self.open).insert(id.to_owned(), Arc::clone(&open));
        if self.is_closed.load(SeqCst) {
            open.end(Ending::Pause);
        }
        open
    }

    /// It has ended, or is gone on with at the next start.
    pub(super) fn finish(&self, id: &str) {
        lock(&self.open).remove(id);
    }

    /// How many there are.
    pub(super) fn n_open(&self) -> usize {
        lock(&self.open).len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::prices::Amount;

    #[test]
    fn a_batch_ends_when_it_has_cost_what_it_may_and_for_the_first_reason() {
        let price = Price { input: 2_000_000, cached: 1_000_000, output: 5_000_000 };
        let totals =
            |completion_tokens| Totals { n_ok: 3, prompt_tokens: 10, cached_tokens: 4, completion_tokens, ..Totals::default() };
        // 6 at 2, 4 at 1, and the rest at 5, of a million.
        let spending = Spending::new(price, Some(Amount(36_000_000)), None);
        let limit = Some(&spending);
        let open = Open::default();
        open.note(totals(3), limit);
        assert_eq!(open.ending(), None);
        open.note(totals(4), None);
        assert_eq!((open.ending(), open.counts()), (None, (3, 0)));
        open.note(totals(4), limit);
        assert!(matches!(open.ending(), Some(Ending::Rest(OVER_COST, _))));
        open.end(Ending::Pause);
        assert!(matches!(open.stop(), Some(Ending::Rest(OVER_COST, _))) && open.wake().is_none());
    }

    #[test]
    fn progress_tells_what_is_known() {
        let (price, now) = (Price { input: 1_000_000, cached: 1_000_000, output: 1_000_000 }, Instant::now());
        let mut progress = Progress { counts: (4, 1), ..Progress::default() };
        let shown = |progress: &Progress, price, paused, at| progress.shown(20, (price, paused), at);
        let nothing = json!({"tokens_done": null, "eta_s": null, "cost": null, "paused": null});
        assert_eq!(shown(&progress, Some(price), None, now), nothing);
        progress.since = Some((now, 5));
        progress.totals = Some(Totals { n_ok: 4, prompt_tokens: 7, completion_tokens: 3, ..Totals::default() });
        let later = now + Duration::from_secs(8);
        let expected = json!({"tokens_done": 10, "eta_s": null, "cost": "0.00001", "paused": null});
        assert_eq!(shown(&progress, Some(price), None, later), expected);
        // Five more in eight seconds, and ten to go.
        progress.counts = (8, 2);
        let expected =
            json!({"tokens_done": 10, "eta_s": 16, "cost": null, "paused": {"code": "paused_budget", "message": "why"}});
        assert_eq!(shown(&progress, None, Some("why".into()), later), expected);
    }
}
