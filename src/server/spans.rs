//! What traces tell: a span for each request, below it one for what was computed for it, with its parts; one for each background
//! response and batch, linked to the request that left it. Names are those of OpenTelemetry's conventions where they have one.
//! Invariants: nothing of what is asked or answered is told, and no key; what is not traced costs a look at a flag.

use super::App;
use super::call::{Call, Prepared};
use super::traces::Traces;
use super::windows::Window;
use crate::outcome::{Completion, Usage};
use crate::request::Params;
use crate::store::batches::StoredBatch;
use crate::store::responses::StoredResponse;
use anyhow::Result;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{Link, Span as _, SpanBuilder, SpanKind, Status, TraceContextExt as _};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use serde::Deserialize;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

/// Paths that are asked for again and again by machines.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];
/// Methods that are told by name.
const METHODS: [Method; 6] = [Method::GET, Method::POST, Method::DELETE, Method::HEAD, Method::OPTIONS, Method::PUT];
/// Longest header that is taken from callers, in bytes: as much of a state as must be handed on.
const MAX_HEADER: usize = 512;
const TRACEPARENT: &str = "traceparent";

/// Where in a trace something belongs; nowhere, if it is not traced.
#[derive(Debug, Clone, Default)]
pub(super) struct Spot(Context);

impl Spot {
    fn of(tracer: &SdkTracer, span: SpanBuilder, parent: &Context) -> Self {
        Self(Context::new().with_span(span.start_with_context(tracer, parent)))
    }

    fn is_traced(&self) -> bool {
        self.0.span().span_context().is_sampled()
    }

    /// What is done later is linked to it by this, which may be stored.
    pub(super) fn link(&self) -> Option<String> {
        let mut fields = HashMap::new();
        TraceContextPropagator::new().inject_context(&self.0, &mut fields);
        fields.remove(TRACEPARENT)
    }

    /// Says which model it wants, and how soon.
    pub(super) fn wants(&self, prepared: &Prepared) {
        if self.is_traced() {
            self.0.span().set_attributes(of_model(&prepared.model.id, prepared.window));
        }
    }

    /// Says whose the request is, and how it was answered.
    pub(super) fn answered(&self, status: u16, caller: Option<&str>) {
        let span = self.0.span();
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
        if let Some(caller) = caller {
            span.set_attribute(KeyValue::new("valar.key.name", caller.to_owned()));
        }
        if status >= 500 {
            self.failed(status.to_string());
        }
    }

    /// Says what has become of a background response.
    pub(super) fn became(&self, status: &str) {
        let status = status.trim_start_matches("response.").to_owned();
        self.0.span().set_attribute(KeyValue::new("valar.response.status", status));
    }

    /// A background response's run ends before it does: somebody has ended it, or the server ends, and runs it at its next start.
    #[expect(clippy::unnecessary_wraps, reason = "the run ends with it")]
    pub(super) fn left_by(&self, app: &App) -> Result<()> {
        self.became(if app.background.is_closed() { "in_progress" } else { "cancelled" });
        Ok(())
    }

    /// It ended by a fault of that kind.
    pub(super) fn failed(&self, kind: impl Into<StringValue>) {
        self.0.span().set_attribute(KeyValue::new("error.type", kind.into()));
        self.0.span().set_status(Status::error(""));
    }

    /// The answer; the span ends when all of it was given, or nobody wants it any more.
    pub(super) fn until_sent(self, response: Response) -> Response {
        if self.is_traced() { response.map(|body| Body::new(Told { body, spot: self })) } else { response }
    }
}

/// An answer's body, whose end is its request's.
struct Told {
    body: Body,
    spot: Spot,
}

impl HttpBody for Told {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        // What makes it ends before it.
        drop(std::mem::take(&mut self.body));
        self.spot.0.span().end();
    }
}

/// What callers may say of their trace.
struct Headers<'h>(&'h HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok()).filter(|text| text.len() <= MAX_HEADER)
    }

    fn keys(&self) -> Vec<&str> {
        Vec::new()
    }
}

fn of_model(model: &str, window: Window) -> [KeyValue; 2] {
    [KeyValue::new("gen_ai.request.model", model.to_owned()), KeyValue::new("valar.window", window.as_str())]
}

fn of_tokens(input: u64, cached: u64, output: u64) -> [KeyValue; 3] {
    [
        KeyValue::new("gen_ai.usage.input_tokens", input as i64),
        KeyValue::new("gen_ai.usage.cache_read.input_tokens", cached as i64),
        KeyValue::new("gen_ai.usage.output_tokens", output as i64),
    ]
}

