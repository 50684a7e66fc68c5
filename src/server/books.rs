//! The books: what calls and batches are charged, and which of them the machine's time went to. Invariants: what ends is
//! charged once, in the transaction that ends it where there is one; time of the machine that nobody is charged with is an
//! entry of its own, so that all entries together are the time that the server ran.

use super::App;
use super::auth::Owner;
use super::call::Call;
use super::limits::{Allowance, Held};
use super::log;
use super::log::say;
use super::models::{Offered, now, now_ms};
use super::once::Claim;
use super::prices::{Amount, Price, machine_amount};
use super::windows::Window;
use crate::outcome::Usage;
use crate::pipeline::hosted::Totals;
use crate::store::Connection;
use crate::store::batches;
use crate::store::ledger::{self, Entry};
use crate::store::trajectories;
use anyhow::Result;
use serde_json::{Value, json};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often time that nobody was charged with is written down.
const READ_EVERY: Duration = Duration::from_mins(1);
/// What batches are called where calls have their window.
pub(super) const BATCH_WINDOW: &str = "batch";

/// The content type of answers.
pub(super) const JSON: &str = "application/json";

/// See the module.
pub struct Books {
    /// What an hour of the machine costs, in millionths; 0: that is not of interest.
    pub(super) hour_price: u64,
    /// What prices are in.
    pub(super) currency: String,
    since: Instant,
    /// Time that entries since then account for.
    accounted_ns: AtomicI64,
}

impl Books {
    pub(super) fn new(hour_price: u64, currency: String) -> Self {
        Self { hour_price, currency, since: Instant::now(), accounted_ns: AtomicI64::new(0) }
    }

    /// Adds an entry, within the transaction of what it tells of.
    pub(super) fn add(&self, connection: &Connection, entry: &Entry) -> Result<()> {
        ledger::add(connection, entry)?;
        self.accounted_ns.fetch_add(entry.machine_ns, Relaxed);
        Ok(())
    }

    /// Adds what nobody was charged with, up to now.
    fn add_rest(&self, connection: &Connection) -> Result<()> {
        let elapsed = self.since.elapsed().as_nanos() as i64;
        let machine_ns = elapsed - self.accounted_ns.load(Relaxed);
        self.add(connection, &Entry { at: now(), machine_ns, hour_price: self.hour_price, ..Entry::default() })
    }
}

/// What one call is charged to.
#[derive(Debug)]
pub struct Bill {
    entry: Entry,
    price: Option<Price>,
    /// What its owner may ask for.
    allowance: Option<Arc<Allowance>>,
    tokens: Mutex<Tokens>,
    state: Mutex<State>,
}

/// What a call has used of what its owner may ask for.
#[derive(Debug)]
struct Tokens {
    /// What was taken before it ran.
    held: Option<Held>,
    /// Generated, that are accounted for.
    n_output: u64,
}

#[derive(Debug)]
enum State {
    /// What it has told so far would be charged as this.
    Open(Option<Box<Entry>>),
    /// To be written.
    Closed(Box<Entry>),
    /// Written, or not to be.
    Taken,
}

impl Bill {
    /// Of a call that begins; `object` is the id that its answer has, `turn` what it is a turn of, `held` what was taken of its
    /// owner's allowance.
    pub(super) fn new(
        (app, owner): (&App, &Owner),
        (model, window): (&Offered, Window),
        (object, n_prompt, turn): (String, u64, Option<trajectories::Turn>),
        mut held: Option<Held>,
    ) -> Self {
        let allowance = app.keys.allowance(owner).cloned();
        match (&mut held, &allowance) {
            (Some(held), _) => held.spend(n_prompt),
            (None, Some(allowance)) => allowance.take_tokens(n_prompt),
            (None, None) => {}
        }
        let price = model.prices.of(window);
        let entry = Entry { object: Some(object), window: window.as_str().into(), turn, ..app.entry(owner, &model.id, price) };
        let (tokens, state) = (Mutex::new(Tokens { held, n_output: 0 }), Mutex::new(State::Open(None)));
        Self { entry, price, allowance, tokens, state }
    }

