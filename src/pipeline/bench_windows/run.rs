//! Runs a load through the engine on a machine of counted time, in the order of windows or in that of arrival, and says what
//! came of it. Knows no wall clock: the same load gives the same outcome, to the millisecond.

use super::load::{Load, MAX_DRAWN, Request};
use super::machine::{Countdown, Machine, prompt};
use crate::engine::sampling::SeqParams;
use crate::engine::{Due, Engine, EngineConfig, EngineStats, Finished, Submission};
use crate::model::Runner as _;
use crate::window::{AIM, Class, STANDARD_TARGET_S};
use anyhow::Result;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By class, slack and deadline: the engine's own.
    Windows,
    /// Who comes first, whatever it is.
    Arrival,
}

/// Width of [`Outcome::served`]'s entries.
pub const BIN_MS: i64 = 300_000;

/// What came of a load.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// By row of the load: milliseconds from its arrival to its end.
    pub turns_ms: Vec<i64>,
    /// By row of the load: milliseconds from its arrival to the end of its first step.
    pub begins_ms: Vec<Option<i64>>,
    /// By batch: when its last row ended.
    pub ends_ms: Vec<i64>,
    /// By five minutes: tokens of each class.
    pub served: Vec<[u64; 3]>,
    /// By five minutes: whether rows of the class waited all the time.
    pub waited: Vec<[bool; 3]>,
    /// The engine's own counts.
    pub stats: EngineStats,
    /// When all was done.
    pub end_ms: i64,
    /// Part of that in which the machine worked.
    pub busy: f64,
}

/// Requests of the trace that the machine does in a second when it does nothing else.
///
/// # Errors
/// The engine's.
pub fn capacity(trace: &[Request]) -> Result<f64> {
    let rows = trace.iter().map(|&request| super::load::Row {
        request: Request { at_ms: 0, ..request },
        class: Class::Batch,
        batch: None,
    });
    let outcome = Day::new(&Load { rows: rows.collect(), batches: Vec::new() }, Order::Arrival)?.run()?;
    Ok(trace.len() as f64 * 1000.0 / outcome.end_ms as f64)
}

/// Runs a load to its end.
///
/// # Errors
/// The engine's.
pub fn run(load: &Load, order: Order) -> Result<Outcome> {
    Day::new(load, order)?.run()
}

/// A load under way.
struct Day<'a> {
    load: &'a Load,
    order: Order,
    engine: Engine,
    time_us: Arc<AtomicU64>,
    /// Idle time so far.
    idle_ms: i64,
    /// By class: rows that have come and were not taken by the engine yet, by when they are due.
    outside: [BTreeMap<i64, VecDeque<usize>>; 3],
    /// The next row to come.
    next: usize,
    outcome: Outcome,
}

impl<'a> Day<'a> {
    fn new(load: &'a Load, order: Order) -> Result<Self> {
        let time_us = Arc::default();
        let machine = Machine::new(&time_us);
        let config = EngineConfig::for_runner(&machine.limits());
        let engine = Engine::new(config, Box::new(machine), Arc::new(Countdown))?;
        let outcome = Outcome {
            turns_ms: vec![0; load.rows.len()],
            begins_ms: vec![None; load.rows.len()],
            ends_ms: vec![0; load.batches.len()],
            served: Vec::new(),
            waited: Vec::new(),
            stats: EngineStats::default(),
            end_ms: 0,
            busy: 0.0,
        };
        Ok(Self { load, order, engine, time_us, idle_ms: 0, outside: Default::default(), next: 0, outcome })
    }

    fn now_ms(&self) -> i64 {
        self.idle_ms + (self.time_us.load(Relaxed) / 1000) as i64
    }

    fn run(mut self) -> Result<Outcome> {
        let mut finished = Vec::new();
        loop {
            self.take_arrivals();
            self.submit();
            if self.engine.has_work() {
                self.engine.advance(self.now_ms());
                self.engine.step(&mut finished)?;
                self.engine.advance(self.now_ms());
                self.note(&mut finished);
            } else if let Some(row) = self.load.rows.get(self.next) {
                self.idle_ms += row.request.at_ms - self.now_ms();
            } else {
                break;
            }
        }
        self.outcome.end_ms = self.now_ms();
        self.outcome.busy = 1.0 - self.idle_ms as f64 / self.now_ms() as f64;
        self.outcome.stats = *self.engine.stats();
        Ok(self.outcome)
    }

    /// What a row is to the engine: its class and when it is due.
    fn place(&self, row: usize) -> (Class, Due) {
        let row = &self.load.rows[row];
        match (self.order, row.batch.map(|batch| self.load.batches[batch])) {
            (Order::Arrival, _) => (Class::Standard, Due::NEVER),
            (Order::Windows, Some(batch)) => (Class::Batch, Due::window(batch.due_ms, batch.due_ms - batch.at_ms)),
            (Order::Windows, None) if row.class == Class::Standard => {
                let aim_ms = (STANDARD_TARGET_S as f64 * 1000.0 * AIM) as i64;
                (row.class, Due { at_ms: row.request.at_ms + aim_ms, ramp_ms: 0 })
            }
            (Order::Windows, None) => (row.class, Due::NEVER),
        }
    }

