//! Rows of a Parquet file, as JSON objects. Knows nothing of what the columns mean. Invariant: memory depends on the
//! size of pages and of single rows, not on how many rows a file or a row group holds.
//!
//! Types come from the Parquet schema alone (no embedded Arrow schema), so that there are few of them. What JSON lacks: NaN
//! and infinities are null, bytes hexadecimal, dates, times, intervals and timestamps texts; keys of maps are strings.
//! Columns that an output takes over unchanged don't come this way: see [`super::passed`].

use std::collections::VecDeque;
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, bail, ensure};
use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};

use super::parquet_json::RowEncoder;
use super::{Columns, FileRow, Limits};
use crate::outcome::RowError;
use crate::storage::{Location, Object, Storage};

/// Rows decoded at once, at most: rows are small then, and columns still decode in bulk.
const MAX_BATCH_ROWS: usize = 1024;

/// What a batch should hold at most, bytes, by the average row of the file.
const BATCH_BYTES: u64 = 8 << 20;

/// What is read of a file at once, bytes.
const BLOCK_BYTES: u64 = 256 << 10;

/// Blocks held of a file, at least. With many columns: two for each, so that no column evicts another's.
const MIN_BLOCKS: usize = 64;

/// Reads the rows of one file.
#[derive(Debug)]
pub(super) struct ParquetReader {
    url: Arc<str>,
    batches: ParquetRecordBatchReader,
    batch_rows: usize,
    rows: VecDeque<Result<Bytes, RowError>>, // of one batch
    next_line: u64,                          // from 1
    group_ends: Vec<u64>,                    // rows up to and with each row group
    encoder: RowEncoder,
}

impl ParquetReader {
    /// Reads the footer; of the rows after the first `skip`, `columns` will be read. Fails if it is damaged or a column has a
    /// type that can't be read.
    pub(super) fn open(object: &Object, limits: Limits, columns: &Columns, skip: u64) -> Result<Self> {
        let builder = open_file(object)?;
        let builder = match &columns.read {
            None => builder,
            Some(columns) => {
                let there = builder.schema().fields().iter().enumerate();
                let wanted: Vec<usize> = there.filter(|(_, f)| columns.contains(f.name())).map(|(i, _)| i).collect();
                let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
                builder.with_projection(mask)
            }
        };
        let url = object.url().clone();
        let schema = builder.schema().clone();
        let encoder = RowEncoder::new(limits, columns.told.clone());
        let encoded = caught(|| Ok(encoder.encode(&RecordBatch::new_empty(schema))?));
        encoded.with_context(|| format!("{url}: a column can't be read"))?;
        let metadata = builder.metadata();
        let group_ends = group_ends(metadata)?;
        let batch_rows = batch_rows(metadata);
        let first_group = group_ends.partition_point(|&end| end <= skip);
        let before = if first_group == 0 { 0 } else { group_ends[first_group - 1] };
        let builder = builder.with_row_groups((first_group..group_ends.len()).collect()).with_offset((skip - before) as usize);
        let batches = caught(|| Ok(builder.with_batch_size(batch_rows).build()?));
        let batches = batches.with_context(|| format!("can't read {url}"))?;
        Ok(Self { url, batches, batch_rows, rows: VecDeque::new(), next_line: skip + 1, group_ends, encoder })
    }

    /// Rows of the file that were read.
    pub(super) fn n_read(&self) -> u64 {
        self.next_line - 1
    }

    pub(super) fn url(&self) -> &Arc<str> {
        &self.url
    }

    pub(super) fn next_row(&mut self) -> Result<Option<FileRow>> {
        while self.rows.is_empty() {
            let next = caught(|| {
                let batch = self.batches.next().transpose()?;
                Ok(batch.map(|batch| self.encoder.encode(&batch)).transpose()?)
            });
            let Some(rows) = next.with_context(|| self.batch_place())? else {
                let (n_rows, n_read) = (self.group_ends.last().copied().unwrap_or(0), self.next_line - 1);
                ensure!(n_read == n_rows, "{}: it holds {n_read} rows, not {n_rows} as its footer says", self.url);
                return Ok(None);
            };
            self.rows = rows;
        }
        let line = self.next_line;
        self.next_line += 1;
        Ok(self.rows.pop_front().map(|row| (line, row)))
    }

