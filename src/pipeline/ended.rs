//! How a job ended, and how it is told. Invariant: what is said to have been written is there.

use super::job::JobFiles;
use super::progress::say;
use super::report::Report;
use crate::config::Config;
use crate::format::{Compression, Format};
use crate::storage::Storage;
use anyhow::Result;

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
    /// `valar cancel` stopped it; it can be continued.
    Cancelled,
    /// Its budget is spent; it can be continued.
    Paused,
}

/// How a job ended, with what there is to say of it.
pub(crate) enum Ended {
    /// Now.
    Now(Box<Report>),
    /// In an earlier run, whose report this is.
    Before(Box<Report>),
    /// By a signal, not finished.
    Stopped(u8),
    /// By `valar cancel`, not finished.
    Cancelled,
    /// By this limit, not finished.
    Paused(String),
    /// Every row of a shard has its outcome.
    Shard {
        /// Rows that failed.
        failed: u64,
    },
}

impl Ended {
    pub(crate) fn code(&self) -> JobEnd {
        match self {
            Self::Now(report) | Self::Before(report) => JobEnd::Finished { failed: report.rows.failed },
            Self::Stopped(signal) => JobEnd::Stopped { signal: *signal },
            Self::Cancelled => JobEnd::Cancelled,
            Self::Paused(_) => JobEnd::Paused,
            Self::Shard { failed } => JobEnd::Finished { failed: *failed },
        }
    }
}

/// Says how a job ended.
pub(super) fn show(end: &Ended, config: &Config, storage: &Storage, files: &JobFiles) -> Result<JobEnd> {
    let tell = |line: &str| {
        if !config.quiet {
            say(line);
        }
    };
    match end {
        Ended::Shard { failed } => {
            tell(&format!("this shard is done, {failed} rows are errors; valar merge writes the results of all"));
        }
        Ended::Stopped(_) | Ended::Cancelled => tell("stopped; run the same command again to go on from here"),
        Ended::Paused(limit) => tell(&format!("paused: {limit} is reached; the same command goes on from here")),
        Ended::Before(_) if config.retry => tell("no row of this job is an error: there is nothing to run again"),
        Ended::Before(_) => tell("finished by an earlier run; --restart does it again"),
        Ended::Now(report) => tell(report.table().trim_end()),
    }
    if let Ended::Before(report) | Ended::Now(report) = end {
        if let Some(line) = first_line(storage, files)? {
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
    let Some(at) = files.first_result(storage)? else { return Ok(None) };
    if Format::of(&at)? != Format::Jsonl(Compression::None) {
        return Ok(None);
    }
    let n_bytes = storage.open(&at)?.n_bytes().min(SHOWN_BYTES);
    if n_bytes == 0 {
        return Ok(None);
    }
    let text = storage.get_range(&at, 0..n_bytes)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().next().map(|line| if line.len() < text.len() { line.to_owned() } else { format!("{line}…") }))
}
