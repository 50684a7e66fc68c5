//! Steps that begin while the one before is under way, and what becomes of rows that ended in that: on a device that goes on by
//! itself, and is given what it draws by number. The same outcomes as one after the other, and nothing counted that nobody uses.

use crate::fake::{FakeRunner, Fault, N_VOCAB, Rng, expected, fake_tokens};
use crate::isolation;
use crate::keep::conversations;
use crate::simulation::{Row, Workload, any_workload, for_seeds, forget, note_progress};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use valar::device::batch::{Batch, HeadOut, StepOutput, Want};
use valar::engine::sampling::SeqParams;
use valar::engine::shaping::{Constraint, Grammar};
use valar::engine::{Due, Engine, EngineConfig, EngineStats, Finished, Submission};
use valar::model::{Runner, RunnerLimits};
use valar::window::Class;

/// Of each step, whether it began while another was under way, and how many of its tokens nobody knew.
type Seen = Arc<Mutex<Vec<(bool, usize)>>>;

/// A device that goes on by itself. What a step computes is computed when it is waited for: nobody may have used it before.
pub(crate) struct Alone {
    inner: FakeRunner,
    /// Steps under way.
    begun: VecDeque<Batch>,
    /// What the last step drew.
    drawn: Vec<u32>,
    seen: Seen,
    /// Which step can't begin.
    refused: usize,
    /// The seed of a row whose draw at that position can't be computed.
    broken: Option<(u64, u32)>,
}

impl Alone {
    pub(crate) fn new(inner: FakeRunner) -> Self {
        Self { inner, begun: VecDeque::new(), drawn: Vec::new(), seen: Seen::default(), refused: usize::MAX, broken: None }
    }
}

impl Runner for Alone {
    fn limits(&self) -> RunnerLimits {
        self.inner.limits()
    }

