//! How far a job is and how to stop it, from wherever its store can be reached. Needs no model and no inputs.
//! Invariant: looking changes nothing.

use super::job::JobFiles;
use super::report::{Report, content_hash};
use crate::journal::{self, Life, Manifest, Overview, Shard};
use crate::storage::{Location, Storage};
use anyhow::{Context, Result};
use serde::Serialize;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long is waited for a run to stop: as long as running rows may take to end, and the time to notice.
const PATIENCE: Duration = Duration::from_mins(1);

/// The state of a shard that nobody has worked on.
const NOT_BEGUN: &str = "not begun";

/// A job, as it is shown.
#[derive(Debug, Serialize)]
struct Shown {
    /// The result file.
    job: String,
    /// `finished`, or the state of its parts: `running` if one is, else `dead` if one is, else `stopped`; `waiting`, of a batch of
    /// a server's that has not begun; `none`.
    state: &'static str,
    /// Rows of the parts that have begun, or of the finished job.
    rows: u64,
    done: u64,
    failed: u64,
    parts: Vec<Part>,
}

/// The whole job or a shard.
#[derive(Debug, Serialize)]
struct Part {
    /// `0/3`; absent if the job is not cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    shard: Option<String>,
    state: &'static str,
    rows: u64,
    done: u64,
    failed: u64,
    holder: String,
    /// Seconds since the holder's last sign of life, where it gives any.
    #[serde(skip_serializing_if = "Option::is_none")]
    silence_s: Option<u64>,
}

/// Shows a job by its result file, or a batch of a server's by its folder; whether there is one.
///
/// # Errors
/// If its store can't be read.
pub fn show(output: &str, json: bool) -> Result<bool> {
    let storage = Storage::new()?;
    let batch = BatchFiles::of(Path::new(output));
    let results = batch.as_ref().map(|batch| batch.results.to_string_lossy().into_owned());
    let files = JobFiles::of(results.as_deref().unwrap_or(output).trim_end_matches('/'), false)?;
    let mut shown = look(&storage, &files)?;
    if let Some(batch) = batch.filter(|_| shown.state == "none") {
        batch.add(&mut shown)?;
    }
    let text = if json { serde_json::to_string(&shown).context("cannot write down the state")? + "\n" } else { shown.table() };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")?;
    Ok(shown.state != "none")
}

