//! Responses that are fetched later: accepted into the store, run when there is room, their events stored as they come.
//! Invariants: what was accepted is on the disk and runs, after any end of the process too, with the same bits; a response
//! ends once, and what it ended as never changes.

use super::App;
use super::auth::Owner;
use super::backlog::Ticket;
use super::batch_tokens::Body;
use super::books::usage;
use super::call::{Asked, Call, Identity};
use super::completion_webhook;
use super::errors::ApiError;
use super::fair::Line;
use super::ids;
use super::limits::Held;
use super::log::say;
use super::models::{Models, now};
use super::once;
use super::response_events::{Event, TERMINAL, Told, event, events, failed};
use super::responses::Own;
use super::trajectories::Turn;
use super::windows::{self, Mode, Window};
use crate::format::openai::Endpoint;
use crate::outcome::{ErrorCode, RowError};
use crate::store::Connection;
use crate::store::ledger::Entry;
use crate::store::responses::{self, StoredEvent, StoredResponse};
use crate::window::turns::Share;
use anyhow::{Context, Result};
use futures::{FutureExt as _, StreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// How often what nobody watches is stored.
const STORE_EVERY: Duration = Duration::from_millis(250);
/// Pause before a call that the engine has no room for is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// Pause after a fault of the disk.
const FAULT_PAUSE: Duration = Duration::from_secs(5);
/// Times that an engine may fail while a response runs.
const MAX_FAULTS: u32 = 3;
/// Events that are read at a time.
const EVENTS: usize = 512;

/// The background responses that are open.
pub struct Background {
    /// By id, gone when nothing more will be stored.
    open: Mutex<HashMap<String, Open>>,
    /// Counts those that ended.
    ended: watch::Sender<u64>,
    /// What waits to be run, of each model and window.
    queues: HashMap<(String, Window), Arc<Line>>,
    max_open: usize,
    is_closed: AtomicBool,
}

/// A response that is open.
struct Open {
    /// Rings when something was stored.
    bell: watch::Sender<()>,
    /// What it may come to, taken from what its owner may ask for, until it runs.
    held: Option<Held>,
    /// Its part of the work that is to be done, until it runs; of those that were accepted since the start.
    ticket: Option<Ticket>,
}

impl Open {
    fn new(held: Option<Held>, ticket: Option<Ticket>) -> Self {
        Self { bell: watch::Sender::new(()), held, ticket }
    }
}

/// What is kept of a request to run it, perhaps again.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    model: String,
    window: Window,
    seed: u64,
    /// Whether its events are wanted as they come.
    is_streamed: bool,
    /// The trajectory of what it follows.
    #[serde(default)]
    follows: Option<String>,
    /// The request's place in a trace.
    #[serde(default)]
    trace: Option<String>,
    body: Map<String, Value>,
}

impl Background {
    /// At most so many may be open.
    pub(super) fn new(models: &Models, max_open: usize) -> Self {
        let places = models.all().iter().flat_map(|model| model.windows.iter().map(|window| (model.id.clone(), *window)));
        let queues = places.map(|place| (place, Arc::default())).collect();
        let (open, ended) = (Mutex::default(), watch::Sender::new(0));
        Self { open, ended, queues, max_open, is_closed: AtomicBool::new(false) }
    }

