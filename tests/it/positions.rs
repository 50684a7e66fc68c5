//! Reading that goes on where it was: from any place between two rows come the rows that would have come.

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use bytes::Bytes;
use object_store::memory::InMemory;
use object_store::path::Path;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use std::io::Write as _;
use std::sync::Arc;
use valar::format::{Limits, Position, RawRow, Source};
use valar::storage::{Location, Storage};

fn parquet(n_rows: i64) -> Vec<u8> {
    let column: ArrayRef = Arc::new(Int64Array::from_iter_values(0..n_rows));
    let batch = RecordBatch::try_from_iter([("n", column)]).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(7)).build();
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    file
}

fn packed(text: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn rows_go_on_from_any_place() {
    let storage = Storage::new().unwrap();
    let store = Arc::new(InMemory::new());
    let lines = "\u{feff}{\"a\":1}\r\n\n \n{\"a\":\"é\"}\nfar too long for the limit of this test, by some bytes\n\n[]\n\nlast"
        .as_bytes();
    let contents = [
        ("a.jsonl", lines.to_vec()),
        ("empty.jsonl", Vec::new()),
        ("b.parquet", parquet(23)),
        ("c.jsonl.gz", packed(lines)),
        ("blank.jsonl", b"\n\n".to_vec()),
        ("d.jsonl", lines.to_vec()),
        ("e.parquet", parquet(7)),
    ];
    let files: Vec<Location> = contents
        .into_iter()
        .map(|(name, content)| {
            let at = Location::new(store.clone(), Path::from(name), name);
            storage.put(&at, Bytes::from(content)).unwrap();
            at
        })
        .collect();
    let open = || Source::open(&storage, &files, Limits { max_row_bytes: 40 }).unwrap();
    for chunk_rows in [1, 2, 5, 100] {
        let mut source = open();
        let (mut rows, mut places): (Vec<RawRow>, Vec<Position>) = (Vec::new(), vec![source.position()]);
        while let Some(chunk) = source.next_chunk(chunk_rows, 1 << 20).unwrap() {
            rows.extend(chunk);
            places.push(source.position());
        }
        assert_eq!(rows.len(), 3 * 5 + 23 + 7);
        for place in places {
            // As a journal keeps it.
            let place: Position = serde_json::from_str(&serde_json::to_string(&place).unwrap()).unwrap();
            let mut source = open();
            source.go_to(place).unwrap();
            assert_eq!(source.position(), place);
            let mut rest = Vec::new();
            while let Some(chunk) = source.next_chunk(3, 1 << 20).unwrap() {
                rest.extend(chunk);
            }
            assert_eq!(rest, rows[place.row_idx as usize..], "{place:?}");
        }
    }
    let mut beyond = Source::open(&storage, &files[..1], Limits::default()).unwrap();
    let mut source = open();
    while source.next_chunk(100, 1 << 20).unwrap().is_some() {}
    assert!(beyond.go_to(source.position()).is_err());
}
