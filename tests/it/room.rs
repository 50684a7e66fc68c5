//! Which models are in memory, and which make room, on a clock of our own.

use proptest::prelude::*;
use std::time::Duration;
use valar::server::room::{Action, COMES_AGAIN, Room, State, Terms};

const LEAST: Duration = Duration::from_secs(10);

fn room(budget: u64, sizes: &[u64]) -> Room {
    Room::new(vec![budget], LEAST, sizes.iter().map(|&bytes| Terms { bytes, memory: 0, idle: None }))
}

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Puts a model in.
fn load(room: &mut Room, model: usize, now: Duration) {
    assert!(!room.want(model, 1000 + model as u64, now));
    assert_eq!(room.decide(now), [Action::Load(model)]);
    room.loaded(model, now);
    assert_eq!(room.decide(now), [Action::Grant(1000 + model as u64)]);
    room.release(model, now);
}

#[test]
fn the_one_that_is_idle_longest_makes_room_once_it_was_in_for_the_least_time() {
    let mut room = room(10, &[4, 4, 4]);
    load(&mut room, 0, s(0));
    load(&mut room, 1, s(1));
    assert!(room.want(0, 1, s(2)), "it is in");
    room.release(0, s(3));
    assert!(!room.want(2, 2, s(4)));
    assert_eq!((room.decide(s(4)), room.wake_at()), (vec![], Some(s(11))), "all are new");
    assert_eq!(room.decide(s(11)), [Action::Unload(1)], "0 was used after 1");
    assert_eq!(room.decide(s(11)), [], "that is under way");
    room.unloaded(1);
    assert_eq!(room.decide(s(12)), [Action::Load(2)]);
    assert_eq!(room.decide(s(12)), [], "once");
}

#[test]
fn one_in_use_yields_to_what_is_due_and_is_wanted_again() {
    let mut room = room(10, &[6, 6]);
    load(&mut room, 0, s(0));
    assert!(room.want(0, 1, s(1)));
    assert!(!room.want(1, 2, s(60)));
    assert_eq!((room.decide(s(20)), room.wake_at()), (vec![], Some(s(60))), "it has time");
    assert!(room.want(0, 3, s(21)), "and others go on meanwhile");
    assert_eq!(room.decide(s(60)), [Action::Ask(0)]);
    assert!(!room.want(0, 4, s(61)), "who comes now waits");
    assert_eq!(room.decide(s(61)), [], "it was asked");
    room.release(0, s(62));
    room.release(0, s(63));
    assert_eq!(room.decide(s(63)), [Action::Unload(0)]);
    room.unloaded(0);
    assert_eq!(room.decide(s(64)), [Action::Load(1)]);
    room.loaded(1, s(65));
    assert_eq!((room.decide(s(65)), room.wake_at()), (vec![Action::Grant(2)], Some(s(75))), "now the other's turn ends");
    assert_eq!(room.decide(s(75)), [Action::Ask(1)]);
    room.release(1, s(76));
    assert_eq!(room.decide(s(76)), [Action::Unload(1)]);
}

#[test]
fn who_waited_for_a_model_has_it_before_it_makes_room_again() {
    let mut room = Room::new(vec![10], s(0), [6, 6].map(|bytes| Terms { bytes, memory: 0, idle: None }).into_iter());
    assert!(!room.want(0, 1, s(0)));
    assert_eq!(room.decide(s(0)), [Action::Load(0)]);
    assert!(!room.want(1, 2, s(0)), "the other one is wanted, too");
    room.loaded(0, s(1));
    assert_eq!(room.decide(s(1)), [Action::Grant(1), Action::Ask(0)]);
    room.release(0, s(2));
    assert_eq!(room.decide(s(2)), [Action::Unload(0)]);
}

#[test]
fn who_was_asked_in_vain_goes_on() {
    let mut room = room(10, &[6, 6]);
    load(&mut room, 0, s(0));
    assert!(room.want(0, 1, s(1)));
    assert!(!room.want(1, 2, s(1)));
    assert_eq!(room.decide(s(20)), [Action::Ask(0)]);
    assert!(!room.want(0, 3, s(21)));
    room.give_up(1, 2);
    assert_eq!(room.decide(s(22)), [Action::Grant(3)]);
    assert_eq!(room.state(0), State::In);
}

