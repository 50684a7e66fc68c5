//! `/v1/responses` bodies: items to chat messages, and the settings that the response object repeats.

use super::fields::{optional_bool, optional_object, optional_str, optional_u64, required_str, shorten, wrong_type};
use super::messages::{call_value, check_role, check_tool_type, parse_arguments, parse_content, parse_tool_choice, tool_value};
use super::{check_known, params};
use crate::outcome::{ErrorCode, RowError};
use crate::request::{AnswerFormat, ChatOptions, Input, MAX_TOP_LOGPROBS, Message, Params, Request, Truncate};
use serde_json::{Map, Value, json};

/// Fields that this file reads, besides the sampling parameters.
pub(super) const READ: &[&str] = &[
    "model",
    "input",
    "instructions",
    "max_output_tokens",
    "text",
    "top_logprobs",
    "include",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning",
    "truncation",
    "max_tool_calls",
    "metadata",
    "chat_template_kwargs",
];
/// Names of sampling parameters that are not Responses' own.
const FOREIGN: &[&str] = &["max_tokens", "max_completion_tokens", "n", "best_of", "logit_bias", "response_format"];

/// Asks for log-probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";

/// The request, and what the response object repeats of it.
pub(super) fn parse(row_idx: u64, body: &Map<String, Value>, defaults: &Params) -> Result<(Request, Value), RowError> {
    for (key, value) in body {
        let own: &[&[&str]] = if FOREIGN.contains(&key.as_str()) { &[] } else { &[READ, params::READ] };
        check_known(own, key, value)?;
    }
    let mut params = params::parse(body, defaults)?;
    let max_output_tokens = optional_u64(body, "max_output_tokens", 1, u32::MAX.into())?;
    params.max_tokens = max_output_tokens.map(|n| n as u32).or(defaults.max_tokens);
    params.n = 1;
    params.logprobs = parse_logprobs(body)?;
    let text_format = parse_text_format(body, &mut params)?;
    let mut messages = Vec::new();
    let instructions = optional_str(body, "instructions")?;
    if let Some(instructions) = instructions {
        messages.push(Message { role: "system".into(), content: instructions.into(), ..Message::default() });
    }
    parse_input(body, &mut messages)?;
    let (tools, shown_tools) = parse_tools(body)?;
    let tool_choice = parse_tool_choice(body, &tools)?;
    let (truncate, truncation) = match optional_str(body, "truncation")? {
        None | Some("disabled") => (Truncate::Never, "disabled"),
        Some("auto") => (Truncate::DropMessages, "auto"),
        Some(other) => {
            let message = format!("{other:?} is not one of auto, disabled");
            return Err(RowError::field(ErrorCode::InvalidValue, "body.truncation", message));
        }
    };
    let mut template_kwargs = optional_object(body, "chat_template_kwargs")?.cloned().unwrap_or_default();
    let effort = optional_object(body, "reasoning")?.and_then(|reasoning| reasoning.get("effort")).filter(|v| !v.is_null());
    if let Some(effort) = effort {
        template_kwargs.entry("reasoning_effort").or_insert(effort.clone());
    }
    let parallel_tool_calls = optional_bool(body, "parallel_tool_calls")?.unwrap_or(true);
    let echo = json!({
        "instructions": instructions,
        "metadata": body.get("metadata").filter(|v| !v.is_null()).cloned().unwrap_or_else(|| json!({})),
        "tools": shown_tools,
        "tool_choice": body.get("tool_choice").filter(|v| !v.is_null()).cloned().unwrap_or_else(|| "auto".into()),
        "parallel_tool_calls": parallel_tool_calls,
        "text": {"format": text_format},
        "temperature": f64::from(params.temperature),
        "top_p": f64::from(params.top_p),
        "presence_penalty": f64::from(params.presence_penalty),
        "frequency_penalty": f64::from(params.frequency_penalty),
        "top_logprobs": params.logprobs.unwrap_or(0),
        "truncation": truncation,
        "max_output_tokens": max_output_tokens,
        "max_tool_calls": body.get("max_tool_calls").cloned(),
        "reasoning": {"effort": effort, "summary": null},
        "service_tier": "default",
        "safety_identifier": body.get("safety_identifier").cloned(),
        "prompt_cache_key": body.get("prompt_cache_key").cloned(),
        "user": body.get("user").cloned(),
    });
    let chat = ChatOptions { tools, tool_choice, one_call: !parallel_tool_calls, continue_final: false, template_kwargs };
    let model = optional_str(body, "model")?.map(str::to_owned);
    Ok((Request { row_idx, model, inputs: vec![Input::Messages(messages)], params, chat, truncate }, echo))
}

fn parse_logprobs(body: &Map<String, Value>) -> Result<Option<u8>, RowError> {
    let n_top = optional_u64(body, "top_logprobs", 0, MAX_TOP_LOGPROBS as u64)?;
    let wanted = match body.get("include") {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => {
            if let Some(other) = items.iter().find(|item| *item != LOGPROBS && *item != "reasoning.encrypted_content") {
                let message = format!("{} is not supported; supported: {LOGPROBS}", shorten(other));
                return Err(RowError::field(ErrorCode::UnsupportedParameter, "body.include", message));
            }
            items.iter().any(|item| item == LOGPROBS)
        }
        Some(other) => return Err(wrong_type("body.include", "an array", other)),
    };
    if n_top.is_some_and(|n| n > 0) && !wanted {
        let message = format!("needs body.include to hold {LOGPROBS:?}");
        return Err(RowError::field(ErrorCode::InvalidValue, "body.top_logprobs", message));
    }
    Ok(wanted.then(|| n_top.unwrap_or(0) as u8))
}

