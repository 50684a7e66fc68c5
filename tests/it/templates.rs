//! Chat templates that mean no good, of a model that somebody else has made: whatever they try, it ends in a clear error, and in memory
//! that is bounded, for the row that is refused and for the program that gives up.

use crate::common::{Sandbox, chat_line, tiny_llama};
use serde_json::json;
use std::fs::{self, File};
use std::time::Duration;

/// Runs a row through a model with that template: the exit code, what was said of the row or of the program, and the most memory that
/// was seen resident, MiB.
fn run(template: &str) -> (Option<i32>, String, usize) {
    let sandbox = Sandbox::new();
    let (folder, _) = tiny_llama(&sandbox);
    let config = json!({"eos_token": "</s>", "bos_token": "<s>", "chat_template": template});
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    sandbox.write("in.jsonl", chat_line("a", "x", json!({"model": "tiny-llama", "max_tokens": 2})));
    let mut command = sandbox.command(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "-m", "tiny-llama", "--quiet"]);
    let mut child = command.stderr(File::create(sandbox.path("said")).unwrap()).spawn().unwrap();
    // What the system tells of a child that has ended begins with its parent's.
    let mut peak_kib = 0;
    let status = loop {
        let told = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = told.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let seen = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
        peak_kib = peak_kib.max(seen.unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let errors = fs::read_to_string(sandbox.path("out.errors.jsonl")).unwrap_or_default();
    (status.code(), sandbox.read("said") + &errors, peak_kib / 1024)
}

#[test]
fn a_template_that_asks_for_too_much_is_refused() {
    for (template, expected) in [
        ("{% for i in range(10**9) %}x{% endfor %}", "range has too many elements"),
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "more than 20000000 steps"),
        ("{{ 'x' * 10**9 }}", "repeated string is too large"),
        ("{{ (['x'] * 10**9) | length }}", "repeated sequence is too large"),
        ("{% set p = 'x' * 10**6 %}{% for i in range(100000) %}{{ p }}{% endfor %}", "more than 128 MiB of text"),
        ("{{ (['x' * 10**6] * 1000) | tojson | length }}", "more than 128 MiB of text"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion limit exceeded"),
        ("{{ [1] | batch(10**9) | list }}", "1000000000 is over the limit of 100000"),
        ("{{ 10 ** (10 ** 9) }}", "unable to calculate"),
    ] {
        let (code, said, peak_mib) = run(template);
        assert!(code == Some(3) && said.contains("template_error") && said.contains(expected), "{template}: {code:?} {said}");
        // Four times as much as it may write.
        assert!((1..640).contains(&peak_mib), "{template}: {peak_mib} MiB");
    }
}

#[test]
fn a_template_that_takes_all_memory_is_stopped_before_it_has_it() {
    let grow = |first: &str, next: &str| {
        format!(
            "{{% set n = namespace(t={first}) %}}{{% for i in range(60) %}}{{% set n.t = {next} %}}{{% endfor %}}{{{{ n.t | length }}}}"
        )
    };
    for template in [
        grow("'x'", "n.t ~ n.t"),
        grow("[1, 2]", "(n.t + n.t) | list"),
        "{{ (['x' * 10**8] * 40) | join | length }}".to_owned(),
        "{{ ('x' * 10**7) | replace('x', 'y' * 10**4) | length }}".to_owned(),
        "{{ ('x' * 10**8) | list | length }}".to_owned(),
        "{{ ('a b ' * 2 * 10**7).split() | length }}".to_owned(),
        "{{ 'x' | indent(10**12) }}".to_owned(),
    ] {
        let (code, said, peak_mib) = run(&template);
        assert!(
            code == Some(1) && said.contains("error: a template takes more memory than it may"),
            "{template}: {code:?} {said}"
        );
        // The limit is 1 GiB; what grows may have to be moved, and is there twice then.
        assert!((1..2 * 1024 + 256).contains(&peak_mib), "{template}: {peak_mib} MiB");
    }
}
