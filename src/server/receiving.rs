//! What an engine's thread does with what came of a step: counts it, learns how fast steps are, shares out its time, and hands on
//! what rows gained. Knows nothing of HTTP.

use super::backlog::Backlog;
use super::flow::{Routes, is_of_job};
use super::live::{Faults, Stats};
use super::observed::Observed;
use super::pace::Pace;
use crate::engine::handle::Delivery;
use crate::window::Class;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The receiving end of the engine, on its thread.
pub(super) struct Receiving {
    pub(super) routes: Arc<Routes>,
    pub(super) stats: Arc<Mutex<Stats>>,
    pub(super) backlog: Arc<Backlog>,
    pub(super) pace: Pace,
    pub(super) seen: Arc<Observed>,
    /// Engines that have work, of all that share the machine.
    pub(super) n_busy: Arc<AtomicUsize>,
    pub(super) is_busy: bool,
    pub(super) is_retired: Arc<AtomicBool>,
    /// Where it is told that this model's engine has failed.
    pub(super) fault: (String, Arc<Faults>),
}

impl Receiving {
    /// Takes in what came of a step.
    pub(super) fn take(&mut self, step: Delivery<'_>) {
        let n_asap = step.step.iter().filter(|share| share.class == Class::Asap).map(|share| share.n_tokens).sum();
        let has_others = step.step.iter().any(|share| share.class > Class::Asap);
        let alone = self.pace.expected(n_asap);
        let (time, now) = (self.pace.note(step.stats), Instant::now());
        self.seen.note_step(
            time,
            if n_asap > 0 && has_others && !alone.is_zero() { time.saturating_sub(alone) } else { Duration::ZERO },
        );
        if step.stats.waiting > 0 {
            self.backlog.note_full_step(time, step.step.iter().map(|share| share.n_tokens).sum());
        }
        for done in &step.finished {
            self.backlog.note_finished(is_of_job(done.id), done.tokens.len());
        }
        let before = std::mem::replace(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner).now, *step.stats);
        let n_unused = step.stats.unused_tokens - before.unused_tokens;
        // A step of which every row has left, or that failed, has none, and there is work all the same.
        let is_busy = !step.step.is_empty() || step.stats.running + step.stats.waiting > 0;
        match (self.is_busy, is_busy) {
            (false, true) => drop(self.n_busy.fetch_add(1, Relaxed)),
            (true, false) => drop(self.n_busy.fetch_sub(1, Relaxed)),
            _ => {}
        }
        self.is_busy = is_busy;
        // Engines that work at the same time share the machine.
        let machine_ns = time.as_nanos() as u64 / self.n_busy.load(Relaxed).max(1) as u64;
        self.routes.deliver(step, now.checked_sub(time).unwrap_or(now), (machine_ns, n_unused));
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if self.is_busy {
            self.n_busy.fetch_sub(1, Relaxed);
        }
        if !self.is_retired.load(SeqCst) {
            // First, so that whoever finds a call closed finds out why.
            self.fault.1.send_if_modified(|fault| {
                let is_first = fault.is_none();
                fault.get_or_insert(self.fault.0.clone());
                is_first
            });
            self.routes.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::batch::{Batch, HeadOut, StepOutput};
    use crate::engine::sampling::SeqParams;
    use crate::engine::{Due, Engine, EngineConfig, StepLimits, Submission, TokenTable};
    use crate::model::{Runner, RunnerLimits};
    use crate::pipeline::hosted::Inbox;
    use crate::pipeline::meter::{Meter, MeteredRunner};
    use crate::server::flow::first_id;
    use std::sync::atomic::AtomicU64;

    /// Goes on by itself; draws the same token for all.
    struct Alone;

    impl Runner for Alone {
        fn limits(&self) -> RunnerLimits {
            RunnerLimits { n_blocks: 16, max_step_tokens: 64, max_step_seqs: 4, n_vocab: 4, max_context: 64 }
        }

        fn start(&mut self, _batch: &Batch, _out: &mut StepOutput) -> anyhow::Result<bool> {
            Ok(true)
        }

        fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<()> {
            out.rows.clear();
            let row = HeadOut { token: 3, logprob: 0.0, ..HeadOut::BROKEN };
            out.rows.resize(batch.heads.len(), row);
            Ok(())
        }
    }

    struct Letters;

    impl TokenTable for Letters {
        fn token_bytes(&self, _id: u32) -> &[u8] {
            b"a"
        }

        fn is_end(&self, _id: u32) -> bool {
            false
        }

        fn is_special(&self, _id: u32) -> bool {
            false
        }

        fn end_ids(&self) -> &[u32] {
            &[]
        }
    }

    /// An engine of a job's rows 0, 1, 2, .. with prompts of so many tokens, who receives what comes of its steps, and the job's
    /// share of the machine's time.
    struct Machine {
        engine: Engine,
        receiving: Receiving,
        meter: Arc<Meter>,
        job_ns: Arc<AtomicU64>,
        _job: Inbox,
    }

    impl Machine {
        fn new(prompts: &[usize]) -> Self {
            let meter = Arc::new(Meter::default());
            let runner = Box::new(MeteredRunner::new(Box::new(Alone), Arc::clone(&meter)));
            let mut engine = Engine::new(EngineConfig::for_runner(&runner.limits()), runner, Arc::new(Letters)).expect("sound");
            for (row, &n_tokens) in prompts.iter().enumerate() {
                let submission = Submission {
                    id: first_id(0) + row as u64,
                    prompt: vec![1; n_tokens].into(),
                    params: SeqParams { max_tokens: 40, ..SeqParams::default() },
                    class: Class::Batch,
                    keep_tokens: 0,
                    stream: row as u32,
                    due: Due::NEVER,
                };
                engine.submit(submission).expect("there is room");
            }
            let (link, job) = Inbox::new();
            let (routes, job_ns) = (Arc::<Routes>::default(), Arc::default());
            routes.open_job(0, &link, (&job_ns, None), None);
            let receiving = Receiving {
                routes,
                stats: Arc::default(),
                backlog: Arc::default(),
                pace: Pace::new(Arc::clone(&meter), Duration::ZERO, Arc::<StepLimits>::default()),
                seen: Arc::new(Observed::new([None; Class::ALL.len()])),
                n_busy: Arc::default(),
                is_busy: false,
                is_retired: Arc::new(AtomicBool::new(true)),
                fault: (String::new(), Arc::new(Faults::new(None))),
            };
            Self { engine, receiving, meter, job_ns, _job: job }
        }

        /// Ends a step, of which these rows are cancelled while it is under way; gives its time and the job's part of it.
        fn step(&mut self, cancelled: &[u64]) -> [u64; 2] {
            let read = |own: &Self| {
                let reading = own.meter.read();
                [(reading.prefill + reading.decode).as_nanos() as u64, own.job_ns.load(Relaxed)]
            };
            let before = read(self);
            assert!(self.engine.start(), "it is under way");
            for row in cancelled {
                assert!(self.engine.cancel(first_id(0) + row));
            }
            let mut finished = Vec::new();
            self.engine.step(&mut finished).expect("it runs");
            let (step, stats) = (self.engine.last_step(), self.engine.stats());
            self.receiving.take(Delivery { finished, progress: Vec::new(), checkpoints: Vec::new(), step, stats });
            let after = read(self);
            [after[0] - before[0], after[1] - before[1]]
        }

        fn n_busy(&self) -> usize {
            self.receiving.n_busy.load(Relaxed)
        }
    }

    #[test]
    fn what_a_step_computed_of_cancelled_rows_is_no_others_cost() {
        let mut machine = Machine::new(&[10, 30]);
        let [time, of_job] = machine.step(&[1]);
        assert!(time > 0);
        assert_eq!(of_job, time * 10 / 40, "of the 40 tokens of the step, 10 are of the row that is still there");
        let [time, of_job] = machine.step(&[]);
        assert_eq!(of_job, time / 2, "nor what the step that had begun ahead computed");
        let [time, of_job] = machine.step(&[]);
        assert_eq!(of_job, time);
        assert_eq!(machine.engine.stats().unused_tokens, 31);
    }

    #[test]
    fn a_step_whose_rows_have_left_says_how_fast_steps_are() {
        let mut machine = Machine::new(&[30, 30]);
        machine.step(&[0, 1]);
        assert!(!machine.receiving.pace.expected(1).is_zero());
    }

    #[test]
    fn an_engine_is_busy_while_it_has_work() {
        let mut machine = Machine::new(&[10; 6]);
        machine.step(&[]);
        assert_eq!(machine.n_busy(), 1);
        machine.step(&[0, 1, 2, 3]);
        assert!(machine.engine.last_step().is_empty(), "all of its rows have left");
        assert_eq!(machine.n_busy(), 1, "two rows wait");
        machine.step(&[4, 5]);
        let (step, stats) = (&[][..], machine.engine.stats());
        let (finished, progress, checkpoints) = Default::default();
        machine.receiving.take(Delivery { finished, progress, checkpoints, step, stats });
        assert_eq!(machine.n_busy(), 0);
    }
}
