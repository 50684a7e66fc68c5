//! A leader and its workers: one operation at a time, cut into tiles that whoever is free claims. Knows nothing of
//! arithmetic. Invariant: which thread runs a tile changes nothing in its result, every tile runs exactly once, and
//! `run` returns only when no worker is inside the operation any more.
//!
//! Each thread has tiles of its own, side by side, and takes them in order: what it reads for one is near what it reads for
//! the next, and may be asked for ahead. Who has none left takes others' last ones. There is no barrier at the start: a
//! worker that sleeps, or whose core is taken by another program, just misses the operation, and the others do its tiles. At
//! the end the leader waits only for tiles that are being computed.
//!
//! What all threads write at each operation would be handed from core to core: threads come in groups, side by side, with a gate
//! each, so that many cores queue at many lines of cache, and a group that has no tiles left is passed over as one.

use super::Scratch;
use super::topology::{self, Plan};
use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Rounds a waiting worker spins (some 10 µs: longer than the leader's gap between two operations of a step).
const SPINS: u32 = 200;
/// Rounds it then gives its core away before it sleeps.
const YIELDS: u32 = 20;

/// Threads of a group.
const GROUP: usize = 16;

/// Set in a gate while an operation takes workers in.
const OPEN: u64 = 1 << 31;

/// What the team runs: a function of a worker's scratch memory and a tile's index.
type Operation<'a> = dyn Fn(&mut Scratch, usize) + Sync + 'a;

/// Threads that share an operation's tiles: the caller (the leader) and `n_threads - 1` workers.
pub(super) struct Team {
    common: Arc<Common>,
    workers: Vec<JoinHandle<()>>,
    n_threads: usize,
    plan: Plan,
}

/// What leader and workers share.
struct Common {
    /// Of each group.
    groups: Vec<Group>,
    /// Each thread's tiles that are still to be claimed.
    shares: Vec<Share>,
    /// The operation; written by the leader while the gates are closed and nobody is inside, read by workers inside.
    job: UnsafeCell<Option<Job>>,
    /// For each worker, whether it sleeps or is about to.
    asleep: Vec<AtomicBool>,
    /// The workers' threads, to wake them; there before the first operation.
    threads: OnceLock<Vec<Thread>>,
    stop: AtomicBool,
    /// The leader's memory and each worker's. Only its owner locks it, but for `each_scratch` between operations.
    scratch: Vec<Mutex<Scratch>>,
    /// The first panic of a tile that a worker ran.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Threads side by side: the leader and the first workers, the next `GROUP` workers, and so on.
struct Group {
    /// Number of the operation (high 32 bits), OPEN, and how many of the group's workers are inside (low 31 bits).
    gate: Line,
    /// Number of the last operation in which somebody found all the group's tiles claimed; none where there is but one group.
    done: Line,
}

/// On lines of its own, as a share is.
#[repr(align(128))]
struct Line(AtomicU64);

/// A range of tiles: the first of them in the high 32 bits, their end in the low ones. On lines of its own, since every claim
/// writes it.
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, tiles: Range<usize>) {
        assert!(u32::try_from(tiles.end).is_ok(), "{} tiles", tiles.end);
        self.0.store((tiles.start as u64) << 32 | tiles.end as u64, Ordering::Relaxed);
    }

    /// Claims the first tile, or the last one; `None` if there is none left.
    fn claim(&self, first: bool) -> Option<usize> {
        let claimed = |share: u64| {
            let (start, end) = (share >> 32, share & u64::from(u32::MAX));
            (start < end).then(|| if first { (start + 1) << 32 | end } else { start << 32 | (end - 1) })
        };
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claimed).ok()?;
        Some(if first { (before >> 32) as usize } else { (before & u64::from(u32::MAX)) as usize - 1 })
    }
}

/// An operation whose borrow's lifetime was erased; valid while the gate is open or a worker is inside.
#[derive(Clone, Copy)]
struct Job {
    operation: *const Operation<'static>,
}

// SAFETY: `job` is the only part that is not Sync; the gate orders its one writer against its readers (see `Common::job`),
// and what it points to is Sync.
unsafe impl Sync for Common {}
// SAFETY: as above; the pointer is used only while the leader keeps what it points to alive.
unsafe impl Send for Common {}

