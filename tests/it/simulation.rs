//! Seeded workloads on the engine and a fake runner: whatever the pool, the budget, the order and the cancellations,
//! every row gets exactly the outcome it would get alone, and nothing leaks. A failure names its seed.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use valar::device::BLOCK_TOKENS;
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, EngineStats, Finished, Progress, Scheduled, StepLimits, Submission};
use valar::model::RunnerLimits;
use valar::window::Class;

use crate::fake::{FakeRunner, N_VOCAB, Rng, expected, fake_tokens};

/// A row of a workload.
#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) submission: Submission,
    /// Submitted before this step, at the earliest.
    pub(crate) arrives: usize,
    /// Cancelled before this step.
    pub(crate) cancelled: Option<usize>,
}

/// An engine's limits and what it is given.
pub(crate) struct Workload {
    pub(crate) limits: RunnerLimits,
    pub(crate) config: EngineConfig,
    /// In the order of submission within a class.
    pub(crate) rows: Vec<Row>,
}

/// An engine on a fake runner.
pub(crate) fn engine(limits: RunnerLimits, config: EngineConfig) -> Engine {
    let runner = FakeRunner::new(limits, config.budget_tokens);
    Engine::new(config, Box::new(runner), fake_tokens()).expect("the limits are sound")
}

/// Runs the workload to its end, asserting everything that must hold after every step.
fn simulate(workload: &Workload) -> EngineStats {
    simulate_noting(workload, &mut HashMap::new())
}

/// As [`simulate`]; `cached` gets how many tokens of each watched row were in the cache.
pub(crate) fn simulate_noting(workload: &Workload, cached: &mut HashMap<u64, u32>) -> EngineStats {
    let Workload { limits, config, rows } = workload;
    let mut engine = engine(*limits, *config);
    let mut queues = Class::ALL.map(|class| rows.iter().filter(|r| r.submission.class == class).collect::<Vec<_>>());
    for queue in &mut queues {
        queue.reverse();
    }
    let mut live: HashMap<u64, &Row> = HashMap::new();
    let (mut n_done, mut n_drawn) = (0, 0);
    let mut seen = HashSet::new();
    let mut told: HashMap<u64, Progress> = HashMap::new();
    for step in 0.. {
        assert!(step < 200_000, "no end in sight");
        for queue in &mut queues {
            while let Some(row) = queue.pop_if(|r| r.arrives <= step) {
                if row.cancelled.is_some_and(|c| c <= step) {
                    n_done += 1;
                } else if engine.submit(row.submission.clone()).is_ok() {
                    live.insert(row.submission.id, row);
                } else {
                    assert_eq!(engine.n_queued(row.submission.class), config.max_waiting);
                    queue.push(row);
                    break;
                }
            }
        }
        let cancelled: Vec<u64> =
            live.iter().filter(|(_, r)| r.cancelled.is_some_and(|c| c <= step)).map(|(&id, _)| id).collect();
        for id in cancelled {
            n_done += forget(&mut engine, &mut live, id);
        }
        engine.advance(100 * step as i64);
        let finished = one_step(&mut engine, &live, &mut seen);
        note_progress(&mut told, engine.take_progress());
        for done in finished {
            let row = live.remove(&done.id).expect("a row finishes once, and only if it is live");
            let Submission { id, prompt, params, .. } = &row.submission;
            assert_eq!(done, expected(*id, prompt, params, limits.max_context));
            let told = told.remove(id);
            cached.extend(told.as_ref().map(|told| (*id, told.cached_tokens)));
            let told = told.map(|told| (told.tokens, told.text, told.logprobs));
            assert_eq!(told, params.watch.then(|| (done.tokens.clone(), done.text, done.logprobs)), "what a watcher was told");
            n_done += 1;
            n_drawn += done.tokens.len();
        }
        if n_done == rows.len() {
            break;
        }
    }
    assert!(live.is_empty() && !engine.has_work());
    for row in rows {
        engine.end_stream(row.submission.stream);
    }
    engine.check();
    assert_eq!(engine.stats().blocks_used, 0, "blocks leaked");
    engine.drop_kept();
    engine.check();
    assert_eq!((engine.stats().blocks_used, engine.stats().blocks_kept), (0, 0), "blocks are kept for ever");
    let stats = *engine.stats();
    assert_eq!(stats.failed_steps, 0, "the fake runner found a mistake, and the engine went on");
    if rows.iter().all(|r| r.cancelled.is_none()) {
        let n_prompt: usize = rows.iter().map(|r| r.submission.prompt.len()).sum();
        assert_eq!(stats.prefill_tokens + stats.shared_tokens, n_prompt as u64);
        assert_eq!(stats.decode_tokens, (n_drawn - rows.len()) as u64);
        assert_eq!(stats.generated_tokens, n_drawn as u64);
    }
    stats
}

