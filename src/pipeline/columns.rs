//! The columns that a job adds to its dataset rows: their names, their types where the results are Parquet, and their
//! values. Invariant: names and types depend on the pipeline alone, never on a row.

use crate::format::json_field;
use crate::format::openai::answer::{Place, add_tried, chat_logprob};
use crate::outcome::{Choice, RowError, Usage};
use crate::prepare::{RowForm, Step};
use crate::request::AnswerFormat;
use arrow::datatypes::{DataType, Field};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

/// What a column says of a step.
#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Completion,
    FinishReason,
    Usage,
    Logprobs,
    /// The completion as JSON, with the schema it follows.
    Parsed(Arc<Value>),
    /// How likely the continuation is.
    Score,
    /// How often it was drawn.
    Attempts,
    /// Names of checks that it failed and stays all the same.
    FailedChecks,
}

#[derive(Debug)]
struct Column {
    name: String,
    step: usize,
    kind: Kind,
    /// Whether there are several completions, and the column is a list.
    is_list: bool,
    /// Of one completion.
    field: Field,
}

/// See the module.
#[derive(Debug)]
pub(super) struct ResultColumns {
    columns: Vec<Column>,
    error: String,
}

/// What a step gave, for its columns.
#[derive(Debug)]
pub(super) struct StepResult {
    pub(super) choices: Vec<Choice>,
    pub(super) usage: Usage,
    pub(super) seed: Option<u64>,
    pub(super) attempts: u32,
    pub(super) failed_checks: Vec<String>,
    pub(super) score: Option<Score>,
}

/// The likelihood of a continuation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Score {
    /// Sum over its tokens, in nats.
    pub(super) logprob: f64,
    pub(super) n_tokens: usize,
    /// Whether each token was the likeliest.
    pub(super) is_greedy: bool,
}

impl ResultColumns {
    /// The columns of a job; `prefix` is put before all names.
    pub(super) fn of(form: &RowForm, prefix: &str) -> Self {
        let steps: &[Step] = match form {
            RowForm::Requests => &[],
            RowForm::Dataset(steps) => steps,
        };
        let mut columns = Vec::new();
        for (i, step) in steps.iter().enumerate() {
            let own = if step.name.is_empty() { prefix.to_owned() } else { format!("{prefix}{}_", step.name) };
            let is_list = step.params.n > 1;
            let mut add = |name: &str, kind: Kind| {
                let is_list = is_list && !matches!(kind, Kind::Usage | Kind::Attempts | Kind::FailedChecks);
                let name = format!("{own}{name}");
                let field = kind.field(&name);
                columns.push(Column { name, step: i, kind, is_list, field });
            };
            if step.template.continuation.is_some() {
                add("score", Kind::Score);
                continue;
            }
            add("completion", Kind::Completion);
            match &step.params.format {
                AnswerFormat::JsonSchema(schema) => add("parsed", Kind::Parsed(Arc::clone(schema))),
                AnswerFormat::JsonObject => add("parsed", Kind::Parsed(Arc::new(json!({"type": "object"})))),
                _ => {}
            }
            add("finish_reason", Kind::FinishReason);
            add("usage", Kind::Usage);
            if step.params.logprobs.is_some() {
                add("logprobs", Kind::Logprobs);
            }
            if step.is_checked {
                add("attempts", Kind::Attempts);
                add("failed_checks", Kind::FailedChecks);
            }
        }
        Self { columns, error: format!("{prefix}error") }
    }

    /// All names.
    pub(super) fn names(&self) -> Vec<String> {
        self.columns.iter().map(|column| column.name.clone()).chain([self.error.clone()]).collect()
    }

    /// What a row's line has besides its own columns, and which of those it keeps, for the report: lines of one form have one
    /// description.
    pub(super) fn described(&self, kept: Option<&[String]>) -> Vec<String> {
        let added = self.fields().into_iter().map(|field| format!("{}: {:?}", field.name(), field.data_type()));
        let own = kept.map_or("all of its own".to_owned(), |kept| format!("of its own {kept:?}"));
        added.chain([own]).collect()
    }