    /// Where the batch that begins at the next row lies.
    fn batch_place(&self) -> String {
        let n_rows = self.group_ends.last().copied().unwrap_or(0);
        let last = (self.next_line + self.batch_rows as u64 - 1).min(n_rows);
        let group = |row: u64| self.group_ends.partition_point(|&end| end < row);
        let (first_group, last_group) = (group(self.next_line), group(last));
        format!("can't read {}, rows {} to {last}, in row groups {first_group} to {last_group}", self.url, self.next_line)
    }
}

/// The columns of a Parquet file, in the types of its own schema: as its rows are read.
pub fn schema_of(storage: &Storage, at: &Location) -> Result<SchemaRef> {
    Ok(open_file(&storage.open(at)?)?.schema().clone())
}

/// The columns of a Parquet file that a [`super::Sink`] has written, as it was told them.
pub(super) fn written_schema(storage: &Storage, at: &Location) -> Result<SchemaRef> {
    let object = storage.open(at)?;
    let found = ArrowReaderMetadata::load(&BlockFile::new(object), ArrowReaderOptions::new());
    Ok(found.with_context(|| format!("{} is not a readable Parquet file", at.url))?.schema().clone())
}

/// Rows of a file, by its footer.
pub(super) fn count_rows(object: &Object) -> Result<u64> {
    Ok(open_file(object)?.metadata().file_metadata().num_rows() as u64)
}

fn open_file(object: &Object) -> Result<ParquetRecordBatchReaderBuilder<BlockFile>> {
    let file = BlockFile::new(object.clone());
    let metadata = caught(|| {
        let metadata = load_metadata(&file)?;
        let n_rows = metadata.metadata().file_metadata().num_rows();
        ensure!(metadata.parquet_schema().num_columns() > 0 || n_rows == 0, "it has no columns");
        group_ends(metadata.metadata())?;
        Ok(metadata)
    });
    let metadata = metadata.with_context(|| format!("{} is not a readable Parquet file", object.url()))?;
    file.expect_columns(metadata.parquet_schema().num_columns());
    Ok(ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata))
}

/// Rows up to and with each row group.
pub(super) fn group_ends(metadata: &ParquetMetaData) -> Result<Vec<u64>> {
    let mut n_rows = 0i64;
    let mut ends = Vec::with_capacity(metadata.num_row_groups());
    for (i, group) in metadata.row_groups().iter().enumerate() {
        let sum = n_rows.checked_add(group.num_rows()).filter(|&sum| sum >= n_rows);
        n_rows = sum.with_context(|| format!("row group {i} says that it has {} rows", group.num_rows()))?;
        ends.push(n_rows as u64);
    }
    let n_file = metadata.file_metadata().num_rows();
    ensure!(n_rows == n_file, "its footer counts {n_file} rows, its row groups {n_rows}");
    Ok(ends)
}

/// What work gives; where the library panics, which it does on some damaged files, an error.
pub(super) fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let Ok(result) = catch_unwind(AssertUnwindSafe(work)) else { bail!("it is damaged: the Parquet library failed") };
    result
}

fn load_metadata(file: &BlockFile) -> Result<ArrowReaderMetadata, ParquetError> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let found = ArrowReaderMetadata::load(file, options.clone())?;
    let fields: Fields = found.schema().fields().iter().map(|field| with_types(field, &offset_zone)).collect();
    let schema = Schema::new_with_metadata(fields, found.schema().metadata().clone());
    ArrowReaderMetadata::try_new(found.metadata().clone(), options.with_schema(Arc::new(schema)))
}

/// The zone of Parquet's timestamps by its offset: Arrow knows the name only with a time zone database.
fn offset_zone(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Timestamp(unit, Some(_)) => DataType::Timestamp(*unit, Some("+00:00".into())),
        other => other.clone(),
    }
}

/// As many rows as hold [`BATCH_BYTES`] on average in the row group of the biggest rows.
pub(super) fn batch_rows(metadata: &ParquetMetaData) -> usize {
    let row_bytes = |group: &parquet::file::metadata::RowGroupMetaData| {
        (group.total_byte_size().max(0) as u64) / (group.num_rows().max(1) as u64)
    };
    let most = metadata.row_groups().iter().map(row_bytes).max().unwrap_or(0);
    ((BATCH_BYTES / most.max(1)) as usize).clamp(1, MAX_BATCH_ROWS)
}

