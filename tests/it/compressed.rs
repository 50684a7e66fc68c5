//! Packed JSONL: what is in a packed file is what is in the plain one; what is cut off or damaged is an error that names
//! the file.

use crate::common::Sandbox;
use bytes::Bytes;
use flate2::write::GzEncoder;
use object_store::memory::InMemory;
use object_store::path::Path;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use valar::format::{Limits, RawRow, Sink, Source, inspect};
use valar::storage::{Location, Storage};

struct Files(Storage, Arc<InMemory>);

impl Files {
    fn new() -> Self {
        Self(Storage::new().unwrap(), Arc::new(InMemory::new()))
    }

    fn put(&self, name: &str, content: Vec<u8>) -> Location {
        let at = Location::new(self.1.clone(), Path::from(name), name);
        self.0.put(&at, Bytes::from(content)).unwrap();
        at
    }

    fn rows(&self, at: &Location) -> anyhow::Result<Vec<RawRow>> {
        let mut source = Source::open(&self.0, std::slice::from_ref(at), Limits { max_row_bytes: 1000 })?;
        let mut rows = Vec::new();
        while let Some(chunk) = source.next_chunk(7, 1 << 20)? {
            rows.extend(chunk);
        }
        Ok(rows)
    }
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zstd_of(content: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// Long enough for several chunks, with blank lines, a line over the limit and no last line feed.
fn text() -> Vec<u8> {
    let mut text = String::from("\u{feff}");
    for i in 0..60_000_u64 {
        let noise = blake3::hash(&i.to_le_bytes()).to_hex();
        write!(text, "{{\"i\":{i},\"noise\":\"{noise}\"}}\r\n").unwrap();
        if i.is_multiple_of(1000) {
            text.push_str(" \n");
        }
    }
    text.push_str(&"x".repeat(3_000_000));
    text.push_str("\n{\"last\":true}");
    text.into_bytes()
}

#[test]
fn packed_rows_are_the_plain_rows() {
    let (files, text) = (Files::new(), text());
    let plain = files.put("x.jsonl", text.clone());
    let wanted = files.rows(&plain).unwrap();
    let n_rows = inspect(&files.0, &plain).unwrap().n_rows;
    assert_eq!((wanted.len() as u64, n_rows), (60_002, 60_002));
    // Cut anywhere: members and frames need not end with lines.
    let (head, tail) = text.split_at(1_234_567);
    for (name, packed) in [
        ("one.jsonl.gz", gzip(&text)),
        ("two.jsonl.gz", [gzip(head), gzip(b""), gzip(tail)].concat()),
        ("one.ndjson.zst", zstd_of(&text)),
        ("two.JSONL.ZST", [zstd_of(head), zstd_of(b""), zstd_of(tail)].concat()),
    ] {
        let at = files.put(name, packed.clone());
        let rows = files.rows(&at).unwrap();
        let content = |rows: &[RawRow]| rows.iter().map(|r| (r.row_idx, r.line, r.content.clone())).collect::<Vec<_>>();
        assert!(content(&rows) == content(&wanted), "{name}");
        let found = inspect(&files.0, &at).unwrap();
        assert_eq!((found.n_rows, found.n_bytes), (60_002, packed.len() as u64), "{name}");
        assert_eq!(found.blake3, blake3::hash(&packed).to_hex().as_str(), "{name}");
    }
}

#[test]
fn damage_is_an_error_that_names_the_file() {
    let (files, text) = (Files::new(), text());
    for (name, packed) in [("bad.jsonl.gz", gzip(&text)), ("bad.jsonl.zst", zstd_of(&text))] {
        let mut flipped = packed.clone();
        flipped[packed.len() / 2] ^= 0x10;
        let mut trailing = packed.clone();
        trailing.extend_from_slice(b"not packed at all, but long enough for a header");
        let cases = [
            ("half", packed[..packed.len() / 2].to_vec(), "is cut off"),
            ("without its end", packed[..packed.len() - 2].to_vec(), "is cut off"),
            ("a flipped bit", flipped, ""),
            ("text behind it", trailing, ""),
            ("no archive", b"{\"i\":1}\n{\"i\":2}\n".to_vec(), ""),
        ];
        for (case, content, word) in cases {
            let at = files.put(name, content);
            for error in [files.rows(&at).map(|_| ()).expect_err(case), inspect(&files.0, &at).map(|_| ()).expect_err(case)] {
                let error = format!("{error:#}");
                assert!(error.contains(name) && error.contains(word), "{name}, {case}: {error}");
                assert!(!error.contains('\n'), "{error}");
            }
        }
    }
}

#[test]
fn names_say_how_a_file_is_packed() {
    let files = Files::new();
    for (name, word) in [
        ("x.parquet.gz", "compressed inside"),
        ("x.json.gz", "name it .jsonl"),
        ("x.gz", "can't tell"),
        ("x.csv.zst", "can't tell"),
    ] {
        let error = files.rows(&files.put(name, vec![])).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(word), "{error}");
    }
}

#[test]
fn packed_outputs_are_the_same_bytes_every_time() {
    let files = Files::new();
    for name in ["out.jsonl.gz", "out.jsonl.zst"] {
        let write = || {
            let at = Location::new(files.1.clone(), Path::from(name), name);
            let mut sink = Sink::create(&files.0, &at, None).unwrap();
            for i in 0..1000 {
                sink.write(&format!("{{\"i\":{i}}}")).unwrap();
            }
            sink.publish().unwrap();
            (files.0.get(&at).unwrap().unwrap(), files.rows(&at).unwrap())
        };
        let (bytes, rows) = write();
        assert_eq!(rows.len(), 1000);
        assert_eq!(rows[999].text(), Ok("{\"i\":999}"));
        assert_eq!(write().0, bytes, "{name}");
        assert!(bytes.len() < 6000, "{name} is {} bytes", bytes.len());
    }
}

/// A whole job over packed files, and what it leaves beside its output.
#[test]
fn a_job_reads_and_writes_packed_files() {
    let sandbox = Sandbox::new();
    let rows = |range: std::ops::Range<u32>| range.map(|i| format!("{{\"q\":\"row {i}\"}}\n")).collect::<Vec<_>>().concat();
    sandbox.write("a.jsonl.gz", gzip(rows(0..3).as_bytes()));
    sandbox.write("b.jsonl.zst", zstd_of(rows(3..5).as_bytes()));
    let args = ["run", "-i", "a.jsonl.gz", "-i", "b.jsonl.zst", "--engine", "null", "--set", "prompt.text={{q}}", "-q", "-o"];
    sandbox.expect(&[&args[..], &["out.jsonl.zst"]].concat(), 0);
    sandbox.expect(&[&args[..], &["plain.jsonl"]].concat(), 0);
    let out = zstd::decode_all(&std::fs::read(sandbox.path("out.jsonl.zst")).unwrap()[..]).unwrap();
    assert_eq!(String::from_utf8(out).unwrap(), sandbox.read("plain.jsonl"));
    assert_eq!(sandbox.rows("plain.jsonl").len(), 5);
    assert!(sandbox.path("out.report.json").exists() && sandbox.path("out.errors.jsonl").exists());
    sandbox.write("cut.jsonl.gz", &gzip(rows(0..3).as_bytes())[..20]);
    let said = sandbox.expect(&["run", "-i", "cut.jsonl.gz", "-o", "x.jsonl"], 1);
    assert!(said.contains("cut.jsonl.gz is cut off") && !sandbox.path("x.job").exists(), "{said}");
}
