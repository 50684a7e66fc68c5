//! A job on an engine that others use too: checked before any work, run, and ended early where that is asked for. The same
//! rows, plan and journal as `valar run` has: the same bits, and what was committed stays whatever ends the process.
//! Invariant: of a job that has ended, every row stands in exactly one of its files, once.

mod begun;

use self::begun::Begun;
use super::answer::Answers;
use super::budget::Budget;
use super::collect::{Collector, End, Event};
use super::columns::ResultColumns;
use super::feed::Feed;
use super::index::{JobIndex, id_key};
use super::job::{self, Begin, JobFiles};
use super::progress::{Progress, say};
use super::referenced::Referenced;
use super::rows::{FeedTimes, WindowReader};
use super::window::WindowSettings;
use crate::engine::handle::{EngineHandle, panic_message};
use crate::engine::{Due, EngineStats, Finished};
use crate::format::openai::answer::Stamp;
use crate::format::openai::{Endpoint, PlainLines, parse_object};
use crate::format::{self, Limits, RawRow, Source};
use crate::journal::{self, Journal, Manifest, Outputs, Record, Terms};
pub use crate::journal::{Committed, Totals};
use crate::outcome::{ErrorCode, RowError};
use crate::prepare::sequences::n_computed;
use crate::prepare::{Origin, Preparer, Prompt, RowForm};
use crate::storage::{Location, Storage};
use crate::window::turns::Share;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};

/// Rows that are planned together, and their bytes: fewer than those of a job that has the machine for itself.
const WINDOW_ROWS: usize = 8192;
const WINDOW_BYTES: usize = 16 << 20;
/// Most completions of a row.
const MAX_ROW_SEQUENCES: usize = 1024;
/// Longest line.
const MAX_LINE_BYTES: usize = 16 << 20;

/// A job of Batch lines, in a folder of its own: `input.jsonl`, or an object that lies elsewhere, becomes `output.jsonl` and `output.errors.jsonl`, by way of
/// the journal `output.job`.
#[derive(Debug, Clone)]
pub struct HostedJob {
    /// The folder.
    pub folder: PathBuf,
    /// Its name, which the ids of its answers derive from.
    pub name: String,
    /// What all of its rows ask for.
    pub endpoint: Endpoint,
    /// When it began, unix seconds.
    pub created_unix_s: u64,
    /// What its answers call the model.
    pub model: String,
    /// Its input, if that lies elsewhere.
    pub input: Option<Referenced>,
}

/// Where it runs.
pub struct Seat {
    /// What its rows are prepared with.
    pub preparer: Arc<Preparer>,
    /// What computes; `None` for a job that is only to be ended.
    pub engine: Option<Arc<EngineHandle>>,
    /// What the bits depend on.
    pub fingerprint: String,
    /// The first of the names that its sequences may have.
    pub first_id: u64,
    /// What its rows share prefixes in.
    pub stream: u32,
    /// When they should all be done.
    pub due: Due,
    /// Whose it is.
    pub share: Share,
}

/// A row that can't be run.
#[derive(Debug, Clone)]
pub struct Fault {
    /// In the file, from 1.
    pub line: u64,
    /// What is wrong.
    pub error: RowError,
}

/// What a check found.
#[derive(Debug)]
pub struct Checked {
    /// Rows, blank lines not counted.
    pub n_rows: u64,
    /// Tokens that those which can be run may come to at most.
    pub n_tokens: u64,
    /// The first faults.
    pub faults: Vec<Fault>,
}

/// Tells a job what happens.
#[derive(Clone)]
pub struct Link(Sender<Event>);

/// Where it hears that.
pub struct Inbox {
    link: Link,
    events: Receiver<Event>,
}

impl Inbox {
    /// Of a new job.
    pub fn new() -> (Link, Self) {
        let (sender, events) = channel();
        let link = Link(sender);
        (link.clone(), Self { link, events })
    }
}

impl Link {
    /// The engine has finished these.
    pub fn step(&self, finished: Vec<Finished>, stats: EngineStats) {
        self.tell(Event::Finished(finished, stats));
    }

    /// The engine has ended.
    pub fn engine_ended(&self) {
        self.tell(Event::EngineEnded);
    }

