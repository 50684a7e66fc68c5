//! Runs a job: from a checked configuration to files on disk and a report. The only module that knows all others.
//! Invariant: whatever ends a run, what was committed stays, and the same command goes on from there.

mod answer;
mod attempts;
pub mod bench;
pub mod bench_plan;
pub mod bench_quality;
pub mod bench_windows;
pub mod budget;
pub mod busy;
mod calibrate;
mod checkpoint;
mod collect;
mod columns;
mod described;
mod ended;
mod estimate;
mod events;
pub mod explain;
mod feed;
mod first_rows;
mod flight;
pub mod hosted;
mod index;
pub mod inspect;
mod job;
pub mod kernels;
pub mod load;
pub mod merge;
pub mod meter;
pub mod modelled;
mod null;
pub mod policy;
pub mod progress;
pub mod referenced;
pub mod report;
pub mod retry;
mod reuse;
mod rows;
mod signals;
pub mod spec;
pub mod status;
mod stepper;
mod steps;
mod summary;
mod tail;
mod tally;
mod threads;
mod window;

use crate::config::Config;
use crate::engine::handle::EngineHandle;
use crate::format::openai::PlainLines;
use crate::format::openai::answer::Stamp;
use crate::format::{Columns, Source};
use crate::grammar::Grammars;
use crate::hub::LocalModel;
use crate::journal::{self, Apart, Journal, Manifest, Outputs, Standing};
use crate::prepare::{Preparer, RowForm};
use crate::storage::Storage;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;
use answer::Answers;
use anyhow::Result;
use checkpoint::Checkpoints;
use collect::{Collector, Counts, End, Event, Stop};
use columns::ResultColumns;
use described::{Described, Measured};
pub(crate) use ended::Ended;
pub use ended::JobEnd;
use ended::show;
use feed::Feed;
use index::JobIndex;
use job::{Begin, Inputs, JobFiles};
use load::{MemoryPlan, OpenModel};
use meter::Meter;
use policy::Policy;
use progress::{Progress, say, say_with};
use report::Report;
use reuse::{Keeping, Shared};
use rows::{FeedTimes, WindowReader};
use serde_json::{Map, Value, json};
use signals::Signals;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;
use stepper::Stepper;
use threads::Threads;
use window::WindowSettings;

/// Runs a job and shows what it did.
///
/// # Errors
/// If the job can't run, or can't go on; what was committed stays.
pub fn run(config: &Config) -> Result<JobEnd> {
    let storage = Storage::new()?;
    let mut files = JobFiles::new(&storage, &config.spec.output)?;
    if let Some(shard) = config.shard {
        files = files.of_shard(shard)?;
    }
    let end = run_job(config, &storage, &files, Arc::default())?;
    show(&end, config, &storage, &files)
}

/// Runs a job. Everything that can be wrong with it is found before anything of an earlier one is touched. Its steps are
/// measured by `meter`.
fn run_job(config: &Config, storage: &Storage, files: &JobFiles, meter: Arc<Meter>) -> Result<Ended> {
    let Described { inputs, form, policies, columns, mut outputs, open, grammars, manifest, measured, load_start } =
        Described::new(config, storage, files, meter)?;
    let shared = find_shared(config, storage, files, &manifest)?;
    let requests = matches!(form, RowForm::Requests);
    let (settings, described) = (manifest.job_fingerprint.clone(), described_columns(config, &columns));
    let begun = if config.retry {
        let usage: Vec<String> = columns.usage_names().map(str::to_owned).collect();
        let dataset = retry::Lines::Dataset { usage: &usage, error: columns.error_name() };
        let lines = if requests { retry::Lines::Requests } else { dataset };
        let made = outputs.passed.as_ref().map(|_| columns.names());
        retry::Retry { storage, files, inputs: &inputs, lines, columns: &described, made, config }.begin(manifest)
    } else {
        job::begin(storage, files, manifest, (config.shard, &config.terms, config.is_dated))
    };
    let (manifest, journal, index) = match begun? {
        Begin::Done(report) => return Ok(Ended::Before(report)),
        Begin::Work(manifest, journal, index) => (*manifest, *journal, *index),
    };
    for warning in &journal.warnings {
        say(&format!("warning: {warning}"));
    }
    if !config.quiet {
        say_resumed(&journal, &manifest);
    }
    if let Err(changed) = inputs.check_unchanged(storage) {
        // It may have waited for another run. What it has not begun is in nobody's way.
        return if journal.done_rows().is_empty() { journal.remove().and(Err(changed)) } else { Err(changed) };
    }
    outputs.parts = config.parts.map(|size| job::parts(&manifest, size));
    let run = Run { config, storage, files, inputs, outputs, policies, manifest, settings, columns: described };
    run.work((open, shared), (form, columns, grammars), (journal, index), measured, load_start)
}

