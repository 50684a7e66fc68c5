//! Runs a job: from a checked configuration to files on disk and a report. The only module that knows all others.
//! Invariant: whatever ends a run, what was committed stays, and the same command goes on from there.

mod answer;
pub mod bench;
mod collect;
mod columns;
mod feed;
mod index;
mod job;
mod load;
pub mod meter;
pub mod progress;
pub mod report;
mod signals;
pub mod spec;
mod stepper;
mod steps;
mod window;

use crate::config::Config;
use crate::engine::handle::{EngineHandle, panic_message};
use crate::engine::{Engine, EngineConfig, TokenTable};
use crate::format::openai::answer::Stamp;
use crate::format::{Format, Source};
use crate::grammar::Grammars;
use crate::journal::{self, Journal, Manifest, Outputs};
use crate::model::Runner;
use crate::prepare::{Preparer, RowForm};
use crate::storage::Storage;
use crate::text::tokenizer::Tokenizer;
use answer::Answers;
use anyhow::{Context, Result};
use collect::{Collector, End, Event};
use columns::ResultColumns;
use feed::{Feed, FeedTimes};
use index::JobIndex;
use job::{Begin, Inputs, JobFiles};
use load::OpenModel;
use meter::Meter;
use progress::{Progress, say};
use report::Report;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use stepper::Stepper;
use window::WindowSettings;

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobEnd {
    /// Every row has its outcome; so many are errors.
    Finished {
        /// Rows that failed.
        failed: u64,
    },
    /// A signal stopped it; it can be continued.
    Stopped {
        /// The signal's number.
        signal: u8,
    },
}

/// Runs a job and shows what it did.
///
/// # Errors
/// If the job can't run, or can't go on; what was committed stays.
pub fn run(config: &Config) -> Result<JobEnd> {
    let tell = |line: &str| {
        if !config.quiet {
            say(line);
        }
    };
    let storage = Storage::new()?;
    let files = JobFiles::new(&storage, &config.spec.output.file)?;
    let end = run_job(config, &storage, &files)?;
    match &end {
        Ended::Stopped(_) => tell("stopped; run the same command again to go on from here"),
        Ended::Before(_) => tell("finished by an earlier run; --restart does it again"),
        Ended::Now(report) => tell(report.table().trim_end()),
    }
    if let Ended::Before(report) | Ended::Now(report) = &end {
        if let Some(line) = first_line(&storage, &files)? {
            tell(&format!("first result: {line}"));
        }
        tell(&format!("results: {}", files.results.url));
        if report.rows.failed > 0 {
            tell(&format!("errors:  {}", files.errors.url));
        }
    }
    Ok(end.code())
}

/// Most bytes of a result that are shown.
const SHOWN_BYTES: u64 = 1500;

/// The beginning of the first result, for people; `None` if there is none or it is not text.
fn first_line(storage: &Storage, files: &JobFiles) -> Result<Option<String>> {
    if Format::of(&files.results)? != Format::Jsonl {
        return Ok(None);
    }
    let n_bytes = storage.open(&files.results)?.n_bytes().min(SHOWN_BYTES);
    if n_bytes == 0 {
        return Ok(None);
    }
    let text = storage.get_range(&files.results, 0..n_bytes)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().next().map(|line| if line.len() < text.len() { line.to_owned() } else { format!("{line}…") }))
}

/// How a job ended, with what there is to say of it.
pub(crate) enum Ended {
    /// Now.
    Now(Box<Report>),
    /// In an earlier run, whose report this is.
    Before(Box<Report>),
    /// By a signal, not finished.
    Stopped(u8),
}

impl Ended {
    pub(crate) fn code(&self) -> JobEnd {
        match self {
            Self::Now(report) | Self::Before(report) => JobEnd::Finished { failed: report.rows.failed },
            Self::Stopped(signal) => JobEnd::Stopped { signal: *signal },
        }
    }
}