    fn entry(&self, usage: Usage, machine_ns: u64) -> Entry {
        Entry {
            at: now(),
            n_requests: 1,
            input_tokens: usage.prompt_tokens.into(),
            cached_tokens: usage.cached_tokens.into(),
            output_tokens: usage.completion_tokens.into(),
            charge: self.price.map_or(0, |price| price.of(usage)),
            machine_ns: machine_ns as i64,
            turn: self.entry.turn.clone().map(|turn| trajectories::Turn { ended_ms: now_ms(), ..turn }),
            ..self.entry.clone()
        }
    }

    /// The call has told this so far, of which so many tokens were thoughts.
    pub(super) fn note(&self, (usage, n_thought): (Usage, u64), machine_ns: u64) {
        let entry = Entry { reasoning_tokens: n_thought, ..self.entry(usage, machine_ns) };
        if let State::Open(told) = &mut *lock(&self.state) {
            self.use_up(entry.output_tokens);
            *told = Some(Box::new(entry));
        }
    }

    /// So many tokens were generated in all.
    fn use_up(&self, n_output: u64) {
        let mut tokens = lock(&self.tokens);
        let n_more = n_output.saturating_sub(tokens.n_output);
        tokens.n_output += n_more;
        match (&mut tokens.held, &self.allowance) {
            (Some(held), _) => held.spend(n_more),
            (None, Some(allowance)) => allowance.take_tokens(n_more),
            (None, None) => {}
        }
    }

    /// What the call has told so far, as it would be charged, while it is open.
    pub(super) fn told(&self) -> Option<Entry> {
        if let State::Open(told) = &*lock(&self.state) { told.as_deref().cloned() } else { None }
    }

    /// The call has come to this; what it costs, if that is known. Once closed it stays as it is.
    pub(super) fn close(&self, usage: Usage, machine_ns: u64) -> Option<Amount> {
        let entry = self.entry(usage, machine_ns);
        let cost = cost(self.price.is_some(), &entry);
        let mut state = lock(&self.state);
        if matches!(*state, State::Open(_)) {
            self.use_up(entry.output_tokens);
            // What is left goes back; what it costs stays taken until it is in the ledger.
            lock(&self.tokens).held.iter_mut().for_each(Held::give_back);
            *state = State::Closed(Box::new(entry));
        }
        cost
    }

