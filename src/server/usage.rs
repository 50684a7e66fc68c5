//! What was used and what it costs: `GET /v1/usage`, `valar usage`. Knows the ledger's sums and no call. Invariant: the groups
//! of an answer add up to its total, whatever they are told apart by.

use super::App;
use super::auth::Owner;
use super::errors::{ApiError, json_response};
use super::paging::Pairs;
use super::prices::{Amount, machine_amount};
use super::trajectories;
use crate::store;
use crate::store::ledger::{self, By, Question, Sums};
use crate::store::trajectories::{self as store_trajectories, Trajectory};
use anyhow::{Context as _, Result};
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use chrono::{DateTime, NaiveDate};
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

/// What is told apart where nothing is said.
const DEFAULT_BY: [By; 3] = [By::Day, By::Model, By::Window];

/// Trajectories that are told one by one; the total is of all.
const MAX_TRAJECTORIES: usize = 1000;
/// What asks for them, alone.
const TRAJECTORY: &str = "trajectory";

/// A part of a question that makes no sense: its name, and why.
type Fault = (&'static str, String);

/// Reads a question: times are unix seconds, days or RFC 3339; `by` is a list of names with commas between.
fn question(from: Option<&str>, until: Option<&str>, by: Option<&str>) -> Result<Question, Fault> {
    let time = |name: &'static str, text: Option<&str>| {
        let fault = |text: &str| (name, format!("{text:?} is no time: unix seconds, YYYY-MM-DD or RFC 3339"));
        text.map(|text| seconds(text).ok_or_else(|| fault(text))).transpose()
    };
    let by = match by {
        None => DEFAULT_BY.to_vec(),
        Some(names) if names.split(',').any(|name| name.trim() == TRAJECTORY) => {
            return Err(("group_by", format!("{TRAJECTORY:?} can't be combined: a conversation has many days and models")));
        }
        Some(names) => {
            let names = names.split(',').map(str::trim).filter(|name| !name.is_empty());
            let found = names.map(|name| {
                let known = By::ALL.iter().find(|(known, _)| *known == name).map(|(_, by)| *by);
                known.ok_or_else(|| {
                    let all: Vec<&str> = By::ALL.iter().map(|(name, _)| *name).collect();
                    ("group_by", format!("{name:?} is not one of {}, or {TRAJECTORY} alone", all.join(", ")))
                })
            });
            let found: Vec<By> = found.collect::<Result<_, _>>()?;
            if (1..found.len()).any(|i| found[..i].contains(&found[i])) {
                return Err(("group_by", "names something twice".to_owned()));
            }
            found
        }
    };
    Ok(Question { from: time("start", from)?.unwrap_or(0), until: time("end", until)?.unwrap_or(u64::MAX), owner: None, by })
}

fn seconds(text: &str) -> Option<u64> {
    let day = || Some(NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.and_hms_opt(0, 0, 0)?.and_utc().timestamp());
    let moment = || Some(DateTime::parse_from_rfc3339(text).ok()?.timestamp());
    text.parse().ok().or_else(|| day().or_else(moment)?.try_into().ok())
}

/// A group as it is shown, given what its machine time costs.
fn shown(sums: &Sums, machine_cost: Amount) -> Value {
    json!({
        "n_requests": sums.n_requests,
        "input_tokens": sums.input_tokens,
        "cached_tokens": sums.cached_tokens,
        "output_tokens": sums.output_tokens,
        "total_tokens": sums.input_tokens + sums.output_tokens,
        "charge": Amount(sums.charge).to_string(),
        "machine_seconds": sums.machine_ns as f64 / 1e9,
        "machine_cost": machine_cost.to_string(),
    })
}

/// Groups and their total.
fn report(groups: &[Sums], question: &Question) -> Value {
    let mut total = Sums::default();
    let mut before = Amount(0);
    let data: Vec<Value> = groups
        .iter()
        .map(|group| {
            total.n_requests += group.n_requests;
            total.input_tokens += group.input_tokens;
            total.cached_tokens += group.cached_tokens;
            total.output_tokens += group.output_tokens;
            total.charge += group.charge;
            total.machine_ns += group.machine_ns;
            total.machine_cost += group.machine_cost;
            // What is rounded off of one goes to the next.
            let until = machine_amount(total.machine_cost);
            let mut object = shown(group, Amount(until.0 - before.0));
            before = until;
            for (by, value) in question.by.iter().zip(&group.group) {
                object[by.name()] = if value.is_empty() { Value::Null } else { value.as_str().into() };
            }
            object
        })
        .collect();
    let mut sum = shown(&total, before);
    sum["margin"] = Amount(total.charge - before.0).to_string().into();
    json!({"object": "list", "data": data, "total": sum, "has_more": false})
}

/// What part of the machine's time requests took, and would have to take for their charges to pay for all of it.
fn utilisation(report: &mut Value, busy: &Sums, all: &Sums) {
    if all.machine_ns > 0 {
        report["total"]["utilisation"] = (busy.machine_ns as f64 / all.machine_ns as f64).into();
    }
    if busy.charge > 0 {
        let cost = machine_amount(all.machine_cost).0 as f64 * busy.machine_ns as f64 / all.machine_ns.max(1) as f64;
        report["total"]["break_even_utilisation"] = (cost / busy.charge as f64).into();
    }
}