    fn with<T>(&self, work: impl FnOnce(&mut HashMap<String, Open>) -> T) -> T {
        work(&mut self.open.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes a place for one more, which holds that; false if there is none.
    fn open(&self, id: &str, held: Option<Held>, ticket: Ticket) -> bool {
        self.with(|open| {
            let has_room = open.len() < self.max_open && !self.is_closed.load(SeqCst);
            if has_room {
                open.insert(id.to_owned(), Open::new(held, Some(ticket)));
            }
            has_room
        })
    }

    /// What it counts as and holds, which is its run's from now on.
    fn taken(&self, id: &str) -> (Option<Ticket>, Option<Held>) {
        self.with(|open| open.get_mut(id).map_or((None, None), |open| (open.ticket.take(), open.held.take())))
    }

    fn enqueue(&self, id: String, share: Share, model: &str, window: Window) {
        // Of a model that is not offered any more: whoever takes it up finds that out.
        let line = self.queues.get(&(model.to_owned(), window)).or_else(|| self.queues.values().next());
        if let Some(line) = line {
            line.push(share, id);
        }
    }

    /// Rings when more of it was stored; ends when nothing more will be. `None`: nothing more will be.
    pub(super) fn listen(&self, id: &str) -> Option<watch::Receiver<()>> {
        self.with(|open| open.get(id).map(|open| open.bell.subscribe()))
    }

    fn ring(&self, id: &str) {
        self.with(|open| {
            if let Some(open) = open.get(id) {
                open.bell.send_replace(());
            }
        });
    }

    /// Nothing more will be stored of it.
    pub(super) fn close(&self, id: &str) {
        if self.with(|open| open.remove(id)).is_some() {
            self.ended.send_modify(|n_ended| *n_ended += 1);
        }
    }

    /// Nothing more will be stored of any: the server ends.
    pub(super) fn close_all(&self) {
        self.is_closed.store(true, SeqCst);
        self.with(HashMap::clear);
        self.ended.send_modify(|n_ended| *n_ended += 1);
    }

    /// Whether the server ends.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(SeqCst)
    }

    /// Of these, the ones that nothing more may come of, and the rest.
    pub(super) fn closed_and_open<'i>(&self, ids: &'i [String]) -> (Vec<&'i String>, Vec<&'i String>) {
        self.with(|open| ids.iter().partition(|id| !open.contains_key(*id)))
    }

    /// Changes when one ends.
    pub(super) fn ends(&self) -> watch::Receiver<u64> {
        self.ended.subscribe()
    }

    /// How many there are.
    pub(super) fn n_open(&self) -> usize {
        self.with(|open| open.len())
    }
}

/// Accepts a response; its id. When this returns, it is on the disk. `items` are its own input.
pub(super) async fn create(
    app: &Arc<App>,
    owner: &Owner,
    (own, identity): (Own, Identity),
    body: Map<String, Value>,
    items: Vec<Value>,
) -> Result<String, ApiError> {
    let asked = Asked { mode: Mode::Background, window: own.window };
    // What is wrong with it is found now; what it comes to is thrown away, so that a long queue is short in memory.
    let prepared = Call::prepare(app, Endpoint::Responses, &body, asked).await?;
    let receiver = completion_webhook::asked(app, owner, windows::metadata(&body)?, asked.mode)?;
    owner.spot.wants(&prepared);
    let stamp = identity.stamp(&prepared.model);
    let mut response = stamp.response_in_progress(&identity.id, prepared.echo.as_deref().unwrap_or(&Value::Null));
    own.put_on(&mut response, prepared.window);
    response["status"] = "queued".into();
    let id = format!("resp_{}", identity.id);
    let (model, window, trace) = (prepared.model.id.clone(), prepared.window, owner.spot.link());
    let is_streamed = own.is_streamed;
    let kept = Kept { model: model.clone(), window, seed: ids::seed(), is_streamed, follows: own.follows, trace, body };
    let new = StoredResponse {
        id: id.clone(),
        owner: owner.to_string(),
        created_at: identity.created,
        status: "queued".into(),
        is_background: true,
        previous: own.previous,
        input: Value::from(items).to_string(),
        body: response.to_string(),
        request: Some(serde_json::to_string(&kept).map_err(anyhow::Error::from)?),
        n_faults: 0,
    };
    let claim = owner.claim.clone().zip(Some(if is_streamed { once::RESPONSE_EVENTS } else { once::RESPONSE }));
    let first = [event(0, "response.created", &response), event(1, "response.queued", &response)];
    let (ticket, held) = (prepared.admit(app)?, prepared.hold(app, owner).await?);
    if !app.background.open(&id, held, ticket) {
        return Err(ApiError::busy());
    }
    // A caller who goes away now must not leave a response behind that is stored and never run.
    let (app, owner) = (Arc::clone(app), new.owner.clone());
    let accepted = tokio::spawn(async move {
        // Whoever sends the same key again waits until it is stored.
        let _turn = claim.clone();
        let stored = app.store.write(move |connection| {
            if let Some(receiver) = receiver
                && let Err(refused) = completion_webhook::expect(connection, (&new.owner, &new.id), &receiver, new.created_at)?
            {
                return Ok(Err(refused));
            }
            responses::insert(connection, &new)?;
            if let Some((claim, kind)) = claim {
                claim.keep(connection, kind, &new.id)?;
            }
            responses::update(connection, &new.id, "queued", None, &numbered(0, &first)).map(|_| Ok(()))
        });
        match stored.await.map_err(ApiError::from).and_then(|accepted| accepted) {
            Ok(()) => app.background.enqueue(id.clone(), app.keys.share(&owner), &model, window),
            Err(error) => {
                app.background.close(&id);
                return Err(error);
            }
        }
        Ok(id)
    });
    accepted.await.context("accepting a response panicked")?
}

