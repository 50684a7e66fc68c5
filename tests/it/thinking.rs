//! Models that think before they answer: what stands between the marks is told apart in every dialect, streamed or not, and what
//! is told is what `/v1/completions` gives for the same tokens and seed, taken apart by hand.

use crate::common::{Sandbox, tiny_llama};
use crate::serving::{FOREVER, KEY, MODEL, Server, read_until};
use serde_json::{Value, json};
use std::time::Instant;

const THINKER: &str = "thinker";
/// Opens thoughts in the prompt, and repeats those of earlier turns.
const OPENED: &str = "{% for m in messages %}<s>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}\
                      {{ m.content }}</s>{% endfor %}<think>";
/// Leaves it to the model, and knows tools.
const MARKED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# </think> <tool_call> #}";

/// A model of random weights whose vocabulary has the marks.
fn thinker(sandbox: &Sandbox) {
    let (folder, _) = tiny_llama(sandbox);
    let path = folder.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let n_vocab = tokenizer["model"]["vocab"].as_object().unwrap().len();
    for (i, mark) in ["<think>", "</think>"].into_iter().enumerate() {
        tokenizer["model"]["vocab"][mark] = (n_vocab + i).into();
        let added = json!({"id": n_vocab + i, "content": mark, "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": false});
        tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    }
    std::fs::write(path, tokenizer.to_string()).unwrap();
    let config = json!({"eos_token": "</s>", "bos_token": "<s>", "chat_template": OPENED});
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    sandbox.write("marked.jinja", MARKED);
}

fn server() -> Server {
    let models = [(THINKER, "tiny-llama", ""), (MODEL, MODEL, "chat_template = \"marked.jinja\"\n")];
    let config = models.map(|(id, weights, more)| format!("[[model]]\nid = {id:?}\nweights = {weights:?}\n{more}")).concat();
    Server::with_files(&config, &["--api-key", KEY], thinker)
}

/// What a completion comes to, by hand.
#[derive(Debug)]
struct Expected {
    thought: String,
    answer: String,
    n_thought: usize,
    n_tokens: usize,
    /// Whether it was cut off.
    is_cut: bool,
    /// Whether its thoughts end.
    is_closed: bool,
}

