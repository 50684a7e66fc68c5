//! How busy a run was: the time that its operations would have taken alone, at the rate that each kernel reaches by itself, as
//! a share of the run's. Knows nothing of rows. Invariant: waiting, spinning and all that is no kernel's work count for nothing;
//! what is counted is what `tally` has counted, whichever of its steps are timed.
//!
//! Kernels are timed when the run is over and its memory free, on the model's own weights and on steps of the run as they were:
//! operation by operation through all layers, the best of a few rounds for each call (as `valar bench kernels`). What a class of
//! steps has of an operation, divided by the rate on its samples, is the time that it would have taken.

use super::load;
use super::tally::{Amount, Part, Tally};
use crate::config::ModelConfig;
use crate::device::batch::{Batch, StepOutput};
use crate::device::cpu::alone::{Alone, Kind, Log, Operation, Wanted};
use crate::device::{BLOCK_TOKENS, Device};
use crate::model::{ModelRunner, Runner};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Rounds of a measurement; of each call the best counts.
const ROUNDS: usize = 3;
/// Seconds of a sample after which there is no further round: of large models one must do.
const SAMPLE_SECONDS: f64 = 1.0;

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Busy {
    /// `seconds` by the run's time, from the first input byte to the last fsync, without loading the model.
    pub share: f64,
    /// What all operations would take alone.
    pub seconds: f64,
    /// What was counted.
    pub counted: Work,
    /// By operation, those that take most first.
    pub operations: Vec<Share>,
}

/// What the steps of a run computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Steps.
    pub steps: u64,
    /// Tokens that went through the layers.
    pub tokens: u64,
    /// Pairs of a token and one that it sees, in all layers, of sequences with several tokens in a step.
    pub prompt_pairs: u64,
    /// Likewise of sequences with one.
    pub decode_pairs: u64,
    /// Tokens whose keys and values these had to read, in all layers: what neighbours share once.
    pub decode_keys: u64,
    /// Rows of the head.
    pub head_rows: u64,
}

/// An operation's share of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// What it is.
    pub operation: String,
    /// Its weight's shape and types; empty where it has none that is a matrix.
    pub weight: String,
    /// What `amount` counts: `operations` (additions and multiplications) or `bytes`.
    pub unit: String,
    /// How much there was to do.
    pub amount: u64,
    /// What it would take alone.
    pub seconds: f64,
    /// That by the run's time.
    pub share: f64,
}

/// A model that is ready to be timed.
struct Bench {
    runner: ModelRunner<Alone>,
    log: Arc<Mutex<Log>>,
    out: StepOutput,
    /// Operations of a pair in a layer.
    pair_operations: u64,
    /// Bytes of a token's keys and values in a layer.
    key_bytes: u64,
}

/// How often a step calls an operation, and how long it takes.
#[derive(Debug, Clone, Copy, Default)]
struct Timed {
    calls: u64,
    seconds: f64,
}

/// Times what was counted in a run of `wall` seconds of that model.
///
/// # Errors
/// A model or device that is not there any more.
pub(super) fn measure(tally: &Tally, config: &ModelConfig, wall: f64) -> Result<Busy> {
    let classes: Vec<_> = tally
        .classes()
        .map(|(class, counted)| (class, counted.amount, counted.samples.iter().map(compacted).collect::<Vec<_>>()))
        .collect();
    let n_blocks = classes.iter().flat_map(|(.., samples)| samples).map(|(_, n_blocks)| *n_blocks).max().unwrap_or(1);
    let mut bench = Bench::new(config, n_blocks)?;
    let mut shares: BTreeMap<(Operation, Option<Part>), (u64, f64)> = BTreeMap::new();
    for (class, amount, samples) in &classes {
        let part = class.part;
        let (mut sampled, mut alone) = (Amount::default(), BTreeMap::<Operation, Timed>::new());
        for (batch, _) in samples {
            sampled += tally.amount(part, batch);
            for (operation, timed) in bench.time(part, batch)? {
                let sum = alone.entry(operation).or_default();
                (sum.calls, sum.seconds) = (timed.calls, sum.seconds + timed.seconds);
            }
        }
        for (operation, Timed { calls, seconds }) in alone {
            let of = |amount| bench.amount((part, &operation, calls), amount);
            let (whole, timed) = (of(*amount), of(sampled));
            let is_attention = operation.kind == Kind::Attention;
            let share = shares.entry((operation, is_attention.then_some(part))).or_default();
            *share = (share.0 + whole, share.1 + seconds * whole as f64 / timed as f64);
        }
    }
    let seconds = shares.values().map(|(_, seconds)| seconds).sum();
    let mut operations: Vec<Share> =
        shares.into_iter().map(|((operation, part), sum)| share(operation, part, sum, wall)).collect();
    operations.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(Busy { share: super::report::ratio(seconds, wall), seconds, counted: work(tally), operations })
}

