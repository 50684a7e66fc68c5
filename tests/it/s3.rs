//! Jobs whose files are in object stores: the real program against a real S3 server on this machine, directly and through
//! a proxy that fails. Outputs are compared byte for byte with those of the same job on the local disk.

use crate::common::{Sandbox, chat_line, golden, model_path};
use crate::faults::{Fault, Gate, S3, proxy};
use serde_json::{Value, json};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

const SECRET: &str = "wJalrXUtnFEMI-secret";

/// The program with the environment of somebody who uses this server.
pub(crate) fn command(sandbox: &Sandbox, port: u16, args: &[&str]) -> Command {
    let mut command = sandbox.command(args);
    command
        .env("AWS_ACCESS_KEY_ID", "AKIATEST")
        .env("AWS_SECRET_ACCESS_KEY", SECRET)
        .env("AWS_SESSION_TOKEN", SECRET)
        .env("AWS_REGION", "us-east-1")
        .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"))
        .env("AWS_ALLOW_HTTP", "true")
        .env("NO_PROXY", "127.0.0.1");
    command
}

#[track_caller]
pub(crate) fn expect(mut command: Command, code: i32) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!said.contains(SECRET), "a secret is shown: {said}");
    said
}

/// Dataset rows that make an output of over 10 MB: more than one part.
fn rows(from: usize, n: usize) -> String {
    let pad = |i: usize| format!("{i} ").repeat(400);
    (from..from + n).map(|i| json!({"id": i, "q": format!("Row {i}?"), "pad": pad(i)}).to_string() + "\n").collect()
}

const NULL: [&str; 9] =
    ["--quiet", "--engine", "null", "--set", "prompt.text={{ q }}", "--set", "sampling.max_tokens=2", "--set", "job.seed=3"];

fn null_job<'a>(input: &'a str, output: &'a str) -> Vec<&'a str> {
    ["run", "-i", input, "-o", output].into_iter().chain(NULL).collect()
}

/// Two input files in the sandbox and on the server, and the local outputs.
fn prepare(server: &S3, sandbox: &Sandbox, output: &str) -> Vec<u8> {
    std::fs::create_dir_all(sandbox.path("in")).unwrap();
    for (name, text) in [("in/a.jsonl", rows(0, 2500)), ("in/b.jsonl", rows(2500, 2500))] {
        sandbox.write(name, &text);
        server.put(name, text.as_bytes());
    }
    sandbox.expect(&null_job("in/*.jsonl", output), 0);
    std::fs::read(sandbox.path(output)).unwrap()
}

/// Only results, errors and report are left, and the lease, which nobody holds.
#[track_caller]
pub(crate) fn check_tidy(server: &S3, stem: &str) {
    let keys: Vec<String> = server.keys().into_iter().filter(|key| key.starts_with(stem)).collect();
    let in_job: Vec<&str> = keys.iter().filter_map(|key| key.split_once(".job/")).map(|(_, name)| name).collect();
    assert!(keys.len() == 4 && in_job == ["lease.json"], "{keys:?}");
    let lease: Value = serde_json::from_slice(&server.get(&format!("{stem}job/lease.json"))).unwrap();
    assert!(lease["held"] == false && lease["job"].is_null(), "{lease}");
    assert_eq!(server.uploads(), [""; 0], "parts of uploads are left");
}

#[test]
fn outputs_on_s3_are_those_of_a_local_job() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let wanted = prepare(&server, &sandbox, "out.jsonl");
    assert!(wanted.len() > 9 << 20, "{} bytes are one part", wanted.len());
    for (input, output) in [("s3://bucket/in/*.jsonl", "s3://bucket/a/out.jsonl"), ("s3://bucket/in/", "s3://bucket/b/out.jsonl")]
    {
        expect(command(&sandbox, server.port, &null_job(input, output)), 0);
        assert!(server.get(&output["s3://bucket/".len()..]) == wanted, "{output} differs");
    }
    check_tidy(&server, "a/out.");
    // A web server, as which this one may be seen too; and Parquet out and in.
    let (a, b) = (server.url("in/a.jsonl"), server.url("in/b.jsonl"));
    let mut args = null_job(&a, "s3://bucket/c/out.parquet");
    args.extend(["-i", &b]);
    expect(command(&sandbox, server.port, &args), 0);
    sandbox.expect(&null_job("in/*.jsonl", "out.parquet"), 0);
    assert!(server.get("c/out.parquet") == std::fs::read(sandbox.path("out.parquet")).unwrap(), "out.parquet differs");
    server.put("in/c.parquet", &server.get("c/out.parquet"));
    let again = ["--set", "output.prefix=again_"];
    let remote = [&null_job("s3://bucket/in/c.parquet", "s3://bucket/d/out.jsonl")[..], &again].concat();
    expect(command(&sandbox, server.port, &remote), 0);
    sandbox.expect(&[&null_job("out.parquet", "again.jsonl")[..], &again].concat(), 0);
    assert!(server.get("d/out.jsonl") == std::fs::read(sandbox.path("again.jsonl")).unwrap(), "again.jsonl differs");
}