    /// The names of a row's `usage` columns.
    pub(super) fn usage_names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().filter(|column| column.kind == Kind::Usage).map(|column| column.name.as_str())
    }

    /// The name of the `error` column.
    pub(super) fn error_name(&self) -> &str {
        &self.error
    }

    /// The columns' values: what each step gave, or the row's error.
    pub(super) fn values(&self, place: Place<'_>, outcome: Result<&[StepResult], &RowError>) -> Vec<(&str, Value)> {
        let mut values = Vec::with_capacity(self.columns.len() + 1);
        for column in &self.columns {
            let value = outcome.map_or(Value::Null, |steps| column.value(&steps[column.step]));
            values.push((column.name.as_str(), value));
        }
        let error = outcome.err().map(|e| {
            let (code, file, line) = (e.code.as_str(), place.file, place.line);
            let mut error = json!({"code": code, "message": e.message, "param": e.field, "file": file, "line": line});
            add_tried(&mut error, e);
            error
        });
        values.push((&self.error, error.unwrap_or_default()));
        values
    }

    /// The columns as Parquet has them.
    pub(super) fn fields(&self) -> Vec<Field> {
        let as_column = |column: &Column| {
            let field = column.field.clone();
            if column.is_list { Field::new(&column.name, list(field.with_name("item")), true) } else { field }
        };
        let mut fields: Vec<Field> = self.columns.iter().map(as_column).collect();
        let text = |name: &str| Field::new(name, DataType::Utf8, true);
        let error = vec![text("code"), text("message"), text("param"), text("file"), Field::new("line", DataType::Int64, true)];
        fields.push(Field::new(&self.error, DataType::Struct(error.into()), true));
        fields
    }
}

impl Column {
    fn value(&self, result: &StepResult) -> Value {
        let each = |value: &dyn Fn(&Choice) -> Value| match result.choices.as_slice() {
            [only] if !self.is_list => value(only),
            choices => choices.iter().map(value).collect(),
        };
        match &self.kind {
            Kind::Completion => each(&|choice| choice.text.as_str().into()),
            Kind::FinishReason => each(&|choice| choice.finish_reason.as_str().into()),
            Kind::Parsed(_) => {
                each(&|choice| parsed(&choice.text).filter(|value| fits(value, self.field.data_type())).unwrap_or_default())
            }
            Kind::Logprobs => each(&|choice| choice.logprobs.iter().flatten().map(chat_logprob).collect()),
            Kind::Usage => json!({
                "prompt_tokens": result.usage.prompt_tokens,
                "completion_tokens": result.usage.completion_tokens,
                "cached_tokens": result.usage.cached_tokens,
                "seed": result.seed,
            }),
            Kind::Attempts => result.attempts.into(),
            Kind::FailedChecks => result.failed_checks.iter().map(String::as_str).collect(),
            Kind::Score => result.score.map_or(
                Value::Null,
                |score| json!({"logprob": score.logprob, "n_tokens": score.n_tokens, "is_greedy": score.is_greedy}),
            ),
        }
    }
}

impl Kind {
    /// The column of one completion.
    fn field(&self, name: &str) -> Field {
        let data_type = match self {
            Self::Completion | Self::FinishReason => DataType::Utf8,
            Self::Parsed(schema) => return schema_field(name, schema, schema, 0),
            Self::Logprobs => logprobs_type(),
            Self::Attempts => DataType::Int64,
            Self::FailedChecks => list(item(DataType::Utf8)),
            Self::Usage => {
                let names = ["prompt_tokens", "completion_tokens", "cached_tokens", "seed"];
                structure(names.map(|name| (name, DataType::Int64)))
            }
            Self::Score => {
                structure([("logprob", DataType::Float64), ("n_tokens", DataType::Int64), ("is_greedy", DataType::Boolean)])
            }
        };
        Field::new(name, data_type, true)
    }
}

