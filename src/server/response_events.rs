//! The events of a response. Invariants: they are those of one response whose ids never change, numbered without gaps, with
//! exactly one terminal event, which holds the response that is given without a stream; every snapshot is of its moment. A
//! stream that broke off is gone on with where it was: the same request has the same bits again.

use super::call::Call;
use super::responses::{Own, finished};
use super::shown::Shown;
use crate::format::openai::answer;
use crate::outcome::{ErrorCode, RowError};
use crate::prepare::sequences::token_logprob;
use crate::store::responses::StoredEvent;
use async_stream::stream;
use futures::Stream;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Events after which none comes.
pub const TERMINAL: [&str; 3] = ["response.completed", "response.incomplete", "response.failed"];

/// Numbers events.
#[derive(Default)]
struct Numbered(u64);

/// An event's name and data.
pub type Event = (&'static str, Value);

impl Numbered {
    fn event(&mut self, name: &'static str, fields: Value) -> Event {
        let mut data = Map::new();
        data.insert("type".into(), name.into());
        data.insert("sequence_number".into(), self.0.into());
        self.0 += 1;
        if let Value::Object(fields) = fields {
            data.extend(fields);
        }
        (name, Value::Object(data))
    }

    /// The beginning of the message item.
    fn open_message(&mut self, item_id: &str) -> [Event; 2] {
        let item = json!({"type": "message", "id": item_id, "role": "assistant", "status": "in_progress", "content": []});
        let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
        [
            self.event("response.output_item.added", json!({"output_index": 0, "item": item})),
            self.event(
                "response.content_part.added",
                json!({"item_id": item_id, "output_index": 0, "content_index": 0, "part": part}),
            ),
        ]
    }

    fn delta(&mut self, item_id: &str, delta: &str, logprobs: &Value) -> Event {
        let fields = json!({"item_id": item_id, "output_index": 0, "content_index": 0, "delta": delta, "logprobs": logprobs});
        self.event("response.output_text.delta", fields)
    }

    /// The end of an item of the finished response; a call comes whole.
    fn close_item(&mut self, output_index: usize, item: &Value) -> Vec<Event> {
        let (item_id, mut events) = (&item["id"], Vec::new());
        if item["type"] == "message" {
            let part = &item["content"][0];
            let place = |mut fields: Value| {
                fields["item_id"] = item_id.clone();
                fields["output_index"] = output_index.into();
                fields["content_index"] = 0.into();
                fields
            };
            let text = place(json!({"text": part["text"], "logprobs": part["logprobs"]}));
            events.push(self.event("response.output_text.done", text));
            events.push(self.event("response.content_part.done", place(json!({"part": part}))));
        } else {
            let (mut opened, arguments) = (item.clone(), &item["arguments"]);
            (opened["arguments"], opened["status"]) = ("".into(), "in_progress".into());
            let added = json!({"output_index": output_index, "item": opened});
            events.push(self.event("response.output_item.added", added));
            let delta = json!({"item_id": item_id, "output_index": output_index, "delta": arguments});
            events.push(self.event("response.function_call_arguments.delta", delta));
            let done = json!({"item_id": item_id, "output_index": output_index, "name": item["name"], "arguments": arguments});
            events.push(self.event("response.function_call_arguments.done", done));
        }
        events.push(self.event("response.output_item.done", json!({"output_index": output_index, "item": item})));
        events
    }
}

/// What of a response's events there was before.
#[derive(Debug, Default)]
pub struct Told {
    n_events: u64,
    has_begun: bool,
    /// Whether its message was opened.
    is_open: bool,
    /// What is left to skip of its text.
    text: String,
    /// What is left to skip of its log-probabilities.
    n_logprobs: usize,
}

impl Told {
    /// Of its first events.
    pub fn take_in(&mut self, events: &[StoredEvent]) {
        for (number, name, data) in events {
            self.n_events = number + 1;
            self.has_begun |= name == "response.in_progress";
            self.is_open |= name == "response.content_part.added";
            if name == "response.output_text.delta" {
                let data: Value = serde_json::from_str(data).unwrap_or_default();
                self.text.push_str(data["delta"].as_str().unwrap_or_default());
                self.n_logprobs += data["logprobs"].as_array().map_or(0, Vec::len);
            }
        }
    }

    /// How many events it takes in.
    pub fn n_events(&self) -> u64 {
        self.n_events
    }

    /// Whether any text was told.
    pub fn has_text(&self) -> bool {
        !self.text.is_empty() || self.n_logprobs > 0
    }

    /// What of the text is new; an error if it is another one than before.
    fn skip<'t>(&mut self, text: &'t str) -> Result<&'t str, RowError> {
        let n_bytes = self.text.len().min(text.len());
        match text.split_at_checked(n_bytes).filter(|(old, _)| self.text.starts_with(old)) {
            Some((_, new)) => {
                self.text.drain(..n_bytes);
                Ok(new)
            }
            None => Err(is_other()),
        }
    }
}

