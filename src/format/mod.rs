//! Rows in, records out: files of several formats read as one stream of rows, and one ordered stream of records
//! written to a file. Knows nothing of what rows mean. Invariants: rows are numbered without gaps over all files in
//! the given order, the same at every reading; memory does not grow with the input.

pub mod anthropic;
mod compressed;
mod infer;
mod jsonl;
pub mod openai;
mod parquet;
mod parquet_json;
mod parquet_sink;
mod parts;
pub mod passed;
mod reread;

pub use compressed::{Compression, Packer};
pub use infer::{SchemaInference, json_field};
pub use jsonl::{Line, LineSplitter};
pub use parquet::schema_of;
pub use parquet_sink::check_schema;
pub use parts::{Part, PartList, PartSize, Parts, check_folder, expand_input};
pub use reread::Records;

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::outcome::{ErrorCode, RowError};
use crate::storage::{Location, Storage, Upload, Written};
use compressed::Chunks;
use jsonl::JsonlReader;
use parquet::ParquetReader;
use parquet_sink::{ParquetSink, SinkColumns};
use parts::PartSink;
use passed::Passed;

/// How a file holds its rows; its extension decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON text per line (`.jsonl`, `.ndjson`), perhaps packed (`.jsonl.gz`, `.jsonl.zst`).
    Jsonl(Compression),
    /// Columns (`.parquet`).
    Parquet,
}

impl Format {
    /// The format of the file at `at`; an error that names the known extensions if its name has none of them.
    pub fn of(at: &Location) -> Result<Self> {
        let name = at.path.filename().unwrap_or_default().to_ascii_lowercase();
        let (name, compression) = match name.rsplit_once('.') {
            Some((inner, "gz")) => (inner, Compression::Gzip),
            Some((inner, "zst")) => (inner, Compression::Zstd),
            _ => (&*name, Compression::None),
        };
        match (name.rsplit_once('.').map(|(_, extension)| extension), compression) {
            (Some("jsonl" | "ndjson"), compression) => Ok(Self::Jsonl(compression)),
            (Some("parquet"), Compression::None) => Ok(Self::Parquet),
            (Some("parquet"), _) => {
                bail!("{}: a Parquet file is compressed inside; it can't be read from another archive", at.url)
            }
            (Some("json"), _) => bail!("{}: a .json file may be one array; if it has one row per line, name it .jsonl", at.url),
            _ => bail!("{}: can't tell the format; files end in .jsonl, .ndjson (perhaps with .gz or .zst) or .parquet", at.url),
        }
    }
}

impl Format {
    /// The ending of such files' names, without the dot.
    fn ending(self) -> &'static str {
        match self {
            Self::Jsonl(Compression::None) => "jsonl",
            Self::Jsonl(Compression::Gzip) => "jsonl.gz",
            Self::Jsonl(Compression::Zstd) => "jsonl.zst",
            Self::Parquet => "parquet",
        }
    }
}

/// What a row may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A longer row (as JSON text) is its own error.
    pub max_row_bytes: usize,
}

impl Default for Limits {
    /// 16 MiB a row.
    fn default() -> Self {
        Self { max_row_bytes: 16 << 20 }
    }
}

impl Limits {
    fn too_long(self, n_bytes: u64) -> RowError {
        let message = format!("the row is {n_bytes} bytes long; the limit is {} bytes", self.max_row_bytes);
        RowError::row(ErrorCode::LineTooLong, message)
    }
}

/// A row as it was found, not yet parsed: that is for many threads, reading is for one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawRow {
    /// Index over all files, from 0.
    pub row_idx: u64,
    /// URL of the file.
    pub file: Arc<str>,
    /// Line (JSONL) or row (Parquet) in the file, from 1.
    pub line: u64,
    /// The row's JSON text. A JSONL line may be anything; a Parquet row is an object of its columns (nulls included; NaN
    /// and infinities are null, bytes are hexadecimal, times are RFC 3339, keys of maps are strings).
    pub content: Result<Bytes, RowError>,
}