/// Says what earlier runs have left to a job that goes on.
fn say_resumed(journal: &Journal, manifest: &Manifest) {
    let (n_done, n_rows) = (journal.done_rows().len(), manifest.rows.end - manifest.rows.start);
    let line = format!("goes on with an unfinished job: {n_done} of {n_rows} rows are done");
    let Value::Object(fields) = json!({"rows": n_rows, "resumed": n_done}) else { unreachable!("it is written as one") };
    if n_done > 0 {
        say_with(&line, &if progress::is_json() { fields } else { Map::new() });
    }
}

/// The cache, if there is to be one. One that can't be reached is an error only for a job that begins anew: one that is finished
/// needs none, and one that is under way goes on whatever fails.
fn find_shared(config: &Config, storage: &Storage, files: &JobFiles, manifest: &Manifest) -> Result<Option<Shared>> {
    let Some(place) = &config.reuse else { return Ok(None) };
    let error = match Shared::find(place) {
        Ok(shared) => return Ok(Some(shared)),
        Err(error) => error,
    };
    let is_under_way = || journal::manifest_in(storage, &files.journal).is_ok_and(|earlier| earlier.is_some());
    let is_finished = || job::look_at_outputs(storage, files, manifest).is_ok_and(|report| report.is_some());
    // A retry works on what is finished.
    if config.terms.restart || !(is_under_way() || !config.retry && is_finished()) {
        return Err(error);
    }
    reuse::warn(&error);
    Ok(None)
}

/// The form of a job's dataset rows; nothing for requests.
fn described_columns(config: &Config, columns: &ResultColumns) -> Vec<String> {
    let output = &config.spec.output;
    if config.spec.is_dataset() { columns.described(output.columns.as_deref()) } else { Vec::new() }
}

/// What a job's rows are prepared with.
fn preparer(
    config: &Config,
    form: RowForm,
    grammars: Grammars,
    columns: &ResultColumns,
    (model, tokenizer, template): (LocalModel, Arc<Tokenizer>, ChatTemplate),
    memory: MemoryPlan,
) -> Preparer {
    Preparer {
        form,
        tokenizer,
        template,
        grammars: Arc::new(grammars),
        model,
        result_columns: columns.names(),
        kept_columns: config.spec.output.columns.clone(),
        defaults: config.defaults.clone(),
        max_context: memory.max_context,
        max_context_reason: memory.max_context_reason,
    }
}

/// The columns that a job must read, besides `more`; `None` for all.
fn needed_columns(form: &RowForm, policies: &[Option<Arc<Policy>>], more: Option<&[String]>) -> Option<Vec<String>> {
    let (RowForm::Dataset(steps), Some(more)) = (form, more) else { return None };
    let mut columns: Vec<String> = steps.iter().flat_map(|step| step.template.columns()).collect();
    columns.extend(policies.iter().flatten().flat_map(|policy| policy.columns().cloned()));
    columns.extend(more.iter().cloned());
    Some(columns)
}

/// Reads a job's windows.
fn window_reader(
    config: &Config,
    (source, n_rows): (Source, u64),
    (preparer, index): (Arc<Preparer>, Arc<JobIndex>),
    times: Arc<FeedTimes>,
) -> WindowReader {
    let job = &config.spec.job;
    WindowReader {
        source,
        settings: window_settings(config, &preparer.form, n_rows),
        preparer,
        index,
        window_rows: job.window_rows,
        window_bytes: job.window_bytes,
        rows_left: config.spec.input.limit.unwrap_or(u64::MAX),
        next_row: 0,
        times,
    }
}

fn window_settings(config: &Config, form: &RowForm, n_rows: u64) -> WindowSettings {
    let (has_steps, all_deterministic) = match form {
        RowForm::Requests => (false, true),
        RowForm::Dataset(steps) => (steps.iter().any(|s| !s.needs.is_empty()), steps.iter().all(|s| s.params.is_deterministic())),
    };
    // Which rows are identical must be known before later steps are.
    let dedup = config.spec.job.dedup && (!has_steps || all_deterministic);
    let shard_rows = config.shard.map(|shard| shard.rows(n_rows));
    let has_policy = config.spec.has_policy();
    WindowSettings { job_seed: config.spec.job.seed, dedup, has_steps, has_policy, shard_rows }
}