    /// It should end now.
    pub fn halt(&self) {
        self.tell(Event::Halt);
    }

    /// A job that has ended needs to hear nothing.
    fn tell(&self, event: Event) {
        let _nobody_listens = self.0.send(event);
    }
}

/// What becomes of the rows of a job that is ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Nothing: it is gone on with later.
    Pause,
    /// They are errors, with this code and message.
    Rest(&'static str, String),
}

/// A job that has ended.
pub struct Ended {
    /// Rows and tokens.
    pub totals: Totals,
    /// Whether every row was run.
    pub is_whole: bool,
    journal: Journal,
}

impl Ended {
    /// Removes the journal: somebody has taken note of the files.
    ///
    /// # Errors
    /// The disk's.
    pub fn forget(self) -> Result<()> {
        self.journal.remove()
    }
}

/// The results that a job in a folder has committed so far; `None` if none is under way there.
///
/// # Errors
/// The disk's.
pub fn committed(folder: &Path) -> Result<Option<Committed>> {
    let files = JobFiles::of(&folder.join("output.jsonl").to_string_lossy(), false)?;
    journal::committed(&Storage::new()?, &files.journal)
}

/// Publishes the results and errors that a job in a folder has committed, for it will not be gone on with; what they came to,
/// or how the journal is damaged, which no other try would mend.
///
/// # Errors
/// The disk's.
pub fn publish_committed(folder: &Path) -> Result<Result<Totals>> {
    let publish = || {
        let files = JobFiles::of(&folder.join("output.jsonl").to_string_lossy(), false)?;
        let found = journal::committed(&Storage::new()?, &files.journal)?;
        found.map_or(Ok(Totals::default()), |found| found.publish(&files.results, &files.errors))
    };
    match publish() {
        Err(error) if journal::is_damaged(&error) => Ok(Err(error)),
        published => published.map(Ok),
    }
}

impl HostedJob {
    fn files(&self) -> Result<JobFiles> {
        JobFiles::of(&self.folder.join("output.jsonl").to_string_lossy(), false)
    }

    /// Where its input is to be put, if it does not lie elsewhere.
    pub fn input_path(&self) -> PathBuf {
        self.folder.join("input.jsonl")
    }

    fn input_at(&self) -> Result<Location> {
        self.input.as_ref().map_or_else(|| Location::parse(&self.input_path().to_string_lossy()), |input| Ok(input.at()))
    }

    /// Asked before anything is read and again when all was: what was read is of the version that the job was accepted with.
    fn check_input(&self) -> Result<()> {
        Ok(self.input.as_ref().map_or(Ok(()), Referenced::check)?)
    }

    fn source(&self, storage: &Storage) -> Result<Source> {
        let limits = Limits { max_row_bytes: MAX_LINE_BYTES };
        Source::open(storage, &[self.input_at()?], limits)
    }

    fn reader(&self, storage: &Storage, preparer: &Arc<Preparer>, index: &Arc<JobIndex>) -> Result<WindowReader> {
        ensure!(matches!(preparer.form, RowForm::Requests), "a server's rows are requests");
        Ok(WindowReader {
            source: self.source(storage)?,
            preparer: Arc::clone(preparer),
            index: Arc::clone(index),
            settings: WindowSettings { job_seed: 0, dedup: true, has_steps: false, has_policy: false, shard_rows: None },
            window_rows: WINDOW_ROWS,
            window_bytes: WINDOW_BYTES,
            rows_left: u64::MAX,
            next_row: 0,
            times: Arc::new(FeedTimes::default()),
        })
    }

