//! What the scheduler is meant to be good at, a case each: small workloads whose counters can be told in advance.

use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, EngineStats, Submission};
use valar::model::RunnerLimits;
use valar::window::Class;

use crate::fake::{N_VOCAB, expected};
use crate::simulation::engine;

/// A runner of `n_blocks` blocks whose steps are not the limit.
fn limits(n_blocks: usize) -> RunnerLimits {
    RunnerLimits { n_blocks, max_step_tokens: 400, max_step_seqs: 8, n_vocab: N_VOCAB, max_context: 160 }
}

/// A row of exactly `n_output` tokens.
fn row(id: u64, class: Class, prompt: &[u32], n_output: u32) -> Submission {
    let params = SeqParams { max_tokens: n_output, ignore_eos: true, seed: id, ..SeqParams::default() };
    Submission { id, prompt: prompt.into(), params, class, keep_tokens: 0, stream: class as u32, due: Due::NEVER }
}

fn submit(engine: &mut Engine, rows: impl IntoIterator<Item = Submission>) {
    rows.into_iter().for_each(|row| engine.submit(row).expect("there is room"));
}

fn step(engine: &mut Engine, n: usize) {
    for _ in 0..n {
        engine.step(&mut Vec::new()).expect("the fake runner does not fail");
        engine.check();
    }
}

fn run_to_end(engine: &mut Engine) -> EngineStats {
    while engine.has_work() {
        step(engine, 1);
    }
    *engine.stats()
}

/// `n` tokens that begin with `first`.
fn prompt(first: u32, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (first + i * i) % 60).collect()
}

#[test]
fn a_trunk_whose_owner_was_preempted_is_whole_again_when_it_returns() {
    let limits = limits(10);
    let config = EngineConfig { budget_tokens: 20, ..EngineConfig::for_runner(&limits) };
    let mut engine = engine(limits, config);
    let shared = prompt(7, 100);
    let rows = (0..3).map(|id| {
        let own = [shared.as_slice(), &[50 + id as u32]].concat();
        Submission { keep_tokens: 100, ..row(id, Class::Batch, &own, 3) }
    });
    submit(&mut engine, rows);
    step(&mut engine, 2); // 40 of 100 shared tokens
    submit(&mut engine, [row(9, Class::Asap, &prompt(1, 110), 2)]);
    let stats = run_to_end(&mut engine);
    assert_eq!(stats.preemptions, 1);
    assert_eq!(stats.prefill_tokens, 100 + 3 + 110);
}

#[test]
fn a_row_that_returns_late_leaves_the_trunk_to_later_rows() {
    let limits = limits(40);
    let mut engine = engine(limits, EngineConfig { max_running: 2, ..EngineConfig::for_runner(&limits) });
    let shared = prompt(7, 60);
    let branch = |id, last| Submission { keep_tokens: 60, ..row(id, Class::Batch, &[shared.as_slice(), &[last]].concat(), 5) };
    // The asap row takes the place of row 0, which computed least; row 0 is back before row 2 is admitted.
    submit(&mut engine, [row(0, Class::Batch, &prompt(3, 5), 30), branch(1, 50), branch(2, 51)]);
    step(&mut engine, 2);
    submit(&mut engine, [row(9, Class::Asap, &prompt(1, 4), 2)]);
    let stats = run_to_end(&mut engine);
    assert_eq!((stats.preemptions, stats.recomputed_tokens), (1, 6));
    assert_eq!(stats.prefill_tokens, 5 + 60 + 2 + 4);
}

#[test]
fn the_trunk_of_a_stream_without_rows_goes_first() {
    let limits = limits(12);
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    submit(&mut engine, [Submission { keep_tokens: 64, stream: 77, ..row(0, Class::Batch, &prompt(2, 64), 1) }]);
    step(&mut engine, 1);
    assert_eq!((engine.has_work(), engine.stats().blocks_used), (false, 4));
    // 7 blocks for the first, 4 more for the second: only without the idle trunk's.
    let shared = prompt(7, 48);
    let branch = |id, last| Submission { keep_tokens: 48, ..row(id, Class::Batch, &[shared.as_slice(), &[last]].concat(), 60) };
    submit(&mut engine, [branch(1, 50), branch(2, 51)]);
    step(&mut engine, 1);
    assert_eq!((engine.stats().running, engine.stats().shared_tokens), (2, 48));
}

