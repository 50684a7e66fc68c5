//! What the scheduler keeps for asap rows, whom it preempts for whom, and turns: small workloads whose counters can be told in
//! advance.

use crate::fake::N_VOCAB;
use crate::simulation::engine;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, EngineStats, StepLimits, Submission};
use valar::model::RunnerLimits;
use valar::window::Class;

fn limits(n_blocks: usize) -> RunnerLimits {
    RunnerLimits { n_blocks, max_step_tokens: 400, max_step_seqs: 16, n_vocab: N_VOCAB, max_context: 160 }
}

/// A row of exactly so many tokens, whose prompt nobody shares.
fn row(id: u64, class: Class, n_prompt: usize, n_output: u32) -> Submission {
    let params = SeqParams { max_tokens: n_output, ignore_eos: true, seed: id, ..SeqParams::default() };
    let (prompt, stream) = (vec![id as u32 % 60; n_prompt].into(), class as u32);
    Submission { id, prompt, params, class, keep_tokens: 0, stream, due: Due::NEVER }
}

fn submit(engine: &mut Engine, rows: impl IntoIterator<Item = Submission>) {
    rows.into_iter().for_each(|row| engine.submit(row).expect("there is room"));
}

fn step(engine: &mut Engine) {
    engine.step(&mut Vec::new()).expect("the fake runner does not fail");
    engine.check();
}

fn run_to_end(engine: &mut Engine) -> EngineStats {
    while engine.has_work() {
        step(engine);
    }
    *engine.stats()
}

#[test]
fn an_asap_row_finds_blocks_that_are_kept_for_it() {
    // Batches fill what they may have, in rows of 4 blocks; the asap row needs 4 of the 40.
    let preempted = |asap_reserve| {
        let config = EngineConfig { asap_reserve, ..EngineConfig::for_runner(&limits(40)) };
        let mut engine = engine(limits(40), config);
        submit(&mut engine, (0..40).map(|id| row(id, Class::Batch, 33, 31)));
        (0..3).for_each(|_| step(&mut engine));
        submit(&mut engine, [row(90, Class::Asap, 33, 31)]);
        step(&mut engine);
        assert!(engine.last_step().iter().any(|share| share.id == 90), "it begins in the next step");
        let stats = run_to_end(&mut engine);
        assert_eq!(stats.finished, 41);
        stats.preemptions
    };
    assert!(preempted(0) > 0);
    assert_eq!(preempted(10), 0);
}

#[test]
fn an_asap_row_finds_a_place_that_is_kept_for_it() {
    let preempted = |asap_reserve| {
        let config = EngineConfig { asap_reserve, max_running: 8, ..EngineConfig::for_runner(&limits(400)) };
        let mut engine = engine(limits(400), config);
        submit(&mut engine, (0..20).map(|id| row(id, Class::Standard, 3, 30)));
        step(&mut engine);
        submit(&mut engine, [row(90, Class::Asap, 3, 30)]);
        step(&mut engine);
        let preempted = engine.stats().preemptions_of;
        assert_eq!(run_to_end(&mut engine).finished, 21);
        preempted
    };
    assert_eq!((preempted(0), preempted(5)), ([0, 1, 0], [0; 3]));
}

#[test]
fn what_asap_rows_wanted_of_late_is_kept() {
    let config = EngineConfig { asap_reserve: 1, ..EngineConfig::for_runner(&limits(100)) };
    let mut engine = engine(limits(100), config);
    // Three at a time, of 10 blocks each.
    for round in 0..4 {
        submit(&mut engine, (0..3).map(|i| row(100 + 3 * round + i, Class::Asap, 100, 60)));
        run_to_end(&mut engine);
    }
    submit(&mut engine, (0..40).map(|id| row(id, Class::Batch, 100, 60)));
    (0..3).for_each(|_| step(&mut engine));
    assert_eq!(engine.stats().running, 6, "of ten blocks each: 30 are kept, and the rest of a part");
    submit(&mut engine, (0..3).map(|i| row(900 + i, Class::Asap, 100, 60)));
    step(&mut engine);
    assert_eq!((engine.stats().running, engine.stats().preemptions), (9, 0));
    assert_eq!(run_to_end(&mut engine).finished, 12 + 40 + 3);
}

#[test]
fn a_row_that_needs_what_is_kept_runs_when_no_other_does() {
    let config = EngineConfig { asap_reserve: 50, max_running: 1, ..EngineConfig::for_runner(&limits(10)) };
    let mut engine = engine(limits(10), config);
    submit(&mut engine, [row(0, Class::Batch, 100, 60), row(1, Class::Standard, 100, 60)]);
    assert_eq!(run_to_end(&mut engine).finished, 2);
}

#[test]
fn nobody_is_preempted_for_an_urgent_row_that_does_not_fit_then() {
    let config = EngineConfig { share_floors: [0; 3], ..EngineConfig::for_runner(&limits(24)) };
    let mut engine = engine(limits(24), config);
    // 9 blocks of the batch row's prompt are a trunk's, too, and stay in use without it; 10 are the standard row's.
    let batch = Submission { keep_tokens: 144, ..row(0, Class::Batch, 144, 16) };
    submit(&mut engine, [row(1, Class::Standard, 144, 16), batch]);
    step(&mut engine);
    let urgent = Submission { due: Due { at_ms: 0, ramp_ms: 0 }, stream: 7, ..row(2, Class::Standard, 96, 16) };
    submit(&mut engine, [urgent]);
    step(&mut engine);
    assert_eq!(
        (engine.stats().running, engine.stats().preemptions),
        (2, 0),
        "without the batch row, 5 blocks would be free of 7"
    );
    assert_eq!(run_to_end(&mut engine).finished, 3);
}

#[test]
fn rows_take_turns_where_a_step_has_no_room_for_all() {
    let mut engine = engine(limits(400), EngineConfig::for_runner(&limits(400)));
    let step_limits = Arc::new(StepLimits::default());
    engine.limit_steps(Arc::clone(&step_limits));
    submit(&mut engine, (0..5).map(|id| row(id, Class::Batch, 3, 150)));
    step(&mut engine);
    step_limits.tokens.store(2, Relaxed);
    let mut n_tokens = [0; 5];
    for _ in 0..50 {
        step(&mut engine);
        engine.last_step().iter().for_each(|share| n_tokens[share.id as usize] += share.n_tokens);
    }
    assert_eq!(n_tokens, [20; 5]);
}
