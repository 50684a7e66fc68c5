//! Which columns of a dataset are read and which are written.

use crate::common::Sandbox;
use arrow::array::{ArrayRef, Int64Array, ListArray, RecordBatch, StringArray, StructArray};
use arrow::datatypes::{Int64Type, Schema};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use std::sync::Arc;

/// Rows with columns `q` (text), `ids` (token ids), `nested` (a struct of lists) and `big` (text that nobody needs).
fn table() -> Vec<u8> {
    let list = |values: [i64; 3]| {
        Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(values.map(|v| Some(vec![Some(v), Some(v + 1)])))) as ArrayRef
    };
    let nested = StructArray::try_from(vec![("deep", list([1, 2, 3]))]).unwrap();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("q", Arc::new(StringArray::from(vec!["one", "two", "three"]))),
        ("ids", list([10, 20, 30])),
        ("nested", Arc::new(nested)),
        ("big", Arc::new(StringArray::from(vec!["x".repeat(1000), "y".repeat(1000), "z".repeat(1000)]))),
        ("n", Arc::new(Int64Array::from(vec![7, 8, 9]))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    file
}

/// The file with the pages of `big` overwritten.
fn damaged() -> Vec<u8> {
    let mut file = table();
    let metadata = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(file.clone())).unwrap().metadata().clone();
    let columns = metadata.row_group(0).columns().iter();
    let chunk = columns.into_iter().find(|column| column.column_path().string() == "big").unwrap();
    let (start, n_bytes) = chunk.byte_range();
    file[start as usize..(start + n_bytes) as usize].fill(0xff);
    file
}

const ARGS: [&str; 5] = ["run", "--engine", "null", "-q", "--restart"];

#[test]
fn only_needed_columns_are_read_and_only_kept_ones_written() {
    let sandbox = Sandbox::new();
    sandbox.write("in.parquet", damaged());
    let job = ["-i", "in.parquet", "--set", "prompt.text={{ q }} {{ n }}", "--set", "output.columns=[\"nested\",\"q\"]"];
    sandbox.expect(&[&ARGS[..], &job, &["-o", "out.jsonl"]].concat(), 0);
    let rows = sandbox.rows("out.jsonl");
    let names = |row: &Value| row.as_object().unwrap().keys().map(String::clone).collect::<Vec<_>>().join(" ");
    assert_eq!(names(&rows[0]), "nested q completion finish_reason usage error", "in the order asked for; n was only read");
    assert_eq!((&rows[2]["nested"], &rows[2]["q"]), (&json!({"deep": [3, 4]}), &json!("three")));
    // As columns, nested ones with their types.
    sandbox.expect(&[&ARGS[..], &job, &["-o", "out.parquet"]].concat(), 0);
    let file = std::fs::File::open(sandbox.path("out.parquet")).unwrap();
    let schema: Arc<Schema> = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().schema().clone();
    assert_eq!(schema.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>()[..2], ["nested", "q"]);
    assert!(schema.field(0).data_type().is_nested(), "{schema}");
    // A plan reads what the prompts need.
    let plan = ["plan", "--json", "--engine", "null", "-o", "x.jsonl", "-i", "in.parquet", "--set", "prompt.text={{ q }}"];
    sandbox.expect(&plan, 0);
    // Without the list every column is read, and the damage is found.
    let said = sandbox.expect(&[&ARGS[..], &job[..4], &["-o", "all.jsonl"]].concat(), 1);
    assert!(said.contains("in.parquet"), "{said}");
}

#[test]
fn lists_of_columns_are_checked_before_any_work() {
    let sandbox = Sandbox::new();
    sandbox.write("in.parquet", table());
    sandbox.write("in.jsonl", "{\"q\":\"one\",\"wide\":18446744073709551616}\n{\"q\":\"two\"}\n");
    let refused = |input: &str, sets: &[&str], code: i32, word: &str| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
        let said = sandbox.expect(&[&ARGS[..], &["-i", input, "-o", "out.jsonl"], &sets].concat(), code);
        assert!(said.contains(word), "{said}");
    };
    let prompt = "prompt.text={{ q }}";
    refused("in.parquet", &[prompt, "output.columns=[\"q\",\"nope\"]"], 1, "no column \"nope\"");
    refused("in.jsonl", &["output.columns=[\"q\"]"], 2, "output.columns");
    refused("in.jsonl", &[prompt, "output.columns=[\"q\",\"q\"]"], 2, "twice");
    refused("in.jsonl", &[prompt, "prompt.tokens=ids"], 2, "give one of");
    // Lines have what they have; a value stays as it was written.
    let sets = ["--set", prompt, "--set", "output.columns=[\"wide\"]"];
    sandbox.expect(&[&ARGS[..], &["-i", "in.jsonl", "-o", "out.jsonl"], &sets].concat(), 0);
    let text = sandbox.read("out.jsonl");
    assert!(text.starts_with("{\"wide\":18446744073709551616,\"completion\"") && text.contains("\n{\"completion\""), "{text}");
}

#[test]
fn a_column_of_token_ids_is_a_prompt() {
    let sandbox = Sandbox::new();
    sandbox.write("in.parquet", table());
    let sets = ["--set", "prompt.tokens=ids", "--set", "output.columns=[]"];
    sandbox.expect(&[&ARGS[..], &["-i", "in.parquet", "-o", "out.jsonl"], &sets].concat(), 0);
    let rows = sandbox.rows("out.jsonl");
    assert_eq!(rows.iter().map(|row| row["usage"]["prompt_tokens"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 2, 2]);
    sandbox.write("bad.jsonl", "{\"ids\":[1,2]}\n{\"ids\":[1,-2]}\n{\"ids\":\"x\"}\n{}\n{\"ids\":[]}\n{\"ids\":[49152]}\n");
    sandbox.expect(&[&ARGS[..], &["-i", "bad.jsonl", "-o", "bad_out.jsonl"], &sets].concat(), 3);
    let errors: Vec<_> =
        sandbox.rows("bad_out.errors.jsonl").iter().map(|row| row["error"]["code"].as_str().unwrap().to_owned()).collect();
    assert_eq!(errors, ["invalid_type", "invalid_type", "missing_required_parameter", "invalid_value", "invalid_value"]);
}
