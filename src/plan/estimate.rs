//! What a job will take, before it runs: tokens, steps, KV memory, time and money, as intervals, from what its plan says
//! of each row. Pure arithmetic; knows nothing of models, files or clocks. Invariant: memory depends on the context and
//! on the rows that run at once, not on how many rows there are.
//!
//! The unknown is how long completions get, so everything is reckoned twice: for the shortest that is to be expected and
//! for the longest. Both go through a model of continuous batching in which time is counted in steps and a step's
//! budget flows: rows that decode take one token each, the rest prefills the next row. The engine rounds to whole
//! tokens and steps; over a job that evens out.

use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Two bounds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Interval {
    /// The least to be expected.
    pub low: f64,
    /// The most.
    pub high: f64,
}

impl Interval {
    /// Both bounds by the same function.
    #[must_use]
    pub fn map(self, of: impl Fn(f64) -> f64) -> Self {
        Self { low: of(self.low), high: of(self.high) }
    }

    /// The sums of the bounds.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self { low: self.low + other.low, high: self.high + other.high }
    }

    /// Amounts divided by a rate: the least by the fastest, the most by the slowest.
    #[must_use]
    pub fn at_rate(self, rate: Self) -> Self {
        let over = |amount: f64, rate: f64| if amount == 0.0 { 0.0 } else { amount / rate };
        Self { low: over(self.low, rate.high), high: over(self.high, rate.low) }
    }

    /// Whether a value lies between the bounds.
    pub fn holds(self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

/// What the engine has, and what is expected of completions.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Most tokens of a step.
    pub budget_tokens: usize,
    /// Most rows at once.
    pub max_running: usize,
    /// Size of the KV cache, in tokens.
    pub kv_tokens: u64,
    /// Most tokens of a row.
    pub max_context: usize,
    /// Length of completions as a share of what rows allow, 0 to 1.
    pub output_share: Interval,
}

/// A row that is computed.
#[derive(Debug, Clone, Copy)]
pub struct EstimateRow {
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Those of them that no earlier row has computed.
    pub prefill_tokens: u32,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// It goes on after end tokens: nothing but `max_tokens` ends it.
    pub ignores_end: bool,
}

/// Takes in a job's rows in running order.
#[derive(Debug)]
pub struct Estimator {
    setting: Setting,
    /// Rows by the tokens of their prompt.
    lengths: Vec<u64>, // [max_context + 1]
    n_computed: u64,
    prompt_tokens: u64,
    prefill_tokens: u64,
    open_tokens: u64,
    fixed_tokens: u64,
    output_tokens: [u64; 2],
    runs: [Simulation; 2], // short completions, long ones
}

/// What a job will take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Totals {
    /// Rows with a prompt.
    pub n_rows: u64,
    /// Those that are computed; the others get their completions.
    pub n_computed: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Nearest-rank quantiles of the prompts' tokens: 50, 95, 99 and 100 percent.
    pub quantiles: [u32; 4],
    /// Prompt tokens to compute.
    pub prefill_tokens: u64,
    /// Most tokens that rows may generate which an end token can end.
    pub open_tokens: u64,
    /// Tokens that the other rows generate.
    pub fixed_tokens: u64,
    /// Tokens to generate.
    pub output_tokens: Interval,
    /// Steps of the engine.
    pub steps: Interval,
    /// Most KV cache used at a time, tokens.
    pub kv_peak_tokens: Interval,
}

impl Estimator {
    /// Of a job without rows.
    pub fn new(setting: Setting) -> Self {
        Self {
            setting,
            lengths: vec![0; setting.max_context + 1],
            n_computed: 0,
            prompt_tokens: 0,
            prefill_tokens: 0,
            open_tokens: 0,
            fixed_tokens: 0,
            output_tokens: [0; 2],
            runs: [Simulation::default(), Simulation::default()],
        }
    }