impl Server {
    #[track_caller]
    fn good(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    #[track_caller]
    fn streamed(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = true.into();
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        let data = answer.events().into_iter().map(|(_, data)| data).filter(|data| data != "[DONE]");
        data.map(|data| serde_json::from_str(&data).unwrap()).collect()
    }

    fn expected(&self, seed: u64) -> Expected {
        let prompt = format!("<s>{PROMPT}</s><think>");
        let tokens = self.good("/tokenize", json!({"model": THINKER, "prompt": prompt, "add_special_tokens": false}));
        let body = json!({"model": THINKER, "prompt": tokens["tokens"], "max_tokens": MOST, "seed": seed, "logprobs": 0});
        let completion = self.good("/v1/completions", body);
        let choice = &completion["choices"][0];
        let text = choice["text"].as_str().unwrap();
        // Another mark that opens, right at the beginning, is none of the thoughts.
        let inside = text.trim_start().strip_prefix("<think>").unwrap_or(text);
        let is_closed = inside.contains("</think>");
        let (thought, answer) = inside.split_once("</think>").unwrap_or((inside, ""));
        let n_tokens = completion["usage"]["completion_tokens"].as_u64().unwrap() as usize;
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
        let n_thought = tokens.iter().position(|token| token == "</think>").map_or(n_tokens, |place| place + 1);
        let (thought, answer) = (thought.trim().to_owned(), answer.trim_start().to_owned());
        Expected { thought, answer, n_thought, n_tokens, is_cut: choice["finish_reason"] == "length", is_closed }
    }
}

const PROMPT: &str = "is it so?";
const MOST: usize = 60;

fn chat(seed: u64) -> Value {
    json!({"model": THINKER, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": MOST, "seed": seed, "logprobs": true})
}

fn response(seed: u64) -> Value {
    json!({"model": THINKER, "input": PROMPT, "max_output_tokens": MOST, "seed": seed, "include": ["message.output_text.logprobs"]})
}

fn message(seed: u64) -> Value {
    json!({"model": THINKER, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": MOST, "seed": seed})
}

fn joined<'v>(values: impl Iterator<Item = &'v Value>) -> String {
    values.filter_map(Value::as_str).collect()
}

fn check_chat(server: &Server, seed: u64, expected: &Expected) {
    let whole = server.good("/v1/chat/completions", chat(seed));
    let choice = &whole["choices"][0];
    let told = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
    assert_eq!(choice["message"]["reasoning_content"], told(&expected.thought));
    let content = if expected.thought.is_empty() { json!(expected.answer) } else { told(&expected.answer) };
    assert_eq!(choice["message"]["content"], content);
    let usage = &whole["usage"];
    assert_eq!(
        (&usage["completion_tokens"], &usage["completion_tokens_details"]["reasoning_tokens"]),
        (&json!(expected.n_tokens), &json!(expected.n_thought))
    );
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    let mut body = chat(seed);
    body["stream_options"] = json!({"include_usage": true});
    let chunks = server.streamed("/v1/chat/completions", body);
    let deltas = || chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]);
    assert_eq!(joined(deltas().map(|delta| &delta["reasoning_content"])), expected.thought);
    assert_eq!(joined(deltas().map(|delta| &delta["content"])), expected.answer);
    let has = |name: &str| deltas().map(|delta| delta[name].as_str().is_some_and(|text| !text.is_empty())).collect::<Vec<_>>();
    let last_thought = has("reasoning_content").iter().rposition(|&has| has);
    let first_answer = has("content").iter().position(|&has| has);
    assert!(first_answer.is_none_or(|first| last_thought.is_none_or(|last| last < first)));
    let streamed =
        chunks.iter().flat_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default());
    assert_eq!(&streamed.collect::<Vec<_>>(), entries);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens_details"], usage["completion_tokens_details"]);
}

/// A response's output without what differs from one call to the next.
fn essence(response: &Value) -> Value {
    let items = response["output"].as_array().unwrap();
    items.iter().map(|item| json!([item["type"], item["status"], item["content"], item["summary"]])).collect()
}

fn check_response(server: &Server, seed: u64, expected: &Expected) {
    let whole = server.good("/v1/responses", response(seed));
    let output = whole["output"].as_array().unwrap();
    let of = |kind: &str| output.iter().find(|item| item["type"] == kind);
    let status = if expected.is_cut { "incomplete" } else { "completed" };
    assert_eq!(whole["status"], status);
    let thought = of("reasoning");
    assert_eq!(thought.is_some(), !expected.thought.is_empty(), "{whole}");
    if let Some(item) = thought {
        let is_last = expected.answer.is_empty();
        let id = whole["id"].as_str().unwrap().replace("resp_", "rs_");
        let part = json!({"type": "reasoning_text", "text": expected.thought});
        let status = if is_last { status } else { "completed" };
        assert_eq!(item, &json!({"type": "reasoning", "id": id, "summary": [], "content": [part], "status": status}));
        assert_eq!(&output[0], item);
    }
    let text = of("message").map_or("", |item| item["content"][0]["text"].as_str().unwrap());
    assert_eq!(text, expected.answer);
    let usage = &whole["usage"];
    assert_eq!(
        (&usage["output_tokens"], &usage["output_tokens_details"]["reasoning_tokens"]),
        (&json!(expected.n_tokens), &json!(expected.n_thought))
    );
    if let Some(item) = of("message") {
        // Those of the thoughts are left out.
        let entries = item["content"][0]["logprobs"].as_array().unwrap();
        assert_eq!(entries.len(), expected.n_tokens - expected.n_thought);
    }
    let events = server.streamed("/v1/responses", response(seed));
    check_events(&events, expected);
    assert_eq!(essence(&events.last().unwrap()["response"]), essence(&whole));
    // Fetched later.
    let mut body = response(seed);
    body["background"] = true.into();
    let id = server.good("/v1/responses", body)["id"].as_str().unwrap().to_owned();
    let (path, start) = (format!("/v1/responses/{id}"), Instant::now());
    while ["queued", "in_progress"].contains(&server.get(&path).json()["status"].as_str().unwrap()) {
        assert!(start.elapsed() < FOREVER);
        server.good("/v1/responses/wait", json!({"ids": [id], "timeout_s": 60}));
    }
    assert_eq!(essence(&server.get(&path).json()), essence(&whole));
}

fn check_events(events: &[Value], expected: &Expected) {
    let of = |name: &str| events.iter().filter(|event| event["type"] == name).collect::<Vec<_>>();
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i, "{event}");
    }
    assert_eq!(joined(of("response.reasoning_text.delta").iter().map(|event| &event["delta"])), expected.thought);
    assert_eq!(joined(of("response.output_text.delta").iter().map(|event| &event["delta"])), expected.answer);
    // Items follow each other, and each is what the response has in the end.
    let last = &events.last().unwrap()["response"];
    let items = last["output"].as_array().unwrap();
    let mut place = 0;
    for (index, item) in items.iter().enumerate() {
        let kind = if item["type"] == "reasoning" { "reasoning_text" } else { "output_text" };
        let own: Vec<&Value> = events.iter().filter(|event| event["output_index"] == index).collect();
        let names: Vec<&str> = own.iter().map(|event| event["type"].as_str().unwrap()).collect();
        let delta = format!("response.{kind}.delta");
        let n = names.len();
        assert_eq!(names[..2], ["response.output_item.added", "response.content_part.added"]);
        assert!(names[2..n - 3].iter().all(|name| *name == delta), "{names:?}");
        let done = format!("response.{kind}.done");
        assert_eq!(names[n - 3..], [done.as_str(), "response.content_part.done", "response.output_item.done"]);
        assert_eq!((&own[1]["part"]["type"], &own[0]["item"]["status"]), (&json!(kind), &json!("in_progress")));
        assert_eq!((&own[n - 3]["text"], &own[n - 2]["part"]), (&item["content"][0]["text"], &item["content"][0]));
        assert_eq!((&own[n - 1]["item"], &own[0]["item"]["id"]), (item, &item["id"]));
        assert!(own[1..n - 1].iter().all(|event| event["item_id"] == item["id"] && event["content_index"] == 0));
        let first = own[0]["sequence_number"].as_u64().unwrap();
        assert!(first > place, "an item begins before another ends");
        place = own[n - 1]["sequence_number"].as_u64().unwrap();
    }
}