#[test]
fn who_waited_in_vain_finds_the_model_when_it_comes_again() {
    let mut room = room(10, &[6, 6]);
    load(&mut room, 0, s(0));
    assert!(room.want(0, 1, s(1)));
    assert!(!room.want(1, 2, s(20)));
    assert_eq!(room.decide(s(20)), [Action::Ask(0)]);
    assert!(!room.want(0, 3, s(21)), "who comes now waits");
    // Who came first may not wait longer than the one who uses the other; the others wait on meanwhile.
    room.miss(1, 2, s(25));
    assert_eq!((room.decide(s(25)), room.wake_at()), (vec![], Some(s(25) + COMES_AGAIN)));
    assert!(!room.want(1, 4, s(30)), "it comes again, and waits again in vain");
    room.miss(1, 4, s(35));
    room.release(0, s(36));
    assert_eq!(room.decide(s(36)), [Action::Unload(0)]);
    room.unloaded(0);
    assert_eq!(room.decide(s(37)), [Action::Load(1)]);
    room.loaded(1, s(38));
    // The least time passes, and it is kept for who is not back yet.
    assert_eq!((room.decide(s(49)), room.wake_at()), (vec![], Some(s(38) + COMES_AGAIN)));
    assert!(room.want(1, 5, s(50)), "now it has the model");
    assert_eq!(room.decide(s(50)), [Action::Ask(1)], "and then it is the others' turn");
    room.release(1, s(51));
    assert_eq!(room.decide(s(51)), [Action::Unload(1)]);
}

#[test]
fn nobody_is_kept_waiting_for_who_does_not_come_again() {
    let mut room = room(10, &[6, 6]);
    load(&mut room, 0, s(0));
    assert!(room.want(0, 1, s(1)));
    assert!(!room.want(1, 2, s(20)));
    assert_eq!(room.decide(s(20)), [Action::Ask(0)]);
    assert!(!room.want(0, 3, s(21)));
    room.miss(1, 2, s(25));
    assert_eq!(room.decide(s(25)), []);
    assert_eq!(room.decide(s(25) + COMES_AGAIN), [Action::Grant(3)]);
    // Nor is a model that came in for it.
    room.release(0, s(41));
    assert!(!room.want(1, 4, s(41)), "the other is out");
    assert_eq!(room.decide(s(41)), [Action::Ask(0)]);
    room.miss(1, 4, s(45));
    room.release(0, s(46));
    assert_eq!(room.decide(s(46)), [Action::Unload(0)]);
    assert!(!room.want(0, 5, s(46)));
    room.unloaded(0);
    assert_eq!(room.decide(s(47)), [Action::Load(1)]);
    room.loaded(1, s(48));
    assert_eq!(room.decide(s(58)), []);
    assert_eq!(room.decide(s(48) + COMES_AGAIN), [Action::Unload(1)]);
}

#[test]
fn memories_are_not_each_others() {
    let terms = [(8, 0), (8, 1), (8, 1)].map(|(bytes, memory)| Terms { bytes, memory, idle: None });
    let mut room = Room::new(vec![10, 10], LEAST, terms.into_iter());
    load(&mut room, 0, s(0));
    load(&mut room, 1, s(1));
    assert_eq!([0, 1].map(|memory| (room.used(memory), room.budget(memory))), [(8, 10), (8, 10)]);
    // What waits for the one takes nothing out of the other, and holds nobody up there.
    assert!(!room.want(2, 2, s(20)));
    assert_eq!(room.decide(s(20)), [Action::Unload(1)]);
    assert!(room.want(0, 3, s(21)), "nobody needs that one's room");
    assert_eq!((room.state(0), room.used(0), room.used(1)), (State::In, 8, 8));
}

#[test]
fn a_load_that_failed_is_tried_again_later_and_later() {
    let mut room = room(10, &[6]);
    assert!(!room.want(0, 1, s(0)));
    assert_eq!(room.decide(s(0)), [Action::Load(0)]);
    room.failed(0, s(1));
    assert_eq!((room.decide(s(1)), room.wake_at()), (vec![], Some(s(11))));
    assert_eq!(room.decide(s(11)), [Action::Load(0)]);
    room.failed(0, s(12));
    assert_eq!((room.decide(s(12)), room.wake_at()), (vec![], Some(s(32))));
    assert_eq!(room.failures(0), (2, s(32)));
}

