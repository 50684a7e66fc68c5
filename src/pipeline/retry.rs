//! Runs only the rows of a job that ended as errors. Of a finished job, whose journal is gone, a job is made again: its
//! journal begins with the lines of the published results, and only the other rows are computed; then all of it is
//! published as ever. An unfinished job forgets its errors and goes on. Invariant: a row that completed keeps its line.

use super::index::{JobIndex, Replay, custom_id, id_key};
use super::job::{self, Begin, Inputs, JobFiles};
use super::progress::say;
use super::report::{Report, content_hash};
use super::{JobEnd, run_job, show};
use crate::config::Config;
use crate::format::{Format, Records, Source};
use crate::journal::{self, JobDir, Journal, Manifest, Record, RowSet};
use crate::outcome::Usage;
use crate::storage::{Location, Storage};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Runs a job's errors again and shows what came of it.
///
/// # Errors
/// As for a run; and if there is no such job, or its inputs are others.
pub fn retry(config: &Config) -> Result<JobEnd> {
    let storage = Storage::new()?;
    let mut files = JobFiles::new(&storage, &config.spec.output)?;
    if let Some(shard) = config.shard {
        files = files.of_shard(shard)?;
    }
    let end = run_job(config, &storage, &files, Arc::default())?;
    show(&end, config, &storage, &files)
}

/// What a row's lines are read by.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lines<'a> {
    /// Batch output lines.
    Requests,
    /// Dataset rows: the names of their columns of usage and of errors.
    Dataset {
        /// Each with prompt, generated and cached tokens.
        usage: &'a [String],
        /// With file and line.
        error: &'a str,
    },
}

/// A job whose errors are to be run again.
pub(super) struct Retry<'a> {
    pub(super) storage: &'a Storage,
    pub(super) files: &'a JobFiles,
    pub(super) inputs: &'a Inputs,
    pub(super) lines: Lines<'a>,
    /// The form of its dataset rows, as in a report.
    pub(super) columns: &'a [String],
    /// The columns of the results that came from records, if others pass through.
    pub(super) made: Option<Vec<String>>,
    pub(super) config: &'a Config,
}

