//! A job is killed at every one of its writes, in several ways, and run again: the outputs are always the same, every
//! row is there once, and nothing that was committed is computed again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use valar::format::{PartSize, Parts};
use valar::journal::{IfRunning, Input, JobDir, Journal, Manifest, Noted, Outputs, Record, Terms, finalise};
use valar::storage::{Location, Storage};

use crate::dying::{Death, DyingStore};

pub(crate) const N_ROWS: u64 = 40;
const WINDOW: usize = 9; // rows under way at once: the bound of how far order is lost
const COMMIT_ROWS: usize = 4;
const PART_ROWS: u64 = 7;

/// A well-known mixing function (splitmix64): outcomes and orders that look random and need no state.
fn hash(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What becomes of a row, whenever it is computed.
pub(crate) fn outcome(row: u64) -> Record<'static> {
    let ok = !hash(row).is_multiple_of(5);
    let text = "né\\n".repeat((hash(row) % 30) as usize);
    let line = format!("{{\"row\":{row},\"ok\":{ok},\"text\":\"{text}\"}}").into();
    Record {
        row,
        ok,
        prompt_tokens: row as u32,
        completion_tokens: 2,
        cached_tokens: 1,
        key: None,
        id: Some(u128::from(row)),
        line,
    }
}

/// The same as the journal gives it back: what ids are known by is in the index alone.
fn read_back(row: u64) -> Record<'static> {
    Record { id: None, ..outcome(row) }
}

/// What the output must be.
fn wanted(ok: bool) -> String {
    (0..N_ROWS).map(outcome).filter(|r| r.ok == ok).flat_map(|r| [r.line.into_owned(), "\n".to_owned()]).collect()
}

pub(crate) fn manifest() -> Manifest {
    Manifest {
        format_version: Manifest::FORMAT_VERSION,
        valar_version: "test".into(),
        job_fingerprint: "job".into(),
        created_unix_s: 1,
        job_seed: 0,
        model_fingerprint: "model".into(),
        pipeline: String::new(),
        inputs: vec![Input { url: "in.jsonl".into(), n_bytes: 1, blake3: String::new(), n_rows: N_ROWS }],
        rows: 0..N_ROWS,
        replaces: None,
        retries: None,
        versions: Vec::new(),
    }
}

/// A job's places in one store.
pub(crate) struct Places {
    pub(crate) dir: Location,
    pub(crate) outputs: Outputs,
    report: Location,
    /// Its last holder is known to be dead.
    terms: Terms,
}

const TERMS: Terms = Terms { if_running: IfRunning::TakeOver, lease: Duration::from_mins(1), unguarded: false, restart: false };

impl Places {
    fn new(store: &Arc<dyn ObjectStore>, output: &str) -> Self {
        let results = Location::new(store.clone(), Path::from(output), output);
        let parts = output.contains("parts").then(|| Parts::new(PartSize::Rows(PART_ROWS), "job", ""));
        let beside = |extension| results.with_extension(extension).unwrap();
        let outputs = Outputs {
            results: results.clone(),
            errors: beside("errors.jsonl"),
            parts,
            passed: None,
            schema: None,
            columns: Vec::new(),
        };
        Self { dir: beside("job"), outputs, report: beside("report.json"), terms: TERMS }
    }
}

/// What one process learned before it ended.
#[derive(Default)]
pub(crate) struct Life {
    pub(crate) computed: Vec<u64>,
    committed: BTreeSet<u64>,
    warnings: Vec<String>,
    /// What was there could not be used.
    restarted: bool,
}

