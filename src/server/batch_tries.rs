//! How often a batch is tried. Invariants: an input that can't be read now is waited for until the batch is to end, and what
//! fails by a fault of ours is tried a few times; of what can't be gone on with, what was done stays.

use super::App;
use super::backlog::BatchTicket;
use super::batch_ends::break_off;
use super::batch_inputs;
use super::batch_open::Open;
use super::batch_runs::{carry, expired};
use super::log::say;
use super::models::now;
use crate::pipeline::hosted::Ending;
use crate::pipeline::referenced::{is_outage, refusal};
use crate::store::{batches, may_pass};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// Times that a batch is tried whose run ends by a fault of the disk.
const MAX_TRIES: u32 = 3;
/// What is said of those that could not be carried through.
const OF_SERVER: &str = "server_error";
/// Pause after a fault; of outages in a row, each further one doubles it.
const FAULT_PAUSE: Duration = Duration::from_secs(5);
/// Longest.
const MAX_PAUSE: Duration = Duration::from_mins(5);

/// Carries a batch to its end, beside everything else. `ticket` is its part of the work that is open, if it was just accepted.
pub(super) fn take_up(app: &Arc<App>, id: String, ticket: Option<Arc<BatchTicket>>) {
    let (open, app) = (app.batches.begin(&id, ticket), Arc::clone(app));
    tokio::spawn(async move {
        see_through(&app, &id, &open).await;
        app.batches.finish(&id);
    });
}

async fn see_through(app: &Arc<App>, id: &str, open: &Arc<Open>) {
    let (mut n_tries, mut n_outages) = (0, 0);
    while let Err(error) = carry(app, id, open).await {
        say(&format!("batch {id}: {error:#}"));
        if open.ending() == Some(Ending::Pause) {
            return;
        }
        let is_out = is_outage(&error) || may_pass(&error);
        (n_tries, n_outages) = if is_out { (n_tries, n_outages + 1) } else { (n_tries + 1, 0) };
        let code = match (refusal(&error).and_then(batch_inputs::final_code), open.ending()) {
            (Some(code), _) => Some(code),
            // It was asked for once more, so that requests that did not run could be told by their names.
            (None, Some(Ending::Rest(code, _))) if is_out => Some(code),
            (None, _) => (n_tries == MAX_TRIES).then_some(OF_SERVER),
        };
        if let Some(code) = code {
            // What went wrong with our own files, the log says.
            let of_server = "the server could not go on with the batch";
            let message = if code == OF_SERVER { of_server.to_owned() } else { format!("{error:#}") };
            let fault = json!({"code": code, "message": message, "param": null, "line": null});
            // Nothing else is to be done with it.
            while let Err(error) = break_off(app, id, open, vec![fault.clone()]).await {
                say(&format!("batch {id}: {error:#}"));
                if open.ending() == Some(Ending::Pause) {
                    return;
                }
                open.pause(FAULT_PAUSE).await;
            }
            return;
        }
        let pause = pause(n_outages);
        let key = id.to_owned();
        let stored = app.store.read(move |connection| batches::any(connection, &key)).await;
        let left = stored.ok().flatten().map(|stored| Duration::from_secs(stored.expires_at.saturating_sub(now())));
        open.pause(left.map_or(pause, |left| left.min(pause))).await;
        if left.is_some_and(|left| left <= pause) {
            open.end(expired());
        }
        if open.ending() == Some(Ending::Pause) {
            return;
        }
    }
}

/// After so many outages in a row; 0: after another fault.
fn pause(n_outages: u32) -> Duration {
    (FAULT_PAUSE * 2_u32.saturating_pow(n_outages.saturating_sub(1))).min(MAX_PAUSE)
}
