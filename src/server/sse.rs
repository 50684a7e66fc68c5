//! Server-sent events. Invariant: an event is one block of whole lines; a silent stream says that it lives.

use async_stream::stream;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::Stream;
use serde_json::Value;
use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

/// Silence after which a comment is sent; clients skip it, proxies see life.
const PING_AFTER: Duration = Duration::from_secs(10);

/// `data:` alone, as chat and text completions have it.
pub(super) fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// `event:` and `data:`.
pub(super) fn event(name: &str, value: &Value) -> String {
    event_text(name, &value.to_string())
}

/// The same, of JSON that is text already.
pub(super) fn event_text(name: &str, value: &str) -> String {
    format!("event: {name}\ndata: {value}\n\n")
}

/// The end of an `OpenAI` stream.
pub(super) const DONE: &str = "data: [DONE]\n\n";

/// An answer of events. When the client goes, the stream is dropped, and with it whatever it holds.
pub(super) fn response(events: impl Stream<Item = String> + Send + 'static) -> Response {
    let body = stream! {
        let mut events = pin!(events);
        loop {
            let next = std::future::poll_fn(|cx| events.as_mut().poll_next(cx));
            match tokio::time::timeout(PING_AFTER, next).await {
                Ok(Some(event)) => yield Ok::<_, Infallible>(Bytes::from(event)),
                Ok(None) => break,
                Err(_silence) => yield Ok(Bytes::from_static(b": ping\n\n")),
            }
        }
    };
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
