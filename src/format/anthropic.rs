//! Anthropic's wire form: the body of `/v1/messages` into a [`Request`], and a completion into the message that answers it. The
//! only module that knows those field names. Invariant: as for `OpenAI`'s form, a field with meaning is honoured or refused by name. Fields are named
//! from `body.` on, as rows' are.

use super::openai::fields::{integer, optional_bool, optional_f32, optional_object, optional_u64, required_str, wrong_type};
use super::openai::messages::{call_value, string};
use crate::outcome::{Choice, Completion, ErrorCode, FinishReason, RowError, Usage};
use crate::request::{
    AnswerFormat, ChatOptions, Input, MAX_STOP_BYTES, MAX_STOP_STRINGS, Message, Params, Request, ToolChoice, Truncate,
};
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::sync::Arc;

/// Fields that this file reads.
const READ: &[&str] = &[
    "model",
    "max_tokens",
    "messages",
    "system",
    "stop_sequences",
    "tools",
    "tool_choice",
    "output_config",
    "thinking",
    "temperature",
    "top_p",
    "top_k",
    "seed",
];
/// Fields that do not change a completion here.
const WITHOUT_EFFECT: &[&str] =
    &["metadata", "service_tier", "cache_control", "inference_geo", "speed", "diagnostics", "citations"];

/// Parses a body; `needs_max_tokens` unless it is only counted.
///
/// # Errors
/// The first fault, its field named from `body.` on.
pub fn parse_messages(body: &Map<String, Value>, defaults: &Params, needs_max_tokens: bool) -> Result<Request, RowError> {
    if let Some((key, _)) = body.iter().find(|(key, value)| !is_known(key) && !value.is_null()) {
        return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("body.{key}"), "is not supported"));
    }
    let max_tokens = match body.get("max_tokens") {
        None | Some(Value::Null) if needs_max_tokens => return Err(missing("body.max_tokens")),
        None | Some(Value::Null) => None,
        Some(value) => Some(integer(value, "body.max_tokens", 1, u32::MAX.into())? as u32),
    };
    let mut chat = parse_tools(body)?;
    let mut params = Params {
        max_tokens,
        temperature: optional_f32(body, "temperature", 0.0, 1.0)?.unwrap_or(defaults.temperature),
        top_p: optional_f32(body, "top_p", 0.0, 1.0)?.unwrap_or(defaults.top_p),
        top_k: optional_u64(body, "top_k", 0, u32::MAX.into())?.map_or(defaults.top_k, |k| k as u32),
        seed: optional_u64(body, "seed", 0, u64::MAX)?.or(defaults.seed),
        stop: parse_stops(body)?.unwrap_or_else(|| defaults.stop.clone()),
        n: 1,
        ..defaults.clone()
    };
    parse_output_config(body, &mut params, &mut chat)?;
    parse_thinking(body, &mut chat)?;
    let messages = parse_turns(body)?;
    // A last turn of the assistant's is the beginning of the answer.
    chat.continue_final = messages.last().is_some_and(|last| last.role == "assistant");
    let inputs = vec![Input::Messages(messages)];
    Ok(Request { row_idx: 0, model: None, inputs, params, chat, truncate: Truncate::Never })
}

/// As [`parse_messages`], of a row, with the strings that may end it, if there are any.
///
/// # Errors
/// The first fault, its field named from `body.` on.
pub fn parse_row(row_idx: u64, body: &Map<String, Value>, defaults: &Params) -> Result<(Request, Option<Value>), RowError> {
    let mut body = body.clone();
    // Refused by name where it is on.
    if body.get("stream") == Some(&Value::Bool(false)) {
        body.remove("stream");
    }
    let request = parse_messages(&body, defaults, true)?;
    let model = string(&body, "model", "body")?.ok_or_else(|| missing("body.model"))?;
    let stops = &request.params.stop;
    let stops = (!stops.is_empty()).then(|| Value::from(stops.clone()));
    Ok((Request { row_idx, model: Some(model), ..request }, stops))
}

/// Whether a body's field is known, whatever its value.
pub fn is_known(key: &str) -> bool {
    READ.contains(&key) || WITHOUT_EFFECT.contains(&key)
}