/// A pipeline in small: computes what is not done, in an order that depends on `seed`, commits now and then, publishes,
/// reports, and tidies up.
pub(crate) fn run(storage: &Storage, places: &Places, seed: u64, life: &mut Life) -> Result<()> {
    let dir = match JobDir::claim(storage, &places.dir, &places.terms) {
        // A store that tears puts tore the lease: the user says --restart.
        Err(e) if format!("{e:#}").contains("--restart") => {
            life.restarted = true;
            JobDir::claim(storage, &places.dir, &Terms { restart: true, ..places.terms })?
        }
        claimed => claimed?,
    };
    let mut journal = match dir.manifest() {
        Ok(Some(known)) => {
            ensure!(known.differences(&manifest()).is_empty(), "another job");
            Journal::resume(dir, &known, &mut |_, _| Ok(()))?
        }
        // Published, reported, and killed while tidying up.
        Ok(None) if storage.exists(&places.report)? => return dir.remove(),
        Ok(None) => Journal::create(dir, &manifest())?,
        // A store that tears puts tore the manifest: the user says --restart.
        Err(e) if format!("{e:#}").contains("--restart") => Journal::create(dir, &manifest())?,
        Err(e) => return Err(e),
    };
    life.warnings.extend(journal.warnings.clone());

    let mut rows = (0..N_ROWS).filter(|&row| !journal.done_rows().contains(row)).collect::<Vec<_>>().into_iter();
    let mut under_way: Vec<u64> = rows.by_ref().take(WINDOW).collect();
    let mut uncommitted = Vec::new();
    while !under_way.is_empty() {
        let row = under_way.swap_remove(hash(seed ^ under_way.len() as u64 ^ hash(under_way[0])) as usize % under_way.len());
        life.computed.push(row);
        journal.append(&outcome(row))?;
        uncommitted.push(row);
        if uncommitted.len() == COMMIT_ROWS {
            journal.commit()?;
            life.committed.extend(uncommitted.drain(..));
        }
        under_way.extend(rows.next());
    }
    finalise(&mut journal, &places.outputs, N_ROWS)?;
    let totals = journal.totals();
    assert_eq!((totals.n_ok + totals.n_failed, totals.prompt_tokens), (N_ROWS, N_ROWS * (N_ROWS - 1) / 2));
    journal.publish(&places.report, format!("{totals:?}").as_bytes())?;
    journal.remove()
}

/// All objects there are, with their content; but for the lease, which stays.
pub(crate) fn contents(storage: &Storage, store: &Arc<dyn ObjectStore>) -> Vec<(String, Bytes)> {
    let root = Location::new(store.clone(), Path::default(), "");
    let found = storage.expand_under(&root, "**").unwrap();
    let found = found.iter().filter(|at| !at.url.ends_with(".job/lease.json"));
    found.map(|at| (at.url.to_string(), storage.get(at).unwrap().unwrap())).collect()
}

/// Runs the job on a store that dies at its `n`-th write of `n_writes` (the last one gives the lease back, which nobody
/// misses), then perhaps on another that dies, then on one that doesn't.
/// Returns the warnings.
fn die_and_finish(
    storage: &Storage,
    store: &Arc<dyn ObjectStore>,
    output: &str,
    (n, n_writes): (usize, usize),
    death: Death,
) -> Vec<String> {
    let case = format!("{output}, write {n}, {death:?}");
    let mut lives = Vec::new();
    let second = 1 + hash(n as u64) as usize % 40;
    for (seed, dies_at) in [(1, n), (2, second)] {
        let dying: Arc<dyn ObjectStore> = Arc::new(DyingStore::new(store.clone(), dies_at, death));
        let mut life = Life::default();
        // The second life may well be long enough to finish.
        if run(storage, &Places::new(&dying, output), seed, &mut life).is_ok() {
            assert!(seed == 2 || n == n_writes, "{case}: survived");
        }
        lives.push(life);
    }
    let mut last = Life::default();
    run(storage, &Places::new(store, output), 3, &mut last).unwrap_or_else(|e| panic!("{case}: {e:#}"));
    lives.push(last);
    for (i, life) in lives.iter().enumerate() {
        for later in lives[i + 1..].iter().take_while(|later| !later.restarted) {
            let again: Vec<_> = later.computed.iter().filter(|row| life.committed.contains(row)).collect();
            assert!(again.is_empty(), "{case}: committed rows {again:?} were computed again");
        }
    }
    lives.into_iter().flat_map(|life| life.warnings).collect()
}

fn storage() -> Storage {
    Storage::new().unwrap().with_part_bytes(300)
}

fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

