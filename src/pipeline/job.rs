//! What a job is on disk: its files, its identity, and whether it is new, unfinished or done. Knows nothing of models
//! or engines. Invariant: results are only ever added to by the job that began them.

use super::columns::ResultColumns;
use super::index::{JobIndex, Replay};
use super::load::OpenModel;
use super::report::{Report, content_hash};
use crate::config::Config;
use crate::format::passed::{KnownFile, Passed};
use crate::format::{self, Format, Inspection, Limits, PartList, PartSize, Parts};
use crate::journal::{self, Input, JobDir, Journal, Manifest, Shard, Terms};
use crate::pipeline::spec::{EngineSpec, OutputSpec, PipelineSpec, PriceSpec};
use crate::storage::{Location, Storage};
use anyhow::{Context, Result, anyhow, bail, ensure};
use arrow::datatypes::{Schema, SchemaRef};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// The files of a job with output `out.jsonl` or `out.parquet`.
#[derive(Debug, Clone)]
pub(super) struct JobFiles {
    /// The results: a file, or a folder of parts.
    pub(super) results: Location,
    in_parts: bool,
    /// `out.errors.jsonl`
    pub(super) errors: Location,
    /// `out.report.json`
    pub(super) report: Location,
    /// `out.job/`, which holds the directories of shards, too.
    pub(super) job: Location,
    /// The journal's: that directory, or a shard's in it.
    pub(super) journal: Location,
}

impl JobFiles {
    /// Checks that the output can be one.
    pub(super) fn new(storage: &Storage, output: &OutputSpec) -> Result<Self> {
        let files = Self::of(&output.file, output.parts.is_some()).context("output.file")?;
        let checked = match &output.parts {
            Some(_) => format::check_folder(storage, &files.results),
            None => format::check_output(storage, &files.results).map(drop),
        };
        checked.context("output.file").map(|()| files)
    }

    /// Of a job that is only looked at: in parts or not, its other files are the same.
    pub(super) fn of(output: &str, in_parts: bool) -> Result<Self> {
        let results = Location::parse(if in_parts { output.trim_end_matches('/') } else { output })?;
        Format::of(&results)?;
        let job = results.with_extension("job")?;
        Ok(Self {
            errors: results.with_extension("errors.jsonl")?,
            report: results.with_extension("report.json")?,
            journal: job.clone(),
            job,
            results,
            in_parts,
        })
    }

    /// What is there once the results are published.
    fn published(&self) -> Result<Location> {
        if self.in_parts { PartList::place(&self.results) } else { Ok(self.results.clone()) }
    }

    /// The files that hold the published results, in order.
    pub(super) fn result_files(&self, storage: &Storage) -> Result<Vec<Location>> {
        if self.in_parts { PartList::files(storage, &self.results) } else { Ok(vec![self.results.clone()]) }
    }

    /// The first of them.
    pub(super) fn first_result(&self, storage: &Storage) -> Result<Option<Location>> {
        if !self.in_parts {
            return Ok(Some(self.results.clone()));
        }
        let first = PartList::read(storage, &self.results)?.and_then(|list| list.parts.into_iter().next());
        first.map(|part| self.results.child(&part.name)).transpose()
    }

    /// Refuses results that are not those of a report, which has their hash.
    pub(super) fn check_results(&self, storage: &Storage, report: &Report) -> Result<()> {
        if report.results.is_empty() {
            // An older program's.
            return Ok(());
        }
        let hash = if self.in_parts {
            PartList::check(storage, &self.results)?;
            storage.get(&self.published()?)?.map(|text| content_hash(&text))
        } else {
            Some(format::inspect(storage, &self.results)?.blake3)
        };
        ensure!(
            hash.as_ref() == Some(&report.results),
            "{} is not what {} tells of: it was changed, and rows can't be taken from it",
            self.results.url,
            self.report.url
        );
        Ok(())
    }

    /// Those of a part of the job.
    pub(super) fn of_shard(&self, shard: Shard) -> Result<Self> {
        Ok(Self { journal: self.job.child(&shard.dir_name())?, ..self.clone() })
    }

    /// The shards whose directories are there, done with or not.
    pub(super) fn shards(&self, storage: &Storage) -> Result<Vec<Shard>> {
        Ok(storage.list_folders(&self.job)?.iter().filter_map(|name| Shard::of_dir_name(name)).collect())
    }