impl RawRow {
    /// The row's text, which may be anything that is UTF-8.
    ///
    /// # Errors
    /// The row's: it is too long, or no UTF-8.
    pub fn text(&self) -> Result<&str, RowError> {
        let bytes = self.content.as_ref().map_err(RowError::clone)?;
        simdutf8::compat::from_utf8(bytes).map_err(|e| {
            let message = format!("the line is not valid UTF-8 from its byte {} on", e.valid_up_to());
            RowError::row(ErrorCode::InvalidUtf8, message)
        })
    }
}

/// Where a [`Source`] is, between two rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Rows read, of all files.
    pub row_idx: u64,
    /// Files read to their end.
    file: usize,
    /// Lines or rows read of the next one.
    line: u64,
    /// The byte after them, unpacked.
    offset: u64,
}

/// Reads the rows of several files, in order.
#[derive(Debug)]
pub struct Source {
    storage: Storage,
    files: VecDeque<Location>,
    /// Files before those.
    n_begun: usize,
    current: Option<Reader>,
    next_row_idx: u64,
    limits: Limits,
    columns: Columns,
}

/// Which columns of Parquet files are read.
#[derive(Debug, Clone, Default)]
pub struct Columns {
    /// Only these, as far as a file has them; `None` for all.
    pub read: Option<Vec<String>>,
    /// Where a value of these can't be told as JSON (a date beyond all calendars), the row is its own error; `None` for all.
    /// In the others such a value is null.
    pub told: Option<Vec<String>>,
}

impl Source {
    /// Of `files`, in this order. Fails if a name does not tell its format.
    pub fn open(storage: &Storage, files: &[Location], limits: Limits) -> Result<Self> {
        for file in files {
            Format::of(file)?;
        }
        Ok(Self {
            storage: storage.clone(),
            files: files.iter().cloned().collect(),
            n_begun: 0,
            current: None,
            next_row_idx: 0,
            limits,
            columns: Columns::default(),
        })
    }

    /// Reads only these columns of Parquet files. Other files have no columns to leave out: their rows come whole.
    #[must_use]
    pub fn with_columns(self, columns: Columns) -> Self {
        Self { columns, ..self }
    }

    /// The next rows: at most `max_rows`, and no further row once they hold `max_bytes` of text. `None` at the end of
    /// the last file. A fault of a row is in the row; an error is of the job and names file and line.
    pub fn next_chunk(&mut self, max_rows: usize, max_bytes: usize) -> Result<Option<Vec<RawRow>>> {
        let mut rows = Vec::new();
        let mut n_bytes = 0;
        while rows.len() < max_rows.max(1) && (rows.is_empty() || n_bytes < max_bytes) {
            let Some(row) = self.next_row()? else { break };
            n_bytes += row.content.as_ref().map_or(0, Bytes::len);
            rows.push(row);
        }
        Ok(if rows.is_empty() { None } else { Some(rows) })
    }

    /// Where it is.
    pub fn position(&self) -> Position {
        let (line, offset) = match &self.current {
            None => (0, 0),
            Some(Reader::Jsonl(reader)) => reader.place(),
            Some(Reader::Parquet(reader)) => (reader.n_read(), 0),
        };
        Position { row_idx: self.next_row_idx, file: self.n_begun - usize::from(self.current.is_some()), line, offset }
    }

    /// Goes on where a source of the same files was, without reading what is before; packed files are read up to there.
    ///
    /// # Errors
    /// There is no such place.
    pub fn go_to(&mut self, position: Position) -> Result<()> {
        let Position { row_idx, file, line, offset } = position;
        if self.n_begun > file || self.files.len() < file - self.n_begun {
            bail!("there is no file {file} to go on with");
        }
        self.files.drain(..file - self.n_begun);
        (self.n_begun, self.current, self.next_row_idx) = (file, None, row_idx);
        if line > 0 {
            let file = self.files.pop_front().context("a position beyond the last file")?;
            self.n_begun += 1;
            self.current = Some(self.reader(&file, (line, offset))?);
        }
        Ok(())
    }