/// A question, and whether it is about trajectories.
fn asked(from: Option<&str>, until: Option<&str>, by: Option<&str>) -> Result<(Question, bool), Fault> {
    let is_of_trajectories = by.is_some_and(|by| by.trim() == TRAJECTORY);
    Ok((question(from, until, if is_of_trajectories { Some("") } else { by })?, is_of_trajectories))
}

/// What the conversations came to whose last turn ended in the span, the last first.
fn trajectories_of(connection: &store::Connection, question: &Question) -> Result<Value> {
    let (owner, span) = (question.owner.as_deref(), (question.from, question.until));
    let (sum, n_found) = store_trajectories::sum(connection, owner, span)?;
    let group = |found: &Trajectory| {
        let mut group = trajectories::shown(found);
        group["n_requests"] = found.n_turns.into();
        group["total_tokens"] = (found.input_tokens + found.output_tokens).into();
        group
    };
    let found = store_trajectories::of_span(connection, owner, span, MAX_TRAJECTORIES)?;
    let data: Vec<Value> = found
        .iter()
        .map(|found| {
            let mut group = group(found);
            group[TRAJECTORY] = found.id.as_str().into();
            group
        })
        .collect();
    let mut total = group(&sum);
    if let Some(total) = total.as_object_mut() {
        total.retain(|key, _| key != "id" && key != "object");
    }
    total["trajectories"] = n_found.into();
    Ok(json!({"object": "list", "data": data, "total": total, "has_more": n_found > data.len() as u64}))
}

/// Answers a question.
fn answer(connection: &store::Connection, (question, is_of_trajectories): &(Question, bool)) -> Result<Value> {
    if *is_of_trajectories {
        return trajectories_of(connection, question);
    }
    let mut report = report(&ledger::sums(connection, question)?, question);
    let whole = Question { by: vec![By::Model], ..question.clone() };
    let (mut busy, mut all) = (Sums::default(), Sums::default());
    for group in ledger::sums(connection, &whole)? {
        for sum in [Some(&mut all), (group.group[0] != *"").then_some(&mut busy)].into_iter().flatten() {
            sum.machine_ns += group.machine_ns;
            sum.machine_cost += group.machine_cost;
            sum.charge += group.charge;
        }
    }
    utilisation(&mut report, &busy, &all);
    Ok(report)
}

/// `GET /v1/usage`: of the key that asks; without keys, or for an admin's, of all, with the machine's time that nobody used.
pub(super) async fn show(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    query: Pairs,
) -> Result<Response, ApiError> {
    let get = |name: &str| super::paging::get(&query, name);
    if let Some((name, _)) = query.iter().find(|(name, _)| !["start", "end", "group_by"].contains(&name.as_str())) {
        return Err(ApiError::field("unsupported_parameter", name.clone(), "is not supported; supported: start, end, group_by"));
    }
    let asked = asked(get("start"), get("end"), get("group_by"));
    let (question, is_of_trajectories) = asked.map_err(|(name, message)| ApiError::invalid_value(name, message))?;
    let question = Question { owner: (!app.keys.sees_all(&owner)).then(|| owner.to_string()), ..question };
    let question = (question, is_of_trajectories);
    app.read_meters().await?;
    let mut report = app.store.read(move |connection| answer(connection, &question)).await?;
    report["currency"] = app.books.currency.clone().into();
    if let Some(purse) = app.keys.purse(&owner) {
        report["budget"] = purse.shown(&app).await?;
    }
    Ok(json_response(&report))
}

/// `valar usage`: of all keys, from the data folder, whether its server runs or not.
///
/// # Errors
/// A question that makes no sense, or no database.
pub fn print(data: &Path, (from, until): (Option<&str>, Option<&str>), by: Option<&str>, as_json: bool) -> Result<()> {
    let question = asked(from, until, by).map_err(|(name, message)| anyhow::anyhow!("{name}: {message}"))?;
    let report = store::look(data, |connection| answer(connection, &question)).context("reading the ledger")?;
    let mut out = std::io::stdout().lock();
    if as_json {
        writeln!(out, "{report:#}")?;
        return Ok(());
    }
    let (question, is_of_trajectories) = question;
    let names: Vec<&str> = if is_of_trajectories { vec![TRAJECTORY] } else { question.by.iter().map(|by| by.name()).collect() };
    let columns: &[&str] = if is_of_trajectories {
        &["turns", "input_tokens", "cached_tokens", "output_tokens", "charge", "turn_seconds", "wall_seconds"]
    } else {
        &["n_requests", "input_tokens", "cached_tokens", "output_tokens", "charge", "machine_cost"]
    };
    let text = |value: &Value| {
        value.as_str().map_or_else(|| if value.is_null() { "-".to_owned() } else { value.to_string() }, str::to_owned)
    };
    let mut rows = vec![names.iter().chain(columns).map(|name| (*name).to_owned()).collect::<Vec<_>>()];
    let groups = report["data"].as_array().into_iter().flatten();
    rows.extend(groups.map(|group| names.iter().chain(columns).map(|name| text(&group[*name])).collect()));
    let total = names.iter().enumerate().map(|(i, _)| if i == 0 { "total".to_owned() } else { String::new() });
    rows.push(total.chain(columns.iter().map(|name| text(&report["total"][*name]))).collect());
    let widths: Vec<usize> = (0..rows[0].len()).map(|i| rows.iter().map(|row| row[i].len()).max().unwrap_or(0)).collect();
    for row in rows {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(i, (cell, width))| if i < names.len() { format!("{cell:<width$}") } else { format!("{cell:>width$}") });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}