    /// Directories of the job cut in another way, where something is under way.
    fn other_cuts(&self, storage: &Storage, shard: Option<Shard>) -> Result<Vec<Location>> {
        let others = self.shards(storage)?.into_iter().filter(|other| shard.is_none_or(|shard| shard.of != other.of));
        let mut dirs = others.map(|other| self.job.child(&other.dir_name())).collect::<Result<Vec<_>>>()?;
        dirs.extend(shard.map(|_| self.job.clone()));
        let mut under_way = Vec::new();
        for dir in dirs {
            if journal::lease_in(storage, &dir)?.is_some_and(|lease| lease.job.is_some()) {
                under_way.push(dir);
            }
        }
        Ok(under_way)
    }

    /// Where unnamed temporary files go: beside the journal, where there is room; for remote outputs, where the system
    /// keeps such files.
    pub(super) fn scratch_folder(&self) -> PathBuf {
        self.journal.local.clone().unwrap_or_else(std::env::temp_dir)
    }
}

/// The files a job reads.
pub(super) struct Inputs {
    pub(super) files: Vec<Location>,
    /// What the manifest says of them.
    pub(super) described: Vec<Input>,
    /// What they were when they were described.
    versions: Vec<String>,
    /// Rows to be read, the limit considered.
    pub(super) n_rows: u64,
    pub(super) limits: Limits,
}

impl Inputs {
    /// Those that a run is to complete.
    pub(super) fn own_rows(&self, shard: Option<Shard>) -> Range<u64> {
        shard.map_or(0..self.n_rows, |shard| shard.rows(self.n_rows))
    }
}

impl Inputs {
    /// Refuses inputs that are not what they were when the job was described: a run may wait for another one for hours, or
    /// take hours itself.
    pub(super) fn check_unchanged(&self, storage: &Storage) -> Result<()> {
        self.known().iter().try_for_each(|file| file.open(storage).map(drop))
    }

    /// Each file, and what it was.
    fn known(&self) -> Vec<KnownFile> {
        let known = |((at, version), described): ((&Location, &String), &Input)| {
            let (blake3, n_rows) = (described.blake3.clone(), described.n_rows);
            KnownFile { at: at.clone(), version: version.clone(), blake3, n_rows }
        };
        self.files.iter().zip(&self.versions).zip(&self.described).map(known).collect()
    }
}

/// Finds the input files, hashes them and counts their rows; those that are what they were when the job under way at the
/// outputs began are not read again.
pub(super) fn inspect_inputs(storage: &Storage, spec: &PipelineSpec, outputs: &JobFiles) -> Result<Inputs> {
    // One that can't be read is told of when the job begins.
    let earlier = journal::manifest_in(storage, &outputs.journal).ok().flatten();
    let known = |file: &Location| {
        let Manifest { inputs, versions, .. } = earlier.as_ref()?;
        let (input, version) = inputs.iter().zip(versions).find(|(input, _)| input.url == *file.url)?;
        let Input { n_bytes, blake3, n_rows, .. } = input.clone();
        let is_same = storage.open(file).ok()?.version() == *version;
        is_same.then(|| Inspection { n_bytes, blake3, n_rows, version: version.clone() })
    };
    let (mut files, mut parts) = (Vec::new(), Vec::new());
    for pattern in &spec.input.files {
        let found = format::expand_input(storage, pattern);
        for (file, part) in found.with_context(|| format!("input {}", Location::shown(pattern)))? {
            files.push(file);
            parts.push(part);
        }
    }
    refuse_inputs_as_outputs(&files, outputs)?;
    let (mut described, mut versions) = (Vec::new(), Vec::new());
    let mut n_rows = 0;
    for (file, part) in files.iter().zip(parts) {
        let found = known(file).map_or_else(|| format::inspect(storage, file), Ok);
        let found = found.with_context(|| format!("input {}", file.url))?;
        part.map_or(Ok(()), |part| part.check(file, &found)).context("input")?;
        if Format::of(file)? == Format::Parquet {
            // Columns that can't be read should stop the job now.
            let schema = format::schema_of(storage, file)?;
            let missing = spec.output.columns.iter().flatten().find(|name| schema.fields().find(name).is_none());
            if let Some(name) = missing {
                bail!("output.columns: {} has no column {name:?}", file.url);
            }
        }
        n_rows += found.n_rows;
        versions.push(found.version);
        described.push(Input { url: file.url.to_string(), n_bytes: found.n_bytes, blake3: found.blake3, n_rows: found.n_rows });
    }
    let n_rows = spec.input.limit.map_or(n_rows, |limit| limit.min(n_rows));
    Ok(Inputs { files, described, versions, n_rows, limits: Limits { max_row_bytes: spec.input.max_line_bytes } })
}