    /// A reader of a file, after so many lines and bytes.
    fn reader(&self, file: &Location, (line, offset): (u64, u64)) -> Result<Reader> {
        let object = self.storage.open(file)?;
        Ok(match Format::of(file)? {
            Format::Jsonl(Compression::None) if line > 0 => {
                Reader::Jsonl(Box::new(JsonlReader::at(object, self.limits, (line, offset))?))
            }
            Format::Jsonl(compression) => {
                let mut reader = JsonlReader::new(Chunks::new(object, compression)?, self.limits);
                reader.skip_to(line)?;
                Reader::Jsonl(Box::new(reader))
            }
            Format::Parquet => Reader::Parquet(Box::new(ParquetReader::open(&object, self.limits, &self.columns, line)?)),
        })
    }

    fn next_row(&mut self) -> Result<Option<RawRow>> {
        loop {
            if let Some(reader) = &mut self.current {
                if let Some((line, content)) = reader.next_row()? {
                    let row = RawRow { row_idx: self.next_row_idx, file: reader.url().clone(), line, content };
                    self.next_row_idx += 1;
                    return Ok(Some(row));
                }
                self.current = None;
            }
            let Some(file) = self.files.pop_front() else { return Ok(None) };
            self.n_begun += 1;
            self.current = Some(self.reader(&file, (0, 0))?);
        }
    }
}

/// A row's number in its file, from 1, and its content.
type FileRow = (u64, Result<Bytes, RowError>);

#[derive(Debug)]
enum Reader {
    Jsonl(Box<JsonlReader>),
    Parquet(Box<ParquetReader>),
}

impl Reader {
    fn next_row(&mut self) -> Result<Option<FileRow>> {
        match self {
            Self::Jsonl(reader) => reader.next_row(),
            Self::Parquet(reader) => reader.next_row(),
        }
    }

    fn url(&self) -> &Arc<str> {
        match self {
            Self::Jsonl(reader) => reader.url(),
            Self::Parquet(reader) => reader.url(),
        }
    }
}

/// What is known of an input file before its rows are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// Size of the file, bytes.
    pub n_bytes: u64,
    /// Hash of its content, hexadecimal.
    pub blake3: String,
    /// The rows a [`Source`] will find in it.
    pub n_rows: u64,
    /// As [`crate::storage::Object::version`].
    pub version: String,
}

/// Reads a file to know its content's hash and to count its rows; a packed one twice, as it is and unpacked.
///
/// # Errors
/// A file that can't be read to its end: damaged, or cut off.
pub fn inspect(storage: &Storage, at: &Location) -> Result<Inspection> {
    let format = Format::of(at)?;
    let object = storage.open(at)?;
    let mut hasher = blake3::Hasher::new();
    let mut lines = LineCounter::default();
    let mut chunk = object.chunk(0)?;
    let mut offset = chunk.len() as u64;
    while !chunk.is_empty() {
        // A chunk is hashed and its rows are counted while the next one is read.
        let count = || {
            if format == Format::Jsonl(Compression::None) {
                lines.take(chunk.clone());
            }
        };
        let (next, _) = rayon::join(|| object.chunk(offset), || rayon::join(|| hasher.update(&chunk), count));
        chunk = next?;
        offset += chunk.len() as u64;
    }
    let n_rows = match format {
        Format::Jsonl(Compression::None) => lines.finish(),
        Format::Jsonl(compression) => {
            let mut chunks = Chunks::new(object.clone(), compression)?;
            loop {
                let chunk = chunks.next_chunk()?;
                if chunk.is_empty() {
                    break lines.finish();
                }
                lines.take(chunk);
            }
        }
        Format::Parquet => parquet::count_rows(&object)?,
    };
    let (n_bytes, version) = (object.n_bytes(), object.version());
    Ok(Inspection { n_bytes, blake3: hasher.finalize().to_hex().to_string(), n_rows, version })
}

/// Counts rows without keeping any.
struct LineCounter {
    lines: LineSplitter,
    n_rows: u64,
}

impl Default for LineCounter {
    fn default() -> Self {
        Self { lines: LineSplitter::new(0), n_rows: 0 }
    }
}