/// The job without any death, and how many writes it takes.
pub(crate) fn uninterrupted(storage: &Storage, output: &str) -> (Vec<(String, Bytes)>, usize) {
    let store = memory();
    let counting = DyingStore::immortal(store.clone());
    let life: Arc<dyn ObjectStore> = Arc::new(counting.clone());
    run(storage, &Places::new(&life, output), 0, &mut Life::default()).unwrap();
    (contents(storage, &store), counting.n_writes())
}

#[track_caller]
fn check_every_write(output: &str) {
    let storage = storage();
    let (wanted_files, n_writes) = uninterrupted(&storage, output);
    let n_ok = (0..N_ROWS).filter(|&row| outcome(row).ok).count();
    let n_files = if output.contains("parts") { n_ok.div_ceil(PART_ROWS as usize) + 3 } else { 3 };
    assert_eq!(wanted_files.len(), n_files, "results (and their list), errors, report");
    assert!(n_writes > 30, "{n_writes} writes: too few to tell anything");
    let mut warnings = Vec::new();
    for death in Death::ALL {
        for n in 1..=n_writes {
            let store = memory();
            warnings.extend(die_and_finish(&storage, &store, output, (n, n_writes), death));
            assert_eq!(contents(&storage, &store), wanted_files, "{output}, write {n}, {death:?}");
        }
    }
    assert!(!warnings.is_empty() && warnings.iter().all(|w| w.contains("seg-")), "torn segments are told of: {warnings:?}");
}

#[test]
fn jsonl_is_the_same_after_any_death() {
    check_every_write("out/x.jsonl");
}

#[test]
fn parquet_is_the_same_after_any_death() {
    check_every_write("out/x.parquet");
}

#[test]
fn parts_are_the_same_after_any_death() {
    check_every_write("out/parts.jsonl");
    check_every_write("out/parts.parquet");
}

#[test]
fn the_uninterrupted_outputs_are_right() {
    let (files, _) = uninterrupted(&storage(), "x.jsonl");
    let text = |i: usize| std::str::from_utf8(&files[i].1).unwrap();
    assert_eq!((files[0].0.as_str(), text(0)), ("x.errors.jsonl", wanted(false).as_str()));
    assert_eq!((files[1].0.as_str(), text(1)), ("x.jsonl", wanted(true).as_str()));
}

#[test]
fn local_files_survive_any_death_and_no_litter_stays() {
    let (wanted_files, n_writes) = uninterrupted(&storage(), "x.jsonl");
    for n in 1..=n_writes {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().to_str().unwrap();
        let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(dir).unwrap());
        let dying: Arc<dyn ObjectStore> = Arc::new(DyingStore::new(store, n, Death::HalfPart));
        let storage = storage();
        let mut places = Places::new(&dying, "x.jsonl");
        places.terms.unguarded = true; // local files are not replaced on conditions
        let ended = run(&storage, &places, 1, &mut Life::default());
        // The last write gives the lease back, and there are two fewer here: conditions are not tried.
        assert!(ended.is_err() || n > n_writes - 3, "write {n}: survived");

        let at = |name: &str| Location::parse(&format!("{dir}/{name}")).unwrap();
        let outputs = Outputs {
            results: at("x.jsonl"),
            errors: at("x.errors.jsonl"),
            parts: None,
            passed: None,
            schema: None,
            columns: Vec::new(),
        };
        let places = Places { dir: at("x.job"), outputs, report: at("x.report.json"), terms: Terms::default() };
        run(&storage, &places, 2, &mut Life::default()).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let wanted_names: Vec<&str> = wanted_files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, wanted_names, "write {n}");
        for (name, content) in &wanted_files {
            assert_eq!(&std::fs::read(folder.path().join(name)).unwrap(), content, "write {n}, {name}");
        }
    }
}