/// Asks the runs of a job to stop and waits until they have; whether none is left.
///
/// # Errors
/// If its store can't be reached.
pub fn cancel(output: &str, say: &mut dyn FnMut(&str)) -> Result<bool> {
    let storage = Storage::new()?;
    let files = JobFiles::of(output.trim_end_matches('/'), false)?;
    let mut asked = Vec::new();
    for (shard, dir) in dirs(&storage, &files)? {
        if let Some(run) = journal::ask_to_stop(&storage, &dir)? {
            say(&format!("asked {} to stop", shard.map_or("the run".to_owned(), |shard| format!("the run of shard {shard}"))));
            asked.push(run);
        }
    }
    if asked.is_empty() {
        say("no run is at this job");
        return Ok(true);
    }
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let mut running = Vec::new();
        for mut run in asked {
            if !run.has_stopped(&storage)? {
                running.push(run);
            }
        }
        asked = running;
        if asked.is_empty() {
            say("stopped; its progress stays, and the same command goes on from there");
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    say("it still runs; it stops when it sees that it was asked");
    Ok(false)
}

/// Directories of a job and of its shards.
fn dirs(storage: &Storage, files: &JobFiles) -> Result<Vec<(Option<Shard>, Location)>> {
    let mut dirs = vec![(None, files.job.clone())];
    for shard in files.shards(storage)? {
        dirs.push((Some(shard), files.of_shard(shard)?.journal));
    }
    Ok(dirs)
}

fn look(storage: &Storage, files: &JobFiles) -> Result<Shown> {
    let (mut parts, mut manifests) = (Vec::new(), Vec::new());
    for (shard, dir) in dirs(storage, files)? {
        if let Some(found) = journal::overview(storage, &dir)? {
            manifests.push(found.manifest.clone());
            parts.push(Part::new(shard, found));
        }
    }
    let job = files.results.url.to_string();
    let text = storage.get(&files.report)?;
    let report: Option<Report> = text.as_ref().and_then(|text| serde_json::from_slice(text).ok());
    // Published, and killed while it removed the journal.
    let hash = text.map(|text| content_hash(&text));
    let is_of_report = |found: &Manifest| {
        report.as_ref().is_some_and(|report| report.job_fingerprint == found.job_fingerprint) && found.replaces != hash
    };
    if manifests.iter().all(is_of_report) {
        parts.clear();
    }
    if !parts.is_empty() {
        add_unbegun(&mut parts);
        let sum = |of: fn(&Part) -> u64| parts.iter().map(of).sum();
        let state = ["running", "dead"].into_iter().find(|state| parts.iter().any(|part| part.state == *state));
        let (rows, done, failed) = (sum(|part| part.rows), sum(|part| part.done), sum(|part| part.failed));
        return Ok(Shown { job, state: state.unwrap_or("stopped"), rows, done, failed, parts });
    }
    Ok(match report {
        Some(Report { rows, .. }) => {
            let done = rows.completed + rows.failed;
            Shown { job, state: "finished", rows: rows.total, done, failed: rows.failed, parts }
        }
        None => Shown { job, state: "none", rows: 0, done: 0, failed: 0, parts },
    })
}

/// Shards of a job that has others, if nobody has begun them.
fn add_unbegun(parts: &mut Vec<Part>) {
    let of = |part: &Part| part.shard.as_ref()?.parse::<Shard>().ok().map(|shard| shard.of);
    let Some(of) = parts.iter().filter_map(of).max() else { return };
    for shard in (0..of).map(|index| Shard { index, of }) {
        let name = shard.to_string();
        if parts.iter().all(|part| part.shard.as_ref() != Some(&name)) {
            let (shard, holder) = (Some(name), String::new());
            parts.push(Part { shard, state: NOT_BEGUN, rows: 0, done: 0, failed: 0, holder, silence_s: None });
        }
    }
    parts.sort_by_key(|part| part.shard.as_ref().and_then(|name| name.parse::<Shard>().ok()));
}

/// The files of a batch of a server's: a job that has neither journal nor report before it runs, or once the server has taken
/// note of its end.
struct BatchFiles {
    input: PathBuf,
    results: PathBuf,
    errors: PathBuf,
}

impl BatchFiles {
    /// Of a batch's folder, or of its result file.
    fn of(at: &Path) -> Option<Self> {
        let folder = if at.is_dir() { at } else { at.parent().filter(|_| at.ends_with("output.jsonl"))? };
        // Any folder may hold files of these names: a server's is known by its place, however it is written (`.` is a path, too).
        let place = if folder.as_os_str().is_empty() { Path::new(".") } else { folder }.canonicalize().ok()?;
        let name = place.file_name()?.to_str()?;
        let is_of_server = place.parent()?.ends_with("batches") && (name.starts_with("batch_") || name.starts_with("msgbatch_"));
        if !is_of_server {
            return None;
        }
        let (input, results) = (folder.join("input.jsonl"), folder.join("output.jsonl"));
        input.is_file().then(|| Self { input, results, errors: folder.join("output.errors.jsonl") })
    }

    /// What can be told of it by its files.
    fn add(&self, shown: &mut Shown) -> Result<()> {
        if self.results.is_file() {
            let (n_ok, n_failed) = (n_lines(&self.results)?, n_lines(&self.errors)?);
            (shown.state, shown.done, shown.failed) = ("finished", n_ok + n_failed, n_failed);
            shown.rows = shown.done;
        } else {
            (shown.state, shown.rows) = ("waiting", n_lines(&self.input)?);
        }
        Ok(())
    }
}

/// Lines of a file that are not blank; none if it is not there.
fn n_lines(path: &Path) -> Result<u64> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        file => file.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let (mut lines, mut line, mut n_lines) = (BufReader::new(file), Vec::new(), 0);
    while lines.read_until(b'\n', &mut line)? > 0 {
        n_lines += u64::from(!line.trim_ascii().is_empty());
        line.clear();
    }
    Ok(n_lines)
}

impl Part {
    fn new(shard: Option<Shard>, found: Overview) -> Self {
        let rows = found.manifest.rows.end - found.manifest.rows.start;
        let state = match found.life {
            Life::Running => "running",
            Life::Dead => "dead",
            Life::Stopped if found.n_done == rows => "done",
            Life::Stopped => "stopped",
        };
        Self {
            shard: shard.map(|shard| shard.to_string()),
            state,
            rows,
            done: found.n_done,
            failed: found.n_failed,
            holder: found.holder,
            silence_s: found.silence.map(|silence| silence.as_secs()),
        }
    }
}

impl Shown {
    fn table(&self) -> String {
        let Self { job, state, rows, done, failed, parts } = self;
        if *state == "none" {
            return format!("{job}: no job\n");
        }
        let n_begun = parts.iter().filter(|part| part.state != NOT_BEGUN).count();
        let which = if n_begun < parts.len() { format!(" of {n_begun} of {} shards", parts.len()) } else { String::new() };
        let mut table = format!("{job}: {state}, {done} of {rows} rows{which}, {failed} errors\n");
        for Part { shard, state, rows, done, failed, holder, silence_s } in parts {
            let name = shard.as_ref().map_or("run".to_owned(), |shard| format!("shard {shard}"));
            if *state == NOT_BEGUN {
                writeln!(table, "  {name}: {NOT_BEGUN}").expect("memory takes text");
                continue;
            }
            let silence = silence_s.map(|s| format!(", last sign of life {s} s ago")).unwrap_or_default();
            let line = writeln!(table, "  {name}: {state}, {done} of {rows} rows, {failed} errors; {holder}{silence}");
            line.expect("memory takes text");
        }
        table
    }
}
