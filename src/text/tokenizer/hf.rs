//! Tokenizers from tokenizer.json. Knows its field names, and nothing of files. What cuts and maps text is the
//! `tokenizers` crate's own reading of the file, but for regular expressions, which run in linear time where they can.

use super::pieces::{LeadingBlank, Vocabulary, Writing};
use super::split::{Splitter, Step, Words};
use super::{Ends, Hash, Parts, families, normalizer};
use crate::text::hf::{HfConfig, HfFiles};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashMap;
use tokenizers::{AddedToken, Model, ModelWrapper, PreTokenizerWrapper};

/// tokenizer.json.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(deserialize_with = "model")]
    model: ModelWrapper,
}

/// Longest token of a unigram model: the crate's own tree of them is taken down by recursion, a level for each byte.
const MAX_TOKEN_BYTES: usize = 1024;

fn model<'de, D: Deserializer<'de>>(json: D) -> Result<ModelWrapper, D::Error> {
    #[derive(Deserialize)]
    struct Unigram<'a> {
        #[serde(borrow)]
        vocab: Vec<(Cow<'a, str>, f64)>,
    }
    let text = Box::<RawValue>::deserialize(json)?;
    if let Ok(Unigram { vocab }) = serde_json::from_str(text.get())
        && let Some((token, _)) = vocab.iter().find(|(token, _)| token.len() > MAX_TOKEN_BYTES)
    {
        return Err(D::Error::custom(format!("model: a token has {} bytes, the limit is {MAX_TOKEN_BYTES}", token.len())));
    }
    serde_json::from_str(text.get()).map_err(|error| D::Error::custom(format!("model: {error}")))
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

/// A text that no vocabulary has: a character that Unicode sets aside for nobody.
const UNKNOWN: &str = "\u{10fffe}";

/// Reads and checks a directory's tokenizer.
pub(super) fn read(files: &HfFiles<'_>) -> Result<Parts> {
    let config = HfConfig::read(files)?;
    let mut json: TokenizerJson = serde_json::from_str(files.tokenizer).context("cannot be read")?;
    normalizer::check(&json.normalizer).context("normalizer")?;
    let normalizer = serde_json::from_value(std::mem::take(&mut json.normalizer)).context("normalizer: cannot be read")?;
    ensure!(
        matches!(json.model, ModelWrapper::BPE(_) | ModelWrapper::Unigram(_)),
        "model is neither BPE nor Unigram, which are supported"
    );
    if let ModelWrapper::BPE(bpe) = &json.model {
        ensure!(bpe.dropout.is_none(), "model: dropout, which makes tokens random, is not supported");
    }
    // Models without a token for what they don't know (or with one that is none) would fail in the middle of a job.
    let unknown = json.model.tokenize(UNKNOWN).map(|_| ());
    unknown.map_err(|error| anyhow!("model: it can't tokenize every text: {error}"))?;
    let ids = json.model.get_vocab();
    json.added_tokens.retain(|added| (added.id as usize) < files.n_vocab);
    // transformers recognises special tokens that only the configuration names.
    for text in config.specials.values() {
        if let Some(&id) = ids.get(text)
            && json.added_tokens.iter().all(|added| added.token.content != *text)
        {
            json.added_tokens.push(Added { id, token: AddedToken::from(text.as_str(), true) });
        }
    }
    json.added_tokens.sort_by_key(|added| added.id);
    let (writing, leading_blank) = writing(&json.decoder).context("decoder")?;
    let vocabulary = vocabulary(&ids, &json.added_tokens, &writing, files.n_vocab)?;
    let ends = ends(&json, &ids, &config, files.n_vocab)?;
    let mut steps = Vec::new();
    add_steps(&json.pre_tokenizer, &mut steps).context("pre_tokenizer")?;
    let added: Vec<_> = json.added_tokens.into_iter().map(|added| (added.id, added.token)).collect();
    let mut hash = Hash::default();
    hash.text(&format!("tokenizer.json 1 {} {ends:?} {leading_blank:?} {added:?}", files.n_vocab));
    hash.text(files.tokenizer);
    Ok(Parts {
        model: json.model,
        normalizer,
        splitter: Splitter(steps),
        added,
        vocabulary,
        ends,
        leading_blank,
        hash: hash.finish(),
    })
}

fn vocabulary(ids: &HashMap<String, u32>, added: &[Added], writing: &Writing, n_vocab: usize) -> Result<Vocabulary> {
    // By id: the token, and whether it is special if it is an added one.
    let mut tokens: Vec<Option<(&str, Option<bool>)>> = vec![None; n_vocab];
    for (text, &id) in ids {
        let slot = tokens.get_mut(id as usize);
        let slot = slot.with_context(|| format!("token {text:?} has id {id}, but the model has {n_vocab} tokens"))?;
        *slot = Some((text, None));
    }
    for added in added {
        tokens[added.id as usize] = Some((&added.token.content, Some(added.token.special)));
    }
    let mut vocabulary = Vocabulary::default();
    for token in tokens {
        match (token, writing) {
            (None, _) => vocabulary.push(b"", false),
            (Some((text, Some(true))), _) => vocabulary.push(text.as_bytes(), true),
            // Text that was never written in the alphabet of bytes.
            (Some((text, Some(false))), Writing::ByteLevel(_)) => vocabulary.push(text.as_bytes(), false),
            (Some((text, _)), _) => vocabulary.push(&writing.bytes(text), false),
        }
    }
    Ok(vocabulary)
}

/// Adds the steps that a pre-tokenizer of the file consists of.
fn add_steps(value: &Value, steps: &mut Vec<Step>) -> Result<()> {
    let pattern = value["pattern"]["Regex"].as_str();
    match value["type"].as_str() {
        None if value.is_null() => {}
        Some("Sequence") => {
            for part in value["pretokenizers"].as_array().context("a Sequence without pretokenizers")? {
                add_steps(part, steps)?;
            }
        }
        Some("ByteLevel") if value["add_prefix_space"] == false => {
            if value["use_regex"] != false {
                steps.push(families::gpt2_words());
            }
            steps.push(families::bytes());
        }
        Some("Split") if value["behavior"] == "Isolated" && value["invert"] == false => match pattern.and_then(Words::new) {
            Some(words) => steps.push(Step::Words(words)),
            None => steps.push(step_of_crate(value)?),
        },
        _ => steps.push(step_of_crate(value)?),
    }
    Ok(())
}

fn step_of_crate(value: &Value) -> Result<Step> {
    let step: PreTokenizerWrapper = serde_json::from_value(value.clone()).with_context(|| format!("cannot be read: {value}"))?;
    Ok(Step::Crate(step))
}

/// How the vocabulary writes bytes, which the decoder says.
fn writing(decoder: &Value) -> Result<(Writing, LeadingBlank)> {
    let one = std::slice::from_ref(decoder);
    let parts = if decoder["type"] == "Sequence" { decoder["decoders"].as_array().map_or(one, Vec::as_slice) } else { one };
    let (mut writing, mut leading_blank, mut byte_tokens) = (None, LeadingBlank::Keep, false);
    for part in parts {
        match part["type"].as_str() {
            Some("ByteLevel") => writing = Some(Writing::byte_level()),
            Some("Metaspace") if part["replacement"] == "▁" => {
                writing = Some(Writing::Blanks { byte_tokens: false });
                let never = part["prepend_scheme"] == "never" || part["add_prefix_space"] == false;
                leading_blank = if never { LeadingBlank::Keep } else { LeadingBlank::FirstToken };
            }
            Some("Replace") if part["pattern"]["String"] == "▁" && part["content"] == " " => {
                writing = Some(Writing::Blanks { byte_tokens: false });
            }
            Some("ByteFallback") => byte_tokens = true,
            Some("Fuse") => {}
            Some("Strip") if part["content"] == " " && part["stop"] == 0 => {
                leading_blank = match part["start"].as_u64() {
                    Some(0) => LeadingBlank::Keep,
                    Some(1) => LeadingBlank::One,
                    _ => bail!("not supported: {part}"),
                };
            }
            _ => {
                bail!("not supported: {part} (supported: ByteLevel, or Metaspace or Replace of \"▁\", ByteFallback, Fuse, Strip)")
            }
        }
    }
    match writing {
        Some(Writing::Blanks { .. }) => Ok((Writing::Blanks { byte_tokens }, leading_blank)),
        Some(writing) => Ok((writing, leading_blank)),
        None => bail!("says neither how bytes nor how blanks are written: {decoder}"),
    }
}

fn ends(json: &TokenizerJson, ids: &HashMap<String, u32>, config: &HfConfig, n_vocab: usize) -> Result<Ends> {
    let mut ends = Ends::default();
    add_template(&json.post_processor, &mut ends).context("post_processor")?;
    let id = |name: &str| -> Result<Option<u32>> {
        let Some(text) = config.specials.get(name) else { return Ok(None) };
        let added = json.added_tokens.iter().find(|added| added.token.content == *text).map(|added| added.id);
        let id = added.or_else(|| ids.get(text).copied());
        Ok(Some(id.with_context(|| format!("tokenizer_config.json: {name} is {text:?}, which is no token"))?))
    };
    let (bos, eos) = (id("bos_token")?, id("eos_token")?);
    // Where the configuration says something of either, it stands for the whole template.
    if config.add_bos.is_some() || config.add_eos.is_some() {
        ends.prefix = bos.filter(|_| config.add_bos == Some(true)).into_iter().collect();
        ends.suffix = eos.filter(|_| config.add_eos == Some(true)).into_iter().collect();
    }
    ends.end_ids = config.end_ids.iter().copied().chain(eos).collect();
    ends.end_ids.sort_unstable();
    ends.end_ids.dedup();
    let all = ends.prefix.iter().chain(&ends.suffix).chain(&ends.end_ids);
    if let Some(id) = all.clone().find(|id| **id as usize >= n_vocab) {
        bail!("token id {id} ends or begins texts, but the model has {n_vocab} tokens");
    }
    Ok(ends)
}

/// Adds the tokens that a post-processor puts around one text.
fn add_template(value: &Value, ends: &mut Ends) -> Result<()> {
    match value["type"].as_str() {
        None if value.is_null() => {}
        Some("ByteLevel") => {}
        Some("Sequence") => {
            for part in value["processors"].as_array().context("a Sequence without processors")? {
                add_template(part, ends)?;
            }
        }
        Some("TemplateProcessing") => {
            let mut is_before = true;
            for piece in value["single"].as_array().context("a TemplateProcessing without a single")? {
                let Some(name) = piece["SpecialToken"]["id"].as_str() else {
                    is_before = false;
                    continue;
                };
                let ids = value["special_tokens"][name]["ids"].as_array();
                let ids = ids.with_context(|| format!("{name:?} is not among the special tokens"))?;
                let ids = ids.iter().filter_map(Value::as_u64).map(|id| id as u32);
                if is_before { ends.prefix.extend(ids) } else { ends.suffix.extend(ids) }
            }
        }
        _ => bail!("not supported: {} (supported: TemplateProcessing, ByteLevel)", value["type"]),
    }
    Ok(())
}
