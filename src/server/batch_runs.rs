//! Batches at work: each is checked, waits for a place, runs as a job on its model's engine, and ends in its files. How often that
//! is tried is in `batch_tries`.
//! Invariants: a batch that was accepted ends, whatever ends the process; of two that wait, the one that is due first runs
//! first; what it ended as never changes.

use super::App;
use super::backlog::BatchTicket;
use super::batch_accept::Tariff;
use super::batch_ends::{conclude, fail, unwritten};
use super::batch_inputs::{self, first_model, lines, model_of};
use super::batch_open::Open;
use super::batch_tokens::{Estimate, estimate};
use super::budgets::Spending;
use super::log::say;
use super::models::{Offered, now};
use super::places::{Place, due};
use super::prices::Amount;
use super::residency::Lease;
use super::{batch_tries, limits};
use crate::format::openai::Endpoint;
use crate::outcome::ErrorCode;
use crate::pipeline::hosted::{Checked, Ended, Ending, HostedJob, Inbox};
use crate::pipeline::referenced::{Reference, Referenced, Refused};
use crate::store::batches::{self, StoredBatch};
use crate::store::files::{self as stored_files, StoredFile};
use crate::window::turns::Share;
use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{JoinSet, spawn_blocking};

/// Faults of lines that are told.
const MAX_FAULTS: usize = 1000;
/// Of one that is to end, the input is looked for no longer than that.
const LAST_PATIENCE: Duration = Duration::from_secs(3);

/// How often it is looked what a batch's key was charged for other things.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is kept of a batch beside its object.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) endpoint: String,
    /// How long its files are kept.
    pub(super) output_seconds: Option<u64>,
    /// What its tokens cost, as it was when it was accepted.
    #[serde(default)]
    pub(super) tariff: Tariff,
    /// What it may cost, in millionths of the currency.
    #[serde(default)]
    pub(super) max_cost: Option<u64>,
    /// Requests that can't be run are errors among its results; without that, one of them ends it.
    #[serde(default)]
    pub(super) keeps_faults: bool,
    /// Its input, if that lies elsewhere.
    #[serde(default)]
    pub(super) reference: Option<Reference>,
    /// Its request's place in a trace.
    #[serde(default)]
    pub(super) trace: Option<String>,
}

impl Settings {
    /// What an owner's batch of this model may cost, if anything limits that.
    fn spending(&self, app: &App, owner: &str, model: &str) -> Option<Spending> {
        let (most, purse) = (self.max_cost.map(Amount::of_micro), app.keys.purse(owner));
        let price = self.tariff.price(app, model).filter(|_| most.is_some() || purse.is_some())?;
        Some(Spending::new(price, most, purse))
    }
}

/// What a batch that was cancelled says of the rows that did not run.
pub(super) fn cancelled() -> Ending {
    Ending::Rest("batch_cancelled", "the batch was cancelled before this request ran".into())
}

pub(super) fn expired() -> Ending {
    Ending::Rest("batch_expired", "the batch expired before this request ran".into())
}

/// The folder of a batch, in the data folder.
pub(super) fn folder(id: &str) -> PathBuf {
    Path::new("batches").join(id)
}

/// Takes up what the store holds; removes what belongs to no batch.
pub(super) async fn start(app: &Arc<App>) -> Result<()> {
    let root = app.data.join("batches");
    std::fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
    for entry in std::fs::read_dir(&root)? {
        let entry = entry?;
        let id = entry.file_name().to_string_lossy().into_owned();
        match app.store.read(move |connection| batches::any(connection, &id)).await? {
            None => std::fs::remove_dir_all(entry.path())?,
            Some(stored) if stored.is_open() => {}
            // It ended, and the process before its journal was gone.
            Some(_) => match std::fs::remove_dir_all(entry.path().join("output.job")) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            },
        }
    }
    for id in app.store.read(batches::open).await? {
        batch_tries::take_up(app, id, None);
    }
    Ok(())
}

/// Finds the input where it lies.
async fn find(app: &Arc<App>, reference: Reference, open: &Open) -> Result<Result<Referenced, Refused>> {
    let found = batch_inputs::find(app, reference);
    if open.ending().is_none() {
        return found.await;
    }
    let late = |_| Ok(Err(Refused::Unreadable("the store does not answer".into())));
    tokio::time::timeout(LAST_PATIENCE, found).await.unwrap_or_else(late)
}

