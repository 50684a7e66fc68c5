//! The engine on a thread of its own: commands in, finished rows out through a callback. Knows nothing of what is done
//! with them. Invariant: nobody waits for ever: a full queue makes `submit` wait, a stopped engine makes it return, and
//! why it stopped is what `drain` returns.

use std::any::Any;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use super::{Checkpoint, Due, Engine, EngineStats, Finished, Progress, Scheduled, Submission};
use crate::model::RunnerLimits;
use crate::window::Class;
use crate::window::turns::{Share, Turns};

/// Cancels and ends of streams that may be on their way to the engine before their senders wait.
const CONTROL_COMMANDS: usize = 64;

/// Most prompts that are sent to the engine at a time.
const GROUP: usize = 256;

/// Steps after which an idle engine's books are audited again: that takes as long as many small steps.
const AUDIT_STEPS: u64 = 1024;

/// Called on the engine's thread after each step (where the device computes by itself, while it is at the next), with what came of
/// it, and when there is nothing left to do. The engine waits for it: it should hand on and return, and must not call the handle.
pub type Deliver = Box<dyn FnMut(Delivery<'_>) + Send>;

/// What came of a step.
pub struct Delivery<'a> {
    /// Rows that it completed.
    pub finished: Vec<Finished>,
    /// What watched rows gained.
    pub progress: Vec<Progress>,
    /// What rows that want it are to go on from, should all this end.
    pub checkpoints: Vec<Checkpoint>,
    /// What the step ran; empty when there is nothing left to do.
    pub step: &'a [Scheduled],
    /// Counters and gauges.
    pub stats: &'a EngineStats,
}

/// An engine at work on its own thread. May be shared by reference between threads.
pub struct EngineHandle {
    commands: SyncSender<Command>,
    gate: Arc<Gate>,
    limits: RunnerLimits,
    /// The engine's clock began then.
    began: Instant,
    /// Until somebody has waited for its end.
    thread: Mutex<Option<JoinHandle<anyhow::Result<EngineStats>>>>,
}

#[expect(clippy::large_enum_variant, reason = "most commands are submissions, and a queue of them is short")]
enum Command {
    Submit(Submission),
    SubmitAll(Vec<Submission>),
    Cancel(u64),
    CancelAll(Vec<u64>),
    EndStream(u32),
    Abort,
}

