//! A step that fails costs the rows at which it does, and no others: neither their outcome nor a bit of it.

use crate::ahead::Alone;
use crate::common::model_path;
use crate::fake::{FakeRunner, Fault, N_VOCAB, Rng, expected, fake_tokens};
use std::collections::HashMap;
use std::sync::Arc;
use valar::device::batch::{Batch, StepOutput};
use valar::device::cpu::{CpuDevice, Isa, Numerics};
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, Finished, Submission};
use valar::gguf::Gguf;
use valar::model::{ModelRunner, Runner, RunnerLimits};
use valar::text::tokenizer::Tokenizer;
use valar::window::Class;

fn limits(n_blocks: usize, max_step_seqs: usize) -> RunnerLimits {
    RunnerLimits { n_blocks, max_step_tokens: 40, max_step_seqs, n_vocab: N_VOCAB, max_context: 64 }
}

/// Runs rows to their end; what each came to.
pub(crate) fn run_all(engine: &mut Engine, rows: &[Submission]) -> anyhow::Result<HashMap<u64, Finished>> {
    let (mut done, mut next) = (HashMap::new(), 0);
    while next < rows.len() || engine.has_work() {
        while next < rows.len() && engine.submit(rows[next].clone()).is_ok() {
            next += 1;
        }
        let mut finished = Vec::new();
        engine.step(&mut finished)?;
        engine.check();
        for finished in finished {
            assert!(done.insert(finished.id, finished).is_none(), "a row ends once");
        }
    }
    Ok(done)
}

/// Rows in plan order that share prefixes; few begin with token 5.
pub(crate) fn rows(rng: &mut Rng) -> Vec<Submission> {
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    for i in 0..rng.range(1, 30) {
        let mut prompt = if i > 0 && rng.chance(60) { prompts[rng.range(0, i - 1)].clone() } else { Vec::new() };
        prompt.truncate(rng.range(0, 20));
        prompt.extend((0..rng.range(1, 20)).map(|_| rng.range(3, 4) as u32));
        if rng.chance(10) && prompts.iter().filter(|prompt| prompt[0] == 5).count() < 3 {
            prompt[0] = 5;
        } else if prompt[0] == 5 {
            prompt[0] = 3;
        }
        prompts.push(prompt);
    }
    prompts.sort();
    let shared = |i: usize| prompts.get(i + 1).map_or(0, |next| next.iter().zip(&prompts[i]).take_while(|(a, b)| a == b).count());
    let submission = |(i, prompt): (usize, &Vec<u32>)| Submission {
        id: i as u64,
        prompt: prompt.clone().into(),
        params: SeqParams { max_tokens: rng.range(1, 24) as u32, seed: rng.next(), ..SeqParams::default() },
        class: rng.pick(&Class::ALL),
        keep_tokens: shared(i) as u32,
        stream: 0,
        due: Due::NEVER,
    };
    prompts.iter().enumerate().map(submission).collect()
}

#[test]
fn only_the_guilty_rows_fail() {
    let mut n_guilty = 0;
    for seed in 0..400 {
        let mut rng = Rng(seed);
        let (rows, position) = (rows(&mut rng), rng.range(0, 30) as u32);
        let limits = limits(rng.range(4, 60), rng.range(1, 12));
        let config = EngineConfig { budget_tokens: rng.range(1, 40), ..EngineConfig::for_runner(&limits) };
        let runner = FakeRunner::poisoned(limits, config.budget_tokens, 5, position);
        // On a device that goes on by itself, too.
        let runner: Box<dyn Runner> = if seed % 2 == 0 { Box::new(runner) } else { Box::new(Alone::new(runner)) };
        let mut engine = Engine::new(config, runner, fake_tokens()).unwrap();
        let done = run_all(&mut engine, &rows).unwrap();
        assert_eq!(done.len(), rows.len(), "seed {seed}");
        for row in &rows {
            let (found, expected) = (&done[&row.id], expected(row.id, &row.prompt, &row.params, limits.max_context));
            // The last token drawn is never computed.
            let n_computed = row.prompt.len() + expected.tokens.len() - 1;
            if row.prompt[0] == 5 && n_computed > position as usize {
                n_guilty += 1;
                let why = found.broken.as_ref().unwrap_or_else(|| panic!("seed {seed}: row {} ended well", row.id));
                assert!(why.contains(&format!("poison at position {position}")), "{why}");
                assert!(expected.tokens.starts_with(&found.tokens), "seed {seed}: what it had drawn before is right");
            } else {
                assert_eq!(found, &expected, "seed {seed}");
            }
        }
        assert_eq!(engine.stats().running + engine.stats().waiting, 0);
    }
    assert!(n_guilty > 100, "{n_guilty}");
}

#[test]
fn a_failure_that_passes_costs_nobody_his_row() {
    for step in 1..20 {
        let mut rng = Rng(step);
        let rows = rows(&mut rng);
        let limits = limits(60, 8);
        let runner = FakeRunner::failing(limits, step, Fault::Once);
        let mut engine = Engine::new(EngineConfig::for_runner(&limits), Box::new(runner), fake_tokens()).unwrap();
        let done = run_all(&mut engine, &rows).unwrap();
        for row in &rows {
            assert_eq!(done[&row.id], expected(row.id, &row.prompt, &row.params, limits.max_context), "step {step}");
        }
    }
}

/// The real model with a kernel that panics wherever a token comes by.
struct Planted<R>(R, u32);

impl<R: Runner> Runner for Planted<R> {
    fn limits(&self) -> RunnerLimits {
        self.0.limits()
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<()> {
        self.0.run(batch, out)?;
        assert!(!batch.tokens.contains(&self.1), "planted");
        Ok(())
    }
}

#[test]
fn the_real_models_other_rows_keep_their_bits() {
    let gguf = Gguf::open(&model_path()).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf).unwrap());
    let runner = || {
        let device = CpuDevice::new(Isa::detect(), Numerics::named("int8").unwrap(), 2);
        ModelRunner::load(device, &gguf, 64, 128).unwrap()
    };
    let poison = tokenizer.encode(" tiger")[0];
    let texts =
        ["The cat sat on", "The cat and the dog", "The cat and the tiger ran", "One two three", "The cat sat on", "Rain falls"];
    let row = |(i, text): (usize, &&str)| Submission {
        id: i as u64,
        prompt: tokenizer.encode(text).into(),
        params: SeqParams { max_tokens: 6, logprobs: Some(2), ignore_eos: true, ..SeqParams::default() },
        class: Class::Batch,
        keep_tokens: 2,
        stream: 0,
        due: Due::NEVER,
    };
    let rows: Vec<Submission> = texts.iter().enumerate().map(row).collect();
    let run = |runner: Box<dyn Runner>| {
        let config = EngineConfig::for_runner(&runner.limits());
        run_all(&mut Engine::new(config, runner, tokenizer.clone()).unwrap(), &rows).unwrap()
    };
    let (well, planted) = (run(Box::new(runner())), run(Box::new(Planted(runner(), poison))));
    for (id, found) in &planted {
        let is_guilty = rows[*id as usize].prompt.contains(&poison);
        assert_eq!(found.broken.is_some(), is_guilty, "{found:?}");
        if !is_guilty && !well[id].tokens.contains(&poison) {
            assert_eq!(found, &well[id]);
        }
    }
    assert_eq!(planted.values().filter(|row| row.broken.is_some()).count(), 1);
}
