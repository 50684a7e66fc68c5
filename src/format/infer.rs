//! Finds a schema that all records of a stream fit, in one pass before they are written. Knows JSON's types only.
//! Invariant: what is found depends on the records and the order of their fields alone, and no value is lost or changed, but that numbers beyond
//! 64 bits become the nearest double:
//! what no single column type can hold becomes a column of JSON texts.

use std::sync::Arc;

use anyhow::{Result, bail};
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef};
use serde_json::{Map, Value};

/// Columns a file may have: each costs memory while writing.
const MAX_COLUMNS: usize = 1000;

/// Fields a nested object may have before it is taken for a dictionary, which is no struct but a JSON text.
const MAX_FIELDS: usize = 100;

/// Objects and lists inside each other before the rest becomes a JSON text.
const MAX_DEPTH: usize = 12;

/// Integers beyond this are not all floats.
const MAX_EXACT: u64 = 1 << 53;

/// Marks a string column that holds JSON texts, as Arrow does
/// (<https://arrow.apache.org/docs/format/CanonicalExtensions.html#json>).
const EXTENSION_KEY: &str = "ARROW:extension:name";
const EXTENSION_JSON: &str = "arrow.json";

/// A schema in the making.
#[derive(Debug, Default)]
pub struct SchemaInference {
    columns: Vec<(String, Kind)>,
}

impl SchemaInference {
    /// Widens the schema so that `record`, the text of a JSON object, fits.
    pub fn observe(&mut self, record: &str) -> Result<()> {
        let record: Map<String, Value> = serde_json::from_str(record)?;
        if !absorb_fields(&mut self.columns, &record, MAX_COLUMNS, MAX_DEPTH) {
            bail!("the records have more than {MAX_COLUMNS} different fields: too many for Parquet columns");
        }
        Ok(())
    }

    /// The schema of all records observed: a column per field, in order of first appearance, all nullable. Booleans, 64-bit
    /// integers, 64-bit floats (integers and floats mixed), strings; lists and structs of these; a column that was
    /// always null is a string column; anything mixed is a string column of JSON texts (strings in quotes).
    /// Columns of `known` have the types given there, whatever was observed, and are there in any case.
    pub fn finish(&self, known: &[Field]) -> SchemaRef {
        let mut fields: Vec<FieldRef> = fields_of(&self.columns).iter().cloned().collect();
        for known in known {
            match fields.iter_mut().find(|field| field.name() == known.name()) {
                Some(field) => *field = Arc::new(known.clone()),
                None => fields.push(Arc::new(known.clone())),
            }
        }
        Arc::new(Schema::new(fields))
    }
}

/// A string column that holds JSON texts.
pub fn json_field(name: &str) -> Field {
    Field::new(name, DataType::Utf8, true).with_metadata([json_extension()])
}

/// Whether a column holds JSON texts.
pub(super) fn is_json(field: &Field) -> bool {
    field.metadata().get(EXTENSION_KEY).is_some_and(|name| name == EXTENSION_JSON)
}

/// What values of a column were so far. Absorbing is commutative, but for the order of fields.
#[derive(Debug, Clone, PartialEq)]
enum Kind {
    /// Nothing but null.
    Null,
    Bool,
    Int {
        /// Some are beyond [`MAX_EXACT`].
        is_wide: bool,
    },
    Float,
    Text,
    List(Box<Kind>),
    Struct(Vec<(String, Kind)>),
    /// No one type.
    Json,
}

impl Kind {
    fn absorb(&mut self, value: &Value, depth: usize) {
        match (&mut *self, value) {
            (_, Value::Null) => {}
            (Self::Null, _) => *self = Self::of(value, depth),
            (Self::List(item), Value::Array(values)) => {
                for value in values {
                    item.absorb(value, depth - 1);
                }
            }
            (Self::Struct(fields), Value::Object(object)) => {
                if !absorb_fields(fields, object, MAX_FIELDS, depth - 1) {
                    *self = Self::Json;
                }
            }
            (kind, _) => *kind = kind.join(&Self::of(value, depth)),
        }
    }

    fn of(value: &Value, depth: usize) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Bool,
            Value::Number(n) => match n.as_i64() {
                Some(int) => Self::Int { is_wide: int.unsigned_abs() > MAX_EXACT },
                None if n.is_f64() => Self::Float,
                None => Self::Json,
            },
            Value::String(_) => Self::Text,
            Value::Array(_) | Value::Object(_) if depth == 0 => Self::Json,
            Value::Array(_) => Self::List(Box::new(Self::Null)).with(value, depth),
            Value::Object(_) => Self::Struct(Vec::new()).with(value, depth),
        }
    }

    fn with(mut self, value: &Value, depth: usize) -> Self {
        self.absorb(value, depth);
        self
    }

    fn join(&self, other: &Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a.clone(),
            (Self::Int { .. }, Self::Int { .. }) => Self::Int { is_wide: true },
            (Self::Int { is_wide: false }, Self::Float) | (Self::Float, Self::Int { is_wide: false }) => Self::Float,
            _ => Self::Json,
        }
    }

    fn field(&self, name: &str) -> Field {
        let data_type = match self {
            Self::Null | Self::Text => DataType::Utf8,
            Self::Bool => DataType::Boolean,
            Self::Int { .. } => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::List(item) => DataType::List(Arc::new(item.field("element"))),
            Self::Struct(fields) if !fields.is_empty() => DataType::Struct(fields_of(fields)),
            // A struct without fields can't be written.
            Self::Struct(_) | Self::Json => return json_field(name),
        };
        Field::new(name, data_type, true)
    }
}

