//! Columns of Parquet inputs that an output takes over as they are: Arrow arrays, read a second time when the output is
//! written, never JSON. Knows nothing of what else the output has. Invariants: what is told of a column's type to whoever
//! reads the output is what the inputs say; memory depends on pages and rows, not on row groups or files; an input that is
//! not what it was is an error.
//!
//! Values are read and written in the types of Parquet's own schema, in which rows were read already, so that nothing can
//! fail now that did not fail then. What only an embedded Arrow schema says (zones, dictionaries, large and view variants,
//! lists of one length, durations, metadata) is embedded again.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, bail, ensure};
use arrow::array::{Array as _, ArrayRef, RecordBatch, RecordBatchOptions, UInt64Array};
use arrow::compute::{cast, take_record_batch};
use arrow::datatypes::{DataType, Field, FieldRef, Fields, IntervalUnit, Metadata, Schema, SchemaRef, TimeUnit};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::arrow::{ARROW_SCHEMA_META_KEY, ArrowWriter, ProjectionMask, parquet_to_arrow_schema};
use serde_json::Value;

use super::inspect;
use super::parquet::{BlockFile, batch_rows, caught, group_ends};
use crate::storage::{Location, Object, Storage};

/// An input, and what it was when the job was described.
#[derive(Debug, Clone)]
pub struct KnownFile {
    /// Where it is.
    pub at: Location,
    /// As [`Object::version`].
    pub version: String,
    /// Hash of its content, hexadecimal.
    pub blake3: String,
    /// Its rows.
    pub n_rows: u64,
}

impl KnownFile {
    /// Opens it.
    ///
    /// # Errors
    /// It is not there, or not what it was.
    pub fn open(&self, storage: &Storage) -> Result<Object> {
        let object = storage.open(&self.at)?;
        // Touched, copied over, or served by a node that names versions in its own way: what counts is what it holds.
        if object.version() != self.version && inspect(storage, &self.at)?.blake3 != self.blake3 {
            bail!("input {} changed since this run began: run it again", self.at.url);
        }
        Ok(object)
    }
}

/// Which columns an output takes over, and from where.
#[derive(Debug, Clone)]
pub struct Passed {
    storage: Storage,
    files: Arc<[KnownFile]>,
    columns: Vec<Column>,
    /// Of the Arrow schemas, as far as they agree.
    metadata: Metadata,
}

/// A column.
#[derive(Debug, Clone, PartialEq)]
struct Column {
    /// As the output's Arrow schema says it.
    told: FieldRef,
    /// As values are read and written.
    held: FieldRef,
}

/// The columns of one file.
struct FileColumns {
    columns: Vec<Column>,
    metadata: Metadata,
}

impl Passed {
    /// The columns that all files have, or of these `kept`, in that order.
    ///
    /// # Errors
    /// Files whose columns are not alike, or that have none of a kept name.
    pub fn of(storage: &Storage, files: Vec<KnownFile>, kept: Option<&[String]>) -> Result<Self> {
        let mut found: Option<(FileColumns, &KnownFile)> = None;
        for file in &files {
            let of_file = columns_of(&BlockFile::new(storage.open(&file.at)?));
            let of_file = of_file.with_context(|| format!("{} is not a readable Parquet file", file.at.url))?;
            let of_file = of_file.kept(kept).with_context(|| format!("output.columns: {}", file.at.url))?;
            match &mut found {
                None => found = Some((of_file, file)),
                Some((all, first)) => all.join(of_file).with_context(|| {
                    format!("{} and {} have different columns; a Parquet output needs them alike", first.at.url, file.at.url)
                })?,
            }
        }
        let (found, _) = found.context("no file to take columns from")?;
        let FileColumns { columns, mut metadata } = found;
        let twice =
            columns.iter().enumerate().find(|(i, c)| columns[..*i].iter().any(|other| other.told.name() == c.told.name()));
        if let Some((_, column)) = twice {
            bail!("{} has two columns {:?}", files[0].at.url, column.told.name());
        }
        if let Some(text) = metadata.remove(GEO) {
            let geo = geo_of(&text, |name| columns.iter().any(|column| column.told.name() == name));
            metadata.extend(geo.map(|geo| (GEO.to_owned(), geo)));
        }
        Ok(Self { storage: storage.clone(), files: files.into(), columns, metadata })
    }

