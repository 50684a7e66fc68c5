//! Long rows go on from where a killed run left them: the same bits, and little computed again. Counted by the engine, never
//! by time; on a fake model with any workload, and with the real program killed in the middle of its rows.

use std::collections::{BTreeMap, HashMap};
use std::process::Stdio;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};
use valar::engine::sampling::SeqParams;
use valar::engine::{Begun, Due, EngineConfig, Finished, Submission};
use valar::model::RunnerLimits;
use valar::window::Class;

use crate::ahead;
use crate::common::{Sandbox, chat_line};
use crate::fake::{N_VOCAB, Rng, expected};
use crate::s3::signal;
use crate::simulation::engine;

/// Rows of all kinds.
fn rows(rng: &mut Rng, max_context: usize, every: u32) -> Vec<Submission> {
    let n_rows = rng.range(1, 12) as u64;
    let row = |id: u64| {
        let prompt: Vec<u32> = (0..rng.range(1, 30)).map(|i| (i as u64 * id % 11) as u32).collect();
        let params = SeqParams {
            max_tokens: rng.range(1, max_context) as u32,
            seed: rng.next(),
            choice: rng.range(0, 3) as u32,
            stop: if rng.chance(40) { vec![rng.pick(&["ab", "é", "🙂", "abab"]).to_owned()] } else { Vec::new() },
            logprobs: rng.chance(40).then(|| rng.range(0, 4) as u8),
            ignore_eos: rng.chance(70),
            checkpoint: every,
            ..SeqParams::default()
        };
        Submission {
            id,
            prompt: prompt.into(),
            params,
            class: Class::Batch,
            keep_tokens: rng.range(0, 9) as u32,
            stream: 0,
            due: Due::NEVER,
        }
    };
    (0..n_rows).map(row).collect()
}

#[test]
fn rows_end_with_the_same_bits_after_any_kills_and_lose_little() {
    let mut n_kept = 0;
    for seed in 0..600 {
        let rng = &mut Rng(seed);
        let max_context = rng.range(60, 160);
        let limits = RunnerLimits {
            n_blocks: max_context.div_ceil(16) * rng.range(1, 6),
            max_step_tokens: 64,
            max_step_seqs: 8,
            n_vocab: N_VOCAB,
            max_context,
        };
        let config = EngineConfig { budget_tokens: rng.range(8, 64), ..EngineConfig::for_runner(&limits) };
        let every = rng.range(1, 20) as u32;
        let rows = rows(rng, max_context, every);
        let mut begun: HashMap<u64, Begun> = HashMap::new();
        let mut done: BTreeMap<u64, Finished> = BTreeMap::new();
        let (mut n_drawn, mut most_lost) = (0, 0);
        while done.len() < rows.len() {
            // Every other one on a device that goes on by itself.
            let mut life = if seed % 2 == 0 { engine(limits, config) } else { ahead::engine(limits, config).0 };
            for row in rows.iter().filter(|row| !done.contains_key(&row.id)) {
                let mut row = row.clone();
                row.params.begun = begun.get(&row.id).cloned().map(Arc::new);
                life.submit(row).expect("there is room");
            }
            let n_steps = rng.range(1, 120);
            let mut finished = Vec::new();
            for _ in 0..n_steps {
                life.step(&mut finished).expect("it runs");
                life.check();
            }
            // Now and then it is told of its end.
            let is_told = rng.chance(30);
            if is_told {
                life.checkpoint_all();
            }
            for checkpoint in life.take_checkpoints() {
                let so_far = begun.entry(checkpoint.id).or_default();
                assert_eq!(so_far.tokens.len(), checkpoint.start, "seed {seed}: a gap");
                so_far.tokens.extend(checkpoint.tokens);
                so_far.logprobs.extend(checkpoint.logprobs);
            }
            n_drawn += life.stats().generated_tokens as usize;
            done.extend(finished.into_iter().map(|finished| (finished.id, finished)));
            most_lost += if is_told { 0 } else { (rows.len() - done.len()) * every as usize };
        }
        let n_tokens: usize = done.values().map(|finished| finished.tokens.len()).sum();
        assert!(n_drawn >= n_tokens && n_drawn - n_tokens <= most_lost, "seed {seed}: {n_drawn} for {n_tokens}");
        for row in &rows {
            let wanted = expected(row.id, &row.prompt, &row.params, max_context);
            assert_eq!(done[&row.id], wanted, "seed {seed}, row {}", row.id);
            n_kept += begun.get(&row.id).map_or(0, |begun| begun.tokens.len());
        }
    }
    assert!(n_kept > 20_000, "{n_kept} tokens were kept: the seeds reach too little");
}

