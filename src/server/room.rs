//! Which models are in memory, and which make room: decided from numbers alone. Knows no clock (time is told), no model and
//! no HTTP. Invariants: what is in a memory, comes or goes is never over its budget; a model is taken out only when nobody uses
//! it, and not before it was in for the least time; whoever wants a model gets it in the end, if models load and are let go of,
//! also one that waits in vain and comes again.

use std::collections::BTreeSet;
use std::time::Duration;

/// What is known of a model before it is loaded.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Weights, the memory of a step and the KV cache: bytes.
    pub bytes: u64,
    /// The memory that takes them: the machine's, or a device's own.
    pub memory: usize,
    /// After so much time without use it is taken out; `None`: only to make room.
    pub idle: Option<Duration>,
}

/// Where a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Not in memory.
    Out,
    /// On its way.
    Loading,
    /// In memory, and at work for whoever wants it.
    In,
    /// In memory until those who use it have let go of it: others need its room.
    Yielding,
    /// On its way out.
    Leaving,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Whoever wants it may use it; it is told by whom.
    Grant(u64),
    /// Those who use it should let go of it, if they can go on later.
    Ask(usize),
    /// It is to be put into memory; [`Room::loaded`] or [`Room::failed`] says when.
    Load(usize),
    /// It is to be taken out; [`Room::unloaded`] says when.
    Unload(usize),
}

/// First pause after a load that failed; each further one doubles it.
const RETRY: Duration = Duration::from_secs(10);
/// Longest.
const MAX_RETRY: Duration = Duration::from_mins(5);

/// Who waited in vain is back by then, if at all.
pub const COMES_AGAIN: Duration = Duration::from_secs(15);

/// See the module. Times are since any beginning.
#[derive(Debug)]
pub struct Room {
    /// By memory.
    budgets: Vec<u64>,
    least: Duration,
    places: Vec<Place>,
    /// When something changes by itself.
    wake_at: Option<Duration>,
}

#[derive(Debug)]
struct Place {
    terms: Terms,
    state: State,
    /// When it came in.
    since: Duration,
    n_users: usize,
    idle_since: Duration,
    /// When each should have it, and its number.
    wanted: BTreeSet<(Duration, u64)>,
    /// Who waited in vain should have had it by then, and is expected to come again until then.
    missed: Option<(Duration, Duration)>,
    /// Loads that failed, one after the other.
    n_failed: u32,
    /// It is not tried before that.
    retry_at: Duration,
}

impl Place {
    fn is_in(&self) -> bool {
        matches!(self.state, State::In | State::Yielding)
    }

    /// Whether somebody who waited in vain is expected to come again.
    fn is_missed(&self, now: Duration) -> bool {
        self.missed.is_some_and(|(_, until)| now < until)
    }

    /// Whether it came in for somebody like that, who is not back yet.
    fn is_reserved(&self, now: Duration) -> bool {
        self.is_missed(now) && self.n_users == 0 && self.idle_since == self.since
    }

    /// When the first who wants it should have it, if anybody does.
    fn due(&self, now: Duration) -> Option<Duration> {
        let missed = self.missed.filter(|_| self.is_missed(now)).map(|(due, _)| due);
        self.wanted.first().map(|&(due, _)| due).into_iter().chain(missed).min()
    }

    /// Those who wait for it have it.
    fn grant(&mut self, actions: &mut Vec<Action>) {
        if !self.wanted.is_empty() {
            self.missed = None;
        }
        self.n_users += self.wanted.len();
        actions.extend(std::mem::take(&mut self.wanted).into_iter().map(|(_, number)| Action::Grant(number)));
    }
}

impl Room {
    /// Memories of these budgets; all models are out. None is taken out before it was in for `least`.
    pub fn new(budgets: Vec<u64>, least: Duration, models: impl Iterator<Item = Terms>) -> Self {
        let zero = Duration::ZERO;
        let place = |terms| Place {
            terms,
            state: State::Out,
            since: zero,
            n_users: 0,
            idle_since: zero,
            wanted: BTreeSet::new(),
            missed: None,
            n_failed: 0,
            retry_at: zero,
        };
        Self { budgets, least, places: models.map(place).collect(), wake_at: None }
    }

    /// Where a model is.
    pub fn state(&self, model: usize) -> State {
        self.places[model].state
    }

    /// What a model takes when it is in.
    pub fn bytes(&self, model: usize) -> u64 {
        self.places[model].terms.bytes
    }

    /// The memory that a model takes.
    pub fn memory(&self, model: usize) -> usize {
        self.places[model].terms.memory
    }

