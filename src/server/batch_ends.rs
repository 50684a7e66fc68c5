//! How batches end: their files, counts and charge, written down at once. Invariant: what a batch ended as never changes.

use super::App;
use super::batch_accept::Tariff;
use super::batch_open::{OVER_COST, Open};
use super::batch_runs::{Settings, folder};
use super::budgets::Spending;
use super::files::BATCH_OUTPUT;
use super::log::say;
use super::models::now;
use super::{ids, message_batches};
use crate::pipeline::hosted::{self, Ended, Ending, Totals};
use crate::store::Connection;
use crate::store::batches::{self, StoredBatch};
use crate::store::files::{self as stored_files, StoredFile};
use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::task::spawn_blocking;

/// Ends a batch of which nothing was run.
pub(super) async fn fail(app: &App, id: &str, faults: Vec<Value>) -> Result<()> {
    let id = id.to_owned();
    let ended = app
        .store
        .write(move |connection| {
            let stored = batches::any(connection, &id)?.context("the batch is gone")?;
            if !stored.is_open() {
                return Ok(None);
            }
            let mut body: Value = serde_json::from_str(&stored.body)?;
            body["errors"] = json!({"object": "list", "data": faults});
            if let Some(id) = body["output_file_id"].as_str() {
                stored_files::delete(connection, id)?;
                body["output_file_id"] = Value::Null;
            }
            let (state, at) = if stored.status == "cancelling" { ("cancelled", "cancelled_at") } else { ("failed", "failed_at") };
            body["completed_with_errors"] = false.into();
            body["status"] = state.into();
            body[at] = now().into();
            let is_changed = batches::update(connection, &id, (&stored.status, state), &body.to_string())?;
            Ok(is_changed.then_some((stored, body)))
        })
        .await?;
    tell(app, ended);
    Ok(())
}

/// Traces a batch that has ended so.
fn tell(app: &App, ended: Option<(StoredBatch, Value)>) {
    if let Some((stored, body)) = ended {
        app.traces.batch(&stored, &body, app.keys.name(&stored.owner));
    }
}

/// Ends a batch that can't be gone on with. What was done of it could be read, stays so, and is charged.
pub(super) async fn break_off(app: &Arc<App>, id: &str, open: &Open, faults: Vec<Value>) -> Result<()> {
    let at = app.data.join(folder(id));
    let job = at.clone();
    let published = spawn_blocking(move || hosted::publish_committed(&job)).await.context("publishing results panicked")?;
    // A disk that is full, say, is not for ever: what was done stays where it is until it can be published.
    let totals = published.context("publishing what it has done")?.unwrap_or_else(|damage| {
        say(&format!("batch {id}: what it has done is lost: {damage:#}"));
        Totals::default()
    });
    let (not_run, n_thought) = (not_run(app, id).await?, thoughts(app, id).await);
    let (key, own, ending, costs) = (id.to_owned(), Arc::clone(app), open.ending(), Costs::of(open));
    let write = move |connection: &Connection| {
        let stored = batches::any(connection, &key)?.context("the batch is gone")?;
        if !stored.is_open() {
            return Ok(None);
        }
        let settings: Settings = serde_json::from_str(&stored.settings).context("its settings")?;
        let mut body: Value = serde_json::from_str(&stored.body)?;
        let (state, at) = match (stored.status.as_str(), ending) {
            ("cancelling", _) => ("cancelled", "cancelled_at"),
            (_, Some(Ending::Rest("batch_expired", _))) => ("expired", "expired_at"),
            (_, Some(Ending::Rest(OVER_COST, _))) => ("cancelled", "cancelled_at"),
            _ => ("failed", "failed_at"),
        };
        body["errors"] = json!({"object": "list", "data": faults});
        body["completed_with_errors"] = false.into();
        body["status"] = state.into();
        body[at] = now().into();
        let has_files = totals != Totals::default();
        if has_files || costs.machine_ns.load(Relaxed) > 0 {
            charge(&own, connection, (&stored, &mut body), settings.tariff, (totals, n_thought, &costs))?;
        }
        if let Some(not_run) = not_run {
            body["not_run"] = not_run;
        }
        let file = |kind: &str| if has_files { file(&own, &key, kind, &settings) } else { Ok(unwritten(&key, kind, &settings)) };
        let files = vec![("output_file_id", file("output")?), ("error_file_id", file("error")?)];
        put_files(connection, (&stored, &mut body), files)?;
        let is_changed = batches::update(connection, &key, (&stored.status, state), &body.to_string())?;
        Ok(is_changed.then_some((stored, body)))
    };
    tell(app, app.store.write(write).await.inspect_err(|_| hold_again(open, totals))?);
    // What is left is removed at the next start.
    let removed = spawn_blocking(move || drop(std::fs::remove_dir_all(at.join("output.job"))));
    removed.await.context("removing a journal panicked")
}

