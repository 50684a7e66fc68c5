//! Traces, as a collector gets them: what belongs to what, what is told of it, that nothing of what is asked and answered is, and
//! that nobody waits for a collector that does not answer.

use crate::serving::{FOREVER, KEY, MODEL, Server, read_until};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// What stands in every prompt, and nowhere else.
const MARKER: &str = "xylophone-48151623";

/// A collector on a port of its own.
struct Collector {
    url: String,
    /// Heads of requests.
    heads: Arc<Mutex<Vec<String>>>,
    /// Bodies, as they came.
    bodies: Receiver<Vec<u8>>,
    /// Spans that came, with what they belong to.
    spans: Vec<(Span, Vec<(String, Any)>)>,
    /// As long as this is held, nothing is answered.
    gate: Arc<Mutex<()>>,
    n_requests: Arc<AtomicUsize>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (sender, bodies) = channel();
        let (heads, gate, n_requests) = <(Arc<Mutex<Vec<String>>>, Arc<Mutex<()>>, Arc<AtomicUsize>)>::default();
        let (own_heads, own_gate, n) = (Arc::clone(&heads), Arc::clone(&gate), Arc::clone(&n_requests));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (sender, heads, gate, n) = (sender.clone(), Arc::clone(&own_heads), Arc::clone(&own_gate), Arc::clone(&n));
                std::thread::spawn(move || hear(stream.unwrap(), &heads, &sender, (&*gate, &*n)));
            }
        });
        Self { url, heads, bodies, spans: Vec::new(), gate, n_requests }
    }

    /// Takes in what comes until there is such a span.
    #[track_caller]
    fn until(&mut self, is_it: impl Fn(&Span) -> bool) -> Span {
        loop {
            if let Some((span, _)) = self.spans.iter().find(|(span, _)| is_it(span)) {
                return span.clone();
            }
            let body = self.bodies.recv_timeout(FOREVER).expect("the span comes");
            self.take(&body);
        }
    }

    fn take(&mut self, body: &[u8]) {
        for secret in [MARKER, KEY] {
            assert!(!body.windows(secret.len()).any(|window| window == secret.as_bytes()), "{secret} is told");
        }
        for of_resource in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
            let resource = of_resource.resource.unwrap().attributes;
            let resource: Vec<(String, Any)> =
                resource.into_iter().map(|one| (one.key, one.value.unwrap().value.unwrap())).collect();
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.extend(spans.map(|span| (span, resource.clone())));
        }
    }

    /// The spans below one, by name, once there are so many.
    #[track_caller]
    fn below(&mut self, parent: &Span, names: &[&str]) -> Vec<Span> {
        names.iter().map(|name| self.until(|span| span.name == *name && span.parent_span_id == parent.span_id)).collect()
    }
}

/// One connection of the server's.
fn hear(stream: TcpStream, heads: &Mutex<Vec<String>>, bodies: &Sender<Vec<u8>>, (gate, n): (&Mutex<()>, &AtomicUsize)) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok()).unwrap();
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        heads.lock().unwrap().push(head);
        n.fetch_add(1, SeqCst);
        drop(gate.lock().unwrap());
        // The test may have seen enough.
        drop(bodies.send(body));
        let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        if reader.get_mut().write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// A server that sends what it has soon; `env` is laid over that.
fn server(config: &str, collector: &Collector, env: &[(&str, &str)]) -> Server {
    let base = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "50")];
    let kept = base.into_iter().filter(|(name, _)| env.iter().all(|(other, _)| other != name));
    let env: Vec<(&str, &str)> = kept.chain(env.iter().copied()).collect();
    Server::with_env(config, &["--api-key", KEY], &env, |_| {})
}

fn attribute(span: &Span, key: &str) -> Option<Value> {
    let value = span.attributes.iter().find(|one| one.key == key)?.value.clone()?.value?;
    Some(json_of(value))
}

fn json_of(value: Any) -> Value {
    match value {
        Any::StringValue(text) => text.into(),
        Any::BoolValue(value) => value.into(),
        Any::IntValue(n) => n.into(),
        Any::DoubleValue(x) => x.into(),
        Any::ArrayValue(values) => values.values.into_iter().map(|value| json_of(value.value.unwrap())).collect(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_told(span: &Span, expected: &Value) {
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(attribute(span, key).as_ref(), Some(value), "{key} of {}: {:?}", span.name, span.attributes);
    }
}

fn chat(max_tokens: usize, stream: bool) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": MARKER}], "max_tokens": max_tokens, "ignore_eos": true,
           "temperature": 0, "stream": stream})
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// `traceparent` of a caller, and its trace.
fn caller(trace: u8, is_sampled: bool) -> (String, String) {
    let trace = hex(&[trace; 16]);
    (format!("00-{trace}-00f067aa0ba902b7-0{}", u8::from(is_sampled)), trace)
}

