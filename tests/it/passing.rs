//! Columns of Parquet inputs that a Parquet output takes over: arrays, types and metadata stay what they were.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayData, ArrayRef, BinaryArray, BooleanArray, FixedSizeListArray, GenericListArray, MapArray, NullArray,
    OffsetSizeTrait, RecordBatch, StringArray, StructArray, make_array,
};
use arrow::buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, IntervalUnit, Schema, SchemaRef, TimeUnit};
use bytes::Bytes;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use object_store::path::Path;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;
use proptest::prelude::*;
use serde_json::json;
use valar::format::passed::{KnownFile, Passed};
use valar::format::{PartList, PartSize, Parts, Sink, inspect};
use valar::storage::{Location, Storage};

use crate::common::splitmix64;

/// Numbers that follow from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        (splitmix64(&mut self.0) % n as u64) as usize
    }

    /// Extremes, small numbers, any.
    fn number(&mut self) -> i128 {
        let any = i128::from(splitmix64(&mut self.0)) << 64 | i128::from(splitmix64(&mut self.0));
        [0, 1, -1, i128::MAX, i128::MIN, i128::from(i32::MAX), i128::from(i64::MIN), any, any >> 70, any >> 100][self.below(10)]
    }

    fn nulls(&mut self, is_nullable: bool, n: usize) -> Option<NullBuffer> {
        is_nullable.then(|| (0..n).map(|_| self.below(4) > 0).collect())
    }

    fn lengths(&mut self, n: usize) -> Vec<usize> {
        (0..n).map(|_| self.below(4)).collect()
    }
}

fn field(name: &str, data_type: DataType, is_nullable: bool) -> Field {
    Field::new(name, data_type, is_nullable)
}

fn item(data_type: DataType, is_nullable: bool) -> FieldRef {
    Arc::new(field("element", data_type, is_nullable))
}

fn dictionary(key: DataType, value: DataType) -> DataType {
    DataType::Dictionary(Box::new(key), Box::new(value))
}

fn map(key: DataType, value: DataType) -> DataType {
    let pair = Fields::from(vec![field("keys", key, false), field("values", value, true)]);
    DataType::Map(Arc::new(field("entries", DataType::Struct(pair), false)), false)
}

/// Every kind of type that a file may hold.
fn types() -> Vec<DataType> {
    use DataType as T;
    let zone = |zone: &str| Some(zone.into());
    let pair = || vec![field("a", T::LargeUtf8, true), field("b", dictionary(T::Int16, T::Utf8), false)];
    vec![
        T::Null,
        T::Boolean,
        T::Int8,
        T::UInt16,
        T::UInt32,
        T::Int64,
        T::UInt64,
        T::Float16,
        T::Float32,
        T::Float64,
        T::Date32,
        T::Date64,
        T::Time32(TimeUnit::Second),
        T::Time32(TimeUnit::Millisecond),
        T::Time64(TimeUnit::Nanosecond),
        T::Timestamp(TimeUnit::Second, None),
        T::Timestamp(TimeUnit::Second, zone("Asia/Tokyo")),
        T::Timestamp(TimeUnit::Millisecond, zone("+05:30")),
        T::Timestamp(TimeUnit::Microsecond, zone("Europe/Berlin")),
        T::Timestamp(TimeUnit::Nanosecond, zone("UTC")),
        T::Timestamp(TimeUnit::Nanosecond, None),
        T::Duration(TimeUnit::Second),
        T::Duration(TimeUnit::Nanosecond),
        T::Interval(IntervalUnit::YearMonth),
        T::Interval(IntervalUnit::DayTime),
        T::Decimal32(7, 2),
        T::Decimal64(15, 0),
        T::Decimal128(38, 10),
        T::Decimal128(5, 5),
        T::Decimal256(20, 3),
        T::Decimal256(76, 38),
        T::Utf8,
        T::LargeUtf8,
        T::Utf8View,
        T::Binary,
        T::LargeBinary,
        T::BinaryView,
        T::FixedSizeBinary(5),
        dictionary(T::Int8, T::Utf8),
        dictionary(T::UInt16, T::LargeUtf8),
        dictionary(T::Int32, T::Binary),
        dictionary(T::UInt8, T::Int64),
        T::List(item(T::Float64, true)),
        T::List(item(dictionary(T::Int8, T::Utf8), false)),
        T::LargeList(item(T::Timestamp(TimeUnit::Microsecond, zone("Europe/Berlin")), true)),
        T::FixedSizeList(item(T::Float32, true), 3),
        T::Struct(pair().into()),
        T::List(item(T::Struct(pair().into()), true)),
        map(T::Int32, T::Utf8View),
        map(T::Utf8, T::List(item(T::Duration(TimeUnit::Millisecond), true))),
        T::Struct(vec![field("m", map(T::Utf8, T::Decimal32(9, 0)), true), field("n", T::LargeBinary, false)].into()),
    ]
}