#[test]
fn a_job_is_run_by_one_process_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let at = Location::parse(folder.path().join("deep/x.job").to_str().unwrap()).unwrap();
    let storage = Storage::new().unwrap();
    let held = JobDir::claim(&storage, &at, &Terms::default()).unwrap();
    let error = format!("{:#}", JobDir::claim(&storage, &at, &Terms::default()).unwrap_err());
    assert!(error.contains("another run is at this job") && error.contains("x.job"), "{error}");
    drop(held);
    JobDir::claim(&storage, &at, &Terms::default()).unwrap().remove().unwrap();
    assert!(!folder.path().join("deep/x.job").exists());
}

/// A journal of ten rows in five segments, and its store.
pub(crate) fn five_segments() -> (Storage, Arc<dyn ObjectStore>, Places) {
    let (storage, store) = (storage(), memory());
    let places = Places::new(&store, "x.jsonl");
    let mut journal = Journal::create(JobDir::claim(&storage, &places.dir, &TERMS).unwrap(), &manifest()).unwrap();
    for row in 0..10 {
        journal.append(&outcome(row)).unwrap();
        if row % 2 == 1 {
            journal.commit().unwrap();
        }
    }
    (storage, store, places)
}

#[test]
fn what_could_not_be_committed_is_committed_later() {
    let folder = tempfile::tempdir().unwrap();
    let at = Location::parse(folder.path().join("x.job").to_str().unwrap()).unwrap();
    let storage = storage();
    let mut journal = Journal::create(JobDir::claim(&storage, &at, &TERMS).unwrap(), &manifest()).unwrap();
    let in_the_way = folder.path().join("x.job/seg-00001-00000001.jsonl");
    std::fs::create_dir(&in_the_way).unwrap();
    let append = |journal: &mut Journal, row| journal.append(&outcome(row)).unwrap().unwrap();
    let first = append(&mut journal, 3);
    journal.begin_commit().unwrap();
    let second = append(&mut journal, 4);
    for _ in 0..2 {
        journal.commit().unwrap_err();
        let read = [first, second].map(|place| journal.record(place).unwrap());
        assert_eq!(read, [read_back(3), read_back(4)]);
    }
    std::fs::remove_dir(&in_the_way).unwrap();
    journal.commit().unwrap();
    assert_eq!([first, second].map(|place| journal.record(place).unwrap()), [read_back(3), read_back(4)]);
    drop(journal);
    let mut rows = Vec::new();
    let dir = JobDir::claim(&storage, &at, &TERMS).unwrap();
    let mut note = |noted: &Noted, place| {
        assert_eq!((noted.id, noted.ok), (Some(u128::from(noted.row)), outcome(noted.row).ok));
        rows.push((noted.row, place));
        Ok(())
    };
    Journal::resume(dir, &manifest(), &mut note).unwrap();
    assert_eq!(rows, [(3, first), (4, second)]);
}

pub(crate) fn resume(storage: &Storage, places: &Places) -> Result<Journal> {
    Journal::resume(JobDir::claim(storage, &places.dir, &TERMS)?, &manifest(), &mut |_, _| Ok(()))
}