/// What of an open batch is charged beside its tokens, and what it holds until then.
struct Costs {
    machine_ns: Arc<AtomicU64>,
    spending: Option<Arc<Spending>>,
}

impl Costs {
    fn of(open: &Open) -> Self {
        Self { machine_ns: Arc::clone(&open.machine_ns), spending: open.spending() }
    }
}

/// What was charged in a transaction that failed was not.
fn hold_again(open: &Open, totals: Totals) {
    open.spending().iter().for_each(|spending| _ = spending.note(totals));
}

/// Charges what was done of a batch, and says so in its object.
fn charge(
    app: &App,
    connection: &Connection,
    (stored, body): (&StoredBatch, &mut Value),
    tariff: Tariff,
    (totals, n_thought, costs): (Totals, u64, &Costs),
) -> Result<()> {
    body["request_counts"]["completed"] = totals.n_ok.into();
    body["request_counts"]["failed"] = totals.n_failed.into();
    body["usage"] = json!({
        "input_tokens": totals.prompt_tokens,
        "input_tokens_details": {"cached_tokens": totals.cached_tokens},
        "output_tokens": totals.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": n_thought},
        "total_tokens": totals.prompt_tokens + totals.completion_tokens,
    });
    let model = body["model"].as_str().unwrap_or_default();
    let price = tariff.price(app, model);
    if let Some(cost) = app.bill_batch(connection, (&stored.id, &stored.owner, model), price, (totals, &costs.machine_ns))? {
        body["usage"]["cost"] = cost.to_string().into();
    }
    // Here, so that nobody who reads the ledger after this counts it twice.
    costs.spending.iter().for_each(|spending| spending.charged());
    Ok(())
}

/// Has a batch's files be known, under these keys of its object; those that are empty are none.
fn put_files(connection: &Connection, (stored, body): (&StoredBatch, &mut Value), files: Vec<(&str, StoredFile)>) -> Result<()> {
    for (key, file) in files {
        // Results of messages are read by the batch's name alone.
        if file.bytes == 0 || stored.id.starts_with(message_batches::PREFIX) {
            stored_files::delete(connection, &file.id)?;
            body[key] = Value::Null;
        } else if body[key].is_null() || !stored_files::finish(connection, &file)? {
            // One that was readable while the batch ran may have been deleted: it had not all of the results then.
            body[key] = file.id.clone().into();
            stored_files::insert(connection, &StoredFile { owner: stored.owner.clone(), ..file })?;
        }
    }
    Ok(())
}

/// Writes down how a batch ended, with its files, all at once.
pub(super) async fn conclude(app: &Arc<App>, id: &str, open: &Open, settings: &Settings, ended: &Ended) -> Result<()> {
    let tariff = settings.tariff;
    let (totals, is_whole, ending) = (ended.totals, ended.is_whole, open.ending());
    let (results, errors) = (file(app, id, "output", settings)?, file(app, id, "error", settings)?);
    let (not_run, n_thought) = (not_run(app, id).await?, thoughts(app, id).await);
    let (id, own, costs) = (id.to_owned(), Arc::clone(app), Costs::of(open));
    let ended = app
        .store
        .write(move |connection| {
            let stored = batches::any(connection, &id)?.context("the batch is gone")?;
            let mut body: Value = serde_json::from_str(&stored.body)?;
            let (state, at) = match (stored.status.as_str(), &ending) {
                ("cancelling", _) => ("cancelled", "cancelled_at"),
                (_, Some(Ending::Rest("batch_expired", _))) if !is_whole => ("expired", "expired_at"),
                (_, Some(Ending::Rest(OVER_COST, message))) if !is_whole => {
                    let fault = json!({"code": OVER_COST, "message": message, "param": "max_cost", "line": null});
                    body["errors"] = json!({"object": "list", "data": [fault]});
                    ("cancelled", "cancelled_at")
                }
                _ => ("completed", "completed_at"),
            };
            body["completed_with_errors"] = (state == "completed" && totals.n_failed > 0).into();
            body["status"] = state.into();
            body["finalizing_at"] = now().into();
            body[at] = now().into();
            body["request_counts"]["total"] = (totals.n_ok + totals.n_failed).into();
            charge(&own, connection, (&stored, &mut body), tariff, (totals, n_thought, &costs))?;
            if let Some(not_run) = not_run {
                body["not_run"] = not_run;
            }
            put_files(connection, (&stored, &mut body), vec![("output_file_id", results), ("error_file_id", errors)])?;
            let is_changed = batches::update(connection, &id, (&stored.status, state), &body.to_string())?;
            Ok(is_changed.then_some((stored, body)))
        })
        .await
        .inspect_err(|_| hold_again(open, totals))?;
    tell(app, ended);
    Ok(())
}