/// Rows of every kind that must be taken up in its own way.
fn write_rows(sandbox: &Sandbox, n_tokens: usize) {
    let schema = json!({"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 60});
    let kinds = [
        json!({}),
        json!({"temperature": 1.1, "top_p": 0.9}),
        json!({"temperature": 0.8, "n": 3, "seed": 5}),
        json!({"logprobs": true, "top_logprobs": 3}),
        json!({"temperature": 1, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.1, "logit_bias": {"40": 1}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, "temperature": 0.7}),
        json!({"stop": ["never to be seen"], "min_tokens": 20}),
    ];
    let mut lines: Vec<String> = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| {
            let mut extra = json!({"max_tokens": n_tokens + i});
            extra.as_object_mut().unwrap().extend(kind.as_object().unwrap().clone());
            if kind.get("response_format").is_none() {
                extra["ignore_eos"] = true.into();
            }
            chat_line(&format!("row-{i}"), &format!("Tell me of number {i}."), extra)
        })
        .collect();
    let body = json!({"prompt": "Once upon a time", "echo": true, "logprobs": 2, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": true});
    lines.push(json!({"custom_id": "echo", "method": "POST", "url": "/v1/completions", "body": body}).to_string());
    sandbox.write("in.jsonl", lines.join("\n"));
}

fn args(every: &'static str) -> [&'static str; 8] {
    ["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--checkpoint-tokens", every]
}

/// How many tokens of each sequence the journal has, of rows without an outcome; and the rows that have one.
fn journaled(sandbox: &Sandbox) -> (BTreeMap<(u64, u64), u64>, Vec<u64>) {
    let (mut begun, mut done) = (BTreeMap::new(), Vec::new());
    let entries = std::fs::read_dir(sandbox.path("out.job")).into_iter().flatten().filter_map(Result::ok);
    // What was being put when its writer was killed has another ending, and counts for nothing.
    let is_segment = |name: &str| name.starts_with("seg-") && !name.contains('#');
    let paths = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_segment)).map(|entry| entry.path());
    let mut names: Vec<_> = paths.collect();
    names.sort();
    for name in names {
        // A file that is just being put is not there yet.
        for line in std::fs::read_to_string(name).unwrap_or_default().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            if let Some(row) = line["row"].as_u64() {
                done.push(row);
                begun.retain(|(begun, _), _| *begun != row);
            } else if let Some(row) = line["begun"].as_u64() {
                begun.insert((row, line["part"].as_u64().unwrap()), line["end"].as_u64().unwrap());
            }
        }
    }
    (begun, done)
}

/// Tokens of a row in the output.
fn n_completed(rows: &[Value], row: u64) -> u64 {
    let id = if row == 7 { "echo".to_owned() } else { format!("row-{row}") };
    let row = rows.iter().find(|row| row["custom_id"] == id.as_str()).unwrap();
    row["response"]["body"]["usage"]["completion_tokens"].as_u64().unwrap()
}

#[test]
fn killed_rows_go_on_where_they_were() {
    let calm = Sandbox::new();
    write_rows(&calm, 120);
    calm.expect(&args("0"), 0);
    let shaken = Sandbox::new();
    write_rows(&shaken, 120);
    let args = args("8");
    let total = |begun: &BTreeMap<(u64, u64), u64>| begun.values().sum::<u64>();
    for _ in 0..4 {
        let before = total(&journaled(&shaken).0);
        let mut child = shaken.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while total(&journaled(&shaken).0) < before + 80 && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(shaken.path("out.job").exists(), "it ended before it was killed often enough");
    }
    let (begun, done) = journaled(&shaken);
    assert!(total(&begun) >= 300, "{begun:?}");
    shaken.expect(&args, 0);
    assert!(shaken.read("out.jsonl") == calm.read("out.jsonl"), "the results differ after kills");
    // What was kept was computed again as prompts are, and not drawn.
    let report: Value = serde_json::from_str(&shaken.read("out.report.json")).unwrap();
    let rows = shaken.rows("out.jsonl");
    let wanted: u64 = (0..8).filter(|row| !done.contains(row)).map(|row| n_completed(&rows, row)).sum();
    let drawn = report["estimate"]["actual"]["output_tokens"].as_u64().unwrap();
    assert_eq!((report["tokens"]["recomputed"].as_u64().unwrap(), drawn), (total(&begun), wanted - total(&begun)));
}

#[test]
fn a_signal_keeps_what_runs() {
    let calm = Sandbox::new();
    write_rows(&calm, 1000);
    calm.expect(&args("0"), 0);
    let stopped = Sandbox::new();
    write_rows(&stopped, 1000);
    // None is due before the signal.
    let args = args("1000000");
    let child = stopped.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // The shortest row is done then, the others run.
    while journaled(&stopped).1.is_empty() {
        sleep(Duration::from_millis(20));
    }
    assert!(journaled(&stopped).0.is_empty());
    signal(&child, "-TERM");
    // What runs is given five seconds to finish. A fast machine would need no more: it is let have but a part of a second of them.
    sleep(Duration::from_millis(200));
    signal(&child, "-STOP");
    sleep(Duration::from_secs(6));
    signal(&child, "-CONT");
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(143), "{}", String::from_utf8_lossy(&ended.stderr));
    let (begun, done) = journaled(&stopped);
    let kept: u64 = begun.values().sum();
    assert!(done.len() < 8 && begun.len() + done.len() >= 8, "{begun:?}, done {done:?}");
    stopped.expect(&args, 0);
    assert!(stopped.read("out.jsonl") == calm.read("out.jsonl"), "the results differ");
    let report: Value = serde_json::from_str(&stopped.read("out.report.json")).unwrap();
    let rows = stopped.rows("out.jsonl");
    let wanted: u64 = (0..8).filter(|row| !done.contains(row)).map(|row| n_completed(&rows, row)).sum();
    assert_eq!(report["estimate"]["actual"]["output_tokens"].as_u64().unwrap() + kept, wanted, "something was drawn again");
}