/// Cancels a row, or all of its stream; how many rows that ends.
pub(crate) fn forget(engine: &mut Engine, live: &mut HashMap<u64, &Row>, id: u64) -> usize {
    // Its stream may have gone just now.
    let Some(row) = live.get(&id) else { return 0 };
    let (stream, n_live) = (row.submission.stream, live.len());
    if id.is_multiple_of(4) {
        engine.end_stream(stream);
        live.retain(|_, row| row.submission.stream != stream);
    } else {
        assert!(engine.cancel(id), "row {id} is live");
        live.remove(&id);
    }
    assert!(!engine.cancel(id), "row {id} was cancelled");
    engine.check();
    n_live - live.len()
}

/// Joins what watchers are told.
pub(crate) fn note_progress(told: &mut HashMap<u64, Progress>, progress: Vec<Progress>) {
    for next in progress {
        match told.entry(next.id) {
            Entry::Vacant(place) => drop(place.insert(next)),
            Entry::Occupied(mut place) => {
                let so_far = place.get_mut();
                so_far.tokens.extend(next.tokens);
                so_far.text.push_str(&next.text);
                so_far.logprobs.extend(next.logprobs);
                assert_eq!(so_far.cached_tokens, next.cached_tokens);
            }
        }
    }
}

/// One step, and what must hold of any. `seen` are the rows that have run before.
fn one_step(engine: &mut Engine, live: &HashMap<u64, &Row>, seen: &mut HashSet<u64>) -> Vec<Finished> {
    let mut finished = Vec::new();
    let before = *engine.stats();
    let has_work = engine.has_work();
    assert_eq!(has_work, !live.is_empty());
    engine.step(&mut finished).expect("the fake runner does not fail");
    engine.check();
    let after = *engine.stats();
    let step = engine.last_step();
    let n_tokens: usize = step.iter().map(|s| s.n_tokens).sum();
    assert!(n_tokens <= engine.config().budget_tokens && (n_tokens > 0) == has_work);
    let counted = |s: &EngineStats| s.prefill_tokens + s.decode_tokens + s.recomputed_tokens;
    assert_eq!(counted(&after) - counted(&before), n_tokens as u64);
    assert_eq!(step.iter().map(|s| s.id).collect::<HashSet<_>>().len(), step.len(), "a row is in a step once");
    assert_eq!(after.running + after.waiting, live.len() - finished.len());
    assert!(after.running <= engine.config().max_running);

    // No new row takes the blocks that another just lost, but for asap rows and those that may be overdue.
    let may_take = |s: &Scheduled| s.class == Class::Asap || live[&s.id].submission.due != Due::NEVER;
    let n_new = step.iter().filter(|s| seen.insert(s.id) && !may_take(s)).count();
    assert!(n_new == 0 || after.preemptions == before.preemptions);

    // If anybody else runs, every asap row does, unless asap rows alone may fill the pool or the places.
    if step.iter().any(|s| s.class != Class::Asap) {
        let asap: Vec<_> = live.values().filter(|r| r.submission.class == Class::Asap).collect();
        let most_tokens = |r: &Row| r.submission.prompt.len() + r.submission.params.max_tokens as usize;
        let need: usize = asap.iter().map(|r| most_tokens(r).min(engine.limits().max_context).div_ceil(BLOCK_TOKENS)).sum();
        if need <= engine.limits().n_blocks && asap.len() <= engine.config().max_running {
            for row in asap {
                assert!(step.iter().any(|s| s.id == row.submission.id), "asap row {} was left behind", row.submission.id);
            }
        }
    }
    finished
}