#[test]
fn a_store_that_fails_loses_and_doubles_nothing() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let wanted = prepare(&server, &sandbox, "out.jsonl");
    let mut n = 0;
    let (mut cut, mut slow, mut lost) = (0, 0, Vec::new());
    let plan = move |seen: &crate::faults::Seen<'_>| {
        n += 1;
        let kind = format!("{} {}", seen.method, seen.path.split(['=', '&']).next().unwrap_or_default());
        let loses = seen.method == "PUT" || seen.method == "POST" && !seen.path.contains("uploads");
        match seen.method {
            // A burst every now and then.
            _ if (4..7).contains(&(n % 20)) => Fault::Busy,
            "GET" if seen.path.contains("/in/") && cut < 4 => {
                cut += 1;
                Fault::CutBody
            }
            "GET" if seen.path.contains("/in/") && slow < 2 => {
                slow += 1;
                Fault::SlowBody
            }
            // The upload was completed, the answer lost, and this is the second time.
            "POST" if seen.path.contains("uploadId") && lost.contains(&kind) => Fault::Gone,
            // The first of each kind: the manifest, a segment, a part, the completed upload, a deletion.
            _ if loses && !lost.contains(&kind) => {
                lost.push(kind);
                Fault::LostAnswer
            }
            _ => Fault::None,
        }
    };
    let (port, happened) = proxy(server.port, Box::new(plan));
    expect(command(&sandbox, port, &null_job("s3://bucket/in/*.jsonl", "s3://bucket/out.jsonl")), 0);
    assert!(server.get("out.jsonl") == wanted, "the output differs");
    check_tidy(&server, "out.");
    let happened = happened.lock().unwrap();
    for (fault, least) in [(Fault::Busy, 3), (Fault::CutBody, 4), (Fault::SlowBody, 2), (Fault::LostAnswer, 5), (Fault::Gone, 1)]
    {
        let n = happened.iter().filter(|&&f| f == fault).count();
        assert!(n >= least, "{fault:?} happened {n} times in {} requests", happened.len());
    }
}

#[test]
fn errors_are_run_again_on_s3() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    prepare(&server, &sandbox, "unused.jsonl");
    let (small, large) = ("--set=input.max_line_bytes=1800", "--set=input.max_line_bytes=100000");
    let retry = |input: &'static str, output: &'static str, limit: &'static str| {
        [&["retry", "--errors"], &null_job(input, output)[1..], &[limit]].concat()
    };
    sandbox.expect(&[&null_job("in/*.jsonl", "out.jsonl")[..], &[small]].concat(), 3);
    sandbox.expect(&retry("in/*.jsonl", "out.jsonl", large), 0);
    let (input, output) = ("s3://bucket/in/*.jsonl", "s3://bucket/out.jsonl");
    expect(command(&sandbox, server.port, &[&null_job(input, output)[..], &[small]].concat()), 3);
    let before = server.get("out.jsonl");
    assert!(String::from_utf8(before).unwrap().lines().count() == 1000, "the input tests nothing");
    expect(command(&sandbox, server.port, &retry(input, output, large)), 0);
    assert!(server.get("out.jsonl") == std::fs::read(sandbox.path("out.jsonl")).unwrap(), "the outputs differ");
    check_tidy(&server, "out.");
}