async fn load(app: &App, id: &str) -> Result<(StoredBatch, Value)> {
    let key = id.to_owned();
    let stored = app.store.read(move |connection| batches::any(connection, &key)).await?;
    let stored = stored.context("it is not in the database")?;
    let body = serde_json::from_str(&stored.body).context("its object is no JSON")?;
    Ok((stored, body))
}

pub(super) async fn carry(app: &Arc<App>, id: &str, open: &Arc<Open>) -> Result<()> {
    let (stored, _) = load(app, id).await?;
    if !stored.is_open() {
        return Ok(());
    }
    if stored.status == "cancelling" {
        open.end(cancelled());
    }
    let settings: Settings = serde_json::from_str(&stored.settings).context("its settings")?;
    let endpoint = Endpoint::parse(&settings.endpoint).context("its endpoint")?;
    let folder = app.data.join(folder(id));
    let input = match settings.reference.clone() {
        Some(reference) => Some(find(app, reference, open).await??),
        None => None,
    };
    let named = spawn_blocking({
        let (path, input) = (folder.join("input.jsonl"), input.clone());
        move || first_model(lines(&path, input.as_ref())?)
    });
    let named = named.await.context("reading the input panicked")??;
    let is_known = named.as_deref().is_none_or(|name| app.models.find(name).is_some());
    let model = Arc::clone(model_of(&app.models, named.as_deref()));
    let (name, created_unix_s) = (id.to_owned(), stored.created_at);
    let job = HostedJob { folder, name, endpoint, created_unix_s, model: model.id.clone(), input };
    if stored.status == "validating" && !validate(app, &job, &model, (is_known, &settings)).await? {
        return Ok(());
    }
    let (stored, _) = load(app, id).await?;
    if stored.status == "cancelling" {
        open.end(cancelled());
    }
    let timer = tokio::spawn({
        let (open, left) = (Arc::clone(open), stored.expires_at.saturating_sub(now()));
        async move {
            tokio::time::sleep(Duration::from_secs(left)).await;
            open.end(expired());
        }
    });
    // What an earlier run has done is known before it goes on.
    let own = job.clone();
    match spawn_blocking(move || own.done()).await.context("looking at the journal panicked")? {
        Ok(counts) => open.note_counts(counts),
        Err(error) => say(&format!("batch {id}: {error:#}")),
    }
    if open.ticket().is_none() {
        open.count_as(count_in(&job, &model, open.counts(), stored.expires_at).await?);
    }
    let spending = open.spend(|| settings.spending(app, &stored.owner, &model.id));
    let ended = wait_and_run(app, &stored, open, job, (&model, &spending)).await;
    timer.abort();
    if let Some(ended) = ended? {
        conclude(app, id, open, &settings, &ended).await?;
        spawn_blocking(move || ended.forget()).await.context("removing a journal panicked")??;
    }
    Ok(())
}

/// Counts in what is left of a batch that was accepted before the server started. What lies elsewhere is not read for that.
async fn count_in(job: &HostedJob, model: &Offered, counts: (u64, u64), expires_at: u64) -> Result<BatchTicket> {
    let (input, live, is_here) = (job.folder.join("input.jsonl"), Arc::clone(&model.live), job.input.is_none());
    let counted = spawn_blocking(move || -> Result<BatchTicket> {
        let drawn = live.backlog().batch_drawn();
        let all = if is_here { estimate(lines(&input, None)?, 0, drawn)? } else { Estimate::default() };
        let n_left = all.n_lines.saturating_sub(counts.0 + counts.1);
        let likely = (all.likely as f64 * n_left as f64 / all.n_lines.max(1) as f64) as u64;
        Ok(live.backlog().enter_accepted(likely, expires_at))
    });
    counted.await.context("reading the input panicked")?
}