impl Team {
    /// Starts `n_threads - 1` workers, where the machine's plan has them. The leader, which is the caller, is left where it is:
    /// threads that it starts would inherit its place. The system finds the core that no worker has.
    ///
    /// # Panics
    /// If the machine refuses a thread.
    pub(super) fn new(n_threads: usize) -> Self {
        let n_threads = n_threads.max(1);
        Self::with_plan(n_threads, topology::plan(n_threads))
    }

    fn with_plan(n_threads: usize, plan: Plan) -> Self {
        let common = Arc::new(Common {
            groups: (0..n_threads.div_ceil(GROUP)).map(|_| Group { gate: Line(0.into()), done: Line(u64::MAX.into()) }).collect(),
            shares: (0..n_threads).map(|_| Share(AtomicU64::new(0))).collect(),
            job: UnsafeCell::new(None),
            asleep: (1..n_threads).map(|_| AtomicBool::new(false)).collect(),
            threads: OnceLock::new(),
            stop: AtomicBool::new(false),
            scratch: (0..n_threads).map(|_| Mutex::default()).collect(),
            panic: Mutex::new(None),
        });
        let workers: Vec<JoinHandle<()>> = (0..n_threads - 1)
            .map(|worker| {
                let common = Arc::clone(&common);
                let place = plan.places.get(worker).cloned();
                let thread = std::thread::Builder::new().name(format!("cpu-{}", worker + 1));
                let life = move || {
                    if let Some(processors) = &place {
                        topology::stay_on(processors);
                    }
                    common.work(worker);
                };
                thread.spawn(life).expect("the machine lets the process start its threads")
            })
            .collect();
        common.threads.get_or_init(|| workers.iter().map(|worker| worker.thread().clone()).collect());
        Self { common, workers, n_threads, plan }
    }

    /// Where threads and data are.
    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Threads that may run tiles, the leader included.
    pub(super) fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Changes every thread's memory.
    pub(super) fn each_scratch(&mut self, change: impl Fn(&mut Scratch)) {
        self.common.scratch.iter().for_each(|scratch| change(&mut lock(scratch)));
    }

    /// Runs `operation` for each of `0..n_tiles`, on whichever threads are free, and returns when all are done.
    ///
    /// # Panics
    /// With the panic of a tile.
    pub(super) fn run(&self, n_tiles: usize, operation: &Operation<'_>) {
        let mut scratch = lock(&self.common.scratch[0]);
        if n_tiles <= 1 || self.workers.is_empty() {
            (0..n_tiles).for_each(|tile| operation(&mut scratch, tile));
            return;
        }
        let common = &*self.common;
        // SAFETY: only the lifetime changes. `closing` below waits, even when this function unwinds, until no worker is
        // inside, and a worker uses the pointer only while inside: it is never used after the borrow ends.
        let operation = unsafe { std::mem::transmute::<&Operation<'_>, &Operation<'static>>(operation) };
        let job = Job { operation };
        // SAFETY: the gates are closed and nobody is inside (the last `run` waited for it): no one reads the job now.
        unsafe { *common.job.get() = Some(job) };
        for (thread, share) in common.shares.iter().enumerate() {
            share.set(thread * n_tiles / self.n_threads..(thread + 1) * n_tiles / self.n_threads);
        }
        // Left over if the leader's own tile panicked last time.
        common.panic.lock().expect("no panic while the lock is held").take();
        let closing = Closing(common);
        let number = (common.groups[0].gate.0.load(Ordering::Relaxed) >> 32).wrapping_add(1) & u64::from(u32::MAX);
        for group in &common.groups {
            // SeqCst here and at the sleeper's: either it sees the gate open, or this thread sees it asleep.
            group.gate.0.store(number << 32 | OPEN, Ordering::SeqCst);
        }
        common.wake(1..GROUP.min(n_tiles), GROUP);
        // Of other groups one, which wakes the others (see `work`).
        (GROUP..self.n_threads.min(n_tiles)).step_by(GROUP).for_each(|first| common.wake(first..first + GROUP, 1));
        common.run_tiles((job, number), 0, &mut scratch);
        drop(closing);
        let panicked = common.panic.lock().expect("no panic while the lock is held").take();
        if let Some(panic) = panicked {
            resume_unwind(panic);
        }
    }

