//! What machines do to a job: a disk that is full, clocks that jump, a journal of another version. The job stops with a clear
//! error or does not mind, nothing is lost, and the outputs are those of a calm run.

use crate::common::{Sandbox, chat_line};
use crate::faults::S3;
use crate::s3;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// Runs a shell script where it may mount: as root or in a name space of its own. `None` if this system allows neither.
fn with_mounts(sandbox: &Sandbox, script: &str) -> Option<String> {
    let allowed = |command: &mut Command| command.args(["true"]).status().is_ok_and(|status| status.success());
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--mount"]);
    let mut private = Command::new("unshare");
    private.arg("--mount");
    let (mut probe, mut private_probe) = (Command::new("unshare"), Command::new("unshare"));
    let mut command = if allowed(private_probe.arg("--mount")) {
        private
    } else if allowed(probe.args(["--user", "--map-root-user", "--mount"])) {
        unshare
    } else {
        return None;
    };
    command.args(["sh", "-e", "-c", script]).current_dir(sandbox.path(".")).env("SOURCE_DATE_EPOCH", "1700000000");
    let output = command.env("VALAR", env!("CARGO_BIN_EXE_valar")).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if said.contains("cannot mount here") {
        return None;
    }
    assert!(output.status.success(), "{said}");
    Some(said)
}

#[test]
fn a_full_disk_stops_a_job_that_goes_on_when_there_is_room() {
    let sandbox = Sandbox::new();
    let rows: String =
        (0..3000).map(|i| json!({"id": i, "q": format!("Row {i}?"), "pad": "x ".repeat(200)}).to_string() + "\n").collect();
    sandbox.write("in.jsonl", rows);
    fs::create_dir(sandbox.path("small")).unwrap();
    let job = |output: &str, parts: &str| {
        let set = "-q --engine=null --set=prompt.text='{{ q }}' --set=job.window_rows=500";
        format!("$VALAR run -i in.jsonl -o {output} {set} {parts}")
    };
    let mut script = "mount -t tmpfs -o size=1m tmpfs small || { echo cannot mount here; exit 1; }\n".to_owned();
    for (name, parts) in [("one", ""), ("parts", "--parts=400")] {
        let (calm, small) = (job(&format!("calm-{name}.jsonl"), parts), job(&format!("small/{name}.jsonl"), parts));
        // With 1 MiB the journal is too much, with 3 MiB the files beside it are.
        let run = format!(
            "{calm}\n\
             mount -o remount,size=1m small\n\
             code=0; {small} || code=$?; test $code = 1\n\
             mount -o remount,size=3m small\n\
             code=0; {small} || code=$?; test $code = 1\n\
             test ! -e small/{name}.report.json\n\
             mount -o remount,size=64m small\n\
             {small}\n\
             diff -r calm-{name}.jsonl small/{name}.jsonl\n\
             diff calm-{name}.errors.jsonl small/{name}.errors.jsonl\n\
             test ! -e small/{name}.job\n\
             rm -r small/*\n"
        );
        script.push_str(&run);
    }
    match with_mounts(&sandbox, &script) {
        Some(said) => {
            let n = said.matches("No space left on device").count();
            assert!(n >= 4, "the disk was full {n} times: {said}");
        }
        None => eprintln!("SKIPPED: neither root nor user name spaces: no small disk can be mounted here"),
    }
}

/// A library that makes the time of day jump between `CLOCK_SHIFT` seconds from now and as many before, every few looks.
fn jumping_clock(sandbox: &Sandbox) -> PathBuf {
    sandbox.write(
        "clock.c",
        r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    static long looks;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, t);
    if (id == CLOCK_REALTIME) {
        long shift = atol(getenv("CLOCK_SHIFT"));
        t->tv_sec += looks++ / 5 % 2 ? -shift : shift;
    }
    return result;
}
"#,
    );
    let library = sandbox.path("clock.so");
    let mut build = Command::new("cc");
    build.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(sandbox.path("clock.c")).arg("-ldl");
    assert!(build.status().unwrap().success(), "a C compiler is needed, as for building");
    library
}

const TEN_YEARS: i64 = 10 * 365 * 86_400;