#[test]
fn parts_on_s3_are_those_of_a_local_job() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let wanted = prepare(&server, &sandbox, "out.jsonl");
    let args = [&null_job("s3://bucket/in/*.jsonl", "s3://bucket/out.jsonl")[..], &["--parts=500"]].concat();
    let n_parts = || server.keys().iter().filter(|key| key.starts_with("out.jsonl/part-")).count();
    for n in [1, 6] {
        // It gets no further than that, and is killed there.
        let mut n_completed = 0;
        let plan = move |seen: &crate::faults::Seen<'_>| {
            let completes = seen.method == "POST" && seen.path.contains("/part-") && seen.path.contains("uploadId");
            n_completed += usize::from(completes);
            if completes && n_completed > n { Fault::Hang } else { Fault::None }
        };
        let (port, happened) = proxy(server.port, Box::new(plan));
        let mut child = command(&sandbox, port, &args).stderr(Stdio::piped()).spawn().unwrap();
        while !happened.lock().unwrap().contains(&Fault::Hang) || n_parts() < n {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
            sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!server.keys().contains(&"out.jsonl/_SUCCESS".to_owned()), "the list came before the last part");
        let lease: Value = serde_json::from_slice(&server.get("out.job/lease.json")).unwrap();
        assert!(lease["uploads"].as_array().unwrap().len() <= 4, "{lease}");
    }
    expect(command(&sandbox, server.port, &args), 0);
    let list: Value = serde_json::from_slice(&server.get("out.jsonl/_SUCCESS")).unwrap();
    let parts = list["parts"].as_array().unwrap();
    let joined: Vec<u8> =
        parts.iter().flat_map(|part| server.get(&format!("out.jsonl/{}", part["name"].as_str().unwrap()))).collect();
    assert!(parts.len() == 10 && n_parts() == 10 && joined == wanted, "the parts are not the file");
    // A run that is killed just when it has begun an upload has not written down its id: that upload stays, without a part.
    assert!(server.uploads().len() <= 2, "uploads are left");
    // As an input, with and without the slash.
    let again = ["--set", "output.prefix=again_", "--restart"];
    sandbox.expect(&[&null_job("out.jsonl", "again.jsonl")[..], &again].concat(), 0);
    for input in ["s3://bucket/out.jsonl", "s3://bucket/out.jsonl/"] {
        expect(command(&sandbox, server.port, &[&null_job(input, "from_s3.jsonl")[..], &again].concat()), 0);
        assert!(sandbox.read("from_s3.jsonl") == sandbox.read("again.jsonl"), "{input} is read as something else");
    }
    server.delete("out.jsonl/_SUCCESS");
    let said = expect(command(&sandbox, server.port, &[&null_job("s3://bucket/out.jsonl/", "x.jsonl")[..], &again].concat()), 1);
    assert!(said.contains("not published them yet"), "{said}");
}

/// Rows of the real model that are committed often, by how far they came and not by time: however fast the machine is, a run
/// that has committed something has more to do.
pub(crate) const SLOW: [&str; 14] = [
    "run",
    "-i",
    "s3://bucket/in.jsonl",
    "-o",
    "s3://bucket/out.jsonl",
    "--quiet",
    "--set",
    "job.seed=3",
    "--set",
    "engine.max_running=3",
    "--set",
    "job.window_rows=16",
    "--checkpoint-tokens",
    "8",
];

/// Seconds after which a silent run is taken for dead: many times what a busy machine keeps one waiting.
pub(crate) const LEASE: [&str; 2] = ["--lease", "6"];

pub(crate) fn put_slow_rows(server: &S3) {
    let line = |i| chat_line(&format!("row-{i}"), &format!("Say {i}."), json!({"max_tokens": 24, "ignore_eos": true}));
    server.put("in.jsonl", (0..40).map(line).collect::<Vec<_>>().join("\n").as_bytes());
}

/// A way to the server on which the first run of a job gets no further than its first segment, however fast the machine is.
pub(crate) struct HeldUp {
    pub(crate) port: u16,
    gate: Gate,
    happened: Arc<Mutex<Vec<Fault>>>,
}

/// The segment that is held up.
const SECOND: &str = "out.job/seg-00001-00000002.jsonl";