/// Another model, perhaps, or another machine.
fn is_other() -> RowError {
    RowError::row(ErrorCode::EngineError, "the answer broke off, and the model does not give it again")
}

/// Events of a response that runs.
struct Telling {
    numbered: Numbered,
    told: Told,
    item_id: String,
    /// Log-probabilities that wait for their text.
    logprobs: Vec<Value>,
}

impl Telling {
    /// More text; nothing if all of it was told before.
    fn text(&mut self, text: &str) -> Result<Vec<Event>, RowError> {
        let n_skipped = self.told.n_logprobs.min(self.logprobs.len());
        self.logprobs.drain(..n_skipped);
        self.told.n_logprobs -= n_skipped;
        let text = self.told.skip(text)?;
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let mut events = self.open();
        events.push(self.numbered.delta(&self.item_id, text, &std::mem::take(&mut self.logprobs).into()));
        Ok(events)
    }

    fn open(&mut self) -> Vec<Event> {
        if std::mem::replace(&mut self.told.is_open, true) {
            return Vec::new();
        }
        self.numbered.open_message(&self.item_id).into()
    }

    /// The end: what is left of the text, the items, and the response.
    fn end(&mut self, response: &Value, rest: &str) -> Result<Vec<Event>, RowError> {
        let mut events = Vec::new();
        for (output_index, item) in response["output"].as_array().into_iter().flatten().enumerate() {
            if item["type"] == "message" {
                events.extend(self.text(rest)?);
                if !self.told.text.is_empty() {
                    return Err(is_other());
                }
                events.extend(self.open());
                if !self.logprobs.is_empty() {
                    events.push(self.numbered.delta(&self.item_id, "", &std::mem::take(&mut self.logprobs).into()));
                }
            }
            events.extend(self.numbered.close_item(output_index, item));
        }
        let name = if response["status"] == "completed" { "response.completed" } else { "response.incomplete" };
        events.push(self.numbered.event(name, json!({"response": response})));
        Ok(events)
    }
}

/// A single event, of a response of which so many were told.
pub fn event(n_events: u64, name: &'static str, response: &Value) -> Event {
    Numbered(n_events).event(name, json!({"response": response}))
}