/// Prompts in the order of a walk through their prefix tree.
fn prompts(rng: &mut Rng, n_rows: usize, max_len: usize) -> Vec<Vec<u32>> {
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    for _ in 0..n_rows {
        let mut prompt = if prompts.is_empty() { Vec::new() } else { prompts[rng.range(0, prompts.len() - 1)].clone() };
        prompt.truncate(rng.range(0, prompt.len()));
        let n_new = rng.range(usize::from(prompt.is_empty()), max_len - prompt.len());
        let n_new = if rng.chance(50) { n_new.min(5).max(usize::from(prompt.is_empty())) } else { n_new };
        prompt.extend((0..n_new).map(|_| rng.range(0, 3) as u32));
        prompts.push(prompt);
    }
    prompts.sort();
    prompts
}

pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// How many leading tokens each prompt shares with the next.
fn keeps(prompts: &[Vec<u32>]) -> Vec<u32> {
    let with_next = prompts.windows(2).map(|p| common(&p[0], &p[1]) as u32);
    with_next.chain([0]).collect()
}

fn params(rng: &mut Rng, max_output: usize) -> SeqParams {
    let stops = ["ab", "aab", "é", "\n", "bc", "🙂", "\u{fffd}b", "abab", "c"];
    let n_stops = if rng.chance(30) { rng.range(1, 3) } else { 0 };
    SeqParams {
        max_tokens: rng.range(1, max_output) as u32,
        seed: rng.next(),
        choice: rng.range(0, 2) as u32,
        stop: (0..n_stops).map(|_| rng.pick(&stops).to_owned()).collect(),
        logprobs: rng.chance(20).then(|| rng.range(0, 4) as u8),
        watch: rng.chance(30),
        ..SeqParams::default()
    }
}

/// Overdue, soon due, late, never, with a ramp or without.
pub(crate) fn any_due(rng: &mut Rng) -> Due {
    let at_ms = rng.range(0, 40_000) as i64 - 5_000;
    rng.pick(&[Due::NEVER, Due { at_ms, ramp_ms: 0 }, Due::window(at_ms, 60_000)])
}

/// Any workload at all: the pool may be as small as one row, the budget one token.
pub(crate) fn any_workload(rng: &mut Rng) -> Workload {
    let max_context = rng.range(2, 160);
    let least_blocks = max_context.div_ceil(BLOCK_TOKENS);
    let most_blocks = least_blocks * rng.pick(&[1, 2, 3, 10]);
    let limits = RunnerLimits {
        n_blocks: rng.range(least_blocks, most_blocks),
        max_step_tokens: rng.pick(&[1, 4, 20, 64, 300]),
        max_step_seqs: rng.range(1, 12),
        n_vocab: N_VOCAB,
        max_context,
    };
    let config = EngineConfig {
        max_running: rng.range(1, 14),
        max_waiting: rng.range(1, 20),
        budget_tokens: rng.range(1, limits.max_step_tokens),
        max_preemptions: rng.range(0, 3) as u32,
        cold_output_tokens: rng.pick(&[1, 1, 8, 64]),
        share_floors: rng.pick(&[[0, 10, 2], [0, 50, 50], [0; 3]]),
        max_kept_blocks: 0,
        asap_reserve: rng.pick(&[0, 5, 50]),
    };
    let percent_endless = rng.pick(&[0, 0, 30, 100]);
    let is_timed = rng.chance(50);
    let (is_mixed, is_wrong, pace) = (rng.chance(30), rng.chance(40), rng.pick(&[0, 1, 6]));
    let percent_cancelled = rng.pick(&[0, 0, 20]);
    let mut rows = Vec::new();
    let most_rows = rng.pick(&[3, 6, 24]); // few rows leave a stream's length estimate cold, and wrong
    for stream in 0..rng.range(1, 48 / most_rows) as u32 {
        let stream_class = rng.pick(&Class::ALL);
        let n_rows = rng.range(1, most_rows);
        let max_prompt = rng.pick(&[1, 4, 16]).min(max_context - 1); // of the context: 1 leaves little to draw
        let prompts = prompts(rng, n_rows, ((max_context - 1) / max_prompt).max(1));
        let mut arrives = rng.range(0, 30);
        for (prompt, keep) in prompts.iter().zip(keeps(&prompts)) {
            arrives += rng.range(0, 2 * pace);
            let id = rows.len() as u64;
            let class = if is_mixed { rng.pick(&Class::ALL) } else { stream_class };
            let keep_tokens = if is_wrong { rng.range(0, prompt.len() + 4) as u32 } else { keep };
            let max_output = rng.pick(&[4, 40, 200]);
            let params = SeqParams { ignore_eos: rng.chance(percent_endless), ..params(rng, max_output) };
            let due = if is_timed { any_due(rng) } else { Due::NEVER };
            let submission = Submission { id, prompt: prompt.clone().into(), params, class, keep_tokens, stream, due };
            let cancelled = rng.chance(percent_cancelled).then(|| arrives + rng.range(0, 40));
            rows.push(Row { submission, arrives, cancelled });
        }
    }
    Workload { limits, config, rows }
}

