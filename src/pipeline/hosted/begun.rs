//! What a job on a shared engine began as: its manifest, and what of that a later run has to keep to. Invariant: the rows of a job
//! are prepared within one limit of context, whatever memory there is when it is gone on with.

use super::{Ending, HostedJob, Seat};
use crate::format;
use crate::journal::{self, Input, Manifest};
use crate::pipeline::job::{self, JobFiles};
use crate::prepare::Preparer;
use crate::storage::Storage;
use anyhow::Result;
use std::sync::Arc;

/// What is said of rows that another model would have to go on with.
const MODEL_CHANGED: &str = "the model, or how it computes, changed before this request ran";
/// What sets the limit of a job that is gone on with where there is more room now.
const BEGUN: &str = "the memory that there was when the batch began";

/// What a job is gone on with.
pub(super) struct Begun {
    /// An earlier run's, if there was one.
    pub(super) manifest: Manifest,
    /// Within the limit of context that it began with.
    pub(super) preparer: Arc<Preparer>,
    /// Set if nothing is added to what it has done.
    pub(super) end: Option<Ending>,
}

impl HostedJob {
    /// What the job is gone on with.
    pub(super) fn began_as(&self, storage: &Storage, files: &JobFiles, seat: &Seat, found: &format::Inspection) -> Result<Begun> {
        let (preparer, limit) = (Arc::clone(&seat.preparer), seat.preparer.max_context);
        let Some(earlier) = journal::overview(storage, &files.journal)? else {
            return Ok(Begun { manifest: self.manifest(seat, found, Some(limit)), preparer, end: None });
        };
        let earlier = earlier.manifest;
        // Journals of older versions name no limit.
        let begun = job::context_of(&earlier);
        let now = self.manifest(seat, found, begun);
        let is_same = |input: &Input, other: &Input| input.blake3 == other.blake3 && input.n_rows == other.n_rows;
        let same_inputs = earlier.inputs.len() == 1 && is_same(&earlier.inputs[0], &now.inputs[0]);
        if earlier.pipeline != now.pipeline || !same_inputs {
            // It is refused in words.
            return Ok(Begun { manifest: now, preparer, end: None });
        }
        let begun = begun.unwrap_or(limit);
        let end = if earlier.model_fingerprint != now.model_fingerprint {
            Some(Ending::Rest("model_changed", MODEL_CHANGED.into()))
        } else if begun > limit {
            let message = format!("the batch began with a context of {begun} tokens, and there is memory for {limit} now");
            Some(Ending::Rest("context_changed", message))
        } else {
            None
        };
        let preparer = if begun < limit { Arc::new(preparer.within(begun, BEGUN)) } else { preparer };
        Ok(Begun { manifest: earlier, preparer, end })
    }

    /// What makes it this job. Rows that say nothing else go on to the end of the context: that is part of it.
    fn manifest(&self, seat: &Seat, found: &format::Inspection, max_context: Option<usize>) -> Manifest {
        let mut pipeline = toml::Table::from_iter([
            ("batch".to_owned(), toml::Value::from(self.name.clone())),
            ("endpoint".to_owned(), self.endpoint.path().into()),
        ]);
        if let Some(tokens) = max_context {
            let memory = toml::Table::from_iter([("max_context".to_owned(), toml::Value::from(tokens as i64))]);
            pipeline.insert("memory".to_owned(), memory.into());
        }
        let pipeline = pipeline.to_string();
        let mut hasher = blake3::Hasher::new();
        hasher.update(pipeline.as_bytes()).update(seat.fingerprint.as_bytes()).update(found.blake3.as_bytes());
        Manifest {
            format_version: Manifest::FORMAT_VERSION,
            valar_version: env!("CARGO_PKG_VERSION").to_owned(),
            job_fingerprint: hasher.finalize().to_hex()[..32].to_owned(),
            created_unix_s: self.created_unix_s,
            job_seed: 0,
            model_fingerprint: seat.fingerprint.clone(),
            pipeline,
            inputs: vec![Input {
                // Its folder may be called otherwise at another start.
                url: "input.jsonl".to_owned(),
                n_bytes: found.n_bytes,
                blake3: found.blake3.clone(),
                n_rows: found.n_rows,
            }],
            rows: 0..found.n_rows,
            replaces: None,
            retries: None,
            versions: Vec::new(),
        }
    }
}
