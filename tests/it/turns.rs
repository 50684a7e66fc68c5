//! Whose turn it is in the engine's queue, where several owners have rows there that are due at the same time.

use crate::fake::N_VOCAB;
use crate::simulation::engine;
use std::collections::HashSet;
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, Submission};
use valar::model::RunnerLimits;
use valar::window::Class;
use valar::window::turns::{Share, Turns};

const LIMITS: RunnerLimits =
    RunnerLimits { n_blocks: 400, max_step_tokens: 64, max_step_seqs: 8, n_vocab: N_VOCAB, max_context: 160 };
const SOON: Due = Due { at_ms: 1_000_000, ramp_ms: 0 };
const ONE: Share = Share { owner: 1, weight: 1 };
const THREE: Share = Share { owner: 2, weight: 3 };

fn alone() -> Engine {
    engine(LIMITS, EngineConfig { max_running: 1, max_waiting: 400, ..EngineConfig::for_runner(&LIMITS) })
}

fn submit(engine: &mut Engine, ids: std::ops::Range<u64>, share: Share, (class, due): (Class, Due)) {
    for id in ids {
        let params = SeqParams { max_tokens: 2, ignore_eos: true, seed: id, share, ..SeqParams::default() };
        let (prompt, stream) = (vec![id as u32 % 60; 3].into(), class as u32);
        engine.submit(Submission { id, prompt, params, class, keep_tokens: 0, stream, due }).expect("there is room");
    }
}

/// The order in which rows begin to run.
fn beginnings(engine: &mut Engine) -> Vec<u64> {
    let (mut seen, mut order) = (HashSet::new(), Vec::new());
    while engine.has_work() {
        engine.step(&mut Vec::new()).expect("the fake runner does not fail");
        engine.check();
        order.extend(engine.last_step().iter().map(|share| share.id).filter(|&id| seen.insert(id)));
    }
    order
}

#[test]
fn owners_take_turns_by_weight_where_deadlines_do_not_decide() {
    for place in [(Class::Asap, Due::NEVER), (Class::Standard, Due::NEVER), (Class::Batch, SOON)] {
        let mut engine = alone();
        submit(&mut engine, 0..20, ONE, place);
        submit(&mut engine, 100..112, THREE, place);
        let order = beginnings(&mut engine);
        let last = 1 + order.iter().rposition(|&id| id >= 100).unwrap();
        assert_eq!((order.len(), last.abs_diff(16) <= 1), (32, true), "three of four turns: {order:?}");
        for own in [0..100, 100..200] {
            let own: Vec<u64> = order.iter().copied().filter(|id| own.contains(id)).collect();
            assert!(own.is_sorted(), "what is an owner's keeps its order: {own:?}");
        }
    }
}

#[test]
fn deadlines_go_before_turns() {
    for class in [Class::Standard, Class::Batch] {
        let mut engine = alone();
        submit(&mut engine, 0..4, ONE, (class, SOON));
        submit(&mut engine, 100..104, THREE, (class, Due { at_ms: SOON.at_ms + 60_000, ..SOON }));
        submit(&mut engine, 50..51, ONE, (class, Due { at_ms: SOON.at_ms - 60_000, ..SOON }));
        assert_eq!(beginnings(&mut engine), [50, 0, 1, 2, 3, 100, 101, 102, 103], "{class:?}");
    }
}

#[test]
fn a_turn_that_was_not_had_is_no_turn() {
    let mut engine = alone();
    let place = (Class::Asap, Due::NEVER);
    submit(&mut engine, 0..20, ONE, place);
    submit(&mut engine, 100..120, THREE, place);
    (0..20).for_each(|id| assert!(engine.cancel(id)));
    submit(&mut engine, 20..22, ONE, place);
    let order = beginnings(&mut engine);
    assert!(order[..2].contains(&20) && order[..6].contains(&21), "{order:?}");
    // Nor has an owner saved any that had nothing waiting.
    submit(&mut engine, 200..220, THREE, place);
    submit(&mut engine, 30..50, ONE, place);
    let order = beginnings(&mut engine);
    let first = order[..16].iter().filter(|&&id| id < 100).count();
    assert!((3..=5).contains(&first), "{order:?}");
}

#[test]
fn turns_that_were_had_count_whatever_is_cancelled_then() {
    let mut engine = alone();
    let place = (Class::Asap, Due::NEVER);
    submit(&mut engine, 100..140, THREE, place);
    let (mut seen, mut order) = (HashSet::new(), Vec::new());
    // One that takes a turn, has it, takes another one and gives it up would otherwise have every second one.
    for id in (0..20).step_by(2) {
        submit(&mut engine, id..id + 1, ONE, place);
        while !seen.contains(&id) {
            engine.step(&mut Vec::new()).expect("the fake runner does not fail");
            order.extend(engine.last_step().iter().map(|share| share.id).filter(|&id| seen.insert(id)));
        }
        submit(&mut engine, id + 1..id + 2, ONE, place);
        assert!(engine.cancel(id + 1));
    }
    let others = order.iter().filter(|&&id| id >= 100).count();
    assert!(others >= 25, "three of four turns: {order:?}");
}

#[test]
fn turns_are_counted_by_weight() {
    let mut turns = Turns::default();
    let mut counts = [0_u32; 2];
    for _ in 0..4000 {
        let (i, share) = [ONE, THREE].into_iter().enumerate().min_by_key(|&(_, share)| turns.next(share)).unwrap();
        let at = turns.take(share, 5);
        turns.pass(share, at);
        turns.give_back(share, 4);
        counts[i] += 1;
    }
    assert!(counts[0].abs_diff(1000) <= 2, "{counts:?}");
    // One that comes now takes its turns with the others, and has saved none.
    let new = Share { owner: 40, weight: 1 };
    let mut n_new = 0;
    for _ in 0..50 {
        let share = [ONE, THREE, new].into_iter().min_by_key(|&share| turns.next(share)).unwrap();
        let at = turns.take(share, 1);
        turns.pass(share, at);
        n_new += usize::from(share == new);
    }
    assert!((9..=11).contains(&n_new), "{n_new}");
}
