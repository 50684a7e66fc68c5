//! The shards of a job -> its outputs, once every row of every shard has its outcome. Computes nothing.
//! Invariant: the files are those that the job would have written as a whole.

use super::collect::Counts;
use super::described::Described;
use super::job::{self, JobFiles};
use super::report::content_hash;
use super::{Ended, JobEnd, Run, described_columns, show, summary};
use crate::config::Config;
use crate::journal::{self, JobDir, Journal, Manifest, Shard, Totals};
use crate::storage::Storage;
use anyhow::{Result, bail};
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Publishes a job that was run in shards, and removes what they left.
///
/// # Errors
/// If a shard is missing, unfinished, being run, or one of another job.
pub fn merge(config: &Config) -> Result<JobEnd> {
    let storage = Storage::new()?;
    let files = JobFiles::new(&storage, &config.spec.output)?;
    let end = merge_job(config, &storage, &files)?;
    show(&end, config, &storage, &files)
}

fn merge_job(config: &Config, storage: &Storage, files: &JobFiles) -> Result<Ended> {
    let Described { inputs, mut outputs, columns, manifest, measured, .. } =
        Described::new(config, storage, files, Arc::default())?;
    let (settings, columns) = (manifest.job_fingerprint.clone(), described_columns(config, &columns));
    let shards = under_way(storage, files)?;
    let manifest = of_retry(storage, files, &shards, manifest)?;
    if let Ok(Some(report)) = job::look_at_outputs(storage, files, &manifest)
        && !has_newer(storage, files, &shards)?
    {
        // Merged before, and perhaps killed while tidying up: then a shard may have state that its lease does not mean any more.
        for shard in files.shards(storage)? {
            JobDir::claim(storage, &files.of_shard(shard)?.journal, &config.terms)?.remove()?;
        }
        remove_folder(storage, files)?;
        return Ok(Ended::Before(Box::new(report)));
    }
    let Some(of) = shards.first().map(|shard| shard.of) else {
        bail!("{}: no shard of this job is there; run them with --shard 0/N and so on", files.job.url);
    };
    let mut parts = Vec::new();
    for shard in (0..of).map(|index| Shard { index, of }) {
        if !shards.contains(&shard) {
            bail!("shard {shard} has not begun: run it with --shard {shard}");
        }
        let rows = shard.rows(inputs.n_rows);
        match open(config, storage, files, shard, &Manifest { rows: rows.clone(), ..manifest.clone() })? {
            Some(journal) => parts.push((journal, rows)),
            // Another merge was at it, and may have finished while this one waited.
            None => match job::look_at_outputs(storage, files, &manifest) {
                Ok(Some(report)) => return Ok(Ended::Before(Box::new(report))),
                _ => bail!("shard {shard} has not begun: run it with --shard {shard}"),
            },
        }
    }
    let start = Instant::now();
    let borrowed: Vec<(&Journal, Range<u64>)> = parts.iter().map(|(journal, rows)| (journal, rows.clone())).collect();
    outputs.parts = config.parts.map(|size| job::parts(&manifest, size));
    let results = journal::finalise_parts(&borrowed, &outputs)?;
    let totals = parts.iter().map(|(journal, _)| journal.totals()).fold(Totals::default(), Totals::plus);
    let n_rows = inputs.n_rows;
    let counts = Counts { resumed: n_rows, finalise: start.elapsed(), ..Counts::default() };
    let run = Run { config, storage, files, inputs, outputs, policies: Vec::new(), manifest, settings, columns };
    let report = summary::report(&run, (n_rows, results), totals, &counts, &measured)?;
    parts[0].0.publish(&files.report, report.to_json()?.as_bytes())?;
    for (journal, _) in parts {
        journal.remove()?;
    }
    remove_folder(storage, files)?;
    Ok(Ended::Now(Box::new(report)))
}

/// Shards with something to publish; all of one cut.
fn under_way(storage: &Storage, files: &JobFiles) -> Result<Vec<Shard>> {
    let mut shards = Vec::new();
    for shard in files.shards(storage)? {
        let lease = journal::lease_in(storage, &files.of_shard(shard)?.journal)?;
        shards.extend(lease.filter(|lease| lease.job.is_some()).map(|_| shard));
    }
    if let Some(other) = shards.iter().find(|shard| shard.of != shards[0].of) {
        bail!("{}: there are shards {} and {other}, which are of two cuts", files.job.url, shards[0]);
    }
    Ok(shards)
}

/// The job whose shards these are, with the time they began. If they run a finished job's errors again, or have done so, it is
/// known by that one's name.
fn of_retry(storage: &Storage, files: &JobFiles, shards: &[Shard], manifest: Manifest) -> Result<Manifest> {
    let Some(&first) = shards.first() else {
        let report = job::report(storage, files)?.filter(|report| report.rows.retried > 0);
        let report = report.filter(|report| report.inputs == manifest.inputs_hash());
        let Some(report) = report else { return Ok(manifest) };
        return Ok(Manifest { job_fingerprint: report.job_fingerprint, ..manifest });
    };
    let Some(of_first) = journal::manifest_in(storage, &files.of_shard(first)?.journal)? else { return Ok(manifest) };
    let manifest = Manifest { created_unix_s: of_first.created_unix_s, replaces: of_first.replaces, ..manifest };
    if of_first.retries.is_none() {
        return Ok(manifest);
    }
    let mut n_retried = 0;
    for &shard in shards {
        let found = journal::manifest_in(storage, &files.of_shard(shard)?.journal)?;
        n_retried += found.and_then(|found| found.retries).unwrap_or(0);
    }
    Ok(Manifest { job_fingerprint: of_first.job_fingerprint, retries: Some(n_retried), ..manifest })
}

/// Whether a shard was begun to replace the outputs that are there.
fn has_newer(storage: &Storage, files: &JobFiles, shards: &[Shard]) -> Result<bool> {
    let Some(report) = storage.get(&files.report)? else { return Ok(false) };
    let report = Some(content_hash(&report));
    for &shard in shards {
        let manifest = journal::manifest_in(storage, &files.of_shard(shard)?.journal)?;
        if manifest.is_some_and(|manifest| manifest.replaces == report) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The journal of a shard, complete; `None` if there is none.
fn open(config: &Config, storage: &Storage, files: &JobFiles, shard: Shard, wanted: &Manifest) -> Result<Option<Journal>> {
    let dir = JobDir::claim(storage, &files.of_shard(shard)?.journal, &config.terms)?;
    let Some(manifest) = dir.manifest()? else { return dir.remove().map(|()| None) };
    let differences = manifest.differences(wanted);
    if !differences.is_empty() {
        bail!("shard {shard} is of another job:\n  {}", differences.join("\n  "));
    }
    let journal = Journal::resume(dir, &manifest, &mut |_, _| Ok(()))?;
    let left = wanted.rows.end - wanted.rows.start - journal.done_rows().len();
    if left > 0 {
        bail!("shard {shard} has {left} rows without an outcome: run it again with --shard {shard}");
    }
    Ok(Some(journal))
}

/// What the shards had in common; and the folder of their folders, on a local disk, if it is empty.
fn remove_folder(storage: &Storage, files: &JobFiles) -> Result<()> {
    journal::forget_start(storage, &files.job)?;
    let Some(dir) = &files.job.local else { return Ok(()) };
    match std::fs::remove_dir(dir) {
        Err(e) if ![ErrorKind::NotFound, ErrorKind::DirectoryNotEmpty].contains(&e.kind()) => Err(e.into()),
        _ => Ok(()),
    }
}
