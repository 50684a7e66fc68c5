//! The columns that a job adds to its dataset rows: their names, their types where the results are Parquet, and their
//! values. Invariant: names and types depend on the pipeline alone, never on a row.

use crate::format::openai::answer::{Place, chat_logprob};
use crate::outcome::{Choice, RowError, Usage};
use crate::prepare::Step;
use crate::request::AnswerFormat;
use arrow::datatypes::{DataType, Field};
use serde_json::{Map, Value, json};
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
}

#[derive(Debug)]
struct Column {
    name: String,
    step: usize,
    kind: Kind,
    /// Whether there are several completions, and the column is a list.
    is_list: bool,
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
    pub(super) fn new(steps: &[Step], prefix: &str) -> Self {
        let mut columns = Vec::new();
        for (i, step) in steps.iter().enumerate() {
            let own = if step.name.is_empty() { prefix.to_owned() } else { format!("{prefix}{}_", step.name) };
            let is_list = step.params.n > 1;
            let mut add = |name: &str, kind: Kind| {
                let is_list = is_list && kind != Kind::Usage;
                columns.push(Column { name: format!("{own}{name}"), step: i, kind, is_list });
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
        }
        Self { columns, error: format!("{prefix}error") }
    }

    /// All names.
    pub(super) fn names(&self) -> Vec<String> {
        self.columns.iter().map(|column| column.name.clone()).chain([self.error.clone()]).collect()
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
        let error = outcome.err().map(
            |e| json!({"code": e.code.as_str(), "message": e.message, "param": e.field, "file": place.file, "line": place.line}),
        );
        values.push((&self.error, error.unwrap_or_default()));
        values
    }

    /// The columns as Parquet has them.
    pub(super) fn fields(&self) -> Vec<Field> {
        let mut fields: Vec<Field> = self.columns.iter().map(|c| Field::new(&c.name, c.data_type(), true)).collect();
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
            Kind::Parsed(_) => each(&|choice| parsed(&choice.text).unwrap_or_default()),
            Kind::Logprobs => each(&|choice| choice.logprobs.iter().flatten().map(chat_logprob).collect()),
            Kind::Usage => json!({
                "prompt_tokens": result.usage.prompt_tokens,
                "completion_tokens": result.usage.completion_tokens,
                "cached_tokens": result.usage.cached_tokens,
                "seed": result.seed,
            }),
            Kind::Score => result.score.map_or(
                Value::Null,
                |score| json!({"logprob": score.logprob, "n_tokens": score.n_tokens, "is_greedy": score.is_greedy}),
            ),
        }
    }

    fn data_type(&self) -> DataType {
        let one = match &self.kind {
            Kind::Completion | Kind::FinishReason => DataType::Utf8,
            Kind::Parsed(schema) => schema_type(schema, schema, 0),
            Kind::Logprobs => logprobs_type(),
            Kind::Usage => {
                let names = ["prompt_tokens", "completion_tokens", "cached_tokens", "seed"];
                structure(names.map(|name| (name, DataType::Int64)))
            }
            Kind::Score => {
                structure([("logprob", DataType::Float64), ("n_tokens", DataType::Int64), ("is_greedy", DataType::Boolean)])
            }
        };
        if self.is_list { list(one) } else { one }
    }
}

/// A completion as JSON; `None` if it is none (cut off, say).
pub(super) fn parsed(text: &str) -> Option<Value> {
    serde_json::from_str(text).ok()
}

fn structure<const N: usize>(fields: [(&str, DataType); N]) -> DataType {
    DataType::Struct(fields.map(|(name, data_type)| Field::new(name, data_type, true)).to_vec().into())
}

fn list(item: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("item", item, true)))
}

fn logprobs_type() -> DataType {
    let token = || vec![("token", DataType::Utf8), ("logprob", DataType::Float64), ("bytes", list(DataType::Int64))];
    let fields =
        |fields: Vec<(&str, DataType)>| DataType::Struct(fields.into_iter().map(|(name, t)| Field::new(name, t, true)).collect());
    let mut with_top = token();
    with_top.push(("top_logprobs", list(fields(token()))));
    list(fields(with_top))
}

/// Deepest nesting of a schema that becomes typed columns.
const MAX_DEPTH: usize = 32;

/// The Arrow type of what a JSON schema allows: objects with known properties are structs, arrays lists, texts out of a
/// fixed set dictionaries. What has no one such type (free objects, unions) is JSON text.
fn schema_type(schema: &Value, root: &Value, depth: usize) -> DataType {
    let text = DataType::Utf8;
    if depth > MAX_DEPTH {
        return text;
    }
    if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
        let target = target.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
        return target.map_or(text, |target| schema_type(target, root, depth + 1));
    }
    if let Some(options) = schema.get("enum").and_then(Value::as_array) {
        return match options.iter().all(|option| option.is_string() || option.is_null()) {
            true => DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8)),
            false => type_of_values(options),
        };
    }
    if let Some(value) = schema.get("const") {
        return type_of_values(std::slice::from_ref(value));
    }
    if let Some(options) = schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array) {
        let mut types = options.iter().filter(|option| option["type"] != "null").map(|o| schema_type(o, root, depth + 1));
        return match (types.next(), types.next()) {
            (Some(only), None) => only,
            _ => text,
        };
    }
    let names: Vec<&str> = match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).filter(|name| *name != "null").collect(),
        _ => Vec::new(),
    };
    match names.as_slice() {
        ["string"] => DataType::Utf8,
        ["integer"] => DataType::Int64,
        ["number"] => DataType::Float64,
        ["boolean"] => DataType::Boolean,
        ["array"] => schema.get("items").map_or(text, |items| list(schema_type(items, root, depth + 1))),
        ["object"] => match schema.get("properties").and_then(Value::as_object).filter(|p| !p.is_empty()) {
            Some(properties) if closed(schema) => {
                let fields = properties.iter().map(|(name, s)| Field::new(name, schema_type(s, root, depth + 1), true));
                DataType::Struct(fields.collect())
            }
            _ => text,
        },
        _ => text,
    }
}

/// Whether an object has no other properties than those named. A schema that says nothing of others is taken to mean
/// that: the grammar lets others through only where they are asked for.
fn closed(schema: &Value) -> bool {
    let allows = |key: &str| schema.get(key).is_some_and(|value| value != &Value::Bool(false));
    !allows("additionalProperties") && !allows("patternProperties")
}

fn type_of_values(values: &[Value]) -> DataType {
    let all = |is: fn(&Value) -> bool| values.iter().all(|value| is(value) || value.is_null());
    if all(Value::is_i64) {
        DataType::Int64
    } else if all(Value::is_number) {
        DataType::Float64
    } else if all(Value::is_boolean) {
        DataType::Boolean
    } else {
        DataType::Utf8
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
        let wanted = DataType::Struct(
            vec![
                field("label", DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))),
                field("n", DataType::Int64),
                field("tags", list(tag)),
                field("free", DataType::Utf8),
                field("one_of_two", DataType::Utf8),
                field("maybe", DataType::Float64),
            ]
            .into(),
        );
        assert_eq!(schema_type(&schema, &schema, 0), wanted);
        let endless = json!({"$ref": "#"});
        assert_eq!(schema_type(&endless, &endless, 0), DataType::Utf8);
    }
}