fn post_as(server: &Server, path: &str, traceparent: &str, body: &Value) -> crate::serving::Answer {
    let key = format!("Bearer {KEY}");
    server.send("POST", path, &[("authorization", &key), ("traceparent", traceparent)], body.to_string())
}

fn of_trace(trace: &str) -> impl Fn(&Span) -> bool + '_ {
    move |span| hex(&span.trace_id) == trace && span.kind == 2
}

/// A part lies within the whole.
#[track_caller]
fn assert_within(whole: &Span, part: &Span) {
    let times = |span: &Span| (span.start_time_unix_nano, span.end_time_unix_nano);
    assert!(part.start_time_unix_nano <= part.end_time_unix_nano, "{}: {:?}", part.name, times(part));
    // Times are taken from two clocks.
    let slack = 5_000_000;
    let is_within = part.start_time_unix_nano + slack >= whole.start_time_unix_nano
        && part.end_time_unix_nano <= whole.end_time_unix_nano + slack;
    assert!(is_within, "{} {:?} is not within {} {:?}", part.name, times(part), whole.name, times(whole));
    assert_eq!((&part.trace_id, &part.parent_span_id), (&whole.trace_id, &whole.span_id));
}

#[test]
fn a_call_is_told_of_from_its_callers_trace_to_its_tokens() {
    let mut collector = Collector::start();
    let config = format!("[[key]]\nname = \"ann\"\nkey = \"{KEY}\"\n");
    let env = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=ours"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ("OTEL_SERVICE_NAME", "engine of ours"),
    ];
    let server = Server::with_env(&config, &[], &env, |_| {});
    // One that its caller does not trace is not told of: whatever comes later is.
    let (unsampled, untold) = caller(1, false);
    assert_eq!(post_as(&server, "/v1/chat/completions", &unsampled, &chat(2, false)).status, 200);
    for (number, stream) in [(2, false), (3, true)] {
        let (traceparent, trace) = caller(number, true);
        let answer = post_as(&server, "/v1/chat/completions", &traceparent, &chat(5, stream));
        assert_eq!(answer.status, 200, "{}", answer.text);
        let request = collector.until(of_trace(&trace));
        assert_eq!(
            (request.name.as_str(), hex(&request.parent_span_id).as_str()),
            ("POST /v1/chat/completions", "00f067aa0ba902b7")
        );
        assert_told(
            &request,
            &json!({"http.route": "/v1/chat/completions", "http.request.method": "POST", "http.response.status_code": 200,
                    "valar.request.id": answer.header("x-request-id"), "valar.key.name": "ann", "gen_ai.request.model": MODEL,
                    "valar.window": "asap"}),
        );
        let call = collector.below(&request, &[format!("chat {MODEL}").as_str()]).remove(0);
        assert_within(&request, &call);
        let id = if stream { answer.chunks()[0]["id"].clone() } else { answer.json()["id"].clone() };
        assert_told(
            &call,
            &json!({"gen_ai.operation.name": "chat", "gen_ai.response.id": id, "gen_ai.response.model": MODEL,
                    "gen_ai.request.max_tokens": 5, "gen_ai.request.temperature": 0.0, "gen_ai.usage.output_tokens": 5,
                    "gen_ai.response.finish_reasons": ["length"]}),
        );
        if !stream {
            assert_told(&call, &json!({"gen_ai.usage.input_tokens": answer.json()["usage"]["prompt_tokens"]}));
        }
        let parts = collector.below(&call, &["queue", "prefill", "decode"]);
        for part in &parts {
            assert_within(&call, part);
        }
        let [queue, prefill, decode] = &parts[..] else { unreachable!() };
        assert_eq!(queue.end_time_unix_nano, prefill.start_time_unix_nano);
        assert_eq!(prefill.end_time_unix_nano, decode.start_time_unix_nano);
    }
    let (traceparent, trace) = caller(4, true);
    assert_eq!(post_as(&server, "/v1/models/none", &traceparent, &Value::Null).status, 405);
    assert_told(&collector.until(of_trace(&trace)), &json!({"http.response.status_code": 405}));
    let (_, resource) = &collector.spans[0];
    assert!(resource.contains(&("service.name".into(), Any::StringValue("engine of ours".into()))), "{resource:?}");
    assert!(collector.spans.iter().all(|(span, _)| hex(&span.trace_id) != untold));
    let heads = collector.heads.lock().unwrap();
    assert!(heads.iter().all(|head| head.starts_with("POST /v1/traces ") && head.contains("x-tenant: ours")), "{heads:?}");
}

