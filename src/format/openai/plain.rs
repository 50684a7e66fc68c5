//! Reads a plain Batch line of `/v1/completions` in one pass over its bytes, without making a tree of values: one prompt,
//! as text or as token ids (which are most of such a line), and the commonest parameters. Invariant: whatever it does not
//! take is left to the general parser; what it takes, that parser would have read the same (tested).

use super::{BatchLine, BatchRequest, Endpoint, MAX_CUSTOM_ID_CHARS};
use crate::request::{ChatOptions, Input, Params, Request, Truncate};
use serde::Deserialize;

/// Fields of the line; text with an escape in it is not plain.
#[derive(Default)]
struct Line<'a> {
    custom_id: Option<&'a str>,
    method: Option<&'a str>,
    url: Option<&'a str>,
    body: Option<Body<'a>>,
}

#[derive(Default)]
struct Body<'a> {
    model: Option<&'a str>,
    prompt: Option<Input>,
    max_tokens: Option<u32>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    seed: Option<u64>,
}

/// Sets a field; `None` if it was there already.
fn set<T>(field: &mut Option<T>, value: T) -> Option<()> {
    field.replace(value).is_none().then_some(())
}

/// What is left to read. Every reader moves past what it has read; `None` is anything that is not plain.
struct Scan<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scan<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    /// The next byte but blanks, if it is this one.
    fn eat(&mut self, byte: u8) -> Option<()> {
        self.skip_blanks();
        let is_there = self.peek() == Some(byte);
        self.at += usize::from(is_there);
        is_there.then_some(())
    }

    /// What follows the next byte but blanks: another element, or the end.
    fn has_next(&mut self, end: u8) -> Option<bool> {
        if self.eat(b',').is_some() { Some(true) } else { self.eat(end).map(|()| false) }
    }

    /// Reads an object, giving each key to `field` with what follows it still to be read.
    fn object(&mut self, mut field: impl FnMut(&mut Self, &'a str) -> Option<()>) -> Option<()> {
        self.eat(b'{')?;
        if self.eat(b'}').is_some() {
            return Some(());
        }
        loop {
            let key = self.string()?;
            self.eat(b':')?;
            field(self, key)?;
            if !self.has_next(b'}')? {
                return Some(());
            }
        }
    }

    /// A string without escapes.
    fn string(&mut self) -> Option<&'a str> {
        self.eat(b'"')?;
        let rest = &self.text[self.at..];
        let n_bytes = rest.bytes().position(|byte| matches!(byte, b'"' | b'\\' | 0..b' '))?;
        self.at += n_bytes + 1;
        (rest.as_bytes()[n_bytes] == b'"').then_some(&rest[..n_bytes])
    }

    /// A string, perhaps with escapes.
    fn any_string(&mut self) -> Option<String> {
        self.skip_blanks();
        let mut values = serde_json::Deserializer::from_str(&self.text[self.at..]).into_iter::<String>();
        let string = values.next()?.ok()?;
        self.at += values.byte_offset();
        Some(string)
    }

    /// A number, as `serde_json` reads it.
    fn number<T: Deserialize<'a>>(&mut self) -> Option<T> {
        self.skip_blanks();
        let rest = &self.text[self.at..];
        let n_bytes = rest.bytes().position(|byte| !matches!(byte, b'+' | b'-' | b'.' | b'0'..=b'9' | b'e' | b'E'))?;
        self.at += n_bytes;
        serde_json::from_str(&rest[..n_bytes]).ok()
    }

    /// At least one token id.
    fn ids(&mut self) -> Option<Vec<u32>> {
        self.eat(b'[')?;
        let mut ids = Vec::with_capacity(128);
        loop {
            self.skip_blanks();
            let (id, n_bytes) = id(&self.text.as_bytes()[self.at..])?;
            ids.push(id);
            self.at += n_bytes;
            if self.peek() == Some(b',') {
                self.at += 1;
            } else if !self.has_next(b']')? {
                return Some(ids);
            }
        }
    }

    fn line(&mut self) -> Option<Line<'a>> {
        let mut line = Line::default();
        self.object(|scan, key| match key {
            "custom_id" => set(&mut line.custom_id, scan.string()?),
            "method" => set(&mut line.method, scan.string()?),
            "url" => set(&mut line.url, scan.string().filter(|url| Endpoint::parse(url) == Some(Endpoint::Completions))?),
            "body" => set(&mut line.body, scan.body()?),
            _ => None,
        })?;
        self.skip_blanks();
        (self.at == self.text.len()).then_some(line)
    }

    fn body(&mut self) -> Option<Body<'a>> {
        let mut body = Body::default();
        self.object(|scan, key| match key {
            "model" => set(&mut body.model, scan.string()?),
            "prompt" => {
                scan.skip_blanks();
                let is_list = scan.peek() == Some(b'[');
                let prompt = if is_list { scan.ids().map(Input::Tokens) } else { scan.any_string().map(Input::Text) };
                set(&mut body.prompt, prompt?)
            }
            "max_tokens" => set(&mut body.max_tokens, scan.number()?),
            "temperature" => set(&mut body.temperature, scan.number()?),
            "top_p" => set(&mut body.top_p, scan.number()?),
            "seed" => set(&mut body.seed, scan.number()?),
            _ => None,
        })?;
        Some(body)
    }
}

