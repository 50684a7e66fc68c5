//! Text: tokens and templates against what transformers makes of them (golden files), streams against the obvious way.
#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap like the tests themselves")]

use crate::common::{golden, model_path};
use candle_core::quantized::gguf_file::{self, Value as Meta};
use proptest::prelude::*;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::sync::LazyLock;
use valar::engine::stop::StopText;
use valar::gguf::Gguf;
use valar::outcome::{ErrorCode, RowError};
use valar::request::{ChatOptions, Message};
use valar::text::template::{ChatTemplate, RowTemplate};
use valar::text::tokenizer::Tokenizer;

static GGUF: LazyLock<Gguf> = LazyLock::new(|| Gguf::open(&model_path()).unwrap());
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_gguf(&GGUF).unwrap());

/// The rows of a golden file, without its first line, which says where it comes from.
fn rows(name: &str) -> Vec<Value> {
    let file = fs::read_to_string(golden(name)).unwrap();
    file.lines().filter(|line| !line.starts_with(r#"{"origin""#)).map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn messages(value: &Value) -> Vec<Message> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let turn = |turn: &Value| Message { role: text(&turn["role"]), content: text(&turn["content"]), ..Message::default() };
    value.as_array().unwrap().iter().map(turn).collect()
}

// -- tokenizer

#[test]
fn ids_are_those_of_transformers() {
    let rows = rows("tokenizer_encode.jsonl");
    assert!(rows.len() > 3000);
    for row in rows {
        let text = row[0].as_str().unwrap();
        assert_eq!(TOKENIZER.encode(text), ids(&row[1]), "{text:?}");
    }
}

#[test]
fn other_families_split_as_transformers() {
    let rows = rows("tokenizer_families.jsonl");
    for pre in ["gpt-2", "llama-bpe", "qwen2"] {
        let tokenizer = Tokenizer::from_gguf(&edited_gguf(&[("tokenizer.ggml.pre", Some(Meta::String(pre.into())))])).unwrap();
        let rows: Vec<_> = rows.iter().filter(|row| row[0] == pre).collect();
        assert!(rows.len() > 250);
        for row in rows {
            let text = row[1].as_str().unwrap();
            assert_eq!(tokenizer.encode(text), ids(&row[2]), "{pre}: {text:?}");
        }
    }
}

#[test]
fn prompts_of_the_greedy_reference() {
    let template = ChatTemplate::from_gguf(&GGUF).unwrap();
    let (requests, references) = (rows("w1_first20.jsonl"), rows("greedy20_transformers_f32.jsonl"));
    assert_eq!((requests.len(), references.len()), (20, 20));
    for (request, reference) in requests.iter().zip(&references) {
        assert_eq!(request["custom_id"], reference["custom_id"]);
        let prompt = template.render(&messages(&request["body"]["messages"]), true, &ChatOptions::default()).unwrap();
        assert_eq!(TOKENIZER.encode(&prompt), ids(&reference["prompt_ids"]), "{prompt}");
        assert_eq!(TOKENIZER.decode(&ids(&reference["token_ids"])), reference["text"].as_str().unwrap());
    }
}

#[test]
fn decoded_text_is_that_of_transformers() {
    let golden = rows("tokenizer_decode.jsonl");
    assert!(golden.len() >= 400);
    for row in golden {
        let ids = ids(&row[0]);
        assert_eq!(TOKENIZER.decode(&ids), row[1].as_str().unwrap(), "{ids:?}");
        let mut text = StopText::default();
        for &id in &ids {
            text.push(TOKENIZER.token_bytes(id), &[]);
        }
        text.finish();
        assert_eq!(text.text(), row[1].as_str().unwrap(), "{ids:?}");
    }
    // What the vocabulary can say comes back as it was.
    for row in rows("tokenizer_encode.jsonl") {
        let text = row[0].as_str().unwrap();
        if !text.contains(['\u{4}', '\u{6}', '\u{13}', '\u{14}', '\u{16}', '\u{1d}']) && text.chars().all(|c| c < '\u{40000}') {
            assert_eq!(TOKENIZER.decode(&TOKENIZER.encode(text)), text);
        }
    }
}

#[test]
fn vocabulary() {
    assert_eq!(TOKENIZER.n_vocab(), 49152);
    assert_eq!(TOKENIZER.end_ids(), [2]);
    assert_eq!((TOKENIZER.token_bytes(2), TOKENIZER.is_special(2)), (&b"<|im_end|>"[..], true));
    assert_eq!((TOKENIZER.token_bytes(260), TOKENIZER.is_special(260)), (&b" the"[..], false));
    assert_eq!((0..49152).filter(|&id| TOKENIZER.is_special(id)).count(), 17);
    assert!((0..49152).all(|id| !TOKENIZER.token_bytes(id).is_empty()));
    let newline = TOKENIZER.encode("\n");
    assert_eq!((newline.len(), TOKENIZER.token_bytes(newline[0])), (1, &b"\n"[..]));
}

/// Backtracking regular expressions give up here: the crate's own splitters leave all that follows uncut.
#[test]
fn a_million_blanks_are_cut_like_two() {
    let n_blanks = 1_100_000;
    let long = TOKENIZER.encode(&(" ".repeat(n_blanks) + "x y1 z"));
    let apart = [" ".repeat(n_blanks - 1), " x y1 z".to_owned()].map(|part| TOKENIZER.encode(&part)).concat();
    assert!(long == apart, "{} tokens, {} expected", long.len(), apart.len());
}

#[test]
fn all_threads_encode_alike() {
    let rows = rows("tokenizer_encode.jsonl");
    let texts: Vec<&str> = rows.iter().map(|row| row[0].as_str().unwrap()).collect();
    let one_by_one: Vec<_> = texts.iter().map(|text| TOKENIZER.encode(text)).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(8).build().unwrap();
    let at_once: Vec<_> = pool.install(|| texts.par_iter().with_max_len(1).map(|text| TOKENIZER.encode(text)).collect());
    assert!(one_by_one == at_once);
}

/// The model's tokenizer metadata with some keys replaced (`None`: left out), as a file without tensors.
fn edited_gguf(edits: &[(&str, Option<Meta>)]) -> Gguf {
    let string = |key: &str| Meta::String(GGUF.str(key).unwrap().to_owned());
    let strings = |key: &str| Meta::Array(GGUF.str_array(key).unwrap().into_iter().map(|s| Meta::String(s.to_owned())).collect());
    let mut meta = BTreeMap::new();
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"] {
        meta.insert(key, string(key));
    }
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        meta.insert(key, strings(key));
    }
    let types = GGUF.i32_array("tokenizer.ggml.token_type").unwrap();
    meta.insert("tokenizer.ggml.token_type", Meta::Array(types.into_iter().map(Meta::I32).collect()));
    for key in ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"] {
        meta.insert(key, Meta::U32(GGUF.u64(key).unwrap() as u32));
    }
    for (key, value) in edits {
        meta.remove(key);
        meta.extend(value.clone().map(|value| (*key, value)));
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let meta: Vec<_> = meta.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(file.as_file_mut(), &meta, &[]).unwrap();
    Gguf::open(file.path()).unwrap()
}

