//! Jobs from Parquet to Parquet: what the program writes holds the columns that it was given, whatever JSON can say of them,
//! in one file or in parts, in shards, after a retry, and after a kill.

use std::collections::HashMap;
use std::fs::{self, File};
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Date32Array, Decimal32Array, DurationSecondArray, FixedSizeListArray, Float64Array, Int32Array,
    Int32Builder, LargeStringArray, ListArray, MapBuilder, RecordBatch, StringArray, StringBuilder, StringViewArray,
    TimestampMicrosecondArray,
};
use arrow::compute::{cast, concat_batches, filter_record_batch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};

use crate::common::Sandbox;

/// Rows `from..` of a table: texts `q`, of which every seventh is empty and can be no prompt, and which differ before their last
/// tokens; and columns of which JSON can't say everything.
fn table(from: i32, n: i32) -> RecordBatch {
    let rows = || from..from + n;
    let texts: Vec<String> = rows().map(|i| if i % 7 == 3 { String::new() } else { format!("{i} is a row") }).collect();
    let floats = rows().map(|i| [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 0.1][i as usize % 5]);
    let times = rows().map(|i| [253_402_300_800_000_000, i64::MIN, 0, i64::MAX, -62_200_000_000_000_000][i as usize % 5]);
    let times = TimestampMicrosecondArray::from_iter_values(times);
    let labels: ArrayRef = Arc::new(StringArray::from_iter_values(rows().map(|i| format!("label {}", i % 3))));
    let mut map = MapBuilder::new(None, Int32Builder::new(), StringBuilder::new());
    for i in rows() {
        map.keys().append_value(i);
        map.values().append_option((i % 2 == 0).then_some("even"));
        map.append(i % 4 > 0).unwrap();
    }
    let item = Arc::new(Field::new("element", DataType::Int32, true));
    let pairs = FixedSizeListArray::new(item, 2, Arc::new(Int32Array::from_iter_values(0..2 * n)), None);
    let ids = ListArray::from_iter_primitive::<Int64Type, _, _>(rows().map(|i| (i % 7 != 3).then(|| vec![Some(i64::from(i))])));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("q", Arc::new(StringArray::from(texts))),
        ("float", Arc::new(Float64Array::from_iter_values(floats))),
        ("berlin", Arc::new(times.clone().with_timezone("Europe/Berlin"))),
        ("offset", Arc::new(times.clone().with_timezone("+05:30"))),
        ("naive", Arc::new(times)),
        ("label", cast(&labels, &DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))).unwrap()),
        ("large", Arc::new(LargeStringArray::from_iter_values(rows().map(|i| format!("{i}"))))),
        ("view", Arc::new(StringViewArray::from_iter_values(rows().map(|i| format!("a long text to be viewed {i}"))))),
        ("pair", Arc::new(pairs)),
        ("took", Arc::new(DurationSecondArray::from_iter_values(rows().map(i64::from)))),
        ("price", Arc::new(Decimal32Array::from_iter_values(rows()).with_precision_and_scale(7, 2).unwrap())),
        ("map", Arc::new(map.finish())),
        ("date", Arc::new(Date32Array::from_iter_values(rows().map(|i| [i32::MAX, i, i32::MIN][i as usize % 3])))),
        ("ids", Arc::new(ids)),
    ];
    let fields = columns.iter().map(|(name, column)| {
        let field = Field::new(*name, column.data_type().clone(), column.null_count() > 0 || ["map", "ids"].contains(name));
        field.with_metadata(HashMap::from([("unit".to_owned(), (*name).to_owned())]))
    });
    let metadata = HashMap::from([("made by".to_owned(), "a test".to_owned())]);
    let schema = Schema::new_with_metadata(fields.collect::<Vec<_>>(), metadata);
    RecordBatch::try_new(Arc::new(schema), columns.into_iter().map(|(_, column)| column).collect()).unwrap()
}

fn write(sandbox: &Sandbox, name: &str, groups: &[RecordBatch]) {
    let mut writer = ArrowWriter::try_new(File::create(sandbox.path(name)).unwrap(), groups[0].schema(), None).unwrap();
    for group in groups {
        writer.write(group).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
}

pub(crate) fn read(sandbox: &Sandbox, name: &str) -> RecordBatch {
    let path = sandbox.path(name);
    let mut files = vec![path.clone()];
    if path.is_dir() {
        files = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).filter(|p| p.extension().is_some()).collect();
        files.sort_unstable();
    }
    let mut schema: Option<SchemaRef> = None;
    let mut batches = Vec::new();
    for file in files {
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(file).unwrap()).unwrap();
        assert!(schema.is_none_or(|schema| schema == *reader.schema()));
        schema = Some(Arc::clone(reader.schema()));
        batches.extend(reader.build().unwrap().map(Result::unwrap));
    }
    concat_batches(&schema.unwrap(), &batches).unwrap()
}

