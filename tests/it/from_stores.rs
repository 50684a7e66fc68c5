//! Jobs whose inputs, state and credentials come from elsewhere, where that goes wrong: a job of Parquet files that is killed on
//! S3, a web server that gives files as a whole only, a container that must ask for its credentials.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use crate::common::{Sandbox, tiny_llama};
use crate::faults::{Fault, S3, Seen, proxy};
use crate::passing_jobs::{check, inputs, read};
use crate::s3::{HeldUp, check_tidy, command, expect};

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Columns that pass through are read a second time when the output is written: after a kill, by another process.
#[test]
fn parquet_jobs_that_are_killed_on_s3_write_the_same_bytes() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    tiny_llama(&sandbox);
    let wanted = inputs(&sandbox);
    for name in ["in.parquet", "more.parquet"] {
        server.put(name, &std::fs::read(sandbox.path(name)).unwrap());
    }
    // Committed often, by how far rows came, so that there is a middle on any machine.
    let settings = [
        "-q",
        "-m",
        "tiny-llama",
        "--set=prompt.text={{ q }}",
        "--set=sampling.max_tokens=24",
        "--set=sampling.ignore_eos=true",
        "--set=engine.max_running=3",
        "--set=job.window_rows=16",
        "--checkpoint-tokens=8",
    ];
    let local = [&["run", "-i", "in.parquet", "-i", "more.parquet", "-o", "out.parquet"][..], &settings].concat();
    sandbox.expect(&local, 3);
    check(&read(&sandbox, "out.parquet"), &wanted);
    let (first, second) = ("s3://bucket/in.parquet", "s3://bucket/more.parquet");
    let remote = [&["run", "-i", first, "-i", second, "-o", "s3://bucket/out.parquet"][..], &settings].concat();

    // In the middle of its rows.
    let held = HeldUp::new(&server);
    let child = command(&sandbox, held.port, &remote).stderr(Stdio::null()).spawn().unwrap();
    held.wait();
    kill(child);
    assert!(!server.keys().contains(&"out.parquet".to_owned()));
    // In the middle of its output: a part of it, and its completion.
    for method in ["PUT", "POST"] {
        let plan = move |seen: &Seen<'_>| {
            let is_meant = seen.method == method && seen.path.contains("/out.parquet?") && seen.path.contains("uploadId");
            if is_meant { Fault::Hang } else { Fault::None }
        };
        let (port, happened) = proxy(server.port, Box::new(plan));
        let mut child = command(&sandbox, port, &remote).stderr(Stdio::null()).spawn().unwrap();
        while !happened.lock().unwrap().contains(&Fault::Hang) {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
            sleep(Duration::from_millis(2));
        }
        kill(child);
        assert!(!server.keys().contains(&"out.parquet".to_owned()));
    }
    // The rest, of a store that fails now and then while the inputs are read again.
    let mut n = 0;
    let plan = move |seen: &Seen<'_>| {
        let is_input = seen.method == "GET" && (seen.path.contains("/in.parquet") || seen.path.contains("/more.parquet"));
        n += u32::from(is_input);
        match n % 4 {
            1 if is_input => Fault::Busy,
            2 if is_input => Fault::CutBody,
            _ => Fault::None,
        }
    };
    let (port, happened) = proxy(server.port, Box::new(plan));
    expect(command(&sandbox, port, &remote), 3);
    let happened = happened.lock().unwrap();
    assert!([Fault::Busy, Fault::CutBody].iter().all(|fault| happened.contains(fault)), "{happened:?}");
    assert!(server.get("out.parquet") == std::fs::read(sandbox.path("out.parquet")).unwrap(), "the output differs");
    check_tidy(&server, "out.");
}

/// Answers each request as told by its lines; the port, and the requests that came.
fn answering(answer: impl Fn(&[String]) -> Vec<u8> + Send + 'static) -> (u16, Arc<Mutex<Vec<Vec<String>>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    // Ends with the test's process.
    std::thread::spawn(move || {
        for client in listener.incoming().map(Result::unwrap) {
            let lines = BufReader::new(&client).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            let lines: Vec<String> = lines.map(|line| line.to_ascii_lowercase()).collect();
            let _client_may_be_gone = (&client).write_all(&answer(&lines));
            log.lock().unwrap().push(lines);
        }
    });
    (port, seen)
}

#[test]
fn a_file_without_parts_is_fetched_once() {
    let sandbox = Sandbox::new();
    inputs(&sandbox);
    let content = std::fs::read(sandbox.path("in.parquet")).unwrap();
    let (port, seen) = answering(move |lines| {
        let head = "HTTP/1.1 200 OK\r\nETag: \"1\"\r\nLast-Modified: Sun, 22 Nov 2026 10:00:00 GMT\r\nConnection: close\r\n";
        let mut answer = format!("{head}Content-Length: {}\r\n\r\n", content.len()).into_bytes();
        if !lines[0].starts_with("head") {
            answer.extend_from_slice(&content);
        }
        answer
    });
    let url = format!("http://127.0.0.1:{port}/in.parquet");
    let job = |input: &str, output: &str| {
        let args = ["run", "-q", "--engine=null", "--set=prompt.text={{ q }}", "-i", input, "-o", output];
        let output = sandbox.command(&args).env("NO_PROXY", "127.0.0.1").output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    };
    job("in.parquet", "here.parquet");
    job(&url, "there.parquet");
    assert!(std::fs::read(sandbox.path("here.parquet")).unwrap() == std::fs::read(sandbox.path("there.parquet")).unwrap());
    let seen = seen.lock().unwrap();
    let whole = seen.iter().filter(|lines| lines[0].starts_with("get") && !lines.iter().any(|line| line.starts_with("range:")));
    assert_eq!(whole.count(), 1, "{seen:?}");
}

#[test]
fn a_container_asks_for_its_credentials() {
    let (server, sandbox) = (S3::start(), Sandbox::new());
    sandbox.write("in.jsonl", "{\"q\": \"one\"}\n");
    let (port, seen) = answering(|lines| {
        let is_known = lines.iter().any(|line| line == "authorization: hidden-token");
        let keys = r#"{"AccessKeyId": "A", "SecretAccessKey": "B", "Token": "C", "Expiration": "2999-01-01T00:00:00Z"}"#;
        let (status, text) = if is_known { ("200 OK", keys) } else { ("403 Forbidden", "no") };
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}", text.len()).into_bytes()
    });
    let run = |token: &str, code: i32| {
        let args = ["run", "-q", "--engine=null", "--set=prompt.text={{ q }}", "-i", "in.jsonl", "-o", "s3://bucket/out.jsonl"];
        let mut command = command(&sandbox, server.port, &args);
        command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY").env_remove("AWS_SESSION_TOKEN");
        command.env("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://127.0.0.1:{port}/role"));
        command.env("AWS_CONTAINER_AUTHORIZATION_TOKEN", token);
        expect(command, code)
    };
    let said = run("another-token", 1);
    assert!(said.contains("the credentials of the container's or instance's role can't be fetched"), "{said}");
    assert!(!said.contains("another-token"), "{said}");
    run("hidden-token", 0);
    assert!(String::from_utf8(server.get("out.jsonl")).unwrap().contains("\"one\""));
    assert!(seen.lock().unwrap().iter().all(|lines| lines[0] == "get /role http/1.1"));
}