#[test]
fn unknown_tokenizers_are_refused_by_name() {
    let check = |key: &str, value: Option<Meta>, expected: &str| {
        let error = Tokenizer::from_gguf(&edited_gguf(&[(key, value)])).err().expect(expected);
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    };
    let text = |text: &str| Some(Meta::String(text.into()));
    check("tokenizer.ggml.model", text("rwkv"), "\"rwkv\"");
    check("tokenizer.ggml.model", None, "tokenizer.ggml.model is missing");
    check("tokenizer.ggml.pre", text("kimi-k2"), "\"kimi-k2\" is not supported");
    check("tokenizer.ggml.pre", None, "tokenizer.ggml.pre is missing");
    check("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens is missing");
    check("tokenizer.ggml.merges", Some(Meta::Array(vec![Meta::String("a".into())])), "merge \"a\"");
    check("tokenizer.ggml.merges", Some(Meta::Array(vec![Meta::String("a nosuchtoken".into())])), "nosuchtoken");
    check("tokenizer.ggml.token_type", Some(Meta::Array(vec![Meta::I32(1)])), "has 1 entries");
    check("tokenizer.ggml.eos_token_id", Some(Meta::U32(49152)), "tokenizer.ggml.eos_token_id is 49152");
}

#[test]
fn kinds_of_tokens_and_ends() {
    let mut types = GGUF.i32_array("tokenizer.ggml.token_type").unwrap();
    let the = TOKENIZER.encode(" the")[0];
    types[3] = 4; // <repo_name>: text, but taken whole
    types[4] = 1; // <reponame>: text like any other
    types[the as usize] = 5; // " the": a hole
    let merges =
        GGUF.str_array("tokenizer.ggml.merges").unwrap().into_iter().filter(|merge| !merge.contains("Ġthe") && *merge != "Ġt he");
    let tokenizer = Tokenizer::from_gguf(&edited_gguf(&[
        ("tokenizer.ggml.token_type", Some(Meta::Array(types.into_iter().map(Meta::I32).collect()))),
        ("tokenizer.ggml.merges", Some(Meta::Array(merges.map(|merge| Meta::String(merge.to_owned())).collect()))),
        ("tokenizer.ggml.eot_token_id", Some(Meta::U32(0))),
    ]))
    .unwrap();
    assert_eq!(tokenizer.end_ids(), [0, 2]);
    assert_eq!((tokenizer.encode("<repo_name>"), tokenizer.is_special(3)), (vec![3], false));
    assert!(tokenizer.encode("<reponame>").len() > 1 && !tokenizer.is_special(4));
    assert!(!tokenizer.encode("on the mat").contains(&the));
    assert_eq!(tokenizer.n_vocab(), 49152);
    assert_ne!(tokenizer.hash(), TOKENIZER.hash());
}