impl HeldUp {
    pub(crate) fn new(server: &S3) -> Self {
        let gate = Gate::closed();
        let plan = move |seen: &crate::faults::Seen<'_>| {
            let is_second = seen.method == "PUT" && seen.path.contains(SECOND);
            if is_second { Fault::Held(gate) } else { Fault::None }
        };
        let (port, happened) = proxy(server.port, Box::new(plan));
        Self { port, gate, happened }
    }

    /// Waits until the run is held up.
    pub(crate) fn wait(&self) {
        while !self.happened.lock().unwrap().contains(&Fault::Held(self.gate)) {
            sleep(Duration::from_millis(5));
        }
    }

    /// Lets it go on; returns when the server has what was held up.
    pub(crate) fn let_go(&self, server: &S3) {
        self.gate.open();
        while !server.keys().iter().any(|key| key == SECOND) {
            sleep(Duration::from_millis(5));
        }
    }
}

fn n_segments(server: &S3) -> usize {
    server.keys().iter().filter(|key| key.contains("out.job/seg-")).count()
}

/// A run that has committed something since it was started.
pub(crate) fn started(server: &S3, mut command: Command) -> Child {
    let before = n_segments(server);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_mins(5);
    while n_segments(server) == before {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was disturbed");
        assert!(Instant::now() < deadline, "the run does not get on");
        sleep(Duration::from_millis(5));
    }
    child
}

pub(crate) fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn one_run_at_a_time_and_one_that_stalls_is_replaced() {
    let (server, calm, sandbox) = (S3::start(), S3::start(), Sandbox::new());
    put_slow_rows(&server);
    put_slow_rows(&calm);
    expect(command(&sandbox, calm.port, &SLOW), 0);
    let with = |more: &[&str]| command(&sandbox, server.port, &[&SLOW[..], &LEASE, more].concat());
    let held_up = HeldUp::new(&server);
    let first = started(&server, command(&sandbox, held_up.port, &[&SLOW[..], &LEASE].concat()));
    held_up.wait();
    let said = expect(with(&[]), 4);
    assert!(said.contains("another run is at this job: process "), "{said}");
    signal(&first, "-STOP");
    // It does not know that the first one will come back.
    let second = with(&["--if-running", "wait"]).stderr(Stdio::piped()).spawn().unwrap();
    let ended = second.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
    assert!(server.get("out.jsonl") == calm.get("out.jsonl"), "the outputs differ");
    // What it was putting arrives when nobody waits for it any more.
    held_up.let_go(&server);
    signal(&first, "-CONT");
    let ended = first.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(4) && said.contains("taken this job over"), "{said}");
    assert!(server.get("out.jsonl") == calm.get("out.jsonl"), "the outputs differ after it came back");
    expect(command(&sandbox, server.port, &SLOW), 0);
    check_tidy(&server, "out.");
}

#[test]
fn requests_that_hang_do_not_end_a_tenure() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    put_slow_rows(&server);
    let (mut n_leases, mut n_uploads) = (0, 0);
    let (gate, n_silenced) = (Gate::closed(), Arc::new(AtomicU32::new(0)));
    let counter = Arc::clone(&n_silenced);
    // The look for a wish to stop never comes back, nor do two signs of life, nor the word of an upload.
    let plan = move |seen: &crate::faults::Seen<'_>| match seen.method {
        "GET" if seen.path.contains("out.job/cancel") => Fault::Hang,
        "PUT" if seen.path.contains(SECOND) => Fault::Held(gate),
        "POST" if seen.path.ends_with("?uploads") || seen.path.ends_with("?uploads=") => {
            n_uploads += 1;
            Fault::None
        }
        "PUT" if seen.path.contains("out.job/lease.json") => {
            n_leases += 1;
            let is_word = n_uploads == 1;
            n_uploads += u32::from(is_word);
            let is_sign = [6, 9].contains(&n_leases);
            counter.fetch_add(u32::from(is_sign), SeqCst);
            if is_sign || is_word { Fault::Hang } else { Fault::None }
        }
        _ => Fault::None,
    };
    let (port, happened) = proxy(server.port, Box::new(plan));
    let lease = [&SLOW[..], &LEASE].concat();
    let mut first = started(&server, command(&sandbox, port, &lease));
    // From then on it is silent for long enough, if it has to wait for that sign.
    while n_silenced.load(SeqCst) < 2 {
        assert!(first.try_wait().unwrap().is_none(), "it ended before it was disturbed");
        sleep(Duration::from_millis(20));
    }
    let said = expect(command(&sandbox, server.port, &lease), 4);
    assert!(said.contains("another run is at this job"), "{said}");
    // One that would take over from a silent run waits to its end.
    let waits = command(&sandbox, server.port, &[&lease[..], &["--if-running", "wait"]].concat()).spawn().unwrap();
    gate.open();
    let ended = first.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(waits.wait_with_output().unwrap().status.code(), Some(0));
    assert!(happened.lock().unwrap().iter().filter(|&&fault| fault == Fault::Hang).count() >= 3);
}

