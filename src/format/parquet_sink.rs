//! Records to a Parquet file, perhaps beside columns that are taken over from its inputs. Knows nothing of what the columns
//! mean. Invariants: the same records make the same bytes (no clock, no version in the file); at most one row group is in
//! memory; a field without a column is an error, never dropped, but where the row's own columns are taken over.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, bail};
use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef};
use arrow::json::ReaderBuilder;
use arrow::json::reader::Decoder;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::arrow::{ArrowWriter, add_encoded_arrow_schema_to_metadata};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use serde_json::value::RawValue;

use super::infer::is_json;
use super::passed::{Passed, Piece, SharedReader, batch_of};
use crate::storage::{Upload, Written};

/// Rows of a row group, at most.
const GROUP_ROWS: usize = 100_000;

/// Bytes of a row group, about, at most.
const GROUP_BYTES: usize = 64 << 20;

/// Records turned into columns at once, at most.
const BATCH_ROWS: usize = 1024;

/// Text of the records turned into columns at once, bytes, about, at most.
const BATCH_BYTES: usize = 4 << 20;

/// Refuses a schema with a type that records (JSON texts) can't be turned into: before the work, not after it.
pub fn check_schema(schema: &Schema) -> Result<()> {
    ReaderBuilder::new(Arc::new(without_dictionaries(schema)))
        .build_decoder()
        .context("a column of the output can't be written")?;
    Ok(())
}

/// The columns of an output.
#[derive(Debug, Clone)]
pub(super) struct SinkColumns {
    /// Those that records hold.
    schema: SchemaRef,
    /// Those before them, that are taken over from the inputs.
    passed: Option<SharedReader>,
}

impl SinkColumns {
    pub(super) fn new(schema: SchemaRef, passed: Option<&Passed>) -> Self {
        Self { schema, passed: passed.map(|passed| Arc::new(Mutex::new(passed.reader()))) }
    }
}

/// Writes records as rows of the schema's columns.
pub struct ParquetSink {
    url: Arc<str>,
    /// Of the records.
    schema: SchemaRef,
    passed: Option<PassedColumns>,
    has_json: bool,
    has_dictionaries: bool,
    decoder: Decoder,
    n_bytes: usize, // of text in the decoder
    text: Vec<u8>,  // one record, rewritten for the decoder
    writer: ArrowWriter<Upload>,
}

/// The columns that are taken over.
struct PassedColumns {
    reader: SharedReader,
    /// Of all columns, as they are written.
    schema: SchemaRef,
    /// The rows of the records that wait to be written.
    rows: Vec<u64>,
    /// Whether the output may not join two row groups of the inputs.
    is_split: bool,
    /// The row group that the last rows were from.
    group: Option<(usize, usize)>,
}

impl fmt::Debug for ParquetSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParquetSink").field("url", &self.url).field("schema", &self.schema).finish_non_exhaustive()
    }
}

impl ParquetSink {
    pub(super) fn new(upload: Upload, columns: SinkColumns, url: Arc<str>) -> Result<Self> {
        let SinkColumns { schema, passed } = columns;
        let properties = WriterProperties::builder()
            .set_created_by("valar".to_owned())
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_max_row_group_bytes(Some(GROUP_BYTES));
        let plain = Arc::new(without_dictionaries(&schema));
        let has_dictionaries = plain != schema;
        let has_json = schema.fields().iter().any(|field| holds_json(field));
        // Without an embedded Arrow schema: Parquet's own says all there is to say of these types, but of dictionaries and
        // of JSON.
        let is_plain = !has_dictionaries && !has_json;
        let passed = passed.map(|reader| PassedColumns::new(reader, &schema));
        let (written, properties) = match &passed {
            None => (Arc::clone(&schema), properties.build()),
            Some((passed, told)) => {
                // As other writers do: readers look for them in either place.
                let pairs = told.metadata().iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone())).collect();
                let mut properties = properties.set_key_value_metadata(Some(pairs)).build();
                add_encoded_arrow_schema_to_metadata(told, &mut properties);
                (Arc::clone(&passed.schema), properties)
            }
        };
        let skips = is_plain || passed.is_some();
        let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(skips);
        let writer = ArrowWriter::try_new_with_options(upload, written, options);
        let writer = writer.with_context(|| format!("can't write {url} with these columns"))?;
        let decoder = ReaderBuilder::new(plain).with_batch_size(2 * BATCH_ROWS).with_strict_mode(true).build_decoder();
        let decoder = decoder.with_context(|| format!("can't write {url} with these columns"))?;
        let passed = passed.map(|(passed, _)| passed);
        Ok(Self { url, schema, passed, has_json, has_dictionaries, decoder, n_bytes: 0, text: Vec::new(), writer })
    }

    /// `row`: the record's, where columns are taken over.
    pub(super) fn write(&mut self, row: u64, record: &str) -> Result<()> {
        self.text.clear();
        if let Some(passed) = &mut self.passed {
            encode_object(self.schema.fields(), record, true, &mut self.text)?;
            passed.rows.push(row);
        } else if self.has_json {
            encode_object(self.schema.fields(), record, false, &mut self.text)?;
        } else {
            self.text.extend_from_slice(record.as_bytes());
        }
        self.text.push(b'\n');
        let n_taken = self.decoder.decode(&self.text).with_context(|| format!("{}: a record is not JSON", self.url))?;
        assert_eq!(n_taken, self.text.len(), "the decoder holds a whole batch");
        self.n_bytes += n_taken;
        if self.decoder.len() >= BATCH_ROWS || self.n_bytes >= BATCH_BYTES {
            self.write_batch()?;
        }
        Ok(())
    }

    pub(super) fn publish(mut self) -> Result<Written> {
        self.write_batch()?;
        let upload = self.writer.into_inner().with_context(|| format!("can't write {}", self.url))?;
        upload.publish()
    }

    fn write_batch(&mut self) -> Result<()> {
        self.n_bytes = 0;
        let batch = self.decoder.flush().with_context(|| format!("{}: a record does not fit the columns", self.url))?;
        let Some(mut batch) = batch else { return Ok(()) };
        if self.has_dictionaries {
            let columns = batch.columns().iter().zip(self.schema.fields()).map(|(column, field)| cast(column, field.data_type()));
            batch = RecordBatch::try_new(self.schema.clone(), columns.collect::<Result<_, _>>()?)?;
        }
        match &mut self.passed {
            Some(passed) => passed.write(&batch, &mut self.writer),
            None => self.writer.write(&batch).map_err(Into::into),
        }
        .with_context(|| format!("can't write {}", self.url))
    }
}