/// Runs a check for many seeds; a failure says which.
pub(crate) fn for_seeds(n: u64, check: impl Fn(&mut Rng)) {
    for seed in 0..n {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(&mut Rng(seed)))) {
            let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            panic!("seed {seed}: {}", message.unwrap_or("panicked"));
        }
    }
}

#[test]
fn any_workload_gives_each_row_its_outcome() {
    let total = std::cell::RefCell::new(EngineStats::default());
    for_seeds(4000, |rng| {
        let stats = simulate(&any_workload(rng));
        let mut total = total.borrow_mut();
        total.shared_tokens += stats.shared_tokens;
        total.recomputed_tokens += stats.recomputed_tokens;
        total.preemptions += stats.preemptions;
        total.finished += stats.finished;
    });
    // The seeds reach what they are meant to reach.
    let total = total.into_inner();
    assert!(total.finished > 50_000 && total.shared_tokens > 100_000, "{total:?}");
    assert!(total.preemptions > 1000 && total.recomputed_tokens > 15_000, "{total:?}");
}

/// Batch rows, all there from the start, over one stream.
fn job(prompts: &[Vec<u32>], mut params: impl FnMut(u64) -> SeqParams) -> Vec<Row> {
    let submission = |(id, (prompt, keep_tokens)): (usize, (&Vec<u32>, u32))| {
        let (id, prompt) = (id as u64, prompt.clone().into());
        Submission { id, prompt, params: params(id), class: Class::Batch, keep_tokens, stream: 0, due: Due::NEVER }
    };
    let submissions = prompts.iter().zip(keeps(prompts)).enumerate().map(submission);
    submissions.map(|submission| Row { submission, arrives: 0, cancelled: None }).collect()
}

#[test]
fn a_job_in_plan_order_computes_each_node_of_its_prefix_tree_once() {
    for_seeds(300, |rng| {
        let (n_rows, max_len) = (rng.range(1, 60), rng.range(1, 150));
        let prompts = prompts(rng, n_rows, max_len);
        let limits = RunnerLimits { n_blocks: 2000, max_step_tokens: 256, max_step_seqs: 16, n_vocab: N_VOCAB, max_context: 200 };
        let (budget_tokens, max_running) = (rng.range(1, 256), rng.range(1, 16));
        let config = EngineConfig { budget_tokens, max_running, ..EngineConfig::for_runner(&limits) };
        let rows = job(&prompts, |_| params(rng, 30));
        let stats = simulate(&Workload { limits, config, rows });
        let nodes: HashSet<&[u32]> = prompts.iter().flat_map(|p| (1..=p.len()).map(|n| &p[..n])).collect();
        // A prompt that is all of its predecessor's must still compute its last token, to draw from it.
        let n_repeats = prompts.windows(2).filter(|p| p[0] == p[1]).count();
        assert_eq!(stats.prefill_tokens, (nodes.len() + n_repeats) as u64);
        assert_eq!((stats.recomputed_tokens, stats.preemptions), (0, 0));
    });
}

