//! Chat messages and tools of a request body.

use super::fields::{optional_bool, optional_object, required_str, wrong_type};
use crate::outcome::{ErrorCode, RowError};
use crate::request::{ChatOptions, Message, ToolChoice};
use serde_json::{Map, Value, json};

/// Roles that a message may have.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

pub(super) fn parse_messages(body: &Map<String, Value>) -> Result<Vec<Message>, RowError> {
    let value = body.get("messages").ok_or_else(|| RowError::field(ErrorCode::MissingField, "body.messages", "is required"))?;
    let items = value.as_array().ok_or_else(|| wrong_type("body.messages", "an array", value))?;
    if items.is_empty() {
        return Err(RowError::field(ErrorCode::InvalidValue, "body.messages", "must hold at least one message"));
    }
    items.iter().enumerate().map(|(i, item)| parse_message(&format!("body.messages[{i}]"), item)).collect()
}

fn parse_message(path: &str, item: &Value) -> Result<Message, RowError> {
    let object = item.as_object().ok_or_else(|| wrong_type(path, "an object", item))?;
    let role = required_str(object, "role", path)?;
    check_role(role, path)?;
    for (key, value) in object {
        let known = match key.as_str() {
            "role" | "content" | "name" => true,
            "tool_calls" | "refusal" | "reasoning_content" => role == "assistant",
            "tool_call_id" => role == "tool",
            _ => false,
        };
        let off = value.is_null() || (key == "tool_calls" && value.as_array().is_some_and(Vec::is_empty));
        if !known && !off {
            return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.{key}"), "is not supported"));
        }
    }
    let tool_calls = match object.get("tool_calls") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(calls)) => {
            let calls = calls.iter().enumerate().map(|(i, call)| parse_call(&format!("{path}.tool_calls[{i}]"), call));
            calls.collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong_type(&format!("{path}.tool_calls"), "an array", other)),
    };
    let thought = string(object, "reasoning_content", path)?;
    let content_path = format!("{path}.content");
    let content = match object.get("content").unwrap_or(&Value::Null) {
        // A turn that only calls tools, only refuses, or was cut off in its thoughts.
        Value::Null if !tool_calls.is_empty() || thought.is_some() => String::new(),
        Value::Null if object.get("refusal").is_some_and(Value::is_string) => {
            string(object, "refusal", path)?.unwrap_or_default()
        }
        content => parse_content(&content_path, content)?,
    };
    let tool_call_id = string(object, "tool_call_id", path)?;
    Ok(Message { role: role.to_owned(), content, thought, name: string(object, "name", path)?, tool_calls, tool_call_id })
}

pub(super) fn check_role(role: &str, path: &str) -> Result<(), RowError> {
    if ROLES.contains(&role) {
        return Ok(());
    }
    let message = format!("{role:?} is not supported; supported: {}", ROLES.join(", "));
    Err(RowError::field(ErrorCode::InvalidValue, format!("{path}.role"), message))
}

/// A field that is a string, if it is there.
pub(in crate::format) fn string(object: &Map<String, Value>, key: &str, path: &str) -> Result<Option<String>, RowError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(wrong_type(&format!("{path}.{key}"), "a string", other)),
    }
}

/// `{"id", "type": "function", "function": {"name", "arguments": "JSON text"}}`, the arguments made an object: that is
/// what templates want.
fn parse_call(path: &str, call: &Value) -> Result<Value, RowError> {
    let object = call.as_object().ok_or_else(|| wrong_type(path, "an object", call))?;
    let function_path = format!("{path}.function");
    let function = match object.get("function") {
        Some(Value::Object(function)) => function,
        Some(other) => return Err(wrong_type(&function_path, "an object", other)),
        None => return Err(RowError::field(ErrorCode::MissingField, function_path, "is required")),
    };
    let name = required_str(function, "name", &function_path)?;
    let arguments = function.get("arguments").unwrap_or(&Value::Null);
    Ok(call_value(
        string(object, "id", path)?.as_deref(),
        name,
        &parse_arguments(arguments, &format!("{function_path}.arguments"))?,
    ))
}

/// A call as templates see it.
pub(in crate::format) fn call_value(id: Option<&str>, name: &str, arguments: &Value) -> Value {
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// JSON text of an object; an object as it is.
pub(super) fn parse_arguments(value: &Value, path: &str) -> Result<Value, RowError> {
    match value {
        Value::Null => Ok(json!({})),
        Value::Object(_) => Ok(value.clone()),
        Value::String(text) if text.trim().is_empty() => Ok(json!({})),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(object @ Value::Object(_)) => Ok(object),
            _ => Err(RowError::field(ErrorCode::InvalidValue, path, "is not the JSON text of an object")),
        },
        other => Err(wrong_type(path, "a string", other)),
    }
}

/// A string, or text parts, which are joined.
pub(super) fn parse_content(path: &str, content: &Value) -> Result<String, RowError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Null => Err(RowError::field(ErrorCode::MissingField, path, "is required")),
        Value::Array(parts) => parts.iter().enumerate().map(|(i, part)| parse_text_part(&format!("{path}[{i}]"), part)).collect(),
        other => Err(wrong_type(path, "a string or an array of text parts", other)),
    }
}