#[test]
fn what_nobody_uses_goes_after_its_time() {
    let mut room = Room::new(vec![10], LEAST, [Terms { bytes: 6, memory: 0, idle: Some(s(30)) }].into_iter());
    load(&mut room, 0, s(0));
    assert!(room.want(0, 1, s(20)));
    assert_eq!((room.decide(s(40)), room.wake_at()), (vec![], None), "it is used");
    room.release(0, s(50));
    assert_eq!((room.decide(s(50)), room.wake_at()), (vec![], Some(s(80))));
    assert_eq!(room.decide(s(80)), [Action::Unload(0)]);
}

/// The outside world of a room: wants come, models take their time, users let go; more slowly of one that they are not
/// asked to let go of.
struct World {
    room: Room,
    now: Duration,
    /// (number, model, since when) of those that wait.
    waiting: Vec<(u64, usize, Duration)>,
    /// (model, until when) of those who use it.
    using: Vec<(usize, Duration)>,
    /// What ends when.
    under_way: Vec<(Action, Duration)>,
    since: Vec<Duration>,
    hold: Duration,
}

impl World {
    fn decide(&mut self) {
        for action in self.room.decide(self.now) {
            match action {
                Action::Grant(number) => {
                    let place = self.waiting.iter().position(|&(other, ..)| other == number).expect("it waits");
                    let (_, model, _) = self.waiting.remove(place);
                    self.using.push((model, self.now + self.hold));
                }
                Action::Ask(_) => {}
                Action::Load(_) => self.under_way.push((action, self.now + s(3))),
                Action::Unload(model) => {
                    assert!(self.using.iter().all(|&(used, _)| used != model), "it is in use");
                    assert!(self.now >= self.since[model] + LEAST, "it has only just come");
                    self.under_way.push((action, self.now + s(1)));
                }
            }
        }
        assert!(self.room.used(0) <= self.room.budget(0));
    }

    fn second(&mut self) {
        self.now += s(1);
        let now = self.now;
        for &(action, _) in self.under_way.iter().filter(|(_, end)| *end <= now) {
            match action {
                Action::Load(model) => {
                    self.room.loaded(model, now);
                    self.since[model] = now;
                }
                Action::Unload(model) => self.room.unloaded(model),
                other => panic!("{other:?} takes no time"),
            }
        }
        self.under_way.retain(|(_, end)| *end > now);
        let done: Vec<usize> = self.using.iter().filter(|(_, end)| *end <= now).map(|&(model, _)| model).collect();
        self.using.retain(|(_, end)| *end > now);
        for model in done {
            self.room.release(model, now);
        }
        self.decide();
    }
}

proptest! {
    /// Whatever is wanted when, of models that fit: nobody waits for ever, and the budget holds.
    #[test]
    fn everybody_gets_what_it_wants(
        sizes in prop::collection::vec(1..=10_u64, 1..6),
        wants in prop::collection::vec((0..400_u64, 0..6_usize, 0..60_u64), 1..80),
        hold in 1..40_u64,
    ) {
        let (n_models, n_wants) = (sizes.len(), wants.len() as u64);
        let mut world = World {
            room: room(10, &sizes),
            now: s(0),
            waiting: Vec::new(),
            using: Vec::new(),
            under_way: Vec::new(),
            since: vec![s(0); n_models],
            hold: s(hold),
        };
        let mut wants: Vec<_> = wants.into_iter().enumerate().collect();
        wants.sort_by_key(|(_, (at, ..))| *at);
        // A turn of every model for everything that may be before it, at the slowest.
        let longest = (n_wants + n_models as u64) * (LEAST.as_secs() + hold + 5) + 60;
        for second in 0..400 + longest {
            while let Some(&(number, (_, model, patience))) = wants.first().filter(|(_, (at, ..))| *at <= second) {
                wants.remove(0);
                let (number, model, now) = (number as u64, model % n_models, world.now);
                if world.room.want(model, number, now + s(patience)) {
                    world.using.push((model, now + world.hold));
                } else {
                    world.waiting.push((number, model, now));
                }
            }
            world.second();
            for (number, model, since) in &world.waiting {
                prop_assert!(world.now.saturating_sub(*since) <= s(longest), "{number} waits for {model} since {since:?}");
            }
        }
        prop_assert!(world.waiting.is_empty());
        // Who let go of everything left nobody behind.
        prop_assert!((0..n_models).all(|model| world.room.n_users(model) == (0, 0)));
    }
}