impl EngineHandle {
    /// Moves an engine to a new thread.
    ///
    /// # Errors
    /// If the thread can't be made.
    pub fn start(engine: Engine, deliver: Deliver) -> anyhow::Result<Self> {
        let max_waiting = engine.config().max_waiting;
        let limits = *engine.limits();
        let gate = Arc::new(Gate::new(max_waiting));
        // Each class's gate lets through no more than the engine takes, so the engine can always take what is sent and
        // a full queue of one class never stands in another's way.
        let (commands, inbox) = sync_channel(Class::ALL.len() * max_waiting + CONTROL_COMMANDS);
        let closer = GateCloser(Arc::clone(&gate));
        let (thread, began) = (Builder::new().name("engine".into()), Instant::now());
        let work = move || work(engine, &inbox, deliver, (&closer.0, began));
        let thread = thread.spawn(work).context("starting the engine's thread")?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { commands, gate, limits, began, thread })
    }

    /// The time of the engine's clock, by which rows are due: milliseconds.
    pub fn now_ms(&self) -> i64 {
        self.began.elapsed().as_millis() as i64
    }

    /// Queues a prompt; waits while its class's queue is full.
    ///
    /// # Errors
    /// The submission, if the engine has stopped: [`EngineHandle::drain`] says why. (One that was queued just before it
    /// stopped is lost with it.)
    ///
    /// # Panics
    /// If it could never run: see [`Submission::check`].
    #[expect(clippy::result_large_err, reason = "a refused submission comes back whole, to be submitted again")]
    pub fn submit(&self, submission: Submission) -> Result<(), Submission> {
        submission.check(&self.limits);
        if self.gate.enter(submission.class, (submission.due, submission.params.share), 1) == 0 {
            return Err(submission);
        }
        self.commands.send(Command::Submit(submission)).map_err(|refused| match refused.0 {
            Command::Submit(submission) => submission,
            _ => unreachable!("what was sent comes back"),
        })
    }

    /// Queues prompts, in this order; waits while their class's queue is full. Takes far fewer turns with the engine's
    /// thread than one [`EngineHandle::submit`] for each. False if the engine has stopped: what was not taken is lost.
    ///
    /// # Panics
    /// If one could never run: see [`Submission::check`].
    #[must_use]
    pub fn submit_all(&self, submissions: impl Iterator<Item = Submission>) -> bool {
        let mut rest = submissions.inspect(|next| next.check(&self.limits)).peekable();
        while let Some((class, due, share)) = rest.peek().map(|next| (next.class, next.due, next.params.share)) {
            let n_places = self.gate.enter(class, (due, share), GROUP);
            if n_places == 0 {
                return false;
            }
            let same = std::iter::from_fn(|| rest.next_if(|next| next.class == class));
            let group: Vec<Submission> = same.take(n_places).collect();
            self.gate.give_back(class, share, n_places - group.len());
            if self.commands.send(Command::SubmitAll(group)).is_err() {
                return false;
            }
        }
        true
    }

    /// Forgets a sequence, unless it has finished by then.
    pub fn cancel(&self, id: u64) {
        self.control(Command::Cancel(id));
    }

    /// Forgets sequences, unless they have finished by then.
    pub fn cancel_all(&self, ids: Vec<u64>) {
        self.control(Command::CancelAll(ids));
    }

    /// See [`Engine::end_stream`].
    pub fn end_stream(&self, stream: u32) {
        self.control(Command::EndStream(stream));
    }

    /// Completes all that was submitted, then stops the engine.
    ///
    /// # Errors
    /// Why it stopped before that: the runner's error, or the message of its panic.
    pub fn drain(self) -> anyhow::Result<EngineStats> {
        let Self { commands, thread, .. } = self;
        drop(commands);
        match thread.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(thread) => join(thread),
            None => Err(anyhow!("the engine was stopped")),
        }
    }

    /// Stops the engine after the step under way, as [`EngineHandle::abort`] does, and waits until it and its model are out
    /// of memory.
    ///
    /// # Errors
    /// Why it stopped before that.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.abort();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.map_or(Ok(()), |thread| join(thread).map(drop))
    }

    /// Asks the engine to stop after the step under way; rows that have not finished are dropped, after a last checkpoint.
    /// `submit` returns then, and [`EngineHandle::drain`] waits for it.
    pub fn abort(&self) {
        self.control(Command::Abort);
    }

    /// A stopped engine needs no command: then the send fails, and that is right.
    fn control(&self, command: Command) {
        drop(self.commands.send(command));
    }
}

fn join(thread: JoinHandle<anyhow::Result<EngineStats>>) -> anyhow::Result<EngineStats> {
    thread.join().unwrap_or_else(|panic| Err(anyhow!("the engine panicked: {}", panic_message(&*panic))))
}

/// What a panic said.
pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// What is handed on of steps.
struct Outbox {
    deliver: Deliver,
    /// What came of the last step, if it is to be handed on while the device is at the next.
    held: Option<Held>,
}

/// A [`Delivery`], with what it borrows.
struct Held {
    finished: Vec<Finished>,
    progress: Vec<Progress>,
    checkpoints: Vec<Checkpoint>,
    step: Vec<Scheduled>,
    stats: EngineStats,
}

impl Outbox {
    /// Hands on what was held.
    fn hand_on(&mut self) {
        if let Some(Held { finished, progress, checkpoints, step, stats }) = self.held.take() {
            (self.deliver)(Delivery { finished, progress, checkpoints, step: &step, stats: &stats });
        }
    }

    /// Takes what came of a step: to hold it, if the device computes by itself, else to hand it on at once.
    fn take(&mut self, engine: &mut Engine, finished: Vec<Finished>, holds: bool) {
        let (progress, checkpoints) = (engine.take_progress(), engine.take_checkpoints());
        let (step, stats) = (engine.last_step(), engine.stats());
        if holds {
            self.held = Some(Held { finished, progress, checkpoints, step: step.to_vec(), stats: *stats });
        } else {
            (self.deliver)(Delivery { finished, progress, checkpoints, step, stats });
        }
    }

