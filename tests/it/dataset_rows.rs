//! Dataset rows on the real program and model: every pipeline of the repository, typed columns, examples, steps, scores.

use crate::common::{Sandbox, root, tiny_llama};
use arrow::array::{Array as _, AsArray as _, RecordBatch};
use arrow::datatypes::{DataType, Int32Type, Int64Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{self, File};

/// Runs a pipeline of the repository on its first rows; the sandbox holds `out/`.
fn run_pipeline(name: &str, n_rows: u64) -> Sandbox {
    let sandbox = Sandbox::new();
    std::os::unix::fs::symlink(root().join("datasets"), sandbox.path("datasets")).unwrap();
    let file = root().join("pipelines").join(name);
    let limit = format!("input.limit={n_rows}");
    sandbox.expect(&["run", file.to_str().unwrap(), "--quiet", "--set", &limit], 0);
    sandbox
}

fn parquet(sandbox: &Sandbox, name: &str) -> RecordBatch {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(sandbox.path(name)).unwrap()).unwrap();
    let batches: Vec<RecordBatch> = reader.build().unwrap().map(Result::unwrap).collect();
    arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap()
}

#[test]
fn every_pipeline_runs() {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(root().join("pipelines")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        run_pipeline(&name, 2);
        names.insert(name);
    }
    assert!(names.len() >= 8, "{names:?}");
}

#[test]
fn labels_are_a_typed_column() {
    let sandbox = run_pipeline("classify.toml", 12);
    let rows = parquet(&sandbox, "out/intents.parquet");
    let parsed = rows.column_by_name("parsed").unwrap().as_struct();
    let intents = parsed.column_by_name("intent").unwrap();
    assert_eq!(intents.data_type(), &DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8)));
    let schema: Value = serde_json::from_str(&fs::read_to_string(root().join("datasets/clinc150/schema.json")).unwrap()).unwrap();
    let labels = schema["properties"]["intent"]["enum"].as_array().unwrap();
    let intents = intents.as_dictionary::<Int32Type>().downcast_dict::<arrow::array::StringArray>().unwrap();
    assert_eq!((intents.len(), intents.null_count(), labels.len()), (12, 0, 151));
    assert!((0..12).all(|i| labels.iter().any(|label| label == intents.values().value(intents.keys().value(i) as usize))));
}

#[test]
fn a_schema_becomes_structs_lists_and_dictionaries() {
    let sandbox = run_pipeline("extract.toml", 6);
    let rows = parquet(&sandbox, "out/facts.parquet");
    let parsed = rows.column_by_name("parsed").unwrap().as_struct();
    assert!(
        matches!(parsed.column_by_name("people").unwrap().data_type(), DataType::List(item) if item.data_type() == &DataType::Utf8)
    );
    assert!(matches!(parsed.column_by_name("topic").unwrap().data_type(), DataType::Dictionary(..)));
    let numbers = parsed.column_by_name("first_number").unwrap().as_primitive::<Int64Type>();
    let texts = rows.column_by_name("completion").unwrap().as_string::<i32>();
    for i in 0..6 {
        let answer: Value = serde_json::from_str(texts.value(i)).unwrap();
        let number = (!numbers.is_null(i)).then(|| numbers.value(i));
        assert_eq!((answer["first_number"].as_i64(), parsed.is_null(i)), (number, false));
    }
}