/// The columns of `found` are those of the rows of `wanted` whose text is not empty.
#[track_caller]
pub(crate) fn check(found: &RecordBatch, wanted: &RecordBatch) {
    let is_good = wanted.column(0).as_string::<i32>().iter().map(|text| text.map(|text| !text.is_empty())).collect();
    let wanted = filter_record_batch(wanted, &is_good).unwrap();
    assert_eq!(found.schema().metadata(), wanted.schema().metadata());
    for (i, field) in wanted.schema().fields().iter().enumerate() {
        assert_eq!(found.schema().field(i), &**field);
        assert_eq!(found.column(i), wanted.column(i), "{}", field.name());
    }
    let made: Vec<String> = found.schema().fields()[wanted.num_columns()..].iter().map(|field| field.name().clone()).collect();
    assert_eq!(made, ["completion", "finish_reason", "usage", "error"]);
    assert_eq!(found.column(wanted.num_columns()).null_count(), 0);
}

const JOB: [&str; 7] = ["-q", "--engine=null", "-i", "in.parquet", "-i", "more.parquet", "--set=job.window_rows=16"];

fn job<'a>(command: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [command, &JOB, more].concat()
}

/// Files `in.parquet` and `more.parquet`; their rows.
pub(crate) fn inputs(sandbox: &Sandbox) -> RecordBatch {
    let groups = [table(0, 40), table(40, 3), table(43, 70)];
    write(sandbox, "in.parquet", &groups[..2]);
    write(sandbox, "more.parquet", &groups[2..]);
    let (first, second) = (read(sandbox, "in.parquet"), read(sandbox, "more.parquet"));
    concat_batches(&first.schema(), &[first, second]).unwrap()
}

#[test]
fn untouched_columns_are_what_they_were() {
    let sandbox = Sandbox::new();
    let wanted = inputs(&sandbox);
    let prompt = "--set=prompt.text={{ q }}";
    sandbox.expect(&job(&["run"], &[prompt, "-o", "out.parquet"]), 3);
    check(&read(&sandbox, "out.parquet"), &wanted);
    let errors = sandbox.rows("out.errors.jsonl");
    assert_eq!(errors.len(), 16);
    assert_eq!((&errors[0]["error"]["line"], &errors[0]["date"], &errors[0]["float"]), (&json!(4), &Value::Null, &json!(-0.0)));

    // In parts, which are the same values; in shards, which are the same bytes.
    sandbox.expect(&job(&["run"], &[prompt, "-o", "parts.parquet", "--parts", "30"]), 3);
    check(&read(&sandbox, "parts.parquet"), &wanted);
    for shard in ["0/3", "1/3", "2/3"] {
        sandbox.expect(&job(&["run"], &[prompt, "-o", "shards.parquet", "--shard", shard]), 3);
    }
    sandbox.expect(&job(&["merge"], &[prompt, "-o", "shards.parquet"]), 3);
    let whole = fs::read(sandbox.path("out.parquet")).unwrap();
    assert!(whole == fs::read(sandbox.path("shards.parquet")).unwrap(), "shards wrote other bytes");

    // Errors that are run again fail again, and the rest stays.
    sandbox.expect(&job(&["retry", "--errors"], &[prompt, "-o", "out.parquet"]), 3);
    assert!(whole == fs::read(sandbox.path("out.parquet")).unwrap(), "a retry wrote other bytes");

    // Some of the columns, of some of the rows.
    let some = ["--set=output.columns=[\"date\",\"label\",\"q\"]", "--set=input.limit=100", "-o", "some.parquet", prompt];
    sandbox.expect(&job(&["run"], &some), 3);
    check(
        &read(&sandbox, "some.parquet").project(&[2, 1, 0, 3, 4, 5, 6]).unwrap(),
        &wanted.slice(0, 100).project(&[0, 5, 12]).unwrap(),
    );
}

