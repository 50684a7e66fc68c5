//! Where files may be: folders, `file://`, web servers of the simplest kind. And what is left of a run that was told to stop
//! before it began.

use crate::common::{Sandbox, chat_line, tiny_llama};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

const NULL: [&str; 6] =
    ["--quiet", "--engine", "null", "--set=prompt.text={{ q }}", "--set=job.seed=3", "--set=sampling.max_tokens=2"];

fn job<'a>(input: &'a str, output: &'a str) -> Vec<&'a str> {
    ["run", "-i", input, "-o", output].into_iter().chain(NULL).collect()
}

fn rows(range: std::ops::Range<usize>) -> String {
    range.map(|i| json!({"q": format!("Row {i}?")}).to_string() + "\n").collect()
}

/// The completions in a result file.
fn completions(sandbox: &Sandbox, name: &str) -> Vec<Value> {
    sandbox.rows(name).into_iter().map(|row| row["completion"].clone()).collect()
}

/// A web server that knows whole files only, and says nothing of their versions: its port.
fn plain_server(content: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Ends with the test's process.
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, content) = (client.unwrap(), content.clone());
            std::thread::spawn(move || -> std::io::Result<()> {
                let mut lines = BufReader::new(client.try_clone()?).lines();
                let asked = lines.next().transpose()?.unwrap_or_default();
                lines.find(|line| line.as_ref().is_ok_and(String::is_empty));
                let dated = "Last-Modified: Mon, 02 Nov 2026 08:00:00 GMT";
                write!(client, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n{dated}\r\nConnection: close\r\n\r\n", content.len())?;
                if asked.starts_with("GET ") { client.write_all(&content) } else { Ok(()) }
            });
        }
    });
    port
}

#[test]
fn a_web_server_need_not_give_parts() {
    let sandbox = Sandbox::new();
    // More than is read at once.
    let pad = "x".repeat(3000);
    let text: String = (0..2000).map(|i| json!({"q": format!("Row {i}?"), "pad": pad}).to_string() + "\n").collect();
    sandbox.write("in.jsonl", &text);
    sandbox.expect(&job("in.jsonl", "local.jsonl"), 0);
    let url = format!("http://127.0.0.1:{}/in.jsonl", plain_server(text.into_bytes()));
    sandbox.expect(&job(&url, "web.jsonl"), 0);
    assert_eq!(completions(&sandbox, "web.jsonl"), completions(&sandbox, "local.jsonl"));
}

#[test]
fn folders_and_file_urls_name_inputs_and_models() {
    let sandbox = Sandbox::new();
    std::fs::create_dir_all(sandbox.path("in/below")).unwrap();
    sandbox.write("in/a.jsonl", rows(0..3));
    sandbox.write("in/below/b.jsonl", rows(3..5));
    sandbox.write("all.jsonl", rows(0..5));
    sandbox.expect(&job("all.jsonl", "all-out.jsonl"), 0);
    let url = format!("file://{}/", sandbox.path("in").display());
    for (input, output) in [("in/", "folder.jsonl"), (&*url, "url.jsonl")] {
        sandbox.expect(&job(input, output), 0);
        assert_eq!(completions(&sandbox, output), completions(&sandbox, "all-out.jsonl"), "{input}");
    }
    assert!(sandbox.expect(&job("in", "none.jsonl"), 1).contains("is a directory: name its files, for example in/*.jsonl"));

    let (folder, _) = tiny_llama(&sandbox);
    sandbox.write("in.jsonl", chat_line("a", "what is rain?", json!({})));
    for (model, output) in [("tiny-llama".to_owned(), "path.jsonl"), (format!("file://{}", folder.display()), "as-url.jsonl")] {
        sandbox.expect(&["run", "-i", "in.jsonl", "-o", output, "--quiet", "--model", &model], 0);
    }
    let text = |name: &str| sandbox.rows(name)[0]["response"]["body"]["choices"].clone();
    assert_eq!(text("path.jsonl"), text("as-url.jsonl"));
    assert!(sandbox.expect(&["inspect", "file:///no/such.gguf"], 1).contains("/no/such.gguf does not exist"));
}

#[test]
fn a_run_that_is_stopped_while_it_loads_gives_the_job_back() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", chat_line("a", "Tell me a story.", json!({"max_tokens": 200, "ignore_eos": true})));
    let mut child = sandbox.command(&["run", "-i", "in.jsonl", "-o", "out.jsonl"]).stderr(Stdio::null()).spawn().unwrap();
    // The manifest is there before the model is; a machine that is faster than this is stopped a little later.
    while !sandbox.path("out.job/manifest-00001.json").exists() {
        sleep(Duration::from_millis(1));
    }
    sleep(Duration::from_millis(50));
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let said = sandbox.run(&["status", "out.jsonl"]);
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains("stopped, 0 of 1 rows"), "{said}");
}

#[test]
fn shards_that_nobody_began_are_shown() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", rows(0..30));
    sandbox.expect(&[&job("in.jsonl", "out.jsonl")[..], &["--shard", "1/3"]].concat(), 0);
    let said = String::from_utf8(sandbox.run(&["status", "out.jsonl"]).stdout).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], "out.jsonl: stopped, 10 of 10 rows of 1 of 3 shards, 0 errors");
    assert_eq!((lines[1], lines[3]), ("  shard 0/3: not begun", "  shard 2/3: not begun"));
    assert!(lines[2].starts_with("  shard 1/3: done, 10 of 10 rows"), "{said}");
}
