//! Measures how fast the model runs on this machine: a few real steps of rows like the job's. Invariant: takes seconds,
//! whatever the model: a phase ends after the step in which its time is up.

use super::estimate::Run;
use super::load::{self, OpenModel};
use super::meter::{Meter, Reading};
use crate::config::Config;
use crate::engine::sampling::SeqParams;
use crate::engine::{Due, Engine, EngineConfig, Finished, Submission};
use crate::plan::estimate::Totals;
use crate::window::Class;
use anyhow::Result;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time for each phase: prefill, decode.
const PHASE: Duration = Duration::from_secs(1);
/// Rows of a step are not worth more tokens than this each.
const DECODE_TOKENS: usize = 512;

/// Runs the job's model for about two seconds, with prompts and row counts like the job's.
///
/// # Errors
/// The model can't be loaded, or fails.
pub(super) fn measure(open: OpenModel, config: &Config, totals: &Totals) -> Result<Run> {
    let meter = Arc::new(Meter::default());
    let tokens = Arc::clone(&open.tokenizer);
    let n_vocab = tokens.n_vocab() as u32;
    let (runner, _template) = load::load(open, &config.model(), &meter)?;
    let limits = runner.limits();
    let mut engine_config = EngineConfig::for_runner(&limits);
    engine_config.max_running = config.spec.engine.max_running.min(engine_config.max_running);
    let n_rows = engine_config.max_running.min(usize::try_from(totals.n_computed).unwrap_or(usize::MAX));
    let mut engine = Engine::new(engine_config, runner, tokens)?;
    let n_prompt = (totals.quantiles[0] as usize).clamp(1, limits.max_context / 2);
    let mut finished = Vec::new();

    // Prefill: prompts that share nothing, each ended by its first token.
    let (start, mut id) = (Instant::now(), 0);
    while start.elapsed() < PHASE {
        while id < 2 || engine.n_queued(Class::Batch) < 2 * engine.config().budget_tokens / n_prompt.max(16) {
            if engine.submit(row(id, n_prompt, id as u32 * 7919 % n_vocab, n_vocab, 1)).is_err() {
                break;
            }
            id += 1;
        }
        step(&mut engine, &mut finished)?;
    }
    let (prefill, prefill_tokens) = (meter.read(), engine.stats().prefill_tokens);
    while engine.has_work() {
        step(&mut engine, &mut finished)?;
    }

    // Decode: as many rows as the job runs at once, their prompt computed once.
    let n_output = DECODE_TOKENS.min(limits.max_context - n_prompt) as u32;
    for i in 0..n_rows.min(engine.config().max_waiting) as u64 {
        let mut submission = row(id + i, n_prompt, 0, n_vocab, n_output);
        submission.keep_tokens = n_prompt as u32 - 1;
        if engine.submit(submission).is_err() {
            break;
        }
    }
    // The first step or two prefill.
    for _ in 0..=n_prompt.div_ceil(engine.config().budget_tokens) {
        step(&mut engine, &mut finished)?;
    }
    let (before, before_tokens) = (meter.read(), engine.stats().decode_tokens);
    let start = Instant::now();
    while start.elapsed() < PHASE && engine.has_work() {
        step(&mut engine, &mut finished)?;
    }
    let (after, decode_tokens) = (meter.read(), engine.stats().decode_tokens - before_tokens);
    let all = |reading: Reading| reading.prefill + reading.decode;
    Ok(Run {
        prefill_tokens,
        prefill_seconds: all(prefill).as_secs_f64(),
        decode_tokens,
        decode_seconds: all(after).saturating_sub(all(before)).as_secs_f64(),
        ..Run::default()
    })
}

/// A step; the one after it begins, too, where a device goes on by itself.
fn step(engine: &mut Engine, finished: &mut Vec<Finished>) -> Result<()> {
    engine.start();
    engine.step(finished)
}

/// A row of any tokens that begins with `first`.
fn row(id: u64, n_prompt: usize, first: u32, n_vocab: u32, max_tokens: u32) -> Submission {
    let prompt: Vec<u32> = (0..n_prompt as u32).map(|i| if i == 0 { first } else { (i * 31 + first) % n_vocab }).collect();
    Submission {
        id,
        prompt: prompt.into(),
        params: SeqParams { max_tokens, ignore_eos: true, ..SeqParams::default() },
        class: Class::Batch,
        keep_tokens: 0,
        stream: 0,
        due: Due::NEVER,
    }
}