/// The message that answers a request; its ids end with `id`. `stop` is the stop sequence that ended it.
pub fn message(id: &str, model: &str, completion: &Completion, stop: Option<&str>) -> Value {
    let stop = stop.filter(|_| completion.choices[0].finish_reason == FinishReason::Stop);
    let mut message = empty_message(id, model, completion.usage);
    message["content"] = blocks(&completion.choices[0], id).into();
    message["stop_reason"] = stop_reason(&completion.choices[0], stop).into();
    message["stop_sequence"] = stop.into();
    message["usage"] = usage(completion.usage, completion.n_thought());
    message
}

/// A message of which nothing has come yet.
pub fn empty_message(id: &str, model: &str, begun: Usage) -> Value {
    json!({
        "id": format!("msg_{id}"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": null,
        "stop_sequence": null,
        "usage": usage(begun, 0),
    })
}

/// Why a completion has ended.
pub fn stop_reason(choice: &Choice, stop: Option<&str>) -> &'static str {
    match choice.finish_reason {
        FinishReason::ToolCalls => "tool_use",
        FinishReason::Length | FinishReason::Repetition => "max_tokens",
        FinishReason::Stop if stop.is_some() => "stop_sequence",
        FinishReason::Stop => "end_turn",
    }
}

/// Input leaves out what was cached; `n_thought` tokens of the output are thoughts.
pub fn usage(usage: Usage, n_thought: u32) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": n_thought},
        "service_tier": "standard",
    })
}

/// A completion's thoughts, text and calls.
pub fn blocks(choice: &Choice, id: &str) -> Vec<Value> {
    let mut blocks = Vec::new();
    if !choice.thoughts().is_empty() {
        blocks.push(json!({"type": "thinking", "thinking": choice.thoughts(), "signature": ""}));
    }
    if !choice.text.is_empty() || (choice.tool_calls.is_empty() && blocks.is_empty()) {
        blocks.push(json!({"type": "text", "text": choice.text, "citations": null}));
    }
    blocks.extend(choice.tool_calls.iter().enumerate().map(|(k, call)| {
        let input: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
        json!({"type": "tool_use", "id": format!("toolu_{k}_{id}"), "name": call.name, "input": input})
    }));
    blocks
}

fn missing(field: &str) -> RowError {
    RowError::field(ErrorCode::MissingField, field, "is required")
}

fn unsupported(path: &str, found: &str, supported: &str) -> RowError {
    RowError::field(ErrorCode::UnsupportedParameter, path, format!("{found:?} is not supported; supported: {supported}"))
}

fn parse_stops(body: &Map<String, Value>) -> Result<Option<Vec<String>>, RowError> {
    let path = "body.stop_sequences";
    let items = match body.get("stop_sequences") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type(path, "an array of strings", other)),
    };
    if items.len() > MAX_STOP_STRINGS {
        let message = format!("at most {MAX_STOP_STRINGS} are allowed, {} given", items.len());
        return Err(RowError::field(ErrorCode::InvalidValue, path, message));
    }
    let stops = items.iter().enumerate().map(|(i, item)| match item.as_str() {
        Some(text) if text.len() > MAX_STOP_BYTES => {
            let message = format!("at most {MAX_STOP_BYTES} bytes are allowed, {} given", text.len());
            Err(RowError::field(ErrorCode::InvalidValue, format!("{path}[{i}]"), message))
        }
        Some("") => Err(RowError::field(ErrorCode::InvalidValue, format!("{path}[{i}]"), "must not be empty")),
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong_type(&format!("{path}[{i}]"), "a string", item)),
    });
    stops.collect::<Result<_, _>>().map(Some)
}

/// `{"format": {"type": "json_schema", "schema"}, "effort"}`
fn parse_output_config(body: &Map<String, Value>, params: &mut Params, chat: &mut ChatOptions) -> Result<(), RowError> {
    let Some(config) = optional_object(body, "output_config")? else { return Ok(()) };
    let path = "body.output_config";
    if let Some(effort) = string(config, "effort", path)? {
        chat.template_kwargs.insert("reasoning_effort".into(), effort.into());
    }
    match config.get("format") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(format)) => {
            let path = format!("{path}.format");
            match required_str(format, "type", &path)? {
                "json_schema" => {}
                other => return Err(unsupported(&format!("{path}.type"), other, "json_schema")),
            }
            match format.get("schema") {
                Some(schema @ Value::Object(_)) => params.format = AnswerFormat::JsonSchema(Arc::new(schema.clone())),
                Some(other) => return Err(wrong_type(&format!("{path}.schema"), "an object", other)),
                None => return Err(missing(&format!("{path}.schema"))),
            }
            Ok(())
        }
        Some(other) => Err(wrong_type(&format!("{path}.format"), "an object", other)),
    }
}