    /// The columns' names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.told.name().as_str())
    }

    /// The schema of an output that has `others` behind these, as its readers are told it, and as it is written.
    pub(super) fn schemas(&self, others: &Schema) -> (Schema, SchemaRef) {
        let with_others = |own: &dyn Fn(&Column) -> FieldRef| -> Fields {
            self.columns.iter().map(own).chain(others.fields().iter().cloned()).collect()
        };
        let told = with_others(&|column| Arc::clone(&column.told));
        let held = with_others(&|column| Arc::clone(&column.held));
        (Schema::new_with_metadata(told, self.metadata.clone()), Arc::new(Schema::new(held)))
    }

    /// Refuses columns that can't be written: before the work, not after it.
    pub fn check(&self) -> Result<()> {
        let (_, held) = self.schemas(&Schema::empty());
        caught(|| Ok(ArrowWriter::try_new(Vec::new(), held, None).map(drop)?)).context("a column of the output can't be written")
    }

    /// Whether keys of some dictionary are so short that those of two row groups of the input may not fit into one.
    pub(super) fn has_short_keys(&self) -> bool {
        self.columns.iter().any(|column| short_keys(column.told.data_type()))
    }

    pub(super) fn reader(&self) -> PassedReader {
        PassedReader { passed: self.clone(), open: None }
    }
}

impl FileColumns {
    fn kept(self, kept: Option<&[String]>) -> Result<Self> {
        let Some(kept) = kept else { return Ok(self) };
        let of_name = |name: &String| {
            let column = self.columns.iter().find(|column| column.told.name() == name);
            column.cloned().with_context(|| format!("it has no column {name:?}"))
        };
        Ok(Self { columns: kept.iter().map(of_name).collect::<Result<_>>()?, metadata: self.metadata })
    }

    /// Widens the columns so that another file's fit.
    fn join(&mut self, other: Self) -> Result<()> {
        ensure!(self.columns.len() == other.columns.len(), "{} and {}", self.columns.len(), other.columns.len());
        for (own, other) in self.columns.iter_mut().zip(other.columns) {
            own.join(&other)?;
        }
        self.metadata.retain(|key, value| other.metadata.get(key) == Some(&*value));
        Ok(())
    }
}

impl Column {
    fn join(&mut self, other: &Self) -> Result<()> {
        if self == other {
            return Ok(());
        }
        let both = |own: &FieldRef, other: &FieldRef, data_type: DataType| {
            let mut metadata = own.metadata().clone();
            metadata.retain(|key, value| other.metadata().get(key) == Some(&*value));
            let is_nullable = own.is_nullable() || other.is_nullable();
            Arc::new(Field::new(own.name(), data_type, is_nullable).with_metadata(metadata))
        };
        let (mut told, mut held) = (self.told.data_type().clone(), self.held.data_type().clone());
        if self.told.data_type() != other.told.data_type() || held != *other.held.data_type() {
            held = relaxed(&held);
            told = held.clone();
        }
        let is_alike =
            self.told.name() == other.told.name() && (held == *other.held.data_type() || held == relaxed(other.held.data_type()));
        ensure!(is_alike, "{} is not {}", self.told, other.told);
        *self = Self { told: both(&self.told, &other.told, told), held: both(&self.held, &other.held, held) };
        Ok(())
    }
}

/// The columns of a file; the types that its Arrow schema tells, if it has one that can be read, else those of Parquet's.
fn columns_of(file: &BlockFile) -> Result<FileColumns> {
    caught(|| {
        let plain = ArrowReaderMetadata::load(file, ArrowReaderOptions::new().with_skip_arrow_metadata(true))?;
        let footer = plain.metadata().file_metadata();
        let pairs = footer.key_value_metadata();
        let has_arrow = pairs.is_some_and(|pairs| pairs.iter().any(|pair| pair.key == ARROW_SCHEMA_META_KEY));
        let told = if has_arrow { parquet_to_arrow_schema(footer.schema_descr(), pairs).ok() } else { None };
        let fields = plain.schema().fields();
        let Some(told) = told.filter(|told| told.fields().len() == fields.len()) else {
            let columns = fields.iter().map(|field| Column { told: Arc::clone(field), held: Arc::clone(field) });
            return Ok(FileColumns { columns: columns.collect(), metadata: Metadata::new() });
        };
        let columns = fields.iter().zip(told.fields()).map(|(plain, told)| {
            let held = Field::clone(plain).with_data_type(held(plain.data_type(), told.data_type()));
            Column { told: Arc::clone(told), held: Arc::new(held) }
        });
        Ok(FileColumns { columns: columns.collect(), metadata: told.metadata().clone() })
    })
}

/// Where `GeoParquet` says what the columns with geometries are, as JSON.
const GEO: &str = "geo";

