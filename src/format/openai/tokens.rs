//! Reads a Batch line whose prompt is token ids without making a JSON value of each id: they are most of such a line.
//! Knows where the ids stand (`body.prompt`) and nothing else of what a line means. Invariant: whatever it does not take
//! is left to the general parser; what it takes, that parser would have read the same.

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// Stands in the line's object for the ids.
const PLACEHOLDER: u32 = 0;

/// A line as an object, with `[0]` in place of its prompt's ids, and the ids; `None` if it is anything else.
pub(super) fn split_tokens(line: &str) -> Option<(Map<String, Value>, Vec<u32>)> {
    let mut tokens = None;
    let mut json = serde_json::Deserializer::from_str(line);
    let object = Line(Place::Line, &mut tokens).deserialize(&mut json).ok()?;
    json.end().ok()?;
    Some((object, tokens?))
}

/// Which object is being read.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Line,
    Body,
}

struct Line<'t>(Place, &'t mut Option<Vec<u32>>);

impl<'de> DeserializeSeed<'de> for Line<'_> {
    type Value = Map<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Line<'_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let Self(place, tokens) = self;
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = match (place, &*key) {
                (Place::Line, "body") => Value::Object(map.next_value_seed(Line(Place::Body, tokens))?),
                (Place::Body, "prompt") => {
                    *tokens = Some(map.next_value_seed(Ids)?);
                    vec![PLACEHOLDER].into()
                }
                _ => map.next_value()?,
            };
            // Of a field that stands there twice the last one counts; that is the general parser's matter.
            if object.insert(key, value).is_some() {
                return Err(A::Error::custom("a field stands there twice"));
            }
        }
        Ok(object)
    }
}

/// An array of at least one id.
struct Ids;

impl<'de> DeserializeSeed<'de> for Ids {
    type Value = Vec<u32>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Vec<u32>, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Ids {
    type Value = Vec<u32>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("token ids")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<u32>, A::Error> {
        let mut ids = Vec::with_capacity(128);
        while let Some(id) = items.next_element()? {
            ids.push(id);
        }
        if ids.is_empty() { Err(A::Error::custom("no ids")) } else { Ok(ids) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_are_taken() {
        let (object, ids) = split_tokens(r#" {"a":1.50,"body":{"prompt":[1,2,4294967295],"x":{"prompt":"y"}},"b":[]} "#).unwrap();
        assert_eq!(ids, [1, 2, u32::MAX]);
        assert_eq!(Value::Object(object).to_string(), r#"{"a":1.5,"body":{"prompt":[0],"x":{"prompt":"y"}},"b":[]}"#);
        for line in [
            r#"{"body":{"prompt":[]}}"#,
            r#"{"body":{"prompt":[1,-1]}}"#,
            r#"{"body":{"prompt":[1,2.5]}}"#,
            r#"{"body":{"prompt":[4294967296]}}"#,
            r#"{"body":{"prompt":["a"]}}"#,
            r#"{"body":{"prompt":"a"}}"#,
            r#"{"body":{"prompt":[1],"prompt":[2]}}"#,
            r#"{"body":{"prompt":[1]},"body":null}"#,
            r#"{"body":"{\"prompt\":[1]}"}"#,
            r#"{"prompt":[1]}"#,
            r#"{"body":{"prompt":[1]}} x"#,
            r#"{"body":{"prompt":[1]"#,
            "[1]",
        ] {
            assert_eq!(split_tokens(line), None, "{line}");
        }
    }
}