fn unix(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// The span of what a request left to be done; `link` is what was stored of the request's.
fn left(name: &'static str, accepted_at: u64, link: Option<String>) -> SpanBuilder {
    let fields = HashMap::from([(TRACEPARENT.to_owned(), link.unwrap_or_default())]);
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &fields);
    let link = context.span().span_context().clone();
    let links = if link.is_valid() { vec![Link::with_context(link)] } else { Vec::new() };
    SpanBuilder::from_name(name).with_kind(SpanKind::Consumer).with_start_time(unix(accepted_at)).with_links(links)
}

impl Traces {
    /// A request begins, as a part of its caller's trace if it says so.
    pub(super) fn request(&self, request: &Request, id: &str) -> Spot {
        let path = request.uri().path();
        let Some(tracer) = self.tracer().filter(|_| !PROBES.contains(&path)) else { return Spot::default() };
        let caller = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(request.headers()));
        let method = METHODS.iter().find(|method| *method == request.method()).map_or("_OTHER", Method::as_str);
        let mut attributes =
            vec![KeyValue::new("http.request.method", method.to_owned()), KeyValue::new("valar.request.id", id.to_owned())];
        let mut name = method.to_owned();
        // Paths themselves may hold names that callers chose.
        if let Some(route) = request.extensions().get::<MatchedPath>() {
            name = format!("{method} {}", route.as_str());
            attributes.push(KeyValue::new("http.route", route.as_str().to_owned()));
        }
        let span = SpanBuilder::from_name(name).with_kind(SpanKind::Server).with_attributes(attributes);
        Spot::of(tracer, span, &caller)
    }

    /// A background response is taken up, or has ended before it was; its span is that of all its time.
    pub(super) fn background(&self, stored: &StoredResponse, caller: String) -> Spot {
        #[derive(Deserialize)]
        struct Kept {
            model: String,
            window: Window,
            #[serde(default)]
            trace: Option<String>,
        }
        let Some(tracer) = self.tracer() else { return Spot::default() };
        let kept = serde_json::from_str::<Kept>(stored.request.as_deref().unwrap_or_default()).ok();
        let mut attributes =
            vec![KeyValue::new("gen_ai.response.id", stored.id.clone()), KeyValue::new("valar.key.name", caller)];
        attributes.extend(kept.iter().flat_map(|kept| of_model(&kept.model, kept.window)));
        let span = left("background response", stored.created_at, kept.and_then(|kept| kept.trace));
        Spot::of(tracer, span.with_attributes(attributes), &Context::new())
    }

    /// A batch has ended as `body` says.
    pub(super) fn batch(&self, stored: &StoredBatch, body: &serde_json::Value, caller: String) {
        #[derive(Deserialize)]
        struct Kept {
            #[serde(default)]
            trace: Option<String>,
        }
        let Some(tracer) = self.tracer() else { return };
        let kept = serde_json::from_str::<Kept>(&stored.settings).ok();
        let count = |pointer: &str| body.pointer(pointer).and_then(serde_json::Value::as_u64);
        let text = |key: &str| body[key].as_str().map(str::to_owned);
        let mut attributes = vec![KeyValue::new("valar.batch.id", stored.id.clone()), KeyValue::new("valar.key.name", caller)];
        for (name, value) in [("gen_ai.request.model", text("model")), ("valar.batch.status", text("status"))] {
            attributes.extend(value.map(|value| KeyValue::new(name, value)));
        }
        for name in ["total", "completed", "failed"] {
            let n_requests = count(&format!("/request_counts/{name}"));
            attributes.extend(n_requests.map(|n| KeyValue::new(format!("valar.batch.requests.{name}"), n as i64)));
        }
        let tokens = ["/usage/input_tokens", "/usage/input_tokens_details/cached_tokens", "/usage/output_tokens"].map(count);
        if let [Some(input), Some(cached), Some(output)] = tokens {
            attributes.extend(of_tokens(input, cached, output));
        }
        let span = left("batch", stored.created_at, kept.and_then(|kept| kept.trace)).with_attributes(attributes);
        let mut span = span.start_with_context(tracer, &Context::new());
        for state in ["in_progress", "finalizing"] {
            if let Some(at) = count(&format!("/{state}_at")) {
                span.add_event_with_timestamp(state, unix(at), Vec::new());
            }
        }
    }
}

/// What will be told of a call.
#[derive(Debug)]
pub(super) struct CallTrace {
    parent: Spot,
    attributes: Vec<KeyValue>,
    /// From when to when it waited for its model to be loaded.
    loading: Option<(Instant, Instant)>,
    /// Why its choices ended, and what it came to, once it is whole.
    whole: OnceLock<(Vec<&'static str>, Usage)>,
}

/// When something came of a call: on the engine's thread.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Times {
    /// The first step that had some of it began.
    pub(super) began: Option<Instant>,
    pub(super) first_token: Option<Instant>,
    pub(super) ended: Option<Instant>,
}

