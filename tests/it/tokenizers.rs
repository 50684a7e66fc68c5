//! Tokenizers of every kind, from GGUF metadata and from tokenizer.json, against what transformers makes of some 3,700
//! texts with small tokenizers trained for it (golden files), and what is refused.
#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap like the tests themselves")]

use crate::common::golden;
use candle_core::quantized::gguf_file::{self, Value as Meta};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::sync::LazyLock;
use valar::engine::stop::StopText;
use valar::gguf::Gguf;
use valar::request::ChatOptions;
use valar::text::hf::HfFiles;
use valar::text::template::ChatTemplate;
use valar::text::tokenizer::Tokenizer;

/// What transformers said, one row per tokenizer, after the row of the script's own texts.
static ANSWERS: LazyLock<Vec<Value>> = LazyLock::new(|| json_lines("tokenizers/answers.jsonl"));

/// The texts, in the golden file's order.
static TEXTS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let encode = json_lines("tokenizer_encode.jsonl");
    let texts = encode[1..].iter().map(|row| &row[0]).chain(ANSWERS[0]["own_texts"].as_array().unwrap());
    texts.map(|text| text.as_str().unwrap().to_owned()).collect()
});

fn json_lines(name: &str) -> Vec<Value> {
    fs::read_to_string(golden(name)).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn fixture(name: &str) -> Value {
    json_lines(&format!("tokenizers/{name}")).remove(0)
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A tokenizer of these files, with nothing but tokenizer.json.
fn from_json(json: &Value) -> Result<Tokenizer, String> {
    let n_added = json["added_tokens"].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap() + 1).max();
    let n_model = json["model"]["vocab"].as_object().map_or(0, serde_json::Map::len);
    let n_model = n_model.max(json["model"]["vocab"].as_array().map_or(0, Vec::len));
    from_files(json, None, None, n_model.max(n_added.unwrap_or(0) as usize))
}

fn from_files(json: &Value, config: Option<&Value>, generation: Option<&Value>, n_vocab: usize) -> Result<Tokenizer, String> {
    let (tokenizer, config, generation) = (json.to_string(), config.map(Value::to_string), generation.map(Value::to_string));
    let files = HfFiles {
        tokenizer: &tokenizer,
        tokenizer_config: config.as_deref(),
        chat_template: None,
        generation_config: generation.as_deref(),
        n_vocab,
    };
    Tokenizer::from_hf(&files).map_err(|error| format!("{error:#}"))
}

/// A GGUF file without tensors; keys are under `tokenizer.ggml`.
fn gguf(fields: &[(&str, Meta)]) -> Gguf {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let keys: Vec<_> = fields.iter().map(|(key, _)| format!("tokenizer.ggml.{key}")).collect();
    let meta: Vec<_> = keys.iter().map(String::as_str).zip(fields.iter().map(|(_, value)| value)).collect();
    gguf_file::write(file.as_file_mut(), &meta, &[]).unwrap();
    Gguf::open(file.path()).unwrap()
}

fn list(values: &Value, item: impl Fn(&Value) -> Meta) -> Meta {
    Meta::Array(values.as_array().unwrap().iter().map(item).collect())
}

fn text(value: &Value) -> Meta {
    Meta::String(value.as_str().unwrap().to_owned())
}

/// The metadata of a `SentencePiece` model.
fn sentencepiece(name: &str) -> Vec<(&'static str, Meta)> {
    let model = fixture(name);
    let mut fields = vec![
        ("model", text(&model["model"])),
        ("pre", Meta::String("default".to_owned())),
        ("tokens", list(&model["tokens"], text)),
        ("scores", list(&model["scores"], |score| Meta::F32(score.as_f64().unwrap() as f32))),
        ("token_type", list(&model["token_type"], |kind| Meta::I32(kind.as_i64().unwrap() as i32))),
        ("unknown_token_id", Meta::U32(0)),
        ("bos_token_id", Meta::U32(1)),
        ("eos_token_id", Meta::U32(2)),
    ];
    if model["precompiled_charsmap"].is_array() {
        fields
            .push(("precompiled_charsmap", list(&model["precompiled_charsmap"], |byte| Meta::U8(byte.as_u64().unwrap() as u8))));
    }
    fields
}

/// The byte-level tokenizer as metadata.
fn byte_level(pre: &str) -> Vec<(&'static str, Meta)> {
    let json = fixture("bpe.json");
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let added = json["added_tokens"].as_array().unwrap();
    let mut tokens = vec![String::new(); vocab.len() + 1];
    let mut kinds = vec![1; tokens.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize].clone_from(token));
    for token in added {
        let id = token["id"].as_u64().unwrap() as usize;
        token["content"].as_str().unwrap().clone_into(&mut tokens[id]);
        kinds[id] = if token["special"] == true { 3 } else { 4 };
    }
    let merges = list(&json["model"]["merges"], |merge| {
        Meta::String(format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()))
    });
    vec![
        ("model", Meta::String("gpt2".to_owned())),
        ("pre", Meta::String(pre.to_owned())),
        ("tokens", Meta::Array(tokens.into_iter().map(Meta::String).collect())),
        ("token_type", Meta::Array(kinds.into_iter().map(Meta::I32).collect())),
        ("merges", merges),
        ("bos_token_id", Meta::U32(0)),
        ("eos_token_id", Meta::U32(1)),
    ]
}