/// An array of any values; `tag`: what its texts begin with.
fn array(of: &Field, n: usize, tag: &str, random: &mut Random) -> ArrayRef {
    let nulls = random.nulls(of.is_nullable(), n);
    let texts = |random: &mut Random| -> Vec<String> {
        (0..n).map(|_| format!("{tag} é{}", "x".repeat(random.below(3)) + &random.below(9).to_string())).collect()
    };
    let is_valid = |i: usize| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(i));
    match of.data_type() {
        DataType::Null => Arc::new(NullArray::new(n)),
        DataType::Boolean => Arc::new((0..n).map(|i| is_valid(i).then(|| random.below(2) == 0)).collect::<BooleanArray>()),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            let texts = texts(random);
            let plain: StringArray = texts.iter().enumerate().map(|(i, text)| is_valid(i).then_some(text)).collect();
            cast(&plain, of.data_type()).unwrap()
        }
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            let texts = texts(random);
            let bytes = |text: &String| [text.as_bytes(), b"\xff\x00"].concat();
            let plain: BinaryArray = texts.iter().enumerate().map(|(i, text)| is_valid(i).then(|| bytes(text))).collect();
            cast(&plain, of.data_type()).unwrap()
        }
        DataType::FixedSizeBinary(width) => {
            let bytes: Vec<u8> = (0..n * *width as usize).map(|_| random.below(256) as u8).collect();
            made(of.data_type(), n, nulls, vec![bytes.into()], vec![])
        }
        DataType::Dictionary(_, value) => {
            let values = array(&field("", DataType::clone(value), of.is_nullable()), n, tag, random);
            cast(&values, of.data_type()).unwrap()
        }
        DataType::List(item) => list::<i32>(item, n, nulls, tag, random),
        DataType::LargeList(item) => list::<i64>(item, n, nulls, tag, random),
        DataType::FixedSizeList(item, size) => {
            let items = array(item, n * *size as usize, tag, random);
            Arc::new(FixedSizeListArray::new(Arc::clone(item), *size, items, nulls))
        }
        DataType::Struct(fields) => {
            let columns = fields.iter().map(|field| array(field, n, tag, random)).collect();
            Arc::new(StructArray::try_new_with_length(fields.clone(), columns, nulls, n).unwrap())
        }
        DataType::Map(entries, is_sorted) => {
            let offsets = OffsetBuffer::<i32>::from_lengths(random.lengths(n));
            let entries_of = array(entries, offsets.last() as usize, tag, random);
            let pairs = StructArray::from(entries_of.to_data());
            Arc::new(MapArray::new(Arc::clone(entries), offsets, pairs, nulls, *is_sorted))
        }
        data_type => {
            let width = data_type.primitive_width().unwrap();
            let most = match data_type {
                DataType::Decimal32(p, _)
                | DataType::Decimal64(p, _)
                | DataType::Decimal128(p, _)
                | DataType::Decimal256(p, _) => 10i128.pow(u32::from(*p).min(38)),
                _ => i128::MAX,
            };
            let mut bytes = Vec::new();
            for _ in 0..n {
                let number = random.number() % most;
                let mut wide = [if number < 0 { 0xff } else { 0 }; 32];
                wide[..16].copy_from_slice(&number.to_le_bytes());
                bytes.extend_from_slice(&wide[..width]);
            }
            made(data_type, n, nulls, vec![bytes.into()], vec![])
        }
    }
}