    /// What models may take together of a memory.
    pub fn budget(&self, memory: usize) -> u64 {
        self.budgets[memory]
    }

    /// What they take of it now.
    pub fn used(&self, memory: usize) -> u64 {
        let own = self.places.iter().filter(|place| place.terms.memory == memory && place.state != State::Out);
        own.map(|place| place.terms.bytes).sum()
    }

    /// Who uses a model now, and who waits for it.
    pub fn n_users(&self, model: usize) -> (usize, usize) {
        (self.places[model].n_users, self.places[model].wanted.len())
    }

    /// How often in a row a model could not be loaded, and when that is tried again.
    pub fn failures(&self, model: usize) -> (u32, Duration) {
        (self.places[model].n_failed, self.places[model].retry_at)
    }

    /// When [`Room::decide`] should be asked, if nothing happens before.
    pub fn wake_at(&self) -> Option<Duration> {
        self.wake_at
    }

    /// A new want, which should have the model by `due`. True: it has it at once.
    pub fn want(&mut self, model: usize, number: u64, due: Duration) -> bool {
        let place = &mut self.places[model];
        if place.state == State::In {
            place.n_users += 1;
            place.missed = None;
        } else {
            place.wanted.insert((due, number));
        }
        place.state == State::In
    }

    /// A want is given up; one that has what it wanted is not one any more.
    pub fn give_up(&mut self, model: usize, number: u64) {
        self.places[model].wanted.retain(|&(_, other)| other != number);
    }

    /// As [`Room::give_up`], of one that waited as long as it may and is told to come again. Room is made for it meanwhile: else
    /// whoever comes between would have another model in use again each time.
    pub fn miss(&mut self, model: usize, number: u64, now: Duration) {
        let (place, until) = (&mut self.places[model], now + COMES_AGAIN);
        let Some(&want) = place.wanted.iter().find(|&&(_, other)| other == number) else { return };
        place.wanted.remove(&want);
        let due = place.missed.filter(|(_, until)| now < *until).map_or(want.0, |(due, _)| due.min(want.0));
        place.missed = Some((due, until));
    }

    /// Somebody does not use a model any more.
    pub fn release(&mut self, model: usize, now: Duration) {
        let place = &mut self.places[model];
        place.n_users -= 1;
        place.idle_since = now;
    }

    /// A model is in.
    pub fn loaded(&mut self, model: usize, now: Duration) {
        let place = &mut self.places[model];
        (place.state, place.since, place.idle_since, place.n_failed) = (State::In, now, now, 0);
        if let Some((_, until)) = place.missed.as_mut().filter(|(_, until)| now < *until) {
            *until = now + COMES_AGAIN;
        }
    }

    /// A model could not be loaded.
    pub fn failed(&mut self, model: usize, now: Duration) {
        let place = &mut self.places[model];
        place.state = State::Out;
        place.retry_at = now + (RETRY * 2_u32.saturating_pow(place.n_failed)).min(MAX_RETRY);
        place.n_failed += 1;
    }

    /// A model is out.
    pub fn unloaded(&mut self, model: usize) {
        self.places[model].state = State::Out;
    }

    /// What is to be done now. Models that are wanted come in by when the first who wants each should have it.
    pub fn decide(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        self.wake_at = None;
        // Before others may want the room: whoever waited for what has just come in has it first.
        for place in self.places.iter_mut().filter(|place| place.state == State::In) {
            place.grant(&mut actions);
        }
        for model in 0..self.places.len() {
            if let Some((_, until)) = self.places[model].missed.filter(|_| self.places[model].is_missed(now)) {
                self.wake_by(until);
            }
        }
        let (mut claimed, mut yields) = (vec![false; self.places.len()], vec![false; self.places.len()]);
        for memory in 0..self.budgets.len() {
            self.make_room(memory, now, (&mut claimed, &mut yields), &mut actions);
        }
        self.grant_and_idle((&claimed, &yields), now, &mut actions);
        actions
    }

