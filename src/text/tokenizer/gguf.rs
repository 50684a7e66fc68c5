//! Tokenizers from the metadata of a GGUF file. Knows the keys and kinds of `tokenizer.ggml`, and nothing of files.

use super::families::Family;
use super::pieces::{BLANK, LeadingBlank, Vocabulary, Writing};
use super::split::{Splitter, Step};
use super::{Ends, Hash, Parts, normalizer};
use crate::gguf::Gguf;
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::{NFC, Precompiled, Prepend, Replace, Sequence, Strip};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

/// Longer tokens than any vocabulary has: what is done with them takes time by the square of their length.
const MAX_TOKEN_BYTES: usize = 1024;
/// Most text of the merges that scores stand for, bytes: ten times that of the largest vocabularies.
const MAX_MERGE_BYTES: usize = 256 << 20;
/// What a merge takes besides its text, bytes.
const MERGE_BYTES: usize = 128;

/// A token's kind: the numbers of `tokenizer.ggml.token_type` (llama.cpp's `llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Text, made by merges or by its score.
    Normal,
    /// What stands for text that has no token; written out it is recognised as a whole like `Control`.
    Unknown,
    /// Recognised in a text as a whole; not shown to readers.
    Control,
    /// Recognised in a text as a whole; text like any other.
    UserDefined,
    /// A hole in the vocabulary.
    Unused,
    /// One byte of a character that no token has.
    Byte,
}

impl Kind {
    fn parse(number: i32) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// What all kinds of tokenizer have.
struct Tokens<'a> {
    gguf: &'a Gguf,
    texts: Vec<&'a str>,
    kinds: Vec<Kind>,
}

/// Reads and checks a file's tokenizer.
pub(super) fn read(gguf: &Gguf) -> Result<Parts> {
    match gguf.str("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(&Tokens::read(gguf)?),
        Some("llama") => sentencepiece_bpe(&Tokens::read(gguf)?),
        Some("t5") => unigram(&Tokens::read(gguf)?),
        Some(other) => bail!(
            "tokenizer.ggml.model is {other:?}, which is not supported (supported: gpt2, byte-level BPE; llama, \
             SentencePiece BPE; t5, SentencePiece unigram)"
        ),
        None => bail!("tokenizer.ggml.model is missing: the file has no tokenizer"),
    }
}

impl<'a> Tokens<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self> {
        let texts = strings(gguf, "tokenizer.ggml.tokens")?;
        let kinds = match gguf.i32_array("tokenizer.ggml.token_type") {
            Some(types) => types.into_iter().map(Kind::parse).collect(),
            None => vec![Kind::Normal; texts.len()],
        };
        if let Some(id) = texts.iter().position(|text| text.len() > MAX_TOKEN_BYTES) {
            bail!("tokenizer.ggml.tokens: token {id} has {} bytes, the limit is {MAX_TOKEN_BYTES}", texts[id].len());
        }
        ensure!(kinds.len() == texts.len(), "{} tokens, but tokenizer.ggml.token_type has {} entries", texts.len(), kinds.len());
        Ok(Self { gguf, texts, kinds })
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &'a str, Kind)> {
        (0..).zip(self.texts.iter().zip(&self.kinds)).map(|(id, (text, kind))| (id, *text, *kind))
    }

    /// Token to id. Holes stay out: no text may become one.
    fn vocab(&self) -> Vocab {
        self.iter().filter(|(_, _, kind)| *kind != Kind::Unused).map(|(id, text, _)| (text.to_owned(), id)).collect()
    }

    /// The score of each token.
    fn scores(&self) -> Result<&'a [f64]> {
        let scores = self.gguf.f64_array("tokenizer.ggml.scores");
        let scores = scores.context("tokenizer.ggml.scores is missing or no list of numbers")?;
        let (n, n_scores) = (self.texts.len(), scores.len());
        ensure!(n == n_scores, "{n} tokens, but tokenizer.ggml.scores has {n_scores} entries");
        Ok(scores)
    }

    /// The id that a key of the file names.
    fn id(&self, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.gguf.u64(&key) else { return Ok(None) };
        ensure!(id < self.texts.len() as u64, "{key} is {id}, but there are {} tokens", self.texts.len());
        Ok(Some(id as u32))
    }

    fn flag(&self, name: &str, default: bool) -> bool {
        self.gguf.bool(&format!("tokenizer.ggml.{name}")).unwrap_or(default)
    }

    /// Tokens at a text's ends; the flags say what is added where the file does not.
    fn ends(&self, adds_bos: bool, adds_eos: bool) -> Result<Ends> {
        let added = |flag: &str, default: bool, id: &str| -> Result<Vec<u32>> {
            Ok(if self.flag(flag, default) { self.id(id)?.into_iter().collect() } else { Vec::new() })
        };
        let mut end_ids = Vec::new();
        for name in ["eos", "eot", "eom"] {
            end_ids.extend(self.id(name)?);
        }
        end_ids.sort_unstable();
        end_ids.dedup();
        Ok(Ends { prefix: added("add_bos_token", adds_bos, "bos")?, suffix: added("add_eos_token", adds_eos, "eos")?, end_ids })
    }

    /// Tokens that are recognised as a whole.
    fn added(&self) -> Vec<(u32, AddedToken)> {
        let added = self.iter().filter(|(_, text, _)| !text.is_empty()).filter_map(|(id, text, kind)| match kind {
            Kind::Control | Kind::Unknown => Some((id, AddedToken::from(text, true))),
            Kind::UserDefined => Some((id, AddedToken::from(text, false).normalized(false))),
            Kind::Normal | Kind::Unused | Kind::Byte => None,
        });
        added.collect()
    }

    fn vocabulary(&self, writing: &Writing) -> Vocabulary {
        let mut vocabulary = Vocabulary::default();
        for (_, text, kind) in self.iter() {
            match kind {
                Kind::Normal | Kind::Byte => vocabulary.push(&writing.bytes(text), false),
                Kind::Control | Kind::Unknown => vocabulary.push(text.as_bytes(), true),
                Kind::UserDefined | Kind::Unused => vocabulary.push(text.as_bytes(), false),
            }
        }
        vocabulary
    }

    /// A hash begun with the tokens and their ends.
    fn hash(&self, about: &str, ends: &Ends) -> Hash {
        let mut hash = Hash::default();
        hash.text(&format!("{about} {} {ends:?}", self.texts.len()));
        for (_, text, kind) in self.iter() {
            hash.text(text);
            hash.text(&format!("{kind:?}"));
        }
        hash
    }
}