/// Llama 3's rule: a word that is a token becomes it, though no merges lead there.
#[test]
fn whole_words_need_no_merges_where_the_family_says_so() {
    let merges = GGUF.str_array("tokenizer.ggml.merges").unwrap().into_iter().filter(|merge| *merge != "Ġt he");
    let merges = Meta::Array(merges.map(|merge| Meta::String(merge.to_owned())).collect());
    let the = TOKENIZER.encode(" the");
    for (pre, is_whole) in [("llama-bpe", true), ("qwen2", false), ("gpt-2", false), ("smollm", false)] {
        let pre_name = Some(Meta::String(pre.into()));
        let gguf = edited_gguf(&[("tokenizer.ggml.merges", Some(merges.clone())), ("tokenizer.ggml.pre", pre_name)]);
        assert_eq!(Tokenizer::from_gguf(&gguf).unwrap().encode(" the") == the, is_whole, "{pre}");
    }
}

#[test]
fn hash_covers_what_ids_depend_on() {
    let hash = |edits: &[(&str, Option<Meta>)]| Tokenizer::from_gguf(&edited_gguf(edits)).unwrap().hash().to_owned();
    let mut merges = GGUF.str_array("tokenizer.ggml.merges").unwrap();
    merges.swap(0, 1);
    let merges = Meta::Array(merges.into_iter().map(|merge| Meta::String(merge.to_owned())).collect());
    assert_eq!(hash(&[]), TOKENIZER.hash());
    assert_ne!(hash(&[("tokenizer.ggml.merges", Some(merges))]), TOKENIZER.hash());
    assert_ne!(hash(&[("tokenizer.ggml.pre", Some(Meta::String("gpt-2".into())))]), TOKENIZER.hash());
    assert_ne!(hash(&[("tokenizer.ggml.eos_token_id", Some(Meta::U32(0)))]), TOKENIZER.hash());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_text_comes_back(text in "\\PC{0,40}|[ \\n\\t]{0,9}[a-z0-9 ]{0,9}") {
        let lost = |c: char| c >= '\u{40000}';
        prop_assume!(!text.contains(lost));
        prop_assert_eq!(TOKENIZER.decode(&TOKENIZER.encode(&text)), text);
    }
}