/// A part of text, under the names of both APIs.
fn parse_text_part<'a>(path: &str, part: &'a Value) -> Result<&'a str, RowError> {
    let object = part.as_object().ok_or_else(|| wrong_type(path, "an object", part))?;
    let kind = required_str(object, "type", path)?;
    let field = match kind {
        "text" | "input_text" | "output_text" => "text",
        "refusal" => "refusal",
        _ => {
            let message = format!("{kind:?} is not supported; supported: text");
            return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.type"), message));
        }
    };
    let ignored = ["type", field, "annotations", "logprobs"];
    if let Some((key, _)) = object.iter().find(|(key, value)| !ignored.contains(&key.as_str()) && !value.is_null()) {
        return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.{key}"), "is not supported"));
    }
    required_str(object, field, path)
}

/// Fields that [`parse_chat_options`] reads.
pub(super) const CHAT_OPTIONS: &[&str] = &[
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "continue_final_message",
    "add_generation_prompt",
    "chat_template_kwargs",
    "reasoning_effort",
];

/// Tools and what the template is told; chat completions' form.
pub(super) fn parse_chat_options(body: &Map<String, Value>) -> Result<ChatOptions, RowError> {
    let tools = match body.get("tools") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(tools)) => {
            tools.iter().enumerate().map(|(i, tool)| parse_tool(&format!("body.tools[{i}]"), tool)).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong_type("body.tools", "an array", other)),
    };
    let tool_choice = parse_tool_choice(body, &tools)?;
    let continue_final = optional_bool(body, "continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = optional_bool(body, "add_generation_prompt")?;
    if !continue_final && add_generation_prompt == Some(false) {
        let message = "false needs body.continue_final_message to be true";
        return Err(RowError::field(ErrorCode::InvalidValue, "body.add_generation_prompt", message));
    }
    if continue_final && add_generation_prompt == Some(true) {
        let message = "true contradicts body.continue_final_message";
        return Err(RowError::field(ErrorCode::InvalidValue, "body.add_generation_prompt", message));
    }
    let mut template_kwargs = optional_object(body, "chat_template_kwargs")?.cloned().unwrap_or_default();
    if let Some(effort) = string(body, "reasoning_effort", "body")? {
        template_kwargs.entry("reasoning_effort").or_insert(effort.into());
    }
    let one_call = optional_bool(body, "parallel_tool_calls")? == Some(false);
    Ok(ChatOptions { tools, tool_choice, one_call, continue_final, template_kwargs })
}

fn parse_tool(path: &str, tool: &Value) -> Result<Value, RowError> {
    let object = tool.as_object().ok_or_else(|| wrong_type(path, "an object", tool))?;
    check_tool_type(object, path)?;
    let function_path = format!("{path}.function");
    let function = match object.get("function") {
        Some(Value::Object(function)) => function,
        Some(other) => return Err(wrong_type(&function_path, "an object", other)),
        None => return Err(RowError::field(ErrorCode::MissingField, function_path, "is required")),
    };
    tool_value(function, &function_path)
}

pub(super) fn check_tool_type(object: &Map<String, Value>, path: &str) -> Result<(), RowError> {
    match required_str(object, "type", path)? {
        "function" => Ok(()),
        other => {
            let message = format!("{other:?} is not supported; supported: function");
            Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.type"), message))
        }
    }
}

/// A function as templates see it.
pub(super) fn tool_value(function: &Map<String, Value>, path: &str) -> Result<Value, RowError> {
    let name = required_str(function, "name", path)?;
    let mut shown = Map::new();
    shown.insert("name".into(), name.into());
    if let Some(description) = string(function, "description", path)? {
        shown.insert("description".into(), description.into());
    }
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(schema @ Value::Object(_)) => schema.clone(),
        Some(other) => return Err(wrong_type(&format!("{path}.parameters"), "an object", other)),
    };
    shown.insert("parameters".into(), parameters);
    Ok(json!({"type": "function", "function": shown}))
}

/// `"none"`, `"auto"`, `"required"`, or one function by name (in either API's form).
pub(super) fn parse_tool_choice(body: &Map<String, Value>, tools: &[Value]) -> Result<ToolChoice, RowError> {
    let path = "body.tool_choice";
    let choice = match body.get("tool_choice") {
        None | Some(Value::Null) => return Ok(ToolChoice::Auto),
        Some(Value::String(text)) => match text.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            other => {
                let message = format!("{other:?} is not one of none, auto, required");
                return Err(RowError::field(ErrorCode::InvalidValue, path, message));
            }
        },
        Some(Value::Object(object)) => {
            check_tool_type(object, path)?;
            let named = object.get("function").and_then(Value::as_object).unwrap_or(object);
            let name = required_str(named, "name", path)?;
            if !tools.iter().any(|tool| tool["function"]["name"] == name) {
                return Err(RowError::field(ErrorCode::InvalidValue, path, format!("no tool is called {name:?}")));
            }
            ToolChoice::Named(name.to_owned())
        }
        Some(other) => return Err(wrong_type(path, "a string or an object", other)),
    };
    if choice == ToolChoice::Required && tools.is_empty() {
        return Err(RowError::field(ErrorCode::InvalidValue, path, "\"required\" needs body.tools"));
    }
    Ok(choice)
}
