//! What a job is before it begins: its inputs, its form, its model, its identity. Nothing is written yet.
//! Invariant: two runs that are described alike write the same outputs.

use super::columns::ResultColumns;
use super::estimate::{History, JobEstimator};
use super::job::{self, Inputs, JobFiles};
use super::load::{self, OpenModel};
use super::meter::Meter;
use super::policy::Policy;
use super::rows::FeedTimes;
use super::steps;
use crate::config::{Config, ModelConfig};
use crate::grammar::Grammars;
use crate::journal::{Manifest, Outputs};
use crate::prepare::RowForm;
use crate::storage::Storage;
use anyhow::Result;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// See the module.
pub(super) struct Described {
    pub(super) inputs: Inputs,
    pub(super) form: RowForm,
    /// What completions must be, by step.
    pub(super) policies: Vec<Option<Arc<Policy>>>,
    pub(super) columns: ResultColumns,
    pub(super) outputs: Outputs,
    /// Its weights are not loaded yet.
    pub(super) open: OpenModel,
    pub(super) grammars: Grammars,
    pub(super) manifest: Manifest,
    pub(super) measured: Measured,
    /// When the model was opened.
    pub(super) load_start: Instant,
}

/// What the report says besides what the collector counts.
pub(super) struct Measured {
    pub(super) model: String,
    pub(super) device: String,
    pub(super) start: Instant,
    pub(super) load: Duration,
    /// Hashing and counting the inputs.
    pub(super) inspect: Duration,
    pub(super) feed: Arc<FeedTimes>,
    pub(super) meter: Arc<Meter>,
    pub(super) kv_tokens: u64,
    /// Reckons what the rows of this run should take.
    pub(super) estimator: Arc<Mutex<JobEstimator>>,
    /// How fast the model was before this run.
    pub(super) history: History,
}

impl Described {
    /// Reads all that a job is made of, but for its rows' meaning and the weights. `meter` is to measure its steps.
    pub(super) fn new(config: &Config, storage: &Storage, files: &JobFiles, meter: Arc<Meter>) -> Result<Self> {
        let start = Instant::now();
        let inputs = job::inspect_inputs(storage, &config.spec, files)?;
        let inspect = start.elapsed();
        let form = steps::read(config, storage)?;
        let columns = ResultColumns::of(&form.rows, &config.spec.output.prefix);
        let (passed, schema) = job::result_schema(storage, config, &inputs, &columns)?.unzip();
        let (results, errors) = (files.results.clone(), files.errors.clone());
        // The job's parts are named when it has begun.
        let outputs = Outputs { results, parts: None, errors, passed, schema, columns: columns.fields() };
        let load_start = Instant::now();
        let begun_context = if config.terms.restart { None } else { job::begun_context(storage, files) };
        let open = load::open(&ModelConfig { begun_context, ..config.model() })?;
        let grammars = Grammars::new(Arc::clone(&open.tokenizer));
        steps::check_formats(&form.rows, &grammars)?;
        let manifest = job::manifest(config, &inputs, &form.files_hash, &open)?;
        let history = History::of(config, &open.fingerprint);
        let setting = open.memory.setting(config, history.output_share());
        let measured = Measured {
            model: open.local.name.clone(),
            device: open.fingerprint.device.clone(),
            start,
            load: Duration::ZERO,
            inspect,
            feed: Arc::new(FeedTimes::default()),
            meter,
            kv_tokens: open.memory.kv_tokens(),
            estimator: Arc::new(Mutex::new(JobEstimator::new(setting))),
            history,
        };
        let (form, policies) = (form.rows, form.policies);
        Ok(Self { inputs, form, policies, columns, outputs, open, grammars, manifest, measured, load_start })
    }
}