/// Runs a job. Everything that can be wrong with it is found before anything of an earlier one is touched.
fn run_job(config: &Config, storage: &Storage, files: &JobFiles) -> Result<Ended> {
    let start = Instant::now();
    let inputs = job::inspect_inputs(storage, &config.spec, files)?;
    let inspect = start.elapsed();
    let form = steps::read(config, storage)?;
    let columns = match &form.rows {
        RowForm::Requests => ResultColumns::new(&[], &config.spec.output.prefix),
        RowForm::Dataset(steps) => ResultColumns::new(steps, &config.spec.output.prefix),
    };
    let schema = job::schema(storage, config, &inputs, &columns)?;
    let outputs = Outputs { results: files.results.clone(), errors: files.errors.clone(), schema };
    let load_start = Instant::now();
    let open = load::open(config)?;
    let manifest = job::manifest(config, &inputs, &form.files_hash, &open)?;
    let requests = matches!(form.rows, RowForm::Requests);
    let (manifest, journal, index) = match job::begin(storage, files, manifest, requests, config.restart)? {
        Begin::Done(report) => return Ok(Ended::Before(report)),
        Begin::Work(manifest, journal, index) => (*manifest, *journal, index),
    };
    for warning in &journal.warnings {
        say(&format!("warning: {warning}"));
    }
    let meter = Arc::new(Meter::default());
    let measured = Measured {
        model: open.local.name.clone(),
        device: open.fingerprint.device.clone(),
        start,
        load: Duration::ZERO,
        inspect,
        feed: Arc::new(FeedTimes::default()),
        meter,
        kv_tokens: open.memory.kv_tokens(),
    };
    let run = Run { config, storage, files, inputs, outputs, manifest };
    run.work(open, (form.rows, columns), (journal, index), measured, load_start)
}

/// A job that is under way.
struct Run<'a> {
    config: &'a Config,
    storage: &'a Storage,
    files: &'a JobFiles,
    inputs: Inputs,
    outputs: Outputs,
    manifest: Manifest,
}

/// What the report says besides what the collector counts.
struct Measured {
    model: String,
    device: String,
    start: Instant,
    load: Duration,
    /// Hashing and counting the inputs.
    inspect: Duration,
    feed: Arc<FeedTimes>,
    meter: Arc<Meter>,
    kv_tokens: u64,
}

/// The job's threads, once they run.
struct Threads {
    engine: Arc<EngineHandle>,
    feed: std::thread::JoinHandle<()>,
    stepper: std::thread::JoinHandle<()>,
    events: Receiver<Event>,
}