#[test]
fn a_store_without_conditions_is_refused() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let wanted = prepare(&server, &sandbox, "out.jsonl");
    // Nor does it take empty parts of uploads: the errors of a job without any would be one.
    let is_empty_part = |seen: &crate::faults::Seen<'_>| seen.n_body == 0 && seen.path.contains("partNumber");
    let plan = move |seen: &crate::faults::Seen<'_>| if is_empty_part(seen) { Fault::Empty } else { Fault::Unconditional };
    let (ignoring, _) = proxy(server.port, Box::new(plan));
    let args = null_job("s3://bucket/in/*.jsonl", "s3://bucket/out.jsonl");
    let said = expect(command(&sandbox, ignoring, &args), 1);
    assert!(said.contains("does not honour conditional writes") && said.contains("--unguarded"), "{said}");
    expect(command(&sandbox, ignoring, &[&args[..], &["--unguarded"]].concat()), 0);
    assert!(server.get("out.jsonl") == wanted, "the output differs");
    check_tidy(&server, "out.");
}

#[test]
fn a_killed_job_on_s3_goes_on_where_it_was() {
    let (server, calm, sandbox) = (S3::start(), S3::start(), Sandbox::new());
    put_slow_rows(&server);
    put_slow_rows(&calm);
    let args = &SLOW;
    // The same job on a server of its own, undisturbed: ids are made of the input's URL, too.
    expect(command(&sandbox, calm.port, args), 0);
    for _ in 0..2 {
        let mut child = started(&server, command(&sandbox, server.port, args));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(!server.keys().contains(&"out.jsonl".to_owned()));
    expect(command(&sandbox, server.port, args), 0);
    assert!(server.get("out.jsonl") == calm.get("out.jsonl"), "the outputs differ");
    check_tidy(&server, "out.");
}

#[test]
fn a_model_is_fetched_from_s3_once() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    server.put("m/tiny.gguf", &std::fs::read(model_path()).unwrap());
    sandbox.write("in.jsonl", rows(0, 3));
    let mut args = null_job("in.jsonl", "out.jsonl");
    args.extend(["--model", "s3://bucket/m/tiny.gguf", "--restart"]);
    args.retain(|arg| *arg != "--quiet");
    let run = || {
        let mut command = command(&sandbox, server.port, &args);
        command.env("VALAR_CACHE", sandbox.path("cache"));
        expect(command, 0)
    };
    assert!(run().contains("fetching s3://bucket/m/tiny.gguf"));
    assert!(!run().contains("fetching"));
}

#[test]
fn a_model_folder_is_fetched_from_s3_as_it_is_now() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    let put = |family: &str| {
        for name in ["config.json", "model.safetensors"] {
            server.put(&format!("m/tiny/{name}"), &std::fs::read(golden("models").join(family).join(name)).unwrap());
        }
    };
    let inspect = |url: &str, code| {
        let mut command = command(&sandbox, server.port, &["inspect", url]);
        command.env("VALAR_CACHE", sandbox.path("cache"));
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let letters: serde_json::Map<_, _> = ('a'..='z').zip(0..).map(|(letter, id)| (letter.to_string(), json!(id))).collect();
    let split = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let model = json!({"type": "BPE", "vocab": letters, "merges": []});
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "decoder": split, "model": model});
    server.put("m/tiny/tokenizer.json", tokenizer.to_string().as_bytes());
    put("qwen2");
    server.put("m/tiny/README.md", b"not fetched");
    let (said, on_the_way) = inspect("s3://bucket/m/tiny/", 0);
    assert!(said.contains("qwen2") && on_the_way.contains("fetching s3://bucket/m/tiny/"), "{said}{on_the_way}");
    assert_eq!(inspect("s3://bucket/m/tiny/", 0), (said.clone(), String::new()));
    put("gemma3");
    let (said, on_the_way) = inspect("s3://bucket/m/tiny/", 0);
    assert!(said.contains("gemma3") && on_the_way.contains("fetching"), "{said}{on_the_way}");
    server.delete("m/tiny/config.json");
    let (_, why) = inspect("s3://bucket/m/tiny/", 1);
    assert!(why.contains("neither a .gguf file nor a folder with config.json"), "{why}");
}