    fn start(&mut self, batch: &Batch, _out: &mut StepOutput) -> anyhow::Result<bool> {
        assert!(self.begun.len() < 2, "a third step begins");
        assert!(batch.drawn.is_empty() || !self.begun.is_empty(), "tokens of a step that has ended are known");
        let mut seen = self.seen.lock().unwrap();
        seen.push((!self.begun.is_empty(), batch.drawn.len()));
        anyhow::ensure!(seen.len() != self.refused, "it does not begin");
        self.begun.push_back(batch.clone());
        Ok(true)
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<()> {
        let mut begun = self.begun.pop_front().expect("it has begun");
        assert_eq!(format!("{batch:?}"), format!("{begun:?}"), "the step that began first");
        for drawn in std::mem::take(&mut begun.drawn) {
            // Of a step that failed, or a row that could not be computed, whatever is there.
            let token = self.drawn.get(drawn.head_idx as usize).copied();
            begun.tokens[drawn.token_idx as usize] = token.filter(|&token| token != u32::MAX).unwrap_or(7);
        }
        self.drawn.clear();
        self.inner.run(&begun, out)?;
        for (head, row) in begun.heads.iter().zip(&mut out.rows) {
            let Want::Draw(draw) = head.want else { panic!("the engine only draws") };
            if Some((draw.seed, draw.position)) == self.broken {
                *row = HeadOut::BROKEN;
            }
        }
        self.drawn.extend(out.rows.iter().map(|row| row.token));
        Ok(())
    }
}

/// An engine on such a device, and what that sees.
pub(crate) fn engine(limits: RunnerLimits, config: EngineConfig) -> (Engine, Seen) {
    with(Alone::new(FakeRunner::new(limits, config.budget_tokens)), config)
}

fn with(runner: Alone, config: EngineConfig) -> (Engine, Seen) {
    let seen = Arc::clone(&runner.seen);
    (Engine::new(config, Box::new(runner), fake_tokens()).expect("the limits are sound"), seen)
}

/// Runs the workload to its end: each row has its outcome, whatever is under way when it comes, is cancelled or ends.
fn simulate(workload: &Workload) -> (EngineStats, usize) {
    let Workload { limits, config, rows } = workload;
    let (mut engine, seen) = engine(*limits, *config);
    let mut waiting: Vec<&Row> = rows.iter().collect();
    let (mut live, mut told) = (HashMap::new(), HashMap::new());
    let (mut n_done, mut n_drawn) = (0, 0);
    for step in 0.. {
        assert!(step < 200_000, "no end in sight");
        let is_over = |row: &Row| row.cancelled.is_some_and(|at| at <= step);
        waiting.retain(|&row| {
            let comes = row.arrives <= step && !is_over(row) && engine.submit(row.submission.clone()).is_ok();
            live.extend(comes.then_some((row.submission.id, row)));
            let never_comes = row.arrives <= step && is_over(row);
            n_done += usize::from(never_comes);
            !comes && !never_comes
        });
        let cancelled: Vec<u64> = live.iter().filter(|(_, row)| is_over(row)).map(|(&id, _)| id).collect();
        for id in cancelled {
            n_done += forget(&mut engine, &mut live, id);
        }
        engine.advance(100 * step as i64);
        if !engine.start() {
            assert!(!engine.has_work() && live.is_empty());
        }
        let before = *engine.stats();
        let mut finished = Vec::new();
        engine.step(&mut finished).expect("the fake runner does not fail");
        engine.check();
        let counted = |s: &EngineStats| s.computed_tokens() - s.unused_tokens;
        let n_tokens: usize = engine.last_step().iter().map(|share| share.n_tokens).sum();
        assert_eq!(counted(engine.stats()) - counted(&before), n_tokens as u64);
        note_progress(&mut told, engine.take_progress());
        for done in finished {
            let row = live.remove(&done.id).expect("a row finishes once, and only if it is live");
            let Submission { id, prompt, params, .. } = &row.submission;
            assert_eq!(done, expected(*id, prompt, params, limits.max_context));
            let told = told.remove(id).map(|told| (told.tokens, told.text, told.logprobs));
            assert_eq!(told, params.watch.then(|| (done.tokens.clone(), done.text, done.logprobs)), "what a watcher was told");
            (n_done, n_drawn) = (n_done + 1, n_drawn + done.tokens.len());
        }
        assert_eq!(engine.stats().running + engine.stats().waiting, live.len());
        if n_done == rows.len() && !engine.has_work() {
            break;
        }
    }
    for row in rows {
        engine.end_stream(row.submission.stream);
    }
    engine.drop_kept();
    engine.check();
    let stats = *engine.stats();
    assert_eq!((stats.blocks_used, stats.blocks_kept, stats.failed_steps), (0, 0, 0), "blocks leaked, or a step failed");
    if rows.iter().all(|row| row.cancelled.is_none()) {
        let n_prompt: usize = rows.iter().map(|row| row.submission.prompt.len()).sum();
        assert_eq!(stats.prefill_tokens + stats.shared_tokens, n_prompt as u64);
        assert_eq!((stats.decode_tokens, stats.generated_tokens), ((n_drawn - rows.len()) as u64, n_drawn as u64));
    }
    let n_ahead = seen.lock().unwrap().iter().filter(|(is_ahead, _)| *is_ahead).count();
    (stats, n_ahead)
}

#[test]
fn any_workload_gives_each_row_its_outcome() {
    let total = std::cell::RefCell::new((0, 0, 0, 0));
    for_seeds(2000, |rng| {
        let workload = any_workload(rng);
        let (stats, n_ahead) = simulate(&workload);
        let (conversations, _) = simulate(&conversations(rng));
        let (steps, ahead, preemptions, found) = *total.borrow();
        let preemptions = preemptions + stats.preemptions;
        *total.borrow_mut() = (steps + stats.steps, ahead + n_ahead as u64, preemptions, found + conversations.found_tokens);
    });
    let (steps, ahead, preemptions, found) = total.into_inner();
    assert!(steps > 10_000 && 2 * ahead > steps, "{ahead} of {steps} steps began ahead");
    assert!(preemptions > 500 && found > 1000, "{preemptions} preemptions, {found} tokens found");
}

fn row(id: u64, params: SeqParams) -> Submission {
    Submission {
        id,
        prompt: vec![3 + id as u32, 4].into(),
        params,
        class: Class::Batch,
        keep_tokens: 0,
        stream: 0,
        due: Due::NEVER,
    }
}

fn endless(max_tokens: u32) -> SeqParams {
    SeqParams { max_tokens, ignore_eos: true, ..SeqParams::default() }
}

/// Room for all.
const LIMITS: RunnerLimits =
    RunnerLimits { n_blocks: 60, max_step_tokens: 64, max_step_seqs: 16, n_vocab: N_VOCAB, max_context: 100 };

fn run(engine: &mut Engine, rows: &[Submission]) -> HashMap<u64, Finished> {
    for row in rows {
        engine.submit(row.clone()).expect("there is room");
    }
    let mut finished = Vec::new();
    while engine.has_work() {
        engine.start();
        engine.step(&mut finished).expect("it runs");
        engine.check();
    }
    finished.into_iter().map(|done| (done.id, done)).collect()
}

/// Allows everything, if it was told of each token before the next.
#[derive(Debug)]
struct Anything;

#[derive(Default)]
struct Counting {
    n_masks: usize,
    n_accepted: usize,
}

impl Grammar for Anything {
    fn start(&self) -> Box<dyn Constraint> {
        Box::<Counting>::default()
    }
}

impl Constraint for Counting {
    fn mask(&mut self, words: &mut [u32]) -> Result<(), String> {
        words.fill(u32::MAX);
        self.n_masks += 1;
        if self.n_masks == self.n_accepted + 1 { Ok(()) } else { Err("a mask without the token before".into()) }
    }