/// A job must not read what it is going to replace.
fn refuse_inputs_as_outputs(inputs: &[Location], outputs: &JobFiles) -> Result<()> {
    for output in [&outputs.results, &outputs.errors, &outputs.report] {
        if inputs.iter().any(|input| input.is(output) || output.holds(input)) {
            bail!("{} is an input and would be replaced by the output", output.url);
        }
    }
    Ok(())
}

/// What makes two runs the same job: everything that the results depend on. Resources and the output's place do not.
pub(super) fn manifest(config: &Config, inputs: &Inputs, files_hash: &str, model: &OpenModel) -> Result<Manifest> {
    let mut spec = config.spec.clone();
    spec.engine = EngineSpec { kind: spec.engine.kind, ..EngineSpec::default() };
    (spec.output.file, spec.output.parts) = (String::new(), None);
    spec.prices = PriceSpec::default();
    spec.model.name.clone_from(&model.local.name);
    // What "fast" came to is in the device's fingerprint.
    (spec.model.numerics, spec.model.kv) = (String::new(), String::new());
    let fingerprint = &model.fingerprint;
    let pipeline = toml::to_string(&spec).context("cannot write down the pipeline")?;
    // With little memory, rows can't be as long as the model allows: then that is part of what the results depend on.
    let max_context = model.memory.max_context;
    // Examples, schemas and labels that the prompts were made with.
    let files = if files_hash.is_empty() { String::new() } else { format!("\n[files]\nblake3 = {files_hash:?}\n") };
    let pipeline = format!("{pipeline}\n[memory]\nmax_context = {max_context}\n{files}");
    let mut hasher = blake3::Hasher::new();
    hasher.update(pipeline.as_bytes()).update(fingerprint.to_string().as_bytes());
    for input in &inputs.described {
        hasher.update(input.blake3.as_bytes());
    }
    Ok(Manifest {
        format_version: Manifest::FORMAT_VERSION,
        valar_version: env!("CARGO_PKG_VERSION").to_owned(),
        job_fingerprint: hasher.finalize().to_hex()[..32].to_owned(),
        created_unix_s: config.created,
        job_seed: config.spec.job.seed,
        model_fingerprint: fingerprint.to_string(),
        pipeline,
        inputs: inputs.described.clone(),
        rows: inputs.own_rows(config.shard),
        replaces: None,
        retries: None,
        versions: inputs.versions.clone(),
    })
}

/// The longest row that the job whose files these are may have; `None` if there is none. Whether it is this job is seen later.
pub(super) fn begun_context(storage: &Storage, files: &JobFiles) -> Option<usize> {
    let of_dir = |dir: &Location| journal::manifest_in(storage, dir).ok().flatten();
    // Shards must agree, and a merge with them: with whichever has begun.
    let of_shards = || {
        let shards = files.shards(storage).unwrap_or_default();
        shards.iter().find_map(|&shard| of_dir(&files.of_shard(shard).ok()?.journal))
    };
    let Some(manifest) = of_dir(&files.journal).or_else(of_shards) else {
        // The KV cache held at least one row of any length that was allowed.
        return report(storage, files).ok().flatten().map(|report| report.kv_tokens as usize);
    };
    context_of(&manifest)
}

/// The longest row that a job may have, if its manifest says so.
pub(super) fn context_of(manifest: &Manifest) -> Option<usize> {
    let pipeline: toml::Table = manifest.pipeline.parse().ok()?;
    pipeline.get("memory")?.get("max_context")?.as_integer()?.try_into().ok()
}

/// How the results of a job that has begun are cut. Two runs have parts of one name only if they write the same ones.
pub(super) fn parts(manifest: &Manifest, size: PartSize) -> Parts {
    let Manifest { created_unix_s, replaces, retries, .. } = manifest;
    Parts::new(size, &manifest.job_fingerprint, &format!("{created_unix_s} {replaces:?} {retries:?}"))
}

/// How a job begins.
pub(super) enum Begin {
    /// There is something to do; the journal may hold what an earlier run has done. The manifest is the first run's.
    Work(Box<Manifest>, Box<Journal>, Box<JobIndex>),
    /// An earlier run has finished it.
    Done(Box<Report>),
}