/// Compares with the golden row of that name: ids of all texts, prompts, whole and incremental decoding.
fn check(name: &str, tokenizer: &Tokenizer) {
    let row = ANSWERS.iter().find(|row| row["tokenizer"] == name).unwrap_or_else(|| panic!("no answers of {name}"));
    assert!(TEXTS.len() > 3600);
    for (text, want) in TEXTS.iter().zip(row["first"].as_array().unwrap()) {
        assert_eq!(tokenizer.encode(text), ids(want), "{name}: {text:?}");
    }
    let sums = row["sums"].as_str().unwrap();
    assert_eq!(sums.len(), 2 * TEXTS.len());
    let wrong: Vec<_> = TEXTS.iter().enumerate().filter(|(i, text)| sum(&tokenizer.encode(text)) != sums[2 * i..][..2]).collect();
    assert!(wrong.is_empty(), "{name}: {} texts have other ids, first {:?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    for (text, want) in TEXTS.iter().zip(row["prompts"].as_array().unwrap()) {
        assert_eq!(tokenizer.encode_prompt(text), ids(want), "{name}: prompt {text:?}");
    }
    for pair in row["decoded"].as_array().into_iter().flatten() {
        let (ids, want) = (ids(&pair[0]), pair[1].as_str().unwrap());
        assert_eq!(tokenizer.decode(&ids), want, "{name}: {ids:?}");
        let mut stream = StopText::default();
        for &id in &ids {
            stream.push(tokenizer.token_bytes(id), &[]);
        }
        stream.finish();
        // A stream goes on from a prompt: the blank that decoding takes off a text's front stays.
        let streamed = stream.text();
        assert!(
            streamed == want || streamed.trim_start_matches(' ') == want.trim_start_matches(' '),
            "{name}: {ids:?}: {streamed:?}"
        );
    }
}

/// What the golden file keeps of a text's ids.
fn sum(ids: &[u32]) -> String {
    format!("{:02x}", Sha256::digest(serde_json::to_string(ids).unwrap())[0])
}

// -- byte-level BPE

#[test]
fn byte_level_families_are_those_of_transformers() {
    let (base, families) = (fixture("bpe.json"), fixture("families.json"));
    assert!(families.as_object().unwrap().len() >= 14);
    for (name, family) in families.as_object().unwrap() {
        let mut json = base.clone();
        json["pre_tokenizer"] = family["pre_tokenizer"].clone();
        json["normalizer"] = family["normalizer"].clone();
        json["model"]["ignore_merges"] = family["ignore_merges"].clone();
        check(name, &from_json(&json).unwrap());
        let mut fields = byte_level(name);
        fields.push(("add_bos_token", Meta::Bool(false)));
        check(name, &Tokenizer::from_gguf(&gguf(&fields)).unwrap());
    }
}

#[test]
fn names_of_one_family_cut_alike() {
    let text = "don't  3456 \t日本\r\n x² ÅÅ\u{301}";
    let encode = |pre: &str| Tokenizer::from_gguf(&gguf(&byte_level(pre))).unwrap().encode(text);
    for names in
        [&["gpt-2", "phi-2"][..], &["olmo", "mpt"], &["starcoder", "refact", "smollm"], &["llama-bpe", "llama3", "llama-v3"]]
    {
        for name in names {
            assert_eq!(encode(name), encode(names[0]), "{name}");
        }
    }
    // What a converter writes that knows no family: llama.cpp's cuts.
    let tokenizer = Tokenizer::from_gguf(&gguf(&byte_level("default"))).unwrap();
    let apart = ["the", "+=", " the", " ", "123", "456", "7", "$"].map(|word| tokenizer.encode(word)).concat();
    assert_eq!(tokenizer.encode("the+= the 1234567$"), apart);
    let error = Tokenizer::from_gguf(&gguf(&byte_level("nosuchfamily"))).err().unwrap();
    assert!(format!("{error:#}").contains("\"nosuchfamily\" is not supported (supported: gpt-2, "), "{error:#}");
}