fn numbered(from: u64, events: &[Event]) -> Vec<StoredEvent> {
    (from..).zip(events).map(|(number, (name, data))| (number, (*name).to_owned(), data.to_string())).collect()
}

/// Takes up what the store holds, and runs what comes: so many of a model and a window at a time.
pub(super) async fn start(app: &Arc<App>, n_running: usize) -> Result<()> {
    let open = app.store.read(|connection| {
        let mut open = Vec::new();
        responses::open(connection, &mut |id, owner, request| {
            #[derive(Deserialize)]
            struct Where {
                model: String,
                window: Window,
                #[serde(default)]
                body: Body,
            }
            let place = serde_json::from_str::<Where>(request).ok();
            open.push((id, owner, place.map(|at| (at.model, at.window, at.body.asked(request.len())))));
        })?;
        Ok(open)
    });
    for (id, owner, place) in open.await? {
        let (model, window, ticket) = match place {
            Some((model, window, asked)) => {
                let ticket = app.models.find(&model).map(|model| model.live.count_in(window.class(), asked));
                (model, window, ticket)
            }
            None => (String::new(), Window::Standard, None),
        };
        app.background.with(|open| open.insert(id.clone(), Open::new(None, ticket)));
        app.background.enqueue(id, app.keys.share(&owner), &model, window);
    }
    for line in app.background.queues.values() {
        let (app, line) = (Arc::clone(app), Arc::clone(line));
        let places = Arc::new(Semaphore::new(n_running));
        tokio::spawn(async move {
            // Whose turn it is, is found out when there is a place.
            while let Ok(place) = Arc::clone(&places).acquire_owned().await {
                let id = line.next(|id| app.background.with(|open| open.contains_key(id))).await;
                let end = Closing { app: Arc::clone(&app), id };
                tokio::spawn(async move {
                    while let Err(error) = run(&end.app, &end.id).await {
                        say(&format!("response {}: {error:#}", end.id));
                        tokio::time::sleep(FAULT_PAUSE).await;
                    }
                    drop(place);
                });
            }
        });
    }
    Ok(())
}

/// Says that a response's run has ended, however it did.
struct Closing {
    app: Arc<App>,
    id: String,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.app.background.close(&self.id);
    }
}