    /// Hands on what was held, and these, which are of no step.
    fn end(&mut self, engine: &Engine, checkpoints: Vec<Checkpoint>) {
        self.hand_on();
        let (finished, progress) = Default::default();
        (self.deliver)(Delivery { finished, progress, checkpoints, step: &[], stats: engine.stats() });
    }
}

/// The thread: take commands, step, deliver (while the next step is under way, where the device goes on by itself).
fn work(
    mut engine: Engine,
    inbox: &Receiver<Command>,
    deliver: Deliver,
    (gate, began): (&Gate, Instant),
) -> anyhow::Result<EngineStats> {
    let mut outbox = Outbox { deliver, held: None };
    let mut finished = Vec::new();
    let mut n_known = [0; Class::ALL.len()]; // rows that hold a place in the gate and have reached the engine
    let mut is_open = true;
    let mut audit_at = 0; // steps
    loop {
        while is_open {
            // With nothing to do, wait for a command; else take those that are there.
            let command = if engine.has_work() {
                inbox.try_recv()
            } else {
                if engine.stats().steps >= audit_at {
                    engine.check();
                    audit_at = engine.stats().steps + AUDIT_STEPS;
                }
                // Rows may have been cancelled since the last step: whoever reads the gauges should see it.
                outbox.end(&engine, Vec::new());
                let Some(command) = wait_for_command(&mut engine, inbox, began) else { continue };
                command
            };
            match command {
                Ok(Command::Submit(submission)) => {
                    n_known[submission.class as usize] += 1;
                    engine.queue(submission).expect("checked, and let through by the gate");
                }
                Ok(Command::SubmitAll(group)) => {
                    for submission in group {
                        n_known[submission.class as usize] += 1;
                        engine.queue(submission).expect("checked, and let through by the gate");
                    }
                }
                Ok(Command::Cancel(id)) => drop(engine.cancel(id)),
                Ok(Command::CancelAll(ids)) => {
                    for id in ids {
                        engine.cancel(id);
                    }
                }
                Ok(Command::EndStream(stream)) => engine.end_stream(stream),
                Ok(Command::Abort) => {
                    engine.checkpoint_all();
                    let checkpoints = engine.take_checkpoints();
                    outbox.end(&engine, checkpoints);
                    return Ok(*engine.stats());
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => is_open = false,
            }
            leave(&engine, &mut n_known, gate);
        }
        if !engine.has_work() {
            outbox.hand_on();
            engine.check();
            return Ok(*engine.stats());
        }
        engine.advance(began.elapsed().as_millis() as i64);
        let is_under_way = engine.start();
        outbox.hand_on();
        engine.step(&mut finished)?;
        engine.advance(began.elapsed().as_millis() as i64);
        leave(&engine, &mut n_known, gate);
        outbox.take(&mut engine, std::mem::take(&mut finished), is_under_way);
    }
}

/// Waits until there is a command for an idle engine; `None` if before that something lapsed that it keeps.
fn wait_for_command(engine: &mut Engine, inbox: &Receiver<Command>, began: Instant) -> Option<Result<Command, TryRecvError>> {
    let waited = match engine.next_lapse_ms() {
        None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
        Some(at_ms) => inbox.recv_timeout(Duration::from_millis(at_ms.max(0) as u64).saturating_sub(began.elapsed())),
    };
    // What comes now finds what is kept as of now.
    engine.advance(began.elapsed().as_millis() as i64);
    match waited {
        Ok(command) => Some(Ok(command)),
        Err(RecvTimeoutError::Disconnected) => Some(Err(TryRecvError::Disconnected)),
        Err(RecvTimeoutError::Timeout) => {
            engine.lapse();
            None
        }
    }
}

/// Gives back the places of rows that run now, or were cancelled.
fn leave(engine: &Engine, n_known: &mut [usize; Class::ALL.len()], gate: &Gate) {
    for class in Class::ALL {
        let n_queued = engine.n_queued(class);
        let n_known = &mut n_known[class as usize];
        if n_queued < *n_known {
            gate.leave(class, *n_known - n_queued);
            *n_known = n_queued;
        }
    }
}

/// A place per row that has been sent and never ran, by class.
struct Gate {
    places: Mutex<Places>,
    changed: Condvar,
    max_waiting: usize,
}

struct Places {
    n_taken: [usize; Class::ALL.len()],
    /// Whoever wants one, by when that is due.
    wanted: Vec<(Class, i64, Share)>,
    /// By class: whose turn it is, of what is due at the same time.
    turns: [Turns; Class::ALL.len()],
    is_closed: bool,
}

impl Gate {
    fn new(max_waiting: usize) -> Self {
        let (n_taken, turns) = Default::default();
        let places = Mutex::new(Places { n_taken, wanted: Vec::new(), turns, is_closed: false });
        Self { places, changed: Condvar::new(), max_waiting }
    }

    /// Numbers and a flag are never half changed.
    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up to `n_wanted` places, when there are some and nobody of the class wants any for what is due sooner, or at the
    /// same time by an owner whose turn it is; none if the gate is closed.
    fn enter(&self, class: Class, (due, share): (Due, Share), n_wanted: usize) -> usize {
        let own = (class, due.at_ms, share);
        let must_wait = |p: &mut Places| {
            let turns = &p.turns[class as usize];
            let order = |at_ms: i64, share| (at_ms, turns.next(share));
            let first = order(due.at_ms, share);
            let is_first = p.wanted.iter().all(|&(other, at_ms, share)| other != class || order(at_ms, share) >= first);
            !p.is_closed && (p.n_taken[class as usize] >= self.max_waiting || !is_first)
        };
        let mut places = self.lock();
        places.wanted.push(own);
        let mut places = self.changed.wait_while(places, must_wait).unwrap_or_else(PoisonError::into_inner);
        if let Some(idx) = places.wanted.iter().position(|other| *other == own) {
            places.wanted.swap_remove(idx);
        }
        // Others may have waited for it to go first.
        self.changed.notify_all();
        if places.is_closed {
            return 0;
        }
        let n_taken = &mut places.n_taken[class as usize];
        let n_places = n_wanted.min(self.max_waiting - *n_taken);
        *n_taken += n_places;
        let turns = &mut places.turns[class as usize];
        let at = turns.take(share, n_places);
        turns.pass(share, at);
        n_places
    }

    /// Gives places back that nobody needed.
    fn give_back(&self, class: Class, share: Share, n: usize) {
        self.lock().turns[class as usize].give_back(share, n);
        self.leave(class, n);
    }

    fn leave(&self, class: Class, n: usize) {
        if n == 0 {
            return;
        }
        self.lock().n_taken[class as usize] -= n;
        self.changed.notify_all();
    }
}

/// Closes the gate however the engine's thread ends.
struct GateCloser(Arc<Gate>);

impl Drop for GateCloser {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who gets places that become free one after the other, of two that always want one.
    fn winners(n: usize, dues: [i64; 2]) -> Vec<u32> {
        let gate = Gate::new(4);
        let share = |owner, weight| Share { owner, weight };
        let (won, wins) = std::sync::mpsc::channel();
        assert_eq!(gate.enter(Class::Batch, (Due::NEVER, share(9, 1)), 9), 4, "as many as there are");
        std::thread::scope(|scope| {
            for (share, at_ms) in [share(1, 1), share(2, 3)].into_iter().zip(dues) {
                let (gate, won) = (&gate, won.clone());
                let due = Due { at_ms, ramp_ms: 0 };
                scope.spawn(move || while gate.enter(Class::Batch, (due, share), 1) == 1 && won.send(share.owner).is_ok() {});
            }
            let order = (0..n).map(|_| {
                while gate.lock().wanted.len() < 2 {
                    std::thread::yield_now();
                }
                gate.leave(Class::Batch, 1);
                wins.recv().unwrap()
            });
            let order = order.collect();
            gate.lock().is_closed = true;
            gate.changed.notify_all();
            order
        })
    }

    #[test]
    fn what_is_due_at_the_same_time_takes_turns_by_weight() {
        let order = winners(24, [7, 7]);
        assert_eq!(order.iter().filter(|owner| **owner == 2).count(), 18, "{order:?}");
        for (i, turns) in order.chunks(4).enumerate() {
            assert!(turns.contains(&1) || i == 0, "{order:?}");
        }
        assert_eq!(winners(24, [6, 7]), [1; 24], "what is due sooner goes first, whosever turn it is");
    }
}