impl Retry<'_> {
    /// Begins or goes on with it, in the place of [`job::begin`].
    pub(super) fn begin(&self, manifest: Manifest) -> Result<Begin> {
        let Self { storage, files, config, .. } = *self;
        let dir = JobDir::claim(storage, &files.journal, &config.terms)?;
        let dir = job::alone(storage, files, dir, (config.shard, &config.terms))?;
        match dir.manifest()? {
            Some(earlier) if earlier.retries.is_none() => {
                job::same(&earlier, &manifest, files)?;
                if !dir.has_forgotten() || self.is_done_shard()? {
                    dir.forget_errors()?;
                } else {
                    say("this retry goes on; rows that became errors since it began stay errors until the job is finished");
                }
                job::resume(dir, files, earlier, config.shard.is_some())
            }
            Some(earlier) => {
                let finished = self.finished(&manifest)?;
                self.go_on(dir, earlier, manifest, finished)
            }
            None => match self.finished(&manifest) {
                Ok((report, _)) if report.rows.failed == 0 => dir.remove().map(|()| Begin::Done(Box::new(report))),
                Ok(finished) => self.take_up(dir, manifest, finished),
                Err(refusal) => dir.remove().and(Err(refusal)),
            },
        }
    }

    /// Makes a job of a finished one.
    fn take_up(&self, dir: JobDir, manifest: Manifest, (report, hash): (Report, String)) -> Result<Begin> {
        let fits = self.same_columns(&report).and_then(|()| self.files.check_results(self.storage, &report));
        if let Err(refusal) = fits {
            return dir.remove().and(Err(refusal));
        }
        let errors = self.find_errors(&report)?;
        let index = self.index(&manifest, &report, Some(&errors))?;
        let n_errors = manifest.rows.clone().filter(|&row| errors.contains(row)).count() as u64;
        let manifest = Manifest { replaces: Some(hash), retries: Some(n_errors), ..of_finished(manifest, &report) };
        let journal = job::create(self.storage, self.files, dir, &manifest, self.config.shard)?;
        let replay = self.replay(&index);
        let journal = self.take_over(&errors, manifest.rows.clone(), journal, replay)?;
        Ok(Begin::Work(Box::new(manifest), Box::new(journal), Box::new(index)))
    }

    /// Goes on with what [`Retry::take_up`] has made.
    fn go_on(&self, dir: JobDir, earlier: Manifest, now: Manifest, (report, hash): (Report, String)) -> Result<Begin> {
        // As long as nothing was published the results are still the finished job's.
        let is_old = earlier.replaces.as_ref() == Some(&hash);
        let errors = if is_old { Some(self.find_errors(&report)?) } else { None };
        let index = self.index(&now, &report, errors.as_ref())?;
        job::same(&earlier, &Manifest { retries: earlier.retries, ..of_finished(now, &report) }, self.files)?;
        if self.is_done_shard()? {
            dir.forget_errors()?;
        }
        let mut replay = self.replay(&index);
        let mut journal =
            Journal::resume(dir, &earlier, &mut |noted, place| replay.note((noted.row, noted.ok), (noted.id, noted.key), place))?;
        let n_taken = earlier.rows.end - earlier.rows.start - earlier.retries.unwrap_or(0);
        let is_taken_over = journal.done_rows().len() >= n_taken;
        match errors {
            // A shard must know of the others' ids, too.
            Some(errors) if !is_taken_over || self.config.shard.is_some() => {
                if !is_taken_over {
                    self.files.check_results(self.storage, &report)?;
                }
                journal = self.take_over(&errors, earlier.rows.clone(), journal, replay)?;
            }
            None if !is_taken_over => {
                bail!("the results have been replaced since this retry began; {} is of no use any more", self.files.journal.url)
            }
            _ => replay.flush()?,
        }
        Ok(Begin::Work(Box::new(earlier), Box::new(journal), Box::new(index)))
    }

    /// Refuses to put lines of another form beside those that stay.
    fn same_columns(&self, report: &Report) -> Result<()> {
        let is_same = report.columns.is_empty() || report.columns == self.columns;
        ensure!(
            is_same,
            "{} has rows of another form, which stay as they are: {}; these settings make {}",
            self.files.results.url,
            report.columns.join(", "),
            self.columns.join(", ")
        );
        Ok(())
    }

    /// `now`: the job as these settings make it. Rows that are run with others than the rest share no completion with those;
    /// where it is not known which rows these are, with none.
    fn index(&self, now: &Manifest, report: &Report, errors: Option<&RowSet>) -> Result<JobIndex> {
        let is_alike = report.makers().iter().all(|maker| maker.settings == now.job_fingerprint);
        let sharing = if is_alike { None } else { Some(errors.cloned().unwrap_or_default()) };
        JobIndex::keeping(&self.files.scratch_folder(), sharing)
    }

    fn replay<'i>(&self, index: &'i JobIndex) -> Replay<'i> {
        let mut replay = Replay::new(index, self.config.shard.is_some());
        // Any of its rows may be the first of a content: it is not known which.
        replay.all_places = true;
        replay
    }

    /// Whether a shard has an outcome for each of its rows, and waits for the merge: then its errors are run once more.
    fn is_done_shard(&self) -> Result<bool> {
        if self.config.shard.is_none() {
            return Ok(false);
        }
        let found = journal::overview(self.storage, &self.files.journal)?;
        Ok(found.is_some_and(|found| found.n_done == found.manifest.rows.end - found.manifest.rows.start))
    }

    /// The finished job's report, and its hash.
    fn finished(&self, manifest: &Manifest) -> Result<(Report, String)> {
        let Self { storage, files, inputs, .. } = *self;
        let text = storage.get(&files.report)?;
        let text = text.with_context(|| format!("{}: there is no finished job", files.report.url))?;
        let report: Report = serde_json::from_slice(&text).with_context(|| format!("{} is no report", files.report.url))?;
        let is_same = report.job_fingerprint == manifest.job_fingerprint || report.inputs == manifest.inputs_hash();
        ensure!(
            is_same && report.rows.total == inputs.n_rows,
            "{} is of other inputs: rows that completed can't be told from those that are to be run again",
            files.report.url
        );
        Ok((report, content_hash(&text)))
    }

    /// The rows in the error file.
    fn find_errors(&self, report: &Report) -> Result<RowSet> {
        let Self { storage, files, inputs, lines, .. } = *self;
        let mut errors = ErrorLines {
            records: Records::open(storage, std::slice::from_ref(&files.errors), None)?,
            read: VecDeque::new(),
            lines,
        };
        let mut found = RowSet::default();
        let mut start = 0;
        let mut next = errors.next()?;
        for (at, described) in inputs.files.iter().zip(&inputs.described) {
            let is_twice = inputs.files.iter().filter(|other| other.is(at)).count() > 1;
            let mut numbers = LineNumbers::open(storage, at, inputs)?;
            while let Some((file, line)) = next.as_ref().filter(|(file, _)| *file == *at.url) {
                ensure!(!is_twice, "{file} is an input twice: which of its rows failed can't be told");
                let row = numbers.row(*line)?.filter(|&row| row < described.n_rows);
                let row = row.with_context(|| format!("{}: {file} has no row at line {line}", files.errors.url))?;
                found.insert(start + row);
                next = errors.next()?;
            }
            start += described.n_rows;
        }
        if let Some((file, line)) = next {
            bail!("{}: {file}, line {line}, is no row of an input, or out of order", files.errors.url);
        }
        ensure!(
            found.len() == report.rows.failed,
            "{} has {} rows, the report says {}",
            files.errors.url,
            found.len(),
            report.rows.failed
        );
        Ok(found)
    }

    /// Journals the published results of `own` rows.
    fn take_over(&self, errors: &RowSet, own: Range<u64>, mut journal: Journal, mut replay: Replay<'_>) -> Result<Journal> {
        let Self { storage, files, inputs, lines, .. } = *self;
        let mut records = Records::open(storage, &files.result_files(storage)?, self.made.as_deref())?;
        let mut rows = (0..inputs.n_rows).filter(|&row| !errors.contains(row));
        while let Some(chunk) = records.next_chunk()? {
            for text in chunk {
                let row = rows.next().with_context(|| format!("{} has more rows than completed", files.results.url))?;
                if own.contains(&row) && journal.done_rows().contains(row) {
                    continue;
                }
                let line = std::str::from_utf8(&text).with_context(|| format!("{} is not UTF-8", files.results.url))?;
                let id = match lines {
                    Lines::Requests => custom_id(row, line)?.as_deref().map(id_key),
                    Lines::Dataset { .. } => None,
                };
                if !own.contains(&row) {
                    replay.note_foreign(row, id)?;
                    continue;
                }
                let usage = lines.usage(line).with_context(|| format!("{}, row {row}", files.results.url))?;
                let Usage { prompt_tokens, completion_tokens, cached_tokens } = usage;
                let line = line.into();
                let record = Record { row, ok: true, prompt_tokens, completion_tokens, cached_tokens, key: None, id, line };
                if let Some(place) = journal.append(&record)? {
                    replay.note((row, true), (id, None), place)?;
                }
            }
        }
        if let Some(row) = rows.next() {
            bail!("{} has no line of row {row} (counted from 0)", files.results.url);
        }
        journal.commit()?;
        replay.flush()?;
        Ok(journal)
    }
}

