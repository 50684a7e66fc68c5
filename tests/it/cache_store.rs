//! The cache of results in a store: the real program against a real S3 server on this machine. Each `machine` is a folder of
//! its own for what a machine keeps, so that the store alone carries results from one to another.

use crate::common::{Sandbox, chat_line};
use crate::faults::{Fault, S3, Seen, proxy};
use crate::s3::{self, SLOW, expect, put_slow_rows, signal, started};
use serde_json::{Value, json};
use std::fs;
use std::ops::Range;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

const CACHE: &str = "s3://bucket/c";
/// Wins over `CACHE`.
const NOWHERE: &str = "s3://nobody-has-this/c";

/// Rows with these numbers; `changed` says which are others than the usual ones.
fn rows(numbers: Range<usize>, changed: impl Fn(usize) -> bool) -> String {
    let row = |i: usize| {
        let text = if changed(i) { format!("Another question, {i}.") } else { format!("A question, {i}.") };
        chat_line(&format!("row-{i}"), &text, json!({"temperature": 1.0, "seed": i, "max_tokens": 3})) + "\n"
    };
    numbers.map(row).collect()
}

/// A machine that has the model and nothing else.
fn machine(sandbox: &Sandbox, name: &str) {
    let folder = sandbox.path(name);
    if !folder.exists() {
        fs::create_dir_all(&folder).unwrap();
        std::os::unix::fs::symlink(valar::config::cache_folder().unwrap().join("models"), folder.join("models")).unwrap();
    }
}

fn program(sandbox: &Sandbox, port: u16, on: &str, args: &[&str]) -> Command {
    machine(sandbox, on);
    let mut command = s3::command(sandbox, port, args);
    command.env("VALAR_CACHE", sandbox.path(on));
    command
}

/// A job over an input on that machine.
fn job(sandbox: &Sandbox, port: u16, on: &str, (input, output): (&str, &str), more: &[&str]) -> Command {
    let args = ["run", "-i", input, "-o", output, "--quiet", "--engine", "null", "--set", "job.window_rows=32"];
    program(sandbox, port, on, &[&args[..], more].concat())
}

fn report(sandbox: &Sandbox, output: &str) -> Value {
    serde_json::from_str(&sandbox.read(&output.replace(".jsonl", ".report.json"))).unwrap()
}

/// How many results the job found in the cache, and how many prompt tokens it computed.
fn reused(sandbox: &Sandbox, output: &str) -> (u64, u64) {
    let report = report(sandbox, output);
    (report["rows"]["reused"].as_u64().unwrap(), report["tokens"]["prefilled"].as_u64().unwrap())
}

/// Runs a job with the cache on that machine; how many results it found there.
#[track_caller]
fn n_found(sandbox: &Sandbox, server: &S3, on: &str, files: (&str, &str)) -> u64 {
    let said = expect(job(sandbox, server.port, on, files, &["--cache", CACHE]), 0);
    assert_eq!(said, "");
    reused(sandbox, files.1).0
}