#[test]
fn what_is_wrong_is_said_without_secrets() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    sandbox.write("in.jsonl", rows(0, 3));
    let said = |port: u16, input: &str, output: &str| expect(command(&sandbox, port, &null_job(input, output)), 1);
    let text = said(server.port, "in.jsonl", "s3://nobody-has-this/out.jsonl");
    assert!(text.contains("s3://nobody-has-this/out.jsonl") && text.contains("no such bucket"), "{text}");
    let text = said(server.port, "s3://bucket/none.jsonl", "out.jsonl");
    assert!(text.contains("s3://bucket/none.jsonl: no such file"), "{text}");
    let (forbidding, _) = proxy(server.port, Box::new(|_| Fault::Forbidden));
    let text = said(forbidding, "s3://bucket/in.jsonl", "out.jsonl");
    assert!(text.contains("forbidden"), "{text}");
    let text = said(forbidding, "in.jsonl", "s3://bucket/out.jsonl");
    assert!(text.contains("forbidden (AccessDenied)"), "{text}");
    for secret in ["http://127.0.0.1:1/in.jsonl?X-Amz-Signature=hidden", "http://me:hidden@127.0.0.1:1/in.jsonl"] {
        let text = said(server.port, secret, "out.jsonl");
        assert!(text.contains("http://127.0.0.1:1/in.jsonl") && !text.contains("hidden"), "{text}");
    }
    assert!(said(server.port, "in.jsonl", "ftp://host/out.jsonl").contains("ftp:// is not known"));
    assert!(said(server.port, "in.jsonl", &server.url("out.jsonl")).contains("only be read"));
    let mut plain = command(&sandbox, server.port, &null_job("s3://bucket/in.jsonl", "out.jsonl"));
    plain.env_remove("AWS_ALLOW_HTTP").env("AWS_ENDPOINT_URL", "http://store.invalid:9000");
    assert!(expect(plain, 1).contains("AWS_ALLOW_HTTP"));
    let mut nameless = command(&sandbox, server.port, &null_job("s3://bucket/in.jsonl", "out.jsonl"));
    nameless.env("AWS_ENDPOINT_URL", format!("127.0.0.1:{}", server.port));
    assert!(expect(nameless, 1).contains("AWS_ENDPOINT_URL is no URL"));
    sandbox.write("token", "hidden\n");
    let mut token = command(&sandbox, server.port, &null_job("s3://bucket/in.jsonl", "out.jsonl"));
    token.env_remove("AWS_ACCESS_KEY_ID").env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "token");
    assert!(expect(token, 1).contains("without a line feed"));
    let mut unknown = command(&sandbox, server.port, &null_job("s3://bucket/in.jsonl", "out.jsonl"));
    unknown.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    unknown.env("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1");
    let text = expect(unknown, 1);
    assert!(text.contains("no credentials: set AWS_ACCESS_KEY_ID"), "{text}");
    // A machine of a cloud that has no role.
    let (roleless, _) = proxy(server.port, Box::new(|_| Fault::Gone));
    let mut unknown = command(&sandbox, server.port, &null_job("s3://bucket/in.jsonl", "out.jsonl"));
    unknown.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    unknown.env("AWS_METADATA_ENDPOINT", format!("http://127.0.0.1:{roleless}"));
    let text = expect(unknown, 1);
    assert!(text.contains("role") && text.contains("set AWS_ACCESS_KEY_ID"), "{text}");
}
