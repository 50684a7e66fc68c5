//! What request rows can ask for, on the real program and model: several completions, formats, scores, prefills.

use crate::common::{Sandbox, chat_line};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Runs request lines; each row's line by its id.
fn answers(lines: &[String], settings: &[&str]) -> BTreeMap<String, Value> {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", lines.join("\n"));
    let mut args = vec!["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet"];
    args.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let output = sandbox.run(&args);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stderr));
    let rows = sandbox.rows("out.jsonl").into_iter().chain(sandbox.rows("out.errors.jsonl"));
    rows.map(|row| (row["custom_id"].as_str().unwrap().to_owned(), row["response"]["body"].clone())).collect()
}

#[expect(clippy::needless_pass_by_value, reason = "so that callers can write json!(..)")]
fn line(custom_id: &str, url: &str, body: Value) -> String {
    json!({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).to_string()
}

fn content(body: &Value) -> &str {
    body["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no content in {body}"))
}

const COLOURS: &str = "Name three colours.";

#[test]
fn several_completions_and_prompts() {
    let lines = [
        chat_line("n", COLOURS, json!({"n": 3, "temperature": 1.2, "seed": 5, "ignore_eos": true})),
        chat_line("one", COLOURS, json!({"temperature": 1.2, "seed": 5, "ignore_eos": true})),
        chat_line("greedy", COLOURS, json!({"n": 2, "ignore_eos": true})),
        line(
            "prompts",
            "/v1/completions",
            json!({"prompt": ["One, two,", "Red, green,"], "n": 2, "temperature": 0.9, "seed": 1, "max_tokens": 4, "ignore_eos": true}),
        ),
        line(
            "first",
            "/v1/completions",
            json!({"prompt": "One, two,", "n": 2, "temperature": 0.9, "seed": 1, "max_tokens": 4, "ignore_eos": true}),
        ),
    ];
    let answers = answers(&lines, &[]);
    let texts = |id: &str| -> Vec<String> {
        let choices = answers[id]["choices"].as_array().unwrap();
        assert!(choices.iter().enumerate().all(|(i, choice)| choice["index"] == i), "{id}");
        choices.iter().map(|c| c.get("text").unwrap_or(&c["message"]["content"]).as_str().unwrap().to_owned()).collect()
    };
    let (three, greedy, prompts) = (texts("n"), texts("greedy"), texts("prompts"));
    assert_eq!((three.len(), &three[..1]), (3, &texts("one")[..]), "the first of several is the one alone");
    assert!(three[0] != three[1] && three[1] != three[2], "{three:?}");
    assert!(greedy.len() == 2 && greedy[0] == greedy[1]);
    assert_eq!((prompts.len(), &prompts[..2]), (4, &texts("first")[..]), "the first prompt's come first");
    let usage = |id: &str| {
        (answers[id]["usage"]["prompt_tokens"].as_u64().unwrap(), answers[id]["usage"]["completion_tokens"].as_u64().unwrap())
    };
    assert_eq!(usage("n"), (usage("one").0, 24));
    assert_eq!(usage("greedy"), (usage("one").0, 16));
    assert_eq!(usage("prompts").1, 16);
}