fn cache(sandbox: &Sandbox, server: &S3, action: &str) -> String {
    let output = program(sandbox, server.port, "admin", &["cache", action, CACHE]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn packs(server: &S3) -> Vec<String> {
    server.keys().into_iter().filter(|key| key.starts_with("c/results-")).collect()
}

#[test]
fn what_one_machine_computed_no_other_computes() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    sandbox.write("in.jsonl", rows(0..100, |_| false));
    sandbox.write("changed.jsonl", rows(0..100, |i| [3, 50, 98].contains(&i)));
    assert_eq!(n_found(&sandbox, &server, "one", ("in.jsonl", "first.jsonl")), 0);
    assert_eq!(n_found(&sandbox, &server, "other", ("in.jsonl", "second.jsonl")), 100);
    assert_eq!(reused(&sandbox, "second.jsonl"), (100, 0), "it computed something");
    assert_eq!(sandbox.read("first.jsonl"), sandbox.read("second.jsonl"));
    assert_eq!(packs(&server).len(), 1, "what was found was put again");
    // Both machines learn what the other has computed since.
    assert_eq!(n_found(&sandbox, &server, "other", ("changed.jsonl", "third.jsonl")), 97);
    assert_eq!(n_found(&sandbox, &server, "one", ("changed.jsonl", "fourth.jsonl")), 100);
    expect(job(&sandbox, server.port, "one", ("changed.jsonl", "without.jsonl"), &[]), 0);
    assert_eq!(sandbox.read("third.jsonl"), sandbox.read("without.jsonl"));
    assert_eq!(sandbox.read("fourth.jsonl"), sandbox.read("without.jsonl"));
    let stats = cache(&sandbox, &server, "stats");
    assert!(
        stats.starts_with("103 results, ") && stats.contains(" in 2 packs of ") && stats.ends_with(" at s3://bucket/c\n"),
        "{stats}"
    );
    server.put("c/notes.txt", b"mine");
    assert!(cache(&sandbox, &server, "clear").starts_with("0 results, 0 KiB, in 0 packs "));
    assert!(packs(&server).is_empty() && server.keys().contains(&"c/notes.txt".to_owned()));
    server.delete("c/notes.txt");
    assert_eq!(n_found(&sandbox, &server, "one", ("in.jsonl", "fifth.jsonl")), 0, "a copy outlives the cache");
    // What a machine keeps of stores is seen and forgotten with what is its own.
    let own = |action: &str| {
        let output = program(&sandbox, server.port, "one", &["cache", action]).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        said.lines().map(|line| line.split_once(" results, ").unwrap().0.parse().unwrap()).collect::<Vec<u64>>()
    };
    assert_eq!((own("stats"), own("clear"), own("stats")), (vec![0, 100], vec![0, 0], vec![0, 0]));
    expect(program(&sandbox, server.port, "one", &["cache", "stats", "no/such"]), 1);
}

#[test]
fn runs_at_once_end_right_and_the_cache_has_what_both_computed() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let parts = [("a.jsonl", 0..100, "one"), ("b.jsonl", 50..150, "one"), ("c.jsonl", 100..200, "other")];
    for (name, numbers, on) in &parts {
        sandbox.write(name, rows(numbers.clone(), |_| false));
        expect(job(&sandbox, server.port, on, (name, &format!("alone-{name}")), &[]), 0);
    }
    let start = |(name, _, on): &(&str, Range<usize>, &str)| {
        let mut command = job(&sandbox, server.port, on, (name, &format!("out-{name}")), &["--cache", CACHE]);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = parts.iter().map(start).collect();
    for (child, (name, ..)) in children.into_iter().zip(&parts) {
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.code() == Some(0) && said.is_empty(), "{said}");
        assert_eq!(sandbox.read(&format!("out-{name}")), sandbox.read(&format!("alone-{name}")));
    }
    sandbox.write("all.jsonl", rows(0..200, |_| false));
    assert_eq!(n_found(&sandbox, &server, "third", ("all.jsonl", "all-out.jsonl")), 200);
    assert_eq!(n_found(&sandbox, &server, "one", ("all.jsonl", "all-again.jsonl")), 200);
}

#[test]
fn damaged_and_foreign_packs_are_passed_over_by_name() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let parts = [("a.jsonl", 0..40), ("b.jsonl", 40..80), ("c.jsonl", 80..100)];
    let mut names: Vec<String> = Vec::new();
    for (name, numbers) in parts {
        sandbox.write(name, rows(numbers, |_| false));
        n_found(&sandbox, &server, "one", (name, &format!("out-{name}")));
        names.extend(packs(&server).into_iter().filter(|key| !names.contains(key)).collect::<Vec<_>>());
    }
    assert_eq!(names.len(), 3);
    let mut damaged = server.get(&names[0]);
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x10;
    server.put(&names[0], &damaged);
    let whole = server.get(&names[1]);
    server.put(&names[1], &whole[..whole.len() - 7]);
    let foreign = names[2].replace(".pack", "0.pack");
    server.put(&foreign, b"PK something else");
    server.put("c/notes.txt", b"mine");
    sandbox.write("all.jsonl", rows(0..100, |_| false));
    expect(job(&sandbox, server.port, "one", ("all.jsonl", "without.jsonl"), &[]), 0);
    let said = expect(job(&sandbox, server.port, "other", ("all.jsonl", "out.jsonl"), &["--cache", CACHE]), 0);
    for name in [&names[0], &names[1], &foreign, "c/notes.txt"] {
        assert!(said.contains(name.rsplit('/').next().unwrap()), "{name} is not named: {said}");
    }
    assert_eq!(said.lines().count(), 4, "{said}");
    assert_eq!(reused(&sandbox, "out.jsonl").0, 20, "something of a damaged pack was used");
    assert_eq!(sandbox.read("out.jsonl"), sandbox.read("without.jsonl"));
    // The machine that had them before they were damaged is not concerned.
    let said = expect(job(&sandbox, server.port, "one", ("all.jsonl", "again.jsonl"), &["--cache", CACHE]), 0);
    assert!(!said.contains(&names[0]), "{said}");
    assert_eq!(reused(&sandbox, "again.jsonl").0, 100);
}

