//! Records in a folder of part files instead of one file: `part-00000-TAG.parquet` and so on, and their list, `_SUCCESS`,
//! which is put last. Knows nothing of jobs. Invariants: whoever reads by the list finds the old state or the whole new one;
//! parts of two states never have the same name, for their tags differ; a part is whole as soon as it has its name.
//!
//! Names are those of Spark, whose readers, like those of Ray, Arrow and `DuckDB`, pass over files that begin with `_`; what
//! waits for `_SUCCESS` waits for the right thing.

use std::collections::HashSet;
use std::fmt;
use std::io::Write as _;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::parquet_sink::SinkColumns;
use super::{Format, Inspection, Sink};
use crate::storage::{Location, Storage, Written};

/// The list's name in the folder.
const LIST: &str = "_SUCCESS";

/// The form of lists that this program reads and writes.
const FORMAT_VERSION: u32 = 1;

/// Hexadecimal digits of a tag.
const TAG_DIGITS: usize = 12;

/// What fits into one part; the last one may be smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartSize {
    /// So many rows.
    Rows(u64),
    /// So many bytes of rows as JSON text, before any compression; a longer row is a part of its own.
    Bytes(u64),
}

impl fmt::Display for PartSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rows(n) => write!(f, "{n} rows"),
            Self::Bytes(n) => write!(f, "{n} bytes"),
        }
    }
}

/// How records are cut into parts.
#[derive(Debug, Clone)]
pub struct Parts {
    /// Where one ends.
    pub size: PartSize,
    /// The job whose they are.
    job_fingerprint: String,
    /// Stands in their names.
    tag: String,
}

impl Parts {
    /// The parts of a job. `state` is whatever else tells them from those of another run, also of the same job.
    pub fn new(size: PartSize, job_fingerprint: &str, state: &str) -> Self {
        let hash = blake3::hash(format!("{job_fingerprint}\n{size}\n{state}").as_bytes());
        Self { size, job_fingerprint: job_fingerprint.to_owned(), tag: hash.to_hex()[..TAG_DIGITS].to_owned() }
    }
}

/// One file of the folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// In the folder.
    pub name: String,
    /// Rows in it.
    pub rows: u64,
    /// Its size.
    pub bytes: u64,
    /// Hash of its content, hexadecimal.
    pub blake3: String,
}

impl Part {
    /// Refuses another file than the one that the list means.
    pub fn check(&self, at: &Location, found: &Inspection) -> Result<()> {
        let is_same = found.n_bytes == self.bytes && found.n_rows == self.rows && found.blake3 == self.blake3;
        ensure!(is_same, "{} is not the file that {LIST} beside it lists: it was changed", at.url);
        Ok(())
    }
}

/// What a folder of parts holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartList {
    format_version: u32,
    /// The job that wrote it.
    pub job_fingerprint: String,
    /// Rows of all parts.
    pub rows: u64,
    /// In order.
    pub parts: Vec<Part>,
}

impl PartList {
    /// Where the list of a folder is: it is there if the parts are.
    pub fn place(folder: &Location) -> Result<Location> {
        folder.child(LIST)
    }

    /// The list of a folder; `None` if there is none, or it is some other program's.
    ///
    /// # Errors
    /// One of a form that this program does not know.
    pub fn read(storage: &Storage, folder: &Location) -> Result<Option<Self>> {
        let at = Self::place(folder)?;
        let list = storage.get(&at)?.and_then(|text| serde_json::from_slice::<Self>(&text).ok());
        if let Some(Self { format_version, .. }) = list
            && format_version != FORMAT_VERSION
        {
            bail!("{} has form {format_version}; this program knows form {FORMAT_VERSION}", at.url);
        }
        Ok(list)
    }

    fn there(storage: &Storage, folder: &Location) -> Result<Self> {
        Self::read(storage, folder)?.with_context(|| format!("{}: no parts are published here", folder.url))
    }

