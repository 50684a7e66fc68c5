//! The events of a response. Invariants: they are those of one response whose ids never change, numbered without gaps, with
//! exactly one terminal event, which holds the response that is given without a stream; every snapshot is of its moment. A
//! stream that broke off is gone on with where it was: the same request has the same bits again.

use super::call::Call;
use super::responses::{Own, finished};
use super::shown::Shown;
use crate::engine::SeqLogprob;
use crate::format::openai::answer;
use crate::outcome::{ErrorCode, RowError};
use crate::prepare::sequences::{n_thought, token_logprob};
use crate::store::responses::StoredEvent;
use crate::text::thinking::Split;
use crate::text::tokenizer::Tokenizer;
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

    /// The beginning of an item that has a part.
    fn open_item(&mut self, place: &Place, item: &Value, part: &Value) -> [Event; 2] {
        [
            self.event("response.output_item.added", json!({"output_index": place.output_index, "item": item})),
            self.event("response.content_part.added", place.fields(json!({"part": part}))),
        ]
    }

    fn open_message(&mut self, place: &Place) -> [Event; 2] {
        let item = json!({"type": "message", "id": place.item_id, "role": "assistant", "status": "in_progress", "content": []});
        self.open_item(place, &item, &json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []}))
    }

    fn open_thought(&mut self, place: &Place) -> [Event; 2] {
        let item = json!({"type": "reasoning", "id": place.item_id, "summary": [], "content": [], "status": "in_progress"});
        self.open_item(place, &item, &json!({"type": "reasoning_text", "text": ""}))
    }

    fn delta(&mut self, place: &Place, delta: &str, logprobs: &Value) -> Event {
        self.event("response.output_text.delta", place.fields(json!({"delta": delta, "logprobs": logprobs})))
    }

    fn thought_delta(&mut self, place: &Place, delta: &str) -> Event {
        self.event("response.reasoning_text.delta", place.fields(json!({"delta": delta})))
    }

    /// The end of an item of the finished response; a call comes whole.
    fn close_item(&mut self, output_index: usize, item: &Value) -> Vec<Event> {
        let (item_id, mut events) = (&item["id"], Vec::new());
        let (part, place) = (&item["content"][0], Place { item_id: item_id.as_str().unwrap_or_default().into(), output_index });
        if item["type"] == "message" {
            let text = place.fields(json!({"text": part["text"], "logprobs": part["logprobs"]}));
            events.push(self.event("response.output_text.done", text));
            events.push(self.event("response.content_part.done", place.fields(json!({"part": part}))));
        } else if item["type"] == "reasoning" {
            events.push(self.event("response.reasoning_text.done", place.fields(json!({"text": part["text"]}))));
            events.push(self.event("response.content_part.done", place.fields(json!({"part": part}))));
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

/// Where in a response text stands: in the only part of an item.
struct Place {
    item_id: String,
    output_index: usize,
}

impl Place {
    /// What an event says, with where.
    fn fields(&self, mut fields: Value) -> Value {
        fields["item_id"] = self.item_id.as_str().into();
        fields["output_index"] = self.output_index.into();
        fields["content_index"] = 0.into();
        fields
    }
}

/// Where the telling of thoughts is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Thoughts {
    #[default]
    ToCome,
    Open,
    Ended,
}

/// What of a response's events there was before.
#[derive(Debug, Default)]
pub struct Told {
    n_events: u64,
    has_begun: bool,
    /// Whether its message was opened.
    is_open: bool,
    thoughts: Thoughts,
    /// What is left to skip of its thoughts.
    thought: String,
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
            let data = || serde_json::from_str::<Value>(data).unwrap_or_default();
            match name.as_str() {
                "response.content_part.added" if data()["part"]["type"] == "reasoning_text" => {
                    self.thoughts = Thoughts::Open;
                }
                "response.content_part.added" => self.is_open = true,
                "response.reasoning_text.delta" => self.thought.push_str(data()["delta"].as_str().unwrap_or_default()),
                "response.reasoning_text.done" => self.thoughts = Thoughts::Ended,
                "response.output_text.delta" => {
                    let data = data();
                    self.text.push_str(data["delta"].as_str().unwrap_or_default());
                    self.n_logprobs += data["logprobs"].as_array().map_or(0, Vec::len);
                }
                _ => {}
            }
        }
    }

    /// How many events it takes in.
    pub fn n_events(&self) -> u64 {
        self.n_events
    }

    /// Whether any text was told.
    pub fn has_text(&self) -> bool {
        !self.text.is_empty() || !self.thought.is_empty() || self.n_logprobs > 0
    }
}

/// What of a text is new after one that was told, of which that is taken away; an error if it is another one.
fn skip<'t>(told: &mut String, text: &'t str) -> Result<&'t str, RowError> {
    let n_bytes = told.len().min(text.len());
    match text.split_at_checked(n_bytes).filter(|(old, _)| told.starts_with(old)) {
        Some((_, new)) => {
            told.drain(..n_bytes);
            Ok(new)
        }
        None => Err(is_other()),
    }
}

