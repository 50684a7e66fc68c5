//! What fuzzers begin with and what they found (`tests/fuzz`): every parser takes its corpus without a panic, within a limit of
//! memory and one of processor time, which other work on the machine does not use up.
#![expect(clippy::print_stderr, reason = "a child says what it is at")]

#[expect(unreachable_pub, reason = "the fuzzers are another crate")]
#[path = "../fuzz/parsers.rs"]
mod parsers;

use crate::common::root;
use std::env;
use std::fs;
use std::process::{Command, Output};

/// Names the parser of a process with limits.
const PARSER: &str = "VALAR_CORPUS_PARSER";
/// What a process may allocate: many times what the largest file of the corpus makes of itself, and what the test program
/// takes before it does anything.
const MAX_KIB: u32 = 1 << 20;
/// What a process may compute: many times what a whole corpus takes.
const MAX_SECONDS: u32 = 60;

#[test]
fn parsers_take_what_fuzzers_found() {
    if let Ok(name) = env::var(PARSER) {
        return replay(&name);
    }
    for (name, _) in parsers::PARSERS {
        let output = within_limits(name, MAX_SECONDS);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {}\n{said}", output.status);
        assert!(said.contains(&format!("{name}: all of its corpus")), "{name}: {said}");
    }
}

/// A parser that takes too much is ended, and that is seen.
#[test]
fn the_limits_are_kept() {
    for hungry in ["memory", "time"] {
        let output = within_limits(hungry, 2);
        assert!(!output.status.success(), "{hungry}: {output:?}");
    }
}

/// This program in a process with limits, as which the first test replays a parser's corpus.
fn within_limits(parser: &str, max_seconds: u32) -> Output {
    let limited = "ulimit -d $1 && ulimit -t $2 && shift 2 && exec \"$@\"";
    Command::new("sh")
        .args(["-c", limited, "sh", &MAX_KIB.to_string(), &max_seconds.to_string()])
        .arg(env::current_exe().expect("a program"))
        .args(["--exact", "corpus::parsers_take_what_fuzzers_found", "--nocapture"])
        .env(PARSER, parser)
        .output()
        .expect("sh starts")
}

fn replay(name: &str) {
    match name {
        "memory" => drop(std::hint::black_box(vec![1u8; (MAX_KIB as usize) << 10])),
        "time" => while std::hint::black_box(true) {},
        _ => {}
    }
    let found = parsers::PARSERS.iter().find(|(other, _)| *other == name);
    let (_, parse) = found.unwrap_or_else(|| panic!("there is no parser {name}"));
    let corpus = fs::read_dir(root().join("tests/fuzz/corpus").join(name)).unwrap();
    let mut files: Vec<_> = corpus.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 1, "{name} has no corpus");
    for file in files {
        eprintln!("{}", file.display()); // the last one said is the one that failed
        parse(&fs::read(&file).unwrap());
    }
    eprintln!("{name}: all of its corpus");
}