impl LineCounter {
    fn take(&mut self, mut chunk: Bytes) {
        while self.lines.next_line(&mut chunk).is_some() {
            self.n_rows += 1;
        }
    }

    fn finish(mut self) -> u64 {
        self.n_rows + u64::from(self.lines.last_line().is_some())
    }
}

/// Refuses an output that can't be written: unknown extension, or a directory is in its place.
pub fn check_output(storage: &Storage, at: &Location) -> Result<Format> {
    let format = Format::of(at)?;
    if at.is_web() {
        bail!("{}: http(s):// can only be read; write to a path or to another store", at.url);
    }
    if storage.is_directory(at)? {
        bail!("{} is a directory; the output must be a file, or with --parts a folder of part files", at.url);
    }
    Ok(format)
}

/// Writes records, each the text of one JSON object on one line, in the order given. The file appears, complete, when
/// [`Sink::publish`] returns. The same records make the same bytes.
#[derive(Debug)]
pub enum Sink {
    /// Several files of one of the other kinds.
    Parts(Box<PartSink>),
    /// The texts as they are, a newline after each.
    Jsonl(Box<Packer>),
    /// Columns; see [`SchemaInference`] and [`check_schema`].
    Parquet(Box<ParquetSink>),
}

impl Sink {
    /// To `at`; a Parquet file needs the schema of its records.
    pub fn create(storage: &Storage, at: &Location, schema: Option<SchemaRef>) -> Result<Self> {
        Self::create_passing(storage, at, schema, (None, None))
    }

    /// To a folder at `at`, whose name tells the format of its part files.
    pub fn create_parts(storage: &Storage, at: &Location, schema: Option<SchemaRef>, parts: Parts) -> Result<Self> {
        Self::create_passing(storage, at, schema, (None, Some(parts)))
    }

    /// To a file, or to a folder of parts, of Parquet, that takes over columns of the job's inputs; `schema` is of the others,
    /// which come behind them.
    pub fn create_passing(
        storage: &Storage,
        at: &Location,
        schema: Option<SchemaRef>,
        (passed, parts): (Option<&Passed>, Option<Parts>),
    ) -> Result<Self> {
        let columns = schema.map(|schema| SinkColumns::new(schema, passed));
        match parts {
            Some(parts) => Ok(Self::Parts(Box::new(PartSink::new(storage, at, columns, parts)?))),
            None => Self::of_file(storage.upload(at).hashed(), at, columns),
        }
    }

    fn of_file(upload: Upload, at: &Location, columns: Option<SinkColumns>) -> Result<Self> {
        match (Format::of(at)?, columns) {
            (Format::Jsonl(compression), _) => Ok(Self::Jsonl(Box::new(Packer::new(upload, compression)?))),
            (Format::Parquet, Some(columns)) => Ok(Self::Parquet(Box::new(ParquetSink::new(upload, columns, at.url.clone())?))),
            (Format::Parquet, None) => bail!("{}: a Parquet file needs a schema", at.url),
        }
    }

    /// Writes one record. An error if the file can't be written, or the record does not fit the schema.
    pub fn write(&mut self, record: &str) -> Result<()> {
        self.write_row(0, record)
    }

    /// Writes the record of a row of the inputs, counted from 0; rows ascend. If columns of theirs are taken over, they are not
    /// taken from the record, which may have them or not.
    pub fn write_row(&mut self, row: u64, record: &str) -> Result<()> {
        match self {
            Self::Parts(parts) => parts.write(row, record),
            Self::Jsonl(packer) => {
                packer.write_all(record.as_bytes()).and_then(|()| packer.write_all(b"\n")).context("can't write a record")
            }
            Self::Parquet(sink) => sink.write(row, record),
        }
    }

    /// Makes the file appear under its name; of parts, all of them by their list.
    pub fn publish(self) -> Result<Written> {
        match self {
            Self::Parts(parts) => parts.publish(),
            Self::Jsonl(packer) => packer.publish(),
            Self::Parquet(sink) => sink.publish(),
        }
    }
}