/// Begins, continues or refuses a job. `is_dated`: the manifest's time is the user's wish, not that of the clock, which shards
/// must agree on.
///
/// # Errors
/// If the output belongs to another job and `restart` was not asked for, or another process is at it.
pub(super) fn begin(
    storage: &Storage,
    files: &JobFiles,
    manifest: Manifest,
    (shard, terms, is_dated): (Option<Shard>, &Terms, bool),
) -> Result<Begin> {
    let dir = JobDir::claim(storage, &files.journal, terms)?;
    let dir = alone(storage, files, dir, (shard, terms))?;
    let earlier = if terms.restart { None } else { dir.manifest()? };
    if let Some(earlier) = earlier {
        same(&earlier, &manifest, files)?;
        return resume(dir, files, earlier, shard.is_some());
    }
    // What --restart replaces stays until it is replaced: a reader finds the old state or the new one.
    if !terms.restart {
        // Nothing to do here, or nothing we may do: then the folder was made for the lock alone.
        match look_at_outputs(storage, files, &manifest) {
            Ok(None) => {}
            Ok(Some(report)) => return dir.remove().map(|()| Begin::Done(Box::new(report))),
            Err(refusal) => return dir.remove().and(Err(refusal)),
        }
    }
    let replaces = if terms.restart { storage.get(&files.report)?.map(|text| content_hash(&text)) } else { None };
    let created_unix_s = match shard {
        Some(_) if !is_dated => journal::shared_start(storage, &files.job, &manifest.job_fingerprint, manifest.created_unix_s)?,
        _ => manifest.created_unix_s,
    };
    let manifest = Manifest { created_unix_s, replaces, ..manifest };
    let journal = create(storage, files, dir, &manifest, shard)?;
    // What was to be replaced is gone; who restarts a shard restarts the others, too, or merges with what they have.
    if !terms.restart
        && let Some(shard) = shard
        && let Err(refusal) = agrees(storage, files, shard, &manifest)
    {
        return journal.remove().and(Err(refusal));
    }
    let index = JobIndex::new(&files.scratch_folder())?;
    Ok(Begin::Work(Box::new(manifest), Box::new(journal), Box::new(index)))
}

/// Refuses a shard whose rows may be of another length than those of one that has begun: with little memory they may not be as long
/// as the model allows. One that began earlier is kept to ([`begun_context`]), if memory allows; of two that begin at one moment at
/// least one sees the other here, before it computes what could not be merged.
fn agrees(storage: &Storage, files: &JobFiles, shard: Shard, manifest: &Manifest) -> Result<()> {
    for other in files.shards(storage)?.into_iter().filter(|&other| other != shard) {
        let Some(found) = journal::manifest_in(storage, &files.of_shard(other)?.journal)? else { continue };
        if let [only] = found.differences(manifest).as_slice()
            && let (Some(begun), Some(own)) = (context_of(&found), context_of(manifest))
            && only.contains("memory.max_context")
        {
            bail!(
                "shard {other} has begun with rows of up to {begun} tokens, and the memory here is for {own}: start this one again \
                 with memory for as many, and it keeps to that"
            );
        }
        break;
    }
    Ok(())
}

/// Makes the journal of a job that nobody cuts in another way.
pub(super) fn create(
    storage: &Storage,
    files: &JobFiles,
    dir: JobDir,
    manifest: &Manifest,
    shard: Option<Shard>,
) -> Result<Journal> {
    let journal = Journal::create(dir, manifest)?;
    // A run that cuts the job in another way may have begun meanwhile: of two, at least one sees the other.
    if let Some(other) = files.other_cuts(storage, shard)?.first() {
        journal.remove()?;
        return Err(cut_otherwise(other));
    }
    if shard.is_none() {
        journal::forget_start(storage, &files.job)?;
    }
    Ok(journal)
}

fn cut_otherwise(other: &Location) -> anyhow::Error {
    anyhow!("the same output is under way cut in another way, in {}: go on with that, or throw it away with --restart", other.url)
}

/// The directory of a job that is not cut in another way, too, or is not any more.
pub(super) fn alone(storage: &Storage, files: &JobFiles, dir: JobDir, (shard, terms): (Option<Shard>, &Terms)) -> Result<JobDir> {
    for other in files.other_cuts(storage, shard)? {
        if !terms.restart {
            // If nothing is under way here, the folder was made for the lock alone.
            if dir.manifest().is_ok_and(|manifest| manifest.is_none()) {
                dir.remove()?;
            }
            return Err(cut_otherwise(&other));
        }
        JobDir::claim(storage, &other, terms)?.remove()?;
    }
    Ok(dir)
}

