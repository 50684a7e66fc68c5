//! How models write function calls: found out from the chat template, read back from completions, and turned into a
//! grammar where a call is required. Knows nothing of the wire. Invariant: text that is no well-formed call of a known
//! form stays text.

use crate::outcome::ToolCall;
use crate::request::ToolChoice;
use serde_json::{Map, Value, json};

/// The form of a model's calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`, once per call (Hermes, Qwen 2.5 and 3).
    Tagged,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` (Mistral).
    List,
    /// `{"name": …, "parameters": {…}}` as the whole answer, perhaps after `<|python_tag|>` (Llama 3.1 and later).
    Bare,
}

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const LIST: &str = "[TOOL_CALLS]";
const PYTHON: &str = "<|python_tag|>";

impl CallFormat {
    /// The form that a chat template teaches; `None` if it teaches none that is known.
    pub fn of_template(source: &str) -> Option<Self> {
        if source.contains(OPEN) {
            Some(Self::Tagged)
        } else if source.contains(LIST) {
            Some(Self::List)
        } else if source.contains("\"parameters\":") && source.contains("tools") {
            Some(Self::Bare)
        } else {
            None
        }
    }

    /// Splits a completion into text and calls.
    pub fn parse(self, text: &str) -> (String, Vec<ToolCall>) {
        let found = match self {
            Self::Tagged => parse_tagged(text),
            Self::List => parse_list(text),
            Self::Bare => parse_bare(text),
        };
        found.unwrap_or_else(|| (text.to_owned(), Vec::new()))
    }

    /// How many leading bytes of an unfinished completion are text whatever follows: no call begins in them.
    pub fn plain_len(self, text: &str) -> usize {
        // What may become the beginning of a mark, and the blanks before one, wait.
        let before = |mark: &str| {
            let end = text.find(mark).unwrap_or_else(|| {
                let begun = (1..mark.len()).rev().find(|&n| text.ends_with(&mark[..n]));
                text.len() - begun.unwrap_or(0)
            });
            text[..end].trim_end().len()
        };
        let may_begin = |marks: &[&str]| {
            let start = text.trim_start();
            marks.iter().any(|mark| start.starts_with(mark) || mark.starts_with(start))
        };
        match self {
            Self::Tagged => before(OPEN),
            // The mark itself is no text where it is a control token: then the list is the whole answer.
            Self::List if may_begin(&["["]) => 0,
            Self::List => before(LIST),
            Self::Bare if may_begin(&["{", PYTHON]) => 0,
            Self::Bare => text.len(),
        }
    }

    /// A Lark grammar of one call of these functions (`{"type": "function", "function": {…}}`); `None` if none need be
    /// made.
    pub fn required(self, tools: &[Value], choice: &ToolChoice) -> Option<String> {
        let wanted = match choice {
            ToolChoice::Required => None,
            ToolChoice::Named(name) => Some(name.as_str()),
            ToolChoice::Auto | ToolChoice::None => return None,
        };
        let arguments = if self == Self::Bare { "parameters" } else { "arguments" };
        let calls = tools.iter().map(|tool| &tool["function"]).filter(|f| wanted.is_none_or(|name| f["name"] == name));
        // Each function's parameters are a schema of their own, so that what they refer to by `#/…` is found.
        let style = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        let (mut rules, mut names) = (Vec::new(), Vec::new());
        for (i, function) in calls.enumerate() {
            let mut schema = function["parameters"].clone();
            if let Some(schema) = schema.as_object_mut() {
                schema.entry("x-guidance").or_insert_with(|| style.clone());
            }
            // Two texts in one: the call as JSON, and that as a literal of the grammar.
            let head = format!("{{\"name\": {}, \"{arguments}\": ", function["name"]);
            rules.push(format!("call{i}: {} args{i} \"}}\"\nargs{i}: %json {schema}\n", Value::String(head)));
            names.push(format!("call{i}"));
        }
        let (before, after) = match self {
            Self::Tagged => (format!("\"{OPEN}\\n\" "), format!(" \"\\n{CLOSE}\"")),
            Self::List => (format!("\"{LIST}[\" "), " \"]\"".to_owned()),
            Self::Bare => (String::new(), String::new()),
        };
        Some(format!("start: {before}call{after}\ncall: {}\n{}", names.join(" | "), rules.concat()))
    }
}