/// Puts a segment with these rows, which may be those of other segments, too.
fn put_segment(storage: &Storage, places: &Places, number: u32, records: &[Record<'_>]) {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let other = Places::new(&store, "other.jsonl");
    let mut journal = Journal::create(JobDir::claim(storage, &other.dir, &TERMS).unwrap(), &manifest()).unwrap();
    for record in records {
        journal.append(record).unwrap();
    }
    journal.commit().unwrap();
    let content = storage.get(&other.dir.child("seg-00001-00000001.jsonl").unwrap()).unwrap().unwrap();
    storage.put(&places.dir.child(&format!("seg-00001-{number:08}.jsonl")).unwrap(), content).unwrap();
}

#[test]
fn the_first_committed_outcome_of_a_row_counts() {
    let (storage, _, places) = five_segments();
    let other = |row| Record { line: "{\"other\":1}".into(), ..outcome(row) };
    // Again while their first outcomes wait for row 10, and again after they were handed out.
    put_segment(&storage, &places, 6, &[outcome(12), outcome(11)]);
    put_segment(&storage, &places, 7, &[other(11), other(12), other(0)]);
    let mut journal = resume(&storage, &places).unwrap();
    assert!(journal.warnings.is_empty(), "{:?}", journal.warnings);
    assert_eq!((journal.done_rows().len(), journal.totals().n_ok + journal.totals().n_failed), (12, 12));
    for row in 0..N_ROWS {
        journal.append(&if row == 3 { other(3) } else { outcome(row) }).unwrap();
    }
    finalise(&mut journal, &places.outputs, N_ROWS).unwrap();
    assert_eq!(storage.get(&places.outputs.results).unwrap().unwrap(), wanted(true));
    assert_eq!(storage.get(&places.outputs.errors).unwrap().unwrap(), wanted(false));
}

#[test]
fn errors_that_are_forgotten_are_outcomes_no_more() {
    let (storage, _, places) = five_segments();
    JobDir::claim(&storage, &places.dir, &TERMS).unwrap().forget_errors().unwrap();
    let failed: Vec<u64> = (0..10).filter(|&row| !outcome(row).ok).collect();
    assert!(failed.len() > 1, "the journal tests nothing");
    let mut journal = resume(&storage, &places).unwrap();
    let missing: Vec<u64> = journal.done_rows().missing(0..10).flatten().collect();
    assert_eq!((missing, journal.totals().n_failed), (failed.clone(), 0));
    let shown = valar::journal::overview(&storage, &places.dir).unwrap().unwrap();
    assert_eq!((shown.n_done, shown.n_failed), (10 - failed.len() as u64, 0));
    // One completes now, the others fail again: that counts.
    for &row in &failed {
        let record = Record { ok: row == failed[0] || outcome(row).ok, line: "{\"again\":1}".into(), ..outcome(row) };
        journal.append(&record).unwrap();
    }
    journal.commit().unwrap();
    drop(journal);
    let mut journal = resume(&storage, &places).unwrap();
    assert_eq!((journal.done_rows().len(), journal.totals().n_failed), (10, failed.len() as u64 - 1));
    finalise(&mut journal, &places.outputs, 10).unwrap();
    let text = |at: &Location| String::from_utf8(storage.get(at).unwrap().unwrap().into()).unwrap();
    let (results, errors) = (text(&places.outputs.results), text(&places.outputs.errors));
    assert_eq!(results.matches("again").count(), 1);
    assert_eq!((errors.matches("again").count(), errors.lines().count()), (failed.len() - 1, failed.len() - 1));
}

#[test]
fn a_new_job_forgets_the_old_one() {
    let (storage, store, places) = five_segments();
    Journal::create(JobDir::claim(&storage, &places.dir, &TERMS).unwrap(), &manifest()).unwrap();
    assert!(resume(&storage, &places).unwrap().done_rows().is_empty());
    assert_eq!(contents(&storage, &store).len(), 1, "only the manifest (and the lease) is left");
}

#[test]
fn an_incomplete_journal_is_not_published() {
    let (storage, _, places) = five_segments();
    let mut journal = resume(&storage, &places).unwrap();
    journal.append(&outcome(12)).unwrap();
    let error = finalise(&mut journal, &places.outputs, 15).unwrap_err().to_string();
    assert!(error.contains("no outcome of the rows 10-11, 13-14 "), "{error}");
    let error = finalise(&mut journal, &places.outputs, 5).unwrap_err().to_string();
    assert!(error.contains("11 rows, the inputs have only 5"), "{error}");
    assert!(!storage.exists(&places.outputs.results).unwrap());
}

#[test]
fn both_files_appear_even_if_empty() {
    for output in ["x.jsonl", "x.parquet"] {
        let (storage, store) = (storage(), memory());
        let places = Places::new(&store, output);
        let mut journal = Journal::create(JobDir::claim(&storage, &places.dir, &TERMS).unwrap(), &manifest()).unwrap();
        finalise(&mut journal, &places.outputs, 0).unwrap();
        assert!(storage.exists(&places.outputs.results).unwrap(), "{output}");
        assert_eq!(storage.get(&places.outputs.errors).unwrap().unwrap().len(), 0);
        if output == "x.parquet" {
            assert_eq!(valar::format::inspect(&storage, &places.outputs.results).unwrap().n_rows, 0);
        }
    }
}
