//! What the engine keeps of sequences that have ended, on the fake runner: whoever begins with it has the outcome that it would
//! have alone, nobody finds another owner's, and nothing that runs ever waits for it.

use std::cell::RefCell;
use std::collections::HashMap;

use valar::device::BLOCK_TOKENS;
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, EngineStats, Finished, Keep, Submission};
use valar::model::RunnerLimits;
use valar::window::Class;

use crate::fake::{FakeRunner, Fault, N_VOCAB, Rng, expected, fake_tokens};
use crate::simulation::{Row, Workload, any_due, common, engine, for_seeds, simulate_noting};

/// Longer than any test.
const LONG_MS: i64 = 1_000_000_000;

fn row(id: u64, prompt: &[u32], n_drawn: u32, keep: Option<Keep>) -> Submission {
    let params = SeqParams { max_tokens: n_drawn, ignore_eos: true, seed: id, watch: true, keep, ..SeqParams::default() };
    Submission { id, prompt: prompt.into(), params, class: Class::Asap, keep_tokens: 0, stream: 0, due: Due::NEVER }
}

/// Conversations of two owners: each turn goes on with what an earlier one came to, or with a part of it.
pub(crate) fn conversations(rng: &mut Rng) -> Workload {
    let max_context = rng.range(40, 300);
    let least_blocks = max_context.div_ceil(BLOCK_TOKENS);
    let limits = RunnerLimits {
        n_blocks: least_blocks * rng.pick(&[1, 2, 5, 20]),
        max_step_tokens: rng.pick(&[8, 64, 300]),
        max_step_seqs: rng.range(1, 12),
        n_vocab: N_VOCAB,
        max_context,
    };
    let config = EngineConfig {
        max_running: rng.range(1, 8),
        cold_output_tokens: rng.pick(&[1, 16]),
        max_kept_blocks: rng.pick(&[0, 3, limits.n_blocks / 2, limits.n_blocks]),
        ..EngineConfig::for_runner(&limits)
    };
    let (is_timed, percent_cancelled) = (rng.chance(50), rng.pick(&[0, 10]));
    let lasting = rng.pick(&[200, 3_000, LONG_MS]);
    let mut rows: Vec<Row> = Vec::new();
    for stream in 0..rng.range(1, 6) as u32 {
        let owner = rng.range(0, 1) as u64;
        let class = rng.pick(&Class::ALL);
        // What each turn came to, and when that may be there.
        let mut turns = vec![(vec![7; rng.range(1, 20)], rng.range(0, 20))];
        for _ in 0..rng.range(1, 6) {
            let (mut prompt, begins) = turns[rng.range(0, turns.len() - 1)].clone();
            if rng.chance(10) {
                prompt.truncate(rng.range(1, prompt.len()));
            }
            prompt.extend((0..rng.range(1, 30)).map(|_| rng.range(3, 5) as u32));
            prompt.truncate(max_context - rng.range(1, 30));
            let id = rows.len() as u64;
            let keep = Keep { owner, for_ms: if rng.chance(80) { lasting } else { 0 } };
            let params = SeqParams {
                max_tokens: rng.range(1, 60) as u32,
                ignore_eos: rng.chance(70),
                seed: rng.next(),
                logprobs: rng.chance(20).then_some(2),
                watch: true,
                keep: rng.chance(90).then_some(keep),
                ..SeqParams::default()
            };
            let answer = expected(id, &prompt, &params, max_context).tokens;
            let arrives = begins + rng.pick(&[0, answer.len(), 2 * answer.len() + 40]);
            let keep_tokens = rng.pick(&[0, prompt.len() as u32]);
            let due = if is_timed { any_due(rng) } else { Due::NEVER };
            turns.push(([prompt.clone(), answer].concat(), arrives));
            let cancelled = rng.chance(percent_cancelled).then(|| arrives + rng.range(0, 40));
            // Calls of several conversations have a stream in common, as on the server.
            let stream = if class == Class::Asap { 9 } else { stream };
            let submission = Submission { id, prompt: prompt.into(), params, class, keep_tokens, stream, due };
            rows.push(Row { submission, arrives, cancelled });
        }
    }
    rows.sort_by_key(|row| row.arrives);
    Workload { limits, config, rows }
}