fn parse_tagged(text: &str) -> Option<(String, Vec<ToolCall>)> {
    let (before, mut rest) = text.split_once(OPEN)?;
    let mut calls = Vec::new();
    loop {
        // The last closing tag may be missing where generation stopped at it.
        let (inside, after) = rest.split_once(CLOSE).unwrap_or((rest, ""));
        calls.push(call(&serde_json::from_str(inside.trim()).ok()?)?);
        match after.split_once(OPEN) {
            Some((_, next)) => rest = next,
            None => return Some((before.trim_end().to_owned(), calls)),
        }
    }
}

fn parse_list(text: &str) -> Option<(String, Vec<ToolCall>)> {
    // Where the mark is a control token it is no part of the text.
    let (before, rest) = text.split_once(LIST).unwrap_or(("", text));
    let items: Vec<Map<String, Value>> = serde_json::from_str(rest.trim()).ok()?;
    let calls = items.iter().map(call).collect::<Option<Vec<_>>>()?;
    (!calls.is_empty()).then(|| (before.trim_end().to_owned(), calls))
}

fn parse_bare(text: &str) -> Option<(String, Vec<ToolCall>)> {
    let text = text.trim();
    let object: Map<String, Value> = serde_json::from_str(text.strip_prefix(PYTHON).unwrap_or(text)).ok()?;
    Some((String::new(), vec![call(&object)?]))
}

fn call(object: &Map<String, Value>) -> Option<ToolCall> {
    let name = object.get("name")?.as_str()?.to_owned();
    let arguments = object.get("arguments").or_else(|| object.get("parameters"))?;
    let arguments = match arguments {
        Value::Object(_) => arguments.to_string(),
        Value::String(text) if serde_json::from_str::<Map<String, Value>>(text).is_ok() => text.clone(),
        _ => return None,
    };
    Some(ToolCall { name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool_call(name: &str, arguments: &str) -> ToolCall {
        ToolCall { name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn calls_are_read_in_every_form() {
        let cases = [
            (
                CallFormat::Tagged,
                "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>{\"name\":\"g\",\"arguments\":{}}</tool_call>",
                "Let me see.",
                vec![tool_call("f", "{\"x\":1}"), tool_call("g", "{}")],
            ),
            (CallFormat::Tagged, "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n", "", vec![tool_call("f", "{}")]),
            (
                CallFormat::List,
                "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"x\": [1, 2]}}]",
                "",
                vec![tool_call("f", "{\"x\":[1,2]}")],
            ),
            (
                CallFormat::Bare,
                "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"q\": \"a\"}}",
                "",
                vec![tool_call("f", "{\"q\":\"a\"}")],
            ),
        ];
        for (format, text, content, calls) in cases {
            assert_eq!(format.parse(text), (content.to_owned(), calls), "{text}");
        }
    }

    /// Whatever is shown of a completion on its way is the beginning of its text in the end.
    #[test]
    fn what_is_shown_early_is_never_taken_back() {
        let texts = [
            "Let me see. \n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
            "a < b, <tool> and <tool_call> {broken",
            "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}]",
            " [{\"name\": \"f\", \"arguments\": {}}]",
            "see [TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}]",
            "[1, 2] is a list",
            "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}",
            " {\"name\": \"f\", \"parameters\": {}}",
            "{\"answer\": 3} is it",
            "<3 is love",
        ];
        for text in texts {
            for format in [CallFormat::Tagged, CallFormat::List, CallFormat::Bare] {
                let whole = format.parse(text).0;
                for end in 0..=text.len() {
                    let shown = &text[..format.plain_len(&text[..end])];
                    assert!(whole.starts_with(shown), "{format:?}: {shown:?} of {text:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for (format, text) in [
            (CallFormat::Tagged, "<tool_call>{\"name\": \"f\"}</tool_call>"),
            (CallFormat::Tagged, "<tool_call>{\"name\": \"f\", \"arguments\": {"),
            (CallFormat::List, "[TOOL_CALLS] none"),
            (CallFormat::List, "[TOOL_CALLS][]"),
            (CallFormat::Bare, "{\"answer\": 3}"),
            (CallFormat::Bare, "The name is 3."),
        ] {
            assert_eq!(format.parse(text), (text.to_owned(), Vec::new()));
        }
    }
}