#[test]
fn an_asap_row_is_in_the_next_step_of_a_full_engine() {
    for_seeds(200, |rng| {
        let limits = RunnerLimits { n_blocks: 12, max_step_tokens: 40, max_step_seqs: 8, n_vocab: N_VOCAB, max_context: 160 };
        let mut engine = engine(limits, EngineConfig { max_running: rng.range(1, 8), ..EngineConfig::for_runner(&limits) });
        for id in 0..20 {
            let max_tokens = rng.range(1, 60) as u32;
            let prompt = vec![rng.range(0, 9) as u32; rng.range(1, 90)].into();
            let params = SeqParams { max_tokens, ignore_eos: true, seed: id, ..SeqParams::default() };
            let (class, due) = (rng.pick(&[Class::Standard, Class::Batch]), any_due(rng));
            engine.submit(Submission { id, prompt, params, class, keep_tokens: 5, stream: 1, due }).expect("there is room");
        }
        let mut finished = Vec::new();
        for step in 0..rng.range(0, 60) {
            engine.advance(500 * step as i64);
            engine.step(&mut finished).expect("the fake runner does not fail");
        }
        let prompt = vec![1; rng.range(1, 150)].into();
        let asap = Submission {
            id: 99,
            prompt,
            params: SeqParams::default(),
            class: Class::Asap,
            keep_tokens: 0,
            stream: 2,
            due: Due::NEVER,
        };
        engine.submit(asap).expect("no other asap row waits");
        engine.step(&mut finished).expect("the fake runner does not fail");
        engine.check();
        let first = engine.last_step()[0];
        assert_eq!((first.id, first.first_position), (99, 0));
    });
}

#[test]
fn a_step_is_filled_in_the_order_of_classes() {
    let limits = RunnerLimits { n_blocks: 99, max_step_tokens: 30, max_step_seqs: 16, n_vocab: N_VOCAB, max_context: 160 };
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    let mut step_with = |rows: &[(u64, Class, usize)]| {
        for &(id, class, n_prompt) in rows {
            let params = SeqParams { max_tokens: 9, ignore_eos: true, ..SeqParams::default() };
            let prompt = vec![id as u32; n_prompt].into();
            let row = Submission { id, prompt, params, class, keep_tokens: 0, stream: 0, due: Due::NEVER };
            engine.submit(row).expect("there is room");
        }
        engine.step(&mut Vec::new()).expect("the fake runner does not fail");
        engine.last_step().iter().map(|s| (s.id, s.n_tokens)).collect::<Vec<_>>()
    };
    let [asap, standard, batch] = Class::ALL;
    // By class, then in the order of submission; the budget of 30 cuts the last one short.
    assert_eq!(step_with(&[(1, batch, 3), (2, standard, 4), (3, batch, 60), (4, asap, 5)]), [(4, 5), (2, 4), (1, 3), (3, 18)]);
    // Decodes of every class come before prefills, but for asap's.
    assert_eq!(step_with(&[(5, standard, 6), (6, asap, 2)]), [(4, 1), (6, 2), (2, 1), (1, 1), (5, 6), (3, 19)]);
}

#[test]
fn preemption_costs_little_when_lengths_vary() {
    for_seeds(20, |rng| {
        let limits = RunnerLimits { n_blocks: 100, max_step_tokens: 256, max_step_seqs: 64, n_vocab: N_VOCAB, max_context: 400 };
        let config = EngineConfig { cold_output_tokens: 16, ..EngineConfig::for_runner(&limits) };
        let prompts = prompts(rng, 400, 100);
        // Ends are drawn: geometric lengths, mean 32, so the cold estimate of 16 is wrong for most.
        let rows = job(&prompts, |seed| SeqParams { max_tokens: 300, seed, ..SeqParams::default() });
        let stats = simulate(&Workload { limits, config, rows });
        let computed = stats.prefill_tokens + stats.decode_tokens;
        assert!(stats.recomputed_tokens * 20 < computed, "{} of {computed} computed again", stats.recomputed_tokens);
    });
}

#[test]
fn a_row_that_fills_the_pool_alone_finishes() {
    let limits = RunnerLimits { n_blocks: 5, max_step_tokens: 7, max_step_seqs: 4, n_vocab: N_VOCAB, max_context: 80 };
    let prompts = [vec![3; 20], vec![3; 50], vec![3; 79]];
    // 300 tokens are never reached: the context ends first.
    let rows = job(&prompts, |seed| SeqParams { max_tokens: 300, ignore_eos: true, seed, ..SeqParams::default() });
    let stats = simulate(&Workload { limits, config: EngineConfig::for_runner(&limits), rows });
    assert_eq!(stats.finished, 3);
    let too_few = RunnerLimits { n_blocks: 4, ..limits };
    let refused = Engine::new(EngineConfig::for_runner(&limits), Box::new(FakeRunner::new(too_few, 7)), fake_tokens());
    assert!(refused.err().expect("the pool can't hold a row").to_string().contains("64 tokens"));
}