#[test]
fn a_later_step_sees_the_earlier_answer() {
    let sandbox = Sandbox::new();
    let rows: Vec<String> = (0..9).map(|i| json!({"i": i, "x": format!("Name fruit number {}.", i % 7)}).to_string()).collect();
    sandbox.write("in.jsonl", rows.join("\n"));
    sandbox.write(
        "steps.toml",
        r#"
[input]
files = ["in.jsonl"]
[[step]]
name = "judge"
prompt.text = "{{ x }} -> {{ steps.guess.completion }} / {{ steps.pick.parsed.n + 1 }}"
sampling.max_tokens = 3
[[step]]
name = "guess"
prompt.user = "{{ x }}"
[[step]]
name = "pick"
prompt.user = "{{ x }} How many?"
prompt.format.json_schema = { type = "object", properties = { n = { type = "integer", minimum = 0, maximum = 9 } }, required = ["n"] }
[output]
file = "out.jsonl"
[sampling]
temperature = 0
max_tokens = 8
"#,
    );
    sandbox.expect(&["run", "steps.toml", "--quiet", "--set", "job.window_rows=4", "--set", "engine.max_running=5"], 0);
    let rows = sandbox.rows("out.jsonl");
    // Each step alone, on the same text, gives the same.
    let alone: Vec<String> = rows
        .iter()
        .map(|row| {
            let n = row["pick_parsed"]["n"].as_i64().unwrap() + 1;
            json!({"text": format!("{} -> {} / {n}", row["x"].as_str().unwrap(), row["guess_completion"].as_str().unwrap())})
                .to_string()
        })
        .collect();
    sandbox.write("alone.jsonl", alone.join("\n"));
    sandbox.expect(
        &[
            "run",
            "-i",
            "alone.jsonl",
            "-o",
            "alone.out.jsonl",
            "--quiet",
            "--set",
            "prompt.text='{{ text }}'",
            "--set",
            "sampling.temperature=0",
            "--set",
            "sampling.max_tokens=3",
        ],
        0,
    );
    for (row, alone) in rows.iter().zip(sandbox.rows("alone.out.jsonl")) {
        assert_eq!(row["judge_completion"], alone["completion"], "{row}");
    }
    assert_eq!(rows.len(), 9);
    let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).unwrap();
    assert_eq!(report["rows"]["deduplicated"], 0, "rows whose columns differ are computed");
    // A step that fails is the row's error, which names it.
    sandbox.write("steps2.toml", sandbox.read("steps.toml").replace("parsed.n + 1", "parsed.n + nothing"));
    sandbox.expect(&["run", "steps2.toml", "--quiet", "--output", "bad.jsonl"], 3);
    let errors = sandbox.rows("bad.errors.jsonl");
    assert_eq!((errors.len(), &errors[0]["error"]["code"]), (9, &json!("template_error")));
    assert!(errors[0]["error"]["message"].as_str().unwrap().contains("nothing"), "{}", errors[0]);
}

#[test]
fn examples_come_from_a_file_and_make_the_job_what_it_is() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", "{\"q\": \"2+2?\"}\n{\"q\": \"3+3?\"}\n");
    sandbox.write("shots.jsonl", "{\"q\": \"1+1?\", \"a\": \"2\"}\n\n{\"q\": \"5+1?\", \"a\": \"6\"}\n");
    let few_shot = ["--set", "prompt.user='{{ q }}'", "--set", "prompt.few_shot={file='shots.jsonl', assistant='{{ a }}'}"];
    let by_hand = [
        "--set",
        "prompt.messages=[{role='user', content='1+1?'}, {role='assistant', content='2'}, {role='user', content='5+1?'}, {role='assistant', content='6'}, {role='user', content='{{ q }}'}]",
    ];
    let run = |name: &str, prompt: &[&str]| {
        let mut args = vec!["run", "-i", "in.jsonl", "-o", name, "--quiet", "--set", "sampling={temperature=0, max_tokens=6}"];
        args.extend(prompt);
        sandbox.expect(&args, 0);
        sandbox.read(name)
    };
    assert_eq!(run("a.jsonl", &few_shot), run("b.jsonl", &by_hand));
    sandbox.write("shots.jsonl", "{\"q\": \"1+1?\", \"a\": \"3\"}\n");
    let mut again = vec!["run", "-i", "in.jsonl", "-o", "a.jsonl", "--quiet", "--set", "sampling={temperature=0, max_tokens=6}"];
    again.extend(few_shot);
    assert!(sandbox.expect(&again, 1).contains("--restart"), "other examples make another job");
    let mut too_many = again.clone();
    too_many.extend(["--restart", "--set", "prompt.few_shot.n=2"]);
    assert!(sandbox.expect(&too_many, 1).contains("has 1 examples"));
}

