//! Reads a plain Batch line of `/v1/completions` without making a tree of values: one prompt, as text or as token ids
//! (which are most of such a line), and the commonest parameters. Invariant: whatever it does not take is left to the
//! general parser; what it takes, that parser would have read the same (tested).

use super::{BatchLine, BatchRequest, Endpoint, MAX_CUSTOM_ID_CHARS};
use crate::request::{ChatOptions, Input, Params, Request, Truncate};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Text with an escape in it is not borrowed, and so refused.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    custom_id: &'a str,
    method: &'a str,
    url: &'a str,
    #[serde(borrow)]
    body: Object<Body<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body<'a> {
    #[serde(borrow)]
    model: Option<&'a str>,
    prompt: Prompt,
    max_tokens: Option<u32>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    seed: Option<u64>,
}

/// A value that must be written as an object: a derived struct would take an array of its fields too.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(ObjectVisitor(PhantomData)).map(Self)
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

/// A text, or at least one token id.
struct Prompt(Input);

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(PromptVisitor).map(Self)
    }
}

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Input;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Input, E> {
        Ok(Input::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Input, A::Error> {
        let mut ids = Vec::with_capacity(128);
        while let Some(id) = items.next_element()? {
            ids.push(id);
        }
        if ids.is_empty() { Err(A::Error::custom("no ids")) } else { Ok(Input::Tokens(ids)) }
    }
}

/// Parses a line, if it is a plain one.
pub(super) fn parse(row_idx: u64, line: &str, defaults: &Params) -> Option<BatchLine> {
    let Object(Line { custom_id, method, url, body }) = serde_json::from_str(line).ok()?;
    let Object(Body { model, prompt, max_tokens, temperature, top_p, seed }) = body;
    let is_in = |x: Option<f64>, max: f64| x.is_none_or(|x| (0.0..=max).contains(&x));
    let is_plain = (1..=MAX_CUSTOM_ID_CHARS).contains(&custom_id.chars().count())
        && (method, Endpoint::parse(url)?) == ("POST", Endpoint::Completions)
        && max_tokens != Some(0)
        && is_in(temperature, 2.0)
        && is_in(top_p, 1.0);
    if !is_plain {
        return None;
    }
    let params = Params {
        max_tokens: max_tokens.or(defaults.max_tokens).or(Some(super::COMPLETIONS_MAX_TOKENS)),
        temperature: temperature.map_or(defaults.temperature, |x| x as f32),
        top_p: top_p.map_or(defaults.top_p, |x| x as f32),
        seed: seed.or(defaults.seed),
        logprobs: None,
        echo: false,
        ..defaults.clone()
    };
    let request = Request {
        row_idx,
        model: model.map(str::to_owned),
        inputs: vec![prompt.0],
        params,
        chat: ChatOptions::default(),
        truncate: Truncate::Never,
    };
    let request = BatchRequest { endpoint: Endpoint::Completions, request, echo: None };
    Some(BatchLine { custom_id: Some(custom_id.to_owned()), request: Ok(request) })
}

#[cfg(test)]
mod tests {
    use super::super::parse_any_line;
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// Values that a field may have, most of them wrong for most fields.
    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            prop::sample::select(vec![
                json!(null),
                json!(0),
                json!(1),
                json!(-1),
                json!(7),
                json!(2.0),
                json!(0.5),
                json!(1.1),
                json!(2.01),
                json!(1e300),
                json!(u32::MAX),
                json!(u64::from(u32::MAX) + 1),
                json!(u64::MAX),
                json!(i64::MIN),
                json!(true),
                json!("POST"),
                json!("/v1/completions"),
                json!("/v1/chat/completions"),
                json!(""),
                json!("a \"q\" \u{1F600}"),
                json!([]),
                json!([1, 2, 4_294_967_295_u64]),
                json!([1, -1]),
                json!([1, 2.5]),
                json!(["a"]),
                json!([[1]]),
                json!({}),
                json!("x".repeat(513)),
            ]),
            any::<String>().prop_map(Value::from),
            prop::collection::vec(any::<u32>(), 1..9).prop_map(Value::from),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn both_parsers_read_the_same(
            changes in prop::collection::vec((0..12_usize, value()), 0..3),
            ids in prop::collection::vec(any::<u32>(), 1..9),
            as_text in any::<bool>(),
        ) {
            let prompt = if as_text { json!("once upon") } else { json!(ids) };
            let mut line = json!({"custom_id": "a", "method": "POST", "url": "/v1/completions",
                "body": {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0}});
            let fields = ["custom_id", "method", "url", "body", "x", "model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n"];
            for (field, value) in changes {
                match &mut line["body"] {
                    Value::Object(body) if field > 4 => drop(body.insert(fields[field].into(), value)),
                    _ => line[fields[field]] = value,
                }
            }
            let (text, defaults) = (line.to_string(), Params { top_k: 3, max_tokens: None, ..Params::default() });
            let general = parse_any_line(9, &text, &defaults);
            if let Some(plain) = parse(9, &text, &defaults) {
                prop_assert_eq!(plain.custom_id, general.custom_id);
                let (plain, general) = (plain.request.unwrap(), general.request.unwrap());
                prop_assert_eq!((plain.endpoint, plain.request, plain.echo), (general.endpoint, general.request, general.echo));
            }
        }
    }

    #[test]
    fn what_is_not_plain_is_left_alone() {
        let line = |prompt: &str, rest: &str| {
            format!(r#"{{"custom_id":"a","method":"POST","url":"/v1/completions","body":{{"prompt":{prompt}{rest}}}}}"#)
        };
        let parse = |line: &str| parse(0, line, &Params::default());
        let inputs = |line: &str| parse(line).unwrap().request.unwrap().request.inputs;
        assert_eq!(inputs(&line("[1,2,4294967295]", "")), [Input::Tokens(vec![1, 2, u32::MAX])]);
        assert_eq!(inputs(&line(r#""a\nb""#, r#","max_tokens":3"#)), [Input::Text("a\nb".into())]);
        for (prompt, rest) in [
            ("[]", ""),
            ("[1,-1]", ""),
            ("[4294967296]", ""),
            (r#"["a"]"#, ""),
            ("[1]", r#","prompt":[2]"#),
            ("[1]", r#","n":2"#),
            ("[1]", r#","max_tokens":0"#),
            ("[1]", r#","temperature":2.5"#),
            ("[1]", "}} x"),
        ] {
            assert!(parse(&line(prompt, rest)).is_none(), "{prompt} {rest}");
        }
        // Fields in their order, but no objects.
        assert!(parse(r#"["a","POST","/v1/completions",{"prompt":"hi"}]"#).is_none());
        let body = r#"[null,"hi",4,0,null,null]"#;
        assert!(parse(&format!(r#"{{"custom_id":"a","method":"POST","url":"/v1/completions","body":{body}}}"#)).is_none());
    }
}