#[test]
fn steps_are_as_short_as_they_are_to_be() {
    let limits = RunnerLimits { n_blocks: 100, max_step_tokens: 64, max_step_seqs: 8, n_vocab: N_VOCAB, max_context: 600 };
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    let step_limits = Arc::new(StepLimits { tokens: 5.into(), ..StepLimits::default() });
    engine.limit_steps(Arc::clone(&step_limits));
    let params = |max_tokens| SeqParams { max_tokens, ignore_eos: true, ..SeqParams::default() };
    let row = |id, n_prompt, class, params| Submission {
        id,
        prompt: vec![7; n_prompt].into(),
        params,
        class,
        keep_tokens: 0,
        stream: id as u32,
        due: Due::NEVER,
    };
    engine.submit(row(0, 500, Class::Batch, params(3))).expect("there is room");
    engine.submit(row(1, 12, Class::Asap, params(9))).expect("there is room");
    let mut finished = Vec::new();
    let mut longest = 0;
    while engine.has_work() {
        engine.step(&mut finished).expect("the fake runner does not fail");
        longest = longest.max(engine.last_step().iter().map(|share| share.n_tokens).sum());
        // Whatever it is set to, something is done.
        step_limits.tokens.store(if finished.is_empty() { 5 } else { 0 }, Ordering::Relaxed);
    }
    assert_eq!((longest, finished.len()), (5, 2));
}

#[test]
fn what_shares_a_step_with_a_first_token_is_half_of_it() {
    let limits = RunnerLimits { n_blocks: 300, max_step_tokens: 512, max_step_seqs: 8, n_vocab: N_VOCAB, max_context: 600 };
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    engine.limit_steps(Arc::new(StepLimits { tokens: 400.into(), base_tokens: 40.into() }));
    let row = |id, n_prompt, class| {
        let params = SeqParams { max_tokens: 3, ignore_eos: true, ..SeqParams::default() };
        Submission { id, prompt: vec![7; n_prompt].into(), params, class, keep_tokens: 0, stream: id as u32, due: Due::NEVER }
    };
    for id in 0..4 {
        engine.submit(row(id, 500, Class::Batch)).expect("there is room");
    }
    let mut sizes = Vec::new();
    for step in 0..4 {
        if step == 1 {
            engine.submit(row(9, 100, Class::Asap)).expect("there is room");
        }
        engine.step(&mut Vec::new()).expect("the fake runner does not fail");
        sizes.push(engine.last_step().iter().map(|share| share.n_tokens).sum::<usize>());
    }
    // Its 100 tokens and the step itself, and half as many of others; later it needs a token of each step.
    assert_eq!(sizes, [400, 100 + 70, 400, 400]);
}

#[test]
fn every_asap_row_gets_its_token_in_every_step() {
    let limits = RunnerLimits { n_blocks: 100, max_step_tokens: 64, max_step_seqs: 16, n_vocab: N_VOCAB, max_context: 600 };
    let mut engine = engine(limits, EngineConfig::for_runner(&limits));
    engine.limit_steps(Arc::new(StepLimits { tokens: 3.into(), ..StepLimits::default() }));
    for id in 0..9 {
        let params = SeqParams { max_tokens: 40, ignore_eos: true, ..SeqParams::default() };
        let row = Submission {
            id,
            prompt: vec![id as u32; 5].into(),
            params,
            class: Class::Asap,
            keep_tokens: 0,
            stream: id as u32,
            due: Due::NEVER,
        };
        engine.submit(row).expect("there is room");
    }
    let mut finished = Vec::new();
    let mut shares_before = 0;
    while finished.is_empty() {
        engine.step(&mut finished).expect("the fake runner does not fail");
        let n_shares = engine.last_step().len();
        assert!(n_shares >= shares_before, "{n_shares} rows in a step after one of {shares_before}");
        shares_before = n_shares;
    }
    assert_eq!(shares_before, 9);
}