#[test]
fn a_row_that_was_preempted_too_often_waits_instead() {
    let limits = limits(10);
    for (max_preemptions, n_preemptions) in [(0, 0), (3, 1)] {
        // Three rows of 3 blocks at first and 4 at the end, which nobody foresees; when the tenth block is taken, the
        // last row has to give way, or to wait until the first is done.
        let config = EngineConfig { max_preemptions, cold_output_tokens: 1, ..EngineConfig::for_runner(&limits) };
        let mut engine = engine(limits, config);
        for id in 0..3 {
            let prompt = prompt(id, 40);
            let params = |seed| SeqParams { max_tokens: 20 - 4 * id, seed, ..SeqParams::default() };
            let is_long = |seed: &u64| expected(0, &prompt, &params(*seed), 160).tokens.len() as u32 == 20 - 4 * id;
            let seed = (0..10_000).find(is_long).expect("some seed draws no end");
            submit(&mut engine, [Submission { params: params(seed), ..row(u64::from(id), Class::Batch, &prompt, 1) }]);
        }
        let stats = run_to_end(&mut engine);
        assert_eq!((stats.preemptions, stats.finished), (n_preemptions, 3));
    }
}

#[test]
fn asap_rows_that_do_not_fit_together_run_one_after_the_other() {
    let limits = limits(10);
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    submit(&mut engine, (0..2).map(|id| row(id, Class::Asap, &prompt(id as u32, 20), 90)));
    let stats = run_to_end(&mut engine);
    assert_eq!((stats.preemptions, stats.recomputed_tokens, stats.finished), (0, 0, 2));
}

#[test]
fn a_trunk_lives_as_long_as_the_next_row_needs_it() {
    let limits = limits(10);
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    for (keep_tokens, n_blocks) in [(32, 2), (33, 3), (5, 1), (0, 0)] {
        submit(&mut engine, [Submission { keep_tokens, ..row(1, Class::Batch, &prompt(7, 40), 4) }]);
        assert_eq!(run_to_end(&mut engine).blocks_used, n_blocks);
    }
    assert_eq!(engine.stats().shared_tokens, 32 + 33 + 5);
}

#[test]
fn the_row_that_costs_least_to_compute_again_gives_way() {
    let limits = limits(10);
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    submit(&mut engine, [row(0, Class::Batch, &prompt(0, 70), 9), row(1, Class::Batch, &prompt(1, 60), 9)]);
    step(&mut engine, 2);
    submit(&mut engine, [row(9, Class::Asap, &prompt(3, 30), 2)]);
    let stats = run_to_end(&mut engine);
    assert_eq!((stats.preemptions, stats.recomputed_tokens), (1, 61));
}

#[test]
fn a_smaller_row_of_a_lower_class_does_not_overtake_one_that_waits_for_blocks() {
    let limits = limits(10);
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    submit(&mut engine, [row(0, Class::Batch, &prompt(0, 70), 9)]);
    step(&mut engine, 1);
    submit(&mut engine, [row(1, Class::Standard, &prompt(1, 100), 9), row(2, Class::Batch, &prompt(2, 10), 2)]);
    step(&mut engine, 1);
    assert_eq!(engine.last_step().iter().map(|s| s.id).collect::<Vec<_>>(), [0]);
    assert_eq!(run_to_end(&mut engine).preemptions, 0);
}

#[test]
fn a_stream_learns_how_long_its_rows_get() {
    // 32 rows of 1 + 3 blocks at most in 16: room for 4 if they use all they may, and for all 8 places if they do not.
    for (n_output, n_running) in [(60, 4), (2, 8)] {
        let limits = limits(16);
        let config = EngineConfig { cold_output_tokens: 60, ..EngineConfig::for_runner(&limits) };
        let mut engine = engine(limits, config);
        for id in 0..32 {
            let prompt = [id as u32];
            let params = |seed| SeqParams { max_tokens: 60, seed, ..SeqParams::default() };
            let fits = |seed: &u64| expected(0, &prompt, &params(*seed), 160).tokens.len() as u32 == n_output;
            let seed = (0..10_000).find(fits).expect("some seed draws as many");
            submit(&mut engine, [Submission { params: params(seed), ..row(id, Class::Batch, &prompt, 1) }]);
        }
        let mut most_running = 0;
        while engine.has_work() {
            step(&mut engine, 1);
            most_running = most_running.max(engine.last_step().len());
        }
        assert_eq!((most_running, engine.stats().preemptions), (n_running, 0));
    }
}
