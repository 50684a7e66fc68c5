//! What the server says of what it does: lines for people, or JSON objects for programs, on standard error. Invariants: a line
//! that is of a request has its id; no line has anything of a request's content.

use crate::pipeline::progress::{is_json, say_with};
use axum::http::Method;
use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};

tokio::task_local! {
    /// The id of the request that is served.
    static REQUEST: String;
}

/// Runs `work` as a part of a request: what it says has that id.
pub(super) async fn of_request<T>(id: String, work: impl Future<Output = T>) -> T {
    REQUEST.scope(id, work).await
}

/// One line.
pub(super) fn say(line: &str) {
    let id = REQUEST.try_with(Clone::clone).ok();
    let mut fields = Map::new();
    if let Some(id) = id {
        fields.insert("request_id".into(), id.into());
    }
    say_with(line, &fields);
}

/// A request, as far as it is told.
pub(super) struct Told<'r> {
    pub(super) id: &'r str,
    pub(super) method: &'r Method,
    /// Without its query, which may hold what is nobody's business.
    pub(super) path: &'r str,
    pub(super) began: Instant,
}

impl Told<'_> {
    /// It was answered, or its answer has begun. Told to programs alone: people would not see the rest.
    pub(super) fn answered(&self, status: u16, caller: Option<&str>) {
        if is_json() {
            let fields = json!({
                "request_id": self.id, "method": self.method.as_str(), "path": self.path, "status": status,
                "duration_ms": millis(self.began.elapsed()), "caller": caller,
            });
            tell("request", fields);
        }
    }
}

/// A call that has ended, or was broken off. Told to programs alone.
pub(super) fn ended(fields: impl FnOnce() -> Value) {
    if is_json() {
        tell("call", fields());
    }
}

fn tell(message: &str, fields: Value) {
    if let Value::Object(fields) = fields {
        say_with(message, &fields);
    }
}

/// To a tenth.
pub(super) fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}