fn made(of: &DataType, n: usize, nulls: Option<NullBuffer>, buffers: Vec<Buffer>, children: Vec<ArrayData>) -> ArrayRef {
    let data = ArrayData::builder(of.clone()).len(n).nulls(nulls).buffers(buffers).child_data(children);
    make_array(data.align_buffers(true).build().unwrap())
}

fn list<O: OffsetSizeTrait>(item: &FieldRef, n: usize, nulls: Option<NullBuffer>, tag: &str, random: &mut Random) -> ArrayRef {
    let offsets = OffsetBuffer::<O>::from_lengths(random.lengths(n));
    let items = array(item, offsets.last().as_usize(), tag, random);
    Arc::new(GenericListArray::<O>::new(Arc::clone(item), offsets, items, nulls))
}

/// A file of row groups, each from a batch of its own.
fn file_of(schema: &SchemaRef, groups: &[RecordBatch], properties: WriterProperties) -> Vec<u8> {
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut file, Arc::clone(schema), Some(properties)).unwrap();
    for group in groups {
        writer.write(group).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    file
}

/// What any reader sees: the schema, and the rows, those of each row group by themselves.
fn read(file: impl Into<Bytes>) -> (SchemaRef, Vec<RecordBatch>) {
    let file = file.into();
    let whole = ParquetRecordBatchReaderBuilder::try_new(file.clone()).unwrap();
    let groups = (0..whole.metadata().num_row_groups()).flat_map(|group| {
        let builder = ParquetRecordBatchReaderBuilder::try_new(file.clone()).unwrap().with_row_groups(vec![group]);
        builder.build().unwrap().map(Result::unwrap).collect::<Vec<_>>()
    });
    (Arc::clone(whole.schema()), groups.collect())
}

/// Each row of batches: which batch, and where in it.
fn places(batches: &[RecordBatch]) -> Vec<(usize, usize)> {
    batches.iter().enumerate().flat_map(|(i, batch)| (0..batch.num_rows()).map(move |row| (i, row))).collect()
}

/// Each column of `found` that `wanted` has is that column's rows, value by value, and of the same field.
#[track_caller]
fn check(found: &[(SchemaRef, Vec<RecordBatch>)], wanted: &(SchemaRef, Vec<RecordBatch>), rows: &[usize]) {
    let batches: Vec<RecordBatch> = found.iter().flat_map(|(_, batches)| batches.iter().cloned()).collect();
    let (found_places, wanted_places) = (places(&batches), places(&wanted.1));
    assert_eq!(found_places.len(), rows.len());
    for (schema, _) in found {
        assert_eq!(schema.metadata(), wanted.0.metadata());
        for (found, wanted) in schema.fields().iter().zip(wanted.0.fields()) {
            assert_eq!(found, wanted);
        }
    }
    for (i, field) in wanted.0.fields().iter().enumerate() {
        for (&(batch, row), &n) in found_places.iter().zip(rows) {
            let (wanted_batch, wanted_row) = wanted_places[n];
            let found = batches[batch].column(i).slice(row, 1);
            let wanted = wanted.1[wanted_batch].column(i).slice(wanted_row, 1);
            assert_eq!(&found, &wanted, "row {n} of {field}");
        }
    }
}

struct Files {
    storage: Storage,
    store: Arc<dyn ObjectStore>,
}

impl Files {
    fn new() -> Self {
        Self { storage: Storage::new().unwrap(), store: Arc::new(InMemory::new()) }
    }

    fn at(&self, name: &str) -> Location {
        Location::new(self.store.clone(), Path::from(name), name)
    }

    fn put(&self, name: &str, content: Vec<u8>) -> KnownFile {
        let at = self.at(name);
        self.storage.put(&at, content.into()).unwrap();
        let found = inspect(&self.storage, &at).unwrap();
        KnownFile { at, version: found.version, blake3: found.blake3, n_rows: found.n_rows }
    }