/// Runs a response to its end, unless somebody else ends it. An error is the store's.
async fn run(app: &Arc<App>, id: &str) -> Result<()> {
    let Some(mut bell) = app.background.listen(id) else { return Ok(()) };
    let key = id.to_owned();
    let read = app.store.read(move |connection| {
        let mut told = Told::default();
        loop {
            let events = responses::events(connection, &key, told.n_events(), EVENTS)?;
            told.take_in(&events);
            if events.len() < EVENTS {
                let told_entry = responses::told(connection, &key)?;
                let stored = responses::any(connection, &key)?.filter(StoredResponse::is_open);
                return Ok((stored, told, n_told(told_entry.as_deref())?));
            }
        }
    });
    let (Some(stored), told, mut n_noted) = read.await? else { return Ok(()) };
    let response: Value = serde_json::from_str(&stored.body).context("a stored response is no JSON")?;
    let spot = app.traces.background(&stored, app.keys.name(&stored.owner));
    let owner = Owner::stored(&stored.owner).at(spot.clone());
    let begun = tokio::select! {
        begun = begin((app, &owner), &stored, &response, told.has_text()) => begun,
        () = closed(&mut bell) => return spot.left_by(app),
    };
    let (call, own, is_streamed) = match begun {
        Ok(begun) => begun,
        // It runs at the next start.
        Err(_) if app.models.failed().is_some() || app.is_draining() => return Ok(()),
        Err(error) => {
            spot.failed(error.code.as_str());
            let response = failed(response, &error);
            let last = event(told.n_events(), "response.failed", &response);
            return store_events(app, id, told.n_events(), vec![last], None).await.map(drop);
        }
    };
    let (mut n_stored, bill) = (told.n_events(), Arc::clone(&call.bill));
    let mut events = pin!(events(call, own, told));
    loop {
        let mut pending = Vec::new();
        tokio::select! {
            next = events.next() => pending.extend(next),
            () = closed(&mut bell) => return spot.left_by(app),
        }
        while let Some(Some(next)) = events.next().now_or_never() {
            pending.push(next);
        }
        if pending.last().is_some_and(|(name, _)| *name == "response.failed") && app.models.failed().is_some() {
            // The engine failed, not the response: it runs at the next start.
            return Ok(());
        }
        let is_end = pending.last().is_none_or(|(name, _)| TERMINAL.contains(name));
        pending.last().filter(|_| is_end).into_iter().for_each(|(name, _)| spot.became(name));
        let n_pending = pending.len() as u64;
        // Of one that is told again, what was told before counts until more was.
        let told = bill.told().filter(|entry| entry.output_tokens > n_noted);
        n_noted = told.as_ref().map_or(n_noted, |entry| entry.output_tokens);
        let entry = if is_end { bill.take().map(Money::Charged) } else { told.map(Money::Told) };
        if !store_events(app, id, n_stored, pending, entry).await? || is_end {
            return Ok(());
        }
        n_stored += n_pending;
        app.background.ring(id);
        if !is_streamed {
            tokio::select! {
                () = tokio::time::sleep(STORE_EVERY) => {}
                () = closed(&mut bell) => return spot.left_by(app),
            }
        }
    }
}

/// Tokens that an entry of what was told counts.
fn n_told(entry: Option<&str>) -> Result<u64> {
    let entry: Option<Entry> = entry.map(serde_json::from_str).transpose().context("what a response has told")?;
    Ok(entry.map_or(0, |entry| entry.output_tokens))
}

/// What is written with a response's events.
enum Money {
    /// It is charged that.
    Charged(Entry),
    /// It would be, if it were cancelled now.
    Told(Entry),
}

/// Returns when nothing more will be stored of a response.
async fn closed(bell: &mut watch::Receiver<()>) {
    while bell.changed().await.is_ok() {}
}