#[test]
fn scores_are_those_of_the_whole_text() {
    let sandbox = run_pipeline("score.toml", 3);
    let rows = sandbox.rows("out/scores.jsonl");
    let report: Value = serde_json::from_str(&sandbox.read("out/scores.report.json")).unwrap();
    let tokens = &report["tokens"];
    assert!(tokens["cached"].as_u64() > tokens["prompt"].as_u64().map(|n| n / 2), "the question is shared: {tokens}");
    // The same text scored as a whole by the completions endpoint.
    let lines: Vec<String> = rows
        .iter()
        .enumerate()
        .map(|(i, row)| {
            let text =
                format!("Question: {}\nAnswer: {}", row["question"].as_str().unwrap(), &row["options"][1].as_str().unwrap()[2..]);
            let body = json!({"prompt": text, "max_tokens": 0, "echo": true, "logprobs": 1, "temperature": 0});
            json!({"custom_id": format!("{i}"), "method": "POST", "url": "/v1/completions", "body": body}).to_string()
        })
        .collect();
    sandbox.write("whole.jsonl", lines.join("\n"));
    sandbox.expect(&["run", "-i", "whole.jsonl", "-o", "whole.out.jsonl", "--quiet"], 0);
    for (row, whole) in rows.iter().zip(sandbox.rows("whole.out.jsonl")) {
        let score = &row["b_score"];
        let all = whole["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
        let n = score["n_tokens"].as_u64().unwrap() as usize;
        let sum: f64 = all[all.len() - n..].iter().map(|p| p.as_f64().unwrap()).sum();
        assert!((sum - score["logprob"].as_f64().unwrap()).abs() < 1e-9 && n > 0, "{score} against {sum}");
        assert!(row["a_score"] != row["b_score"] && row.get("a_completion").is_none());
    }
}

#[test]
fn wrong_prompts_stop_the_job_before_any_work() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", "{\"x\": 1}\n");
    let check = |settings: &[&str], code: i32, word: &str| {
        let mut args = vec!["run", "-i", "in.jsonl", "-o", "o.jsonl", "--quiet"];
        args.extend(settings.iter().flat_map(|s| ["--set", s]));
        let said = sandbox.expect(&args, code);
        assert!(said.contains(word), "{settings:?} said: {said}");
        assert!(!sandbox.path("o.jsonl").exists() && !sandbox.path("o.job").exists(), "{settings:?} left something");
    };
    check(&["prompt.user='{{ x'"], 1, "does not compile");
    check(&["prompt.user='a'", "prompt.text='b'"], 2, "give one of");
    check(&["prompt.user='a'", "prompt.format={json_schema='nowhere.json'}"], 1, "nowhere.json");
    check(&["prompt.user='a'", "prompt.format={regex='(['}"], 1, "format");
    check(&["prompt.user='a'", "prompt.format={json_schema={type='strange'}}"], 1, "format");
    check(&["prompt.user='a'", "prompt.format={regex='a', choices=['b']}"], 2, "give one of");
    check(&["prompt.user='a'", "step=[{name='s', prompt={user='b'}}]"], 2, "give one of them");
    check(&["step=[{name='s', prompt={user='{{ steps.t.completion }}'}}]"], 1, "no step t");
    check(&["step=[{name='s', prompt={user='{{ steps.s.completion }}'}}]"], 1, "waits for itself");
    check(&["step=[{name='s', prompt={user='{{ steps }}'}}]"], 1, "name the step");
    check(
        &["step=[{name='s', prompt={text='a', continuation='b'}}, {name='t', prompt={user='{{ steps.s.completion }}'}}]"],
        1,
        "has no answer",
    );
    check(&["step=[{name='1', prompt={user='b'}}]"], 2, "is no name");
    check(&["prompt.user='a'", "sampling.n=200"], 2, "sampling.n");
}

/// A model folder in Hugging Face's form, with a tokenizer of its own: byte-level letters.
#[test]
fn a_folder_is_a_model() {
    let sandbox = Sandbox::new();
    let (folder, template) = tiny_llama(&sandbox);
    sandbox.write("in.jsonl", "{\"q\": \"what is rain?\"}\n{\"q\": \"7 times 6?\"}\n");
    let run = |device: &str| {
        let output = format!("{device}.jsonl");
        let args = ["run", "-i", "in.jsonl", "-o", &output, "--quiet", "-m", "tiny-llama", "--device", device];
        let settings = ["--set", "prompt.user='{{ q }}'", "--set", "sampling={temperature=0, max_tokens=5, ignore_eos=true}"];
        sandbox.expect(&[&args[..], &settings].concat(), 0);
        sandbox.rows(&output)
    };
    let rows = run("cpu");
    assert_eq!((&rows[0]["usage"]["prompt_tokens"], &rows[1]["usage"]["completion_tokens"]), (&json!(15), &json!(5)));
    assert_eq!(rows, run("reference"), "both devices give the same greedy text");
    let output = sandbox.run(&["inspect", "tiny-llama", "--json"]);
    let shown: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(
        (&shown["architecture"], &shown["chat_template"], &shown["tokenizer"]["kind"]),
        (&json!("llama"), &json!(template), &json!("byte-level BPE"))
    );
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    assert!(sandbox.expect(&["inspect", "tiny-llama"], 1).contains("no tokenizer.json"));
}

#[test]
fn a_column_called_steps_is_a_column_where_there_are_none() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", "{\"steps\": [\"mix\", \"bake\"]}\n");
    let run = ["run", "-i", "in.jsonl", "-o", "o.jsonl", "--quiet", "--set", "sampling={temperature=0, max_tokens=2}", "--set"];
    sandbox.expect(&[&run[..], &["prompt.user='{{ steps[0] }}'"]].concat(), 0);
    let steps = "step=[{name='a', prompt={user='hi'}}, {name='b', prompt={user='{{ steps.a.completion }}'}}]";
    sandbox.expect(&[&run[..], &[steps, "--restart"]].concat(), 3);
    assert_eq!(sandbox.rows("o.errors.jsonl")[0]["error"]["param"], "steps");
}