    /// Reads all files of a folder and compares them with the list.
    ///
    /// # Errors
    /// One that is not what was written.
    pub fn check(storage: &Storage, folder: &Location) -> Result<()> {
        let list = Self::there(storage, folder)?;
        list.parts.iter().try_for_each(|part| {
            let at = folder.child(&part.name)?;
            part.check(&at, &super::inspect(storage, &at)?)
        })
    }

    /// The files of a folder, in order.
    ///
    /// # Errors
    /// If there is no list, or a file is not there as it was written.
    pub fn files(storage: &Storage, folder: &Location) -> Result<Vec<Location>> {
        let list = Self::there(storage, folder)?;
        let files = list.parts.iter().map(|part| {
            let at = folder.child(&part.name)?;
            ensure!(storage.open(&at)?.n_bytes() == part.bytes, "{} has not the size that {LIST} says", at.url);
            Ok(at)
        });
        files.collect()
    }
}

/// The files that an input means; of a folder of parts exactly those in its list, each with what it must be.
///
/// # Errors
/// As [`Storage::expand`]; or parts that nobody has published yet.
pub fn expand_input(storage: &Storage, pattern: &str) -> Result<Vec<(Location, Option<Part>)>> {
    if !pattern.contains(['*', '?']) && !Location::is_web_url(pattern) {
        let at = Location::parse(pattern.trim_end_matches('/'))?;
        let is_folder = match &at.local {
            Some(path) => path.is_dir(),
            None => pattern.ends_with('/') || !storage.exists(&at)?,
        };
        if is_folder {
            if let Some(list) = PartList::read(storage, &at)? {
                return list.parts.into_iter().map(|part| Ok((at.child(&part.name)?, Some(part)))).collect();
            }
            if storage.list(&at)?.iter().any(|name| is_part_name(name)) {
                bail!("{} holds parts of a job that has not published them yet: there is no {LIST}", at.url);
            }
        }
    }
    Ok(storage.expand(pattern)?.into_iter().map(|at| (at, None)).collect())
}

/// Refuses a place where a folder of parts can't be: unknown extension, a file, or somebody else's files.
pub fn check_folder(storage: &Storage, at: &Location) -> Result<()> {
    Format::of(at)?;
    if at.is_web() {
        bail!("{}: http(s):// can only be read; write to a path or to another store", at.url);
    }
    if storage.exists(at)? {
        bail!("{} is one file; with --parts the output is a folder: choose another name, or leave out --parts", at.url);
    }
    if storage.is_directory(at)? {
        let names = storage.list(at)?.into_iter().chain(storage.list_folders(at)?);
        // Readers pass over the others.
        let foreign = names.filter(|name| !name.starts_with(['_', '.'])).find(|name| !is_part_name(name));
        if let Some(name) = foreign {
            bail!("{} holds {name}, which is no part of a job: readers would mix them; choose another folder", at.url);
        }
    }
    Ok(())
}