#[test]
fn a_store_that_is_not_there_is_an_error_and_one_that_fails_later_is_none() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    sandbox.write("in.jsonl", rows(0..50, |_| false));
    let files = ("in.jsonl", "out.jsonl");
    let forbidding = proxy(server.port, Box::new(|_| Fault::Forbidden)).0;
    for (port, place, why) in [
        (server.port, NOWHERE, "there is no such bucket"),
        (forbidding, CACHE, "cannot use the cache s3://bucket/c: can't list s3://bucket/c: forbidden"),
        (server.port, "http://127.0.0.1:1/c", "a web server can't hold a cache"),
        (server.port, "ftp://host/c", "ftp:// is not known"),
    ] {
        let said = expect(job(&sandbox, port, "one", files, &["--cache", place]), 1);
        assert!(said.contains(why), "{said}");
        assert!(!sandbox.path("out.job").exists() && !sandbox.path("out.jsonl").exists(), "{place}: something was begun");
    }
    // Results can't be put, then not be fetched, or are gone when they are; requests are answered in the end.
    let fails = |method: &'static str, fault: Fault| {
        let plan = move |seen: &Seen<'_>| {
            let is_it = seen.method == method && seen.path.contains(".pack");
            if is_it { fault } else { Fault::None }
        };
        proxy(server.port, Box::new(plan)).0
    };
    let said = expect(job(&sandbox, fails("PUT", Fault::Forbidden), "one", files, &["--cache", CACHE]), 0);
    assert!(said.contains("does not take results") && said.contains("forbidden") && said.lines().count() == 1, "{said}");
    let first = sandbox.read("out.jsonl");
    assert!(packs(&server).is_empty());
    expect(job(&sandbox, server.port, "one", ("in.jsonl", "kept.jsonl"), &["--cache", CACHE]), 0);
    assert_eq!(packs(&server).len(), 1);
    let said = expect(job(&sandbox, fails("GET", Fault::Forbidden), "b", ("in.jsonl", "b.jsonl"), &["--cache", CACHE]), 0);
    assert!(said.contains("forbidden") && said.contains("passed over") && said.lines().count() == 1, "{said}");
    let said = expect(job(&sandbox, fails("GET", Fault::Gone), "c", ("in.jsonl", "c.jsonl"), &["--cache", CACHE]), 0);
    assert_eq!(said, "");
    for output in ["kept.jsonl", "b.jsonl", "c.jsonl"] {
        assert_eq!((reused(&sandbox, output).0, sandbox.read(output)), (0, first.clone()), "{output}");
    }
    let (mut n_got, mut n_put) = (0, 0);
    let flaky = move |seen: &Seen<'_>| match seen.method {
        "GET" if seen.path.contains(".pack") => {
            n_got += 1;
            if n_got == 1 { Fault::CutBody } else { Fault::None }
        }
        "PUT" => {
            n_put += 1;
            if n_put == 1 { Fault::LostAnswer } else { Fault::None }
        }
        _ => Fault::None,
    };
    let (port, happened) = proxy(server.port, Box::new(flaky));
    sandbox.write("more.jsonl", rows(0..60, |_| false));
    let said = expect(job(&sandbox, port, "d", ("more.jsonl", "d.jsonl"), &["--cache", CACHE]), 0);
    assert_eq!((said.as_str(), reused(&sandbox, "d.jsonl").0), ("", 50));
    assert!([Fault::CutBody, Fault::LostAnswer].iter().all(|fault| happened.lock().unwrap().contains(fault)));
    assert_eq!(n_found(&sandbox, &server, "e", ("more.jsonl", "e.jsonl")), 60);
}