/// A list of strings that the tokenizer cannot do without.
fn strings<'a>(gguf: &'a Gguf, key: &str) -> Result<Vec<&'a str>> {
    gguf.str_array(key).with_context(|| format!("{key} is missing or no list of strings"))
}

fn byte_level(tokens: &Tokens<'_>) -> Result<Parts> {
    let pre = tokens
        .gguf
        .str("tokenizer.ggml.pre")
        .context("tokenizer.ggml.pre is missing: how the model's texts are split is unknown (an old conversion?)")?;
    let family = Family::named(pre).context("tokenizer.ggml.pre")?;
    let merges = strings(tokens.gguf, "tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| merge.split_once(' ').with_context(|| format!("merge {merge:?} is not two tokens")))
        .collect::<Result<Vec<_>>>()?;
    let ends = tokens.ends(family.adds_bos, false)?;
    let mut hash = tokens.hash(&format!("bpe 1 {family:?} {}", merges.len()), &ends);
    for (left, right) in &merges {
        hash.text(left);
        hash.text(right);
    }
    let merges = merges.iter().map(|&(a, b)| (a.to_owned(), b.to_owned())).collect();
    let bpe = BPE::builder().vocab_and_merges(tokens.vocab(), merges).ignore_merges(family.takes_whole_words).build();
    Ok(Parts {
        model: ModelWrapper::BPE(bpe.map_err(|error| anyhow!("merges: {error}"))?),
        normalizer: family.nfc.then_some(NormalizerWrapper::NFC(NFC)),
        splitter: family.splitter(),
        added: tokens.added(),
        vocabulary: tokens.vocabulary(&Writing::byte_level()),
        ends,
        leading_blank: LeadingBlank::Keep,
        hash: hash.finish(),
    })
}

fn sentencepiece_bpe(tokens: &Tokens<'_>) -> Result<Parts> {
    let scores = tokens.scores()?;
    let adds_blank = tokens.flag("add_space_prefix", true);
    let ends = tokens.ends(true, false)?;
    let mut hash = tokens.hash(&format!("sentencepiece bpe 1 {adds_blank}"), &ends);
    for score in scores {
        hash.text(&score.to_string());
    }
    let mut bpe = BPE::builder().vocab_and_merges(tokens.vocab(), merges(tokens, scores)?).fuse_unk(true).byte_fallback(true);
    if let Some(id) = unknown(tokens)? {
        bpe = bpe.unk_token(tokens.texts[id as usize].to_owned());
    }
    let blanks = Replace::new(" ", BLANK.to_string()).map_err(|error| anyhow!("blanks: {error}"))?;
    let mut normalizers = vec![NormalizerWrapper::Replace(blanks)];
    if adds_blank {
        normalizers.insert(0, NormalizerWrapper::Prepend(Prepend::new(BLANK.to_string())));
    }
    Ok(Parts {
        model: ModelWrapper::BPE(bpe.build().map_err(|error| anyhow!("merges: {error}"))?),
        normalizer: Some(NormalizerWrapper::Sequence(Sequence::new(normalizers))),
        splitter: Splitter(Vec::new()),
        added: tokens.added(),
        vocabulary: tokens.vocabulary(&Writing::Blanks { byte_tokens: true }),
        ends,
        leading_blank: if adds_blank { LeadingBlank::One } else { LeadingBlank::Keep },
        hash: hash.finish(),
    })
}

/// The token for what has no token; `SentencePiece`'s own default is the first.
fn unknown(tokens: &Tokens<'_>) -> Result<Option<u32>> {
    let first = tokens.kinds.iter().position(|&kind| kind == Kind::Unknown).map(|id| id as u32);
    Ok(tokens.id("unknown")?.or(first))
}

/// The merges that scores stand for: every cut of a token into two tokens, the token of the highest score first. Where
/// scores are equal, longer parts go first, then lower ids: the order that `transformers` gives them.
fn merges(tokens: &Tokens<'_>, scores: &[f64]) -> Result<Vec<(String, String)>> {
    let is_text = |kind: Kind| !matches!(kind, Kind::Unused | Kind::Control | Kind::Unknown);
    let ids: HashMap<&str, u32> = tokens.iter().filter(|(_, _, kind)| is_text(*kind)).map(|(id, text, _)| (text, id)).collect();
    let (mut merges, mut n_bytes) = (Vec::new(), 0);
    for (id, text, kind) in tokens.iter().filter(|(_, _, kind)| is_text(*kind)) {
        if kind == Kind::Byte {
            continue;
        }
        let n_before = merges.len();
        for (n_left, (cut, _)) in text.char_indices().enumerate().skip(1) {
            let (left, right) = text.split_at(cut);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
                let n_right = text[cut..].chars().count();
                merges.push(((scores[id as usize], n_left, n_right), (left_id, right_id), (left, right)));
            }
        }
        n_bytes += (merges.len() - n_before) * (text.len() + MERGE_BYTES);
        ensure!(n_bytes <= MAX_MERGE_BYTES, "tokenizer.ggml.tokens: merges of over {} MiB", MAX_MERGE_BYTES >> 20);
        merges[n_before..].sort_by_key(|(_, ids, _)| *ids);
    }
    merges.sort_by(|(a, ..), (b, ..)| b.0.total_cmp(&a.0).then_with(|| (b.1, b.2).cmp(&(a.1, a.2))));
    Ok(merges.into_iter().map(|(_, _, (left, right))| (left.to_owned(), right.to_owned())).collect())
}

