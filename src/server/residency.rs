//! The models that are in memory: loads what is wanted, takes out what others need the room of, and lends engines to whoever
//! works. What happens when is `room`'s to decide. Invariants: a model is loaded once, however many wait for it; an engine
//! that is lent stays; a load that fails is told to those who wait, and ends nothing else.

use super::errors::ApiError;
use super::live::{AtWork, LiveModel};
use super::log::say;
use super::room::{Action, Room, State, Terms};
use anyhow::Result;
use axum::http::StatusCode;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_blocking;

/// See the module.
pub struct Residency {
    models: Vec<Arc<LiveModel>>,
    /// What memories are called.
    memories: Vec<String>,
    inner: Mutex<Inner>,
    /// Rings when there may be something to decide.
    bell: Notify,
    /// The room's clock began then.
    began: Instant,
}

struct Inner {
    room: Room,
    /// By model.
    works: Vec<Option<Arc<AtWork>>>,
    counts: Vec<Counts>,
    /// By number of the want.
    waiting: HashMap<u64, Waiting>,
    /// Who can be asked to let go, by number of the lease.
    asks: HashMap<u64, (usize, Ask)>,
    next: u64,
    is_closed: bool,
}

/// What has become of a model since the start.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Times that it was loaded.
    pub n_loads: u64,
    /// Times that it was taken out.
    pub n_unloads: u64,
    /// Times that it could not be loaded.
    pub n_failures: u64,
    /// How long it took to load it, all times together.
    pub load_time: Duration,
    /// Why the last load failed, if it did.
    pub error: Option<String>,
}

/// A model's place in memory, for people and programs.
#[derive(Debug, Clone)]
pub struct Shown {
    /// `loaded`, `loading`, `unloading` or `unloaded`.
    pub state: &'static str,
    /// What it takes when it is loaded.
    pub bytes: u64,
    /// Of which memory: the number among [`Residency::memories`].
    pub memory: usize,
    /// Calls, background responses and batches that use it.
    pub n_users: usize,
    /// Those that wait for it.
    pub n_waiting: usize,
    /// Since the start.
    pub counts: Counts,
}

/// Called to ask who holds a lease to let go of it and come again.
pub type Ask = Box<dyn Fn() + Send>;

/// A want of a model.
pub struct Wanted {
    /// In so much time it should have the model: others need not make room sooner.
    pub due_in: Duration,
    /// It waits so long at most for room, and so long until the model is loaded.
    pub limits: Option<(Duration, Duration)>,
    /// It bears so many loads that fail, but for one; `None`: any number.
    pub max_failures: Option<u32>,
    /// If it can go on later.
    pub ask: Option<Ask>,
}

struct Waiting {
    model: usize,
    bell: oneshot::Sender<Result<Lease, Absent>>,
    max_failures: Option<u32>,
    ask: Option<Ask>,
}

/// Why there is no engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Absent {
    /// It could not be loaded; after what time that is tried again.
    Failed(Duration),
    /// It did not come in time: where it is.
    Late(&'static str),
    /// The server ends.
    Closed,
}

impl Absent {
    /// What a caller who wanted that model is told.
    pub(super) fn told(self, model: &str) -> ApiError {
        let unavailable = |message: String, retry_after_s| {
            let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, None, message);
            ApiError { retry_after_s: Some(retry_after_s), ..error }
        };
        match self {
            // Why, the log says: it may speak of files.
            Self::Failed(retry_in) => {
                let message = format!("the model {model} could not be loaded; try again");
                unavailable(message, u32::try_from(retry_in.as_secs().clamp(1, MAX_RETRY_S)).unwrap_or(1))
            }
            Self::Late(state) => {
                let why = if state == "loading" { "it is being loaded" } else { "others are at work in its place" };
                unavailable(format!("the model {model} is not in memory yet: {why}; try again"), LATE_RETRY_S)
            }
            Self::Closed => ApiError::draining(),
        }
    }
}

/// Longest pause that a caller is asked for: some clients don't come again after longer ones.
const MAX_RETRY_S: u64 = 60;
/// Pause that is asked for of who waited in vain.
const LATE_RETRY_S: u32 = 5;

/// A model's engine, which stays where it is as long as this is held.
pub struct Lease {
    /// The engine.
    pub(super) work: Arc<AtWork>,
    /// From when to when it was waited for, if it was.
    pub(super) loading: Option<(Instant, Instant)>,
    residency: Arc<Residency>,
    model: usize,
    number: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let now = self.residency.now();
        let mut inner = self.residency.lock();
        inner.asks.remove(&self.number);
        inner.room.release(self.model, now);
        drop(inner);
        self.residency.bell.notify_one();
    }
}