/// Sets the answer's format; gives `text.format` as the response repeats it.
fn parse_text_format(body: &Map<String, Value>, params: &mut Params) -> Result<Value, RowError> {
    let plain = json!({"type": "text"});
    let Some(format) = optional_object(body, "text")?.and_then(|text| text.get("format")).filter(|v| !v.is_null()) else {
        return Ok(plain);
    };
    let path = "body.text.format";
    let object = format.as_object().ok_or_else(|| wrong_type(path, "an object", format))?;
    if params.format != AnswerFormat::Text {
        return Err(RowError::field(ErrorCode::InvalidValue, path, "can't be combined with another required format"));
    }
    params.format = match required_str(object, "type", path)? {
        "text" => return Ok(plain),
        "json_object" => AnswerFormat::JsonObject,
        "json_schema" => params::json_schema(object, path)?,
        other => {
            let message = format!("{other:?} is not supported; supported: text, json_object, json_schema");
            return Err(RowError::field(ErrorCode::InvalidValue, format!("{path}.type"), message));
        }
    };
    Ok(format.clone())
}

/// Functions as templates see them, and as the response repeats them.
fn parse_tools(body: &Map<String, Value>) -> Result<(Vec<Value>, Vec<Value>), RowError> {
    let tools = match body.get("tools") {
        None | Some(Value::Null) => return Ok(Default::default()),
        Some(Value::Array(tools)) => tools,
        Some(other) => return Err(wrong_type("body.tools", "an array", other)),
    };
    let (mut seen, mut shown) = (Vec::new(), Vec::new());
    for (i, tool) in tools.iter().enumerate() {
        let path = format!("body.tools[{i}]");
        let object = tool.as_object().ok_or_else(|| wrong_type(&path, "an object", tool))?;
        check_tool_type(object, &path)?;
        seen.push(tool_value(object, &path)?);
        let field = |key: &str| object.get(key).cloned();
        shown.push(json!({"type": "function", "name": field("name"), "description": field("description"),
                          "parameters": field("parameters"), "strict": field("strict")}));
    }
    Ok((seen, shown))
}

fn parse_input(body: &Map<String, Value>, messages: &mut Vec<Message>) -> Result<(), RowError> {
    let path = "body.input";
    match body.get("input") {
        None | Some(Value::Null) => Err(RowError::field(ErrorCode::MissingField, path, "is required")),
        Some(Value::String(text)) => {
            messages.push(Message { role: "user".into(), content: text.clone(), ..Message::default() });
            Ok(())
        }
        Some(Value::Array(items)) if items.is_empty() => {
            Err(RowError::field(ErrorCode::InvalidValue, path, "must hold at least one item"))
        }
        Some(Value::Array(items)) => {
            let mut thought = None;
            items.iter().enumerate().try_for_each(|(i, item)| parse_item(&format!("{path}[{i}]"), item, (messages, &mut thought)))
        }
        Some(other) => Err(wrong_type(path, "a string or an array of items", other)),
    }
}

/// One item; what a response's `output` holds is taken back as it stands. `thought` is what was thought before it.
fn parse_item(path: &str, item: &Value, (messages, thought): (&mut Vec<Message>, &mut Option<String>)) -> Result<(), RowError> {
    let object = item.as_object().ok_or_else(|| wrong_type(path, "an object", item))?;
    match object.get("type").and_then(Value::as_str).unwrap_or("message") {
        "message" => {
            let role = required_str(object, "role", path)?;
            check_role(role, path)?;
            let content = parse_content(&format!("{path}.content"), object.get("content").unwrap_or(&Value::Null))?;
            let thought = thought.take().filter(|_| role == "assistant");
            messages.push(Message { role: role.to_owned(), content, thought, ..Message::default() });
        }
        "function_call" => {
            let name = required_str(object, "name", path)?;
            let arguments = parse_arguments(object.get("arguments").unwrap_or(&Value::Null), &format!("{path}.arguments"))?;
            let call = call_value(Some(required_str(object, "call_id", path)?), name, &arguments);
            // Calls of one turn stand side by side.
            if let Some(turn) = messages.last_mut().filter(|last| last.role == "assistant") {
                turn.tool_calls.push(call);
                turn.thought = turn.thought.take().or_else(|| thought.take());
            } else {
                let (role, thought) = ("assistant".into(), thought.take());
                messages.push(Message { role, thought, tool_calls: vec![call], ..Message::default() });
            }
        }
        "function_call_output" => {
            let content = parse_content(&format!("{path}.output"), object.get("output").unwrap_or(&Value::Null))?;
            let tool_call_id = Some(required_str(object, "call_id", path)?.to_owned());
            messages.push(Message { role: "tool".into(), content, tool_call_id, ..Message::default() });
            *thought = None;
        }
        "reasoning" => *thought = parse_thought(object, path)?,
        "item_reference" => {
            required_str(object, "id", path)?;
            let message = "items of other responses can't be referred to here";
            return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.type"), message));
        }
        other => {
            let message =
                format!("{other:?} is not supported; supported: message, function_call, function_call_output, reasoning");
            return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.type"), message));
        }
    }
    Ok(())
}

/// The text of a reasoning item; a summary is not what was thought.
fn parse_thought(object: &Map<String, Value>, path: &str) -> Result<Option<String>, RowError> {
    let path = format!("{path}.content");
    match object.get("content") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(i, part)| {
                let path = format!("{path}[{i}]");
                let part = part.as_object().ok_or_else(|| wrong_type(&path, "an object", part))?;
                required_str(part, "text", &path)
            });
            let text = texts.collect::<Result<String, _>>()?;
            Ok((!text.is_empty()).then_some(text))
        }
        Some(other) => Err(wrong_type(&path, "an array of parts", other)),
    }
}
