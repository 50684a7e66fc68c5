//! Who goes first, on a counted clock: laws of the order, shares, preemption, and a day of calls and batches in which plain
//! first come, first served fails.

use crate::fake::{N_VOCAB, Rng};
use crate::simulation::engine;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, Submission};
use valar::model::RunnerLimits;
use valar::pipeline::bench_windows::load::{Load, read_trace};
use valar::pipeline::bench_windows::run::{Order, Outcome, capacity, run};
use valar::window::Class;

const ASAP: Class = Class::Asap;
const STANDARD: Class = Class::Standard;
const BATCH: Class = Class::Batch;
const HOUR_MS: i64 = 3_600_000;

/// A pool in which every row has its blocks.
const AMPLE: RunnerLimits =
    RunnerLimits { n_blocks: 4000, max_step_tokens: 64, max_step_seqs: 8, n_vocab: N_VOCAB, max_context: 160 };

/// A row of exactly so many tokens.
fn row(id: u64, class: Class, due: Due, n_prompt: usize, n_output: u32) -> Submission {
    let params = SeqParams { max_tokens: n_output, ignore_eos: true, seed: id, ..SeqParams::default() };
    let (prompt, stream) = (vec![id as u32 % 60; n_prompt].into(), class as u32);
    Submission { id, prompt, params, class, keep_tokens: 0, stream, due }
}

fn at(at_ms: i64) -> Due {
    Due { at_ms, ramp_ms: 0 }
}

fn step(engine: &mut Engine) -> Vec<u64> {
    engine.step(&mut Vec::new()).expect("the fake runner does not fail");
    engine.check();
    engine.last_step().iter().map(|share| share.id).collect()
}

fn submit(engine: &mut Engine, rows: impl IntoIterator<Item = Submission>) {
    for next in rows {
        engine.submit(next).expect("there is room");
    }
}

/// The order in which rows begin to run.
fn beginnings(engine: &mut Engine) -> Vec<u64> {
    let (mut seen, mut order) = (HashSet::new(), Vec::new());
    while engine.has_work() {
        order.extend(step(engine).into_iter().filter(|&id| seen.insert(id)));
    }
    order
}

#[test]
fn within_a_class_the_one_that_is_due_first_goes_first() {
    for class in [STANDARD, BATCH] {
        let mut engine = engine(AMPLE, EngineConfig { max_running: 1, ..EngineConfig::for_runner(&AMPLE) });
        let dues = [Due::NEVER, at(900_000), at(300_000), Due::NEVER, at(900_000), at(100_000)];
        submit(&mut engine, (0..).zip(dues).map(|(id, due)| row(id, class, due, 3, 2)));
        assert_eq!(beginnings(&mut engine), [5, 2, 1, 4, 0, 3], "{class:?}: by deadline, then in the order of submission");
    }
}

#[test]
fn slack_is_what_is_left_after_the_work() {
    let mut engine = engine(AMPLE, EngineConfig { max_running: 1, ..EngineConfig::for_runner(&AMPLE) });
    // Steps of 10 s, so that 40 tokens are 400 s of work.
    submit(&mut engine, [row(9, STANDARD, Due::NEVER, 3, 5)]);
    for now in 1..=5 {
        step(&mut engine);
        engine.advance(now * 10_000);
    }
    submit(&mut engine, [row(1, STANDARD, at(500_000), 3, 2), row(2, STANDARD, at(700_000), 3, 40)]);
    assert_eq!(beginnings(&mut engine), [2, 1], "what is due later and takes longer must begin sooner");
}

