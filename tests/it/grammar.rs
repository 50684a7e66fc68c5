//! Compiled formats: what they let through and what they don't, token by token, with the default model's vocabulary.

use crate::common::model_path;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use valar::engine::shaping::Grammar;
use valar::gguf::Gguf;
use valar::grammar::Grammars;
use valar::request::{AnswerFormat, ChatOptions, Message, ToolChoice};
use valar::text::template::ChatTemplate;
use valar::text::tokenizer::Tokenizer;
use valar::text::tool_calls::CallFormat;

static TOKENIZER: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_gguf(&Gguf::open(&model_path()).unwrap()).unwrap()));

fn compile(format: &AnswerFormat) -> Arc<dyn Grammar> {
    Grammars::new(Arc::clone(&TOKENIZER)).compile(format).unwrap().unwrap()
}

/// Whether a text may be a whole answer: each of its tokens is allowed in its place, and then the end.
fn takes(grammar: &dyn Grammar, text: &str) -> bool {
    let mut constraint = grammar.start();
    let mut words = vec![0; TOKENIZER.n_vocab().div_ceil(32)];
    let mut allows = |constraint: &mut dyn valar::engine::shaping::Constraint, token: u32| {
        constraint.mask(&mut words).unwrap();
        words[token as usize / 32] >> (token % 32) & 1 == 1
    };
    for token in TOKENIZER.encode(text) {
        if !allows(&mut *constraint, token) {
            return false;
        }
        constraint.accept(token).unwrap();
    }
    allows(&mut *constraint, TOKENIZER.end_ids()[0])
}

#[test]
fn what_a_format_allows_and_nothing_else() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}}, "required": ["a"], "additionalProperties": false});
    let cases: [(AnswerFormat, &[&str], &[&str]); 5] = [
        (
            AnswerFormat::Regex("[a-c]+(-[0-9]{2})?".into()),
            &["a", "abc", "cab-07"],
            &["", "d", "abc-", "a-1", "abc-123", "<|im_end|>"],
        ),
        (
            AnswerFormat::JsonSchema(Arc::new(schema)),
            &["{\"a\": 1}", "{\"a\": -12, \"b\": \"yz\"}"],
            &["{}", "{\"a\": \"1\"}", "{\"a\": 1, \"b\": \"y\"}", "{\"a\": 1} ", "{\"a\": 1, \"c\": 2}", "{\"a\":1}"],
        ),
        (AnswerFormat::JsonObject, &["{}", "{\"k\": [1, 2.5, null, {\"z\": \"é\"}]}"], &["[]", "1", "{", "{\"k\" 1}"]),
        (AnswerFormat::Lark("start: \"a\" start \"b\" | \"\"".into()), &["ab", "aaabbb"], &["aab", "abb"]),
        (AnswerFormat::Lark("start: x+\nx: \"no\" | \"yes\"".into()), &["yes", "noyesno"], &["", "maybe", "yess"]),
    ];
    for (format, good, bad) in cases {
        let grammar = compile(&format);
        for text in good {
            assert!(takes(&*grammar, text), "{format:?} refuses {text:?}");
        }
        for text in bad {
            assert!(!takes(&*grammar, text), "{format:?} takes {text:?}");
        }
    }
}

#[test]
fn a_format_is_compiled_once_and_a_wrong_one_says_why() {
    let grammars = Grammars::new(Arc::clone(&TOKENIZER));
    let schema = AnswerFormat::JsonSchema(Arc::new(json!({"type": "object"})));
    let (a, b) = (grammars.compile(&schema).unwrap().unwrap(), grammars.compile(&schema).unwrap().unwrap());
    assert!(Arc::ptr_eq(&a, &b));
    assert!(grammars.compile(&AnswerFormat::Text).unwrap().is_none());
    for (format, word) in [
        (AnswerFormat::JsonSchema(Arc::new(json!({"type": "strange"}))), "strange"),
        (AnswerFormat::JsonSchema(Arc::new(json!({"type": "object", "unevaluatedProperties": false}))), "unevaluatedProperties"),
        (AnswerFormat::Regex("(".into()), "("),
        (AnswerFormat::Lark("start: nothing".into()), "nothing"),
    ] {
        let error = grammars.compile(&format).unwrap_err();
        assert!(error.contains(word) && error.chars().count() <= 301, "{format:?}: {error}");
    }
}