    /// Cuts `0..n_rows` into a few ranges per thread and runs `operation` on each.
    pub(super) fn run_rows(&self, n_rows: usize, operation: &(dyn Fn(&mut Scratch, Range<usize>) + Sync)) {
        let step = n_rows.div_ceil(4 * self.n_threads).max(1);
        self.run(n_rows.div_ceil(step), &|scratch, tile| operation(scratch, tile * step..((tile + 1) * step).min(n_rows)));
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.common.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of tiles, so that it never ends in one.
            drop(worker.join());
        }
    }
}

/// Closes the gates and waits for the workers inside, also when the leader's own tile panics.
struct Closing<'a>(&'a Common);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        for Group { gate, .. } in &self.0.groups {
            gate.0.fetch_and(!OPEN, Ordering::AcqRel);
        }
        let mut rounds = 0;
        for Group { gate, .. } in &self.0.groups {
            while gate.0.load(Ordering::Acquire) & (OPEN - 1) != 0 {
                wait_a_little(&mut rounds);
            }
        }
    }
}

/// What a tile leaves in a scratch memory when it panics is as good as any: every tile writes before it reads.
fn lock(scratch: &Mutex<Scratch>) -> MutexGuard<'_, Scratch> {
    scratch.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spins at first; then gives the core away, since the thread waited for may need it.
