//! `valar bench`: runs a workload file as a job whose rows are all computed, and shows its report.

use super::job::JobFiles;
use super::progress::say;
use super::{Ended, JobEnd, run_job, spec};
use crate::config::Config;
use crate::storage::Storage;
use anyhow::{Context, Result};
use std::io::Write;
use tempfile::TempDir;
use toml::Value;

/// A workload that is ready to run.
pub struct Workload {
    config: Config,
    /// Where results go that nobody wants.
    _folder: TempDir,
}

impl Workload {
    /// The workload that `overrides` (pipeline keys) describe; results are thrown away unless `output` names a file.
    ///
    /// # Errors
    /// Settings that make no sense.
    pub fn new(mut overrides: Vec<(String, Value)>, output: Option<String>) -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let output = output.unwrap_or_else(|| folder.path().join("out.jsonl").display().to_string());
        overrides.push(("output.file".into(), Value::String(output)));
        let config = Config::new(spec::load(None, &overrides)?, false, true)?;
        Ok(Self { config, _folder: folder })
    }

    /// Runs it and prints a table, or one JSON object.
    ///
    /// # Errors
    /// As a job's.
    pub fn run(&self, json: bool) -> Result<JobEnd> {
        let storage = Storage::new()?;
        let end = run_job(&self.config, &storage, &JobFiles::new(&storage, &self.config.spec.output)?)?;
        if let Ended::Now(report) | Ended::Before(report) = &end {
            if json {
                let text = serde_json::to_string(report).context("cannot write down the report")?;
                writeln!(std::io::stdout(), "{text}")?;
            } else {
                say(&format!("{} on {}", report.model, report.device));
                writeln!(std::io::stdout(), "{}", report.table().trim_end())?;
            }
        }
        Ok(end.code())
    }
}