/// The field with `of` applied to its type, or to those inside it.
fn with_types(field: &Field, of: &dyn Fn(&DataType) -> DataType) -> FieldRef {
    let data_type = match field.data_type() {
        DataType::List(item) => DataType::List(with_types(item, of)),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(|field| with_types(field, of)).collect()),
        DataType::Map(entries, is_sorted) => DataType::Map(with_types(entries, of), *is_sorted),
        other => of(other),
    };
    Arc::new(field.clone().with_data_type(data_type))
}

/// A file that is read in blocks, the last used ones kept: page headers are parsed byte by byte, pages are small, and
/// columns take turns.
#[derive(Debug, Clone)]
pub(super) struct BlockFile {
    object: Arc<Object>,
    blocks: Arc<Mutex<Blocks>>,
}

#[derive(Debug)]
struct Blocks {
    recent: VecDeque<(u64, Bytes)>, // (block index, content), last used last
    n_max: usize,
}

impl BlockFile {
    pub(super) fn new(object: Object) -> Self {
        let blocks = Blocks { recent: VecDeque::new(), n_max: MIN_BLOCKS };
        Self { object: Arc::new(object), blocks: Arc::new(Mutex::new(blocks)) }
    }

    /// So many columns will be read side by side.
    pub(super) fn expect_columns(&self, n_columns: usize) {
        self.blocks().n_max = MIN_BLOCKS.max(2 * n_columns);
    }

    fn blocks(&self) -> std::sync::MutexGuard<'_, Blocks> {
        self.blocks.lock().expect("no reader panics while it holds the blocks")
    }

    /// What the block that holds byte `at` has from there on; empty at the end of the file.
    fn from(&self, at: u64) -> io::Result<Bytes> {
        let block_idx = at / BLOCK_BYTES;
        let mut blocks = self.blocks();
        let known = blocks.recent.iter().position(|(idx, _)| *idx == block_idx);
        let block = if let Some(block) = known.and_then(|i| blocks.recent.remove(i)) {
            block
        } else {
            let start = block_idx * BLOCK_BYTES;
            let end = (start + BLOCK_BYTES).min(self.object.n_bytes());
            if start >= end {
                return Ok(Bytes::new());
            }
            (block_idx, self.object.range(start..end).map_err(io::Error::other)?)
        };
        let content = block.1.clone();
        blocks.recent.push_back(block);
        while blocks.recent.len() > blocks.n_max {
            blocks.recent.pop_front();
        }
        Ok(content.slice(((at % BLOCK_BYTES) as usize).min(content.len())..))
    }
}

impl Length for BlockFile {
    fn len(&self) -> u64 {
        self.object.n_bytes()
    }
}

impl ChunkReader for BlockFile {
    type T = BlockRead;

    fn get_read(&self, start: u64) -> Result<BlockRead, ParquetError> {
        Ok(BlockRead { file: self.clone(), at: start, rest: Bytes::new() })
    }

    fn get_bytes(&self, start: u64, n_bytes: usize) -> Result<Bytes, ParquetError> {
        if start.checked_add(n_bytes as u64).is_none_or(|end| end > self.object.n_bytes()) {
            return Err(ParquetError::EOF(format!("{n_bytes} bytes at {start} are past the end")));
        }
        let first = self.from(start)?;
        if first.len() >= n_bytes {
            return Ok(first.slice(..n_bytes));
        }
        let mut bytes = Vec::with_capacity(n_bytes);
        self.get_read(start)?.take(n_bytes as u64).read_to_end(&mut bytes)?;
        Ok(bytes.into())
    }
}

/// Reads on from one place in a [`BlockFile`].
#[derive(Debug)]
pub(super) struct BlockRead {
    file: BlockFile,
    at: u64,
    rest: Bytes,
}

impl Read for BlockRead {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            self.rest = self.file.from(self.at)?;
        }
        let n = into.len().min(self.rest.len());
        into[..n].copy_from_slice(&self.rest[..n]);
        self.rest = self.rest.slice(n..);
        self.at += n as u64;
        Ok(n)
    }
}