/// What it says, of columns that are there alone; `None` if nothing is left, or it can't be read.
fn geo_of(text: &str, is_there: impl Fn(&str) -> bool) -> Option<String> {
    let mut geo: Value = serde_json::from_str(text).ok()?;
    let columns = geo.get_mut("columns")?.as_object_mut()?;
    if columns.keys().all(|name| is_there(name)) && columns.values().all(|column| column.get("covering").is_none()) {
        return Some(text.to_owned());
    }
    columns.retain(|name, _| is_there(name));
    for column in columns.values_mut().filter_map(Value::as_object_mut) {
        // Bounds of each row, in a column of their own: {"bbox": {"xmin": ["column", "field"], ...}}.
        let covers = |paths: &Value| {
            let mut paths = paths.as_object().into_iter().flatten();
            paths.all(|(_, path)| path[0].as_str().is_some_and(&is_there))
        };
        if column.get("covering").and_then(Value::as_object).is_some_and(|covering| !covering.values().all(covers)) {
            column.remove("covering");
        }
    }
    let first = columns.keys().next()?.clone();
    if !geo["primary_column"].as_str().is_some_and(&is_there) {
        geo["primary_column"] = first.into();
    }
    Some(geo.to_string())
}

/// The type to read and write values in: that of Parquet's schema, but where it would lose some of them.
fn held(plain: &DataType, told: &DataType) -> DataType {
    let inside = |plain: &FieldRef, told: &FieldRef| {
        Arc::new(Field::clone(plain).with_data_type(held(plain.data_type(), told.data_type())))
    };
    match (plain, told) {
        (DataType::Interval(_), DataType::Interval(unit)) if *unit != IntervalUnit::MonthDayNano => told.clone(),
        // Of 96 bits, which reach further than nanoseconds of 64.
        (DataType::Timestamp(TimeUnit::Nanosecond, None), DataType::Timestamp(unit, _)) if *unit != TimeUnit::Nanosecond => {
            told.clone()
        }
        (
            DataType::List(plain),
            DataType::List(told)
            | DataType::LargeList(told)
            | DataType::FixedSizeList(told, _)
            | DataType::ListView(told)
            | DataType::LargeListView(told),
        ) => DataType::List(inside(plain, told)),
        (DataType::Map(plain, is_sorted), DataType::Map(told, _)) => DataType::Map(inside(plain, told), *is_sorted),
        (DataType::Struct(plain), DataType::Struct(told)) if plain.len() == told.len() => {
            DataType::Struct(plain.iter().zip(told).map(|(plain, told)| inside(plain, told)).collect())
        }
        _ => plain.clone(),
    }
}

/// The type with nulls allowed wherever they can be, and without what else files may differ in.
fn relaxed(data_type: &DataType) -> DataType {
    let field = |field: &Field, name: &str, is_nullable| Arc::new(Field::new(name, relaxed(field.data_type()), is_nullable));
    match data_type {
        DataType::List(item) => DataType::List(field(item, "element", true)),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(|inner| field(inner, inner.name(), true)).collect()),
        DataType::Map(entries, is_sorted) => match entries.data_type() {
            DataType::Struct(pair) if pair.len() == 2 => {
                let pair = DataType::Struct(vec![field(&pair[0], "key", false), field(&pair[1], "value", true)].into());
                DataType::Map(Arc::new(Field::new("key_value", pair, false)), *is_sorted)
            }
            _ => data_type.clone(),
        },
        other => other.clone(),
    }
}

fn short_keys(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(key, _) => key.primitive_width().is_some_and(|n_bytes| n_bytes < 4),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::FixedSizeList(item, _)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::Map(item, _) => short_keys(item.data_type()),
        DataType::Struct(fields) => fields.iter().any(|field| short_keys(field.data_type())),
        _ => false,
    }
}

/// A reader that the parts of an output share.
pub(super) type SharedReader = Arc<Mutex<PassedReader>>;

/// Reads the columns of given rows, in order, a row group at a time.
#[derive(Debug)]
pub(super) struct PassedReader {
    pub(super) passed: Passed,
    open: Option<OpenFile>,
}

/// Columns of some rows.
pub(super) struct Piece {
    pub(super) columns: Vec<ArrayRef>,
    pub(super) n_rows: usize,
    /// The row group that they are from: number of the file, and in it.
    pub(super) group: (usize, usize),
}

/// A file that is being read.
#[derive(Debug)]
struct OpenFile {
    number: usize,
    /// Rows, of all files.
    rows: Range<u64>,
    file: BlockFile,
    metadata: ArrowReaderMetadata,
    mask: ProjectionMask,
    /// Rows of the file up to and with each row group.
    group_ends: Vec<u64>,
    /// The row group that is being read, and what is left of it.
    group: Option<(usize, ParquetRecordBatchReader)>,
    /// The rows read last, and their number among those of the file.
    batch: Option<(Range<u64>, RecordBatch)>,
}