#[test]
fn a_pack_that_cannot_be_fetched_stops_no_other() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let mut first = None;
    for part in 0..4 {
        sandbox.write("part.jsonl", rows(20 * part..20 * (part + 1), |_| false));
        n_found(&sandbox, &server, "one", ("part.jsonl", &format!("part-{part}.jsonl")));
        first = first.or_else(|| packs(&server).pop());
    }
    sandbox.write("all.jsonl", rows(0..80, |_| false));
    // Of the fetches, those of packs that have this in their names fail.
    let through = |what: &str| {
        let what = what.to_owned();
        let plan = move |seen: &Seen<'_>| {
            if seen.method == "GET" && seen.path.contains(&what) { Fault::Forbidden } else { Fault::None }
        };
        proxy(server.port, Box::new(plan)).0
    };
    let first = first.unwrap();
    let name = first.rsplit('/').next().unwrap();
    let said = expect(job(&sandbox, through(name), "other", ("all.jsonl", "out.jsonl"), &["--cache", CACHE]), 0);
    assert!(said.contains(name) && said.contains("passed over") && said.lines().count() == 1, "{said}");
    assert_eq!(reused(&sandbox, "out.jsonl").0, 60);
    // A store that gives nothing is not asked for each.
    let said = expect(job(&sandbox, through(".pack"), "third", ("all.jsonl", "none.jsonl"), &["--cache", CACHE]), 0);
    assert_eq!((said.matches("passed over").count(), said.lines().count()), (3, 4), "{said}");
    assert!(said.contains("going on with what is here of the cache s3://bucket/c"), "{said}");
    assert_eq!(reused(&sandbox, "none.jsonl").0, 0);
}

#[test]
fn a_job_that_is_finished_or_under_way_needs_no_cache_that_can_be_reached() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    sandbox.write("in.jsonl", rows(0..5000, |_| false));
    let run = |output, more: &[&str]| job(&sandbox, server.port, "one", ("in.jsonl", output), more);
    expect(run("out.jsonl", &[]), 0);
    let before = sandbox.read("out.jsonl");
    let said = expect(run("out.jsonl", &["--cache", NOWHERE]), 0);
    assert!(said.contains("going on without the cache") && said.contains("there is no such bucket"), "{said}");
    let said = expect(run("out.jsonl", &["--cache", NOWHERE, "--restart"]), 1);
    assert!(said.contains("there is no such bucket"), "{said}");
    assert_eq!(sandbox.read("out.jsonl"), before);
    expect(run("paused.jsonl", &["--cache", CACHE, "--max-tokens", "300"]), 6);
    let said = expect(run("paused.jsonl", &["--cache", NOWHERE]), 0);
    assert!(said.contains("going on without the cache"), "{said}");
    assert_eq!(sandbox.read("paused.jsonl"), before);
}

/// Rows that are short, and unlike those of other first numbers.
fn many(first: usize) -> String {
    (first..first + 1_500).map(|i| chat_line(&i.to_string(), &format!("{i}?"), json!({"max_tokens": 1})) + "\n").collect()
}