    /// The next row to be computed.
    pub fn compute(&mut self, row: EstimateRow) {
        self.copy(row.prompt_tokens);
        self.n_computed += 1;
        self.prefill_tokens += u64::from(row.prefill_tokens);
        *(if row.ignores_end { &mut self.fixed_tokens } else { &mut self.open_tokens }) += u64::from(row.max_tokens);
        let share = self.setting.output_share;
        for (i, share) in [share.low, share.high].into_iter().enumerate() {
            let share = if row.ignores_end { 1.0 } else { share };
            let n_output = ((f64::from(row.max_tokens) * share).ceil() as u32).clamp(1, row.max_tokens.max(1));
            self.output_tokens[i] += u64::from(n_output);
            self.runs[i].run(&self.setting, row.prompt_tokens, row.prefill_tokens, n_output);
        }
    }

    /// A row that gets another one's completion.
    pub fn copy(&mut self, prompt_tokens: u32) {
        let place = (prompt_tokens as usize).min(self.lengths.len() - 1);
        self.lengths[place] += 1;
        self.prompt_tokens += u64::from(prompt_tokens);
    }

    /// What the rows so far will take.
    pub fn totals(&self) -> Totals {
        let n_rows: u64 = self.lengths.iter().sum();
        let ends = [0, 1].map(|i| self.runs[i].clone().end());
        Totals {
            n_rows,
            n_computed: self.n_computed,
            prompt_tokens: self.prompt_tokens,
            quantiles: [0.5, 0.95, 0.99, 1.0].map(|share| self.quantile(share, n_rows)),
            prefill_tokens: self.prefill_tokens,
            open_tokens: self.open_tokens,
            fixed_tokens: self.fixed_tokens,
            output_tokens: Interval { low: self.output_tokens[0] as f64, high: self.output_tokens[1] as f64 },
            steps: Interval { low: ends[0].0, high: ends[1].0 },
            kv_peak_tokens: Interval { low: ends[0].1, high: ends[1].1 },
        }
    }

    /// The nearest-rank quantile; 0 of nothing.
    fn quantile(&self, share: f64, n_rows: u64) -> u32 {
        let rank = ((share * n_rows as f64).ceil() as u64).max(1);
        let mut seen = 0;
        let reached = self.lengths.iter().position(|n| {
            seen += n;
            seen >= rank
        });
        reached.unwrap_or(0) as u32
    }
}

/// Parts of a step that times are kept in.
const TICKS: f64 = 1024.0;

/// Continuous batching with a flowing budget; see the module.
#[derive(Debug, Clone, Default)]
struct Simulation {
    /// Steps so far.
    now: f64,
    /// Rows that decode: (last step in ticks, KV tokens at step 0 if it had always decoded).
    decoding: BinaryHeap<Reverse<(u64, i64)>>,
    /// Sum of the second parts.
    kv_base: i64,
    kv_peak: f64,
}

impl Simulation {
    fn run(&mut self, setting: &Setting, prompt_tokens: u32, prefill_tokens: u32, n_output: u32) {
        let (max_running, budget) = (setting.max_running, setting.budget_tokens as f64);
        while !self.decoding.is_empty() && (self.decoding.len() >= max_running || !self.fits(setting, prefill_tokens)) {
            self.finish_next();
        }
        let mut left = f64::from(prefill_tokens);
        loop {
            let rate = (budget - self.decoding.len() as f64).max(1.0);
            let done = self.now + left / rate;
            match self.next_end() {
                Some(end) if end < done => {
                    left -= rate * (end - self.now).max(0.0);
                    self.finish_next();
                }
                _ => {
                    self.now = done;
                    break;
                }
            }
        }
        // What a row shares is counted once, with the row that computed it; alone, a row holds all of its prompt.
        let held = if self.decoding.is_empty() { prompt_tokens } else { prefill_tokens };
        // The step that ends the prefill draws the first token.
        let end = self.now + f64::from(n_output - 1);
        let base = i64::from(held) - self.now as i64;
        self.decoding.push(Reverse(((end * TICKS) as u64, base)));
        self.kv_base += base;
        self.kv_peak = self.kv_peak.max(self.kv_tokens().min(setting.kv_tokens as f64));
    }

    fn fits(&self, setting: &Setting, n_tokens: u32) -> bool {
        self.kv_tokens() + f64::from(n_tokens) <= setting.kv_tokens as f64
    }

