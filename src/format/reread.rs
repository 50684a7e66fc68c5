//! The records of files that a [`super::Sink`] has written, as they were handed to it. Knows nothing of what they mean.
//! Invariant: written again, with others or without, they make the same values; of a JSONL file, the same bytes.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::parquet::written_schema;
use super::parquet_sink::holds_json;
use super::{Columns, Format, Limits, Source};
use crate::storage::{Location, Storage};

/// Records read at once, and their bytes.
const CHUNK_ROWS: usize = 4096;
const CHUNK_BYTES: usize = 8 << 20;

/// Reads what was written.
#[derive(Debug)]
pub struct Records {
    source: Source,
    /// Of a Parquet file with columns of JSON texts: they were JSON when they were written.
    schema: Option<SchemaRef>,
}

impl Records {
    /// Of a file, or of all parts of one output, in order. `made`: the columns that came from records, if others were taken over
    /// from inputs; those stand in what is read here as JSON tells them, for they will be taken over again.
    pub fn open(storage: &Storage, files: &[Location], made: Option<&[String]>) -> Result<Self> {
        let schema = match files.first() {
            Some(at) if Format::of(at)? == Format::Parquet => Some(written_schema(storage, at)?),
            _ => None,
        };
        let is_made = |field: &Field| made.is_none_or(|made| made.contains(field.name()));
        let schema = schema.map(|schema| {
            let fields = schema.fields().iter().map(|field| if is_made(field) { Arc::clone(field) } else { plain_text(field) });
            Arc::new(Schema::new(fields.collect::<Fields>()))
        });
        let schema = schema.filter(|schema| schema.fields().iter().any(|field| holds_json(field)));
        let columns = Columns { read: None, told: made.map(<[String]>::to_vec) };
        let source = Source::open(storage, files, Limits { max_row_bytes: usize::MAX / 2 })?.with_columns(columns);
        Ok(Self { source, schema })
    }

    /// The next ones, each the text of a JSON object; `None` at the end.
    pub fn next_chunk(&mut self) -> Result<Option<Vec<Bytes>>> {
        let Some(rows) = self.source.next_chunk(CHUNK_ROWS, CHUNK_BYTES)? else { return Ok(None) };
        let records = rows.into_iter().map(|row| {
            let text = row.content.with_context(|| format!("{}, row {}", row.file, row.line))?;
            let Some(schema) = &self.schema else { return Ok(text) };
            let mut decoded = Vec::with_capacity(text.len());
            decode_object(schema.fields(), std::str::from_utf8(&text)?, &mut decoded)?;
            Ok(decoded.into())
        });
        records.collect::<Result<_>>().map(Some)
    }
}

/// The field, as one that holds no JSON texts.
fn plain_text(field: &Field) -> Arc<Field> {
    Arc::new(Field::new(field.name(), DataType::Utf8, true))
}

/// The fields of an object, in order.
struct Ordered<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Ordered<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OfMap;
        impl<'de> Visitor<'de> for OfMap {
            type Value = Ordered<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    fields.push((name.into(), value));
                }
                Ok(Ordered(fields))
            }
        }
        from.deserialize_map(OfMap)
    }
}

/// Writes the object `text`, with what JSON columns hold as strings as the JSON that it is.
fn decode_object(fields: &Fields, text: &str, out: &mut Vec<u8>) -> Result<()> {
    let Ordered(values) = serde_json::from_str(text)?;
    out.push(b'{');
    for (i, (name, value)) in values.iter().enumerate() {
        let Some((_, field)) = fields.find(name) else { bail!("the field {name:?} has no column") };
        if i > 0 {
            out.push(b',');
        }
        serde_json::to_writer(&mut *out, name)?;
        out.push(b':');
        decode_value(field, value.get(), out)?;
    }
    out.push(b'}');
    Ok(())
}

fn decode_value(field: &Field, text: &str, out: &mut Vec<u8>) -> Result<()> {
    if text == "null" || !holds_json(field) {
        out.extend_from_slice(text.as_bytes());
        return Ok(());
    }
    match field.data_type() {
        DataType::Struct(fields) => decode_object(fields, text, out)?,
        DataType::List(item) => {
            out.push(b'[');
            for (i, value) in serde_json::from_str::<Vec<&RawValue>>(text)?.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                decode_value(item, value.get(), out)?;
            }
            out.push(b']');
        }
        _ => out.extend_from_slice(serde_json::from_str::<Cow<'_, str>>(text)?.as_bytes()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;
    use crate::format::{SchemaInference, Sink};

    fn write(storage: &Storage, at: &Location, records: &[String]) {
        let mut inference = SchemaInference::default();
        for record in records {
            inference.observe(record).unwrap();
        }
        let mut sink = Sink::create(storage, at, Some(inference.finish(&[]))).unwrap();
        for record in records {
            sink.write(record).unwrap();
        }
        sink.publish().unwrap();
    }

    #[test]
    fn what_was_written_is_written_again() {
        let storage = Storage::new().unwrap();
        let store = Arc::new(InMemory::new());
        let at = |name: &str| Location::new(store.clone(), name.into(), name);
        let records = [
            r#"{"z":1,"mixed":{"a":[1,"x"]},"deep":{"list":[{"j":1},{"j":"t"},null]},"f":1.5,"t":"a\u0000\n\"é"}"#,
            r#"{"z":null,"mixed":"text","deep":null,"f":2.0,"t":null,"later":[true]}"#,
            r#"{"z":3,"mixed":18446744073709551616,"deep":{"list":[]},"f":null,"t":"","later":null}"#,
            r#"{"z":3,"mixed":null,"deep":{"list":null},"f":1e300,"t":"{}","later":[]}"#,
        ];
        let records = records.map(str::to_owned);
        for ending in ["jsonl", "jsonl.zst", "parquet"] {
            let (first, second) = (at(&format!("first.{ending}")), at(&format!("second.{ending}")));
            write(&storage, &first, &records);
            let mut read = Vec::new();
            let mut source = Records::open(&storage, std::slice::from_ref(&first), None).unwrap();
            while let Some(chunk) = source.next_chunk().unwrap() {
                read.extend(chunk.into_iter().map(|text| String::from_utf8(text.into()).unwrap()));
            }
            if ending == "jsonl" {
                assert_eq!(read, records);
            }
            write(&storage, &second, &read);
            assert!(storage.get(&first).unwrap() == storage.get(&second).unwrap(), "{ending}: {read:?}");
        }
    }
}