/// A want, given up when this is dropped.
struct Wait<'a>(&'a Residency, usize, u64);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let Self(residency, model, number) = *self;
        let mut inner = residency.lock();
        if inner.waiting.remove(&number).is_some() {
            inner.room.give_up(model, number);
            drop(inner);
            residency.bell.notify_one();
        }
    }
}

impl Residency {
    /// Of these models, some at work already. They may take so much together of each memory; none is taken out that was not there
    /// for `least`.
    pub(super) fn new(
        models: Vec<(Arc<LiveModel>, Terms, Option<AtWork>)>,
        memories: Vec<(String, u64)>,
        least: Duration,
    ) -> Arc<Self> {
        let (memories, budgets) = memories.into_iter().unzip();
        let mut room = Room::new(budgets, least, models.iter().map(|(_, terms, _)| *terms));
        let counts = |work: &Option<AtWork>| Counts { n_loads: work.is_some().into(), ..Counts::default() };
        let counts: Vec<Counts> = models.iter().map(|(.., work)| counts(work)).collect();
        for (model, _) in models.iter().enumerate().filter(|(_, (.., work))| work.is_some()) {
            room.loaded(model, Duration::ZERO);
        }
        let (models, works) = models.into_iter().map(|(model, _, work)| (model, work.map(Arc::new))).unzip();
        let (waiting, asks) = (HashMap::new(), HashMap::new());
        let inner = Mutex::new(Inner { room, works, counts, waiting, asks, next: 0, is_closed: false });
        Arc::new(Self { models, memories, inner, bell: Notify::new(), began: Instant::now() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// A model's engine; waits until it is in memory.
    ///
    /// # Errors
    /// It can't be had, or not in time.
    pub(super) async fn lease(self: &Arc<Self>, model: usize, wanted: Wanted) -> Result<Lease, Absent> {
        let Wanted { due_in, limits, max_failures, ask } = wanted;
        let now = self.now();
        let (number, mut granted) = {
            let mut inner = self.lock();
            if inner.is_closed {
                return Err(Absent::Closed);
            }
            let (n_failed, retry_at) = inner.room.failures(model);
            if max_failures == Some(1) && n_failed > 0 && retry_at > now {
                return Err(Absent::Failed(retry_at.saturating_sub(now)));
            }
            let number = inner.next;
            inner.next += 1;
            if inner.room.want(model, number, now + due_in) {
                return Ok(inner.lend(self, model, number, ask));
            }
            let (bell, granted) = oneshot::channel();
            inner.waiting.insert(number, Waiting { model, bell, max_failures, ask });
            (number, granted)
        };
        self.bell.notify_one();
        let began = Instant::now();
        let _wait = Wait(self, model, number);
        let answered = match limits {
            None => Some((&mut granted).await),
            Some((for_room, in_all)) => match tokio::time::timeout(for_room.min(in_all), &mut granted).await {
                Err(_) if self.shown(model).state == "loading" => {
                    tokio::time::timeout(in_all.saturating_sub(for_room), &mut granted).await.ok()
                }
                answered => answered.ok(),
            },
        };
        if let Some(answer) = answered {
            return answer.unwrap_or(Err(Absent::Closed)).map(|mut lease| {
                lease.loading = Some((began, Instant::now()));
                lease
            });
        }
        let mut inner = self.lock();
        // It may have come in this moment: then the lease goes with `granted`.
        if inner.waiting.remove(&number).is_some() {
            inner.room.miss(model, number, self.now());
        }
        drop(inner);
        self.bell.notify_one();
        Err(Absent::Late(self.shown(model).state))
    }

    /// Does what is to be done, until the server ends.
    pub(super) async fn run(self: Arc<Self>) {
        loop {
            let wake_at = self.step();
            let sleep = async {
                match wake_at {
                    Some(at) => tokio::time::sleep(at.saturating_sub(self.now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.bell.notified() => {}
                () = sleep => {}
            }
        }
    }

    /// Decides, and begins what follows; when there will be something to decide again.
    fn step(self: &Arc<Self>) -> Option<Duration> {
        let mut granted = Vec::new();
        let wake_at = {
            let mut inner = self.lock();
            if inner.is_closed {
                return None;
            }
            for action in inner.room.decide(self.now()) {
                match action {
                    Action::Grant(number) => {
                        // Who waits no more has given it up.
                        if let Some(waiting) = inner.waiting.remove(&number) {
                            granted.push((waiting.bell, inner.lend(self, waiting.model, number, waiting.ask)));
                        }
                    }
                    Action::Ask(model) => inner.asks.values().filter(|(of, _)| *of == model).for_each(|(_, ask)| ask()),
                    Action::Load(model) => drop(tokio::spawn(Arc::clone(self).load(model))),
                    Action::Unload(model) => {
                        let work = inner.works[model].take();
                        drop(tokio::spawn(Arc::clone(self).unload(model, work)));
                    }
                }
            }
            inner.room.wake_at()
        };
        for (bell, lease) in granted {
            // Who has gone meanwhile lets go of it here.
            drop(bell.send(Ok(lease)));
        }
        wake_at
    }

    async fn load(self: Arc<Self>, model: usize) {
        let (live, began) = (Arc::clone(&self.models[model]), Instant::now());
        let name = live.preparer.model.name.clone();
        let loaded = spawn_blocking(move || live.load()).await;
        let loaded = loaded.unwrap_or_else(|panic| Err(anyhow::anyhow!("loading it panicked: {panic}")));
        let (now, mut told) = (self.now(), Vec::new());
        {
            let mut inner = self.lock();
            let counts = &mut inner.counts[model];
            match loaded {
                Ok(work) => {
                    say(&format!("loaded {name} in {:.1} s", began.elapsed().as_secs_f64()));
                    counts.n_loads += 1;
                    counts.load_time += began.elapsed();
                    counts.error = None;
                    inner.works[model] = Some(Arc::new(work));
                    inner.room.loaded(model, now);
                }
                Err(error) => {
                    let why = format!("{error:#}");
                    say(&format!("loading {name}: {why}"));
                    counts.n_failures += 1;
                    counts.error = Some(why);
                    inner.room.failed(model, now);
                    told = inner.take_disappointed(model, now);
                }
            }
        }
        for (bell, absent) in told {
            // Who has gone meanwhile needs to hear nothing.
            drop(bell.send(Err(absent)));
        }
        self.bell.notify_one();
    }

    async fn unload(self: Arc<Self>, model: usize, work: Option<Arc<AtWork>>) {
        let live = Arc::clone(&self.models[model]);
        let name = live.preparer.model.name.clone();
        let stopped = spawn_blocking(move || work.map_or(Ok(()), |work| live.stop(&work))).await;
        match stopped {
            Ok(Ok(())) => say(&format!("unloaded {name}")),
            // An engine that failed has said so itself.
            Ok(Err(error)) => say(&format!("unloading {name}: {error:#}")),
            Err(panic) => say(&format!("unloading {name} panicked: {panic}")),
        }
        let mut inner = self.lock();
        inner.counts[model].n_unloads += 1;
        inner.room.unloaded(model);
        drop(inner);
        self.bell.notify_one();
    }

    /// Who waits is told that the server ends; nothing is loaded any more.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.is_closed = true;
        let waiting = std::mem::take(&mut inner.waiting);
        for (number, waiting) in &waiting {
            inner.room.give_up(waiting.model, *number);
        }
        drop(inner);
        for waiting in waiting.into_values() {
            drop(waiting.bell.send(Err(Absent::Closed)));
        }
    }

    /// Of each memory its name, what models may take of it together, and what they take: bytes.
    pub fn memories(&self) -> Vec<(&str, u64, u64)> {
        let inner = self.lock();
        let memory = |(i, name)| (String::as_str(name), inner.room.budget(i), inner.room.used(i));
        self.memories.iter().enumerate().map(memory).collect()
    }

    /// A model's place in memory.
    pub fn shown(&self, model: usize) -> Shown {
        let inner = self.lock();
        let state = match inner.room.state(model) {
            State::Out => "unloaded",
            State::Loading => "loading",
            State::In | State::Yielding => "loaded",
            State::Leaving => "unloading",
        };
        let (n_users, n_waiting) = inner.room.n_users(model);
        let (bytes, memory) = (inner.room.bytes(model), inner.room.memory(model));
        Shown { state, bytes, memory, n_users, n_waiting, counts: inner.counts[model].clone() }
    }
}

impl Inner {
    /// The engine of a model that is in.
    fn lend(&mut self, residency: &Arc<Residency>, model: usize, number: u64, ask: Option<Ask>) -> Lease {
        if let Some(ask) = ask {
            self.asks.insert(number, (model, ask));
        }
        let work = self.works[model].clone().expect("what is in has an engine");
        Lease { work, loading: None, residency: Arc::clone(residency), model, number }
    }

    /// Those who wait for a model that could not be loaded, and bear that no more.
    fn take_disappointed(&mut self, model: usize, now: Duration) -> Vec<(oneshot::Sender<Result<Lease, Absent>>, Absent)> {
        let absent = Absent::Failed(self.room.failures(model).1.saturating_sub(now));
        for waiting in self.waiting.values_mut().filter(|waiting| waiting.model == model) {
            waiting.max_failures = waiting.max_failures.map(|left| left.saturating_sub(1));
        }
        let gone = self.waiting.extract_if(|_, waiting| waiting.model == model && waiting.max_failures == Some(0));
        let gone: Vec<(u64, Waiting)> = gone.collect();
        gone.into_iter()
            .map(|(number, waiting)| {
                self.room.give_up(model, number);
                (waiting.bell, absent.clone())
            })
            .collect()
    }
}