#[test]
fn the_bound_holds_and_what_is_used_every_night_stays() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let bound = ["--cache", CACHE, "--cache-size", "1MiB"];
    // What counts is what results take unpacked: the name says it.
    let size = |key: &String| -> usize { key.split('-').nth(4).unwrap().parse().unwrap() };
    let n_bytes = || -> usize { packs(&server).iter().map(size).sum() };
    sandbox.write("nightly.jsonl", rows(0..100, |_| false));
    expect(job(&sandbox, server.port, "one", ("nightly.jsonl", "night.jsonl"), &bound), 0);
    let first = packs(&server);
    let mut n_put = 0;
    for night in 0..8 {
        let (input, output) = (format!("many-{night}.jsonl"), format!("out-{night}.jsonl"));
        sandbox.write(&input, many(night * 100_000));
        let before = packs(&server);
        expect(job(&sandbox, server.port, "one", (&input, &output), &bound), 0);
        n_put += packs(&server).iter().filter(|key| !before.contains(key)).map(size).sum::<usize>();
        assert!(n_bytes() <= 1 << 20, "{} bytes after night {night}", n_bytes());
        // The job that runs every night, each time on a machine that has nothing.
        let output = format!("night-{night}.jsonl");
        expect(job(&sandbox, server.port, &format!("new-{night}"), ("nightly.jsonl", &output), &bound), 0);
        assert_eq!(reused(&sandbox, &output), (100, 0), "night {night}");
        // Which pack is older is told by the server in whole seconds.
        sleep(Duration::from_secs(1));
    }
    assert!(n_put > 3 << 19, "{n_put} bytes test nothing");
    assert!(!packs(&server).contains(&first[0]), "the oldest pack is still there");
    // What nobody has used for longest is gone, the latest is there.
    for (input, output, is_there) in [("many-0.jsonl", "oldest.jsonl", false), ("many-7.jsonl", "latest.jsonl", true)] {
        expect(job(&sandbox, server.port, &format!("with-{output}"), (input, output), &bound), 0);
        assert_eq!(reused(&sandbox, output).0 > 1000, is_there, "{output}: {:?}", reused(&sandbox, output));
    }
}

#[test]
fn a_run_that_is_paused_or_stopped_leaves_what_it_computed() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    sandbox.write("in.jsonl", rows(0..5000, |_| false));
    let paused = ["--cache", CACHE, "--max-tokens", "300"];
    expect(job(&sandbox, server.port, "one", ("in.jsonl", "out.jsonl"), &paused), 6);
    assert_eq!(packs(&server).len(), 1);
    let n_kept: u64 = packs(&server)[0].split('-').nth(3).unwrap().parse().unwrap();
    assert!((1..5000).contains(&n_kept), "{n_kept}");
    assert_eq!(n_found(&sandbox, &server, "other", ("in.jsonl", "second.jsonl")), n_kept);
    put_slow_rows(&server);
    let before = packs(&server);
    let slow = program(&sandbox, server.port, "one", &[&SLOW[..], &["--cache", CACHE]].concat());
    let mut child = started(&server, slow);
    // Its first rows are done when the next ones are committed as far as they came.
    while !server.keys().iter().any(|key| key.contains("out.job/seg-00001-00000004")) {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
        sleep(Duration::from_millis(5));
    }
    signal(&child, "-TERM");
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(143), "{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(packs(&server).len(), before.len() + 1);
}

#[test]
fn folders_and_urls_of_files_hold_a_cache_too() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", rows(0..30, |_| false));
    let url = format!("file://{}", sandbox.path("shared").display());
    for (place, n_found) in [("own folder", [0, 30, 30]), (&url, [0, 30, 30])] {
        let machines = ["one", "one", "other"];
        for (i, (on, n_found)) in machines.into_iter().zip(n_found).enumerate() {
            let restart = ["--cache", place, "--restart"];
            expect(job(&sandbox, 1, on, ("in.jsonl", "out.jsonl"), &restart), 0);
            assert_eq!(reused(&sandbox, "out.jsonl").0, n_found, "run {i} with {place}");
        }
        for (action, n_results) in [("stats", 30), ("clear", 0)] {
            let output = program(&sandbox, 1, "one", &["cache", action, place]).output().unwrap();
            let said = String::from_utf8(output.stdout).unwrap();
            assert!(said.starts_with(&format!("{n_results} results, ")), "{place}: {said}");
        }
    }
    assert!(sandbox.path("own folder/results-1.sqlite").exists());
    // What stands where a place is expected.
    sandbox.write("job.toml", "");
    let said = expect(program(&sandbox, 1, "one", &["run", "--cache", "job.toml"]), 2);
    assert!(said.contains("job.toml is a file"), "{said}");
}