impl CallTrace {
    /// Of a call that begins, if it is traced.
    pub(super) fn new(parent: &Spot, prepared: &Prepared, id: String, loading: Option<(Instant, Instant)>) -> Option<Box<Self>> {
        if !parent.is_traced() {
            return None;
        }
        let operation = if prepared.id_prefix == "cmpl-" { "text_completion" } else { "chat" };
        let mut attributes = vec![
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("gen_ai.provider.name", "valar"),
            KeyValue::new("gen_ai.response.model", prepared.model.id.clone()),
            KeyValue::new("gen_ai.response.id", id),
        ];
        attributes.extend(of_model(&prepared.model.id, prepared.window));
        attributes.extend(prepared.prompts.first().into_iter().flat_map(|prompt| of_params(&prompt.params)));
        Some(Box::new(Self { parent: parent.clone(), attributes, loading, whole: OnceLock::new() }))
    }

    /// It is whole.
    pub(super) fn close(&self, completion: &Completion) {
        let reasons = completion.choices.iter().map(|choice| choice.finish_reason.as_str()).collect();
        // It is closed once.
        drop(self.whole.set((reasons, completion.usage)));
    }
}

fn of_params(params: &Params) -> impl Iterator<Item = KeyValue> {
    let given = [
        params.max_tokens.map(|n| KeyValue::new("gen_ai.request.max_tokens", i64::from(n))),
        params.seed.map(|seed| KeyValue::new("gen_ai.request.seed", seed as i64)),
        (params.n > 1).then(|| KeyValue::new("gen_ai.request.choice.count", i64::from(params.n))),
    ];
    let drawn = [
        KeyValue::new("gen_ai.request.temperature", f64::from(params.temperature)),
        KeyValue::new("gen_ai.request.top_p", f64::from(params.top_p)),
    ];
    given.into_iter().flatten().chain(drawn)
}

impl Call {
    /// Tells of it: it ends now.
    pub(super) fn trace_end(&self) {
        let (Some(trace), Some(tracer)) = (&self.trace, self.app.traces.tracer()) else { return };
        let (now, clock) = (Instant::now(), SystemTime::now());
        let wall = |at: Instant| clock - now.saturating_duration_since(at);
        let Times { began, first_token, ended } = self.flow.times();
        let (accepted, end) = (clock - self.elapsed(), wall(ended.unwrap_or(now)));
        let told = || self.flow.told().unwrap_or_else(|| self.flow.prompt_usage());
        let usage = trace.whole.get().map_or_else(told, |(_, usage)| *usage);
        let mut attributes = trace.attributes.clone();
        attributes.extend(of_tokens(usage.prompt_tokens.into(), usage.cached_tokens.into(), usage.completion_tokens.into()));
        if let Some((reasons, _)) = trace.whole.get() {
            let reasons = reasons.iter().map(|reason| StringValue::from(*reason)).collect();
            attributes.push(KeyValue::new("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons))));
        }
        let name = |key: &str| trace.attributes.iter().find(|one| one.key.as_str() == key).map(|one| one.value.to_string());
        let [operation, model] = ["gen_ai.operation.name", "gen_ai.request.model"].map(|key| name(key).unwrap_or_default());
        let span = SpanBuilder::from_name(format!("{operation} {model}")).with_kind(SpanKind::Internal);
        let spot = Spot::of(tracer, span.with_start_time(accepted).with_attributes(attributes), &trace.parent.0);
        if self.flow.has_failed() {
            spot.failed("engine_error");
        } else if trace.whole.get().is_none() {
            // By its caller, or because the server ends: no fault.
            spot.0.span().set_attribute(KeyValue::new("valar.broken_off", true));
        }
        let part = |name: &'static str, from: SystemTime, to: SystemTime, parent: &Spot| {
            let part = Spot::of(tracer, SpanBuilder::from_name(name).with_start_time(from), &parent.0);
            part.0.span().end_with_timestamp(to);
            part
        };
        let queue = part("queue", accepted, began.map_or(end, wall), &spot);
        if let Some((from, to)) = trace.loading {
            part("load model", wall(from), wall(to), &queue);
        }
        if let Some(began) = began {
            part("prefill", wall(began), first_token.map_or(end, wall), &spot);
        }
        if let Some(first) = first_token {
            part("decode", wall(first), end, &spot);
        }
        spot.0.span().end_with_timestamp(clock);
    }
}