    /// What is to be written, once.
    pub(super) fn take(&self) -> Option<Entry> {
        match std::mem::replace(&mut *lock(&self.state), State::Taken) {
            State::Closed(entry) => Some(*entry),
            State::Open(_) | State::Taken => None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What its owner is told that it costs: by the price, else by the machine's time.
pub(super) fn cost(is_priced: bool, entry: &Entry) -> Option<Amount> {
    if is_priced {
        return Some(Amount(entry.charge));
    }
    (entry.hour_price > 0).then(|| machine_amount(i128::from(entry.machine_ns) * i128::from(entry.hour_price)))
}

/// What a response that was cancelled has told, and what that costs.
pub(super) fn usage(entry: &Entry) -> Value {
    let mut usage = json!({
        "input_tokens": entry.input_tokens,
        "input_tokens_details": {"cached_tokens": entry.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": entry.output_tokens,
        "output_tokens_details": {"reasoning_tokens": entry.reasoning_tokens},
        "total_tokens": entry.input_tokens + entry.output_tokens,
    });
    if let Some(cost) = cost(entry.prices != [0; 3], entry) {
        usage["cost"] = cost.to_string().into();
    }
    usage
}

impl App {
    fn entry(&self, owner: &str, model: &str, price: Option<Price>) -> Entry {
        let prices = price.map_or([0; 3], |price| [price.input, price.cached, price.output]);
        Entry {
            owner: owner.to_owned(),
            key: self.keys.name(owner),
            model: model.to_owned(),
            prices,
            hour_price: self.books.hour_price,
            ..Entry::default()
        }
    }

    /// Writes down what a call came to, and its answer if its request may come again. It is given whatever the disk does.
    pub(super) async fn charge(self: &Arc<Self>, entry: Entry, kept: Option<(Arc<Claim>, String)>) {
        let app = Arc::clone(self);
        let object = entry.object.clone().unwrap_or_default();
        let work = move |connection: &Connection| {
            app.books.add(connection, &entry)?;
            kept.map_or(Ok(()), |(claim, answer)| claim.keep(connection, JSON, &answer))
        };
        if let Err(error) = self.store.write(work).await {
            say(&format!("the ledger has no entry of {object}: {error:#}"));
        }
    }

    /// The entry of a batch that has ended, at these prices, and what it costs; `connection` is that of the transaction which ends it.
    pub(super) fn bill_batch(
        &self,
        connection: &Connection,
        (batch, owner, model): (&str, &str, &str),
        price: Option<Price>,
        (totals, machine_ns): (Totals, &AtomicU64),
    ) -> Result<Option<Amount>> {
        let (input_tokens, cached_tokens) = (totals.prompt_tokens, totals.cached_tokens);
        let output_tokens = totals.completion_tokens;
        let entry = Entry {
            at: now(),
            object: Some(batch.to_owned()),
            window: BATCH_WINDOW.into(),
            batch: batch.to_owned(),
            n_requests: totals.n_ok,
            input_tokens,
            cached_tokens,
            output_tokens,
            charge: price.map_or(0, |price| price.charge(input_tokens, cached_tokens, output_tokens)),
            machine_ns: machine_ns.swap(0, Relaxed) as i64,
            ..self.entry(owner, model, price)
        };
        self.books.add(connection, &entry)?;
        if price.is_some() {
            return Ok(cost(true, &entry));
        }
        let taken = ledger::machine_cost_of_batch(connection, batch)?;
        Ok((self.books.hour_price > 0).then(|| machine_amount(taken)))
    }

    /// Brings the books up to now: what batches have taken of the machine, and what nobody has.
    pub(super) async fn read_meters(self: &Arc<Self>) -> Result<()> {
        if self.books.hour_price == 0 {
            return Ok(());
        }
        let (app, running) = (Arc::clone(self), self.batches.meters());
        let work = move |connection: &Connection| {
            for (id, meter) in running {
                let machine_ns = meter.swap(0, Relaxed) as i64;
                let Some(stored) = batches::any(connection, &id)?.filter(|_| machine_ns > 0) else { continue };
                let body: Value = serde_json::from_str(&stored.body)?;
                let entry = app.entry(&stored.owner, body["model"].as_str().unwrap_or_default(), None);
                let entry = Entry { at: now(), window: BATCH_WINDOW.into(), batch: id, machine_ns, ..entry };
                app.books.add(connection, &entry)?;
            }
            app.books.add_rest(connection)
        };
        self.store.write(work).await
    }
}

/// Keeps the books up to date until the server ends.
pub(super) async fn run(app: Arc<App>) -> ! {
    loop {
        tokio::time::sleep(READ_EVERY).await;
        if let Err(error) = app.read_meters().await {
            say(&format!("the ledger: {error:#}"));
        }
    }
}

/// A call ends when it is dropped: it is told of, and a caller that breaks a stream off has what was told. One that hangs up while
/// it waits has had its prompt computed, and finds that in the cache when it comes again: it pays for what was drawn by then. Not
/// with an idempotency key: then it comes again with that, and is charged once.
impl Drop for Call {
    fn drop(&mut self) {
        let is_whole = self.flow.is_whole();
        if is_whole {
            self.model.live.observed.calls[self.window.class() as usize].note_turn(self.elapsed());
        }
        log::ended(|| {
            let usage = self.flow.told().unwrap_or_default();
            json!({
                "request_id": self.request.as_deref(), "call": self.id, "model": self.model.id, "window": self.window.as_str(),
                "is_whole": is_whole, "input_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens,
                "output_tokens": usage.completion_tokens, "first_token_ms": self.flow.first_token().map(log::millis),
                "turn_ms": log::millis(self.elapsed()),
            })
        });
        self.trace_end();
        let usage = if self.is_streamed {
            self.flow.told()
        } else if self.is_waited_for && !is_whole && self.claim.is_none() && !self.app.is_draining() {
            self.flow.drawn()
        } else {
            // Whoever runs it, or has its answer, charges it.
            return;
        };
        if let Some(usage) = usage {
            self.bill.close(usage, self.flow.machine_ns());
        }
        if let (Some(entry), Ok(runtime)) = (self.bill.take(), tokio::runtime::Handle::try_current()) {
            let (app, bill) = (Arc::clone(&self.app), Arc::clone(&self.bill));
            app.n_charging.fetch_add(1, SeqCst);
            runtime.spawn(async move {
                app.charge(entry, None).await;
                app.n_charging.fetch_sub(1, SeqCst);
                drop(bill);
            });
        }
    }
}