#[test]
fn a_stream_that_is_broken_off_is_told_of_as_far_as_it_came() {
    let mut collector = Collector::start();
    let server = server("", &collector, &[]);
    let (mut stream, body) = (TcpStream::connect(&server.address).unwrap(), chat(4000, true).to_string());
    let (traceparent, trace) = caller(5, true);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ntraceparent: {traceparent}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    read_until(&mut stream, "\"content\":\"");
    drop(stream);
    let request = collector.until(of_trace(&trace));
    let call = collector.below(&request, &[format!("chat {MODEL}").as_str()]).remove(0);
    assert_told(&call, &json!({"valar.broken_off": true}));
    assert!(attribute(&call, "gen_ai.usage.output_tokens").unwrap().as_u64().unwrap() < 4000);
    assert_eq!(attribute(&call, "gen_ai.response.finish_reasons"), None);
}

#[test]
fn what_is_done_later_is_linked_to_the_request_that_asked_for_it() {
    let mut collector = Collector::start();
    let mut server = server("", &collector, &[]);
    let (traceparent, trace) = caller(6, true);
    let long = json!({"model": MODEL, "input": MARKER, "background": true, "max_output_tokens": 100, "ignore_eos": true});
    let id = post_as(&server, "/v1/responses", &traceparent, &long).json()["id"].clone();
    let asked = collector.until(of_trace(&trace));
    assert_told(&asked, &json!({"gen_ai.request.model": MODEL, "valar.window": "standard"}));
    // Whatever of it was done: the link is on the disk.
    server.restart();
    let is_of = |id: &Value| {
        let id = id.clone();
        move |span: &Span| span.name == "background response" && attribute(span, "gen_ai.response.id").as_ref() == Some(&id)
    };
    let done = collector.until(is_of(&id));
    assert_eq!((&done.links[0].span_id, &done.links[0].trace_id), (&asked.span_id, &asked.trace_id));
    assert!(done.trace_id != asked.trace_id && done.parent_span_id.is_empty());
    assert_told(&done, &json!({"valar.response.status": "incomplete", "valar.window": "standard"}));
    let call = collector.below(&done, &[format!("chat {MODEL}").as_str()]).remove(0);
    assert_told(&call, &json!({"gen_ai.usage.output_tokens": 100}));
    // What its request did not trace is not traced either.
    let (unsampled, _) = caller(7, false);
    let short = json!({"model": MODEL, "input": MARKER, "background": true, "max_output_tokens": 1});
    let untold = post_as(&server, "/v1/responses", &unsampled, &short).json()["id"].clone();
    while server.post("/v1/responses/wait", json!({"ids": [untold]})).json()["data"] == json!([]) {}
    let (traceparent, trace) = caller(8, true);
    let cancelled = post_as(
        &server,
        "/v1/responses",
        &traceparent,
        &json!({"model": MODEL, "input": MARKER, "background": true,
        "max_output_tokens": 4000, "ignore_eos": true}),
    )
    .json()["id"]
        .clone();
    let path = format!("/v1/responses/{}/cancel", cancelled.as_str().unwrap());
    assert_eq!(server.post(&path, Value::Null).json()["status"], "cancelled");
    assert_told(&collector.until(is_of(&cancelled)), &json!({"valar.response.status": "cancelled"}));
    assert_eq!(collector.until(is_of(&cancelled)).links[0].span_id, collector.until(of_trace(&trace)).span_id);

    let (traceparent, trace) = caller(9, true);
    let rows: Vec<Value> = (0..3).map(|i| json!({"custom_id": format!("r{i}"), "params": chat(2, false)})).collect();
    let batch = json!({"endpoint": "/v1/chat/completions", "requests": rows});
    let batch = post_as(&server, "/v1/batches", &traceparent, &batch).json()["id"].clone();
    let asked = collector.until(of_trace(&trace));
    let done = collector.until(|span| span.name == "batch");
    assert_eq!((&done.links[0].span_id, done.links.len()), (&asked.span_id, 1));
    assert_told(
        &done,
        &json!({"valar.batch.id": batch, "valar.batch.status": "completed", "valar.batch.requests.total": 3,
                "valar.batch.requests.completed": 3, "gen_ai.usage.output_tokens": 6, "gen_ai.request.model": MODEL}),
    );
    assert_eq!(done.events[0].name, "in_progress");
    assert!(!collector.spans.iter().any(|(span, _)| is_of(&untold)(span)));
}