/// The events of a response, as they come, but for those that were told before.
pub fn events(mut call: Call, own: Own, told: Told) -> impl Stream<Item = Event> {
    stream! {
        let tokenizer = Arc::clone(&call.model.live.preparer.tokenizer);
        let mut snapshot = call.stamp.response_in_progress(&call.id, call.echo.as_deref().unwrap_or(&Value::Null));
        own.put_on(&mut snapshot, call.window);
        let (item_id, logprobs) = (format!("msg_{}", call.id), Vec::new());
        let mut telling = Telling { numbered: Numbered(told.n_events), told, item_id, logprobs };
        if telling.told.n_events == 0 {
            yield telling.numbered.event("response.created", json!({"response": snapshot}));
        }
        if !telling.told.has_begun {
            yield telling.numbered.event("response.in_progress", json!({"response": snapshot}));
        }
        let mut shown = Shown::new(call.flow.prompts()[0].call_format);
        let ended = loop {
            let gained = match call.flow.next().await {
                Ok(Some(gained)) => gained,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            let events = gained.into_iter().try_fold(Vec::new(), |mut events, next| {
                let entries = next.logprobs.iter().map(|entry| answer::chat_logprob(&token_logprob(entry, &tokenizer)));
                // Entries of text that waits go with the text.
                telling.logprobs.extend(entries);
                events.extend(telling.text(&shown.push(&next.text))?);
                Ok(events)
            });
            match events {
                Ok(events) => {
                    // Before the first of them is taken: whoever stores them finds what they tell.
                    if !events.is_empty() {
                        call.note_told();
                    }
                    for event in events {
                        yield event;
                    }
                }
                Err(error) => break Err(error),
            }
        };
        let ended = ended.and_then(|()| {
            let completion = call.flow.completion(&tokenizer);
            telling.end(&finished(&call, &own, &completion), shown.rest(&completion.choices[0].text))
        });
        match ended {
            Ok(events) => for event in events {
                yield event;
            },
            Err(error) => yield telling.numbered.event("response.failed", json!({"response": failed(snapshot, &error)})),
        }
    }
}

/// A response that the engine could not complete.
pub fn failed(mut response: Value, error: &RowError) -> Value {
    response["status"] = "failed".into();
    response["error"] = json!({"code": "server_error", "message": error.message});
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Told anew from any event on, in other pieces, a text comes to the same, and events are numbered on.
        #[test]
        fn a_text_that_broke_off_is_gone_on_with(pieces in prop::collection::vec("[a-zü🙂]{0,5}", 0..9),
                                                 others in prop::collection::vec(0..9usize, 0..9), n_kept in 0..20usize) {
            let all: String = pieces.concat();
            let telling = |told: Told| Telling { numbered: Numbered(told.n_events), told, item_id: "msg".into(), logprobs: Vec::new() };
            let tell = |telling: &mut Telling, pieces: &[String]| -> Vec<Event> {
                pieces.iter().flat_map(|piece| telling.text(piece).unwrap()).collect()
            };
            let first = tell(&mut telling(Told::default()), &pieces);
            let kept: Vec<StoredEvent> =
                (0..).zip(first.iter().take(n_kept)).map(|(i, (name, data))| (i, (*name).to_owned(), data.to_string())).collect();
            let mut told = Told::default();
            told.take_in(&kept);
            // The same text in other pieces.
            let chars: Vec<char> = all.chars().collect();
            let (mut rest, mut again) = (&chars[..], Vec::new());
            for n in others.iter().copied().chain([chars.len()]) {
                let (piece, left) = rest.split_at(n.min(rest.len()));
                again.push(piece.iter().collect::<String>());
                rest = left;
            }
            let more = tell(&mut telling(told), &again);
            let data: Vec<Value> = kept.iter().map(|(_, _, data)| serde_json::from_str(data).unwrap()).chain(more.iter().map(|(_, data)| data.clone())).collect();
            let text: String = data.iter().filter_map(|data| data["delta"].as_str()).collect();
            prop_assert_eq!(text, all);
            for (i, data) in data.iter().enumerate() {
                prop_assert_eq!(&data["sequence_number"], &json!(i));
            }
            prop_assert!(data.iter().filter(|data| data["type"] == "response.content_part.added").count() <= 1);
        }
    }

    #[test]
    fn another_text_is_not_passed_off_as_the_same() {
        let mut told = Told { text: "The sea".into(), ..Told::default() };
        assert_eq!(told.skip("The ").unwrap(), "");
        assert!(told.skip("sky").is_err());
    }
}
