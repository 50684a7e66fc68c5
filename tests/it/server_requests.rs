//! Requests that are wrong: each gets a 400 that names the field, in the dialect's form, and the server goes on.

use crate::serving::{KEY, MODEL, Server, read_until};
use serde_json::{Value, json};

/// Values of every type.
fn values() -> Vec<Value> {
    let mut values = vec![
        json!(true),
        json!(-1),
        json!(3.5),
        json!(1e300),
        json!(""),
        json!("x"),
        json!([]),
        json!([1]),
        json!([{}]),
        json!({}),
        json!({"x": 1}),
        json!({"type": 7}),
    ];
    values.push(json!("x".repeat(70_000)));
    values
}

/// What draws are made with, and more that chats and texts have in common.
const SAMPLING: &str = "max_tokens temperature top_p top_k min_p n seed stop presence_penalty frequency_penalty \
    repetition_penalty logit_bias logprobs metadata stream stream_options response_format ignore_eos min_tokens \
    stop_token_ids regex grammar best_of structured_outputs model";
const CHAT: &str = "messages tools tool_choice top_logprobs parallel_tool_calls max_completion_tokens audio modalities \
    functions web_search_options continue_final_message chat_template_kwargs reasoning_effort";
const TEXT: &str = "prompt echo suffix truncate_prompt_tokens";
const RESPONSES: &str = "model input instructions max_output_tokens temperature top_p top_logprobs include tools tool_choice \
    parallel_tool_calls text reasoning truncation metadata stream store background previous_response_id prompt conversation \
    max_tokens seed stop";
const MESSAGES: &str = "model messages max_tokens system stop_sequences stream tools tool_choice output_config thinking \
    temperature top_p top_k seed mcp_servers metadata";