/// A completion as JSON; `None` if it is none (cut off, say).
pub(super) fn parsed(text: &str) -> Option<Value> {
    serde_json::from_str(text).ok()
}

fn structure<const N: usize>(fields: [(&str, DataType); N]) -> DataType {
    DataType::Struct(fields.map(|(name, data_type)| Field::new(name, data_type, true)).to_vec().into())
}

fn list(item: Field) -> DataType {
    DataType::List(Arc::new(item))
}

fn item(data_type: DataType) -> Field {
    Field::new("item", data_type, true)
}

fn logprobs_type() -> DataType {
    let bytes = || Field::new("bytes", list(item(DataType::Int64)), true);
    let token = || vec![Field::new("token", DataType::Utf8, true), Field::new("logprob", DataType::Float64, true), bytes()];
    let mut with_top = token();
    with_top.push(Field::new("top_logprobs", list(item(DataType::Struct(token().into()))), true));
    list(item(DataType::Struct(with_top.into())))
}

/// Deepest nesting of a schema that becomes typed columns.
const MAX_DEPTH: usize = 32;

/// The column of what a JSON schema allows: objects with known properties are structs, arrays lists, texts out of a fixed
/// set dictionaries. What has no one such type (free objects, unions) is JSON text.
fn schema_field(name: &str, schema: &Value, root: &Value, depth: usize) -> Field {
    let json = || json_field(name);
    let typed = |data_type: DataType| Field::new(name, data_type, true);
    if depth > MAX_DEPTH {
        return json();
    }
    if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
        let target = target.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
        return target.map_or_else(json, |target| schema_field(name, target, root, depth + 1));
    }
    if let Some(options) = schema.get("enum").and_then(Value::as_array) {
        let are_texts = options.iter().all(|option| option.is_string() || option.is_null());
        let labels = || typed(DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8)));
        return if are_texts { labels() } else { type_of_values(options).map_or_else(json, typed) };
    }
    if let Some(value) = schema.get("const") {
        return type_of_values(std::slice::from_ref(value)).map_or_else(json, typed);
    }
    if let Some(options) = schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array) {
        let mut others = options.iter().filter(|option| option["type"] != "null");
        return match (others.next(), others.next()) {
            (Some(only), None) => schema_field(name, only, root, depth + 1),
            _ => json(),
        };
    }
    let types: Vec<&str> = match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).filter(|name| *name != "null").collect(),
        _ => Vec::new(),
    };
    match types.as_slice() {
        ["string"] => typed(DataType::Utf8),
        ["integer"] => typed(DataType::Int64),
        ["number"] => typed(DataType::Float64),
        ["boolean"] => typed(DataType::Boolean),
        ["array"] => match schema.get("items") {
            Some(items @ Value::Object(_)) => typed(list(schema_field("item", items, root, depth + 1))),
            _ => json(),
        },
        ["object"] => match schema.get("properties").and_then(Value::as_object).filter(|p| !p.is_empty()) {
            Some(properties) if closed(schema) => {
                let fields = properties.iter().map(|(name, s)| schema_field(name, s, root, depth + 1));
                typed(DataType::Struct(fields.collect()))
            }
            _ => json(),
        },
        _ => json(),
    }
}

/// Whether a column of the type can hold the value: a schema may allow integers that no column can.
fn fits(value: &Value, data_type: &DataType) -> bool {
    match (value, data_type) {
        (Value::Null, _)
        | (_, DataType::Utf8)
        | (Value::Bool(_), DataType::Boolean)
        | (Value::String(_), DataType::Dictionary(..)) => true,
        (Value::Number(n), DataType::Int64) => n.as_i64().is_some(),
        (Value::Number(n), DataType::Float64) => n.as_f64().is_some_and(f64::is_finite),
        (Value::Array(values), DataType::List(item)) => values.iter().all(|value| fits(value, item.data_type())),
        (Value::Object(object), DataType::Struct(fields)) => {
            object.iter().all(|(name, value)| fields.find(name).is_some_and(|(_, field)| fits(value, field.data_type())))
        }
        _ => false,
    }
}