/// By step, what it uses of earlier ones.
fn needs_of(form: &RowForm) -> Vec<Vec<usize>> {
    match form {
        RowForm::Requests => Vec::new(),
        RowForm::Dataset(steps) => steps.iter().map(|step| step.needs.clone()).collect(),
    }
}

/// A job that is under way.
struct Run<'a> {
    config: &'a Config,
    storage: &'a Storage,
    files: &'a JobFiles,
    inputs: Inputs,
    outputs: Outputs,
    /// What completions must be, by step.
    policies: Vec<Option<Arc<Policy>>>,
    manifest: Manifest,
    /// The job's fingerprint as this run's settings make it.
    settings: String,
    /// The form of its dataset rows.
    columns: Vec<String>,
}

impl Run<'_> {
    fn work(
        &self,
        (open, shared): (OpenModel, Option<Shared>),
        (form, columns, grammars): (RowForm, ResultColumns, Grammars),
        (mut journal, index): (Journal, JobIndex),
        mut measured: Measured,
        load_start: Instant,
    ) -> Result<Ended> {
        let n_rows = self.manifest.rows.end - self.manifest.rows.start;
        if journal.done_rows().len() == n_rows {
            // An earlier run was killed while it wrote the final files.
            let counts = Counts { resumed: journal.done_rows().len(), ..Counts::default() };
            return self.finish(self.inputs.n_rows, journal, counts, measured);
        }
        // Loading a model takes a while: a run that is told to stop gives the job back first.
        let signals = Signals::listen(journal.leaving())?;
        let (tokenizer, local, memory) = (Arc::clone(&open.tokenizer), open.local.clone(), open.memory);
        let (runner, template) = load::load(open, &self.config.model(), &measured.meter)?;
        measured.load = load_start.elapsed();
        let needs = needs_of(&form);
        let model = (local.clone(), Arc::clone(&tokenizer), template);
        let preparer = Arc::new(preparer(self.config, form, grammars, &columns, model, memory));
        let (step_tasks, tasks) = channel();
        let (window_finished, finished_windows) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(journal.done_rows().clone());
        let checkpoints = Arc::new(Checkpoints::new(self.config.spec.engine.checkpoint_tokens, journal.take_begun())?);
        let answers = self.answers(&local.name, &tokenizer, columns);
        let progress = (Progress::new(self.config.quiet, self.config.progress_every), self.config.budget.clone());
        let index = Arc::new(index);
        let own = (Arc::clone(&preparer), Arc::clone(&index));
        let reader = self.reader(own, &journal, Arc::clone(&measured.feed))?;
        let indexed = (journal, index);
        let mut collector =
            Collector::new(indexed, (needs, step_tasks), answers, progress, n_rows, (window_finished, Arc::clone(&stop)));
        collector.judge_by(&self.policies, self.manifest.job_seed);
        let [lookup, step_lookup] = collector.share(shared, &self.manifest.model_fingerprint, self.config.quiet);
        let feed = |engine: Arc<EngineHandle>, events: Sender<Event>| {
            let (job_seed, engine_too) = (self.manifest.job_seed, Arc::clone(&engine));
            let stepper = Stepper {
                preparer: Arc::clone(&preparer),
                engine: engine_too,
                tasks,
                events: events.clone(),
                lookup: step_lookup,
                job_seed,
                checkpoints: Arc::clone(&checkpoints),
            };
            let feed = Feed {
                reader,
                done,
                engine,
                events,
                finished_windows,
                stop,
                lookup,
                estimator: Some(Arc::clone(&measured.estimator)),
                first_id: 0,
                seat: None,
                checkpoints,
            };
            Ok((feed, stepper))
        };
        let threads = Threads::start(self.config, &signals, runner, tokenizer, feed)?;
        self.collect(collector, threads, measured)
    }

    /// Reads the job's windows, but for those that the journal has.
    fn reader(&self, own: (Arc<Preparer>, Arc<JobIndex>), journal: &Journal, times: Arc<FeedTimes>) -> Result<WindowReader> {
        let form = &own.0.form;
        let read = needed_columns(form, &self.policies, self.config.spec.output.columns.as_deref());
        // What passes through beside the records need not be told in them: they say it where it can be, for the error file.
        let used = self.outputs.passed.as_ref().and_then(|_| needed_columns(form, &self.policies, Some(&[])));
        let columns = Columns { told: used.or_else(|| read.clone()), read };
        let source = Source::open(self.storage, &self.inputs.files, self.inputs.limits)?.with_columns(columns);
        let mut reader = window_reader(self.config, (source, self.inputs.n_rows), own, times);
        reader.skip_done(journal)?;
        Ok(reader)
    }

    /// Until the job is done or stopped.
    fn collect(&self, mut collector: Collector, threads: Threads, measured: Measured) -> Result<Ended> {
        let mut end = collector.run(&threads.events);
        threads.engine.abort();
        if matches!(end, Ok(End::Stopped(_))) {
            end = collector.keep_the_rest(&threads.events).and(end);
        }
        let keeping = collector.keeping.take();
        let ((journal, counts), stopped) = (collector.into_parts(), threads.end());
        let ended = self.ended(end, stopped, (journal, counts, measured));
        keeping.into_iter().for_each(Keeping::end);
        ended
    }

    /// What becomes of a run whose threads have ended; `stopped` is what the engine says.
    fn ended(
        &self,
        end: Result<End>,
        stopped: Result<()>,
        (journal, counts, measured): (Journal, Counts, Measured),
    ) -> Result<Ended> {
        if counts.stats.failed_steps > 0 {
            say(&format!("warning: {} steps of the engine failed; rows at fault are errors", counts.stats.failed_steps));
        }
        match end? {
            End::Complete(n_rows) => stopped.and_then(|()| self.finish(n_rows, journal, counts, measured)),
            End::Stopped(Stop::Signal(signal)) => stopped.map(|()| Ended::Stopped(signal)),
            End::Stopped(Stop::Cancelled) => stopped.map(|()| Ended::Cancelled),
            End::Stopped(Stop::Budget(limit)) => stopped.map(|()| Ended::Paused(limit)),
            End::Stopped(Stop::Halted) => unreachable!("nobody halts a job with an engine of its own"),
            End::EngineEnded => match stopped {
                Ok(()) => anyhow::bail!("the engine stopped before the job was done"),
                Err(error) => Err(error.context("the engine failed; what was committed stays")),
            },
        }
    }

    /// Writes the final files and the report, then removes the journal.
    fn finish(&self, n_rows: u64, mut journal: Journal, mut counts: Counts, measured: Measured) -> Result<Ended> {
        self.inputs.check_unchanged(self.storage)?;
        if self.config.shard.is_some() {
            // What it has is for the merge to publish.
            journal.commit()?;
            let n_own = self.manifest.rows.end - self.manifest.rows.start;
            let n_done = journal.done_rows().len();
            anyhow::ensure!(n_done == n_own, "{n_done} of {n_own} rows have an outcome: the inputs changed meanwhile");
            // Whoever was taken for dead before this hears of it here: what it committed since does not count.
            journal.leave()?;
            return Ok(Ended::Shard { failed: journal.totals().n_failed });
        }
        anyhow::ensure!(
            n_rows == self.inputs.n_rows,
            "the inputs had {} rows when the job began, {n_rows} when they were read: they changed meanwhile",
            self.inputs.n_rows
        );
        let report = match self.publish(n_rows, &mut journal, &mut counts, &measured) {
            // Then the next holder broke it off, or removed what it was reading.
            Err(_) if journal.standing() == Standing::Lost => return Err(Apart::TakenOver.into()),
            published => published?,
        };
        journal.remove()?;
        summary::remember(measured, &counts);
        Ok(Ended::Now(Box::new(report)))
    }

    /// Writes the final files and the report.
    fn publish(&self, n_rows: u64, journal: &mut Journal, counts: &mut Counts, measured: &Measured) -> Result<Report> {
        let start = Instant::now();
        let results = journal::finalise(journal, &self.outputs, n_rows)?;
        counts.finalise += start.elapsed();
        let report = summary::report(self, (n_rows, results), journal.totals(), counts, measured)?;
        journal.publish(&self.files.report, report.to_json()?.as_bytes())?;
        Ok(report)
    }

    fn answers(&self, model: &str, tokenizer: &Arc<Tokenizer>, columns: ResultColumns) -> Answers {
        let stamp = Stamp {
            job_fingerprint: self.manifest.job_fingerprint.clone(),
            created: self.manifest.created_unix_s,
            model: model.to_owned(),
            system_fingerprint: self.manifest.model_fingerprint.clone(),
        };
        let (plain_lines, kept_columns) = (PlainLines::new(&stamp), self.config.spec.output.columns.clone());
        Answers { stamp, plain_lines, tokenizer: Arc::clone(tokenizer), columns, kept_columns }
    }
}