    /// Each decoding row has grown by a token per step.
    fn kv_tokens(&self) -> f64 {
        self.kv_base as f64 + self.decoding.len() as f64 * self.now
    }

    fn next_end(&self) -> Option<f64> {
        self.decoding.peek().map(|Reverse((end, _))| *end as f64 / TICKS)
    }

    fn finish_next(&mut self) {
        if let Some(end) = self.next_end() {
            self.now = self.now.max(end);
            self.kv_peak = self.kv_peak.max(self.kv_tokens());
        }
        if let Some(Reverse((_, base))) = self.decoding.pop() {
            self.kv_base -= base;
        }
    }

    /// (steps, most KV tokens), once nothing more comes.
    fn end(mut self) -> (f64, f64) {
        while !self.decoding.is_empty() {
            self.finish_next();
        }
        (self.now.ceil(), self.kv_peak.ceil())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTING: Setting = Setting {
        budget_tokens: 100,
        max_running: 4,
        kv_tokens: 10_000,
        max_context: 1000,
        output_share: Interval { low: 0.1, high: 1.0 },
    };

    fn row(prompt_tokens: u32, max_tokens: u32) -> EstimateRow {
        EstimateRow { prompt_tokens, prefill_tokens: prompt_tokens, max_tokens, ignores_end: false }
    }

    fn totals(rows: &[EstimateRow], setting: Setting) -> Totals {
        let mut estimator = Estimator::new(setting);
        for &row in rows {
            estimator.compute(row);
        }
        estimator.totals()
    }

    #[test]
    fn quantiles_are_nearest_ranks() {
        let rows: Vec<_> = (1..=100).map(|n| row(n, 1)).collect();
        assert_eq!(totals(&rows, SETTING).quantiles, [50, 95, 99, 100]);
        assert_eq!(totals(&rows[..1], SETTING).quantiles, [1; 4]);
        assert_eq!(totals(&[], SETTING).quantiles, [0; 4]);
    }

    /// One row: its prefill takes prompt / budget steps, each further token one.
    #[test]
    fn one_row_takes_its_own_steps() {
        let found = totals(&[row(300, 50)], SETTING);
        assert_eq!((found.steps.low, found.steps.high), (7.0, 52.0));
        assert_eq!((found.output_tokens.low, found.output_tokens.high), (5.0, 50.0));
        assert_eq!((found.kv_peak_tokens.low, found.kv_peak_tokens.high), (304.0, 349.0));
    }

    /// Four rows at a time: 8 equal rows of negligible prefill take twice as long as 4.
    #[test]
    fn rows_run_side_by_side_up_to_the_limit() {
        let steps = |n: usize| totals(&vec![row(1, 200); n], SETTING).steps.high;
        assert!((199.0..203.0).contains(&steps(4)), "{}", steps(4));
        assert!((398.0..404.0).contains(&steps(8)), "{}", steps(8));
    }

    /// With memory for one row only, rows wait for each other and the peak stays under the pool.
    #[test]
    fn little_memory_makes_rows_wait() {
        let small = Setting { kv_tokens: 350, ..SETTING };
        let found = totals(&[row(300, 40); 3], small);
        assert!(found.kv_peak_tokens.high <= 350.0, "{found:?}");
        assert!(found.steps.high >= 3.0 * 42.0 - 3.0, "{found:?}");
    }

    #[test]
    fn a_row_that_ignores_the_end_has_one_length() {
        let found = totals(&[EstimateRow { ignores_end: true, ..row(10, 64) }], SETTING);
        assert_eq!((found.output_tokens.low, found.output_tokens.high), (64.0, 64.0));
    }

    #[test]
    fn intervals_divide_the_cautious_way() {
        let seconds = Interval { low: 100.0, high: 200.0 }.at_rate(Interval { low: 10.0, high: 20.0 });
        assert_eq!((seconds.low, seconds.high), (5.0, 20.0));
        assert!(seconds.holds(5.0) && !seconds.holds(20.1));
        assert_eq!(Interval::default().at_rate(Interval::default()), Interval::default());
    }
}
