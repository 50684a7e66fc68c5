//! How a batch is accepted: its input is put on the disk, and it is refused if its owner has too much in batches, or if by the
//! forecast it could not be done by its end. What becomes of it then is in `batch_runs`. Invariant: a batch that was accepted is
//! on the disk; of one that was refused nothing is left.

use super::App;
use super::backlog::BatchTicket;
use super::batch_inputs::{self, first_model, model_of};
use super::batch_runs::{Settings, folder};
use super::batch_tokens::{Estimate, default_output, estimate};
use super::batches::Input;
use super::errors::ApiError;
use super::models::{Offered, now};
use super::once::{self, Claim};
use super::prices::Price;
use super::{batch_tries, completion_webhook, files, limits, message_batches};
use crate::store::Connection;
use crate::store::batches::{self, StoredBatch};
use crate::store::files::{self as stored_files, StoredFile};
use crate::store::one_off::Receiver;
use anyhow::Context as _;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use tokio::task::spawn_blocking;

/// What a batch's tokens cost.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Tariff {
    /// What its model costs when it ends: an earlier version accepted it.
    #[default]
    Current,
    /// Nothing.
    Free,
    /// These prices.
    Prices(Price),
}

impl Tariff {
    /// Of the model that runs it.
    pub(super) fn of(model: &Offered) -> Self {
        model.prices.of_batch().map_or(Self::Free, Self::Prices)
    }

    /// The prices, of a batch of this model.
    pub(super) fn price(self, app: &App, model: &str) -> Option<Price> {
        match self {
            Self::Current => app.models.find(model)?.prices.of_batch(),
            Self::Free => None,
            Self::Prices(price) => Some(price),
        }
    }
}

/// Puts a batch on the disk, and has it run, unless its owner has too much in batches, or the engine too much to do.
pub(super) async fn accept(
    app: Arc<App>,
    (mut new, mut settings): (StoredBatch, Settings),
    mut input: Input,
    (claim, receiver): (Option<Arc<Claim>>, Option<Receiver>),
) -> Result<(), ApiError> {
    let (id, at) = (new.id.clone(), app.data.join(folder(&new.id)));
    let file = (input.is_file && input.written.is_some()).then(|| StoredFile {
        id: input.id.clone(),
        owner: new.owner.clone(),
        created_at: new.created_at,
        expires_at: Some(new.created_at + files::BATCH_DAYS * 86_400),
        purpose: "batch".into(),
        filename: format!("{id}.jsonl"),
        bytes: 0,
        path: format!("files/{}", input.id),
        reference: None,
    });
    let limit = app.keys.allowance(&new.owner).map_or(0, |allowance| allowance.batch_tokens);
    let (unwanted, own, endpoint) = (at.clone(), Arc::clone(&app), settings.endpoint.clone());
    let put = spawn_blocking(move || -> anyhow::Result<_> {
        let referenced = input.reference.take().map(|(_, referenced)| referenced);
        let n_bytes = put_input(&at, &input, referenced.is_some())?;
        let lines = || batch_inputs::lines(&at.join("input.jsonl"), referenced.as_ref());
        let model = Arc::clone(model_of(&own.models, first_model(lines()?)?.as_deref()));
        let (most, drawn) = (default_output(&own, &model, &endpoint), model.live.backlog().batch_drawn());
        // All of what lies elsewhere is read only if it must be.
        let is_read = referenced.is_none() || limit > 0;
        let estimate = if is_read { estimate(lines()?, most, drawn)? } else { Estimate::default() };
        Ok((input, n_bytes, model, estimate))
    });
    let put = put.await.context("writing the input panicked")?;
    // Held until it is stored, also if its caller goes away.
    let _turn = claim.clone();
    let stored = match put {
        Ok((input, n_bytes, model, estimate)) => {
            settings.tariff = Tariff::of(&model);
            new.settings = serde_json::to_string(&settings).context("settings are JSON")?;
            new.n_tokens = if limit > 0 { estimate.most } else { 0 };
            let file = file.map(|file| StoredFile { bytes: n_bytes, ..file });
            let entered = match has_budget(&app, &new.owner, settings.tariff).await {
                Ok(()) => enter(&model, &new, &settings, &estimate),
                Err(refused) => Err(refused),
            };
            match entered {
                Ok(ticket) => {
                    let written =
                        app.store.write(move |connection| store(connection, &new, file, (claim, receiver), limit)).await;
                    written.map_err(ApiError::from).and_then(|accepted| accepted.map(|()| (input, ticket)))
                }
                Err(refused) => Err(refused),
            }
        }
        Err(error) => Err(batch_inputs::unread(error)),
    };
    let (input, ticket) = match stored {
        Ok(accepted) => accepted,
        Err(refused) => {
            // What is left of it is removed at the next start.
            let removed = spawn_blocking(move || drop(std::fs::remove_dir_all(unwanted)));
            removed.await.context("removing an input panicked")?;
            return Err(refused);
        }
    };
    if let Some(written) = input.written.filter(|_| input.is_file) {
        written.keep();
    }
    batch_tries::take_up(&app, id, Some(Arc::new(ticket)));
    Ok(())
}

