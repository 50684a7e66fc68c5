//! `/metrics`, in Prometheus' text form: gauges and counters of every engine, and of the calls. Knows no call's content.

use super::App;
use super::live::LiveModel;
use super::models::Offered;
use super::observed::{Histogram, Seen};
use super::residency::Shown;
use super::windows::Window;
use crate::engine::EngineStats;
use crate::window::Class;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use tokio::runtime::Handle;

/// Answers by status: one counter per hundred of them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// 100s, 200s, … 500s.
    by_status: [AtomicU64; 5],
}

impl Counters {
    /// Counts an answer.
    pub(super) fn count(&self, status: u16) {
        let class = usize::from(status / 100).clamp(1, self.by_status.len()) - 1;
        self.by_status[class].fetch_add(1, Relaxed);
    }
}

/// One histogram of a family; `labels` tell it from the others.
fn histogram(out: &mut String, name: &str, labels: &str, seen: &Histogram) {
    let (up_to, sum) = seen.read();
    let n = up_to.last().map_or(0, |(_, n)| *n);
    for (end, n) in up_to {
        line(out, &format!("{name}_bucket"), &format!("{labels},le=\"{end}\""), &n);
    }
    line(out, &format!("{name}_sum"), labels, &sum);
    line(out, &format!("{name}_count"), labels, &n);
}

fn line(out: &mut String, name: &str, labels: &str, value: &dyn std::fmt::Display) {
    writeln!(out, "{name}{{{labels}}} {value}").expect("memory takes text");
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}").expect("memory takes text");
}