    /// Reads and prepares every row, and runs none. Gives at most `max_faults` faults and ends with the last of them, unless the job
    /// `keeps_faults`: then its other rows run, and are counted. Stops after `max_rows` rows.
    ///
    /// # Errors
    /// The disk's.
    pub fn check(&self, preparer: &Arc<Preparer>, max_rows: u64, (max_faults, keeps_faults): (usize, bool)) -> Result<Checked> {
        self.check_input()?;
        let storage = Storage::new()?;
        let index = Arc::new(JobIndex::new(&self.folder)?);
        let mut reader = self.reader(&storage, preparer, &index)?;
        let (mut faults, mut n_tokens) = (Vec::new(), 0);
        while let Some(rows) = reader.read()? {
            for row in reader.prepare(rows)? {
                let error = match (row.prepared.prompts, row.prepared.origin) {
                    (Err(error), _) => error,
                    (Ok(_), Origin::Request { endpoint, .. }) if endpoint != self.endpoint => {
                        let message = format!("is not the batch's endpoint, {}", self.endpoint.path());
                        RowError::field(ErrorCode::UrlMismatch, "url", message)
                    }
                    (Ok(prompts), _) if prompts.iter().map(n_computed).sum::<usize>() > MAX_ROW_SEQUENCES => {
                        let message = format!("prompts times n is more than {MAX_ROW_SEQUENCES}");
                        RowError::field(ErrorCode::InvalidValue, "body.n", message)
                    }
                    (Ok(prompts), _) => {
                        n_tokens += prompts.iter().map(Prompt::most_tokens).sum::<u64>();
                        continue;
                    }
                };
                if faults.len() < max_faults {
                    faults.push(Fault { line: row.line, error });
                }
            }
            if (faults.len() >= max_faults && !keeps_faults) || reader.n_rows() > max_rows {
                break;
            }
        }
        self.check_input()?;
        Ok(Checked { n_rows: reader.n_rows(), n_tokens, faults })
    }

    /// Rows that were completed and rows that failed, as the journal has them.
    ///
    /// # Errors
    /// The disk's, or the journal's.
    pub fn done(&self) -> Result<(u64, u64)> {
        let storage = Storage::new()?;
        let found = journal::overview(&storage, &self.files()?.journal)?;
        Ok(found.map_or((0, 0), |found| (found.n_done - found.n_failed, found.n_failed)))
    }

    /// Runs the job, or goes on with it, until every row has its outcome, or until it is halted: then `ending` says what
    /// becomes of the rest. `None` if it is to be gone on with. `progress` is told what is done, with that of earlier runs.
    ///
    /// # Errors
    /// The disk's, or the engine's.
    pub fn run(
        &self,
        seat: &Seat,
        inbox: Inbox,
        ending: &dyn Fn() -> Option<Ending>,
        mut progress: impl FnMut(Totals) + Send + 'static,
    ) -> Result<Option<Ended>> {
        let storage = Storage::new()?;
        let files = self.files()?;
        self.check_input()?;
        let found = format::inspect(&storage, &self.input_at()?)?;
        let Begun { manifest, preparer, end } = self.began_as(&storage, &files, seat, &found)?;
        let ending = || end.clone().or_else(ending);
        let (manifest, journal, index) = match job::begin(&storage, &files, manifest, (None, &Terms::default(), false))? {
            Begin::Work(manifest, journal, index) => (manifest, *journal, Arc::new(*index)),
            Begin::Done(_) => anyhow::bail!("{} holds another job's report", self.folder.display()),
        };
        journal.warnings.iter().for_each(|warning| say(&format!("warning: {warning}")));
        // Before anything runs: what was done may be all that it may cost.
        progress(journal.totals());
        let mut is_whole = true;
        let is_done = journal.done_rows().len() == found.n_rows;
        let mut journal = if is_done || ending().is_some() {
            journal
        } else {
            let mut reader = self.reader(&storage, &preparer, &index)?;
            reader.skip_done(&journal)?;
            self.work(seat, inbox, (journal, index, reader), (&manifest, found.n_rows), progress)?
        };
        if journal.done_rows().len() < found.n_rows {
            match ending() {
                Some(Ending::Rest(code, message)) => {
                    is_whole = false;
                    self.give_up(&storage, &manifest, &mut journal, (code, &message))?;
                }
                Some(Ending::Pause) | None => return Ok(None),
            }
        }
        self.check_input()?;
        let (results, errors) = (files.results, files.errors);
        let outputs = Outputs { results, parts: None, errors, passed: None, schema: None, columns: Vec::new() };
        journal::finalise(&mut journal, &outputs, found.n_rows)?;
        Ok(Some(Ended { totals: journal.totals(), is_whole, journal }))
    }

    fn stamp(&self, manifest: &Manifest) -> Stamp {
        Stamp {
            job_fingerprint: manifest.job_fingerprint.clone(),
            created: manifest.created_unix_s,
            model: self.model.clone(),
            system_fingerprint: manifest.model_fingerprint.clone(),
        }
    }