/// The switch that templates of thinking models have.
fn parse_thinking(body: &Map<String, Value>, chat: &mut ChatOptions) -> Result<(), RowError> {
    let Some(thinking) = optional_object(body, "thinking")? else { return Ok(()) };
    let thinks = match required_str(thinking, "type", "body.thinking")? {
        "enabled" | "adaptive" | "between_tools" => true,
        "disabled" => false,
        other => return Err(unsupported("body.thinking.type", other, "enabled, disabled, adaptive, between_tools")),
    };
    chat.template_kwargs.insert("enable_thinking".into(), thinks.into());
    Ok(())
}

fn parse_tools(body: &Map<String, Value>) -> Result<ChatOptions, RowError> {
    let items = match body.get("tools") {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("body.tools", "an array", other)),
    };
    let tools = items.iter().enumerate().map(|(i, tool)| parse_tool(&format!("body.tools[{i}]"), tool));
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    let path = "body.tool_choice";
    let (mut tool_choice, mut one_call) = (ToolChoice::Auto, false);
    if let Some(choice) = optional_object(body, "tool_choice")? {
        one_call = match choice.get("disable_parallel_tool_use") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(value)) => *value,
            Some(other) => return Err(wrong_type(&format!("{path}.disable_parallel_tool_use"), "true or false", other)),
        };
        tool_choice = match required_str(choice, "type", path)? {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "any" if tools.is_empty() => {
                return Err(RowError::field(ErrorCode::InvalidValue, path, "\"any\" needs body.tools"));
            }
            "any" => ToolChoice::Required,
            "tool" => {
                let name = required_str(choice, "name", path)?;
                if !tools.iter().any(|tool| tool["function"]["name"] == name) {
                    return Err(RowError::field(ErrorCode::InvalidValue, path, format!("no tool is called {name:?}")));
                }
                ToolChoice::Named(name.to_owned())
            }
            other => return Err(unsupported(&format!("{path}.type"), other, "auto, any, tool, none")),
        };
    }
    Ok(ChatOptions { tools, tool_choice, one_call, ..ChatOptions::default() })
}

/// A function as templates see it.
fn parse_tool(path: &str, tool: &Value) -> Result<Value, RowError> {
    let object = tool.as_object().ok_or_else(|| wrong_type(path, "an object", tool))?;
    if let Some(other) = string(object, "type", path)?.filter(|kind| kind != "custom") {
        return Err(unsupported(&format!("{path}.type"), &other, "custom"));
    }
    let name = required_str(object, "name", path)?;
    let mut function = Map::new();
    function.insert("name".into(), name.into());
    if let Some(description) = string(object, "description", path)? {
        function.insert("description".into(), description.into());
    }
    match object.get("input_schema") {
        Some(schema @ Value::Object(_)) => function.insert("parameters".into(), schema.clone()),
        Some(other) => return Err(wrong_type(&format!("{path}.input_schema"), "an object", other)),
        None => return Err(missing(&format!("{path}.input_schema"))),
    };
    Ok(json!({"type": "function", "function": function}))
}

/// `system`, then the turns; those of one role side by side are one.
fn parse_turns(body: &Map<String, Value>) -> Result<Vec<Message>, RowError> {
    let mut turns = Turns::default();
    match body.get("system") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => turns.add_text("system", text),
        Some(Value::Array(blocks)) => {
            for (i, block) in blocks.iter().enumerate() {
                turns.add_block("system", block, &format!("body.system[{i}]"))?;
            }
        }
        Some(other) => return Err(wrong_type("body.system", "a string or an array of text blocks", other)),
    }
    turns.is_new = true;
    let items = match body.get("messages") {
        None | Some(Value::Null) => return Err(missing("body.messages")),
        Some(Value::Array(items)) if items.is_empty() => {
            return Err(RowError::field(ErrorCode::InvalidValue, "body.messages", "must hold at least one message"));
        }
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("body.messages", "an array", other)),
    };
    for (i, item) in items.iter().enumerate() {
        let path = format!("body.messages[{i}]");
        let object = item.as_object().ok_or_else(|| wrong_type(&path, "an object", item))?;
        let role = required_str(object, "role", &path)?;
        if !["user", "assistant", "system"].contains(&role) {
            let message = format!("{role:?} is not supported; supported: user, assistant, system");
            return Err(RowError::field(ErrorCode::InvalidValue, format!("{path}.role"), message));
        }
        match object.get("content") {
            None | Some(Value::Null) => return Err(missing(&format!("{path}.content"))),
            Some(Value::String(text)) => turns.add_text(role, text),
            Some(Value::Array(blocks)) => {
                for (k, block) in blocks.iter().enumerate() {
                    turns.add_block(role, block, &format!("{path}.content[{k}]"))?;
                }
            }
            Some(other) => {
                return Err(wrong_type(&format!("{path}.content"), "a string or an array of blocks", other));
            }
        }
        (turns.is_new, turns.thought) = (true, None);
    }
    Ok(turns.messages)
}