fn check_message(server: &Server, seed: u64, expected: &Expected) {
    let whole = server.good("/v1/messages", message(seed));
    let thought =
        (!expected.thought.is_empty()).then(|| json!({"type": "thinking", "thinking": expected.thought, "signature": ""}));
    let has_text = !expected.answer.is_empty() || thought.is_none();
    let text = has_text.then(|| json!({"type": "text", "text": expected.answer, "citations": null}));
    assert_eq!(whole["content"], thought.into_iter().chain(text).collect::<Value>());
    assert_eq!(whole["usage"]["output_tokens_details"]["thinking_tokens"], expected.n_thought);
    let events = server.streamed("/v1/messages", message(seed));
    let mut blocks: Vec<Value> = Vec::new();
    let mut is_open = false;
    for event in &events {
        let index = event["index"].as_u64().map(|index| index as usize);
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert!(!is_open && index == Some(blocks.len()), "{event}");
                blocks.push(event["content_block"].clone());
                is_open = true;
            }
            "content_block_delta" => {
                assert!(is_open && index == Some(blocks.len() - 1), "{event}");
                let key = if event["delta"]["type"] == "thinking_delta" { "thinking" } else { "text" };
                let block = blocks.last_mut().unwrap();
                block[key] = (block[key].as_str().unwrap().to_owned() + event["delta"][key].as_str().unwrap()).into();
            }
            "content_block_stop" => {
                assert!(is_open && index == Some(blocks.len() - 1), "{event}");
                is_open = false;
            }
            _ => {}
        }
    }
    assert_eq!((is_open, Value::from(blocks)), (false, whole["content"].clone()));
    let end = events.iter().find(|event| event["type"] == "message_delta").unwrap();
    assert_eq!(end["usage"]["output_tokens_details"], whole["usage"]["output_tokens_details"]);
}

