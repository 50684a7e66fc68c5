//! kill -9 at any moment: what was committed stays, nothing is done twice, the final files are those of an undisturbed
//! run. The real program on the real model.

use crate::common::{Sandbox, chat_line};
use crate::s3::signal;
use serde_json::json;
use std::fs;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Where a run was when it was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No outcome was committed in this run.
    Starting,
    /// Outcomes were being committed.
    Decoding,
    /// The last outcome was committed, the files were not all in place.
    Finalising,
    /// It had ended by itself.
    Ended,
}

const N_ROWS: usize = 100;

fn write_input(sandbox: &Sandbox) {
    let prompts = ["Tell me about rivers.", "Tell me about the sea.", "What is a triangle?", "Name three colours.", "Why?"];
    let mut lines: Vec<String> = (0..N_ROWS)
        .map(|id| {
            // Every fourth row repeats one of the first window: where greedy, it gets that row's outcome.
            let i = if id % 4 == 3 { id % 16 } else { id };
            let extra = json!({"max_tokens": 12 + i % 23, "temperature": if i % 3 == 0 { 1.0 } else { 0.0 }, "ignore_eos": true});
            chat_line(&format!("row-{id}"), &format!("{} ({i})", prompts[i % prompts.len()]), extra)
        })
        .collect();
    lines.insert(20, "broken".to_owned());
    sandbox.write("in.jsonl", lines.join("\n"));
}

/// Few rows at a time and small windows, and a commit whenever a row has ten more tokens: a run has many moments to be killed in,
/// and after each commit there is work left, however fast the machine is.
const ARGS: [&str; 9] = [
    "run",
    "-i",
    "in.jsonl",
    "-o",
    "out.jsonl",
    "--quiet",
    "--set=engine.max_running=3",
    "--set=job.window_rows=16",
    "--checkpoint-tokens=10",
];
const OUTPUTS: [&str; 2] = ["out.jsonl", "out.errors.jsonl"];

fn start(sandbox: &Sandbox) -> Child {
    sandbox.command(&ARGS).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program starts")
}

fn n_segments(sandbox: &Sandbox) -> usize {
    let entries = fs::read_dir(sandbox.path("out.job")).into_iter().flatten();
    entries.filter_map(Result::ok).filter(|e| e.file_name().to_string_lossy().starts_with("seg-")).count()
}

/// Files of the output, staged or published.
fn is_finalising(sandbox: &Sandbox) -> bool {
    let entries = fs::read_dir(sandbox.path(".")).into_iter().flatten().filter_map(Result::ok);
    entries
        .filter_map(|e| e.file_name().into_string().ok())
        .any(|name| name.starts_with("out.jsonl") || name.starts_with("out.errors"))
}

/// Starts a run, waits for `moment`, kills it `then` later, and says where that was.
fn run_and_kill(sandbox: &Sandbox, moment: impl Fn() -> bool, then: Duration) -> Phase {
    let before = n_segments(sandbox);
    let mut child = start(sandbox);
    let deadline = Instant::now() + Duration::from_mins(5);
    while !moment() && child.try_wait().expect("a child").is_none() {
        assert!(Instant::now() < deadline, "the run does not get on");
        std::hint::spin_loop();
    }
    sleep(then);
    let ended = child.try_wait().expect("a child").is_some();
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    match ended {
        true => Phase::Ended,
        false if is_finalising(sandbox) => Phase::Finalising,
        false if n_segments(sandbox) > before => Phase::Decoding,
        false => Phase::Starting,
    }
}

/// Copies the journal, so that the end of a job can be tried again and again.
fn copy_journal(sandbox: &Sandbox, from: &str, to: &str) {
    fs::create_dir_all(sandbox.path(to)).expect("a folder");
    for entry in fs::read_dir(sandbox.path(from)).expect("the journal").filter_map(Result::ok) {
        fs::copy(entry.path(), sandbox.path(to).join(entry.file_name())).expect("a copy");
    }
}

#[test]
fn killed_runs_end_with_the_files_of_an_undisturbed_one() {
    let calm = Sandbox::new();
    write_input(&calm);
    calm.expect(&ARGS, 3);
    let expected = OUTPUTS.map(|name| calm.read(name));
    assert_eq!((expected[0].lines().count(), expected[1].lines().count()), (N_ROWS, 1));

    let shaken = Sandbox::new();
    write_input(&shaken);
    let mut phases = vec![run_and_kill(&shaken, || true, Duration::from_millis(5))];
    for pause_ms in [0, 30, 120, 0] {
        let before = n_segments(&shaken);
        phases.push(run_and_kill(&shaken, || n_segments(&shaken) > before, Duration::from_millis(pause_ms)));
    }
    copy_journal(&shaken, "out.job", "kept");
    for attempt in 0..8 {
        phases.push(run_and_kill(&shaken, || is_finalising(&shaken), Duration::from_micros(700 * attempt)));
        let said = shaken.expect(&ARGS, 3);
        for (name, expected) in OUTPUTS.iter().zip(&expected) {
            assert!(shaken.read(name) == *expected, "{name} differs after kills while {phases:?}: {said}");
        }
        assert!(!shaken.path("out.job").exists());
        if phases.iter().filter(|&&phase| phase == Phase::Finalising).count() == 2 {
            break;
        }
        OUTPUTS.iter().chain(&["out.report.json"]).for_each(|name| fs::remove_file(shaken.path(name)).expect("it is there"));
        copy_journal(&shaken, "kept", "out.job");
    }
    println!("killed while {phases:?}");
    let n = |wanted: Phase| phases.iter().filter(|&&phase| phase == wanted).count();
    assert!(n(Phase::Decoding) >= 4 && n(Phase::Finalising) >= 1, "kills at other moments than meant: {phases:?}");
}

#[test]
fn a_signal_stops_the_run_in_good_order() {
    let sandbox = Sandbox::new();
    write_input(&sandbox);
    let mut child = start(&sandbox);
    while n_segments(&sandbox) == 0 {
        assert!(child.try_wait().expect("a child").is_none(), "it ended before it was told to");
        sleep(Duration::from_millis(5));
    }
    signal(&child, "-TERM");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(143), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(sandbox.path("out.job/manifest-00001.json").exists() && !sandbox.path("out.jsonl").exists());
    // A changed job is refused, in words; the same one goes on.
    let mut changed = ARGS.to_vec();
    changed.extend(["--set", "sampling.top_k=3"]);
    let said = sandbox.expect(&changed, 1);
    assert!(said.contains("sampling.top_k") && said.contains("--restart"), "{said}");
    sandbox.expect(&ARGS, 3);
    assert_eq!(sandbox.rows("out.jsonl").len(), N_ROWS);
}

#[test]
fn two_runs_of_one_job_do_not_collide() {
    let sandbox = Sandbox::new();
    write_input(&sandbox);
    let mut child = start(&sandbox);
    while n_segments(&sandbox) == 0 {
        assert!(child.try_wait().expect("a child").is_none(), "it ended before the other came");
        sleep(Duration::from_millis(5));
    }
    // It does not get on, and still has its lock.
    signal(&child, "-STOP");
    let said = sandbox.expect(&ARGS, 4);
    assert!(said.contains("another run is at this job"), "{said}");
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
}