/// Name, kind, help, and where it stands.
type Metric = (&'static str, &'static str, &'static str, fn(&EngineStats) -> u64);

const ENGINE: [Metric; 16] = [
    ("valar_steps_total", "counter", "Steps run.", |s| s.steps),
    ("valar_prefill_tokens_total", "counter", "Prompt tokens computed.", |s| s.prefill_tokens),
    ("valar_generated_tokens_total", "counter", "Tokens drawn.", |s| s.generated_tokens),
    ("valar_shared_tokens_total", "counter", "Prompt tokens found in the KV cache.", |s| s.shared_tokens),
    ("valar_found_tokens_total", "counter", "Those of them that ended sequences had left.", |s| s.found_tokens),
    ("valar_recomputed_tokens_total", "counter", "Tokens computed again after preemptions.", |s| s.recomputed_tokens),
    ("valar_unused_tokens_total", "counter", "Tokens computed of sequences that had ended.", |s| s.unused_tokens),
    ("valar_preemptions_total", "counter", "Times that a sequence lost its KV blocks.", |s| s.preemptions),
    ("valar_finished_total", "counter", "Sequences completed.", |s| s.finished),
    ("valar_running", "gauge", "Sequences that hold KV blocks.", |s| s.running as u64),
    ("valar_waiting", "gauge", "Sequences that wait in the engine.", |s| s.waiting as u64),
    ("valar_kv_blocks_used", "gauge", "KV blocks in use.", |s| s.blocks_used as u64),
    ("valar_kv_blocks_kept", "gauge", "KV blocks that trajectories keep between turns.", |s| s.blocks_kept as u64),
    ("valar_kept_blocks_evicted_total", "counter", "Kept KV blocks that others needed.", |s| s.evicted_blocks),
    ("valar_kept_blocks_lapsed_total", "counter", "Kept KV blocks that nobody asked for.", |s| s.lapsed_blocks),
    ("valar_kv_blocks", "gauge", "KV blocks of the pool.", |s| s.blocks_total as u64),
];

/// Name, kind, help, and where it stands.
type PlaceMetric = (&'static str, &'static str, &'static str, fn(&Shown) -> f64);

const PLACES: [PlaceMetric; 6] = [
    ("valar_model_loaded", "gauge", "1 if the model is in memory.", |place| f64::from(u8::from(place.state == "loaded"))),
    ("valar_model_memory_bytes", "gauge", "What the model takes when it is in memory.", |place| place.bytes as f64),
    ("valar_model_loads_total", "counter", "Times that the model was loaded.", |place| place.counts.n_loads as f64),
    ("valar_model_unloads_total", "counter", "Times that it was taken out.", |place| place.counts.n_unloads as f64),
    ("valar_model_load_failures_total", "counter", "Loads that failed.", |place| place.counts.n_failures as f64),
    ("valar_model_load_seconds_total", "counter", "Time that loads took after the start.", |place| {
        place.counts.load_time.as_secs_f64()
    }),
];

/// Which models are in memory.
fn memory(app: &App, out: &mut String) {
    let places: Vec<(&str, Shown)> =
        app.models.distinct().into_iter().map(|model| (model.id.as_str(), app.models.place(model))).collect();
    for (name, kind, help, of) in PLACES {
        head(out, name, kind, help);
        for (id, place) in &places {
            line(out, name, &format!("model={id:?}"), &of(place));
        }
    }
    let memories = app.models.residency.memories();
    let budgets: Vec<_> = memories.iter().map(|&(device, budget, _)| (device, budget)).collect();
    let used: Vec<_> = memories.iter().map(|&(device, _, used)| (device, used)).collect();
    for (name, help, bytes) in [
        ("valar_memory_budget_bytes", "What models may take together of a device's memory.", budgets),
        ("valar_memory_used_bytes", "What those that are loaded take.", used),
    ] {
        head(out, name, "gauge", help);
        for (device, bytes) in bytes {
            writeln!(out, "{name}{{device={device:?}}} {bytes}").expect("memory takes text");
        }
    }
}

/// A family of a number for each window of each model.
type OfWindow = (&'static str, &'static str, &'static str, fn(&Seen) -> Option<f64>);

const WINDOWS: [OfWindow; 5] = [
    ("valar_calls_total", "counter", "Calls that were accepted.", |seen| Some(seen.n_accepted.load(Relaxed) as f64)),
    ("valar_turn_target_seconds", "gauge", "Mean time that a turn should take.", |seen| {
        seen.target.map(|target| target.as_secs_f64())
    }),
    ("valar_turn_mean_seconds", "gauge", "Mean of the last 1000 turns, of the last hour.", |seen| {
        seen.mean().map(|mean| mean.as_secs_f64())
    }),
    ("valar_turns_in_time_total", "counter", "Turns that ended within their target.", |seen| {
        seen.target.map(|_| seen.n_in_time.load(Relaxed) as f64)
    }),
    ("valar_turns_over_twice_target_total", "counter", "Turns that took more than twice their target.", |seen| {
        seen.target.map(|_| seen.n_over_twice.load(Relaxed) as f64)
    }),
];

/// Windows of calls, by model.
fn windows<'m>(models: &[&'m Offered]) -> impl Iterator<Item = (String, &'m Seen, &'m Histogram)> {
    let each = |model: &'m Offered| {
        Window::ALL.map(|window| {
            let (labels, class) = (format!("model={:?},window=\"{}\"", model.id, window.as_str()), window.class() as usize);
            let seen = &model.live.observed;
            (labels, &seen.calls[class], &seen.first_tokens[class])
        })
    };
    models.iter().copied().flat_map(each)
}

/// How calls fared.
fn calls(out: &mut String, models: &[&Offered]) {
    for (name, kind, help, of) in WINDOWS {
        head(out, name, kind, help);
        for (labels, seen, _) in windows(models) {
            if let Some(value) = of(seen) {
                line(out, name, &labels, &value);
            }
        }
    }
    let name = "valar_time_to_first_token_seconds";
    head(out, name, "histogram", "From a call's start to its first token.");
    windows(models).for_each(|(labels, _, first_tokens)| histogram(out, name, &labels, first_tokens));
    let name = "valar_turn_seconds";
    head(out, name, "histogram", "From a call's acceptance to its end.");
    windows(models).for_each(|(labels, seen, _)| histogram(out, name, &labels, &seen.turns));
    let name = "valar_slack_seconds";
    head(out, name, "histogram", "What was left of the window's target at a call's end.");
    for (labels, seen, _) in windows(models).filter(|(_, seen, _)| seen.target.is_some()) {
        histogram(out, name, &labels, &seen.slack);
    }
}