/// Most leading tokens of a row that another one of its owner's has ever had.
fn most_shared(workload: &Workload, id: u64) -> usize {
    let find = |id| workload.rows.iter().find(|row| row.submission.id == id).expect("a row of the workload");
    let own = &find(id).submission;
    let owner = |submission: &Submission| submission.params.keep.map(|keep| keep.owner);
    let others = workload.rows.iter().map(|row| &row.submission).filter(|other| other.id != id && owner(other) == owner(own));
    let all = others.map(|other| {
        let answer = expected(other.id, &other.prompt, &other.params, workload.limits.max_context).tokens;
        common(&own.prompt, &[&*other.prompt, &answer].concat())
    });
    all.max().unwrap_or(0)
}

#[test]
fn conversations_have_the_outcomes_of_their_turns_alone() {
    let total = RefCell::new(EngineStats::default());
    for_seeds(2000, |rng| {
        let workload = conversations(rng);
        let mut cached = HashMap::new();
        let stats = simulate_noting(&workload, &mut cached);
        for (&id, &n_cached) in &cached {
            let most = most_shared(&workload, id);
            assert!(n_cached as usize <= most, "row {id} found {n_cached} tokens, its owner has left {most}");
        }
        let mut total = total.borrow_mut();
        total.found_tokens += stats.found_tokens;
        total.evicted_blocks += stats.evicted_blocks;
        total.lapsed_blocks += stats.lapsed_blocks;
        total.preemptions += stats.preemptions;
    });
    // The seeds reach what they are meant to reach.
    let total = total.into_inner();
    assert!(total.found_tokens > 100_000 && total.evicted_blocks > 2000, "{total:?}");
    assert!(total.lapsed_blocks > 2000 && total.preemptions > 200, "{total:?}");
}

/// Submits a row and runs it to its end: what it came to, and how many tokens it found.
fn complete(engine: &mut Engine, submission: Submission) -> (Finished, u32) {
    let (id, mut n_cached, mut finished) = (submission.id, 0, Vec::new());
    engine.submit(submission).expect("there is room");
    while engine.has_work() {
        engine.step(&mut finished).expect("the fake runner does not fail for ever");
        engine.check();
        n_cached = engine.take_progress().iter().filter(|next| next.id == id).fold(n_cached, |_, next| next.cached_tokens);
    }
    (finished.pop().expect("it has finished"), n_cached)
}

fn limits(n_blocks: usize) -> RunnerLimits {
    RunnerLimits { n_blocks, max_step_tokens: 64, max_step_seqs: 8, n_vocab: N_VOCAB, max_context: 160 }
}

fn keeping(n_blocks: usize, max_kept_blocks: usize) -> Engine {
    engine(limits(n_blocks), EngineConfig { max_kept_blocks, ..EngineConfig::for_runner(&limits(n_blocks)) })
}

#[test]
fn the_next_turn_begins_where_the_last_one_ended() {
    let mut engine = keeping(100, 50);
    let keep = |owner, for_ms| Some(Keep { owner, for_ms });
    engine.advance(1000);
    let prompt = [9; 40];
    let (first, n_cached) = complete(&mut engine, row(0, &prompt, 30, keep(1, 500)));
    // The last token that was drawn is never computed: 69 of 70 are there, in four full blocks.
    assert_eq!((n_cached, engine.stats().blocks_kept, engine.stats().blocks_used), (0, 4, 0));
    let second: Vec<u32> = prompt.iter().chain(&first.tokens).copied().chain([3; 20]).collect();
    let found = |engine: &mut Engine, id, keep| {
        let (done, n_cached) = complete(engine, row(id, &second, 5, keep));
        let Submission { prompt, params, .. } = row(id, &second, 5, keep);
        assert_eq!(done, expected(id, &prompt, &params, 160));
        n_cached
    };
    assert_eq!(found(&mut engine, 1, keep(2, 0)), 0, "another owner's");
    assert_eq!(found(&mut engine, 2, None), 0, "nobody's");
    engine.advance(1499);
    assert_eq!(found(&mut engine, 3, keep(1, 0)), 64);
    assert_eq!(engine.next_lapse_ms(), Some(1500), "who leaves nothing prolongs nothing");
    assert_eq!(found(&mut engine, 4, keep(1, 500)), 64);
    assert_eq!((engine.next_lapse_ms(), engine.stats().blocks_kept), (Some(1999), 5), "94 of 95 tokens");
    assert_eq!(found(&mut engine, 5, keep(1, 0)), 80, "all full blocks but for the last token");
    assert_eq!(engine.stats().found_tokens, 64 + 64 + 80);
    engine.advance(1999);
    engine.lapse();
    assert_eq!((engine.stats().blocks_kept, engine.stats().lapsed_blocks, engine.next_lapse_ms()), (0, 5, None));
    assert_eq!(found(&mut engine, 6, keep(1, 0)), 0);
}