fn wait_a_little(rounds: &mut u32) {
    if *rounds < SPINS {
        *rounds += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

impl Common {
    /// A worker's life.
    fn work(&self, worker: usize) {
        let group = (worker + 1) / GROUP;
        let mut last = 0;
        while let Some((number, has_slept)) = self.enter(worker, last) {
            last = number;
            if has_slept && group > 0 {
                self.wake(group * GROUP..(group + 1) * GROUP, GROUP);
            }
            // SAFETY: this worker is inside: the leader wrote the job before it opened the gate and leaves it until
            // everyone is out.
            let job = unsafe { *self.job.get() }.expect("the gate opens only after a job is set");
            let run = || self.run_tiles((job, number), worker + 1, &mut lock(&self.scratch[worker + 1]));
            if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                self.panic.lock().expect("no panic while the lock is held").get_or_insert(panic);
            }
            self.groups[group].gate.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Wakes up to `n` of some threads that sleep.
    fn wake(&self, threads: Range<usize>, n: usize) {
        // The leader never sleeps: thread 1 is the first worker.
        let workers = self.threads.get().into_iter().flatten().zip(&self.asleep);
        let asleep = workers.skip(threads.start - 1).take(threads.len()).filter(|(_, asleep)| asleep.load(Ordering::SeqCst));
        for (worker, _) in asleep.filter(|(_, asleep)| asleep.swap(false, Ordering::SeqCst)).take(n) {
            worker.unpark();
        }
    }

    /// Claims and runs tiles until none is left: a thread's own, then what others have not begun, those of its group first.
    fn run_tiles(&self, (job, number): (Job, u64), thread: usize, scratch: &mut Scratch) {
        // SAFETY: the caller is the leader in `run`, or a worker inside: the operation is alive.
        let operation = unsafe { &*job.operation };
        while let Some(tile) = self.shares[thread].claim(true) {
            operation(scratch, tile);
        }
        let n_groups = self.groups.len();
        for group in (0..n_groups).map(|i| (thread / GROUP + i) % n_groups) {
            let done = &self.groups[group].done.0;
            if done.load(Ordering::Relaxed) == number {
                continue;
            }
            let shares = &self.shares[group * GROUP..self.shares.len().min((group + 1) * GROUP)];
            // Not all thieves at the same share.
            let (before, after) = shares.split_at((thread % GROUP).min(shares.len()));
            for share in after.iter().chain(before) {
                while let Some(tile) = share.claim(false) {
                    operation(scratch, tile);
                }
            }
            if n_groups > 1 {
                // Shares are never filled again in an operation.
                done.store(number, Ordering::Relaxed);
            }
        }
    }

    /// Waits for an operation after `last`, enters it and gives its number, and whether it was slept for; `None` when the team
    /// ends.
    fn enter(&self, worker: usize, last: u64) -> Option<(u64, bool)> {
        let gate = &self.groups[(worker + 1) / GROUP].gate.0;
        let (mut rounds, mut has_slept) = (0, false);
        loop {
            let seen = gate.load(Ordering::SeqCst);
            let number = seen >> 32;
            if seen & OPEN != 0 && number != last {
                if gate.compare_exchange_weak(seen, seen + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                    // Others' words are on this line: it is written only if it must be.
                    if self.asleep[worker].load(Ordering::Relaxed) {
                        self.asleep[worker].store(false, Ordering::Relaxed);
                    }
                    return Some((number, has_slept));
                }
                continue;
            }
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            rounds += 1;
            if rounds < SPINS {
                std::hint::spin_loop();
            } else if rounds < SPINS + YIELDS {
                std::thread::yield_now();
            } else if rounds == SPINS + YIELDS {
                // Announce it, then look once more: the leader may have opened the gate in between.
                self.asleep[worker].store(true, Ordering::SeqCst);
            } else {
                std::thread::park();
                self.asleep[worker].store(false, Ordering::SeqCst);
                (rounds, has_slept) = (0, true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, AtomicUsize};

    #[test]
    fn every_tile_runs_once_with_more_threads_than_cores() {
        // The last: three groups, the third of two threads.
        for n_threads in [1, 2, 3, 5, 9, 2 * GROUP + 2] {
            let team = Team::new(n_threads);
            for n_tiles in [0, 1, 2, 3, 7, 100, 1000, 1, 5].into_iter().cycle().take(400) {
                let runs: Vec<AtomicU32> = (0..n_tiles).map(|_| AtomicU32::new(0)).collect();
                team.run(n_tiles, &|_, tile| {
                    runs[tile].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{n_threads} threads, {n_tiles} tiles");
            }
        }
    }

    /// A plan is kept by the workers and leaves the caller alone. (What plans there are: `topology`.)
    #[test]
    #[cfg(target_os = "linux")]
    fn workers_stay_in_their_places() {
        let before = topology::allowed().unwrap();
        let (first, last) = (before[0], before[before.len() - 1]);
        let places = vec![vec![first], vec![last], vec![first, last]];
        let team = Team::with_plan(4, Plan { places: places.clone(), ..Plan::default() });
        let seen = Mutex::new(vec![None; 4]);
        // Whoever comes: the leader's tiles wait until the workers have done theirs.
        let waiting = AtomicUsize::new(3);
        team.run(4, &|_, _| {
            let thread = std::thread::current();
            if let Some(number) = thread.name().and_then(|name| name.strip_prefix("cpu-")) {
                let number: usize = number.parse().unwrap();
                if seen.lock().unwrap()[number].replace(topology::allowed().unwrap()).is_none() {
                    waiting.fetch_sub(1, Ordering::SeqCst);
                }
            }
            while waiting.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
        });
        let mut places: Vec<_> = std::iter::once(None).chain(places.into_iter().map(Some)).collect();
        places.iter_mut().flatten().for_each(Vec::dedup);
        assert_eq!(*seen.lock().unwrap(), places);
        assert_eq!(topology::allowed().unwrap(), before);
    }

    #[test]
    fn rows_are_covered_once() {
        let team = Team::new(3);
        for n_rows in 0..60 {
            let rows = Mutex::new(Vec::new());
            team.run_rows(n_rows, &|_, range| rows.lock().unwrap().extend(range));
            let mut rows = rows.into_inner().unwrap();
            rows.sort_unstable();
            assert_eq!(rows, (0..n_rows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_tiles_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3);
        for bad in 0..50 {
            let run = || team.run(50, &|_, tile| assert_ne!(tile, bad, "planted"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "tile {bad}");
            let sum = AtomicUsize::new(0);
            team.run(50, &|_, tile| {
                sum.fetch_add(tile, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 49 * 50 / 2);
        }
    }
}