fn json_extension() -> (String, String) {
    (EXTENSION_KEY.to_owned(), EXTENSION_JSON.to_owned())
}

/// `false` if there would be more than `n_max` fields.
fn absorb_fields(fields: &mut Vec<(String, Kind)>, object: &Map<String, Value>, n_max: usize, depth: usize) -> bool {
    for (i, (name, value)) in object.iter().enumerate() {
        // Records mostly have the same fields in the same order.
        let known = if fields.get(i).is_some_and(|field| field.0 == *name) {
            Some(i)
        } else {
            fields.iter().position(|field| field.0 == *name)
        };
        let idx = known.unwrap_or_else(|| {
            fields.push((name.clone(), Kind::Null));
            fields.len() - 1
        });
        if fields.len() > n_max {
            return false;
        }
        fields[idx].1.absorb(value, depth);
    }
    true
}

fn fields_of(fields: &[(String, Kind)]) -> Fields {
    fields.iter().map(|(name, kind)| FieldRef::new(kind.field(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn infer(records: &[&str]) -> SchemaRef {
        let mut inference = SchemaInference::default();
        for record in records {
            inference.observe(record).unwrap();
        }
        inference.finish(&[])
    }

    #[track_caller]
    fn check(values: &[&str], wanted: &DataType, wants_json: bool) {
        for values in [values.to_vec(), values.iter().rev().copied().collect()] {
            let records: Vec<String> = values.iter().map(|value| format!("{{\"x\":{value}}}")).collect();
            let schema = infer(&records.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(schema.field(0).data_type(), wanted, "{values:?}");
            assert_eq!(is_json(schema.field(0)), wants_json, "{values:?}");
        }
    }

    #[test]
    fn one_type_for_all_values() {
        check(&["null", "null"], &DataType::Utf8, false);
        check(&["true", "null"], &DataType::Boolean, false);
        check(&["1", "-9223372036854775808"], &DataType::Int64, false);
        check(&["1", "0.5"], &DataType::Float64, false);
        check(&["9007199254740993", "0.5", "1"], &DataType::Utf8, true);
        check(&["18446744073709551615"], &DataType::Utf8, true);
        check(&["\"a\"", "null"], &DataType::Utf8, false);
        check(&["\"a\"", "1"], &DataType::Utf8, true);
        check(&["[1]", "[]", "[null, 2.5]"], &DataType::new_list(DataType::Float64, true).with_name("element"), false);
        check(&["[]"], &DataType::new_list(DataType::Utf8, true).with_name("element"), false);
        check(&["[1]", "1"], &DataType::Utf8, true);
        check(&["{}", "null"], &DataType::Utf8, true);
        let a = Field::new("a", DataType::Int64, true);
        check(&["{\"a\":1}", "{\"a\":null}", "{}", "null"], &DataType::Struct([Arc::new(a)].into()), false);
    }

    /// Only for the table above: the name of a list's items.
    trait WithName {
        fn with_name(self, name: &str) -> Self;
    }

    impl WithName for DataType {
        fn with_name(self, name: &str) -> Self {
            match self {
                Self::List(item) => Self::List(Arc::new(item.as_ref().clone().with_name(name))),
                other => other,
            }
        }
    }

    #[test]
    fn limits_end_in_json_texts() {
        let wide = (0..=MAX_FIELDS).map(|i| format!("\"f{i}\":1")).collect::<Vec<_>>().join(",");
        check(&[&format!("{{{wide}}}"), "{\"a\":1}"], &DataType::Utf8, true);
        let deep = format!("{}1{}", "[".repeat(MAX_DEPTH + 1), "]".repeat(MAX_DEPTH + 1));
        let mut inner = infer(&[&format!("{{\"x\":{deep}}}")]).field(0).clone();
        for _ in 0..MAX_DEPTH {
            let DataType::List(item) = inner.data_type() else { panic!("{inner}") };
            inner = item.as_ref().clone();
        }
        assert!(is_json(&inner), "{inner}");
        let columns = (0..=MAX_COLUMNS).map(|i| format!("\"f{i}\":1")).collect::<Vec<_>>().join(",");
        let error = SchemaInference::default().observe(&format!("{{{columns}}}")).unwrap_err();
        assert!(error.to_string().contains("1000"), "{error}");
    }

    #[test]
    fn columns_come_in_order_of_first_appearance() {
        let schema = infer(&["{\"b\":1,\"a\":1}", "{\"c\":1,\"a\":1}"]);
        let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
        assert_eq!(names, ["b", "a", "c"]);
    }
}
