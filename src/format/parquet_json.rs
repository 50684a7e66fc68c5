//! Rows of record batches as JSON objects. Knows the types that Parquet's own schema has; what they mean is not its matter.
//! Invariant: a value that no JSON text can tell is its row's error or null, never some other text and never the file's error.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, FieldRef};
use arrow::error::ArrowError;
use arrow::json::writer::{NullableEncoder, make_encoder};
use arrow::json::{Encoder, EncoderFactory, EncoderOptions};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use bytes::Bytes;

use super::Limits;
use crate::outcome::{ErrorCode, RowError};

/// Makes the JSON text of rows.
#[derive(Debug)]
pub(super) struct RowEncoder {
    limits: Limits,
    /// Columns whose values must be told; `None` for all. What can't be told is null in the others.
    told: Option<Vec<String>>,
    options: EncoderOptions,
    untold: Untold,
}

/// What the encoders have met, since it was taken last, that JSON can't tell.
#[derive(Debug, Clone, Default)]
struct Untold(Arc<Mutex<Option<String>>>);

impl Untold {
    fn note(&self, what: String) {
        self.0.lock().expect("nobody panics while it holds this").get_or_insert(what);
    }

    fn take(&self) -> Option<String> {
        self.0.lock().expect("nobody panics while it holds this").take()
    }
}

impl RowEncoder {
    pub(super) fn new(limits: Limits, told: Option<Vec<String>>) -> Self {
        let untold = Untold::default();
        let factory = Arc::new(Factory { untold: untold.clone() });
        let options = EncoderOptions::default().with_explicit_nulls(true).with_encoder_factory(factory);
        Self { limits, told, options, untold }
    }

    /// The JSON text of each row, or why there is none.
    ///
    /// # Errors
    /// A column of a type that has no JSON.
    pub(super) fn encode(&self, batch: &RecordBatch) -> Result<VecDeque<Result<Bytes, RowError>>, ArrowError> {
        let schema = batch.schema();
        let mut columns = Vec::with_capacity(batch.num_columns());
        for (field, array) in schema.fields().iter().zip(batch.columns()) {
            let mut start = vec![if columns.is_empty() { b'{' } else { b',' }];
            push_text(&mut start, field.name());
            start.push(b':');
            let is_told = self.told.as_ref().is_none_or(|told| told.contains(field.name()));
            columns.push((start, make_encoder(field, array, &self.options)?, is_told.then(|| field.name())));
        }
        let mut text = Vec::new();
        let rows = (0..batch.num_rows()).map(|row| {
            text.clear();
            for (start, encoder, told) in &mut columns {
                text.extend_from_slice(start);
                if encoder.is_null(row) {
                    text.extend_from_slice(b"null");
                    continue;
                }
                encoder.encode(row, &mut text);
                if let (Some(what), Some(name)) = (self.untold.take(), told) {
                    return Err(RowError::field(ErrorCode::InvalidValue, name.as_str(), what));
                }
            }
            text.extend_from_slice(if text.is_empty() { b"{}" } else { b"}" });
            if text.len() <= self.limits.max_row_bytes {
                Ok(Bytes::copy_from_slice(&text))
            } else {
                Err(self.limits.too_long(text.len() as u64))
            }
        });
        Ok(rows.collect())
    }
}

/// Makes the encoders that differ from the library's.
#[derive(Debug)]
struct Factory {
    untold: Untold,
}

impl EncoderFactory for Factory {
    fn make_default_encoder<'a>(
        &self,
        _: &'a FieldRef,
        array: &'a dyn Array,
        options: &'a EncoderOptions,
    ) -> Result<Option<NullableEncoder<'a>>, ArrowError> {
        let encoder: Box<dyn Encoder + 'a> = match array.data_type() {
            DataType::Map(entries, _) => {
                let (map, DataType::Struct(fields)) = (array.as_map(), entries.data_type()) else { return Ok(None) };
                let (keys, values) = (&**map.keys(), &**map.values());
                Box::new(MapEncoder {
                    offsets: map.offsets(),
                    keys: make_encoder(&fields[0], keys, options)?,
                    values: make_encoder(&fields[1], values, options)?,
                    key: Vec::new(),
                })
            }
            data_type if data_type.is_temporal() => Box::new(TimeEncoder {
                array,
                formatter: ArrayFormatter::try_new(array, &FormatOptions::new())?,
                text: String::new(),
                untold: self.untold.clone(),
            }),
            _ => return Ok(None),
        };
        Ok(Some(NullableEncoder::new(encoder, array.nulls().cloned())))
    }
}

/// Dates, times, intervals, as RFC 3339 has them.
struct TimeEncoder<'a> {
    array: &'a dyn Array,
    formatter: ArrayFormatter<'a>,
    text: String,
    untold: Untold,
}

impl Encoder for TimeEncoder<'_> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        self.text.clear();
        if self.formatter.value(row).write(&mut self.text).is_ok() {
            push_text(out, &self.text);
            return;
        }
        out.extend_from_slice(b"null");
        let data_type = self.array.data_type();
        let value = number(self.array, row).map_or_else(String::new, |value| format!(" {value}"));
        self.untold.note(format!("{data_type}{value} is beyond what a date or time can be told for in text"));
    }
}

/// The number that a date or time is kept as.
fn number(array: &dyn Array, row: usize) -> Option<i64> {
    let data = array.to_data();
    match array.data_type().primitive_width()? {
        4 => data.buffer::<i32>(0).get(row).copied().map(i64::from),
        8 => data.buffer::<i64>(0).get(row).copied(),
        _ => None,
    }
}

/// Maps as objects; keys that are no strings by their JSON texts.
struct MapEncoder<'a> {
    offsets: &'a OffsetBuffer<i32>,
    keys: NullableEncoder<'a>,
    values: NullableEncoder<'a>,
    key: Vec<u8>,
}

impl Encoder for MapEncoder<'_> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        let (start, end) = (self.offsets[row] as usize, self.offsets[row + 1] as usize);
        out.push(b'{');
        for i in start..end {
            if i > start {
                out.push(b',');
            }
            self.key.clear();
            push_value(&mut self.keys, i, &mut self.key);
            if self.key.starts_with(b"\"") {
                out.extend_from_slice(&self.key);
            } else {
                push_text(out, &String::from_utf8_lossy(&self.key));
            }
            out.push(b':');
            push_value(&mut self.values, i, out);
        }
        out.push(b'}');
    }
}

fn push_value(encoder: &mut NullableEncoder<'_>, i: usize, out: &mut Vec<u8>) {
    if encoder.is_null(i) {
        out.extend_from_slice(b"null");
    } else {
        encoder.encode(i, out);
    }
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("memory takes text");
}