/// Checks all lines; false if there is no more to do. The state is in progress then, or cancelling.
async fn validate(app: &Arc<App>, job: &HostedJob, model: &Offered, (is_known, settings): (bool, &Settings)) -> Result<bool> {
    // One after the other: each takes all cores, and a thread that live calls would have.
    let _turn = app.batches.checking.acquire().await.context("nobody closes it")?;
    let (own, preparer, max_rows) = (job.clone(), Arc::clone(&model.live.preparer), app.max_batch_rows);
    let keeps_faults = settings.keeps_faults;
    let checked = spawn_blocking(move || own.check(&preparer, max_rows, (MAX_FAULTS, keeps_faults)));
    let Checked { n_rows, n_tokens, faults } = checked.await.context("checking the lines panicked")??;
    let fault = |code: &str, message: String| json!({"code": code, "message": message, "param": null, "line": null});
    let faults: Vec<Value> = if n_rows > max_rows {
        vec![fault("too_many_tasks", format!("the file has more than {max_rows} requests"))]
    } else if n_rows == 0 {
        vec![fault("empty_file", "the file has no requests".into())]
    } else if settings.keeps_faults {
        Vec::new()
    } else {
        let shown = faults.iter().map(|fault| {
            let code = if !is_known && fault.error.code == ErrorCode::ModelMismatch {
                "model_not_found"
            } else {
                fault.error.code.as_str()
            };
            json!({"code": code, "message": fault.error.message, "param": fault.error.field, "line": fault.line})
        });
        shown.collect()
    };
    if !faults.is_empty() {
        fail(app, &job.name, faults).await?;
        return Ok(false);
    }
    let (stored, mut body) = load(app, &job.name).await?;
    if let Some(message) = over_limit(app, &stored, n_tokens).await? {
        fail(app, &job.name, vec![fault(limits::IN_BATCHES, message)]).await?;
        return Ok(false);
    }
    body["status"] = "in_progress".into();
    body["in_progress_at"] = now().into();
    body["model"] = job.model.clone().into();
    body["request_counts"]["total"] = n_rows.into();
    let output = (!settings.keeps_faults).then(|| {
        let file = unwritten(&job.name, "output", settings);
        // Readable while it is written, and its time begins when it is whole.
        body["output_file_id"] = file.id.clone().into();
        StoredFile { owner: stored.owner.clone(), expires_at: None, ..file }
    });
    let (id, text) = (job.name.clone(), body.to_string());
    app.store
        .write(move |connection| {
            batches::hold_tokens(connection, &id, n_tokens)?;
            if batches::update(connection, &id, ("validating", "in_progress"), &text)? {
                return output.map_or(Ok(()), |file| stored_files::insert(connection, &file));
            }
            // It was cancelled meanwhile.
            let stored = batches::any(connection, &id)?.context("the batch is gone")?;
            let mut cancelling: Value = serde_json::from_str(&stored.body)?;
            cancelling["request_counts"]["total"] = n_rows.into();
            batches::update(connection, &id, ("cancelling", "cancelling"), &cancelling.to_string()).map(drop)
        })
        .await?;
    Ok(true)
}

/// Why a batch of so many tokens is one too many, if it is.
async fn over_limit(app: &App, stored: &StoredBatch, n_tokens: u64) -> Result<Option<String>> {
    let limit = app.keys.allowance(&stored.owner).map_or(0, |allowance| allowance.batch_tokens);
    if limit == 0 {
        return Ok(None);
    }
    let (id, owner) = (stored.id.clone(), stored.owner.clone());
    let used = app.store.read(move |connection| batches::held_tokens(connection, &owner, &id)).await?;
    let is_over = used.saturating_add(n_tokens) > limit;
    Ok(is_over.then(|| limits::too_many_in_batches(limit, used, n_tokens)))
}