#[test]
fn a_required_call_is_one() {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": false}}});
    let tools = [tool("f"), tool("g")];
    for (format, call, other) in [
        (
            CallFormat::Tagged,
            "<tool_call>\n{\"name\": \"g\", \"arguments\": {\"x\": 5}}\n</tool_call>",
            "<tool_call>\n{\"name\": \"h\", \"arguments\": {\"x\": 5}}\n</tool_call>",
        ),
        (CallFormat::List, "[TOOL_CALLS][{\"name\": \"g\", \"arguments\": {\"x\": 5}}]", "[TOOL_CALLS][]"),
        (CallFormat::Bare, "{\"name\": \"g\", \"parameters\": {\"x\": 5}}", "{\"name\": \"g\", \"parameters\": {}}"),
    ] {
        let grammar = |choice: &ToolChoice| compile(&AnswerFormat::Lark(format.required(&tools, choice).unwrap()));
        let any = grammar(&ToolChoice::Required);
        assert!(takes(&*any, call) && !takes(&*any, other) && !takes(&*any, "Hello."), "{format:?}");
        assert!(
            takes(&*grammar(&ToolChoice::Named("g".into())), call) && !takes(&*grammar(&ToolChoice::Named("f".into())), call)
        );
        // Parameters may refer to their own definitions.
        let shared = json!({"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}, "required": ["x"], "additionalProperties": false, "$defs": {"n": {"type": "integer"}}}}});
        let by_reference = compile(&AnswerFormat::Lark(format.required(&[shared], &ToolChoice::Required).unwrap()));
        assert!(takes(&*by_reference, call) && !takes(&*by_reference, other), "{format:?}");
        let (text, calls) = format.parse(call);
        assert_eq!((text.as_str(), calls[0].name.as_str(), calls[0].arguments.as_str()), ("", "g", "{\"x\":5}"));
        assert_eq!(format.required(&tools, &ToolChoice::Auto), None);
    }
}

#[test]
fn templates_see_tools_calls_and_their_answers() {
    let source = "{% for t in tools or [] %}<tools>{{ t.function.name }} {{ t | tojson }}</tools>{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{{ m.tool_call_id }}{% endfor %}{{ mood }}{% if add_generation_prompt %}[assistant]{% endif %}";
    let template = ChatTemplate::new(source, &BTreeMap::new());
    assert_eq!(template.call_format(), Some(CallFormat::Tagged));
    let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}});
    let turn = |role: &str, content: &str| Message { role: role.into(), content: content.into(), ..Message::default() };
    let messages = [
        turn("user", "hi"),
        Message { tool_calls: vec![call], ..turn("assistant", "") },
        Message { tool_call_id: Some("c".into()), ..turn("tool", "2") },
    ];
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let mut chat = ChatOptions { tools: vec![tool], ..ChatOptions::default() };
    chat.template_kwargs.insert("mood".into(), Value::from("calm"));
    let shown = "<tools>f {\"type\": \"function\", \"function\": {\"name\": \"f\"}}</tools>";
    let turns = "[user]hi[assistant]<tool_call>{\"x\": 1}</tool_call>[tool]2ccalm[assistant]";
    assert_eq!(template.render_chat(&messages, &chat).unwrap(), format!("{shown}{turns}"));
    chat.tool_choice = ToolChoice::None;
    assert_eq!(template.render_chat(&messages, &chat).unwrap(), turns);
}