#[test]
fn clocks_that_jump_change_nothing() {
    let sandbox = Sandbox::new();
    let library = jumping_clock(&sandbox);
    let line = |i| chat_line(&format!("row-{i}"), &format!("Say {i}."), json!({"max_tokens": 120, "ignore_eos": true}));
    sandbox.write("in.jsonl", (0..24).map(line).collect::<Vec<_>>().join("\n"));
    let args = |output: &'static str| {
        // Committed by how far rows came: on a fast machine the job would be done before time alone says so.
        let often = ["--checkpoint-tokens=20", "--set=engine.max_running=3", "--set=job.window_rows=8"];
        [&["run", "-i", "in.jsonl", "-o", output, "--quiet"], &often[..]].concat()
    };
    let jumping = |args: &[&str], shift: i64| {
        let mut command = sandbox.command(args);
        command.env("LD_PRELOAD", &library).env("CLOCK_SHIFT", shift.to_string());
        command
    };
    // The jumps are there: a job without a date of its own is dated by them.
    let null = [&args("dated.jsonl")[..], &["--engine=null"]].concat();
    assert!(jumping(&null, TEN_YEARS).env_remove("SOURCE_DATE_EPOCH").status().unwrap().success());
    let created = sandbox.rows("dated.jsonl")[0]["response"]["body"]["created"].as_i64().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!((created - now).abs() > TEN_YEARS / 2, "{created} is not far from {now}");

    sandbox.expect(&args("calm.jsonl"), 0);
    let n_segments = || {
        let names = fs::read_dir(sandbox.path("out.job")).into_iter().flatten().filter_map(Result::ok);
        // Not those that are being put.
        let is_whole = |name: &str| name.starts_with("seg-") && !name.contains('#');
        names.filter(|entry| is_whole(&entry.file_name().to_string_lossy())).count()
    };
    for shift in [TEN_YEARS, -TEN_YEARS] {
        let before = n_segments();
        let mut child = jumping(&args("out.jsonl"), shift).stderr(Stdio::piped()).spawn().unwrap();
        while n_segments() == before && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(n_segments() > 0, "nothing was committed");
    assert!(jumping(&args("out.jsonl"), 3600).status().unwrap().success());
    assert!(sandbox.read("out.jsonl") == sandbox.read("calm.jsonl"), "the outputs differ");
}

#[test]
fn leases_do_not_ask_what_time_it_is() {
    let (server, calm, sandbox) = (S3::start(), S3::start(), Sandbox::new());
    let library = jumping_clock(&sandbox);
    s3::put_slow_rows(&server);
    s3::put_slow_rows(&calm);
    s3::expect(s3::command(&sandbox, calm.port, &s3::SLOW), 0);
    let by = |port: u16, more: &[&str], shift: i64| {
        let mut command = s3::command(&sandbox, port, &[&s3::SLOW[..], &s3::LEASE, more].concat());
        command.env("LD_PRELOAD", &library).env("CLOCK_SHIFT", shift.to_string());
        command
    };
    let with = |more: &[&str], shift: i64| by(server.port, more, shift);
    // Its clock is far from those of the others; as long as it lives nobody takes it for dead, and no longer.
    let held_up = s3::HeldUp::new(&server);
    let first = s3::started(&server, by(held_up.port, &[], TEN_YEARS));
    held_up.wait();
    // For longer than it may be silent.
    sleep(Duration::from_secs(8));
    s3::expect(with(&[], -TEN_YEARS), 4);
    s3::signal(&first, "-STOP");
    s3::expect(with(&["--if-running", "wait"], -TEN_YEARS), 0);
    assert!(server.get("out.jsonl") == calm.get("out.jsonl"), "the outputs differ");
    held_up.let_go(&server);
    s3::signal(&first, "-CONT");
    assert_eq!(first.wait_with_output().unwrap().status.code(), Some(4));
    assert!(server.get("out.jsonl") == calm.get("out.jsonl"), "the outputs differ after it came back");
    s3::check_tidy(&server, "out.");
}

#[test]
fn a_journal_of_another_version_is_refused_and_can_be_thrown_away() {
    let sandbox = Sandbox::new();
    let rows: String = (0..2000).map(|i| json!({"q": format!("Row {i}, and some more?")}).to_string() + "\n").collect();
    sandbox.write("in.jsonl", rows);
    let args = |output: &'static str, more: &[&'static str]| {
        let job = ["run", "-i", "in.jsonl", "-o", output, "--quiet", "--engine=null", "--set=prompt.text={{ q }}"];
        [&job[..], &["--set=job.window_rows=100"], more].concat()
    };
    sandbox.expect(&args("calm.jsonl", &[]), 0);
    sandbox.expect(&args("out.jsonl", &["--max-tokens=4000"]), 6);
    let name = "out.job/manifest-00001.json";
    let mut manifest: Value = serde_json::from_str(&sandbox.read(name)).unwrap();
    let form = manifest["format_version"].as_u64().unwrap();
    for other in [form - 1, form + 1] {
        manifest["format_version"] = other.into();
        sandbox.write(name, manifest.to_string());
        let said = sandbox.expect(&args("out.jsonl", &[]), 1);
        assert!(said.contains(name) && said.contains(&format!("form {other}")) && said.contains("--restart"), "{said}");
    }
    // Written by another version in the same form: what its rows would be is not known.
    manifest["format_version"] = form.into();
    manifest["valar_version"] = "0.0.1".into();
    sandbox.write(name, manifest.to_string());
    let said = sandbox.expect(&args("out.jsonl", &[]), 1);
    assert!(said.contains("valar version: 0.0.1"), "{said}");
    sandbox.expect(&args("out.jsonl", &["--restart"]), 0);
    assert!(sandbox.read("out.jsonl") == sandbox.read("calm.jsonl"), "the outputs differ");

    // As the first versions wrote it.
    fs::create_dir(sandbox.path("old.job")).unwrap();
    sandbox.write("old.job/manifest.json", "{}");
    sandbox.write("old.job/seg-00000001.jsonl", "{}");
    let said = sandbox.expect(&args("old.jsonl", &[]), 1);
    assert!(said.contains("older valar"), "{said}");
    sandbox.expect(&args("old.jsonl", &["--restart"]), 0);
    assert!(sandbox.read("old.jsonl") == sandbox.read("calm.jsonl") && !sandbox.path("old.job").exists());
}