#[test]
fn what_waits_for_its_turn_does_not_lapse() {
    let mut engine = keeping(100, 50);
    let keep = Some(Keep { owner: 1, for_ms: 500 });
    let (first, _) = complete(&mut engine, row(0, &[9; 40], 30, keep));
    engine.advance(499);
    let second: Vec<u32> = [9; 40].iter().chain(&first.tokens).copied().collect();
    engine.submit(row(1, &second, 5, keep)).expect("there is room");
    engine.advance(998);
    engine.step(&mut Vec::new()).expect("the fake runner does not fail");
    assert_eq!(engine.last_step()[0].first_position, 64);
}

#[test]
fn what_is_kept_goes_before_anybody_loses_anything() {
    let mut engine = keeping(20, 20);
    for id in 0..4 {
        complete(&mut engine, row(id, &[10 + id as u32; 60], 30, Some(Keep { owner: 1, for_ms: LONG_MS })));
    }
    // Five full blocks of each; the last one ran in six, and so the end of the first had to go.
    assert_eq!((engine.stats().blocks_kept, engine.stats().evicted_blocks), (19, 1));
    let (_, n_cached) = complete(&mut engine, row(4, &[13; 60], 1, Some(Keep { owner: 1, for_ms: 0 })));
    assert_eq!(n_cached, 48);
    // Two rows that need the whole pool, of the lowest class.
    for id in 5..7 {
        let big = Submission { class: Class::Batch, stream: id as u32, ..row(id, &[20 + id as u32; 100], 60, None) };
        engine.submit(big).expect("there is room");
    }
    let mut finished = Vec::new();
    while engine.has_work() {
        engine.step(&mut finished).expect("the fake runner does not fail");
        engine.check();
    }
    let stats = engine.stats();
    assert_eq!((finished.len(), stats.preemptions, stats.blocks_kept, stats.evicted_blocks), (2, 0, 0, 20));
}

#[test]
fn a_bound_of_blocks_holds_the_latest() {
    let mut engine = keeping(100, 6);
    let keep = |for_ms| Some(Keep { owner: 1, for_ms });
    complete(&mut engine, row(0, &[9; 60], 30, keep(LONG_MS)));
    complete(&mut engine, row(1, &[8; 60], 30, keep(LONG_MS / 2)));
    // Five blocks each: what lapses later stays, and of the other the beginning.
    assert_eq!(engine.stats().blocks_kept, 6);
    assert_eq!(complete(&mut engine, row(2, &[9; 60], 1, keep(0))).1, 48);
    assert_eq!(complete(&mut engine, row(3, &[8; 60], 1, keep(0))).1, 16);
}

#[test]
fn rows_side_by_side_share_a_prompt_that_one_of_them_has_computed() {
    let mut engine = keeping(100, 50);
    let keep = Some(Keep { owner: 1, for_ms: LONG_MS });
    engine.submit(row(0, &[9; 60], 50, keep)).expect("there is room");
    engine.step(&mut Vec::new()).expect("the fake runner does not fail");
    engine.submit(row(1, &[[9; 48], [8; 48]].concat(), 50, keep)).expect("there is room");
    engine.step(&mut Vec::new()).expect("the fake runner does not fail");
    engine.check();
    assert_eq!(engine.last_step().iter().map(|share| share.first_position).collect::<Vec<_>>(), [60, 48]);
    assert!(engine.cancel(0) && engine.cancel(1));
    engine.check();
    assert_eq!((engine.stats().blocks_used, engine.stats().blocks_kept), (0, 6), "the prompts, which were computed");
}

#[test]
fn a_step_that_fails_leaves_nothing_kept() {
    let keep = Some(Keep { owner: 1, for_ms: LONG_MS });
    let runner = FakeRunner::failing(limits(100), 6, Fault::Once);
    let config = EngineConfig { max_kept_blocks: 50, ..EngineConfig::for_runner(&limits(100)) };
    let mut engine = Engine::new(config, Box::new(runner), fake_tokens()).expect("the limits are sound");
    complete(&mut engine, row(0, &[9; 40], 5, keep));
    assert_eq!((engine.stats().steps, engine.stats().blocks_kept), (5, 2));
    let (done, n_cached) = complete(&mut engine, row(1, &[9; 50], 5, keep));
    let again = row(1, &[9; 50], 5, keep);
    assert_eq!((done, n_cached), (expected(1, &again.prompt, &again.params, 160), 32));
    assert_eq!((engine.stats().failed_steps, engine.stats().lapsed_blocks), (1, 2), "what was kept before is not trusted");
}