#[test]
fn thoughts_are_told_apart_in_every_dialect() {
    let server = server();
    let (mut n_both, mut n_cut, mut seeds) = (0, 0, 0..400);
    while n_both < 4 || n_cut < 2 {
        let seed = seeds.next().expect("of so many, some think and answer, and some go on thinking");
        let expected = server.expected(seed);
        let (is_both, is_cut) =
            (!expected.thought.is_empty() && !expected.answer.is_empty(), !expected.is_closed && expected.is_cut);
        // As many of each as are wanted.
        if (is_both && n_both < 4) || (is_cut && n_cut < 2) || expected.thought.is_empty() {
            n_both += usize::from(is_both);
            n_cut += usize::from(is_cut);
            check_chat(&server, seed, &expected);
            check_response(&server, seed, &expected);
            check_message(&server, seed, &expected);
        }
    }
    // Several completions have their own.
    let mut body = chat(7);
    body["n"] = 5.into();
    let whole = server.good("/v1/chat/completions", body.clone());
    let chunks = server.streamed("/v1/chat/completions", body);
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let own = || chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|own| own["index"] == i);
        for name in ["reasoning_content", "content"] {
            assert_eq!(joined(own().map(|own| &own["delta"][name])), choice["message"][name].as_str().unwrap_or_default());
        }
    }
    // A row of a batch is the answer to a call.
    let params = |seed: u64| json!({"custom_id": format!("r{seed}"), "params": chat(seed)});
    let requests: Vec<Value> = (0..6).map(params).collect();
    let batch = server.good("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": requests}));
    let ended = server.ended(&batch["id"]);
    let results = server.results(&ended["output_file_id"]);
    for seed in 0..6 {
        let (row, call) = (&results[&format!("r{seed}")]["response"]["body"], server.good("/v1/chat/completions", chat(seed)));
        assert_eq!(row["choices"], call["choices"], "{ended}");
        assert_eq!(row["usage"]["completion_tokens_details"], call["usage"]["completion_tokens_details"]);
    }
    let count = |row: &Value| row["response"]["body"]["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    let sum: u64 = results.values().map(count).sum();
    assert!(sum > 0, "{ended}");
    assert_eq!(ended["usage"]["output_tokens_details"]["reasoning_tokens"], sum, "{ended}");
    for (endpoint, params) in [("/v1/responses", response(1)), ("/v1/chat/completions", chat(1))] {
        let requests = json!([{"custom_id": "a", "params": params}]);
        let batch = server.good("/v1/batches", json!({"endpoint": endpoint, "requests": requests}));
        let ended = server.ended(&batch["id"]);
        let usage = &server.results(&ended["output_file_id"])["a"]["response"]["body"]["usage"];
        let of_row =
            [&usage["output_tokens_details"], &usage["completion_tokens_details"]].map(|at| at["reasoning_tokens"].as_u64());
        assert_eq!(ended["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64(), of_row[0].or(of_row[1]), "{ended}");
    }
}

#[test]
fn thoughts_of_a_cancelled_response_are_counted() {
    let server = server();
    // One thinks for as long as it runs, one has thought and answers for as long.
    for (regex, delta) in [
        ("<think>[a-z ]{5000}", "response.reasoning_text.delta"),
        ("<think>Hm, [a-z]{2,5}[.]</think>[a-z ]{5000}", "response.output_text.delta"),
    ] {
        let body = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 6000, "temperature": 0, "regex": regex, "background": true});
        let made = server.good("/v1/responses", body.clone());
        let path = format!("/v1/responses/{}", made["id"].as_str().unwrap());
        let head = format!("GET {path}?stream=true HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\n\r\n");
        read_until(&mut server.raw(head.as_bytes()), delta);
        let cancelled = server.good(&format!("{path}/cancel"), Value::Null);
        assert_eq!(cancelled["status"], "cancelled", "{cancelled}");
        let count = |response: &Value| {
            let usage = &response["usage"];
            [&usage["output_tokens"], &usage["output_tokens_details"]["reasoning_tokens"]].map(|n| n.as_u64().unwrap())
        };
        let [n_output, n_thought] = count(&cancelled);
        if delta == "response.reasoning_text.delta" {
            assert!(n_thought > 0 && n_thought == n_output, "{cancelled}");
        } else {
            let mut body = body;
            body["max_output_tokens"] = 60.into();
            body["background"] = false.into();
            assert_eq!(n_thought, count(&server.good("/v1/responses", body))[1], "{cancelled}");
            assert!(n_thought > 3 && n_thought < n_output, "{cancelled}");
        }
    }
}

