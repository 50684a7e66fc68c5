//! The files of a Hugging Face model directory that say how texts become tokens. Knows their field names; opens no files.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;

/// The contents of a model directory's files; what is absent is `None`.
#[derive(Debug, Clone, Copy)]
pub struct HfFiles<'a> {
    /// `tokenizer.json`
    pub tokenizer: &'a str,
    /// `tokenizer_config.json`
    pub tokenizer_config: Option<&'a str>,
    /// `chat_template.jinja`, which goes before the template in `tokenizer_config.json`.
    pub chat_template: Option<&'a str>,
    /// `generation_config.json`
    pub generation_config: Option<&'a str>,
    /// Rows of the model's embedding. Ids past the tokenizer's own are holes; added tokens past the embedding's rows (an
    /// image token of a model without eyes) are no tokens of the model.
    pub n_vocab: usize,
}

/// What `tokenizer_config.json` and `generation_config.json` say.
#[derive(Debug, Default)]
pub(super) struct HfConfig {
    /// `bos_token`, `eos_token` and their like, by name.
    pub(super) specials: BTreeMap<String, String>,
    pub(super) chat_template: Option<String>,
    pub(super) add_bos: Option<bool>,
    pub(super) add_eos: Option<bool>,
    /// Tokens that end a completion.
    pub(super) end_ids: Vec<u32>,
}

/// The names that templates may use, and that `transformers` recognises in a text.
const SPECIALS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

impl HfConfig {
    /// # Errors
    /// A file is no JSON object, or a field has a value of another kind than `transformers` writes.
    pub(super) fn read(files: &HfFiles<'_>) -> Result<Self> {
        let mut config = Self::default();
        if let Some(text) = files.tokenizer_config {
            config.read_tokenizer_config(text).context("tokenizer_config.json")?;
        }
        if let Some(template) = files.chat_template {
            config.chat_template = Some(template.to_owned());
        }
        if let Some(text) = files.generation_config {
            config.read_generation_config(text).context("generation_config.json")?;
        }
        Ok(config)
    }

    fn read_tokenizer_config(&mut self, text: &str) -> Result<()> {
        let fields: Value = serde_json::from_str(text).context("is not JSON")?;
        ensure!(fields.is_object(), "is not a JSON object");
        for name in SPECIALS {
            let token = match &fields[name] {
                Value::Null => continue,
                Value::Object(token) => token.get("content").unwrap_or(&Value::Null),
                token => token,
            };
            let token = token.as_str().with_context(|| format!("{name} is no token: {token}"))?;
            self.specials.insert(name.to_owned(), token.to_owned());
        }
        self.chat_template = match &fields["chat_template"] {
            Value::Null => None,
            Value::String(template) => Some(template.clone()),
            Value::Array(named) => {
                let template = named.iter().find(|template| template["name"] == "default");
                template.and_then(|template| template["template"].as_str()).map(str::to_owned)
            }
            other => bail!("chat_template is neither a text nor a list: {other}"),
        };
        self.add_bos = fields["add_bos_token"].as_bool();
        self.add_eos = fields["add_eos_token"].as_bool();
        Ok(())
    }

    fn read_generation_config(&mut self, text: &str) -> Result<()> {
        let fields: Value = serde_json::from_str(text).context("is not JSON")?;
        let ids = match &fields["eos_token_id"] {
            Value::Null => Vec::new(),
            Value::Array(ids) => ids.iter().collect(),
            id => vec![id],
        };
        for id in ids {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            self.end_ids.push(number.with_context(|| format!("eos_token_id {id} is no token id"))?);
        }
        Ok(())
    }
}
