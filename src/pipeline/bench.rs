//! `valar bench`: runs a workload file as a job whose rows are all computed, and shows its report.

use super::job::JobFiles;
use super::meter::Meter;
use super::progress::say;
use super::spec::EngineKind;
use super::{Ended, JobEnd, busy, run_job, spec};
use crate::config::Config;
use crate::device::cuda::driver_is_present;
use crate::storage::Storage;
use anyhow::{Context, Result, bail};
use std::io::Write;
use std::sync::Arc;
use tempfile::TempDir;
use toml::Value;

/// A workload that is ready to run.
pub struct Workload {
    config: Config,
    /// Whether its kernels are to be timed alone, too.
    busy: bool,
    /// Where results go that nobody wants.
    _folder: TempDir,
}

impl Workload {
    /// The workload that `overrides` (pipeline keys) describe; results are thrown away unless `output` names a file. With `busy`
    /// its kernels are timed alone, too, when it has run.
    ///
    /// # Errors
    /// Settings that make no sense.
    pub fn new(mut overrides: Vec<(String, Value)>, output: Option<String>, busy: bool) -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let output = output.unwrap_or_else(|| folder.path().join("out.jsonl").display().to_string());
        overrides.push(("output.file".into(), Value::String(output)));
        let config = Config::new(spec::load(None, &overrides)?, false, true)?;
        let spec = &config.spec;
        let is_cpu = match &*spec.model.device {
            "cpu" => true,
            "auto" => !driver_is_present(),
            _ => false,
        };
        if busy && (!is_cpu || spec.engine.kind == EngineKind::Null) {
            bail!("--busy: only the CPU's kernels can be timed alone: --device cpu, and no --engine null");
        }
        Ok(Self { config, busy, _folder: folder })
    }

    /// Runs it and prints a table, or one JSON object.
    ///
    /// # Errors
    /// As a job's.
    pub fn run(&self, json: bool) -> Result<JobEnd> {
        let storage = Storage::new()?;
        let meter = Arc::new(if self.busy { Meter::counting() } else { Meter::default() });
        let files = JobFiles::new(&storage, &self.config.spec.output)?;
        let mut end = run_job(&self.config, &storage, &files, Arc::clone(&meter))?;
        // The run's report is told also if its kernels can't be measured.
        let mut measured = Ok(());
        if let (Ended::Now(report), Some(tally)) = (&mut end, meter.take_tally()) {
            measured = busy::measure(&tally, &self.config.model(), report.seconds.total).map(|busy| report.busy = Some(busy));
        }
        if let Ended::Now(report) | Ended::Before(report) = &end {
            if json {
                let text = serde_json::to_string(report).context("cannot write down the report")?;
                writeln!(std::io::stdout(), "{text}")?;
            } else {
                say(&format!("{} on {}", report.model, report.device));
                writeln!(std::io::stdout(), "{}", report.table().trim_end())?;
            }
        }
        measured.map(|()| end.code())
    }
}