    /// Writes an output of these rows; its files.
    fn pass(&self, passed: &Passed, rows: &[usize], parts: Option<PartSize>) -> anyhow::Result<Vec<Bytes>> {
        let at = self.at("out.parquet");
        let schema = Arc::new(Schema::new(vec![field("completion", DataType::Utf8, true)]));
        let beside = (Some(passed), parts.map(|size| Parts::new(size, "job", "")));
        let mut sink = Sink::create_passing(&self.storage, &at, Some(schema), beside)?;
        for row in rows {
            sink.write_row(*row as u64, &json!({"of the row": null, "completion": row.to_string()}).to_string())?;
        }
        sink.publish()?;
        let files = if parts.is_some() { PartList::files(&self.storage, &at)? } else { vec![at] };
        files.iter().map(|at| Ok(self.storage.get(at)?.unwrap())).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever columns files have, those of an output that takes them over are equal to theirs, of the rows that it has.
    #[test]
    fn columns_of_any_type_are_taken_over(
        chosen in prop::collection::vec((prop::sample::select(types()), any::<bool>()), 1..5),
        groups in prop::collection::vec(prop::collection::vec(0..25usize, 0..4), 1..4),
        left_out in 0..5usize,
        part in prop::option::of(1..40u64),
        has_dictionary in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let fields: Vec<Field> = chosen.into_iter().enumerate().map(|(i, (data_type, is_nullable))| {
            let is_nullable = is_nullable || data_type == DataType::Null;
            field(&format!("c{i} é"), data_type, is_nullable).with_metadata(HashMap::from([("of".to_owned(), i.to_string())]))
        }).collect();
        let schema = Arc::new(Schema::new_with_metadata(fields, HashMap::from([("by".to_owned(), "ä".to_owned()), ("x".to_owned(), String::new())])));
        let files = Files::new();
        let (mut known, mut batches) = (Vec::new(), Vec::new());
        for (i, sizes) in groups.iter().enumerate() {
            let of_group = |(j, &n): (usize, &usize)| {
                // Each row group has texts of its own: together they are more than short keys can tell apart.
                let columns = schema.fields().iter().map(|field| array(field, n, &format!("{i}-{j}"), &mut random)).collect();
                RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()
            };
            let file: Vec<RecordBatch> = sizes.iter().enumerate().map(of_group).collect();
            let properties = WriterProperties::builder().set_dictionary_enabled(has_dictionary).build();
            let content = file_of(&schema, &file, properties);
            batches.extend(read(content.clone()).1);
            known.push(files.put(&format!("{i}.parquet"), content));
        }
        let wanted = (read(files.storage.get(&known[0].at).unwrap().unwrap()).0, batches);
        let n_rows = wanted.1.iter().map(RecordBatch::num_rows).sum();
        let rows: Vec<usize> = (0..n_rows).filter(|_| random.below(5) >= left_out).collect();
        let passed = Passed::of(&files.storage, known, None).unwrap();
        passed.check().unwrap();
        let written = files.pass(&passed, &rows, part.map(PartSize::Rows)).unwrap();
        let found: Vec<_> = written.iter().cloned().map(read).collect();
        check(&found, &wanted, &rows);
        prop_assert_eq!(written, files.pass(&passed, &rows, part.map(PartSize::Rows)).unwrap());
        let completions: Vec<String> = found.iter().flat_map(|(_, batches)| batches).flat_map(|batch| {
            let texts = batch.column_by_name("completion").unwrap().as_any().downcast_ref::<StringArray>().unwrap();
            texts.iter().map(|text| text.unwrap().to_owned()).collect::<Vec<_>>()
        }).collect();
        prop_assert_eq!(completions, rows.iter().map(usize::to_string).collect::<Vec<_>>());
    }
}

/// One file of one batch.
fn single(columns: Vec<(Field, ArrayRef)>) -> Vec<u8> {
    let (fields, columns): (Vec<Field>, Vec<ArrayRef>) = columns.into_iter().unzip();
    let schema = Arc::new(Schema::new(fields));
    file_of(&schema, &[RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()], WriterProperties::default())
}

#[test]
fn files_that_differ_in_arrow_alone_are_joined() {
    let files = Files::new();
    let berlin = DataType::Timestamp(TimeUnit::Microsecond, Some("Europe/Berlin".into()));
    let tokyo = DataType::Timestamp(TimeUnit::Microsecond, Some("Asia/Tokyo".into()));
    let inner = |is_nullable| DataType::Struct(vec![field("x", DataType::Int64, is_nullable)].into());
    let of = |text: DataType, zone: DataType, is_nullable: bool, random: &mut Random| {
        let list = DataType::List(Arc::new(field(if is_nullable { "item" } else { "element" }, inner(is_nullable), is_nullable)));
        let fields = [field("text", text, is_nullable), field("at", zone, true), field("list", list, is_nullable)];
        single(fields.into_iter().map(|field| (field.clone(), array(&field, 9, "t", random))).collect())
    };
    let mut random = Random(3);
    let first = of(dictionary(DataType::Int32, DataType::Utf8), berlin, false, &mut random);
    let second = of(DataType::Utf8, tokyo, true, &mut random);
    let known = vec![files.put("a.parquet", first.clone()), files.put("b.parquet", second.clone())];
    let passed = Passed::of(&files.storage, known, None).unwrap();
    let rows: Vec<usize> = (0..18).collect();
    let (schema, found) = read(files.pass(&passed, &rows, None).unwrap().remove(0));
    let types: Vec<&DataType> = schema.fields().iter().map(|field| field.data_type()).take(2).collect();
    assert_eq!(types, [&DataType::Utf8, &DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))]);
    assert!(schema.fields().iter().all(|field| field.is_nullable()));
    let wanted: Vec<RecordBatch> = [first, second].into_iter().flat_map(|file| read(file).1).collect();
    for (i, (&(batch, row), (wanted_batch, wanted_row))) in places(&found).iter().zip(places(&wanted)).enumerate() {
        for column in 0..3 {
            let found = found[batch].column(column).slice(row, 1);
            let wanted = wanted[wanted_batch].column(column).slice(wanted_row, 1);
            assert_eq!(&found, &cast(&wanted, found.data_type()).unwrap(), "row {i}, column {column}");
        }
    }

    let other =
        single(vec![(field("text", DataType::Int64, true), array(&field("", DataType::Int64, true), 2, "", &mut random))]);
    let known = |name: &str, kept: Option<&[String]>| {
        let files_of = ["a.parquet", name].map(|name| {
            let at = files.at(name);
            let found = inspect(&files.storage, &at).unwrap();
            KnownFile { at, version: found.version, blake3: found.blake3, n_rows: found.n_rows }
        });
        Passed::of(&files.storage, files_of.to_vec(), kept).map(drop).map_err(|e| format!("{e:#}"))
    };
    files.put("c.parquet", other);
    assert!(known("c.parquet", None).unwrap_err().contains("a.parquet and c.parquet have different columns"));
    assert!(known("c.parquet", Some(&["text".to_owned()])).unwrap_err().contains("have different columns"));
    assert!(known("c.parquet", Some(&["at".to_owned()])).unwrap_err().contains("c.parquet: it has no column \"at\""));
}

#[test]
fn an_input_that_changed_is_not_taken_over() {
    let files = Files::new();
    let content = |n: usize| {
        let x = field("x", DataType::Utf8, false);
        single(vec![(x.clone(), array(&x, n, "t", &mut Random(n as u64)))])
    };
    let known = files.put("in.parquet", content(40));
    let passed = Passed::of(&files.storage, vec![known], None).unwrap();
    // The same again is no change.
    files.put("in.parquet", content(40));
    files.pass(&passed, &[0, 3], None).unwrap();
    files.put("in.parquet", content(41));
    let error = format!("{:#}", files.pass(&passed, &[0, 3], None).unwrap_err());
    assert!(error.contains("in.parquet changed since this run began"), "{error}");
}