/// Another model, perhaps, or another machine.
fn is_other() -> RowError {
    RowError::row(ErrorCode::EngineError, "the answer broke off, and the model does not give it again")
}

/// Events of a response that runs.
#[derive(Default)]
struct Telling {
    numbered: Numbered,
    told: Told,
    /// The end of its ids.
    id: String,
    /// Its thoughts so far.
    thought: String,
    /// Log-probabilities, by token, until it is known which of them are of thoughts.
    early: Vec<(u32, Value)>,
    /// Whether that is known.
    is_answering: bool,
    /// Log-probabilities that wait for their text.
    logprobs: Vec<Value>,
}

impl Telling {
    fn new(told: Told, id: &str) -> Self {
        Self { numbered: Numbered(told.n_events), told, id: id.to_owned(), ..Self::default() }
    }

    fn message(&self) -> Place {
        Place { item_id: format!("msg_{}", self.id), output_index: usize::from(!self.thought.is_empty()) }
    }

    /// More log-probabilities. Those of thoughts are not told.
    fn note(&mut self, entries: impl Iterator<Item = (u32, Value)>, shown: &Shown, tokenizer: &Tokenizer) {
        self.early.extend(entries);
        if shown.is_answering() {
            let is_first = !std::mem::replace(&mut self.is_answering, true) && shown.has_thought();
            let n_thought = if is_first { n_thought(self.early.iter().map(|(id, _)| *id), tokenizer) } else { 0 };
            self.logprobs.extend(self.early.drain(..).skip(n_thought).map(|(_, entry)| entry));
        }
    }

    /// More text; nothing if all of it was told before.
    fn more(&mut self, more: &Split) -> Result<Vec<Event>, RowError> {
        let mut events = self.more_thought(&more.thought)?;
        events.extend(self.text(&more.answer)?);
        Ok(events)
    }

    fn more_thought(&mut self, thought: &str) -> Result<Vec<Event>, RowError> {
        self.thought.push_str(thought);
        let new = skip(&mut self.told.thought, thought)?;
        let (place, mut events) = (Place { item_id: format!("rs_{}", self.id), output_index: 0 }, Vec::new());
        if !new.is_empty() {
            if self.told.thoughts == Thoughts::ToCome {
                self.told.thoughts = Thoughts::Open;
                events.extend(self.numbered.open_thought(&place));
            }
            events.push(self.numbered.thought_delta(&place, new));
        }
        Ok(events)
    }

    /// The end of its thoughts, if there are any and that was not told.
    fn end_thought(&mut self, item: &Value) -> Result<Vec<Event>, RowError> {
        if self.thought.is_empty() || std::mem::replace(&mut self.told.thoughts, Thoughts::Ended) == Thoughts::Ended {
            return Ok(Vec::new());
        }
        if !self.told.thought.is_empty() {
            return Err(is_other());
        }
        Ok(self.numbered.close_item(0, item))
    }

    fn text(&mut self, text: &str) -> Result<Vec<Event>, RowError> {
        let n_skipped = self.told.n_logprobs.min(self.logprobs.len());
        self.logprobs.drain(..n_skipped);
        self.told.n_logprobs -= n_skipped;
        let text = skip(&mut self.told.text, text)?;
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let mut events = self.end_thought(&answer::reasoning_item(&self.id, &self.thought, "completed"))?;
        events.extend(self.open());
        events.push(self.numbered.delta(&self.message(), text, &std::mem::take(&mut self.logprobs).into()));
        Ok(events)
    }

    fn open(&mut self) -> Vec<Event> {
        if std::mem::replace(&mut self.told.is_open, true) {
            return Vec::new();
        }
        let place = self.message();
        self.numbered.open_message(&place).into()
    }