fn work(tally: &Tally) -> Work {
    let (tokens, steps) = tally.total(Part::Tokens);
    let [prompts, decoding, heads] = [Part::Prompts, Part::Decoding, Part::Heads].map(|part| tally.total(part).0);
    Work {
        steps,
        tokens: tokens.rows,
        prompt_pairs: prompts.pairs,
        decode_pairs: decoding.pairs,
        decode_keys: decoding.keys,
        head_rows: heads.rows,
    }
}

fn share(operation: Operation, part: Option<Part>, (amount, seconds): (u64, f64), wall: f64) -> Share {
    let decodes = part == Some(Part::Decoding);
    let name = match operation.kind {
        Kind::Linear => "product",
        Kind::LinearAdd => "product, added",
        Kind::GateUp => "gate, up",
        Kind::Experts => "experts",
        Kind::Attention if decodes => "attention, decoding",
        Kind::Attention => "attention, prompts",
        Kind::Head => "head",
        Kind::FinishQkv => "rotate, store",
        Kind::Norm => "norm",
        Kind::NormAdd => "norm, added",
        Kind::Embed => "embed",
    };
    let in_bytes = decodes || matches!(operation.kind, Kind::FinishQkv | Kind::Norm | Kind::NormAdd | Kind::Embed);
    Share {
        operation: name.to_owned(),
        weight: operation.weight,
        unit: if in_bytes { "bytes" } else { "operations" }.to_owned(),
        amount,
        seconds,
        share: super::report::ratio(seconds, wall),
    }
}

impl Bench {
    /// Loads the model, with a cache of `n_blocks` blocks.
    fn new(config: &ModelConfig, n_blocks: usize) -> Result<Self> {
        let (device, file) = load::open(config)?.into_cpu()?;
        let attention = &file.spec()?.attention[0];
        let pair_operations = (4 * attention.n_heads * attention.head_dim) as u64;
        let key_bytes = (device.cache_block_bytes(attention) / BLOCK_TOKENS) as u64;
        let log = Arc::default();
        let runner = ModelRunner::load(Alone::new(device, Arc::clone(&log)), &*file, n_blocks, config.budget_tokens)?;
        Ok(Self { runner, log, out: StepOutput::default(), pair_operations, key_bytes })
    }

    /// How much there is to do of an operation that a step calls so often.
    fn amount(&self, (part, operation, calls): (Part, &Operation, u64), amount: Amount) -> u64 {
        match part {
            Part::Tokens | Part::Heads => operation.per_row * calls * amount.rows,
            Part::Prompts => self.pair_operations * amount.pairs,
            Part::Decoding => self.key_bytes * amount.keys,
        }
    }