/// Makes a call of a stored response again. An error is the response's end.
async fn begin(
    (app, owner): (&Arc<App>, &Owner),
    stored: &StoredResponse,
    response: &Value,
    has_text: bool,
) -> Result<(Call, Own, bool), RowError> {
    let refuse = |message: String| RowError::row(ErrorCode::EngineError, message);
    if stored.n_faults >= MAX_FAULTS {
        return Err(refuse(format!("the engine failed {MAX_FAULTS} times while it ran")));
    }
    let request = stored.request.as_deref().unwrap_or_default();
    let kept: Kept = serde_json::from_str(request).map_err(|error| refuse(format!("the stored request: {error}")))?;
    let Kept { window, seed, is_streamed, follows, body, .. } = kept;
    let asked = Asked { mode: Mode::Background, window: Some(window) };
    // Its prompts are short of memory until there is an engine for them.
    let model = Arc::clone(app.models.named(&body).map_err(|error| refuse(error.message))?);
    let id = stored.id.trim_start_matches("resp_").to_owned();
    let identity = Identity { id, created: stored.created_at, accepted_ms: 1000 * stored.created_at, seed };
    let lend = async || {
        let lease = app.models.lend_later(&model, window, identity.accepted_ago()).await;
        lease.map_err(|absent| refuse(absent.told(&model.id).message))
    };
    let mut lease = Some(lend().await?);
    let mut prepared = Call::prepare(app, Endpoint::Responses, &body, asked).await.map_err(|error| refuse(error.message))?;
    prepared.check_size().map_err(|error| refuse(error.message))?;
    // Of which nothing was told, another model may tell.
    if has_text && response["system_fingerprint"] != prepared.model.live.fingerprint.as_str() {
        return Err(refuse("the model is another one than when the request was accepted".into()));
    }
    prepared.turn = Turn::of(&body, follows.as_deref(), true).reckoned(app, owner, prepared.window).await;
    let previous = stored.previous.clone();
    let own = Own { store: true, background: true, previous, follows, window: None, is_streamed };
    let (mut ticket, mut held) = app.background.taken(&stored.id);
    let at = loop {
        let lease = if let Some(lease) = lease.take() { lease } else { lend().await? };
        if let Ok(place) = prepared.queue() {
            break (lease, place);
        }
        // Calls that wait for the model have the places: each would wait for the other, if it has to make room first.
        drop(lease);
        tokio::time::sleep(BUSY_PAUSE).await;
    };
    let call = Call::submit_held((app, owner), &prepared, &identity, (&mut ticket, &mut held), at);
    Ok((call, own, is_streamed))
}

/// Stores a response's events, what they say of its state, and what it is charged; false if it has ended before.
async fn store_events(app: &Arc<App>, id: &str, from: u64, events: Vec<Event>, money: Option<Money>) -> Result<bool> {
    let (id, own) = (id.to_owned(), Arc::clone(app));
    app.store
        .write(move |connection| {
            let last = events.iter().rev().map(|(_, data)| &data["response"]).find(|response| response.is_object());
            let status = last.and_then(|response| response["status"].as_str()).unwrap_or("in_progress");
            let body = last.map(ToString::to_string);
            let is_changed = responses::update(connection, &id, status, body.as_deref(), &numbered(from, &events))?;
            match money.filter(|_| is_changed) {
                Some(Money::Charged(entry)) => own.books.add(connection, &entry)?,
                Some(Money::Told(entry)) => responses::note_told(connection, &id, &serde_json::to_string(&entry)?)?,
                None => {}
            }
            Ok(is_changed)
        })
        .await
}

/// Ends an open response as cancelled, and charges what of its text was told; the response as it is then.
pub(super) fn cancel(app: &App, connection: &Connection, stored: &StoredResponse) -> Result<Value> {
    let mut response: Value = serde_json::from_str(&stored.body).context("a stored response is no JSON")?;
    if !stored.is_open() {
        return Ok(response);
    }
    response["status"] = "cancelled".into();
    if stored.status == "queued" {
        // Nobody else tells of it.
        app.traces.background(stored, app.keys.name(&stored.owner)).became("cancelled");
    }
    if let Some(told) = responses::told(connection, &stored.id)? {
        let entry = Entry { at: now(), ..serde_json::from_str(&told).context("what a response has told")? };
        response["usage"] = usage(&entry);
        app.books.add(connection, &entry)?;
    }
    let n_events = responses::next_event(connection, &stored.id)?;
    let last = event(n_events, "response.failed", &response);
    responses::update(connection, &stored.id, "cancelled", Some(&response.to_string()), &numbered(n_events, &[last]))?;
    Ok(response)
}