/// Expressions that need backtracking give up on long runs of blanks; those of tokenizer.json that can do without, must.
#[test]
fn a_million_blanks_are_cut_like_two_from_tokenizer_json() {
    let (mut json, families) = (fixture("bpe.json"), fixture("families.json"));
    json["pre_tokenizer"] = families["qwen2"]["pre_tokenizer"].clone();
    let tokenizer = from_json(&json).unwrap();
    let n_blanks = 1_100_000;
    let long = tokenizer.encode(&(" ".repeat(n_blanks) + "x y1 z"));
    let apart = [" ".repeat(n_blanks - 1), " x y1 z".to_owned()].map(|part| tokenizer.encode(&part)).concat();
    assert!(long == apart, "{} tokens, {} expected", long.len(), apart.len());
}

// -- SentencePiece

#[test]
fn sentencepiece_bpe_is_that_of_transformers() {
    let (base, variants) = (fixture("spm_bpe.json"), fixture("spm_bpe_variants.json"));
    assert_eq!(variants.as_object().unwrap().len(), 3);
    for (name, variant) in variants.as_object().unwrap() {
        let mut json = base.clone();
        for (key, value) in variant.as_object().unwrap() {
            json[key] = value.clone();
        }
        check(&format!("spm_bpe_{name}"), &from_json(&json).unwrap());
    }
    let mut fields = sentencepiece("spm_bpe.gguf.json");
    check("spm_bpe_prepend", &Tokenizer::from_gguf(&gguf(&fields)).unwrap());
    fields.push(("add_space_prefix", Meta::Bool(false)));
    check("spm_bpe_gemma", &Tokenizer::from_gguf(&gguf(&fields)).unwrap());
}

#[test]
fn unigram_is_that_of_transformers() {
    for name in ["unigram", "unigram_bytes"] {
        check(name, &from_json(&fixture(&format!("{name}.json"))).unwrap());
        check(name, &Tokenizer::from_gguf(&gguf(&sentencepiece(&format!("{name}.gguf.json")))).unwrap());
    }
}

#[test]
fn pieces_have_the_bytes_they_stand_for() {
    let tokenizer = Tokenizer::from_gguf(&gguf(&sentencepiece("spm_bpe.gguf.json"))).unwrap();
    let id =
        |token: &str| fixture("spm_bpe.gguf.json")["tokens"].as_array().unwrap().iter().position(|t| t == token).unwrap() as u32;
    assert_eq!(tokenizer.token_bytes(id("<0x0A>")), b"\n");
    assert_eq!(tokenizer.token_bytes(id("<0xFF>")), [0xff]);
    assert_eq!(tokenizer.token_bytes(id("▁the")), b" the");
    assert_eq!((tokenizer.token_bytes(id("</s>")), tokenizer.is_special(id("</s>"))), (&b"</s>"[..], true));
    assert_eq!((tokenizer.token_bytes(id("<sep>")), tokenizer.is_special(id("<sep>"))), (&b"<sep>"[..], false));
    assert_eq!(tokenizer.end_ids(), [2]);
    // A character that no token has, through its bytes, and back.
    let ids = tokenizer.encode("𓀀");
    assert_eq!((ids.len(), tokenizer.decode(&ids)), (5, "𓀀".to_owned()));
    assert_eq!(tokenizer.decode(&tokenizer.encode("  two blanks ")), "  two blanks ");
}

// -- ends, templates, configuration

#[test]
fn files_say_what_is_put_around_prompts() {
    let ends = |fields: &[(&'static str, Meta)], more: &[(&'static str, Meta)]| {
        let tokenizer = Tokenizer::from_gguf(&gguf(&[fields, more].concat())).unwrap();
        let (prompt, text) = (tokenizer.encode_prompt("a b"), tokenizer.encode("a b"));
        let start = prompt.windows(text.len()).position(|window| window == text).unwrap();
        (prompt[..start].to_vec(), prompt[start + text.len()..].to_vec())
    };
    let flag = |key, value| (key, Meta::Bool(value));
    let spm = sentencepiece("spm_bpe.gguf.json");
    assert_eq!(ends(&spm, &[]), (vec![1], vec![]), "SentencePiece's own default");
    assert_eq!(ends(&spm, &[flag("add_bos_token", false), flag("add_eos_token", true)]), (vec![], vec![2]));
    assert_eq!(ends(&sentencepiece("unigram.gguf.json"), &[]), (vec![], vec![2]));
    assert_eq!(ends(&byte_level("qwen2"), &[]), (vec![], vec![]));
    assert_eq!(ends(&byte_level("qwen2"), &[flag("add_bos_token", true)]), (vec![0], vec![]));
    assert_eq!(ends(&byte_level("llama-bpe"), &[]), (vec![0], vec![]));
    assert_eq!(ends(&byte_level("llama-bpe"), &[flag("add_bos_token", false)]), (vec![], vec![]));
}