/// Refuses to go on with another job.
pub(super) fn same(earlier: &Manifest, now: &Manifest, files: &JobFiles) -> Result<()> {
    let differences = earlier.differences(now);
    if differences.is_empty() {
        return Ok(());
    }
    let url = &files.journal.url;
    let way_out = match earlier.retries {
        // Its outputs are still those of the finished job.
        Some(_) => format!("finish that retry as it was, or remove {url} to give it up"),
        None => "finish it as it was, choose another output, or throw it away with --restart".to_owned(),
    };
    bail!("{url} is the unfinished job of another run:\n  {}\n{way_out}", differences.join("\n  "))
}

/// Goes on with the job of a directory.
pub(super) fn resume(dir: JobDir, files: &JobFiles, earlier: Manifest, is_shard: bool) -> Result<Begin> {
    let index = JobIndex::new(&files.scratch_folder())?;
    let mut replay = Replay::new(&index, is_shard);
    let journal =
        Journal::resume(dir, &earlier, &mut |noted, place| replay.note((noted.row, noted.ok), (noted.id, noted.key), place))?;
    replay.flush()?;
    Ok(Begin::Work(Box::new(earlier), Box::new(journal), Box::new(index)))
}

/// The report that is there, if it is one.
pub(super) fn report(storage: &Storage, files: &JobFiles) -> Result<Option<Report>> {
    Ok(storage.get(&files.report)?.and_then(|text| serde_json::from_slice(&text).ok()))
}

/// The report, if the job is finished already; an error if the files of another job are in the way.
pub(super) fn look_at_outputs(storage: &Storage, files: &JobFiles, manifest: &Manifest) -> Result<Option<Report>> {
    let own = report(storage, files)?.filter(|report| report.job_fingerprint == manifest.job_fingerprint);
    let mut there = Vec::new();
    let published = files.published()?;
    for file in [&published, &files.errors, &files.report] {
        if storage.exists(file)? {
            there.push(&*file.url);
        }
    }
    match own {
        Some(report) if storage.exists(&published)? => Ok(Some(report)),
        Some(_) => Ok(None),
        None if there.is_empty() => Ok(None),
        None => bail!("not this job's, and in the way: {}; choose another output, or overwrite with --restart", there.join(", ")),
    }
}

/// The columns of a Parquet result file, where they are known before the work: of dataset rows from Parquet files, those that
/// pass through, and the result columns that come behind them.
///
/// # Errors
/// Input files with different columns, a column type that can't be written, a column named like a result column.
pub(super) fn result_schema(
    storage: &Storage,
    config: &Config,
    inputs: &Inputs,
    columns: &ResultColumns,
) -> Result<Option<(Passed, SchemaRef)>> {
    let spec = &config.spec;
    let is_parquet = |at: &Location| matches!(Format::of(at), Ok(Format::Parquet));
    let known = spec.is_dataset() && is_parquet(&Location::parse(&spec.output.file)?) && inputs.files.iter().all(is_parquet);
    let Some(first) = inputs.files.first().filter(|_| known) else { return Ok(None) };
    let passed = Passed::of(storage, inputs.known(), spec.output.columns.as_deref())?;
    let schema = Schema::new(columns.fields());
    if let Some(name) = passed.names().find(|name| schema.fields().find(name).is_some()) {
        bail!("{} has a column {name}, as the results would have; set output.prefix", first.url);
    }
    format::check_schema(&schema)?;
    passed.check()?;
    Ok(Some((passed, Arc::new(schema))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_what_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        std::fs::write(&path, "{}\n").unwrap();
        let storage = Storage::new().unwrap();
        let at = Location::parse(path.to_str().unwrap()).unwrap();
        let found = format::inspect(&storage, &at).unwrap();
        let described = vec![Input { url: at.url.to_string(), n_bytes: 3, blake3: found.blake3, n_rows: 1 }];
        // As after a touch, or from a web server whose nodes name versions in their own ways.
        let versions = vec!["another".to_owned()];
        let inputs = Inputs { files: vec![at], described, versions, n_rows: 1, limits: Limits::default() };
        inputs.check_unchanged(&storage).unwrap();
        std::fs::write(&path, "[]\n").unwrap();
        assert!(inputs.check_unchanged(&storage).unwrap_err().to_string().contains("changed since this run began"));
    }
}
