//! What is asked of a machine in a day: the requests of a trace, repeated, with bursts beyond what the machine can do, and
//! batches of mixed deadlines. Knows nothing of the order in which it is done. Invariant: the same trace gives the same load.

use crate::window::Class;
use anyhow::{Context, Result, ensure};
use chrono::NaiveDateTime;
use std::path::Path;

/// A request of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// When it came, from the first on.
    pub at_ms: i64,
    /// Tokens of its prompt.
    pub n_prompt: usize,
    /// Tokens of its answer.
    pub n_drawn: usize,
}

/// Longest prompt and answer of a request, in tokens; longer ones are cut.
pub const MAX_PROMPT: usize = 8000;
/// See [`MAX_PROMPT`].
pub const MAX_DRAWN: usize = 1000;

/// Reads a trace in the form of the Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens`, in order of time.
///
/// # Errors
/// It can't be read, or is something else: the line.
pub fn read_trace(path: &Path) -> Result<Vec<Request>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut requests: Vec<Request> = Vec::new();
    let mut first = None;
    for (i, line) in text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty()) {
        let parsed = (|| {
            let mut fields = line.trim().split(',');
            let at = NaiveDateTime::parse_from_str(fields.next()?, "%Y-%m-%d %H:%M:%S%.f").ok()?;
            let mut count = |most: usize| Some(fields.next()?.parse::<usize>().ok()?.clamp(1, most));
            Some((at.and_utc().timestamp_millis(), count(MAX_PROMPT)?, count(MAX_DRAWN)?))
        })();
        let (at, n_prompt, n_drawn) = parsed.with_context(|| format!("{}, line {}: is no request", path.display(), i + 1))?;
        let at_ms = at - *first.get_or_insert(at);
        ensure!(requests.last().is_none_or(|last| last.at_ms <= at_ms), "{}, line {}: is before the last", path.display(), i + 1);
        requests.push(Request { at_ms, n_prompt, n_drawn });
    }
    ensure!(requests.len() > 1 && requests.last().is_some_and(|last| last.at_ms > 0), "{}: has no requests", path.display());
    Ok(requests)
}

/// A request of the day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// What it is.
    pub request: Request,
    /// Its class.
    pub class: Class,
    /// Which of the day's batches it is of.
    pub batch: Option<usize>,
}

/// A batch of the day; its rows come with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// When it comes.
    pub at_ms: i64,
    /// When it is due.
    pub due_ms: i64,
}

/// A day, or as much of it as is wanted.
#[derive(Debug, Clone)]
pub struct Load {
    /// In the order of their times.
    pub rows: Vec<Row>,
    /// In the order of their times.
    pub batches: Vec<Batch>,
}

const MINUTE_MS: i64 = 60_000;
const HOUR_MS: i64 = 60 * MINUTE_MS;
/// Calls come at so much of the machine's capacity, but for bursts.
const CALM: f64 = 0.45;
/// Calls in a burst.
const BURST: f64 = 1.3;
/// A burst begins so often, first after half of that.
const BURST_EVERY_MS: i64 = 3 * HOUR_MS;
/// It lasts so long.
const BURST_MS: i64 = 10 * MINUTE_MS;
/// One call in so many is asap.
const ASAP_EVERY: usize = 10;
/// Windows of batches that come together, those with most time first.
const BATCH_MINUTES: [i64; 4] = [24 * 60, 12 * 60, 6 * 60, 75];
/// So often.
const BATCHES_EVERY_MS: i64 = 4 * HOUR_MS;
/// With work for so much of that, all of them.
const BATCH_WORK: f64 = 0.4;

impl Load {
    /// So many hours of it, for a machine that does `capacity` of the trace's requests in a second when it does nothing else.
    pub fn new(trace: &[Request], capacity: f64, hours: u32) -> Self {
        let end_ms = i64::from(hours) * HOUR_MS;
        // The trace's own gaps, as many at a time as the rate says.
        let trace_rate = trace.len() as f64 / (trace[trace.len() - 1].at_ms as f64 / 1000.0);
        let mut rows = Vec::new();
        let (mut at_ms, mut n) = (0.0, 0);
        while (at_ms as i64) < end_ms {
            let request = Request { at_ms: at_ms as i64, ..trace[n % trace.len()] };
            let class = if n % ASAP_EVERY == 0 { Class::Asap } else { Class::Standard };
            rows.push(Row { request, class, batch: None });
            let into = (request.at_ms + BURST_EVERY_MS / 2) % BURST_EVERY_MS;
            let rate = capacity * if into < BURST_MS { BURST } else { CALM };
            let gap_ms = (trace[(n + 1) % trace.len()].at_ms - trace[n % trace.len()].at_ms).max(0);
            at_ms += gap_ms as f64 * trace_rate / rate;
            n += 1;
        }
        let mut batches = Vec::new();
        let n_rows = (capacity * BATCH_WORK * BATCHES_EVERY_MS as f64 / 1000.0) as usize / BATCH_MINUTES.len();
        let times = (0..end_ms / BATCHES_EVERY_MS).map(|number| number * BATCHES_EVERY_MS + HOUR_MS / 2);
        for (at_ms, minutes) in times.flat_map(|at_ms| BATCH_MINUTES.map(|minutes| (at_ms, minutes))) {
            for _ in 0..n_rows {
                let request = Request { at_ms, ..trace[n % trace.len()] };
                rows.push(Row { request, class: Class::Batch, batch: Some(batches.len()) });
                n += 1;
            }
            batches.push(Batch { at_ms, due_ms: at_ms + minutes * MINUTE_MS });
        }
        rows.sort_by_key(|row| row.request.at_ms);
        Self { rows, batches }
    }
}