/// What is said of columns with geometries is said of those that are there.
#[test]
fn geometries_that_are_left_out_are_not_told_of() {
    let sandbox = Sandbox::new();
    let geo = json!({"version": "1.1.0", "primary_column": "view", "columns": {
        "view": {"encoding": "WKB", "covering": {"bbox": {"xmin": ["pair", "xmin"], "xmax": ["pair", "xmax"]}}},
        "large": {"encoding": "WKB", "crs": null, "covering": {"bbox": {"xmin": ["map", "xmin"]}}},
    }});
    let rows = table(0, 10);
    let metadata = HashMap::from([("geo".to_owned(), geo.to_string()), ("made by".to_owned(), "a test".to_owned())]);
    let schema = Arc::new(Schema::new_with_metadata(rows.schema().fields().clone(), metadata));
    write(&sandbox, "in.parquet", &[rows.with_schema(schema).unwrap()]);
    let told = |columns: &str| {
        let kept = format!("--set=output.columns={columns}");
        let args = [
            "run",
            "-q",
            "--engine=null",
            "--restart",
            "-i",
            "in.parquet",
            "-o",
            "out.parquet",
            "--set=prompt.text=x{{ q }}",
            &kept,
        ];
        sandbox.expect(&args, 0);
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(sandbox.path("out.parquet")).unwrap()).unwrap();
        let pairs = reader.metadata().file_metadata().key_value_metadata().unwrap();
        let in_file = pairs.iter().find(|pair| pair.key == "geo").and_then(|pair| pair.value.clone());
        assert_eq!(reader.schema().metadata().get("geo"), in_file.as_ref());
        assert_eq!(reader.schema().metadata()["made by"], "a test");
        in_file.map(|text| serde_json::from_str::<Value>(&text).unwrap())
    };
    assert_eq!(told("[\"view\",\"large\",\"pair\",\"map\"]"), Some(geo.clone()));
    let mut expected = geo.clone();
    expected["columns"].as_object_mut().unwrap().remove("view");
    expected["columns"]["large"].as_object_mut().unwrap().remove("covering");
    expected["primary_column"] = json!("large");
    assert_eq!(told("[\"q\",\"large\"]"), Some(expected));
    assert_eq!(told("[\"q\",\"map\"]"), None);
}

#[test]
fn rows_that_fail_and_then_do_not_have_their_columns() {
    let sandbox = Sandbox::new();
    let wanted = inputs(&sandbox);
    sandbox.expect(&job(&["run"], &["--set=prompt.text={{ q }}", "-o", "out.parquet"]), 3);
    sandbox.expect(&job(&["retry", "--errors"], &["--set=prompt.text=x{{ q }}", "-o", "out.parquet"]), 0);
    let found = read(&sandbox, "out.parquet");
    for (i, field) in wanted.schema().fields().iter().enumerate() {
        assert_eq!((found.schema().field(i), found.column(i)), (&**field, wanted.column(i)), "{}", field.name());
    }
}

/// A value that no text can tell is the error of a row that needs it, before it is computed.
#[test]
fn what_can_not_be_told_fails_rows_that_need_it() {
    let sandbox = Sandbox::new();
    inputs(&sandbox);
    let fails = |more: &[&str], wanted: &dyn Fn(&Value) -> bool| {
        sandbox.expect(&job(&["run", "--restart"], more), 3);
        let errors = sandbox.rows("out.errors.jsonl");
        assert!(!errors.is_empty() && errors.iter().all(|row| wanted(&row["error"])), "{}", errors[0]);
        errors.len()
    };
    let is_date = |error: &Value| {
        let message = error["message"].as_str().unwrap();
        error["param"] == "date" && (message.contains("2147483647") || message.contains("-2147483648"))
    };
    // A template's column.
    assert_eq!(fails(&["--set=prompt.text={{ date }} {{ map }}", "-o", "out.parquet"], &is_date), 75);
    // A column of a JSONL output; the file has no other.
    let kept = "--set=output.columns=[\"q\",\"date\",\"map\"]";
    assert_eq!(fails(&["--set=prompt.text=x{{ q }}", kept, "-o", "out.jsonl"], &is_date), 75);
    assert!(!sandbox.read("out.jsonl").contains("ERROR"));
    let row = &sandbox.rows("out.jsonl")[0];
    assert_eq!((&row["date"], &row["map"]), (&json!("1970-01-02"), &json!({"1": null})));
}

/// However often it is stopped, a job writes the bytes that it would have written.
#[test]
fn a_job_that_was_stopped_writes_the_same_bytes() {
    let sandbox = Sandbox::new();
    inputs(&sandbox);
    let prompt = "--set=prompt.text={{ q }}";
    sandbox.expect(&job(&["run"], &[prompt, "-o", "whole.parquet"]), 3);
    let mut n_runs = 0;
    while sandbox.run(&job(&["run"], &[prompt, "-o", "out.parquet", "--max-tokens", "60"])).status.code() == Some(6) {
        n_runs += 1;
        assert!(n_runs < 200, "it never ends");
    }
    let bytes = |name: &str| fs::read(sandbox.path(name)).unwrap();
    assert!(bytes("out.parquet") == bytes("whole.parquet"), "other bytes");

    // All rows have their outcome; then an input changes, and their columns with it.
    for shard in ["0/2", "1/2"] {
        sandbox.expect(&job(&["run"], &[prompt, "-o", "late.parquet", "--shard", shard]), 3);
    }
    write(&sandbox, "more.parquet", &[table(44, 70)]);
    assert!(sandbox.expect(&job(&["merge"], &[prompt, "-o", "late.parquet"]), 1).contains("more.parquet changed"));
    assert!(!sandbox.path("late.parquet").exists());
}