    /// The end: what is left of the text, the items, and the response; so many of its tokens were thoughts.
    fn end(&mut self, response: &Value, rest: &Split, n_thought: usize) -> Result<Vec<Event>, RowError> {
        let mut events = self.more_thought(&rest.thought)?;
        for (output_index, item) in response["output"].as_array().into_iter().flatten().enumerate() {
            if item["type"] == "reasoning" {
                events.extend(self.end_thought(item)?);
                continue;
            }
            if item["type"] == "message" {
                // It ended before the answer began, or before it was known how it begins.
                self.logprobs.extend(self.early.drain(..).skip(n_thought).map(|(_, entry)| entry));
                events.extend(self.text(&rest.answer)?);
                if !self.told.text.is_empty() {
                    return Err(is_other());
                }
                events.extend(self.open());
                if !self.logprobs.is_empty() {
                    let last = std::mem::take(&mut self.logprobs).into();
                    events.push(self.numbered.delta(&self.message(), "", &last));
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
        let mut telling = Telling::new(told, &call.id);
        if telling.told.n_events == 0 {
            yield telling.numbered.event("response.created", json!({"response": snapshot}));
        }
        if !telling.told.has_begun {
            yield telling.numbered.event("response.in_progress", json!({"response": snapshot}));
        }
        let mut shown = Shown::new(&call.flow.prompts()[0]);
        let ended = loop {
            let gained = match call.flow.next().await {
                Ok(Some(gained)) => gained,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            let events = gained.into_iter().try_fold(Vec::new(), |mut events, next| {
                let entry = |entry: &SeqLogprob| (entry.token, answer::chat_logprob(&token_logprob(entry, &tokenizer)));
                shown.count(&next.tokens, &tokenizer);
                let more = shown.push(&next.text);
                // Entries of text that waits go with the text.
                telling.note(next.logprobs.iter().map(entry), &shown, &tokenizer);
                events.extend(telling.more(&more)?);
                Ok(events)
            });
            match events {
                Ok(events) => {
                    // Before the first of them is taken: whoever stores them finds what they tell.
                    if !events.is_empty() {
                        call.note_told(shown.n_thought());
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
            let choice = &completion.choices[0];
            telling.end(&finished(&call, &own, &completion), &shown.rest(choice), choice.n_thought() as usize)
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
        /// Told anew from any event on, in other pieces, thoughts and text come to the same, and events are numbered on.
        #[test]
        fn a_text_that_broke_off_is_gone_on_with(thoughts in prop::collection::vec("[a-zü🙂]{0,5}", 0..4),
                                                 texts in prop::collection::vec("[a-zü🙂]{0,5}", 0..9),
                                                 others in prop::collection::vec(0..9usize, 0..9), n_kept in 0..30usize) {
            let tell = |telling: &mut Telling, thoughts: &[String], texts: &[String]| -> Vec<Event> {
                let thoughts = thoughts.iter().map(|piece| Split { thought: piece.clone(), answer: String::new() });
                let texts = texts.iter().map(|piece| Split { thought: String::new(), answer: piece.clone() });
                thoughts.chain(texts).flat_map(|more| telling.more(&more).unwrap()).collect()
            };
            let first = tell(&mut Telling::new(Told::default(), "x"), &thoughts, &texts);
            let kept: Vec<StoredEvent> =
                (0..).zip(first.iter().take(n_kept)).map(|(i, (name, data))| (i, (*name).to_owned(), data.to_string())).collect();
            // Those of one moment are stored at once.
            prop_assume!(kept.last().is_none_or(|(_, name, _)| name.ends_with("delta") || name.ends_with("item.done")));
            let mut told = Told::default();
            told.take_in(&kept);
            // The same texts in other pieces.
            let in_pieces = |pieces: &[String]| {
                let chars: Vec<char> = pieces.concat().chars().collect();
                let (mut rest, mut again) = (&chars[..], Vec::new());
                for n in others.iter().copied().chain([chars.len()]) {
                    let (piece, left) = rest.split_at(n.min(rest.len()));
                    again.push(piece.iter().collect::<String>());
                    rest = left;
                }
                again
            };
            let more = tell(&mut Telling::new(told, "x"), &in_pieces(&thoughts), &in_pieces(&texts));
            let kept = kept.iter().map(|(_, _, data)| serde_json::from_str(data).unwrap());
            let data: Vec<Value> = kept.chain(more.iter().map(|(_, data)| data.clone())).collect();
            let of = |name: &str| data.iter().filter(|data| data["type"] == name).collect::<Vec<_>>();
            let joined = |name: &str| of(name).iter().filter_map(|data| data["delta"].as_str()).collect::<String>();
            let (thought, text) = (thoughts.concat(), texts.concat());
            prop_assert_eq!(joined("response.reasoning_text.delta"), thought.as_str());
            prop_assert_eq!(joined("response.output_text.delta"), text.as_str());
            for (i, data) in data.iter().enumerate() {
                prop_assert_eq!(&data["sequence_number"], &json!(i));
            }
            let [n_thoughts, n_texts] = [&thought, &text].map(|text| usize::from(!text.is_empty()));
            prop_assert_eq!(of("response.content_part.added").len(), n_thoughts + n_texts);
            // Thoughts end when the text begins.
            let ends = of("response.reasoning_text.done");
            prop_assert_eq!(ends.len(), n_thoughts * n_texts);
            prop_assert!(ends.iter().all(|end| end["text"] == thought.as_str()));
            prop_assert!(of("response.output_text.delta").iter().all(|delta| delta["output_index"] == n_thoughts));
        }
    }

    #[test]
    fn another_text_is_not_passed_off_as_the_same() {
        let mut told = "The sea".to_owned();
        assert_eq!(skip(&mut told, "The ").unwrap(), "");
        assert!(skip(&mut told, "sky").is_err());
        // Thoughts that end sooner than before are others.
        let told = Told { thought: "Hm, yes".into(), ..Told::default() };
        let more = Split { thought: "Hm".into(), answer: "Yes.".into() };
        assert!(Telling::new(told, "x").more(&more).is_err());
    }
}