fn unigram(tokens: &Tokens<'_>) -> Result<Parts> {
    let scores = tokens.scores()?;
    let adds_blank = tokens.flag("add_space_prefix", true);
    let charsmap = tokens.gguf.i32_array("tokenizer.ggml.precompiled_charsmap").unwrap_or_default();
    let charsmap: Vec<u8> = charsmap.into_iter().map(|byte| byte as u8).collect();
    let ends = tokens.ends(false, true)?;
    let mut hash = tokens.hash(&format!("sentencepiece unigram 1 {adds_blank} {charsmap:?}"), &ends);
    for score in scores {
        hash.text(&score.to_string());
    }
    let unknown = unknown(tokens)?.context("tokenizer.ggml.unknown_token_id is missing, which a unigram tokenizer needs")?;
    let byte_tokens = tokens.kinds.contains(&Kind::Byte);
    let vocab = tokens.texts.iter().zip(scores).map(|(text, &score)| ((*text).to_owned(), score)).collect();
    let model = Unigram::from(vocab, Some(unknown as usize), byte_tokens).map_err(|error| anyhow!("unigram: {error}"))?;
    let blanks = tokenizers::normalizers::replace::ReplacePattern::Regex(" {2,}".to_owned());
    let blanks = Replace::new(blanks, BLANK.to_string()).map_err(|error| anyhow!("blanks: {error}"))?;
    let mut normalizers = vec![NormalizerWrapper::StripNormalizer(Strip::new(false, true)), NormalizerWrapper::Replace(blanks)];
    if !charsmap.is_empty() {
        normalizer::check_charsmap(&charsmap).context("tokenizer.ggml")?;
        let map = Precompiled::from(&charsmap).map_err(|error| anyhow!("tokenizer.ggml.precompiled_charsmap: {error}"))?;
        normalizers.insert(0, NormalizerWrapper::Precompiled(map));
    }
    let scheme = if adds_blank { PrependScheme::Always } else { PrependScheme::Never };
    let metaspace = PreTokenizerWrapper::Metaspace(Metaspace::new(BLANK, scheme, true));
    Ok(Parts {
        model: ModelWrapper::Unigram(model),
        normalizer: Some(NormalizerWrapper::Sequence(Sequence::new(normalizers))),
        splitter: Splitter(vec![Step::Crate(metaspace)]),
        added: tokens.added(),
        vocabulary: tokens.vocabulary(&Writing::Blanks { byte_tokens }),
        ends,
        leading_blank: if adds_blank { LeadingBlank::FirstToken } else { LeadingBlank::Keep },
        hash: hash.finish(),
    })
}