/// Runs the job when it has a place; `None` if it is to be gone on with at another start.
async fn wait_and_run(
    app: &Arc<App>,
    stored: &StoredBatch,
    open: &Arc<Open>,
    job: HostedJob,
    (model, limit): (&Arc<Offered>, &Option<Arc<Spending>>),
) -> Result<Option<Ended>> {
    let n_rows = serde_json::from_str::<Value>(&stored.body)?["request_counts"]["total"].as_u64();
    loop {
        // One whose rows are all done costs no more, and is to be charged.
        let (n_ok, n_failed) = open.counts();
        let spending = limit.as_ref().filter(|_| n_rows.is_none_or(|n_rows| n_ok + n_failed < n_rows)).cloned();
        wait_for_budget(app, open, spending.as_deref()).await?;
        // It ends with this turn.
        let _watching = watch(app, open, spending);
        let (place, lease) = wait(app, stored, open, model).await;
        let ending = open.ending();
        if ending == Some(Ending::Pause) {
            return Ok(None);
        }
        if lease.is_none() && ending.is_none() {
            // Another has its place, or nothing is left of its key's budget.
            open.take_leave();
            continue;
        }
        let (job, model, own, spending) = (job.clone(), Arc::clone(model), Arc::clone(open), limit.clone());
        let (expires_at, share) = (stored.expires_at, app.keys.share(&stored.owner));
        let ran = spawn_blocking(move || run(&job, (&model, spending), lease, &own, (expires_at, share))).await;
        let ran = ran.context("the batch panicked")?;
        drop(place);
        let must_leave = open.take_leave();
        if !matches!(ran, Ok(None)) || !must_leave || open.ending() == Some(Ending::Pause) {
            return ran;
        }
    }
}

/// Waits until it has a place and an engine, or has ended, or another should have its place.
async fn wait<'a>(
    app: &'a Arc<App>,
    stored: &StoredBatch,
    open: &Arc<Open>,
    model: &'a Offered,
) -> (Option<Place<'a>>, Option<Lease>) {
    let Some(mut woken) = open.wake() else { return (None, None) };
    let key = (due(stored.created_at, stored.expires_at), stored.expires_at, stored.id.clone());
    let (share, asked) = (app.keys.share(&stored.owner), Arc::clone(open));
    let rung = app.batches.places.enter(&model.id, (key.clone(), share), Box::new(move || asked.leave()));
    let place = Place { places: &app.batches.places, model: &model.id, key };
    tokio::select! {
        // An error would mean that the places are gone.
        _ = rung => {}
        // Nobody sends: it is dropped.
        _ = &mut woken => return (Some(place), None),
    }
    let (left, asked) = (Duration::from_secs(stored.expires_at.saturating_sub(now())), Arc::clone(open));
    tokio::select! {
        // Without one, the server ends.
        lease = app.models.lend_to_batch(model, left, Box::new(move || asked.leave())) => (Some(place), lease.ok()),
        _ = woken => (Some(place), None),
    }
}

/// Waits until something is left of its key's budget, or until it is to end.
async fn wait_for_budget(app: &App, open: &Open, spending: Option<&Spending>) -> Result<()> {
    let Some(spending) = spending else { return Ok(()) };
    let mut said = spending.look(app).await?;
    while said.is_some() && open.ending().is_none() {
        open.wait_for_budget(said.clone());
        open.pause(LOOK_EVERY).await;
        // What can't be read now is read a second later.
        said = spending.look(app).await.unwrap_or(said);
    }
    open.wait_for_budget(None);
    Ok(())
}

/// Has it leave its place when nothing is left of its key's budget, until this is dropped.
fn watch(app: &Arc<App>, open: &Arc<Open>, spending: Option<Arc<Spending>>) -> JoinSet<()> {
    let mut watching = JoinSet::new();
    if let Some(spending) = spending {
        let (app, open) = (Arc::clone(app), Arc::clone(open));
        watching.spawn(async move {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                if matches!(spending.look(&app).await, Ok(Some(_))) {
                    open.leave();
                }
            }
        });
    }
    watching
}

/// Without a lease it is only ended.
fn run(
    job: &HostedJob,
    (model, spending): (&Offered, Option<Arc<Spending>>),
    lease: Option<Lease>,
    open: &Arc<Open>,
    (expires_at, share): (u64, Share),
) -> Result<Option<Ended>> {
    let (link, inbox) = Inbox::new();
    let (due, window_s) = (due(job.created_unix_s, expires_at), expires_at.saturating_sub(job.created_unix_s));
    let at = model.live.seat(lease, &link, (&open.machine_ns, open.ticket()), (due, window_s, share));
    open.begin_run(link);
    let told = Arc::clone(open);
    let ran = job.run(&at.seat, inbox, &|| open.stop(), move |totals| told.note(totals, spending.as_deref()));
    open.end_run();
    ran
}