#[test]
fn answers_follow_their_format() {
    let schema = json!({"type": "object", "required": ["name", "age", "kind"], "additionalProperties": false, "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "kind": {"enum": ["cat", "dog"]}}});
    let of_schema = json!({"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}});
    let mut lines = vec![
        chat_line("regex", "A number?", json!({"regex": "[0-9]{3}-[0-9]{2}", "max_tokens": 20})),
        chat_line("choice", "Is water wet?", json!({"guided_choice": ["yes", "no"], "max_tokens": 20})),
        chat_line(
            "lark",
            "Greet me.",
            json!({"grammar": "start: \"hello\" (\" \" NAME)?\nNAME: /[A-Z][a-z]{1,5}/", "max_tokens": 20}),
        ),
        chat_line("object", "Some JSON.", json!({"response_format": {"type": "json_object"}, "max_tokens": 40})),
        chat_line("free", "A number?", json!({"max_tokens": 20})),
        chat_line(
            "bad",
            "x",
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}}),
        ),
        chat_line("bad regex", "x", json!({"regex": "(["})),
    ];
    for i in 0..12 {
        let extra = json!({"response_format": of_schema, "max_tokens": 60, "temperature": 1.0, "seed": i});
        lines.push(chat_line(&format!("pet {i}"), "Describe a pet.", extra));
    }
    let answers = answers(&lines, &[]);
    let number = content(&answers["regex"]);
    assert!(
        number.len() == 6 && number.as_bytes()[3] == b'-' && number.chars().all(|c| c.is_ascii_digit() || c == '-'),
        "{number}"
    );
    assert!(["yes", "no"].contains(&content(&answers["choice"])));
    assert!(content(&answers["lark"]).starts_with("hello"));
    assert!(content(&answers["object"]).starts_with('{'));
    assert_ne!(content(&answers["free"]), number);
    for i in 0..12 {
        let body = &answers[&format!("pet {i}")];
        let pet: Value = serde_json::from_str(content(body)).unwrap_or_else(|e| panic!("{e}: {body}"));
        assert!(pet["name"].as_str().is_some_and(|name| name.chars().count() <= 12), "{pet}");
        assert!(pet["age"].as_u64().is_some_and(|age| age <= 150) && (pet["kind"] == "cat" || pet["kind"] == "dog"), "{pet}");
        assert_eq!((pet.as_object().unwrap().len(), &body["choices"][0]["finish_reason"]), (3, &json!("stop")));
    }
    for bad in ["bad", "bad regex"] {
        assert_eq!(answers[bad]["error"]["param"], "body.response_format", "{}", answers[bad]);
    }
}

/// A prompt's scores are the log-probabilities that generation reported, bit for bit, however the prompt is cut up.
#[test]
fn scores_of_a_prompt_are_those_of_its_generation() {
    let prompt = "The first three planets are";
    let generated = &answers(
        &[line(
            "g",
            "/v1/completions",
            json!({"prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2, "ignore_eos": true}),
        )],
        &[],
    )["g"];
    let logprobs = &generated["choices"][0]["logprobs"];
    let whole = prompt.to_owned() + generated["choices"][0]["text"].as_str().unwrap();
    let score = |id: &str, max_tokens: u32| {
        line(
            id,
            "/v1/completions",
            json!({"prompt": whole, "max_tokens": max_tokens, "temperature": 0, "logprobs": 2, "echo": true}),
        )
    };
    let other = line("other", "/v1/completions", json!({"prompt": format!("{whole} And"), "max_tokens": 1, "temperature": 0}));
    for settings in [&[][..], &["engine.budget_tokens=17"], &["engine.max_running=1"]] {
        let answers = answers(&[other.clone(), score("zero", 0), score("one", 1)], settings);
        for (id, n_drawn) in [("zero", 0), ("one", 1)] {
            let choice = &answers[id]["choices"][0];
            assert!(choice["text"].as_str().unwrap().starts_with(&whole));
            let scored = choice["logprobs"]["token_logprobs"].as_array().unwrap();
            let n_prompt = answers[id]["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
            assert_eq!(
                (scored.len(), &scored[0], answers[id]["usage"]["completion_tokens"].as_u64()),
                (n_prompt + n_drawn, &Value::Null, Some(n_drawn as u64))
            );
            let of_generation = logprobs["token_logprobs"].as_array().unwrap();
            assert_eq!(scored[n_prompt - of_generation.len()..n_prompt], of_generation[..], "{settings:?}");
            let top = choice["logprobs"]["top_logprobs"].as_array().unwrap();
            assert_eq!(top[n_prompt - of_generation.len()..n_prompt], logprobs["top_logprobs"].as_array().unwrap()[..]);
            assert_eq!(choice["logprobs"]["text_offset"][0], 0);
        }
    }
}

#[test]
fn logits_are_shaped() {
    let answers = answers(
        &[
            chat_line("plain", COLOURS, json!({"max_tokens": 12})),
            chat_line("forced", COLOURS, json!({"logit_bias": {"260": 100}, "max_tokens": 3})),
            chat_line(
                "penalty",
                COLOURS,
                json!({"logit_bias": {"260": 100}, "frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 10, "max_tokens": 3}),
            ),
            chat_line("long", "Say yes.", json!({"min_tokens": 9, "max_tokens": 12})),
            chat_line("stopped", COLOURS, json!({"logit_bias": {"260": 100}, "stop_token_ids": [260], "max_tokens": 5})),
            chat_line("outside", COLOURS, json!({"logit_bias": {"99999": 1}})),
        ],
        &[],
    );
    assert_eq!(content(&answers["forced"]), " the the the");
    assert_ne!(content(&answers["plain"]), content(&answers["forced"]));
    assert!(answers["long"]["usage"]["completion_tokens"].as_u64().unwrap() >= 9);
    let stopped = &answers["stopped"];
    assert_eq!(
        (content(stopped), &stopped["usage"]["completion_tokens"], &stopped["choices"][0]["finish_reason"]),
        ("", &json!(1), &json!("stop"))
    );
    assert_eq!(answers["outside"]["error"]["param"], "body.logit_bias");
}

#[test]
fn prompts_are_continued_truncated_and_refused_as_asked() {
    let turns = json!([{"role": "user", "content": COLOURS}, {"role": "assistant", "content": "Red, green and"}]);
    let raw = format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n{COLOURS}<|im_end|>\n<|im_start|>assistant\nRed, green and"
    );
    let long: Vec<Value> = (0..600).map(|i| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": format!("Message number {i} says nothing of interest to anybody.")})).collect();
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let chat = "/v1/chat/completions";
    let answers = answers(
        &[
            line(
                "prefill",
                chat,
                json!({"messages": turns, "continue_final_message": true, "add_generation_prompt": false, "temperature": 0, "max_tokens": 6}),
            ),
            line("raw", "/v1/completions", json!({"prompt": raw, "temperature": 0, "max_tokens": 6})),
            line(
                "kept",
                "/v1/completions",
                json!({"prompt": "one two three four five six seven", "truncate_prompt_tokens": 3, "temperature": 0, "max_tokens": 2}),
            ),
            line("too long", "/v1/responses", json!({"input": long, "temperature": 0, "max_output_tokens": 4})),
            line(
                "dropped",
                "/v1/responses",
                json!({"input": long, "instructions": "Be brief.", "truncation": "auto", "temperature": 0, "max_output_tokens": 4}),
            ),
            line("alone", "/v1/completions", json!({"prompt": "hi", "max_tokens": 0, "echo": true})),
            line("forced", chat, json!({"messages": turns, "regex": "a", "ignore_eos": true})),
            line(
                "bracket",
                chat,
                json!({"messages": [turns[0], {"role": "assistant", "content": "<"}], "continue_final_message": true, "temperature": 0, "max_tokens": 1}),
            ),
            line("tools", chat, json!({"messages": turns, "tools": tool})),
        ],
        &[],
    );
    assert_eq!(content(&answers["prefill"]), answers["raw"]["choices"][0]["text"].as_str().unwrap());
    assert_eq!(answers["kept"]["usage"]["prompt_tokens"], 3);
    let alone = &answers["alone"];
    assert_eq!(
        (&alone["choices"][0]["text"], &alone["choices"][0]["finish_reason"], &alone["usage"]["completion_tokens"]),
        (&json!("hi"), &json!("length"), &json!(0))
    );
    assert_eq!(answers["forced"]["error"]["param"], "body.ignore_eos");
    let n_tokens = |id: &str| answers[id]["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(n_tokens("bracket") < n_tokens("prefill"), "a prefill that also stands in the template's marks");
    assert_eq!(answers["too long"]["error"]["code"], "context_length_exceeded");
    let kept = answers["dropped"]["usage"]["input_tokens"].as_u64().unwrap();
    assert!((8000..8192).contains(&kept), "{kept}");
    assert_eq!(
        (&answers["tools"]["error"]["code"], &answers["tools"]["error"]["param"]),
        (&json!("unsupported_parameter"), &json!("body.tools"))
    );
}

#[test]
fn a_response_says_what_a_chat_completion_says() {
    let answers = answers(
        &[
            chat_line("chat", COLOURS, json!({"max_tokens": 5, "ignore_eos": true, "logprobs": true, "top_logprobs": 1})),
            line(
                "response",
                "/v1/responses",
                json!({"input": COLOURS, "temperature": 0, "max_output_tokens": 5, "ignore_eos": true,
                "include": ["message.output_text.logprobs"], "top_logprobs": 1, "metadata": {"a": "b"}}),
            ),
            line(
                "again",
                "/v1/responses",
                json!({"input": COLOURS, "temperature": 0, "max_output_tokens": 5, "ignore_eos": true,
                "include": ["message.output_text.logprobs"], "top_logprobs": 1, "metadata": {"a": "b"}}),
            ),
        ],
        &["job.window_rows=2"],
    );
    let (response, again) = (&answers["response"], &answers["again"]);
    let part = &response["output"][0]["content"][0];
    assert_eq!(part["text"], answers["chat"]["choices"][0]["message"]["content"]);
    assert_eq!(part["logprobs"], answers["chat"]["choices"][0]["logprobs"]["content"]);
    assert_eq!(
        (&response["object"], &response["status"], &response["metadata"]),
        (&json!("response"), &json!("incomplete"), &json!({"a": "b"}))
    );
    assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
    for key in [
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "text",
        "temperature",
        "top_p",
        "previous_response_id",
        "reasoning",
        "usage",
    ] {
        assert!(response.get(key).is_some(), "{key} is missing");
    }
    // The same request again is not computed again, but is an answer of its own.
    assert_eq!(again["output"][0]["content"], response["output"][0]["content"]);
    assert!(again["id"] != response["id"] && again["output"][0]["id"] != response["output"][0]["id"]);
    assert_eq!(again["usage"]["input_tokens_details"]["cached_tokens"], again["usage"]["input_tokens"]);
}