/// Waits for the server's end after SIGTERM.
fn end(server: &mut Server) {
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn a_collector_that_does_not_answer_holds_up_nobody() {
    let collector = Collector::start();
    let gate = Arc::clone(&collector.gate);
    let held = gate.lock().unwrap();
    // The server would wait for the collector as long as this test may take.
    let env = [("OTEL_EXPORTER_OTLP_TIMEOUT", "3600000"), ("OTEL_BSP_MAX_QUEUE_SIZE", "8")];
    let mut server = server("", &collector, &env);
    // Each is answered while what was told of the first is on its way.
    for stream in [false, true].into_iter().cycle().take(10) {
        assert_eq!(server.post("/v1/chat/completions", chat(1, stream)).status, 200);
    }
    while collector.n_requests.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    // Ten requests, with a call and three parts each; the last of them ends a moment after its answer.
    let counts = || ["valar_spans_waiting", "valar_spans_dropped_total"].map(|name| server.metric(name));
    while counts().iter().sum::<u64>() < 10 * 5 {
        std::thread::yield_now();
    }
    assert_eq!(counts(), [8, 10 * 5 - 8], "the queue is full, and no longer than that");
    assert_eq!(server.metric("valar_spans_sent_total"), 0);
    end(&mut server);
    drop(held);
}

#[test]
fn the_last_spans_are_sent_when_the_server_ends() {
    let mut collector = Collector::start();
    // The configuration's address, and nothing is sent before the end.
    let config = format!("[server]\notlp_endpoint = \"{}/\"\n", collector.url);
    let env = [("OTEL_BSP_SCHEDULE_DELAY", "3600000")];
    let mut server = Server::with_env(&config, &["--api-key", KEY], &env, |_| {});
    let (traceparent, trace) = caller(10, true);
    assert_eq!(post_as(&server, "/v1/chat/completions", &traceparent, &chat(2, false)).status, 200);
    assert_eq!(collector.n_requests.load(SeqCst), 0);
    end(&mut server);
    assert_eq!(collector.n_requests.load(SeqCst), 1);
    let request = collector.until(of_trace(&trace));
    collector.below(&request, &[format!("chat {MODEL}").as_str()]);
    let (_, resource) = &collector.spans[0];
    assert!(resource.contains(&("service.name".into(), Any::StringValue("valar".into()))), "{resource:?}");
}

#[test]
fn a_collector_that_is_gone_is_told_of_once_and_nothing_is_traced_where_that_is_off() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    let env = [
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", url.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "20"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "20"),
    ];
    let mut server = Server::with_env("", &["--api-key", KEY], &env, |_| {});
    for n_failed in [1, 20] {
        while server.metric("valar_spans_failed_total") < n_failed {
            assert_eq!(server.post("/v1/chat/completions", chat(1, false)).status, 200);
        }
    }
    end(&mut server);
    let said = server.said.lock().unwrap().clone();
    assert_eq!(said.matches("spans are lost until the collector answers").count(), 1, "{said}");

    let collector = Collector::start();
    let mut server = self::server("", &collector, &[("OTEL_SDK_DISABLED", "true")]);
    assert_eq!(server.post("/v1/chat/completions", chat(1, false)).status, 200);
    end(&mut server);
    assert_eq!(collector.n_requests.load(SeqCst), 0);
    // What is not spoken is said at the start.
    let sandbox = crate::common::Sandbox::new();
    let mut command = sandbox.command(&["serve", "--port", "0", "--data", "data"]);
    let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")];
    let output = command.envs(env).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("OTEL_EXPORTER_OTLP_PROTOCOL: \"grpc\" is not spoken"), "{said}");
}