impl PassedColumns {
    /// With the schema that readers of the output are told.
    fn new(reader: SharedReader, others: &Schema) -> (Self, Schema) {
        let passed = reader.lock().expect("no reader panics").passed.clone();
        let (told, schema) = passed.schemas(others);
        (Self { reader, schema, rows: Vec::new(), is_split: passed.has_short_keys(), group: None }, told)
    }

    /// Writes the waiting rows with what their records hold.
    fn write(&mut self, records: &RecordBatch, writer: &mut ArrowWriter<Upload>) -> Result<()> {
        let rows = std::mem::take(&mut self.rows);
        assert_eq!(rows.len(), records.num_rows(), "each record has its row");
        let mut reader = self.reader.lock().expect("no reader panics");
        let mut n_done = 0;
        while n_done < rows.len() {
            let Piece { mut columns, n_rows, group } = reader.next(&rows[n_done..])?;
            if self.group.replace(group) != Some(group) && self.is_split {
                writer.flush()?;
            }
            columns.extend(records.slice(n_done, n_rows).columns().iter().cloned());
            writer.write(&batch_of(&self.schema, columns, n_rows)?)?;
            n_done += n_rows;
        }
        Ok(())
    }
}

/// The schema with texts in place of dictionaries of texts, which JSON can't be turned into directly.
fn without_dictionaries(schema: &Schema) -> Schema {
    fn plain(field: &FieldRef) -> FieldRef {
        let data_type = match field.data_type() {
            DataType::Dictionary(_, value) => DataType::clone(value),
            DataType::List(item) => DataType::List(plain(item)),
            DataType::Struct(fields) => DataType::Struct(fields.iter().map(plain).collect()),
            other => other.clone(),
        };
        Arc::new(Field::clone(field).with_data_type(data_type))
    }
    Schema::new(schema.fields().iter().map(plain).collect::<Fields>())
}

/// Whether a column, or something inside it, holds JSON texts.
pub(super) fn holds_json(field: &Field) -> bool {
    is_json(field)
        || match field.data_type() {
            DataType::List(item) => holds_json(item),
            DataType::Struct(fields) => fields.iter().any(|field| holds_json(field)),
            _ => false,
        }
}

/// Writes the object `text`, with what belongs to JSON columns as strings that hold the JSON. `may_have_others`: fields
/// without a column are left out; else they are an error.
fn encode_object(fields: &Fields, text: &str, may_have_others: bool, out: &mut Vec<u8>) -> Result<()> {
    let object: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(text)?;
    let mut separator = b'{';
    for (name, value) in &object {
        let field = match fields.find(name) {
            Some((_, field)) => field,
            None if may_have_others => continue,
            None => bail!("no column for the field {name:?}"),
        };
        out.push(separator);
        separator = b',';
        serde_json::to_writer(&mut *out, name)?;
        out.push(b':');
        encode_value(field, value.get(), out)?;
    }
    if separator == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
    Ok(())
}

fn encode_value(field: &Field, text: &str, out: &mut Vec<u8>) -> Result<()> {
    if text == "null" || !holds_json(field) {
        out.extend_from_slice(text.as_bytes());
        return Ok(());
    }
    match field.data_type() {
        DataType::Struct(fields) => encode_object(fields, text, false, out)?,
        DataType::List(item) => {
            out.push(b'[');
            for (i, value) in serde_json::from_str::<Vec<&RawValue>>(text)?.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                encode_value(item, value.get(), out)?;
            }
            out.push(b']');
        }
        _ => serde_json::to_writer(out, text)?,
    }
    Ok(())
}