/// The number without sign, fraction or exponent that `text` begins with, and its length; whatever may not follow it is
/// found by who reads on.
fn id(text: &[u8]) -> Option<(u32, usize)> {
    // Up to seven digits and what follows them are one word of eight bytes, the first digit lowest.
    if let Some(word) = text.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        // A byte is a digit if its high half is 3, now and with 6 added to the low one. What a byte that is none carries into
        // the next ones doesn't matter: it ends the number.
        let not_digits =
            ((word & (0xf0 * ONES)) ^ (0x30 * ONES)) | ((word.wrapping_add(6 * ONES) & (0xf0 * ONES)) ^ (0x30 * ONES));
        let n_digits = (not_digits.trailing_zeros() / 8) as usize;
        if (1..8).contains(&n_digits) {
            // Zeros in front, then neighbours joined: digits to pairs, to fours, to the number.
            let digits = (word << (64 - 8 * n_digits)) & (0x0f * ONES);
            let pairs = (digits * 10 + (digits >> 8)) & 0x00ff_00ff_00ff_00ff;
            let fours = (pairs * 100 + (pairs >> 16)) & 0x0000_ffff_0000_ffff;
            let number = (fours * 10_000 + (fours >> 32)) as u32;
            // Numbers have no leading zeros.
            return (n_digits == 1 || text[0] != b'0').then_some((number, n_digits));
        }
    }
    let n_digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = std::str::from_utf8(&text[..n_digits]).ok()?.parse().ok()?;
    (n_digits == 1 || text[0] != b'0').then_some((number, n_digits))
}

/// Parses a line, if it is a plain one.
pub(super) fn parse(row_idx: u64, line: &str, defaults: &Params) -> Option<BatchLine> {
    let Line { custom_id, method, url, body } = Scan { text: line, at: 0 }.line()?;
    let (custom_id, Body { model, prompt, max_tokens, temperature, top_p, seed }) = (custom_id?, body?);
    let is_in = |x: Option<f64>, max: f64| x.is_none_or(|x| (0.0..=max).contains(&x));
    let is_plain = (1..=MAX_CUSTOM_ID_CHARS).contains(&custom_id.chars().count())
        && (method, url.is_some()) == (Some("POST"), true)
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
        inputs: vec![prompt?],
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
            (cut, insert) in (0..1000_usize, prop::sample::select(vec!["", " ", "\t\r\n", ",", "0", "9", "-", ".5", "e1", "\"", "\\", "}", "null", "\u{1}"])),
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
            let mut text = line.to_string();
            let cut = text.floor_char_boundary(cut % (text.len() + 1));
            text.insert_str(cut, insert);
            let (text, defaults) = (text, Params { top_k: 3, max_tokens: None, ..Params::default() });
            let general = parse_any_line(9, &text, &defaults);
            if let Some(plain) = parse(9, &text, &defaults) {
                prop_assert_eq!(plain.custom_id, general.custom_id);
                let (plain, general) = (plain.request.unwrap(), general.request.unwrap());
                prop_assert_eq!((plain.endpoint, plain.request, plain.echo), (general.endpoint, general.request, general.echo));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn numbers_are_read_whatever_follows_them(number in "0{0,2}[0-9]{0,11}", rest in "([,\\] \n.eE:/-9a-f\u{80}-\u{10ffff}]{0,9})?") {
            let text = number.clone() + &rest;
            let digits = text.bytes().take_while(u8::is_ascii_digit).count();
            let wanted = text[..digits].parse::<u32>().ok().filter(|_| digits == 1 || !text.starts_with('0'));
            prop_assert_eq!(id(text.as_bytes()), wanted.map(|number| (number, digits)));
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
            ("[01]", ""),
            ("[1,]", ""),
            ("[1 2]", ""),
            ("[1e0]", ""),
            ("[1.0]", ""),
            ("[99999999999999999999]", ""),
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