/// The finished job's, whatever it is computed with now: rows keep their ids.
fn of_finished(manifest: Manifest, report: &Report) -> Manifest {
    Manifest { job_fingerprint: report.job_fingerprint.clone(), created_unix_s: report.created, ..manifest }
}

/// File and line of each row of an error file.
struct ErrorLines<'a> {
    records: Records,
    read: VecDeque<bytes::Bytes>,
    lines: Lines<'a>,
}

impl ErrorLines<'_> {
    fn next(&mut self) -> Result<Option<(String, u64)>> {
        while self.read.is_empty() {
            let Some(chunk) = self.records.next_chunk()? else { return Ok(None) };
            self.read = chunk.into();
        }
        let Some(text) = self.read.pop_front() else { return Ok(None) };
        let line: Map<String, Value> = serde_json::from_slice(&text).context("an error line is no object")?;
        let place = match self.lines {
            Lines::Requests => Some(&line),
            Lines::Dataset { error, .. } => line.get(error).and_then(Value::as_object),
        };
        let file = place.and_then(|place| place.get("file")?.as_str());
        let number = place.and_then(|place| place.get("line")?.as_u64());
        let place = file.zip(number).context("an error line does not say where its row was")?;
        Ok(Some((place.0.to_owned(), place.1)))
    }
}

/// Which row of a file has which line.
struct LineNumbers {
    is_parquet: bool, // lines are rows
    source: Source,
    read: VecDeque<(u64, u64)>, // row and line
}

impl LineNumbers {
    fn open(storage: &Storage, at: &Location, inputs: &Inputs) -> Result<Self> {
        let is_parquet = Format::of(at)? == Format::Parquet;
        Ok(Self { is_parquet, source: Source::open(storage, std::slice::from_ref(at), inputs.limits)?, read: VecDeque::new() })
    }

    /// The row, counted from 0, at a line; lines must be asked for in order.
    fn row(&mut self, line: u64) -> Result<Option<u64>> {
        if self.is_parquet {
            return Ok(line.checked_sub(1));
        }
        loop {
            while let Some((row, number)) = self.read.pop_front() {
                if number >= line {
                    return Ok((number == line).then_some(row));
                }
            }
            let Some(rows) = self.source.next_chunk(4096, 8 << 20)? else { return Ok(None) };
            self.read = rows.iter().map(|row| (row.row_idx, row.line)).collect();
        }
    }
}

impl Lines<'_> {
    /// What a published line says of its tokens.
    fn usage(self, line: &str) -> Result<Usage> {
        let line: Map<String, Value> = serde_json::from_str(line).context("a line is no object")?;
        let tokens = |usage: &Value, names: &[&str]| {
            names.iter().find_map(|name| usage.pointer(name)?.as_u64()).unwrap_or(0).try_into().unwrap_or(u32::MAX)
        };
        let of = |usage: &Value| Usage {
            prompt_tokens: tokens(usage, &["/prompt_tokens", "/input_tokens"]),
            completion_tokens: tokens(usage, &["/completion_tokens", "/output_tokens"]),
            cached_tokens: tokens(
                usage,
                &["/cached_tokens", "/prompt_tokens_details/cached_tokens", "/input_tokens_details/cached_tokens"],
            ),
        };
        Ok(match self {
            Self::Requests => {
                let usage = line.get("response").and_then(|response| response.pointer("/body/usage"));
                of(usage.context("a line is none of a completed request")?)
            }
            Self::Dataset { usage, .. } => {
                usage.iter().filter_map(|name| line.get(name)).fold(Usage::default(), |sum, usage| sum.plus(of(usage)))
            }
        })
    }
}