/// Refuses what would be charged if nothing is left of its owner's budget.
async fn has_budget(app: &App, owner: &str, tariff: Tariff) -> Result<(), ApiError> {
    match app.keys.purse(owner) {
        Some(purse) if !matches!(tariff, Tariff::Free) => purse.hold(app, 0).await.map(drop),
        _ => Ok(()),
    }
}

/// Counts it in as work to be done, if that can be done by its end, and what it costs can be known if it may only cost so much.
fn enter(model: &Offered, new: &StoredBatch, settings: &Settings, estimate: &Estimate) -> Result<BatchTicket, ApiError> {
    if settings.max_cost.is_some() && matches!(settings.tariff, Tariff::Free) {
        return Err(ApiError::invalid_value("max_cost", format!("model {} has no prices", model.id)));
    }
    let ticket = model.live.backlog().enter_batch(estimate.likely, now(), new.expires_at);
    ticket.map_err(|too_long| ApiError::late_batch(too_long, new.expires_at.saturating_sub(now())))
}

/// Stores it, unless its owner has too much in batches.
fn store(
    connection: &Connection,
    new: &StoredBatch,
    file: Option<StoredFile>,
    (claim, receiver): (Option<Arc<Claim>>, Option<Receiver>),
    limit: u64,
) -> anyhow::Result<Result<(), ApiError>> {
    let used = if limit > 0 { batches::held_tokens(connection, &new.owner, &new.id)? } else { 0 };
    if limit > 0 && used.saturating_add(new.n_tokens) > limit {
        let message = limits::too_many_in_batches(limit, used, new.n_tokens);
        return Ok(Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some(limits::IN_BATCHES), message)));
    }
    if let Some(receiver) = receiver
        && let Err(refused) = completion_webhook::expect(connection, (&new.owner, &new.id), &receiver, new.created_at)?
    {
        return Ok(Err(refused));
    }
    if let Some(file) = file {
        stored_files::insert(connection, &file)?;
    }
    if let Some(claim) = claim {
        let is_messages = new.id.starts_with(message_batches::PREFIX);
        claim.keep(connection, if is_messages { once::MESSAGE_BATCH } else { once::BATCH }, &new.id)?;
    }
    batches::insert(connection, new).map(Ok)
}

/// Makes the batch's folder with its input, durably; the input's length.
fn put_input(folder: &Path, Input { path, .. }: &Input, is_elsewhere: bool) -> anyhow::Result<u64> {
    std::fs::create_dir(folder).with_context(|| folder.display().to_string())?;
    if is_elsewhere {
        for folder in [Some(folder), folder.parent()].into_iter().flatten() {
            File::open(folder)?.sync_all()?;
        }
        return Ok(0);
    }
    let own = folder.join("input.jsonl");
    // A second name for the same bytes, which nobody changes: it stays when the file is deleted.
    std::fs::hard_link(path, &own).with_context(|| path.display().to_string())?;
    for folder in [Some(folder), folder.parent(), path.parent()].into_iter().flatten() {
        File::open(folder)?.sync_all()?;
    }
    Ok(std::fs::metadata(&own)?.len())
}
