//! The lease's protocol in a simulated world: one linearizable store, several writers with clocks that run differently, puts
//! that come late or never, answers that are lost, writers that stall for longer than a lease lasts, die, or begin the job
//! anew. The machines are the program's own; the world asks of every schedule that no row counts twice, that what a writer
//! reads is what every later one reads, and that what is published stays what the last job published. Mistakes that are
//! planted must be found.

use crate::common::splitmix64;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;
use valar::journal::IfRunning;
use valar::journal::lease::{Ask, Begun, Changed, Claim, Claimed, Closed, Holder, Lease, Tenure, Told};

use crate::lease_store::{Answer, Mistake, Request, Store, Version};

const LEASE_MS: u64 = 1000;
pub(crate) const N_ROWS: u32 = 12;
const ROWS_PER_SEGMENT: u32 = 2;

/// Where a writer is in its work.
enum State {
    Claiming(Claim<Version>),
    Holding(Box<Tenure<Version>>, Work),
    /// Dead, or another run was at it: comes back as a new process.
    Gone,
}

/// What a holder does next; before each, the lease is as it was last seen.
#[derive(Debug, Clone)]
enum Work {
    Changing(Box<Work>),
    AbortUploads,
    ReadJob,
    Clear,
    Begin,
    Compute,
    SegmentPut,
    StartUpload,
    NameUpload(String),
    Complete(String),
    End,
}

struct Writer {
    state: State,
    n_lives: u32,
    /// Of its clock, per mille of the world's.
    rate: u64,
    done: BTreeSet<u32>,
    /// Of this life.
    n_segments: u32,
    if_running: IfRunning,
    restarts: bool,
}

/// Something that happens at a time.
#[derive(Debug)]
enum Happening {
    /// A request reaches the store; its answer may reach the writer of that life.
    Reaches { writer: usize, life: u32, request: Request, answered: Option<u64> },
    /// A writer hears.
    Hears { writer: usize, life: u32, answer: Answer },
    /// A writer begins a life.
    Born { writer: usize },
}

struct World {
    now: u64, // ms
    random: u64,
    n_happened: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    happenings: BTreeMap<u64, Happening>,
    store: Store,
    writers: Vec<Writer>,
    mistake: Mistake,
    n_finished: u32,
    n_taken_over: u32,
}

impl World {
    fn new(seed: u64, mistake: Mistake) -> Self {
        let mut world = Self {
            now: 0,
            random: seed,
            n_happened: 0,
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            store: Store::default(),
            writers: Vec::new(),
            mistake,
            n_finished: 0,
            n_taken_over: 0,
        };
        for writer in 0..2 + world.below(3) as usize {
            let rate = 900 + world.below(200);
            let if_running = if world.chance(20) { IfRunning::TakeOver } else { IfRunning::Wait };
            let restarts = world.chance(15);
            let (state, done) = (State::Gone, BTreeSet::new());
            world.writers.push(Writer { state, n_lives: 0, rate, done, n_segments: 0, if_running, restarts });
            let at = world.below(3000);
            world.at(at, Happening::Born { writer });
        }
        world
    }

