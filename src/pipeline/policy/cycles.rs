//! Finds JSON schemas that no value can be checked by: those that lead back to themselves without going into the value. The
//! validator would follow them until its stack or the memory ends. Knows the keywords that apply a schema to the same value.

use anyhow::{Result, ensure};
use serde_json::Value;
use std::collections::HashSet;
use std::ptr;

/// Most schemas that may apply to one value, one by way of the other.
const MAX_DEPTH: usize = 500;

/// # Errors
/// There is a cycle, or too long a way.
pub(super) fn refuse(root: &Value) -> Result<()> {
    let mut search = Search { root, path: Vec::new(), done: HashSet::new() };
    search.walk(root)
}

struct Search<'a> {
    root: &'a Value,
    /// The schemas on the way here.
    path: Vec<*const Value>,
    /// Schemas from which no cycle is reached.
    done: HashSet<*const Value>,
}

impl<'a> Search<'a> {
    /// Begins at every object of the document.
    fn walk(&mut self, value: &'a Value) -> Result<()> {
        match value {
            Value::Object(fields) => {
                self.visit(value)?;
                fields.values().try_for_each(|field| self.walk(field))
            }
            Value::Array(items) => items.iter().try_for_each(|item| self.walk(item)),
            _ => Ok(()),
        }
    }

    fn visit(&mut self, schema: &'a Value) -> Result<()> {
        let at = ptr::from_ref(schema);
        let target = || schema["$ref"].as_str().unwrap_or("a schema");
        ensure!(!self.path.contains(&at), "{} leads back to itself without going into the value", target());
        ensure!(self.path.len() < MAX_DEPTH, "over {MAX_DEPTH} schemas, one by way of the other, for one value");
        if self.done.contains(&at) {
            return Ok(());
        }
        self.path.push(at);
        for next in self.of_same_value(schema) {
            self.visit(next)?;
        }
        self.path.pop();
        self.done.insert(at);
        Ok(())
    }

    /// The schemas that apply where this one does.
    fn of_same_value(&self, schema: &'a Value) -> Vec<&'a Value> {
        let mut found = Vec::new();
        for key in ["$ref", "$dynamicRef", "$recursiveRef"] {
            let pointer = schema[key].as_str().and_then(|target| target.strip_prefix('#'));
            found.extend(pointer.and_then(|pointer| self.root.pointer(pointer)));
        }
        found.extend(["not", "if", "then", "else"].iter().filter_map(|key| schema.get(key)));
        found.extend(["allOf", "anyOf", "oneOf"].iter().filter_map(|key| schema[key].as_array()).flatten());
        found.extend(schema["dependentSchemas"].as_object().into_iter().flat_map(serde_json::Map::values));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn cycles_are_those_that_stay_at_one_value() {
        let tree = json!({"properties": {"left": {"$ref": "#"}, "all": {"items": {"$ref": "#/$defs/a"}}}, "$defs": {"a": {"$ref": "#"}}});
        refuse(&tree).unwrap();
        refuse(&json!({"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "string"}}})).unwrap();
        for cycle in [
            json!({"$ref": "#"}),
            json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}),
            json!({"properties": {"x": {"anyOf": [{"$ref": "#/properties/x"}]}}}),
            json!({"$defs": {"a": {"not": {"$ref": "#/$defs/b"}}, "b": {"if": {"$ref": "#/$defs/a"}}}}),
        ] {
            let error = refuse(&cycle).unwrap_err().to_string();
            assert!(error.contains("leads back to itself"), "{cycle}: {error}");
        }
        let long: Value = (0..2000).map(|i| (i.to_string(), json!({"$ref": format!("#/{}", i + 1)}))).collect();
        assert!(refuse(&long).unwrap_err().to_string().contains("over 500"));
    }
}