    /// Computes what is left, until it is done or halted.
    fn work(
        &self,
        seat: &Seat,
        inbox: Inbox,
        (journal, index, reader): (Journal, Arc<JobIndex>, WindowReader),
        (manifest, n_rows): (&Manifest, u64),
        mut progress: impl FnMut(Totals) + Send + 'static,
    ) -> Result<Journal> {
        let engine = seat.engine.as_ref().context("a job that is to be ended would have to run")?;
        let stamp = self.stamp(manifest);
        let answers = Answers {
            plain_lines: PlainLines::new(&stamp),
            stamp,
            tokenizer: Arc::clone(&seat.preparer.tokenizer),
            columns: ResultColumns::of(&RowForm::Requests, ""),
            kept_columns: None,
        };
        let told = Progress::Told(Box::new(move |snapshot| progress(snapshot.totals)));
        let stop = Arc::new(AtomicBool::new(false));
        let (window_finished, finished_windows) = channel();
        let (step_tasks, _no_steps) = channel();
        let done = Arc::new(journal.done_rows().clone());
        let feed = Feed {
            reader,
            done,
            engine: Arc::clone(engine),
            events: inbox.link.0.clone(),
            finished_windows,
            stop: Arc::clone(&stop),
            lookup: None,
            estimator: None,
            first_id: seat.first_id,
            seat: Some((seat.stream, seat.due, seat.share)),
            checkpoints: Arc::default(),
        };
        let ends = (window_finished, Arc::clone(&stop));
        let mut collector =
            Collector::new((journal, index), (Vec::new(), step_tasks), answers, (told, Budget::default()), n_rows, ends);
        let link = inbox.link;
        let (own, stream, has_ended) = (Arc::clone(engine), seat.stream, Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("batch-feed".into()).spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| feed.run()));
            let result =
                result.unwrap_or_else(|panic| Err(anyhow::anyhow!("reading the rows panicked: {}", panic_message(&*panic))));
            // What was submitted when the job had ended already, nobody waits for.
            if has_ended.load(SeqCst) {
                own.end_stream(stream);
            }
            link.tell(Event::FeedEnded(result));
        });
        // It ends by itself, at the latest when the engine takes the next row: nobody waits for that.
        drop(thread.context("cannot start the feed thread")?);
        let end = collector.run(&inbox.events);
        stop.store(true, SeqCst);
        engine.end_stream(seat.stream);
        let (journal, _) = collector.into_parts();
        match end? {
            End::Complete(n_read) => {
                ensure!(n_read == n_rows, "{} changed while it was read", self.input_path().display());
                Ok(journal)
            }
            End::Stopped(_) => Ok(journal),
            End::EngineEnded => anyhow::bail!("the engine has ended"),
        }
    }

    /// Makes errors of the rows that have no outcome.
    fn give_up(&self, storage: &Storage, manifest: &Manifest, journal: &mut Journal, why: (&str, &str)) -> Result<()> {
        let mut source = self.source(storage)?;
        let stamp = self.stamp(manifest);
        let done = journal.done_rows().clone();
        while let Some(rows) = source.next_chunk(WINDOW_ROWS, WINDOW_BYTES)? {
            for row in rows.iter().filter(|row| !done.contains(row.row_idx)) {
                let line = never_run(&stamp, row, why);
                let (id, line) = (line["custom_id"].as_str().map(id_key), line.to_string().into());
                let (row, tokens) = (row.row_idx, 0);
                let record = Record {
                    row,
                    ok: false,
                    prompt_tokens: tokens,
                    completion_tokens: tokens,
                    cached_tokens: tokens,
                    key: None,
                    id,
                    line,
                };
                journal.append(&record)?;
            }
        }
        journal.commit()
    }
}

/// The error line of a row that was never run.
fn never_run(stamp: &Stamp, row: &RawRow, (code, message): (&str, &str)) -> Value {
    let custom_id = row.text().ok().and_then(|text| parse_object(text).ok()?.remove("custom_id"));
    json!({
        "id": format!("batch_req_{}", stamp.row_id(row.row_idx)),
        "custom_id": custom_id,
        "response": null,
        "error": {"code": code, "message": message},
        "line": row.line,
    })
}