    fn below(&mut self, end: u64) -> u64 {
        splitmix64(&mut self.random) % end
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn at(&mut self, time: u64, happening: Happening) {
        self.n_happened += 1;
        self.queue.push(Reverse((time, self.n_happened)));
        self.happenings.insert(self.n_happened, happening);
    }

    /// Sends a request: it may come late or never, and its answer may be lost. Nobody waits for ever.
    fn send(&mut self, writer: usize, request: Request) {
        let life = self.writers[writer].n_lives;
        let travel = 1 + self.below(40) + if self.chance(3) { self.below(4000) } else { 0 };
        let back = 1 + self.below(40) + if self.chance(4) { self.below(4000) } else { 0 };
        let patience = 300;
        let arrives = !self.chance(3);
        let answered = arrives && travel + back < patience && !self.chance(4);
        if arrives {
            let answered = answered.then_some(back);
            self.at(self.now + travel, Happening::Reaches { writer, life, request, answered });
        }
        if !answered {
            self.at(self.now + patience, Happening::Hears { writer, life, answer: Answer::Silence });
        }
    }

    fn run(&mut self) {
        while let Some(Reverse((time, number))) = self.queue.pop() {
            if time > 120_000 || self.n_finished >= 6 {
                return;
            }
            self.now = self.now.max(time);
            match self.happenings.remove(&number).unwrap() {
                Happening::Reaches { writer, life, request, answered } => {
                    let answer = self.store.serve(request, self.mistake);
                    if let Some(back) = answered {
                        self.at(self.now + back, Happening::Hears { writer, life, answer });
                    }
                }
                Happening::Hears { writer, life, answer } => {
                    if self.writers[writer].n_lives != life {
                        continue;
                    }
                    if self.chance(2) {
                        // Stalls: everything it does next is late.
                        let at = self.now + 500 + self.below(6000);
                        self.at(at, Happening::Hears { writer, life, answer });
                    } else if self.chance(1) {
                        self.die(writer);
                    } else {
                        self.hear(writer, answer);
                    }
                }
                Happening::Born { writer } => {
                    let w = &mut self.writers[writer];
                    w.n_lives += 1;
                    let token = format!("{writer}.{}", w.n_lives);
                    let me = Holder { token, host: String::new(), pid: 0, process: String::new() };
                    w.state = State::Claiming(Claim::new(me, LEASE_MS, w.if_running));
                    self.hear(writer, Answer::Silence);
                }
            }
        }
    }

    fn die(&mut self, writer: usize) {
        self.writers[writer].state = State::Gone;
        self.writers[writer].n_lives += 1;
        let at = self.now + 100 + self.below(5000);
        self.at(at, Happening::Born { writer });
    }

    fn hear(&mut self, writer: usize, answer: Answer) {
        match std::mem::replace(&mut self.writers[writer].state, State::Gone) {
            State::Gone => {}
            State::Claiming(mut claim) => {
                let now = Duration::from_millis(self.now * self.writers[writer].rate / 1000);
                match claim.next(now, told(answer)) {
                    Claimed::Asks(ask) => {
                        self.writers[writer].state = State::Claiming(claim);
                        self.ask(writer, ask);
                    }
                    Claimed::Busy(_) => self.die(writer),
                    Claimed::Held(tenure) => {
                        self.n_taken_over += u32::from(tenure.lease().epoch > 1);
                        self.writers[writer].n_segments = 0;
                        self.work(writer, tenure, Work::AbortUploads);
                    }
                }
            }
            State::Holding(mut tenure, Work::Changing(then)) => match tenure.next(told(answer)) {
                Changed::Asks(ask) => {
                    self.writers[writer].state = State::Holding(tenure, Work::Changing(then));
                    self.ask(writer, ask);
                }
                Changed::Done => self.work(writer, tenure, *then),
                Changed::Lost => self.die(writer),
            },
            State::Holding(tenure, work) => self.worked(writer, tenure, work, answer),
        }
    }

    fn ask(&mut self, writer: usize, ask: Ask<Version>) {
        match ask {
            Ask::Read => self.send(writer, Request::Read),
            Ask::Count(epoch) => self.send(writer, Request::Count(epoch)),
            Ask::Put(lease, over) => self.send(writer, Request::PutLease(lease, over)),
            Ask::Wait(time) => {
                let life = self.writers[writer].n_lives;
                self.at(self.now + time.as_millis() as u64, Happening::Hears { writer, life, answer: Answer::Silence });
            }
        }
    }

    /// Begins a piece of work.
    fn work(&mut self, writer: usize, tenure: Box<Tenure<Version>>, work: Work) {
        let lease = tenure.lease().clone();
        let request = match &work {
            Work::AbortUploads => Request::AbortUploads(lease.uploads.clone()),
            Work::ReadJob => Request::ReadJob(lease.closed.clone()),
            Work::Clear => {
                let clear = |lease: &mut Lease| (lease.job, lease.closed) = (None, Vec::new());
                return self.change(writer, tenure, clear, Work::Begin);
            }
            Work::Begin => {
                self.delete_old(writer, lease.epoch);
                return self.change(writer, tenure, |lease| lease.job = Some(lease.epoch), Work::ReadJob);
            }
            Work::Compute => {
                let w = &self.writers[writer];
                let left: Vec<u32> = (0..N_ROWS).filter(|row| !w.done.contains(row)).take(ROWS_PER_SEGMENT as usize).collect();
                if left.is_empty() {
                    return self.work(writer, tenure, Work::StartUpload);
                }
                Request::PutSegment(Closed { epoch: lease.epoch, n_segments: w.n_segments + 1 }, left)
            }
            // Signs of life come when they come.
            Work::SegmentPut if self.chance(50) => return self.work(writer, tenure, Work::Compute),
            Work::SegmentPut => return self.change(writer, tenure, |_| {}, Work::Compute),
            Work::StartUpload => Request::BeginUpload(format!("{}/{}", lease.epoch, self.n_happened)),
            Work::NameUpload(id) => {
                let (begun, id) = (Begun { path: "out".into(), id: id.clone() }, id.clone());
                return self.change(writer, tenure, move |lease| lease.uploads.push(begun), Work::Complete(id));
            }
            Work::Complete(id) => Request::CompleteUpload(id.clone(), lease.job.unwrap()),
            Work::End => {
                let end = |lease: &mut Lease| (lease.job, lease.closed, lease.held) = (None, Vec::new(), false);
                return self.change(writer, tenure, end, Work::End);
            }
            Work::Changing(_) => unreachable!("it is heard of elsewhere"),
        };
        let work = if let Request::BeginUpload(id) = &request { Work::NameUpload(id.clone()) } else { work };
        self.writers[writer].state = State::Holding(tenure, work);
        self.send(writer, request);
    }

    fn change(&mut self, writer: usize, mut tenure: Box<Tenure<Version>>, change: impl FnOnce(&mut Lease), then: Work) {
        if tenure.lease().held {
            let Changed::Asks(ask) = tenure.change(change) else { unreachable!("a change begins with a put") };
            self.writers[writer].state = State::Holding(tenure, Work::Changing(Box::new(then)));
            self.ask(writer, ask);
        } else {
            // Given back: this life is over.
            self.n_finished += 1;
            self.die(writer);
        }
    }

    /// Deletes what no lease means any more. Nobody hears of it, and it may come late: the program asks again until it is
    /// answered, and an earlier try may still be on its way.
    fn delete_old(&mut self, writer: usize, epoch: u32) {
        let names = self.store.names(epoch);
        for late in [40, 8000] {
            let (life, at) = (self.writers[writer].n_lives, self.now + 1 + self.below(late));
            self.at(at, Happening::Reaches { writer, life, request: Request::Delete(names.clone()), answered: None });
        }
    }

    /// A piece of work was answered, or not: then it is done again, as a store's client does.
    fn worked(&mut self, writer: usize, tenure: Box<Tenure<Version>>, work: Work, answer: Answer) {
        let w = &mut self.writers[writer];
        let next = match (work, answer) {
            (Work::NameUpload(_), Answer::Silence) => Work::StartUpload,
            (again, Answer::Silence) => again,
            (Work::AbortUploads, _) if w.restarts || tenure.lease().job.is_none() => Work::Clear,
            (Work::AbortUploads, _) => Work::ReadJob,
            (Work::ReadJob, Answer::Rows(rows)) => {
                w.done = rows;
                Work::Compute
            }
            (Work::Compute, _) => {
                w.n_segments += 1;
                w.done
                    .extend((0..N_ROWS).filter(|row| !w.done.contains(row)).take(ROWS_PER_SEGMENT as usize).collect::<Vec<_>>());
                Work::SegmentPut
            }
            (Work::NameUpload(id), _) => Work::NameUpload(id),
            // Completed now or before, or broken off by whoever took over: ending the job tells which.
            (Work::Complete(_), _) => Work::End,
            (work, answer) => panic!("{answer:?} to {work:?}"),
        };
        self.work(writer, tenure, next);
    }
}

fn told(answer: Answer) -> Told<Version> {
    match answer {
        Answer::Lease(found) => Told::Found(found, false),
        Answer::Count(n) => Told::Counted(n),
        Answer::Put(Some(version)) => Told::Done(version),
        _ => Told::Unsure,
    }
}

/// Runs so many schedules; the first violation and its seed, and how often jobs ended and changed hands.
fn schedules(n: u64, mistake: Mistake) -> (Option<String>, u32, u32) {
    let (mut n_finished, mut n_taken_over) = (0, 0);
    for seed in 0..n {
        let mut world = World::new(seed, mistake);
        world.run();
        if let Some(first) = world.store.violations.first() {
            return (Some(format!("seed {seed}, at {} ms: {first}", world.now)), n_finished, n_taken_over);
        }
        n_finished += world.n_finished;
        n_taken_over += world.n_taken_over;
    }
    (None, n_finished, n_taken_over)
}

#[test]
fn no_schedule_breaks_the_protocol() {
    let n = 6_000;
    let (violation, n_finished, n_taken_over) = schedules(n, Mistake::None);
    assert_eq!(violation, None);
    println!("{n} schedules: {n_finished} jobs ended, the lease changed hands {n_taken_over} times");
    assert!(n_finished > n as u32 && n_taken_over > 2 * n as u32, "{n_finished}, {n_taken_over}: too little happened");
}

#[test]
fn planted_mistakes_are_found() {
    for mistake in [Mistake::NoEpochs, Mistake::NoFencing, Mistake::NoAbort, Mistake::DeletesAll] {
        let (violation, ..) = schedules(6_000, mistake);
        println!("{mistake:?}: {violation:?}");
        assert!(violation.is_some(), "{mistake:?} was not found");
    }
}