#[test]
fn what_is_urgent_takes_the_place_of_the_batch_row_with_most_time() {
    let config = EngineConfig { max_running: 3, share_floors: [0; 3], ..EngineConfig::for_runner(&AMPLE) };
    let mut engine = engine(AMPLE, config);
    let nearly_due = Due::window(HOUR_MS / 2, 24 * HOUR_MS);
    submit(
        &mut engine,
        [row(0, BATCH, at(9 * HOUR_MS), 3, 50), row(1, BATCH, at(20 * HOUR_MS), 3, 50), row(2, BATCH, nearly_due, 3, 50)],
    );
    step(&mut engine);
    // It has time: nobody leaves for it.
    submit(&mut engine, [row(3, STANDARD, at(60_000), 3, 50)]);
    assert_eq!(step(&mut engine), [2, 0, 1], "the batch near its deadline goes first");
    // It has none.
    engine.advance(70_000);
    let ids = step(&mut engine);
    assert!(ids.contains(&3) && !ids.contains(&1), "{ids:?}");
    assert_eq!(engine.stats().preemptions, 1);
    // Those that near their deadline keep their places: of two more, one gets in.
    submit(&mut engine, [row(4, STANDARD, at(0), 3, 50), row(5, STANDARD, at(1), 3, 50)]);
    let ids: HashSet<u64> = step(&mut engine).into_iter().collect();
    assert_eq!(ids, HashSet::from([2, 3, 4]));
    assert_eq!(beginnings(&mut engine).len(), 6, "all of them are done");
}

#[test]
fn an_overdue_class_leaves_the_other_its_floor() {
    // Percent of the tokens that `class` gets while both wait, and the other is overdue.
    let share_of = |class: Class, floors: [u8; 3]| {
        let mut engine = engine(AMPLE, EngineConfig { max_running: 4, share_floors: floors, ..EngineConfig::for_runner(&AMPLE) });
        let other = Class::ALL[3 - class as usize];
        let (mut next_id, mut n_tokens, mut now_ms) = (0, [0; 3], 0);
        for _ in 0..4000 {
            for (class, due) in [(class, Due::NEVER), (other, at(0))] {
                while engine.n_queued(class) < 4 {
                    next_id += 1;
                    // Of many lengths: rows that end together would be followed by rows that do.
                    submit(&mut engine, [row(next_id, class, due, 4, 5 + next_id as u32 * 7 % 31)]);
                }
            }
            engine.advance(now_ms);
            step(&mut engine);
            now_ms += 50;
            engine.advance(now_ms);
            for share in engine.last_step() {
                n_tokens[share.class as usize] += share.n_tokens;
            }
        }
        100.0 * n_tokens[class as usize] as f64 / (n_tokens[1] + n_tokens[2]) as f64
    };
    let standard = share_of(STANDARD, [0, 30, 5]);
    assert!((25.0..60.0).contains(&standard), "{standard} % for a floor of 30 %");
    let batch = share_of(BATCH, [0, 30, 5]);
    assert!((4.0..30.0).contains(&batch), "{batch} % for a floor of 5 %");
    // Without floors it would get nothing.
    assert!(share_of(BATCH, [0; 3]) < 0.1);
    assert!(share_of(STANDARD, [0; 3]) < 0.1);
}