// -- templates

/// One golden cell: the text, or what transformers said against it.
fn assert_rendered(rendered: Result<String, RowError>, expected: &Value, about: &str) {
    match (rendered, expected) {
        (Ok(text), Value::String(expected)) => assert_eq!(&text, expected, "{about}"),
        (Err(error), Value::Object(expected)) => {
            assert_eq!(error.code, ErrorCode::TemplateError);
            assert!(error.message.contains(expected["error"].as_str().unwrap()), "{about}: {error}");
        }
        (rendered, expected) => panic!("{about}: {rendered:?}, transformers: {expected}"),
    }
}

#[test]
fn chats_render_as_in_transformers() {
    let template = ChatTemplate::from_gguf(&GGUF).unwrap();
    let rows = rows("template_smollm2.jsonl");
    assert!(rows.len() > 100);
    for row in rows {
        for (i, add_generation_prompt) in [(1, false), (2, true)] {
            assert_rendered(
                template.render(&messages(&row[0]), add_generation_prompt, &ChatOptions::default()),
                &row[i],
                &row[0].to_string(),
            );
        }
    }
}

#[test]
fn template_features_are_those_of_transformers() {
    let specials = BTreeMap::from([("bos_token", "<|im_start|>"), ("eos_token", "<|im_end|>")]);
    for row in rows("template_features.jsonl") {
        let template = ChatTemplate::new(row[0].as_str().unwrap(), &specials);
        for (i, add_generation_prompt) in [(2, false), (3, true)] {
            let about = format!("{} with {}", row[0], row[1]);
            assert_rendered(template.render(&messages(&row[1]), add_generation_prompt, &ChatOptions::default()), &row[i], &about);
        }
    }
}

#[test]
fn a_model_without_a_template_still_loads() {
    let turns = messages(&json!([{"role": "user", "content": "hi"}]));
    let check = |source: Option<&str>, expected: &str| {
        let gguf = edited_gguf(&[("tokenizer.chat_template", source.map(|source| Meta::String(source.into())))]);
        let error = ChatTemplate::from_gguf(&gguf).unwrap().render(&turns, true, &ChatOptions::default()).unwrap_err();
        assert_eq!(error.code, ErrorCode::TemplateError);
        assert!(error.message.contains(expected), "{error}");
    };
    check(None, "no chat template");
    check(Some("{% for m in messages %}"), "does not compile");
    check(Some("{{ nosuch(1) }}"), "nosuch");
    let gguf = edited_gguf(&[("tokenizer.ggml.bos_token_id", Some(Meta::U32(99999)))]);
    assert!(format!("{:#}", ChatTemplate::from_gguf(&gguf).err().unwrap()).contains("bos_token_id is 99999"));
}

#[test]
fn chat_templates_see_names_but_no_clock() {
    let source =
        "{{ strftime_now('%Y') if strftime_now is defined else 'no clock' }}{% for m in messages %} {{ m.name }}{% endfor %}";
    let template = ChatTemplate::new(source, &BTreeMap::new());
    let mut turns = messages(&json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]));
    turns[1].name = Some("Ann".into());
    assert_eq!(template.render(&turns, false, &ChatOptions::default()).unwrap(), "no clock  Ann");
}

#[test]
fn template_hashes_differ() {
    let specials = BTreeMap::from([("bos_token", "<s>")]);
    let hashes = [("a", &specials), ("b", &specials), ("a", &BTreeMap::new()), ("abos_token<s>", &BTreeMap::new())]
        .map(|(source, specials)| ChatTemplate::new(source, specials).hash().to_owned());
    let distinct: std::collections::BTreeSet<_> = hashes.iter().collect();
    assert_eq!(distinct.len(), hashes.len());
}