/// A body that is right, its endpoint, and every field that has a meaning there.
fn bodies() -> Vec<(&'static str, Value, Vec<&'static str>)> {
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let fields = |lists: &[&'static str]| lists.iter().flat_map(|list| list.split_whitespace()).collect();
    vec![
        ("/v1/chat/completions", json!({"model": MODEL, "messages": messages, "max_tokens": 1}), fields(&[SAMPLING, CHAT])),
        ("/v1/completions", json!({"model": MODEL, "prompt": "Hi", "max_tokens": 1}), fields(&[SAMPLING, TEXT])),
        ("/v1/responses", json!({"model": MODEL, "input": "Hi", "max_output_tokens": 1}), fields(&[RESPONSES])),
        ("/v1/messages", json!({"model": MODEL, "messages": messages, "max_tokens": 1}), fields(&[MESSAGES])),
    ]
}

#[test]
fn a_wrong_type_anywhere_is_the_callers_error() {
    let server = Server::start();
    let mut n_refused = 0;
    for (path, body, fields) in bodies() {
        assert_eq!(server.post(path, body.clone()).status, 200, "{path}");
        for field in fields {
            let mut n_refused_here = 0;
            for value in values() {
                let mut wrong = body.clone();
                wrong[field] = value.clone();
                let answer = server.post(path, wrong);
                let shown: String = value.to_string().chars().take(60).collect();
                match answer.status {
                    200 => {}
                    400 | 404 => {
                        let body = answer.json();
                        let error = &body["error"];
                        if error["message"].as_str().unwrap().contains("over the limit of") {
                            continue;
                        }
                        let names_it = if path == "/v1/messages" {
                            assert_eq!(body["type"], "error");
                            error["message"].as_str().unwrap().contains(field)
                        } else {
                            let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
                            assert_eq!(keys, ["message", "type", "param", "code"]);
                            error["param"].as_str().is_some_and(|param| param.starts_with(field))
                                || error["message"].as_str().unwrap().contains(field)
                        };
                        assert!(names_it, "{path} {field} = {shown}: {body}");
                        n_refused_here += 1;
                    }
                    status => panic!("{path} {field} = {shown}: {status} {}", answer.text),
                }
            }
            assert!(n_refused_here > 0 || ["ignore_eos"].contains(&field), "{path} takes anything as {field}");
            n_refused += n_refused_here;
        }
        // What must be there.
        for field in body.as_object().unwrap().keys().filter(|key| !key.starts_with("max")) {
            let mut without = body.clone();
            without.as_object_mut().unwrap().remove(field);
            let answer = server.post(path, without);
            assert_eq!(answer.status, 400);
            assert!(answer.json()["error"]["message"].as_str().unwrap().contains(field.as_str()));
        }
    }
    assert!(n_refused > 700, "{n_refused}");
    server.wait_idle();
}

#[test]
fn bodies_that_are_no_requests() {
    let server = Server::with("[server]\nmax_body = \"200kB\"\nbody_timeout_s = 3\nheader_timeout_s = 3\n", &["--api-key", KEY]);
    let key = ("authorization", &*format!("Bearer {KEY}"));
    let deep = format!("{{\"model\": {}1{}}}", "[".repeat(500), "]".repeat(500));
    let long = format!("{{\"model\": \"{}\"}}", "x".repeat(200_000));
    let cases: [(&[u8], u16); 8] = [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"{\"model\": \"\xff\"}", 400),
        (deep.as_bytes(), 400),
        (long.as_bytes(), 413),
        (b"null", 400),
    ];
    for (body, status) in cases {
        for path in ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize", "/detokenize"] {
            for headers in [&[key][..], &[key, ("content-type", "application/json; charset=utf-8")]] {
                let answer = server.send("POST", path, headers, body);
                assert_eq!(answer.status, status, "{path}: {}", answer.text);
                assert!(answer.json()["error"]["message"].is_string());
            }
        }
    }
    // One that comes too slowly, and headers that never end.
    let head = format!("POST /v1/responses HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: 100\r\n\r\n{{");
    read_until(&mut server.raw(head.as_bytes()), "408 Request Timeout");
    let mut slow = server.raw(b"GET /health HTTP/1.1\r\nx-a: ");
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut slow, &mut rest).unwrap();
    assert_eq!(server.send("GET", "/health", &[], "").status, 200);
}

#[test]
fn the_tokenizer_can_be_asked() {
    let server = Server::start();
    let text = "Grüße, 漢字 <|im_end|> 12";
    let tokens = server.post("/tokenize", json!({"prompt": text, "add_special_tokens": false})).json();
    assert_eq!(tokens["tokens"].as_array().unwrap().len() as u64, tokens["count"].as_u64().unwrap());
    assert_eq!(server.post("/detokenize", json!({"tokens": tokens["tokens"]})).json(), json!({"prompt": text}));
    let info = server.get("/tokenizer_info").json();
    assert_eq!((&info["eos_token"], info["chat_template"].is_string()), (&json!("<|im_end|>"), true));
    assert_eq!(server.post("/detokenize", json!({"tokens": [1, 10_000_000]})).json()["error"]["param"], "tokens[1]");
    let asked = json!({"model": MODEL, "input": "How long is this?", "max_output_tokens": 9});
    let counted = server.post("/v1/responses/input_tokens", asked.clone()).json();
    assert_eq!(counted["input_tokens"], server.post("/v1/responses", asked).json()["usage"]["input_tokens"]);
}

#[test]
fn there_are_no_embeddings() {
    let server = Server::start();
    let answer = server.post("/v1/embeddings", json!({"model": MODEL, "input": "Hi", "encoding_format": "base64"}));
    let error = &answer.json()["error"];
    assert_eq!((answer.status, &error["param"]), (400, &json!("model")), "{}", answer.text);
    assert!(error["message"].as_str().unwrap().contains("has no embeddings"), "{error}");
    assert_eq!(server.post("/v1/embeddings", json!({"model": "nobody", "input": "Hi"})).status, 404);
}