impl PassedReader {
    /// The columns of the first of `rows`, as many as lie close together. They ascend, over all files and calls.
    pub(super) fn next(&mut self, rows: &[u64]) -> Result<Piece> {
        let first = *rows.first().context("no rows to read")?;
        if self.passed.columns.is_empty() {
            return Ok(Piece { columns: Vec::new(), n_rows: rows.len(), group: (0, 0) });
        }
        if !self.open.as_ref().is_some_and(|open| open.rows.contains(&first)) {
            self.open = Some(self.passed.open(first)?);
        }
        let Some(open) = &mut self.open else { bail!("row {first} is in no file") };
        open.read_to(first - open.rows.start).with_context(|| {
            format!("can't read {} again, row {}", self.passed.files[open.number].at.url, first - open.rows.start + 1)
        })?;
        let (Some((range, batch)), Some((group, _))) = (&open.batch, &open.group) else { bail!("row {first} was not read") };
        let (start, end) = (open.rows.start + range.start, open.rows.start + range.end);
        let n_rows = rows.partition_point(|&row| row < end);
        let last = rows[n_rows - 1];
        let batch = if (last - first) as usize == n_rows - 1 {
            batch.slice((first - start) as usize, n_rows)
        } else {
            take_record_batch(batch, &rows[..n_rows].iter().map(|row| row - start).collect::<UInt64Array>())?
        };
        let columns = self.passed.columns.iter().map(|Column { held, .. }| {
            let column = batch.column_by_name(held.name()).with_context(|| format!("no column {:?}", held.name()))?;
            // The same values with other names and nulls allowed, where files differ.
            Ok(if column.data_type() == held.data_type() { Arc::clone(column) } else { cast(column, held.data_type())? })
        });
        Ok(Piece { columns: columns.collect::<Result<_>>()?, n_rows, group: (open.number, *group) })
    }
}

impl Passed {
    /// The file of a row.
    fn open(&self, row: u64) -> Result<OpenFile> {
        let mut start = 0;
        let ends = self.files.iter().map(|file| {
            start += file.n_rows;
            start
        });
        let ends: Vec<u64> = ends.collect();
        let number = ends.partition_point(|&end| end <= row);
        let known = self.files.get(number).with_context(|| format!("row {row} is in no file"))?;
        let file = BlockFile::new(known.open(&self.storage)?);
        let open = caught(|| {
            let FileColumns { columns, .. } = columns_of(&file)?;
            let held = Schema::new(columns.iter().map(|column| Arc::clone(&column.held)).collect::<Fields>());
            let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
            let plain = ArrowReaderMetadata::load(&file, options.clone())?;
            let held = held.with_metadata(plain.schema().metadata().clone());
            let metadata = ArrowReaderMetadata::try_new(Arc::clone(plain.metadata()), options.with_schema(Arc::new(held)))?;
            let wanted = columns.iter().enumerate().filter(|(_, column)| self.names().any(|name| name == column.held.name()));
            let mask = ProjectionMask::roots(metadata.parquet_schema(), wanted.map(|(i, _)| i));
            let group_ends = group_ends(metadata.metadata())?;
            ensure!(group_ends.last().copied().unwrap_or(0) == known.n_rows, "it has not {} rows", known.n_rows);
            file.expect_columns(metadata.parquet_schema().num_columns());
            let rows = ends[number] - known.n_rows..ends[number];
            Ok(OpenFile { number, rows, file: file.clone(), metadata, mask, group_ends, group: None, batch: None })
        });
        open.with_context(|| format!("can't read {} again", known.at.url))
    }
}

impl OpenFile {
    /// Reads until the last batch has a row of the file, counted from 0.
    fn read_to(&mut self, row: u64) -> Result<()> {
        let number = self.group_ends.partition_point(|&end| end <= row);
        let group_start = if number == 0 { 0 } else { self.group_ends[number - 1] };
        if self.group.as_ref().is_none_or(|(group, _)| *group != number) {
            let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(self.file.clone(), self.metadata.clone())
                .with_projection(self.mask.clone())
                .with_row_groups(vec![number])
                .with_offset((row - group_start) as usize)
                .with_batch_size(batch_rows(self.metadata.metadata()));
            self.group = Some((number, caught(|| Ok(builder.build()?))?));
            self.batch = Some((row..row, RecordBatch::new_empty(Arc::new(Schema::empty()))));
        }
        let (Some((_, batches)), Some((range, batch))) = (&mut self.group, &mut self.batch) else {
            bail!("no row group is open")
        };
        while range.end <= row {
            let next =
                caught(|| Ok(batches.next().transpose()?))?.context("the row group has fewer rows than its footer says")?;
            *range = range.end..range.end + next.num_rows() as u64;
            *batch = next;
        }
        Ok(())
    }
}

/// Columns side by side as a batch, which may have none.
pub(super) fn batch_of(schema: &SchemaRef, columns: Vec<ArrayRef>, n_rows: usize) -> Result<RecordBatch> {
    let options = RecordBatchOptions::new().with_row_count(Some(n_rows));
    Ok(RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)?)
}
