//! `/metrics`, in Prometheus' text form: gauges and counters of every engine, and of the calls. Knows no call's content.

use super::App;
use super::residency::Shown;
use crate::engine::EngineStats;
use crate::window::Class;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
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

/// Upper ends of the buckets of times, in seconds.
const BUCKETS_S: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// How long something took, over all calls.
#[derive(Debug, Default)]
pub struct Times(Mutex<Histogram>);

#[derive(Debug, Default, Clone)]
struct Histogram {
    /// Of each bucket, and of all beyond the last.
    counts: [u64; BUCKETS_S.len() + 1],
    sum_s: f64,
}

impl Times {
    /// Takes in one time.
    pub fn note(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let mut histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        histogram.counts[BUCKETS_S.partition_point(|&end| end < seconds)] += 1;
        histogram.sum_s += seconds;
    }

    fn write(&self, out: &mut String, name: &str, model: &str) {
        let Histogram { counts, sum_s } = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut n = 0;
        for (count, end) in counts.iter().zip(BUCKETS_S.iter().map(ToString::to_string).chain(["+Inf".to_owned()])) {
            n += count;
            line(out, &format!("{name}_bucket"), &format!("model={model:?},le=\"{end}\""), &n);
        }
        line(out, &format!("{name}_sum"), &format!("model={model:?}"), &sum_s);
        line(out, &format!("{name}_count"), &format!("model={model:?}"), &n);
    }
}

fn line(out: &mut String, name: &str, labels: &str, value: &dyn std::fmt::Display) {
    writeln!(out, "{name}{{{labels}}} {value}").expect("memory takes text");
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}").expect("memory takes text");
}

/// Name, kind, help, and where it stands.
type Metric = (&'static str, &'static str, &'static str, fn(&EngineStats) -> u64);

const ENGINE: [Metric; 15] = [
    ("valar_steps_total", "counter", "Steps run.", |s| s.steps),
    ("valar_prefill_tokens_total", "counter", "Prompt tokens computed.", |s| s.prefill_tokens),
    ("valar_generated_tokens_total", "counter", "Tokens drawn.", |s| s.generated_tokens),
    ("valar_shared_tokens_total", "counter", "Prompt tokens found in the KV cache.", |s| s.shared_tokens),
    ("valar_found_tokens_total", "counter", "Those of them that ended sequences had left.", |s| s.found_tokens),
    ("valar_recomputed_tokens_total", "counter", "Tokens computed again after preemptions.", |s| s.recomputed_tokens),
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
    let (budget, used) = app.models.residency.memory();
    for (name, help, bytes) in [
        ("valar_memory_budget_bytes", "What models may take together.", budget),
        ("valar_memory_used_bytes", "What those that are in memory take.", used),
    ] {
        head(out, name, "gauge", help);
        writeln!(out, "{name} {bytes}").expect("memory takes text");
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
    head(&mut out, "valar_time_to_first_token_seconds", "histogram", "From a call's start to its first token.");
    for model in &models {
        model.live.first_tokens.write(&mut out, "valar_time_to_first_token_seconds", &model.id);
    }
    for (name, help, n) in [
        ("valar_connections", "Connections that are open.", app.connections.load(Relaxed)),
        ("valar_tasks", "Tasks of the server that have not ended.", Handle::current().metrics().num_alive_tasks()),
    ] {
        head(&mut out, name, "gauge", help);
        writeln!(out, "{name} {n}").expect("memory takes text");
    }
    head(&mut out, "valar_http_responses_total", "counter", "Answers, by hundred of their status.");
    for (i, count) in app.counters.by_status.iter().enumerate() {
        line(&mut out, "valar_http_responses_total", &format!("status=\"{}xx\"", i + 1), &count.load(Relaxed));
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], out).into_response()
}