/// Whether an object has no other properties than those named. A schema that says nothing of others is taken to mean
/// that: the grammar lets others through only where they are asked for.
fn closed(schema: &Value) -> bool {
    let allows = |key: &str| schema.get(key).is_some_and(|value| value != &Value::Bool(false));
    !allows("additionalProperties") && !allows("patternProperties")
}

/// The one type of some values, if they have one.
fn type_of_values(values: &[Value]) -> Option<DataType> {
    let all = |is: fn(&Value) -> bool| values.iter().all(|value| is(value) || value.is_null());
    if all(Value::is_i64) {
        Some(DataType::Int64)
    } else if all(Value::is_number) {
        Some(DataType::Float64)
    } else if all(Value::is_boolean) {
        Some(DataType::Boolean)
    } else {
        all(Value::is_string).then_some(DataType::Utf8)
    }
}

/// The row's own columns, as they were written, with others behind them.
pub(super) fn line(own: Option<&str>, values: Vec<(&str, Value)>) -> String {
    let own = own.and_then(|text| text.trim().strip_prefix('{')?.strip_suffix('}')).unwrap_or_default().trim();
    let mut line = String::with_capacity(own.len() + 256);
    line.push('{');
    line.push_str(own);
    for (name, value) in values {
        if line.len() > 1 {
            line.push(',');
        }
        line.push_str(&Value::String(name.to_owned()).to_string());
        line.push(':');
        line.push_str(&value.to_string());
    }
    line.push('}');
    line
}

/// Some of a row's own columns, the values as they were written.
pub(super) fn kept(own: &str, names: &[String]) -> String {
    let columns: HashMap<Cow<'_, str>, &RawValue> = serde_json::from_str(own).unwrap_or_default();
    let mut line = String::from("{");
    for name in names {
        if let Some(value) = columns.get(name.as_str()) {
            line.push_str(if line.len() > 1 { "," } else { "" });
            line.push_str(&Value::from(name.as_str()).to_string());
            line.push(':');
            line.push_str(value.get());
        }
    }
    line.push('}');
    line
}

/// The values of result columns in an earlier line, in their order.
pub(super) fn values_of<'a>(columns: &'a ResultColumns, line: &Map<String, Value>) -> Vec<(&'a str, Value)> {
    let names = columns.columns.iter().map(|column| column.name.as_str()).chain([columns.error.as_str()]);
    names.filter_map(|name| Some((name, line.get(name)?.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_become_types() {
        let schema = json!({
            "type": "object",
            "properties": {
                "label": {"enum": ["a", "b"]},
                "n": {"type": ["integer", "null"]},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
                "free": {"type": "object"},
                "one_of_two": {"anyOf": [{"type": "string"}, {"type": "number"}]},
                "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            },
            "$defs": {"tag": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "additionalProperties": false}},
        });
        let field = |name: &str, t: DataType| Field::new(name, t, true);
        let tag = DataType::Struct(vec![field("ok", DataType::Boolean)].into());
        let label = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
        let wanted = DataType::Struct(
            vec![
                field("label", label),
                field("n", DataType::Int64),
                field("tags", list(item(tag))),
                json_field("free"),
                json_field("one_of_two"),
                field("maybe", DataType::Float64),
            ]
            .into(),
        );
        assert_eq!(schema_field("x", &schema, &schema, 0), field("x", wanted.clone()));
        let endless = json!({"$ref": "#"});
        assert_eq!(schema_field("x", &endless, &endless, 0), json_field("x"));
        for (value, is_good) in [
            (json!({"label": "a", "n": 5, "tags": [{"ok": true}], "free": {"x": 1}, "maybe": null}), true),
            (json!({"n": 1e30}), false),
            (json!({"n": 18_446_744_073_709_551_615_u64}), false),
            (json!({"tags": [{"other": 1}]}), false),
            (json!([1]), false),
        ] {
            assert_eq!(fits(&value, &wanted), is_good, "{value}");
        }
    }
}