    /// Times the operations of a part of a step.
    fn time(&mut self, part: Part, batch: &Batch) -> Result<BTreeMap<Operation, Timed>> {
        if part == Part::Tokens {
            // So that all that is read is numbers of the kind that a run has.
            self.pass(Wanted::All, batch)?;
        }
        let mut calls: BTreeMap<Operation, Vec<f64>> = BTreeMap::new();
        for operation in self.pass(Wanted::Nothing, batch)?.called {
            let is_of_part = match part {
                Part::Tokens => !matches!(operation.kind, Kind::Attention | Kind::Head),
                Part::Prompts | Part::Decoding => operation.kind == Kind::Attention,
                Part::Heads => operation.kind == Kind::Head,
            };
            if is_of_part {
                calls.entry(operation).or_default().push(f64::INFINITY);
            }
        }
        let start = Instant::now();
        for _ in 0..ROUNDS {
            // One operation after the other, so that a weight is not in a cache because it was used just before.
            for (operation, least) in &mut calls {
                let seconds = self.pass(Wanted::Only(operation.clone()), batch)?.seconds;
                assert_eq!(seconds.len(), least.len(), "a step calls the same operations each time");
                least.iter_mut().zip(seconds).for_each(|(least, seconds)| *least = least.min(seconds));
            }
            if start.elapsed().as_secs_f64() > SAMPLE_SECONDS {
                break;
            }
        }
        let timed = |calls: Vec<f64>| Timed { calls: calls.len() as u64, seconds: calls.iter().sum() };
        Ok(calls.into_iter().map(|(operation, calls)| (operation, timed(calls))).collect())
    }

    /// Runs what is wanted of a step.
    fn pass(&mut self, wanted: Wanted, batch: &Batch) -> Result<Log> {
        let take = |log: &Mutex<Log>, wanted| {
            std::mem::replace(&mut *log.lock().unwrap_or_else(PoisonError::into_inner), Log { wanted, ..Log::default() })
        };
        take(&self.log, wanted);
        self.runner.run(batch, &mut self.out)?;
        Ok(take(&self.log, Wanted::Nothing))
    }
}

/// A step whose blocks are numbered from 0 on, and how many it has.
fn compacted(batch: &Batch) -> (Batch, usize) {
    let (mut batch, mut numbers) = (batch.clone(), HashMap::new());
    let Batch { block_tables, copies, .. } = &mut batch;
    let ends = copies.iter_mut().flat_map(|copy| [&mut copy.src, &mut copy.dst]);
    for block in block_tables.iter_mut().chain(ends) {
        let next = numbers.len() as u32;
        *block = *numbers.entry(*block).or_insert(next);
    }
    (batch, numbers.len())
}

impl Busy {
    /// For people.
    pub(super) fn table(&self) -> String {
        let mut table = format!("{:<18}{:>8.1} %  kernels alone would take {:.2} s\n", "busy", 100.0 * self.share, self.seconds);
        for Share { operation, weight, unit, amount, seconds, share } in &self.operations {
            let unit = if unit == "bytes" { "B" } else { "ops" };
            let (amount, rate) = (*amount as f64 / 1e9, *amount as f64 / 1e9 / seconds);
            let _memory_takes_it = writeln!(
                table,
                "  {operation:<20}{weight:<28}{amount:>11.1} G{unit:<4}{seconds:>8.3} s{rate:>9.1} G{unit}/s{:>8.1} %",
                100.0 * share
            );
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::batch::BlockCopy;

    #[test]
    fn blocks_are_numbered_anew_and_stay_what_they_are_to_each_other() {
        let copies = vec![BlockCopy { src: 900, dst: 7, n_slots: 3 }, BlockCopy { src: 40, dst: 900, n_slots: 1 }];
        let batch = Batch { block_tables: vec![40, 7, 40, 8, 7], copies, ..Batch::default() };
        let (compact, n_blocks) = compacted(&batch);
        assert_eq!((compact.block_tables, n_blocks), (vec![0, 1, 0, 2, 1], 4));
        let ends: Vec<(u32, u32)> = compact.copies.iter().map(|copy| (copy.src, copy.dst)).collect();
        assert_eq!(ends, [(3, 1), (0, 3)]);
    }
}
