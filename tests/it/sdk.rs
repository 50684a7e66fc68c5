//! The official clients against a server, in strict mode: `tests/sdk/check.py`, in an environment of its own with the
//! versions of `tests/sdk/requirements.txt`.

use crate::common::root;
use crate::serving::{KEY, Server};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Python of an environment with those packages; made at the first use.
fn python() -> PathBuf {
    let requirements = root().join("tests/sdk/requirements.txt");
    let wanted = fs::read_to_string(&requirements).unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sdk");
    let (python, made_for) = (folder.join("bin/python"), folder.join("made-for.txt"));
    if fs::read_to_string(&made_for).is_ok_and(|found| found == wanted) {
        return python;
    }
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements));
    fs::write(made_for, wanted).unwrap();
    python
}

#[test]
fn the_official_clients_find_nothing_wrong() {
    let python = python();
    // The names that the service's documents use, for the default model; and the model with a template that knows tools.
    let weights = "weights = \"SmolLM2-135M-Instruct\"";
    let template = root().join("tests/sdk/tools.jinja");
    let named = ["moonshotai/Kimi-K2.6", "zai-org/GLM-5.1-FP8"].map(|id| format!("[[model]]\nid = {id:?}\n{weights}\n")).concat();
    let with_tools = format!("[[model]]\nid = \"with-tools\"\n{weights}\nchat_template = {template:?}\n");
    // Examples that set no limit would go on to the end of the context.
    let limit = "[sampling]\nmax_tokens = 400\n";
    let config = format!("[server]\nwebhook_private_addresses = true\n{limit}{named}{with_tools}");
    let server = Server::with(&config, &["--api-key", KEY]);
    let url = format!("http://{}", server.address);
    let script = root().join("tests/sdk/check.py");
    let output = Command::new(python).arg(script).args([&url, KEY, "moonshotai/Kimi-K2.6"]).output().unwrap();
    let (said, complaints) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{complaints}");
    assert_eq!(said.lines().filter(|line| line.starts_with("ok ")).count(), 17, "{said}");
    server.wait_idle();
}