#[test]
fn thoughts_of_earlier_turns_are_the_templates() {
    let server = server();
    let n_tokens = |text: &str| {
        let body = json!({"model": THINKER, "prompt": text, "add_special_tokens": false});
        server.good("/tokenize", body)["count"].as_u64().unwrap()
    };
    let wanted = n_tokens("<s>so?</s><s><think>let me see</think>yes.</s><s>why?</s><think>");
    let [ask, say, why] = [("user", "so?"), ("assistant", "yes."), ("user", "why?")]
        .map(|(role, content)| json!({"role": role, "content": content}));
    let reasoning = json!({"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "seen"}],
                           "content": [{"type": "reasoning_text", "text": "let me "}, {"type": "reasoning_text", "text": "see"}]});
    let count = |input: Value| server.post("/v1/responses/input_tokens", json!({"model": THINKER, "input": input}));
    assert_eq!(count(json!([ask, reasoning, say, why])).json()["input_tokens"], wanted);
    // One without its text, or without an answer, is none.
    let plain = n_tokens("<s>so?</s><s>yes.</s><s>why?</s><think>");
    let empty = json!({"type": "reasoning", "id": "rs_1", "summary": [], "content": null, "encrypted_content": "x"});
    assert_eq!(count(json!([ask, empty, say, why])).json()["input_tokens"], plain);
    assert_eq!(count(json!([ask, say, reasoning, why])).json()["input_tokens"], plain);
    let wrong = json!([ask, {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text"}]}, say]);
    let refused = count(wrong);
    assert_eq!(
        (refused.status, &refused.json()["error"]["param"]),
        (400, &json!("input[1].content[0].text")),
        "{}",
        refused.text
    );
    let thinking = json!({"type": "thinking", "thinking": "let me see", "signature": ""});
    let turn = json!({"role": "assistant", "content": [thinking, {"type": "text", "text": "yes."}]});
    let counted = server.good("/v1/messages/count_tokens", json!({"model": THINKER, "messages": [ask, turn, why]}));
    assert_eq!(counted["input_tokens"], wanted);
    let mut turn = say.clone();
    turn["reasoning_content"] = "let me see".into();
    let body = json!({"model": THINKER, "messages": [ask, turn, why], "max_tokens": 1, "temperature": 0});
    assert_eq!(server.good("/v1/chat/completions", body)["usage"]["prompt_tokens"], wanted);

    // What a response thought goes on with it.
    let both = (0..400).find(|&seed| {
        let expected = server.expected(seed);
        !expected.thought.is_empty() && !expected.answer.is_empty()
    });
    let first = server.good("/v1/responses", response(both.expect("one of so many")));
    let expected = server.expected(both.unwrap());
    let next = json!({"model": THINKER, "input": "why?", "previous_response_id": first["id"], "max_output_tokens": 2});
    let text = format!("<s>{PROMPT}</s><s><think>{}</think>{}</s><s>why?</s><think>", expected.thought, expected.answer);
    assert_eq!(server.good("/v1/responses", next)["usage"]["input_tokens"], n_tokens(&text));
}

#[test]
fn a_model_may_think_and_call() {
    let server = server();
    let call = "<tool_call>\\n\\{\"name\": \"look\", \"arguments\": \\{\"at\": \"[a-z]{1,6}\"\\}\\}\\n</tool_call>";
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]);
    let body = |regex: &str| {
        json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 90, "temperature": 0, "regex": regex,
               "tools": tools})
    };
    let whole = server.good("/v1/chat/completions", body(&format!("<think>\\nHm, [a-z]{{2,5}}\\.\\n</think>\\n\\n{call}")));
    let choice = &whole["choices"][0];
    let thought = choice["message"]["reasoning_content"].as_str().unwrap_or_else(|| panic!("{whole}"));
    assert!(thought.starts_with("Hm, ") && thought.ends_with('.'), "{thought:?}");
    assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], "look");
    let n_thought = whole["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    assert!(n_thought > 3 && n_thought < whole["usage"]["completion_tokens"].as_u64().unwrap(), "{whole}");
    let chunks = server.streamed("/v1/chat/completions", body(&format!("<think>\\nHm, [a-z]{{2,5}}\\.\\n</think>\\n\\n{call}")));
    assert_eq!(joined(chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]["reasoning_content"])), thought);
    assert_eq!(joined(chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]["content"])), "");
    // A call that is only thought of is none.
    let whole = server.good("/v1/chat/completions", body(&format!("<think>{call}</think>No[.]")));
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["content"], &message["tool_calls"]), (&json!("No."), &Value::Null));
    assert!(message["reasoning_content"].as_str().unwrap().starts_with("<tool_call>"), "{message}");
    // Without its mark at the beginning, text is text.
    let whole = server.good("/v1/chat/completions", body("It is <think>so</think>[.]"));
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["content"], &message["reasoning_content"]), (&json!("It is <think>so</think>."), &Value::Null));
    assert_eq!(whole["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
    // An answer that begins with thoughts can be gone on with.
    let body = json!({"model": MODEL, "max_tokens": 12, "temperature": 0,
                      "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nLet me"}]});
    let message = server.good("/v1/messages", body);
    assert_eq!(
        (message["content"].as_array().unwrap().len(), &message["content"][0]["type"]),
        (1, &json!("thinking")),
        "{message}"
    );
    // A format is the answer's, and begins at its beginning.
    let body = json!({"model": THINKER, "messages": [{"role": "user", "content": "so?"}], "max_tokens": 20, "temperature": 0, "regex": "yes[.!]"});
    let whole = server.good("/v1/chat/completions", body);
    let message = &whole["choices"][0]["message"];
    assert!(message["content"].as_str().is_some_and(|text| text.starts_with("yes")), "{whole}");
    assert_eq!(message["reasoning_content"], Value::Null);
}