#[derive(Default)]
struct Turns {
    messages: Vec<Message>,
    /// Calls so far, by id.
    calls: HashSet<String>,
    /// Whether what comes is of another message than what came.
    is_new: bool,
    /// What was thought before what comes.
    thought: Option<String>,
}

impl Turns {
    /// The last turn, if it is the role's; else a new one.
    fn turn(&mut self, role: &str) -> &mut Message {
        if self.messages.last().is_none_or(|last| last.role != role) {
            self.messages.push(Message { role: role.to_owned(), ..Message::default() });
            self.is_new = false;
        }
        let thought = self.thought.take().filter(|_| role == "assistant");
        let turn = self.messages.last_mut().expect("there is one now");
        turn.thought = turn.thought.take().or(thought);
        turn
    }

    fn add_text(&mut self, role: &str, text: &str) {
        let was_new = self.is_new;
        let turn = self.turn(role);
        if was_new && !turn.content.is_empty() {
            turn.content.push('\n');
        }
        turn.content.push_str(text);
        self.is_new = false;
    }

    fn add_block(&mut self, role: &str, block: &Value, path: &str) -> Result<(), RowError> {
        let object = block.as_object().ok_or_else(|| wrong_type(path, "an object", block))?;
        match (required_str(object, "type", path)?, role) {
            ("text", _) => self.add_text(role, required_str(object, "text", path)?),
            ("thinking", "assistant") => self.thought = string(object, "thinking", path)?.filter(|text| !text.is_empty()),
            ("redacted_thinking", "assistant") => {}
            ("tool_use", "assistant") => {
                let id = required_str(object, "id", path)?;
                let input = match object.get("input") {
                    Some(input @ Value::Object(_)) => input,
                    Some(other) => return Err(wrong_type(&format!("{path}.input"), "an object", other)),
                    None => return Err(missing(&format!("{path}.input"))),
                };
                let call = call_value(Some(id), required_str(object, "name", path)?, input);
                self.turn(role).tool_calls.push(call);
                self.calls.insert(id.to_owned());
            }
            ("tool_result", "user") => {
                let id = required_str(object, "tool_use_id", path)?;
                if !self.calls.contains(id) {
                    let message = format!("{id:?} is no tool_use of an earlier message");
                    return Err(RowError::field(ErrorCode::InvalidValue, format!("{path}.tool_use_id"), message));
                }
                optional_bool(object, "is_error")?;
                let content = tool_result(object, path)?;
                let tool_call_id = Some(id.to_owned());
                self.messages.push(Message { role: "tool".into(), content, tool_call_id, ..Message::default() });
            }
            (other, _) => {
                let supported = "text, thinking, redacted_thinking, tool_use, tool_result, each in its role";
                return Err(unsupported(&format!("{path}.type"), other, supported));
            }
        }
        Ok(())
    }
}

/// What a tool gave: a text, or text blocks.
fn tool_result(object: &Map<String, Value>, path: &str) -> Result<String, RowError> {
    let path = format!("{path}.content");
    match object.get("content") {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(blocks)) => {
            let texts = blocks.iter().enumerate().map(|(i, block)| {
                let path = format!("{path}[{i}]");
                let object = block.as_object().ok_or_else(|| wrong_type(&path, "an object", block))?;
                match required_str(object, "type", &path)? {
                    "text" => required_str(object, "text", &path),
                    other => Err(unsupported(&format!("{path}.type"), other, "text")),
                }
            });
            texts.collect()
        }
        Some(other) => Err(wrong_type(&path, "a string or an array of blocks", other)),
    }
}