impl Run<'_> {
    fn work(
        &self,
        open: OpenModel,
        (form, columns): (RowForm, ResultColumns),
        (journal, index): (Journal, JobIndex),
        mut measured: Measured,
        load_start: Instant,
    ) -> Result<Ended> {
        if journal.done_rows().len() == self.inputs.n_rows {
            // An earlier run was killed while it wrote the final files.
            let counts = collect::Counts { resumed: journal.done_rows().len(), ..collect::Counts::default() };
            return self.finish(self.inputs.n_rows, journal, counts, &measured);
        }
        let (tokenizer, local, memory) = (Arc::clone(&open.tokenizer), open.local.clone(), open.memory);
        let (runner, template) = load::load(open, self.config, &measured.meter)?;
        measured.load = load_start.elapsed();
        let needs = match &form {
            RowForm::Requests => Vec::new(),
            RowForm::Dataset(steps) => steps.iter().map(|step| step.needs.clone()).collect(),
        };
        let settings = self.window_settings(&form);
        let preparer = Arc::new(Preparer {
            form,
            tokenizer: Arc::clone(&tokenizer),
            template,
            grammars: Grammars::new(Arc::clone(&tokenizer)),
            model: local.clone(),
            result_columns: columns.names(),
            defaults: self.config.defaults.clone(),
            max_context: memory.max_context,
            max_context_reason: memory.max_context_reason,
        });
        preparer.check_formats()?;
        let (step_tasks, tasks) = channel();
        let (window_finished, finished_windows) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(journal.done_rows().clone());
        let (answers, progress) = (self.answers(&local.name, &tokenizer, columns), Progress::new(self.config.quiet));
        let index = Arc::new(index);
        let indexed = (journal, Arc::clone(&index));
        let n_rows = self.inputs.n_rows;
        let mut collector =
            Collector::new(indexed, (needs, step_tasks), answers, progress, n_rows, window_finished, Arc::clone(&stop));
        let stepper = Arc::clone(&preparer);
        let feed = |engine: Arc<EngineHandle>, events: Sender<Event>| {
            let job_seed = self.manifest.job_seed;
            let stepper = Stepper { preparer: stepper, engine: Arc::clone(&engine), tasks, events: events.clone(), job_seed };
            let feed = Feed {
                source: Source::open(self.storage, &self.inputs.files, self.inputs.limits)?,
                preparer,
                index: Arc::clone(&index),
                settings,
                window_rows: self.config.spec.job.window_rows,
                window_bytes: self.config.spec.job.window_bytes,
                limit: self.config.spec.input.limit.unwrap_or(u64::MAX),
                done,
                engine,
                events,
                finished_windows,
                stop,
                times: Arc::clone(&measured.feed),
            };
            Ok((feed, stepper))
        };
        let threads = self.start(runner, tokenizer, feed)?;
        let end = collector.run(&threads.events);
        let (journal, counts) = collector.into_parts();
        let stopped = threads.end();
        match end? {
            End::Complete(n_rows) => stopped.and_then(|()| self.finish(n_rows, journal, counts, &measured)),
            End::Stopped(signal) => stopped.map(|()| Ended::Stopped(signal)),
            End::EngineEnded => match stopped {
                Ok(()) => anyhow::bail!("the engine stopped before the job was done"),
                Err(error) => Err(error.context("the engine failed; what was committed stays")),
            },
        }
    }

    /// Starts the engine's thread, the feed's and the listener for signals.
    fn start(
        &self,
        runner: Box<dyn Runner>,
        tokens: Arc<dyn TokenTable>,
        feed: impl FnOnce(Arc<EngineHandle>, Sender<Event>) -> Result<(Feed, Stepper)>,
    ) -> Result<Threads> {
        let (sender, events) = channel();
        let mut engine_config = EngineConfig::for_runner(&runner.limits());
        engine_config.max_running = self.config.spec.engine.max_running.min(engine_config.max_running);
        engine_config.max_waiting = 2 * engine_config.max_running;
        let engine = Engine::new(engine_config, runner, tokens)?;
        let to_collector = EngineEvents(sender.clone());
        let deliver = Box::new(move |finished: &mut Vec<_>, stats: &_| to_collector.step(std::mem::take(finished), *stats));
        let engine = Arc::new(EngineHandle::start(engine, deliver)?);
        let (feed, stepper) = feed(Arc::clone(&engine), sender.clone())?;
        let stepper = std::thread::Builder::new().name("steps".into()).spawn(move || stepper.run());
        let stepper = stepper.context("cannot start the thread of later steps")?;
        signals::listen(sender.clone())?;
        let thread = std::thread::Builder::new().name("feed".into()).spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| feed.run()));
            let result =
                result.unwrap_or_else(|panic| Err(anyhow::anyhow!("reading the rows panicked: {}", panic_message(&*panic))));
            // The collector may be gone already, after a signal.
            let _nobody_listens = sender.send(Event::FeedEnded(result));
        });
        Ok(Threads { engine, feed: thread.context("cannot start the feed thread")?, stepper, events })
    }

    /// Writes the final files and the report, then removes the journal.
    fn finish(&self, n_rows: u64, mut journal: Journal, mut counts: collect::Counts, measured: &Measured) -> Result<Ended> {
        anyhow::ensure!(
            n_rows == self.inputs.n_rows,
            "the inputs had {} rows when the job began, {n_rows} when they were read: they changed meanwhile",
            self.inputs.n_rows
        );
        let start = Instant::now();
        journal::finalise(&mut journal, &self.outputs, n_rows)?;
        counts.write += start.elapsed();
        let report = self.report(n_rows, &journal, &counts, measured);
        let mut text = serde_json::to_string_pretty(&report).context("cannot write down the report")?;
        text.push('\n');
        self.storage.sweep(&self.files.report)?;
        self.storage.put(&self.files.report, text.into())?;
        journal.remove()?;
        Ok(Ended::Now(Box::new(report)))
    }

    fn report(&self, n_rows: u64, journal: &Journal, counts: &collect::Counts, measured: &Measured) -> Report {
        let (totals, stats, meter) = (journal.totals(), &counts.stats, measured.meter.read());
        let (read, prepare) = measured.feed.read();
        let total = measured.start.elapsed().saturating_sub(measured.load).as_secs_f64();
        let seconds = report::Seconds {
            total,
            load: measured.load.as_secs_f64(),
            read: (measured.inspect + read).as_secs_f64(),
            prepare: prepare.as_secs_f64(),
            queue: report::ratio(counts.waiting_row_seconds, counts.submitted as f64),
            prefill: meter.prefill.as_secs_f64(),
            decode: meter.decode.as_secs_f64(),
            write: counts.write.as_secs_f64(),
        };
        let computed = (stats.prefill_tokens + stats.generated_tokens) as f64;
        Report {
            job_fingerprint: self.manifest.job_fingerprint.clone(),
            system_fingerprint: self.manifest.model_fingerprint.clone(),
            model: measured.model.clone(),
            device: measured.device.clone(),
            created: self.manifest.created_unix_s,
            rows: report::RowCounts {
                total: n_rows,
                completed: totals.n_ok,
                failed: totals.n_failed,
                errors: counts.errors.clone(),
                resumed: counts.resumed,
                deduplicated: counts.duplicates,
            },
            tokens: report::TokenCounts {
                prompt: totals.prompt_tokens,
                completion: totals.completion_tokens,
                cached: totals.cached_tokens,
                prefilled: stats.prefill_tokens,
                prefill_minimum: counts.trie_tokens,
                prefill_ratio: report::ratio(stats.prefill_tokens as f64, counts.trie_tokens as f64),
                cache_hits: stats.shared_tokens,
                recomputed: stats.recomputed_tokens,
            },
            rates: report::Rates {
                prefill_tokens_per_s: report::ratio(stats.prefill_tokens as f64, seconds.prefill),
                decode_tokens_per_s: report::ratio(stats.decode_tokens as f64, seconds.decode),
                total_tokens_per_s: report::ratio(computed, total),
                busy_share: report::ratio(seconds.prefill + seconds.decode, total),
            },
            seconds,
            peak_memory_bytes: report::peak_memory_bytes(),
            kv_tokens: measured.kv_tokens,
        }
    }

    fn answers(&self, model: &str, tokenizer: &Arc<Tokenizer>, columns: ResultColumns) -> Answers {
        let stamp = Stamp {
            job_fingerprint: self.manifest.job_fingerprint.clone(),
            created: self.manifest.created_unix_s,
            model: model.to_owned(),
            system_fingerprint: self.manifest.model_fingerprint.clone(),
        };
        Answers { stamp, tokenizer: Arc::clone(tokenizer), columns }
    }

    fn window_settings(&self, form: &RowForm) -> WindowSettings {
        let (has_steps, all_deterministic) = match form {
            RowForm::Requests => (false, true),
            RowForm::Dataset(steps) => {
                (steps.iter().any(|s| !s.needs.is_empty()), steps.iter().all(|s| s.params.is_deterministic()))
            }
        };
        // Which rows are identical must be known before later steps are.
        let dedup = self.config.spec.job.dedup && (!has_steps || all_deterministic);
        WindowSettings { job_seed: self.manifest.job_seed, dedup, has_steps }
    }
}

/// Hands the engine's results to the collector; tells it when the engine's thread is gone, however it ended.
struct EngineEvents(Sender<Event>);

impl EngineEvents {
    fn step(&self, finished: Vec<crate::engine::Finished>, stats: crate::engine::EngineStats) {
        // Nobody listens after a stop; the rows are computed again later.
        let _nobody_listens = self.0.send(Event::Finished(finished, stats));
    }
}

impl Drop for EngineEvents {
    fn drop(&mut self) {
        let _nobody_listens = self.0.send(Event::EngineEnded);
    }
}

impl Threads {
    /// Ends the threads; the error is the engine's.
    fn end(self) -> Result<()> {
        self.engine.abort();
        drop(self.events);
        self.feed.join().map_err(|_| anyhow::anyhow!("the feed thread panicked"))?;
        self.stepper.join().map_err(|_| anyhow::anyhow!("the thread of later steps panicked"))?;
        let engine = Arc::into_inner(self.engine).context("the feed has ended and let go of the engine")?;
        engine.drain().map(drop)
    }
}
