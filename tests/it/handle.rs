//! The engine on its thread: what is submitted comes out, a full queue makes the sender wait and not fail, and an
//! engine that stops says why and leaves nobody waiting. What is asserted does not depend on who runs when.

use std::sync::mpsc::{Receiver, Sender, channel};

use valar::device::Lost;
use valar::device::batch::{Batch, StepOutput};
use valar::engine::handle::{Delivery, EngineHandle};
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, Finished, Submission};
use valar::model::{Runner, RunnerLimits};
use valar::window::Class;

use crate::ahead::Alone;
use crate::fake::{FakeRunner, Fault, N_VOCAB, expected, fake_tokens};

const LIMITS: RunnerLimits =
    RunnerLimits { n_blocks: 30, max_step_tokens: 32, max_step_seqs: 4, n_vocab: N_VOCAB, max_context: 100 };

fn start(runner: FakeRunner) -> (EngineHandle, Receiver<Finished>) {
    start_with(runner, 2)
}

fn start_with(runner: FakeRunner, max_waiting: usize) -> (EngineHandle, Receiver<Finished>) {
    let config = EngineConfig { max_waiting, ..EngineConfig::for_runner(&LIMITS) };
    let engine = Engine::new(config, Box::new(runner), fake_tokens()).expect("the limits are sound");
    let (sender, receiver) = channel();
    let deliver = move |step: Delivery<'_>| step.finished.into_iter().for_each(|f| sender.send(f).expect("the test listens"));
    (EngineHandle::start(engine, Box::new(deliver)).expect("a thread"), receiver)
}

fn row(id: u64, class: Class) -> Submission {
    let params = SeqParams { max_tokens: 1 + (id % 30) as u32, seed: id, ..SeqParams::default() };
    Submission {
        id,
        prompt: vec![(id % 10) as u32; 1 + (id % 50) as usize].into(),
        params,
        class,
        keep_tokens: 1,
        stream: class as u32,
        due: Due::NEVER,
    }
}

#[test]
fn all_that_several_threads_submit_finishes() {
    let (handle, receiver) = start(FakeRunner::new(LIMITS, LIMITS.max_step_tokens));
    std::thread::scope(|scope| {
        for class in Class::ALL {
            let handle = &handle;
            scope.spawn(move || (0..100).for_each(|i| handle.submit(row(3 * i + class as u64, class)).expect("it runs")));
        }
    });
    let stats = handle.drain().expect("nothing failed");
    let mut finished: Vec<Finished> = receiver.iter().collect();
    finished.sort_by_key(|f| f.id);
    assert_eq!((finished.len(), stats.finished, stats.running + stats.waiting), (300, 300, 0));
    for (id, finished) in finished.iter().enumerate() {
        let row = row(id as u64, Class::Batch);
        assert_eq!(*finished, expected(row.id, &row.prompt, &row.params, LIMITS.max_context));
    }
}

#[test]
fn a_cancel_touches_no_other_row() {
    let (handle, receiver) = start(FakeRunner::new(LIMITS, LIMITS.max_step_tokens));
    handle.submit(row(5, Class::Batch)).expect("it runs");
    handle.cancel(5); // which may have finished by now
    handle.cancel(77); // which never was
    handle.submit(row(6, Class::Batch)).expect("it runs");
    let stats = handle.drain().expect("nothing failed");
    let ids: Vec<u64> = receiver.iter().map(|f| f.id).filter(|&id| id != 5).collect();
    assert_eq!((ids, stats.running, stats.waiting), (vec![6], 0, 0));
}

#[test]
fn a_failing_engine_says_why_and_lets_senders_go() {
    for (fault, why) in [(Fault::Error, "on fire"), (Fault::Panic, "the kernel has a bug")] {
        let (handle, receiver) = start_with(FakeRunner::failing(LIMITS, 3, fault), 16);
        // Together, so that they fail one after the other however slow the sender is.
        assert!(handle.submit_all((0..16).map(|id| row(29 + 30 * id, Class::Batch))));
        // More rows than queue and engine hold: without an end the sender would wait for ever.
        let refused = (16..1000).find_map(|id| handle.submit(row(29 + 30 * id, Class::Batch)).err());
        assert!(refused.is_some());
        assert!(receiver.iter().count() < 1000);
        let error = handle.drain().expect_err("the runner failed");
        assert!(format!("{error:#}").contains(why), "{error:#}");
    }
}

#[test]
fn abort_stops_without_finishing() {
    let (handle, receiver) = start(FakeRunner::new(LIMITS, LIMITS.max_step_tokens));
    (0..6).for_each(|id| handle.submit(row(id, Class::Standard)).expect("it runs"));
    handle.abort();
    let stats = handle.drain().expect("nothing failed");
    assert_eq!(receiver.iter().count() as u64, stats.finished);
}

/// What happened on the engine's thread; of a step that is handed on, which, and the position of its token.
#[derive(Debug, PartialEq)]
enum Event {
    Start,
    Run,
    Step(u64, usize),
    Finished(usize),
}

/// A device that goes on by itself, until it is lost in that step.
struct Lonely {
    inner: Alone,
    events: Sender<Event>,
    lost_in: u64,
    step: u64,
}

impl Runner for Lonely {
    fn limits(&self) -> RunnerLimits {
        self.inner.limits()
    }

    fn start(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<bool> {
        self.events.send(Event::Start).unwrap();
        self.inner.start(batch, out)
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<()> {
        self.step += 1;
        self.events.send(Event::Run).unwrap();
        if self.step == self.lost_in {
            return Err(Lost("it is gone".into()).into());
        }
        self.inner.run(batch, out)
    }
}

/// What happens while one row of this many tokens runs; how it ended.
fn happens(n_tokens: u32, lost_in: u64) -> (Vec<Event>, anyhow::Result<()>) {
    let (events, happened) = channel();
    let inner = Alone::new(FakeRunner::new(LIMITS, LIMITS.max_step_tokens));
    let runner = Lonely { inner, events: events.clone(), lost_in, step: 0 };
    let engine = Engine::new(EngineConfig::for_runner(&LIMITS), Box::new(runner), fake_tokens()).unwrap();
    let deliver = move |step: Delivery<'_>| {
        if let [share] = step.step {
            events.send(Event::Step(step.stats.steps, share.first_position)).unwrap();
        }
        if !step.finished.is_empty() {
            events.send(Event::Finished(step.finished.len())).unwrap();
        }
    };
    let handle = EngineHandle::start(engine, Box::new(deliver)).unwrap();
    let params = SeqParams { max_tokens: n_tokens, ignore_eos: true, ..SeqParams::default() };
    handle.submit(Submission { prompt: vec![5, 6, 7].into(), params, ..row(1, Class::Batch) }).unwrap();
    let ended = handle.drain().map(drop);
    (happened.iter().collect(), ended)
}

#[test]
fn results_are_handed_on_while_a_device_is_at_the_next_step() {
    use Event::{Finished, Run, Start, Step};
    let (events, ended) = happens(4, 0);
    ended.unwrap();
    // Each step but the first begins before the one before it has ended.
    let first = [Start, Start, Run, Start, Step(1, 0), Run, Start, Step(2, 3), Run];
    let last = [Step(3, 4), Run, Step(4, 5), Finished(1)];
    assert_eq!(events, first.into_iter().chain(last).collect::<Vec<_>>());
    // What was there before the device was lost is not.
    let (events, ended) = happens(9, 3);
    assert!(ended.unwrap_err().to_string().contains("it is gone"));
    assert_eq!(events, [Start, Start, Run, Start, Step(1, 0), Run, Start, Step(2, 3), Run]);
}
