//! How evenly a run went: the tokens that it computed, by intervals of time, and from them the share of its time in which they
//! went slowly. Knows no clock: times are told to it. Invariant: every token is counted; the memory does not grow with the run.

/// Seconds of the first intervals: some steps of a small model.
const FIRST_WIDTH: f64 = 0.05;
/// Most intervals; then two become one.
const MOST: usize = 4096;

/// Tokens by intervals that begin with the first step.
#[derive(Debug)]
pub(super) struct Series {
    /// Seconds of an interval.
    width: f64,
    /// Tokens of each.
    tokens: Vec<f64>,
    /// When the last step ended.
    end: f64,
}

impl Default for Series {
    fn default() -> Self {
        // All of it now: a step allocates nothing.
        Self { width: FIRST_WIDTH, tokens: Vec::with_capacity(MOST), end: 0.0 }
    }
}

impl Series {
    /// Adds a step's tokens, spread evenly over the time that it took. Seconds since the first step's beginning; steps come in order.
    pub(super) fn add(&mut self, from: f64, to: f64, n_tokens: u64) {
        while to >= self.width * MOST as f64 {
            let half = self.tokens.len().div_ceil(2);
            for i in 0..half {
                self.tokens[i] = self.tokens[2 * i] + self.tokens.get(2 * i + 1).unwrap_or(&0.0);
            }
            self.tokens.truncate(half);
            self.width *= 2.0;
        }
        let place = |time: f64| (time / self.width) as usize;
        self.tokens.resize(self.tokens.len().max(place(to) + 1), 0.0);
        let rate = n_tokens as f64 / (to - from);
        for i in place(from)..=place(to) {
            let (start, end) = (i as f64 * self.width, (i + 1) as f64 * self.width);
            let inside = to.min(end) - from.max(start);
            // A step that took no time at all is a point.
            self.tokens[i] += if rate.is_finite() { rate * inside } else { n_tokens as f64 };
        }
        self.end = self.end.max(to);
    }

    /// Of a run of `total` seconds, the share of its time in which tokens went at under half their median rate: in half of the time
    /// in which there were any they went slower. Time before the first step and after the last is slow.
    pub(super) fn tail(&self, total: f64) -> f64 {
        // Of the last interval there is only a part.
        let seconds = |i: usize| (self.end - i as f64 * self.width).min(self.width);
        let intervals = self.tokens.iter().enumerate().map(|(i, &tokens)| (tokens / seconds(i), seconds(i)));
        let mut intervals: Vec<(f64, f64)> = intervals.filter(|(_, seconds)| *seconds > 0.0).collect();
        intervals.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let moving = || intervals.iter().filter(|(rate, _)| *rate > 0.0);
        let half = moving().map(|(_, seconds)| seconds).sum::<f64>() / 2.0;
        let mut passed = 0.0;
        let median = moving().find(|(_, seconds)| {
            passed += seconds;
            passed >= half
        });
        let Some(&(median, _)) = median else { return 0.0 };
        let slow: f64 = intervals.iter().filter(|(rate, _)| *rate < median / 2.0).map(|(_, seconds)| seconds).sum();
        let around = (total - self.end).max(0.0);
        super::report::ratio(slow + around, self.end + around)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps one after the other, each of so many seconds and tokens; 0 tokens are a wait.
    fn series(steps: impl IntoIterator<Item = (f64, u64)>) -> Series {
        let (mut series, mut now) = (Series::default(), 0.0);
        for (seconds, n_tokens) in steps {
            if n_tokens > 0 {
                series.add(now, now + seconds, n_tokens);
            }
            now += seconds;
        }
        series
    }

    #[track_caller]
    fn near(found: f64, expected: f64, slack: f64) {
        assert!((found - expected).abs() <= slack, "{found} is not {expected}");
    }

    #[test]
    fn the_tail_is_the_time_under_half_the_median_rate() {
        // 1000 tokens/s, then 600, then 400, a wait, and the rest of the run.
        let steps = [vec![(0.25, 250); 40], vec![(0.25, 150); 8], vec![(0.25, 100); 4], vec![(1.0, 0), (0.25, 250)]].concat();
        let series = series(steps);
        // 1 s of it at 400, 1 s of waiting, and what the run is longer than its steps.
        near(series.tail(14.25), 2.0 / 14.25, 1e-6);
        near(series.tail(16.25), 4.0 / 16.25, 1e-6);
    }

    #[test]
    fn an_even_run_has_none_and_one_that_waits_nothing_else() {
        near(series((0..100).map(|_| (0.03, 64))).tail(3.0), 0.0, 1e-9);
        // Between steps that are far apart nothing happens: of 100 s they took 10.
        near(series((0..100).map(|i| (0.5, if i % 10 == 0 { 1000 } else { 0 }))).tail(50.0), 0.9, 0.01);
        near(Series::default().tail(1.0), 0.0, 0.0);
    }

    #[test]
    fn long_runs_are_kept_in_as_little_memory() {
        // Nine tenths of an hour at 100 tokens/s, the rest at 10.
        let series = series((0..36_000).map(|i| (0.1, if i < 32_400 { 10 } else { 1 })));
        assert!(series.tokens.len() <= MOST && series.tokens.capacity() == MOST);
        near(series.tokens.iter().sum(), 32_400.0 * 10.0 + 3600.0, 1e-3);
        near(series.tail(3600.0), 0.1, 0.001);
    }
}