/// Whether some [`PartSink`] gives this name.
fn is_part_name(name: &str) -> bool {
    let parts = || {
        let (number, rest) = name.strip_prefix("part-")?.split_once('-')?;
        let (tag, ending) = rest.split_once('.')?;
        let is_number = number.len() >= 5 && number.bytes().all(|b| b.is_ascii_digit());
        let is_tag = tag.len() == TAG_DIGITS && tag.bytes().all(|b| b.is_ascii_hexdigit());
        Some(is_number && is_tag && ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"].contains(&ending))
    };
    parts().unwrap_or(false)
}

/// Writes records to one part after the other.
#[derive(Debug)]
pub struct PartSink {
    storage: Storage,
    folder: Location,
    format: Format,
    columns: Option<SinkColumns>,
    parts: Parts,
    /// The part that is being written; of its rows, their number and the bytes of their text.
    current: Option<(Sink, u64, u64)>,
    done: Vec<Part>,
}

impl PartSink {
    pub(super) fn new(storage: &Storage, folder: &Location, columns: Option<SinkColumns>, parts: Parts) -> Result<Self> {
        let format = Format::of(folder)?;
        let (storage, folder) = (storage.clone(), folder.clone());
        Ok(Self { storage, folder, format, columns, parts, current: None, done: Vec::new() })
    }

    pub(super) fn write(&mut self, row: u64, record: &str) -> Result<()> {
        let n_bytes = record.len() as u64 + 1;
        let is_full = self.current.as_ref().is_some_and(|(_, rows, bytes)| match self.parts.size {
            PartSize::Rows(max) => *rows >= max,
            PartSize::Bytes(max) => bytes + n_bytes > max,
        });
        if is_full {
            self.end_part()?;
        }
        let part = match self.current.take() {
            Some(part) => part,
            None => (self.begin_part()?, 0, 0),
        };
        let (sink, rows, bytes) = self.current.insert(part);
        sink.write_row(row, record)?;
        (*rows, *bytes) = (*rows + 1, *bytes + n_bytes);
        Ok(())
    }

    /// Puts the list, then removes parts that were there before and are not in it.
    pub(super) fn publish(mut self) -> Result<Written> {
        // No rows are one part, too: of Parquet files, readers want to know the columns.
        if self.done.is_empty() && self.current.is_none() {
            self.current = Some((self.begin_part()?, 0, 0));
        }
        self.end_part()?;
        // Before the list is there: whoever comes after may write other parts.
        let names = self.storage.list(&self.folder)?;
        let list = PartList {
            format_version: FORMAT_VERSION,
            job_fingerprint: self.parts.job_fingerprint,
            rows: self.done.iter().map(|part| part.rows).sum(),
            parts: self.done,
        };
        let mut text = serde_json::to_vec_pretty(&list).context("cannot write down the parts")?;
        text.push(b'\n');
        let mut upload = self.storage.upload(&PartList::place(&self.folder)?).hashed();
        upload.write_all(&text)?;
        let written = upload.publish()?;
        let listed: HashSet<&str> = list.parts.iter().map(|part| &*part.name).collect();
        for name in names.iter().filter(|name| is_part_name(name) && !listed.contains(name.as_str())) {
            self.storage.delete(&self.folder.child(name)?)?;
        }
        Ok(written)
    }

    fn name(&self) -> String {
        format!("part-{:05}-{}.{}", self.done.len(), self.parts.tag, self.format.ending())
    }

    fn begin_part(&self) -> Result<Sink> {
        let at = self.folder.child(&self.name())?;
        Sink::of_file(self.storage.upload(&at).hashed(), &at, self.columns.clone())
    }

    fn end_part(&mut self) -> Result<()> {
        let Some((sink, rows, _)) = self.current.take() else { return Ok(()) };
        let Written { n_bytes: bytes, blake3 } = sink.publish()?;
        let blake3 = blake3.expect("parts are hashed as they are written");
        self.done.push(Part { name: self.name(), rows, bytes, blake3 });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;
    use proptest::prelude::*;

    use super::*;
    use crate::format::{Limits, Source, inspect};

    fn folder(name: &str) -> Location {
        Location::new(Arc::new(InMemory::new()), name.into(), name)
    }

    fn write(storage: &Storage, at: &Location, records: &[String], (size, state): (PartSize, &str)) {
        let mut sink = Sink::create_parts(storage, at, None, Parts::new(size, "job", state)).unwrap();
        for record in records {
            sink.write(record).unwrap();
        }
        sink.publish().unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn parts_are_the_records_cut_where_they_are_full(
            lengths in prop::collection::vec(0..60usize, 0..40),
            rows in 1..9u64,
            bytes in prop::option::of(1..150u64),
            ending in prop::sample::select(vec!["jsonl", "jsonl.gz", "jsonl.zst"]),
        ) {
            let storage = Storage::new().unwrap();
            let at = folder(&format!("out.{ending}"));
            let size = bytes.map_or(PartSize::Rows(rows), PartSize::Bytes);
            let records: Vec<String> = lengths.iter().map(|&n| format!("{{\"x\":\"{}\"}}", "y".repeat(n))).collect();
            write(&storage, &at, &records, (size, ""));
            let list = PartList::read(&storage, &at).unwrap().unwrap();
            prop_assert_eq!(list.rows, records.len() as u64);
            let mut rest = &records[..];
            for part in &list.parts {
                let at = at.child(&part.name).unwrap();
                part.check(&at, &inspect(&storage, &at).unwrap()).unwrap();
                let (own, after) = rest.split_at(part.rows as usize);
                let read = Source::open(&storage, &[at], Limits::default()).unwrap().next_chunk(1000, 1 << 20).unwrap();
                let read: Vec<String> = read.iter().flatten().map(|row| row.text().unwrap().to_owned()).collect();
                prop_assert_eq!(read, own);
                let text = |records: &[String]| records.iter().map(|record| record.len() as u64 + 1).sum::<u64>();
                let (fits, is_full) = match size {
                    PartSize::Rows(max) => (part.rows <= max, part.rows == max),
                    PartSize::Bytes(max) => (
                        text(own) <= max || own.len() == 1,
                        after.first().is_some_and(|next| text(own) + text(std::slice::from_ref(next)) > max),
                    ),
                };
                prop_assert!(fits && (is_full || after.is_empty()), "{:?} before {} records", part, after.len());
                rest = after;
            }
            prop_assert!(rest.is_empty() && !list.parts.is_empty());
        }
    }

    #[test]
    fn a_new_state_takes_the_place_of_the_old_one_at_once() {
        let (storage, at) = (Storage::new().unwrap(), folder("out.jsonl"));
        let records = |n: usize| (0..n).map(|i| format!("{{\"i\":{i}}}")).collect::<Vec<_>>();
        write(&storage, &at, &records(9), (PartSize::Rows(2), "first"));
        let first = PartList::read(&storage, &at).unwrap().unwrap();
        assert_eq!((first.parts.len(), first.parts[4].rows), (5, 1));

        // As far as a killed run comes: nothing has changed for whoever reads by the list.
        let mut killed = Sink::create_parts(&storage, &at, None, Parts::new(PartSize::Rows(2), "job", "second")).unwrap();
        for record in records(5) {
            killed.write(&record).unwrap();
        }
        drop(killed);
        assert_eq!(storage.list(&at).unwrap().len(), 1 + 5 + 2);
        assert_eq!(PartList::read(&storage, &at).unwrap().unwrap(), first);
        for part in &first.parts {
            let at = at.child(&part.name).unwrap();
            part.check(&at, &inspect(&storage, &at).unwrap()).unwrap();
        }

        write(&storage, &at, &records(3), (PartSize::Rows(2), "third"));
        let third = PartList::read(&storage, &at).unwrap().unwrap();
        let mut names: Vec<String> = third.parts.iter().map(|part| part.name.clone()).collect();
        names.insert(0, LIST.to_owned());
        assert_eq!(storage.list(&at).unwrap(), names, "parts of earlier states are left");
        assert!(third.parts.iter().all(|part| first.parts.iter().all(|other| other.name != part.name)));
    }

    #[test]
    fn only_folders_of_parts_are_written_and_read() {
        let (storage, at) = (Storage::new().unwrap(), folder("out.jsonl"));
        let put = |name: &str, text: &'static str| storage.put(&at.child(name).unwrap(), text.into()).unwrap();
        check_folder(&storage, &at).unwrap();
        // What Spark leaves says nothing of parts.
        put(LIST, "");
        assert_eq!(PartList::read(&storage, &at).unwrap(), None);
        check_folder(&storage, &at).unwrap();
        put("part-00000-0123456789ab.jsonl", "{}\n");
        check_folder(&storage, &at).unwrap();
        put("part-00000-ab46-c000.snappy.parquet", "");
        let error = check_folder(&storage, &at).unwrap_err().to_string();
        assert!(error.contains("part-00000-ab46-c000.snappy.parquet"), "{error}");
        put(LIST, "{\"format_version\":7,\"job_fingerprint\":\"j\",\"rows\":0,\"parts\":[]}");
        assert!(PartList::read(&storage, &at).unwrap_err().to_string().contains("form 7"));
        storage.put(&at, "{}\n".into()).unwrap();
        assert!(check_folder(&storage, &at).unwrap_err().to_string().contains("is one file"));
        assert!(check_folder(&storage, &folder("out")).unwrap_err().to_string().contains("can't tell the format"));
    }
}