    fn take_arrivals(&mut self) {
        while self.load.rows.get(self.next).is_some_and(|row| row.request.at_ms <= self.now_ms()) {
            let (class, due) = self.place(self.next);
            self.outside[class as usize].entry(due.at_ms).or_default().push_back(self.next);
            self.next += 1;
        }
    }

    /// Gives the engine as many as it takes: what is due first, as its doors do.
    fn submit(&mut self) {
        for class in Class::ALL {
            while self.engine.n_queued(class) < self.engine.config().max_waiting
                && let Some(mut first) = self.outside[class as usize].first_entry()
            {
                let row = first.get_mut().pop_front().unwrap_or_default();
                if first.get().is_empty() {
                    first.remove();
                }
                let (class, due) = self.place(row);
                let Request { n_prompt, n_drawn, .. } = self.load.rows[row].request;
                let submission = Submission {
                    id: row as u64,
                    prompt: prompt(n_prompt, n_drawn),
                    params: SeqParams { max_tokens: MAX_DRAWN as u32, ..SeqParams::default() },
                    class,
                    keep_tokens: 0,
                    // A job's lengths are its own.
                    stream: self.load.rows[row].batch.map_or(class as u32, |batch| Class::ALL.len() as u32 + batch as u32),
                    due,
                };
                assert!(self.engine.submit(submission).is_ok(), "there was room");
            }
        }
    }

    /// Writes down what a step came to.
    fn note(&mut self, finished: &mut Vec<Finished>) {
        let now_ms = self.now_ms();
        let bin = (now_ms / BIN_MS) as usize;
        while self.outcome.served.len() <= bin {
            self.outcome.served.push([0; 3]);
            // While the machine idles, nobody waits.
            self.outcome.waited.push([self.outcome.served.len() == bin + 1; 3]);
        }
        for share in self.engine.last_step() {
            let row = &self.load.rows[share.id as usize];
            self.outcome.served[bin][row.class as usize] += share.n_tokens as u64;
            self.outcome.begins_ms[share.id as usize].get_or_insert(now_ms - row.request.at_ms);
        }
        for class in Class::ALL {
            self.outcome.waited[bin][class as usize] &= self.engine.n_queued(class) > 0;
        }
        for done in finished.drain(..) {
            let row = &self.load.rows[done.id as usize];
            self.outcome.turns_ms[done.id as usize] = now_ms - row.request.at_ms;
            if let Some(batch) = row.batch {
                self.outcome.ends_ms[batch] = now_ms;
            }
        }
    }
}

impl Outcome {
    /// Turns of a class's calls, shortest first, in seconds.
    pub fn turns_s(&self, load: &Load, class: Class) -> Vec<f64> {
        let of_class = load.rows.iter().zip(&self.turns_ms).filter(|(row, _)| row.class == class);
        let mut turns: Vec<f64> = of_class.map(|(_, &turn)| turn as f64 / 1000.0).collect();
        turns.sort_by(f64::total_cmp);
        turns
    }

    /// Times from the arrival of a class's calls to the ends of their first steps, shortest first, in seconds.
    pub fn begins_s(&self, load: &Load, class: Class) -> Vec<f64> {
        let of_class = load.rows.iter().zip(&self.begins_ms).filter(|(row, _)| row.class == class);
        let mut begins: Vec<f64> = of_class.filter_map(|(_, begin)| Some((*begin)? as f64 / 1000.0)).collect();
        begins.sort_by(f64::total_cmp);
        begins
    }

    /// Batches that ended after they were due.
    pub fn n_late(&self, load: &Load) -> usize {
        load.batches.iter().zip(&self.ends_ms).filter(|(batch, end_ms)| **end_ms > batch.due_ms).count()
    }

    /// Pairs of batches that were open side by side for five minutes, of which the one that is due first ended last.
    pub fn n_inversions(&self, load: &Load) -> usize {
        let ended: Vec<_> = load.batches.iter().zip(&self.ends_ms).collect();
        let is_inverted = |(a, &a_end): (&super::load::Batch, &i64), (b, &b_end): (&super::load::Batch, &i64)| {
            a.due_ms < b.due_ms && a_end > b_end && a.at_ms + BIN_MS < b_end
        };
        ended.iter().map(|&one| ended.iter().filter(|&&other| is_inverted(one, other)).count()).sum()
    }

    /// The least share of standard's and batch's tokens that a class got in five minutes in which it waited all the time.
    pub fn least_share(&self, class: Class) -> Option<f64> {
        let bins = self.served.iter().zip(&self.waited).filter(|(_, waited)| waited[class as usize]);
        let share = |(served, _): (&[u64; 3], _)| served[class as usize] as f64 / (served[1] + served[2]).max(1) as f64;
        bins.map(share).min_by(f64::total_cmp)
    }
}