/// Of a batch of messages, how many of its errors are requests that did not run, by why.
async fn not_run(app: &App, id: &str) -> Result<Option<Value>> {
    if !id.starts_with(message_batches::PREFIX) {
        return Ok(None);
    }
    let path = app.data.join(folder(id)).join("output.errors.jsonl");
    let counted = spawn_blocking(move || message_batches::not_run(&path)).await.context("reading the errors panicked")?;
    counted.map(Some)
}

/// How many of the tokens of a batch's results are thoughts: as the usages of their answers say. A batch ends whether or not they
/// can be counted.
async fn thoughts(app: &App, id: &str) -> u64 {
    // Where no model thinks, nothing is read for that.
    if !app.models.all().iter().any(|model| model.live.preparer.template.thinks()) {
        return 0;
    }
    let path = app.data.join(folder(id)).join("output.jsonl");
    let counted = spawn_blocking(move || n_thought(&path)).await.context("reading the results panicked").flatten();
    counted.unwrap_or_else(|error| {
        say(&format!("batch {id}: its thoughts are not counted: {error:#}"));
        0
    })
}

/// A result, as far as it tells of thoughts, in every dialect.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Line {
    response: Answer,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Answer {
    body: Body,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Body {
    usage: Details,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    #[serde(alias = "completion_tokens_details")]
    output_tokens_details: Thoughts,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Thoughts {
    #[serde(alias = "thinking_tokens")]
    reasoning_tokens: u64,
}

fn n_thought(results: &Path) -> Result<u64> {
    let file = match File::open(results) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        file => file.with_context(|| results.display().to_string())?,
    };
    let mut sum = 0;
    for line in BufReader::new(file).lines() {
        let line: Line = serde_json::from_str(&line?).context("a result has no usage")?;
        sum += line.response.body.usage.output_tokens_details.reasoning_tokens;
    }
    Ok(sum)
}

/// A batch's `output` or `error` file, whoever owns it.
fn file(app: &App, id: &str, kind: &str, settings: &Settings) -> Result<StoredFile> {
    let path = folder(id).join(if kind == "output" { "output.jsonl" } else { "output.errors.jsonl" });
    let at = app.data.join(&path);
    let bytes = std::fs::metadata(&at).with_context(|| at.display().to_string())?.len();
    Ok(StoredFile { bytes, ..unwritten(id, kind, settings) })
}

/// A batch's `output` or `error` file before it is there, whoever owns it.
pub(super) fn unwritten(id: &str, kind: &str, settings: &Settings) -> StoredFile {
    let path = folder(id).join(if kind == "output" { "output.jsonl" } else { "output.errors.jsonl" });
    let digits = ids::derived("valar file of a batch 1", format!("{id} {kind}").as_bytes());
    StoredFile {
        id: format!("file-{digits}"),
        owner: String::new(),
        created_at: now(),
        expires_at: settings.output_seconds.map(|seconds| now() + seconds),
        purpose: BATCH_OUTPUT.into(),
        filename: format!("{id}_{kind}.jsonl"),
        bytes: 0,
        path: path.to_string_lossy().into_owned(),
        reference: None,
    }
}