/// A family of a number for each model.
type OfModel = (&'static str, &'static str, &'static str, fn(&LiveModel) -> f64);

const MODELS: [OfModel; 4] = [
    ("valar_recompute_ratio", "gauge", "Part of all computed tokens that was computed again.", |live| {
        let stats = live.stats();
        stats.recomputed_tokens as f64 / stats.computed_tokens().max(1) as f64
    }),
    ("valar_engine_busy_seconds_total", "counter", "Time of steps.", |live| live.observed.busy_s()),
    ("valar_engine_idle_ratio", "gauge", "Part of the time since the start without a step.", |live| live.observed.idle()),
    (
        "valar_asap_interference_seconds_total",
        "counter",
        "Estimate of what steps with asap calls took longer for what else was in them.",
        |live| live.observed.interference_s(),
    ),
];

/// What the engines have to do, and what their time went to.
fn steps(out: &mut String, models: &[&Offered]) {
    let name = "valar_backlog_tokens";
    head(out, name, "gauge", "Tokens of calls and batches that are open, those that will probably be drawn among them.");
    for model in models {
        for class in Class::ALL {
            let labels = format!("model={:?},class=\"{}\"", model.id, format!("{class:?}").to_lowercase());
            line(out, name, &labels, &model.live.backlog().open_tokens(class));
        }
    }
    for (name, kind, help, of) in MODELS {
        head(out, name, kind, help);
        for model in models {
            line(out, name, &format!("model={:?}", model.id), &of(&model.live));
        }
    }
    let name = "valar_class_preemptions_total";
    head(out, name, "counter", "Times that a sequence of a class lost its KV blocks.");
    for model in models {
        for (class, n) in Class::ALL.iter().zip(model.live.stats().preemptions_of) {
            let labels = format!("model={:?},class=\"{}\"", model.id, format!("{class:?}").to_lowercase());
            line(out, name, &labels, &n);
        }
    }
}

/// `GET /metrics`
pub(super) async fn show(State(app): State<Arc<App>>) -> Response {
    let mut out = String::new();
    let models = app.models.distinct();
    for (name, kind, help, of) in ENGINE {
        head(&mut out, name, kind, help);
        for model in &models {
            line(&mut out, name, &format!("model={:?}", model.id), &of(&model.live.stats()));
        }
    }
    memory(&app, &mut out);
    head(&mut out, "valar_queued_calls", "gauge", "Calls that have not begun to run.");
    for model in &models {
        for class in Class::ALL {
            let labels = format!("model={:?},class=\"{}\"", model.id, format!("{class:?}").to_lowercase());
            line(&mut out, "valar_queued_calls", &labels, &model.live.n_queued(class));
        }
    }
    head(&mut out, "valar_predicted_wait_seconds", "gauge", "How long a call that comes now would wait.");
    for model in &models {
        for class in [Class::Asap, Class::Standard] {
            let labels = format!("model={:?},class=\"{}\"", model.id, format!("{class:?}").to_lowercase());
            line(&mut out, "valar_predicted_wait_seconds", &labels, &model.live.wait(class).as_secs_f64());
        }
    }
    head(&mut out, "valar_open_calls", "gauge", "Calls that have not ended.");
    for model in &models {
        line(&mut out, "valar_open_calls", &format!("model={:?}", model.id), &model.live.n_open());
    }
    for (name, help, n_open) in [
        ("valar_background_responses", "Background responses that have not ended.", app.background.n_open()),
        ("valar_batches", "Batches that have not ended.", app.batches.n_open()),
    ] {
        head(&mut out, name, "gauge", help);
        writeln!(out, "{name} {n_open}").expect("memory takes text");
    }
    calls(&mut out, &models);
    steps(&mut out, &models);
    for (name, help, n) in [
        ("valar_connections", "Connections that are open.", app.connections.load(Relaxed)),
        ("valar_tasks", "Tasks of the server that have not ended.", Handle::current().metrics().num_alive_tasks()),
    ] {
        head(&mut out, name, "gauge", help);
        writeln!(out, "{name} {n}").expect("memory takes text");
    }
    for (name, kind, help, n) in app.traces.counts().read() {
        head(&mut out, name, kind, help);
        writeln!(out, "{name} {n}").expect("memory takes text");
    }
    head(&mut out, "valar_http_responses_total", "counter", "Answers, by hundred of their status.");
    for (i, count) in app.counters.by_status.iter().enumerate() {
        line(&mut out, "valar_http_responses_total", &format!("status=\"{}xx\"", i + 1), &count.load(Relaxed));
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], out).into_response()
}
