//! What a pipeline's policy makes of completions, and rows at which the engine fails, on the real program with a tiny model: its
//! completions are noise, of which some pass a check and others do not.

use crate::common::{Sandbox, golden};
use serde_json::{Value, json};
use std::fs;

/// The tokens of the tiny model: three marks, letters, a blank, digits, capitals.
fn tokenizer() -> String {
    let texts = ('a'..='z').chain(['Ġ']).chain('0'..='9').chain('A'..='X').map(String::from);
    let marks = ["<pad>", "<s>", "</s>"].map(str::to_owned);
    let vocab: Value = marks
        .iter()
        .cloned()
        .chain(texts)
        .enumerate()
        .map(|(id, text)| (text, json!(id)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let added = |id: usize| json!({"id": id, "content": marks[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    json!({
        "version": "1.0",
        "added_tokens": [added(0), added(1), added(2)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
    .to_string()
}

/// Writes the model's folder, with an embedding of the letter z that is no number if it is poisoned.
fn write_model(sandbox: &Sandbox, name: &str, is_poisoned: bool) {
    fs::create_dir(sandbox.path(name)).unwrap();
    for entry in fs::read_dir(golden("models/mistral")).unwrap() {
        let path = entry.unwrap().path();
        let mut content = fs::read(&path).unwrap();
        if is_poisoned && path.ends_with("model-00001-of-00003.safetensors") {
            let n_header = u64::from_le_bytes(*content.first_chunk().unwrap()) as usize;
            let header: Value = serde_json::from_slice(&content[8..8 + n_header]).unwrap();
            let embedding = &header["model.embed_tokens.weight"];
            assert_eq!((&embedding["dtype"], &embedding["shape"]), (&json!("F16"), &json!([64, 32])));
            let start = 8 + n_header + embedding["data_offsets"][0].as_u64().unwrap() as usize + 28 * 32 * 2;
            content[start..start + 2].copy_from_slice(&0x7e00_u16.to_le_bytes());
        }
        fs::write(sandbox.path(name).join(path.file_name().unwrap()), content).unwrap();
    }
    fs::write(sandbox.path(name).join("tokenizer.json"), tokenizer()).unwrap();
}

/// Prompts of which some are the same and many begin alike.
fn prompt(i: usize) -> String {
    format!("row {} of the test {}", i % 40, "abc".repeat(i % 5))
}

const PIPELINE: &str = r#"
[input]
files = ["in.jsonl"]
[output]
file = "out.jsonl"
[model]
name = "tiny"
[prompt]
text = "{{ q }}"
[sampling]
max_tokens = 6
"#;

const POLICY: &str = r#"
[policy]
attempts = 4
retry.temperature = 1.4
[[policy.check]]
name = "vowels"
regex = "[aeiou]"
on_fail = "retry"
[[policy.check]]
name = "short"
expression = "completion | length < 6 or q == ''"
on_fail = "keep"
"#;

fn sandbox(pipeline: &str) -> Sandbox {
    let sandbox = Sandbox::new();
    write_model(&sandbox, "tiny", false);
    let rows: String = (0..60).map(|i| json!({"i": i, "q": prompt(i)}).to_string() + "\n").collect();
    sandbox.write("in.jsonl", rows);
    sandbox.write("job.toml", pipeline);
    sandbox
}

/// Runs the job to its end, however often it has to be started; its outcome files.
#[track_caller]
fn outcome(sandbox: &Sandbox, output: &str, more: &[&str]) -> (String, String) {
    for _ in 0..200 {
        let args = [&["run", "job.toml", "-o", output, "--quiet"], more].concat();
        let run = sandbox.command(&args).env("VALAR_CACHE", sandbox.path("cache")).output().unwrap();
        match run.status.code() {
            Some(6) => {}
            Some(0 | 3) => return (sandbox.read(output), sandbox.read(&output.replace(".jsonl", ".errors.jsonl"))),
            code => panic!("{code:?}: {}", String::from_utf8_lossy(&run.stderr)),
        }
    }
    panic!("no end in sight")
}

fn parse(lines: &str) -> Vec<Value> {
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_row_is_tried_again_until_it_passes() {
    let sandbox = sandbox(&format!("{PIPELINE}{POLICY}"));
    let (results, errors) = outcome(&sandbox, "out.jsonl", &[]);
    let (rows, failed) = (parse(&results), parse(&errors));
    assert_eq!(rows.len() + failed.len(), 60);
    let vowels = regex::Regex::new("[aeiou]").unwrap();
    let n_attempts = |row: &Value| row["attempts"].as_u64().unwrap();
    assert!(rows.iter().any(|row| n_attempts(row) == 1) && rows.iter().any(|row| n_attempts(row) == 3), "{results}");
    let mut replays = String::new();
    for row in &rows {
        let (text, usage, attempts) = (row["completion"].as_str().unwrap(), &row["usage"], n_attempts(row));
        assert!(vowels.is_match(text), "{row}");
        assert_eq!(row["failed_checks"] == json!(["short"]), text.chars().count() >= 6, "{row}");
        assert!(usage["completion_tokens"].as_u64().unwrap() >= attempts, "{row}");
        let temperature = if attempts == 1 { 1.0 } else { 1.4 };
        let body = json!({"prompt": row["q"], "max_tokens": 6, "temperature": temperature, "seed": usage["seed"]});
        replays +=
            &json!({"custom_id": row["i"].to_string(), "method": "POST", "url": "/v1/completions", "body": body}).to_string();
        replays.push('\n');
    }
    // With the seed that the row names, its completion comes again.
    sandbox.write("replays.jsonl", replays);
    sandbox.expect(&["run", "-i", "replays.jsonl", "-o", "again.jsonl", "--model", "tiny", "--quiet"], 0);
    for (row, again) in rows.iter().zip(sandbox.rows("again.jsonl")) {
        let body = &again["response"]["body"];
        assert_eq!(row["completion"], body["choices"][0]["text"], "{row}");
        let n_prompt = body["usage"]["prompt_tokens"].as_u64().unwrap();
        assert_eq!(row["usage"]["prompt_tokens"], n_attempts(row) * n_prompt, "{row}");
    }
    assert!(!failed.is_empty());
    for row in &failed {
        let error = &row["error"];
        assert_eq!((&error["code"], &error["attempts"]), (&json!("check_failed"), &json!(4)), "{row}");
        assert!(error["message"].as_str().unwrap().starts_with("check \"vowels\": "), "{row}");
        assert!(error["seed"].is_u64() && error["system_fingerprint"].as_str().unwrap().starts_with("fp_"), "{row}");
        assert!(error["completion_tokens"].as_u64().unwrap() >= 4 && error["line"].is_u64(), "{row}");
    }
    let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).unwrap();
    let beyond: u64 = rows.iter().map(|row| n_attempts(row) - 1).sum::<u64>() + 3 * failed.len() as u64;
    assert_eq!(
        (&report["rows"]["further_attempts"], &report["rows"]["errors"]["check_failed"]),
        (&json!(beyond), &json!(failed.len()))
    );
}

#[test]
fn which_attempt_passes_depends_on_the_row_alone() {
    let sandbox = sandbox(&format!("{PIPELINE}{POLICY}"));
    let whole = outcome(&sandbox, "whole.jsonl", &[]);
    assert_eq!(outcome(&sandbox, "one.jsonl", &["--set", "engine.max_running=2", "--set", "engine.threads=1"]), whole);
    // Stopped every few rows, and gone on with.
    assert_eq!(outcome(&sandbox, "paused.jsonl", &["--max-tokens", "900", "--set", "engine.max_running=3"]), whole);
    assert_eq!(outcome(&sandbox, "cold.jsonl", &["--cache"]), whole);
    assert_eq!(outcome(&sandbox, "warm.jsonl", &["--cache"]), whole);
    let report: Value = serde_json::from_str(&sandbox.read("warm.report.json")).unwrap();
    assert_eq!(report["tokens"]["prefilled"], 0);
    for shard in ["0/2", "1/2"] {
        sandbox.expect(
            &["run", "job.toml", "-o", "shards.jsonl", "--quiet", "--shard", shard],
            if whole.1.is_empty() { 0 } else { 3 },
        );
    }
    sandbox.expect(&["merge", "job.toml", "-o", "shards.jsonl", "--quiet"], if whole.1.is_empty() { 0 } else { 3 });
    assert_eq!((sandbox.read("shards.jsonl"), sandbox.read("shards.errors.jsonl")), whole);
}

#[test]
fn identical_greedy_rows_stay_identical() {
    let sandbox = sandbox(&format!("{PIPELINE}temperature = 0\n{POLICY}"));
    let rows: String = (0..60).map(|i| json!({"i": i, "q": prompt(i % 20)}).to_string() + "\n").collect();
    sandbox.write("in.jsonl", rows);
    let whole = outcome(&sandbox, "whole.jsonl", &[]);
    let rows = parse(&whole.0);
    assert!(rows.iter().any(|row| row["attempts"].as_u64().unwrap() > 1), "{}", whole.0);
    for row in &rows {
        let first = rows.iter().find(|first| first["q"] == row["q"]).unwrap();
        assert_eq!((&row["completion"], &row["attempts"]), (&first["completion"], &first["attempts"]));
    }
    let alone = outcome(&sandbox, "alone.jsonl", &["--set", "job.dedup=false"]);
    for (row, alone) in rows.iter().zip(parse(&alone.0)) {
        assert_eq!((&row["completion"], &row["attempts"]), (&alone["completion"], &alone["attempts"]));
    }
    assert_eq!(whole.1.lines().count(), alone.1.lines().count());
}

#[test]
fn a_later_step_uses_the_attempt_that_passed() {
    let steps = r#"
[input]
files = ["in.jsonl"]
limit = 20
[output]
file = "out.jsonl"
[model]
name = "tiny"
[[step]]
name = "first"
prompt.text = "{{ q }}"
[step.policy]
finally = "keep"
check = [{ min_chars = 6, on_fail = "retry" }]
[[step]]
name = "second"
prompt.text = "{{ steps.first.completion }} "
sampling.temperature = 0
[sampling]
max_tokens = 6
"#;
    let sandbox = sandbox(steps);
    let (results, _) = outcome(&sandbox, "out.jsonl", &[]);
    let rows = parse(&results);
    assert!(rows.len() == 20 && rows.iter().any(|row| row["first_attempts"] != 1), "{results}");
    let mut lines = String::new();
    for row in &rows {
        assert!(row["first_attempts"] == 3 || row["first_completion"].as_str().unwrap().len() >= 6, "{row}");
        assert!(row.get("second_attempts").is_none());
        let prompt = format!("{} ", row["first_completion"].as_str().unwrap());
        let body = json!({"prompt": prompt, "max_tokens": 6, "temperature": 0});
        lines +=
            &json!({"custom_id": row["i"].to_string(), "method": "POST", "url": "/v1/completions", "body": body}).to_string();
        lines.push('\n');
    }
    sandbox.write("again.jsonl", lines);
    sandbox.expect(&["run", "-i", "again.jsonl", "-o", "second.jsonl", "--model", "tiny", "--quiet"], 0);
    for (row, again) in rows.iter().zip(sandbox.rows("second.jsonl")) {
        assert_eq!(row["second_completion"], again["response"]["body"]["choices"][0]["text"]);
    }
}

#[test]
fn request_rows_are_checked_too() {
    let sandbox = sandbox(&PIPELINE.replace(
        "[prompt]\ntext = \"{{ q }}\"\n",
        "[policy]\nattempts = 2\nfinally = \"keep\"\ncheck = [{ min_chars = 6, on_fail = \"retry\" }]\n",
    ));
    let line = |i: usize| {
        let body = json!({"prompt": [prompt(i), "another"], "max_tokens": 6, "n": 2, "seed": i});
        json!({"custom_id": i.to_string(), "method": "POST", "url": "/v1/completions", "body": body}).to_string() + "\n"
    };
    sandbox.write("in.jsonl", (0..12).map(line).collect::<String>());
    let (results, errors) = outcome(&sandbox, "out.jsonl", &[]);
    let rows = parse(&results);
    assert!(rows.len() == 12 && errors.is_empty(), "{errors}");
    let mut n_again = 0;
    for row in &rows {
        let choices = row["response"]["body"]["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 4, "{row}");
        let is_short = choices.iter().any(|choice| choice["text"].as_str().unwrap().len() < 6);
        assert_eq!(is_short, row["failed_checks"] == json!(["min_chars"]), "{row}");
        assert!(!is_short || row["attempts"] == 2, "{row}");
        n_again += usize::from(row["attempts"] == 2);
        // Perhaps with a mark before each of the two prompts.
        let n_prompt = prompt(row["custom_id"].as_str().unwrap().parse().unwrap()).len() as u64 + 7 + 2;
        let n_paid = row["response"]["body"]["usage"]["prompt_tokens"].as_u64().unwrap();
        assert_eq!(n_paid > n_prompt, row["attempts"] == 2, "{row}");
    }
    assert!(n_again > 0);
}

#[test]
fn runaway_repetition_is_ended_where_that_is_asked_for() {
    let sandbox = sandbox(&format!("{PIPELINE}temperature = 0\nignore_eos = true\n"));
    let (plain, _) = outcome(&sandbox, "plain.jsonl", &["--set", "sampling.max_tokens=80"]);
    let rule = "sampling.repetition_detection={ max_pattern_size = 6, min_count = 4 }";
    let (ended, _) = outcome(&sandbox, "ended.jsonl", &["--set", "sampling.max_tokens=80", "--set", rule]);
    let mut n_ended = 0;
    for (plain, ended) in parse(&plain).iter().zip(parse(&ended)) {
        let (whole, text) = (plain["completion"].as_str().unwrap(), ended["completion"].as_str().unwrap());
        assert!(whole.starts_with(text), "{whole:?} {text:?}");
        assert_eq!(ended["finish_reason"] == "repetition", whole.len() > text.len(), "{ended}");
        n_ended += usize::from(ended["finish_reason"] == "repetition");
    }
    assert!(n_ended > 0, "{plain}");
}

#[test]
fn a_policy_that_makes_no_sense_is_refused_before_any_work() {
    let sandbox = sandbox(&format!("{PIPELINE}[policy]\ncheck = [{{ regex = '(', on_fail = \"keep\" }}]\n"));
    let said = sandbox.expect(&["run", "job.toml", "--quiet"], 1);
    assert!(said.contains("policy") && said.contains("regex"), "{said}");
    sandbox.write("job.toml", format!("{PIPELINE}[policy]\ncheck = [{{ min_chars = 1, on_fail = \"shout\" }}]\n"));
    assert!(sandbox.expect(&["run", "job.toml", "--quiet"], 2).contains("shout"));
}

#[test]
fn a_row_that_is_not_a_number_says_how_to_see_it_again() {
    let sandbox = sandbox(&PIPELINE.replace("max_tokens = 6", "max_tokens = 20"));
    let rows = |i: usize| json!({"i": i, "q": if i % 7 == 3 { format!("row {i} z") } else { prompt(i) }}).to_string() + "\n";
    sandbox.write("in.jsonl", (0..60).map(rows).collect::<String>());
    write_model(&sandbox, "poisoned", true);
    for numerics in ["int8", "int8-bf16", "bf16", "exact"] {
        let set = format!("model.numerics={numerics}");
        let (good, _) = outcome(&sandbox, &format!("good-{numerics}.jsonl"), &["--set", &set]);
        let poisoned = ["--set", &set, "--set", "model.name=poisoned"];
        let (results, errors) = outcome(&sandbox, &format!("bad-{numerics}.jsonl"), &poisoned);
        let (good, results, errors) = (parse(&good), parse(&results), parse(&errors));
        assert_eq!((good.len(), results.len() + errors.len()), (60, 60));
        for row in &results {
            let other = good.iter().find(|good| good["i"] == row["i"]).unwrap();
            assert_eq!(row["completion"], other["completion"], "{numerics}: {row}");
        }
        for row in &errors {
            let (error, i) = (&row["error"], row["i"].as_u64().unwrap());
            assert_eq!((&error["code"], &error["attempts"]), (&json!("engine_error"), &json!(1)), "{row}");
            assert!(error["message"].as_str().unwrap().contains("not a number after"), "{row}");
            let has_seed = error["seed"].is_u64() && error["system_fingerprint"].as_str().unwrap().starts_with("fp_");
            assert!(has_seed && error["line"] == i + 1 && error["file"].as_str().unwrap().ends_with("in.jsonl"), "{row}");
            let other = good.iter().find(|good| good["i"] == row["i"]).unwrap();
            // It has the letter in its prompt, or has drawn it (and not as the last of its tokens).
            let is_guilty = i % 7 == 3 || other["completion"].as_str().unwrap().contains('z');
            assert!(is_guilty, "{numerics}: {row}");
        }
        assert!(errors.iter().filter(|row| row["i"].as_u64().unwrap() % 7 == 3).count() == 9, "{numerics}: {errors:?}");
    }
}