/// Whoever comes when, whatever is due: no step leaves room that a row could use, and nobody begins before a row of its class
/// that is due sooner, or, where no row is urgent, before one of a higher class.
#[test]
fn no_step_leaves_work_out_or_turns_the_order_round() {
    for seed in 0..300 {
        let mut rng = Rng(seed);
        let max_running = rng.range(1, 8);
        let config = EngineConfig { max_running, share_floors: [0; 3], max_waiting: 400, ..EngineConfig::for_runner(&AMPLE) };
        let (mut engine, has_urgent) = (engine(AMPLE, config), rng.chance(50));
        let mut waiting: HashMap<u64, Submission> = HashMap::new();
        let (mut running, mut now_ms) = (HashSet::new(), 0);
        for next in 0..200 {
            for _ in 0..rng.pick(&[0, 0, 1, 5]) {
                let class = rng.pick(&Class::ALL);
                let in_ms = if has_urgent { rng.range(0, 20_000) } else { rng.range(1 << 40, 1 << 41) };
                // Batch rows are ranked by when they are due, standard ones by that less their predicted time.
                let due = if rng.chance(20) { Due::NEVER } else { at(now_ms + in_ms as i64) };
                let submission = row(1000 * next + waiting.len() as u64, class, due, rng.range(1, 90), rng.range(1, 30) as u32);
                if !running.contains(&submission.id) && !waiting.contains_key(&submission.id) {
                    waiting.insert(submission.id, submission.clone());
                    submit(&mut engine, [submission]);
                }
            }
            engine.advance(now_ms);
            let mut finished = Vec::new();
            engine.step(&mut finished).expect("the fake runner does not fail");
            engine.check();
            now_ms += 100;
            engine.advance(now_ms);
            let n_tokens: usize = engine.last_step().iter().map(|share| share.n_tokens).sum();
            let stats = engine.stats();
            let ran: HashSet<u64> = engine.last_step().iter().map(|share| share.id).collect();
            if n_tokens < AMPLE.max_step_tokens && ran.len() < max_running {
                assert_eq!(stats.waiting, 0, "seed {seed}: rows wait beside {} places", max_running - ran.len());
            }
            let began: Vec<Submission> = ran.iter().filter_map(|id| waiting.remove(id)).collect();
            for (new, left) in began.iter().flat_map(|new| waiting.values().map(move |left| (new, left))) {
                let is_sooner = left.due.at_ms < new.due.at_ms && new.class == BATCH && left.class == BATCH;
                assert!(!is_sooner, "seed {seed}: {} began before {}", new.id, left.id);
                let is_higher = left.class < new.class && (left.class == ASAP || !has_urgent);
                assert!(!is_higher, "seed {seed}: {} began before {}, which is of a higher class", new.id, left.id);
            }
            running.extend(ran);
            running.retain(|id| finished.iter().all(|done| done.id != *id));
        }
    }
}

fn sum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |sum, value| sum + value)
}

/// What must hold of a day in the order of windows.
fn check_day(load: &Load, outcome: &Outcome) {
    let turns = outcome.turns_s(load, STANDARD);
    let mean = sum(turns.iter().copied()) / turns.len() as f64;
    assert!(mean <= 300.0, "standard calls take {mean} s in the mean");
    assert_eq!(outcome.n_late(load), 0, "batches are late");
    assert_eq!(outcome.n_inversions(load), 0, "batches ended in another order than they were due");
    // Nobody starves: whoever waits through five minutes has tokens in them (fewer than its floor if it had more in the minute
    // before, which still counts), and every row came to its end.
    for (class, floor) in [(STANDARD, 0.1), (BATCH, 0.02)] {
        let share = outcome.least_share(class);
        assert!(share.is_none_or(|share| share >= 0.5 * floor), "{class:?} got {share:?} of the tokens");
    }
    assert!(outcome.turns_ms.iter().all(|&turn| turn > 0));
    // asap waits for the step under way and its own; more only where other asap calls are before it.
    let (asap, two_steps_s) = (outcome.begins_s(load, ASAP), 2.0 * (0.040 + 0.0004 * 512.0 + 0.001 * 32.0));
    assert!(asap[asap.len() * 9 / 10] <= two_steps_s, "asap calls wait {} s", asap[asap.len() * 9 / 10]);
}

#[test]
fn a_day_with_bursts_and_batches_keeps_its_windows() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/azure_llm_2023/requests.csv");
    let trace = read_trace(&path).expect("it is in this repository");
    let load = Load::new(&trace, capacity(&trace).expect("the machine does not fail"), 24);
    assert_eq!(load.batches.len(), 24);
    let windows = run(&load, Order::Windows).expect("the machine does not fail");
    check_day(&load, &windows);
    assert!(windows.busy > 0.8, "an idle machine proves nothing");
    // The same day, first come, first served.
    let arrival = run(&load, Order::Arrival).expect("the machine does not fail");
    let turns = arrival.turns_s(&load, STANDARD);
    let mean = sum(turns.iter().copied()) / turns.len() as f64;
    assert!(mean > 300.0, "plain order takes {mean} s in the mean: the day is too easy");
    assert!(arrival.n_late(&load) > 0 && arrival.n_inversions(&load) > 0, "deadlines that any order keeps prove nothing");
}