fn columns(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(columns) => columns,
        other => panic!("not an object: {other}"),
    }
}

#[test]
fn rows_render() {
    let row = columns(json!({
        "question": "2 < 3 & \"x\"?", "n": 7, "score": 0.5, "ok": true, "nothing": null,
        "choices": ["yes", "no"], "meta": {"lang": "日本語"}, "html": "<b>"
    }));
    let check = |source: &str, expected: &str| {
        assert_eq!(RowTemplate::compile(source).unwrap().render(&row).unwrap(), expected, "{source}");
    };
    check("Q: {{ question }}\nA:", "Q: 2 < 3 & \"x\"?\nA:");
    check("{{ n + 1 }} {{ score }} {{ html }}\n", "8 0.5 <b>");
    check("{% for c in choices %}{{ loop.index }}. {{ c }}\n{% endfor %}", "1. yes\n2. no\n");
    check("{{ choices | tojson }} {{ meta.lang }} {{ question.upper() }}", "[\"yes\", \"no\"] 日本語 2 < 3 & \"X\"?");
    check("{% if absent is defined %}x{% else %}y{% endif %}", "y");
    check("{% set t = question %}{{ t | length }} {{ range(2) | list }}", "12 [0, 1]");
}

#[test]
fn row_errors_name_the_column() {
    let row = columns(json!({"question": "q", "meta": {}}));
    let check = |source: &str, expected: &str| {
        let error = RowTemplate::compile(source).unwrap().render(&row).unwrap_err();
        assert_eq!(error.code, ErrorCode::TemplateError);
        assert!(error.message.contains(expected), "{source}: {error}");
    };
    check("{{ qestion }}", "no column qestion (it has: question, meta)");
    check("{{ qestion.strip() }}", "no column qestion");
    check("{% for x in items %}{% endfor %}", "no column items");
    check("{{ meta.lang }}", "undefined");
    check("{{ question | nosuchfilter }}", "nosuchfilter");
    check("a\n{{ raise_exception('too hard') }}", "too hard (in template:2)");
    for source in ["{{ a", "{% if %}", "", " \n"] {
        assert!(RowTemplate::compile(source).is_err(), "{source:?}");
    }
}

/// What a caller sends can be made long by a template that means no harm.
#[test]
fn json_of_a_template_has_a_limit() {
    let zeros: Value = vec![0; 150_000].into();
    let deep = (0..120).fold(zeros, |inner, _| json!([inner]));
    let row = columns(json!({ "tools": deep }));
    let error = RowTemplate::compile("{{ tools | tojson(indent=16) | length }}").unwrap().render(&row).unwrap_err();
    assert!(error.message.contains("tojson makes more than 128 MiB of text"), "{error}");
}

/// The time that minijinja takes for an expression is the square of its length, so 36 seconds for 33 kB: what the fuzzer found.
#[test]
fn expressions_have_a_limit() {
    let sum = |n: usize| vec!["1"; n].join("+");
    let refusal = |source: &str| match RowTemplate::compile(source) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    assert_eq!(refusal(&format!("{{{{ {} }}}}", sum(2048))), "");
    assert!(refusal(&format!("a\n{{{{ {} }}}}", sum(2049))).contains("an expression has more than 4096 tokens (line 2)"));
    assert!(refusal(&format!("{{% if {} %}}x{{% endif %}}", sum(9000))).contains("4096 tokens"));
    // Quotes in raw text and comments begin no string that would hide what follows.
    assert!(refusal(&format!("{{% raw %}}{{{{ \"{{% endraw %}}{{# ' #}}{{{{ {} }}}}\"", sum(9000))).contains("4096 tokens"));
    assert!(refusal(&format!("{{{{ {} }}}}", sum(1000)).repeat(40)).contains("it has more than 65536 tokens"));
    // Text and strings are as long as they like.
    assert_eq!(refusal(&format!("{}{{{{ '{}' }}}}", "text ".repeat(20_000), "1+".repeat(20_000))), "");
}