    fn accept(&mut self, _token: u32) -> Result<(), String> {
        self.n_accepted += 1;
        Ok(())
    }
}

#[test]
fn a_row_that_needs_the_host_between_tokens_is_waited_for() {
    let special = [
        SeqParams { presence_penalty: 0.5, ..endless(10) },
        SeqParams { repetition_penalty: 1.5, ..endless(10) },
        SeqParams { logit_bias: vec![(9, 1.0)], ..endless(10) },
        SeqParams { grammar: Some(Arc::new(Anything)), ..endless(10) },
    ];
    for params in special {
        let (mut engine, seen) = engine(LIMITS, EngineConfig::for_runner(&LIMITS));
        let rows = [row(0, endless(40)), row(1, params), row(2, SeqParams { min_tokens: 30, ..endless(40) })];
        let done = run(&mut engine, &rows);
        for row in &rows {
            assert_eq!(done[&row.id], expected(row.id, &row.prompt, &row.params, LIMITS.max_context));
        }
        // While it goes on; that it ends with its tenth token is known.
        let waited = std::iter::repeat_n((false, 0), 10);
        assert_eq!(*seen.lock().unwrap(), waited.chain(std::iter::repeat_n((true, 2), 30)).collect::<Vec<_>>());
    }
}

/// What a step that began ahead computes of rows that have ended is in nobody's account, and no step begins for nothing where all ends are known.
#[test]
fn a_token_too_many_is_counted_nowhere() {
    let rows: Vec<Submission> = (0..8).map(|id| row(id, SeqParams { seed: id, ..endless(20 + id as u32) })).collect();
    let (mut engine, seen) = engine(LIMITS, EngineConfig::for_runner(&LIMITS));
    run(&mut engine, &rows);
    assert_eq!((engine.stats().steps, seen.lock().unwrap().len()), (27, 27), "each step is of use");

    // One token of five ends a row.
    let stop = |id| SeqParams { seed: id, stop_tokens: (0..12).collect(), ..endless(90) };
    let rows: Vec<Submission> = (0..8).map(|id| row(id, stop(id))).collect();
    let (mut engine, seen) = self::engine(LIMITS, EngineConfig::for_runner(&LIMITS));
    let done = run(&mut engine, &rows);
    let n_tokens: Vec<usize> = rows.iter().map(|row| done[&row.id].tokens.len()).collect();
    let longest = *n_tokens.iter().max().expect("rows");
    assert!(n_tokens.iter().all(|&n| n < 90), "they end by themselves: {n_tokens:?}");
    assert_eq!(seen.lock().unwrap().len(), longest + 1, "one step more than is of use");
    let n_drawn: usize = n_tokens.iter().sum();
    assert_eq!((engine.stats().generated_tokens, engine.stats().decode_tokens), (n_drawn as u64, (n_drawn - 8) as u64));
    // But it was computed: each row's last token, which ended it.
    assert_eq!(engine.stats().unused_tokens, 8);
}

/// The pool is full when a row needs a block, and the step under way ends another: nobody loses any.
#[test]
fn a_row_that_ends_with_the_step_under_way_is_not_preempted() {
    let limits = RunnerLimits { n_blocks: 4, max_context: 64, ..LIMITS };
    let config = EngineConfig { cold_output_tokens: 1, ..EngineConfig::for_runner(&limits) };
    // Two blocks each when the 31st token of the one is drawn, its last; the other is thought to end any time, and goes on.
    let goes_on = |seed| SeqParams { max_tokens: 40, seed, ..SeqParams::default() };
    let is_long = |&seed: &u64| {
        [0, 1].iter().all(|&id| expected(id, &row(id, goes_on(seed)).prompt, &goes_on(seed), 64).tokens.len() == 40)
    };
    let seed = (0..10_000).find(is_long).expect("some go on");
    for params in [[endless(31), goes_on(seed)], [goes_on(seed), endless(31)]] {
        let (mut engine, seen) = engine(limits, config);
        let rows: Vec<Submission> = (0..).zip(params).map(|(id, params)| row(id, params)).collect();
        let done = run(&mut engine, &rows);
        for row in &rows {
            assert_eq!(done[&row.id], expected(row.id, &row.prompt, &row.params, limits.max_context));
        }
        assert_eq!((engine.stats().preemptions, engine.stats().recomputed_tokens), (0, 0));
        assert!(seen.lock().unwrap().iter().filter(|(is_ahead, _)| *is_ahead).count() > 30);
    }
}

#[test]
fn a_failure_that_passes_costs_nobody_his_row() {
    for step in 1..40 {
        let rows = isolation::rows(&mut Rng(step));
        for fails_to_begin in [false, true] {
            let mut runner = Alone::new(if fails_to_begin {
                FakeRunner::new(LIMITS, LIMITS.max_step_tokens)
            } else {
                FakeRunner::failing(LIMITS, step, Fault::Once)
            });
            runner.refused = if fails_to_begin { step as usize } else { usize::MAX };
            let (mut engine, _) = with(runner, EngineConfig::for_runner(&LIMITS));
            let done = isolation::run_all(&mut engine, &rows).expect("it passes");
            for row in &rows {
                assert_eq!(done[&row.id], expected(row.id, &row.prompt, &row.params, LIMITS.max_context), "step {step}");
            }
        }
    }
}

#[test]
fn a_row_that_cannot_be_computed_harms_no_other() {
    let rows: Vec<Submission> = (0..6).map(|id| row(id, SeqParams { seed: 50 + id, ..endless(30) })).collect();
    for n_drawn in [0, 1, 14, 29] {
        let mut runner = Alone::new(FakeRunner::new(LIMITS, LIMITS.max_step_tokens));
        runner.broken = Some((53, 2 + n_drawn));
        let (mut engine, _) = with(runner, EngineConfig::for_runner(&LIMITS));
        let done = run(&mut engine, &rows);
        for row in &rows {
            let (found, expected) = (&done[&row.id], expected(row.id, &row.prompt, &row.params, LIMITS.max_context));
            if row.id == 3 {
                assert!(
                    found.broken.as_ref().is_some_and(|why| why.contains(&format!("after {n_drawn} generated"))),
                    "{found:?}"
                );
                assert_eq!(found.tokens, expected.tokens[..n_drawn as usize]);
            } else {
                assert_eq!(*found, expected);
            }
        }
        assert_eq!(engine.stats().failed_steps, 0);
    }
}