    /// What is to be done for the models that are wanted in a memory, and out.
    fn make_room(
        &mut self,
        memory: usize,
        now: Duration,
        (claimed, yields): (&mut [bool], &mut [bool]),
        actions: &mut Vec<Action>,
    ) {
        let own: Vec<usize> = (0..self.places.len()).filter(|&model| self.places[model].terms.memory == memory).collect();
        let mut heads: Vec<(Duration, usize)> = own
            .iter()
            .filter(|&&model| self.places[model].state == State::Out)
            .filter_map(|&model| Some((self.places[model].due(now)?, model)))
            .collect();
        heads.sort_unstable();
        let mut free = self.budgets[memory].saturating_sub(self.used(memory));
        let leaving = own.iter().map(|&model| &self.places[model]).filter(|place| place.state == State::Leaving);
        let mut leaving: u64 = leaving.map(|place| place.terms.bytes).sum();
        for (due, model) in heads {
            let retry_at = self.places[model].retry_at;
            if retry_at > now {
                self.wake_by(retry_at);
                continue;
            }
            let bytes = self.places[model].terms.bytes;
            if bytes <= free {
                free -= bytes;
                self.places[model].state = State::Loading;
                actions.push(Action::Load(model));
                continue;
            }
            let missing = (bytes - free).saturating_sub(leaving);
            let is_due = due <= now;
            if !is_due {
                self.wake_by(due);
            }
            match self.victims((memory, missing), is_due, now, claimed) {
                Some(victims) => {
                    let from_victims: u64 = victims.iter().map(|&victim| self.places[victim].terms.bytes).sum();
                    let rest = bytes.saturating_sub(from_victims);
                    let from_leaving = rest.min(leaving);
                    (leaving, free) = (leaving - from_leaving, free.saturating_sub(rest - from_leaving));
                    for victim in victims {
                        claimed[victim] = true;
                        self.take(victim, now, yields, actions);
                    }
                }
                // Others are on their way in: it is the next, and nobody overtakes it.
                None if is_due => break,
                None => {}
            }
        }
    }

    /// Who makes room for `missing` bytes of a memory: who has been asked already, then who is idle longest; who is in use only for
    /// somebody whose time has come.
    fn victims(&self, (memory, missing): (usize, u64), is_due: bool, now: Duration, claimed: &[bool]) -> Option<Vec<usize>> {
        let rank = |&model: &usize| {
            let place = &self.places[model];
            let is_early = now < place.since + self.least;
            (place.state != State::Yielding, is_early, place.n_users > 0, place.idle_since.max(place.since), model)
        };
        let fits = |&model: &usize| {
            let place = &self.places[model];
            let is_free = place.terms.memory == memory && place.is_in() && !claimed[model];
            is_free && !place.is_reserved(now) && (is_due || place.n_users == 0)
        };
        let mut candidates: Vec<usize> = (0..self.places.len()).filter(fits).collect();
        candidates.sort_by_key(rank);
        let (mut victims, mut found) = (Vec::new(), 0);
        for model in candidates {
            if found < missing {
                found += self.places[model].terms.bytes;
                victims.push(model);
            }
        }
        if found < missing {
            return None;
        }
        // Who came first may not be needed beside a larger one.
        victims.retain(|&model| {
            let bytes = self.places[model].terms.bytes;
            let is_needed = found - bytes < missing;
            found -= if is_needed { 0 } else { bytes };
            is_needed
        });
        Some(victims)
    }

    /// A model is to make room, as soon as it may.
    fn take(&mut self, victim: usize, now: Duration, yields: &mut [bool], actions: &mut Vec<Action>) {
        let ready_at = self.places[victim].since + self.least;
        let place = &mut self.places[victim];
        if now < ready_at {
            self.wake_by(ready_at);
        } else if place.n_users == 0 {
            place.state = State::Leaving;
            actions.push(Action::Unload(victim));
        } else {
            yields[victim] = true;
            if place.state == State::In {
                place.state = State::Yielding;
                actions.push(Action::Ask(victim));
            }
        }
    }

    /// Those that are in and need not yield are used; if nobody does for long, they go.
    fn grant_and_idle(&mut self, (claimed, yields): (&[bool], &[bool]), now: Duration, actions: &mut Vec<Action>) {
        for model in 0..self.places.len() {
            let place = &mut self.places[model];
            if place.state == State::Yielding && !yields[model] {
                place.state = State::In;
            }
            if place.state != State::In {
                continue;
            }
            place.grant(actions);
            let is_idle = place.n_users == 0 && !claimed[model] && !place.is_reserved(now);
            let Some(idle) = place.terms.idle.filter(|_| is_idle) else { continue };
            let at = (place.idle_since + idle).max(place.since + self.least);
            if at <= now {
                place.state = State::Leaving;
                actions.push(Action::Unload(model));
            } else {
                self.wake_by(at);
            }
        }
    }

    fn wake_by(&mut self, at: Duration) {
        self.wake_at = Some(self.wake_at.map_or(at, |other| other.min(at)));
    }
}
