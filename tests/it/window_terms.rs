//! What `[windows]` of the server's configuration says, as callers see it.

use crate::serving::{MODEL, Server};
use serde_json::json;

#[test]
fn a_window_for_background_responses_is_refused_to_those_that_wait() {
    let server = Server::with("[windows.standard]\nbackground_only = true\ntarget_s = 60\nceiling_s = 60\n", &["-m", MODEL]);
    let body = |background: bool, window: &str| json!({"model": MODEL, "input": "Hi", "max_output_tokens": 1, "background": background, "metadata": {"completion_window": window}});
    let answer = server.post("/v1/responses", body(false, "standard"));
    let error = &answer.json()["error"];
    assert_eq!((answer.status, &error["param"]), (400, &json!("metadata.completion_window")));
    assert!(error["message"].as_str().unwrap().ends_with("supported: asap"), "{error}");
    assert_eq!(server.post("/v1/responses", body(false, "asap")).status, 200);
    let answer = server.post("/v1/responses", body(true, "standard"));
    assert_eq!((answer.status, &answer.json()["completion_window"]), (200, &json!("standard")));
}

#[test]
fn a_window_may_have_other_names() {
    let config = "[windows.asap]\naliases = [\"priority\"]\n\
                  [windows.standard]\naliases = [\"flex\", \"later\"]\nbackground_only = true\n";
    let server = Server::with(config, &["-m", MODEL]);
    let ask = |window: &str, background: bool| {
        let metadata = json!({"completion_window": window});
        let body = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 1, "background": background, "metadata": metadata});
        server.post("/v1/responses", body)
    };
    for (asked, background, window) in [("priority", false, "asap"), ("flex", true, "standard"), ("later", true, "standard")] {
        let answer = ask(asked, background).json();
        // It is told as what it is, and what was asked for stays.
        assert_eq!(
            json!([answer["completion_window"], answer["metadata"]["completion_window"]]),
            json!([window, asked]),
            "{answer}"
        );
    }
    for (asked, background, supported) in
        [("flex", false, "supported: asap, priority"), ("soon", true, "supported: asap, standard, priority, flex, later")]
    {
        let answer = ask(asked, background);
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (400, &json!("metadata.completion_window")), "{}", answer.text);
        assert!(error["message"].as_str().unwrap().ends_with(supported), "{error}");
    }
    // The official names beside them: what they mean is compared.
    for (official, asked, status) in
        [("2h", "flex", 200), ("8h", "standard", 200), ("soonest", "priority", 200), ("2h", "priority", 400)]
    {
        let body = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 1, "background": true,
                          "background_options": {"completion_window": official}, "metadata": {"completion_window": asked}});
        let answer = server.post("/v1/responses", body);
        assert_eq!(answer.status, status, "{official} and {asked}: {}", answer.text);
    }
    let message = |window: &str| {
        let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
        server.send("POST", "/v1/messages", &[("x-completion-window", window)], body.to_string()).status
    };
    assert_eq!([message("priority"), message("flex")], [200, 400]);
    let params = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 1});
    let batch = json!({"endpoint": "/v1/responses", "completion_window": "flex", "metadata": {"completion_window": "flex"},
                       "requests": [{"custom_id": "a", "params": params}]});
    let mut wrong = batch.clone();
    wrong["completion_window"] = "soon".into();
    let error = server.post("/v1/batches", wrong).json()["error"].clone();
    assert!(error["message"].as_str().unwrap().ends_with("asap, standard, priority, flex, later"), "{error}");
    let batch = server.post("/v1/batches", batch).json();
    let seconds = batch["expires_at"].as_i64().unwrap() - batch["created_at"].as_i64().unwrap();
    assert_eq!((seconds, &batch["completion_window"]), (24 * 3600, &json!("flex")), "{batch}");
}

#[test]
fn terms_that_make_no_sense_are_named() {
    for (config, name) in [
        ("[windows.standard]\ntarget_s = 0\n", "standard.target_s"),
        ("[windows.standard]\nceiling_s = 10\n", "standard.ceiling_s"),
        ("[windows.standard]\nshare_floor = 60\n", "share_floor"),
        ("[windows.asap]\nshare_floor = 1\n", "asap"),
        ("[windows.batch]\nceiling_s = 1\n", "batch"),
        ("[windows.soon]\n", "soon"),
        ("[windows.standard]\ntarget_s = 9223372036854775807\n", "standard.target_s"),
        ("[windows.asap]\nceiling_s = 2592001\n", "asap.ceiling_s"),
        ("[windows.asap]\nreserve = 51\n", "asap.reserve"),
        ("[windows.standard]\nreserve = 5\n", "standard.reserve"),
        ("[windows.standard]\naliases = [\"\"]\n", "aliases"),
        ("[windows.standard]\naliases = [\"asap\"]\n", "aliases"),
        ("[windows.standard]\naliases = [\"flex\"]\n[windows.asap]\naliases = [\"flex\"]\n", "aliases"),
        ("[windows.batch]\naliases = [\"day\"]\n", "batch"),
    ] {
        let sandbox = crate::common::Sandbox::new();
        std::fs::write(sandbox.path("valar.toml"), config).unwrap();
        let output = sandbox.command(&["serve", "--config", "valar.toml", "--port", "0"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("windows") && said.contains(name), "{config}: {said}");
    }
}