#[test]
fn the_configuration_names_special_tokens_and_ends() {
    let json = fixture("bpe.json");
    let n = json["model"]["vocab"].as_object().unwrap().len() + 1;
    let config = json!({"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "lstrip": false}, "add_bos_token": true});
    let generation = json!({"eos_token_id": [2, 1]});
    let tokenizer = from_files(&json, Some(&config), Some(&generation), n).unwrap();
    assert_eq!(tokenizer.end_ids(), [1, 2]);
    assert_eq!(tokenizer.encode_prompt("<|turn|>"), [0, 2]);
    assert_eq!(from_files(&json, Some(&config), None, n).unwrap().end_ids(), [1]);
    assert_eq!(from_files(&json, None, Some(&json!({"eos_token_id": 2})), n).unwrap().end_ids(), [2]);
    assert_ne!(from_files(&json, None, None, n).unwrap().hash(), tokenizer.hash());
    // A token that only the configuration calls special.
    let mut plain = json.clone();
    plain["added_tokens"].as_array_mut().unwrap().remove(1);
    assert!(from_files(&plain, None, None, n).unwrap().encode("<|end|>").len() > 1);
    let tokenizer = from_files(&plain, Some(&config), None, n).unwrap();
    assert_eq!((tokenizer.encode("a<|end|>").last(), tokenizer.is_special(1)), (Some(&1), true));
    // An embedding that is larger than the tokenizer, or lacks its last added token.
    let tokenizer = from_files(&json, None, None, n + 10).unwrap();
    assert_eq!((tokenizer.n_vocab(), tokenizer.token_bytes(n as u32 + 3)), (n + 10, &b""[..]));
    let tokenizer = from_files(&json, None, None, n - 1).unwrap();
    assert!(tokenizer.n_vocab() == n - 1 && tokenizer.encode("<tool>").len() > 1);
}

#[test]
fn chat_templates_come_from_either_file() {
    let render = |config: Option<&str>, jinja: Option<&str>| {
        let files =
            HfFiles { tokenizer: "", tokenizer_config: config, chat_template: jinja, generation_config: None, n_vocab: 1 };
        ChatTemplate::from_hf(&files).unwrap().render(&[], true, &ChatOptions::default()).map_err(|error| error.message)
    };
    let config = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "A{{ bos_token }}{{ eos_token }}"}"#;
    let named = r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    assert_eq!(render(Some(config), None).unwrap(), "A<s></s>");
    assert_eq!(render(Some(config), Some("J{{ eos_token }}")).unwrap(), "J</s>");
    assert_eq!(render(Some(named), None).unwrap(), "D");
    assert!(render(None, None).unwrap_err().contains("no chat template"));
}

#[test]
fn what_cannot_be_is_refused() {
    let json = fixture("bpe.json");
    let check = |edit: &dyn Fn(&mut Value), expected: &str| {
        let mut json = json.clone();
        edit(&mut json);
        let error = from_json(&json).err().expect(expected);
        assert!(error.contains(expected), "{error}");
    };
    check(&|json| json["decoder"] = Value::Null, "decoder");
    check(&|json| json["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "\"WordPiece\"");
    check(
        &|json| json["post_processor"] = json!({"type": "BertProcessing"}),
        "post_processor: not supported: \"BertProcessing\"",
    );
    check(&|json| json["pre_tokenizer"] = json!({"type": "Nosuch"}), "pre_tokenizer: cannot be read");
    check(&|json| json["added_tokens"][3]["id"] = json!(905), "has id 905 in the file");
    check(&|json| json["model"]["vocab"]["zzz"] = json!(5000), "\"zzz\" has id 5000");
    check(&|json| json["model"]["merges"][0] = json!(["x", "nosuchtoken"]), "cannot be read");
    let words = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
    check(&|json| json["model"] = words.clone(), "neither BPE nor Unigram");
    let n = json["model"]["vocab"].as_object().unwrap().len() + 1;
    let refuse = |config: Value, generation: Value, expected: &str| {
        let error = from_files(&json, Some(&config), Some(&generation), n).err().expect(expected);
        assert!(error.contains(expected), "{error}");
    };
    refuse(json!({"eos_token": "nosuchtoken"}), json!({}), "eos_token is \"nosuchtoken\", which is no token");
    refuse(json!({"eos_token": 3}), json!({}), "tokenizer_config.json: eos_token is no token: 3");
    refuse(json!([]), json!({}), "tokenizer_config.json: is not a JSON object");
    refuse(json!({}), json!({"eos_token_id": -1}), "generation_config.json: eos_token_id -1");
    refuse(json!({}), json!({"eos_token_id": 70000}), "token id 70000");
    let spm = sentencepiece("spm_bpe.gguf.json");
    let without: Vec<_> = spm.iter().filter(|(key, _)| *key != "scores").cloned().collect();
    let error = Tokenizer::from_gguf(&gguf(&without)).err().unwrap();
    assert!(format!("{error:#}").contains("tokenizer.ggml.scores is missing"), "{error:#}");
}
