//! Traces, sent to a collector in OTLP over HTTP where its address is configured; what they tell is in `spans`. Invariants: nobody
//! waits for the collector; what waits to be sent is bounded, and what finds no room is counted; what a request left to be done
//! later is traced if the request was.

use super::log::say;
use anyhow::{Context as _, Result, bail};
use opentelemetry::trace::{Link, SpanKind, TraceId, TraceState, TracerProvider as _};
use opentelemetry::{Context, InstrumentationScope, Key, KeyValue};
use opentelemetry_otlp::{SpanExporter as Exporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Config, SamplingDecision, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample,
    Span, SpanData, SpanExporter, SpanProcessor,
};
use std::env;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::Duration;
use tokio::task::spawn_blocking;

/// Where the collector is: of traces alone, and of all signals.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
const PROTOCOLS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
/// The one that is spoken.
const PROTOCOL: &str = "http/protobuf";
/// Where traces go under an address of all signals.
const PATH: &str = "/v1/traces";
/// Spans that may wait, where `OTEL_BSP_MAX_QUEUE_SIZE` says nothing: as in OpenTelemetry's specification.
const MAX_WAITING: usize = 2048;
/// How long the last spans may take when the server ends.
const FLUSHING: Duration = Duration::from_secs(5);
/// What the server calls itself unless it is told a name.
const NAME: &str = "valar";

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Traces {
    sender: Option<(SdkTracer, SdkTracerProvider)>,
    counts: Arc<Counts>,
}

/// What has become of spans.
#[derive(Debug, Default)]
pub(super) struct Counts {
    max_waiting: usize,
    n_waiting: AtomicUsize,
    /// The collector has them.
    n_sent: AtomicU64,
    /// It could not be told of them.
    n_failed: AtomicU64,
    /// There was no room for them.
    n_dropped: AtomicU64,
}

impl Counts {
    /// Name, kind and help of a metric, and its value.
    pub(super) fn read(&self) -> [(&'static str, &'static str, &'static str, u64); 4] {
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        [
            ("valar_spans_sent_total", "counter", "Spans that the collector has.", count(&self.n_sent)),
            ("valar_spans_failed_total", "counter", "Spans that it could not be told of.", count(&self.n_failed)),
            ("valar_spans_dropped_total", "counter", "Spans that found no room to wait.", count(&self.n_dropped)),
            ("valar_spans_waiting", "gauge", "Spans that wait to be sent.", self.n_waiting.load(Relaxed) as u64),
        ]
    }
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

impl Traces {
    /// As OpenTelemetry's variables of the environment say; `endpoint` counts where they name none. Without one there are no traces.
    ///
    /// # Errors
    /// An address that is none, or a protocol that is not spoken.
    pub(super) fn new(endpoint: Option<&str>) -> Result<Self> {
        let named = ENDPOINTS.into_iter().find_map(variable);
        let is_off = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || variable("OTEL_TRACES_EXPORTER").is_some_and(|value| value.eq_ignore_ascii_case("none"));
        let Some(collector) = named.as_deref().or(endpoint).filter(|_| !is_off) else { return Ok(Self::default()) };
        if let Some(other) = PROTOCOLS.into_iter().find_map(variable).filter(|protocol| protocol != PROTOCOL) {
            bail!("OTEL_EXPORTER_OTLP_PROTOCOL: {other:?} is not spoken; {PROTOCOL} is (port 4318, as a rule)");
        }
        // As for webhooks; an error means that somebody has installed it already.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut exporter = Exporter::builder().with_http();
        if named.is_none() {
            exporter = exporter.with_endpoint(format!("{}{PATH}", collector.trim_end_matches('/')));
        }
        let inner = exporter.build().context("the collector of traces")?;
        let max_waiting = variable("OTEL_BSP_MAX_QUEUE_SIZE").and_then(|text| text.parse().ok()).filter(|n| *n > 0);
        let counts = Arc::new(Counts { max_waiting: max_waiting.unwrap_or(MAX_WAITING), ..Counts::default() });
        let exporter = Counted { inner, counts: Arc::clone(&counts), is_down: AtomicBool::new(false) };
        let batches = BatchConfigBuilder::default().with_max_queue_size(counts.max_waiting).build();
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
        let provider = SdkTracerProvider::builder()
            .with_sampler(Following(Config::default().sampler))
            .with_resource(resource())
            .with_span_processor(Bounded { inner: processor, counts: Arc::clone(&counts) })
            .build();
        let scope = InstrumentationScope::builder(NAME).with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { sender: Some((provider.tracer_with_scope(scope), provider)), counts })
    }

    /// What makes spans, if there are any.
    pub(super) fn tracer(&self) -> Option<&SdkTracer> {
        self.sender.as_ref().map(|(tracer, _)| tracer)
    }

    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Sends what waits, if the collector takes it in time. No span is made after that.
    pub(super) async fn flush(&self) {
        let Some((_, provider)) = self.sender.clone() else { return };
        let flushed = spawn_blocking(move || provider.shutdown_with_timeout(FLUSHING)).await;
        if !matches!(flushed, Ok(Ok(()))) {
            say("traces: the collector did not take the last spans in time");
        }
    }
}

/// What all spans are of.
fn resource() -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version.clone()).build();
    let name = resource.get(&Key::new("service.name")).map(|name| name.to_string()).unwrap_or_default();
    if !name.starts_with("unknown_service") {
        return resource;
    }
    Resource::builder().with_attribute(version).with_service_name(NAME).build()
}

/// Samples as it is configured, but for what has no parent and a link: it was left by a request, and follows its decision.
#[derive(Debug, Clone)]
struct Following(Box<dyn ShouldSample>);

impl ShouldSample for Following {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let Some(link) = links.first() else { return self.0.should_sample(parent, trace, name, kind, attributes, links) };
        let decision = if link.span_context.is_sampled() { SamplingDecision::RecordAndSample } else { SamplingDecision::Drop };
        SamplingResult { decision, attributes: Vec::new(), trace_state: TraceState::default() }
    }
}

/// Hands on what there is room for: the processor behind it has as much, and would not tell what it drops.
#[derive(Debug)]
struct Bounded {
    inner: BatchSpanProcessor,
    counts: Arc<Counts>,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.counts.n_waiting.fetch_add(1, Relaxed) < self.counts.max_waiting {
            self.inner.on_end(span);
        } else {
            self.counts.n_waiting.fetch_sub(1, Relaxed);
            self.counts.n_dropped.fetch_add(1, Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Counts what is sent, on the thread that sends, and says when the collector stops and begins to answer.
#[derive(Debug)]
struct Counted {
    inner: Exporter,
    counts: Arc<Counts>,
    is_down: AtomicBool,
}

impl SpanExporter for Counted {
    async fn export(&self, spans: Vec<SpanData>) -> OTelSdkResult {
        let n_spans = spans.len();
        let sent = self.inner.export(spans).await;
        self.counts.n_waiting.fetch_sub(n_spans, Relaxed);
        let counter = if sent.is_ok() { &self.counts.n_sent } else { &self.counts.n_failed };
        counter.fetch_add(n_spans as u64, Relaxed);
        match (&sent, self.is_down.swap(sent.is_err(), Relaxed)) {
            (Err(error), false) => say(&format!("traces: {error}; spans are lost until the collector answers")),
            (Ok(()), true) => say("traces: the collector answers again"),
            _ => {}
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
