//! Text to token ids and back, built from GGUF metadata or from Hugging Face's tokenizer files. Knows nothing of chat
//! templates, rows or sequences. Invariant: ids are those that `transformers` gives with the model's own tokenizer.json
//! (golden files in `tests/golden`), and depend on nothing but the text and what [`Tokenizer::hash`] covers.

mod families;
mod gguf;
mod hf;
mod normalizer;
mod pieces;
mod split;

use crate::gguf::Gguf;
use crate::text::hf::HfFiles;
use anyhow::{Context, Result, anyhow, bail, ensure};
use pieces::{Alphabet, LeadingBlank, Vocabulary};
use split::Splitter;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Model as _, ModelWrapper, NormalizerWrapper, OffsetReferential, OffsetType, TokenizerImpl};

/// The crate's pipeline: normalizer, cut into words, model. The last two parts are never set.
type Encoder = TokenizerImpl<ModelWrapper, NormalizerWrapper, Splitter, ByteLevel, ByteLevel>;

/// A model's tokenizer. One for all threads: encoding takes no lock (the crate's cache of words is each thread's own).
pub struct Tokenizer {
    encoder: Encoder,
    /// The characters that bytes are written as, if the splitter ends with that.
    chars: Option<Box<[char; 256]>>,
    vocabulary: Vocabulary,
    ends: Ends,
    leading_blank: LeadingBlank,
    hash: String,
}

/// Tokens at a text's ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Ends {
    /// Put before a raw prompt.
    prefix: Vec<u32>,
    /// Put after a raw prompt.
    suffix: Vec<u32>,
    /// The tokens that end a completion, ascending.
    end_ids: Vec<u32>,
}

/// What a source says of a tokenizer, checked.
struct Parts {
    model: ModelWrapper,
    normalizer: Option<NormalizerWrapper>,
    splitter: Splitter,
    /// Tokens that are looked for in a text before all else, and their ids.
    added: Vec<(u32, AddedToken)>,
    vocabulary: Vocabulary,
    ends: Ends,
    leading_blank: LeadingBlank,
    /// blake3 (hex) of all this.
    hash: String,
}

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    ///
    /// # Errors
    /// The file has no tokenizer, one of another kind than byte-level BPE, `SentencePiece` BPE and unigram, or one whose way
    /// of splitting text (`tokenizer.ggml.pre`) is not known: a guess would give other tokens than the model was trained on.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let about = || format!("tokenizer of {}", gguf.path().display());
        caught(|| gguf::read(gguf).and_then(Self::new)).with_context(about)
    }

    /// Builds the tokenizer of a Hugging Face model directory.
    ///
    /// # Errors
    /// A file is not what it should be, or the tokenizer is of a kind whose tokens have no bytes of their own.
    pub fn from_hf(files: &HfFiles<'_>) -> Result<Self> {
        caught(|| hf::read(files).and_then(Self::new)).context("tokenizer.json")
    }

    fn new(parts: Parts) -> Result<Self> {
        let chars = parts.splitter.is_byte_level().then(|| Box::new(Alphabet::chars()));
        let mut encoder = TokenizerImpl::new(parts.model);
        encoder.with_normalizer(parts.normalizer).map_err(|error| anyhow!("normalizer: {error}"))?;
        encoder.with_pre_tokenizer(Some(parts.splitter));
        let added = parts.added.iter().map(|(_, token)| token.clone());
        encoder.add_tokens(added).map_err(|error| anyhow!("special tokens: {error}"))?;
        for (id, token) in &parts.added {
            let got = encoder.token_to_id(&token.content);
            ensure!(got == Some(*id), "special tokens: {:?} has id {id} in the file, and would get {got:?}", token.content);
        }
        let Parts { vocabulary, ends, leading_blank, hash, .. } = parts;
        Ok(Self { encoder, chars, vocabulary, ends, leading_blank, hash })
    }

    /// The ids of a text. Special tokens written in the text are recognised, none is added. A byte that the vocabulary
    /// has no token for (`SmolLM2` lacks a few control characters) vanishes, as it does in `transformers`.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let Some(chars) = &self.chars else {
            let encoding = self.encoder.encode_fast(text, false).expect("what cannot be encoded is unknown or vanishes");
            return encoding.get_ids().to_vec();
        };
        // The crate's own way through its pipeline keeps books of where each byte comes from, for every word: that costs
        // more than twice what finding the ids does. Its parts are used without it.
        let (encoder, splitter) = (&self.encoder, self.encoder.get_pre_tokenizer().expect("set when it was built"));
        let pieces = encoder.get_added_vocabulary().extract_and_normalize(encoder.get_normalizer(), text);
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        let mut written = String::new();
        for (piece, _, whole) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            if let Some(tokens) = whole {
                ids.extend(tokens.iter().map(|token| token.id));
                continue;
            }
            splitter.for_each_word(piece, &mut |word| {
                written.clear();
                written.extend(word.bytes().map(|byte| chars[usize::from(byte)]));
                let tokens = encoder.get_model().tokenize(&written).expect("what cannot be encoded is unknown or vanishes");
                ids.extend(tokens.iter().map(|token| token.id));
            });
        }
        ids
    }

    /// The ids of a raw prompt: those of its text, between the tokens that the model's makers put around every text (as
    /// `add_special_tokens` does in `transformers`). Chats do not want them: templates write their own.
    pub fn encode_prompt(&self, text: &str) -> Vec<u32> {
        let Ends { prefix, suffix, .. } = &self.ends;
        [prefix, &self.encode(text)[..], suffix].concat()
    }

    /// The ids that a raw prompt begins with.
    pub fn prefix(&self) -> &[u32] {
        &self.ends.prefix
    }

    /// The text of `ids`, special tokens included; what is not UTF-8 becomes U+FFFD. Where encoding puts a blank before a
    /// text, this takes it off again; a completion's bytes, which go on from a prompt, are the plain [`Self::token_bytes`].
    ///
    /// # Panics
    /// An id is not below `n_vocab`.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        let n_first = ids.first().map_or(0, |&id| self.token_bytes(id).len());
        self.leading_blank.take_off(&mut bytes, n_first);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Its algorithm, for people.
    pub fn kind(&self) -> &'static str {
        match self.encoder.get_model() {
            ModelWrapper::BPE(_) if self.chars.is_some() => "byte-level BPE",
            ModelWrapper::BPE(_) => "BPE",
            ModelWrapper::Unigram(_) => "unigram",
            _ => "words",
        }
    }

    /// The number of tokens; ids are `0..n_vocab`.
    pub fn n_vocab(&self) -> usize {
        self.vocabulary.len()
    }

    /// The bytes a token stands for; a special token's are its text's, a hole of the vocabulary has none.
    ///
    /// # Panics
    /// `id` is not below `n_vocab`.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.bytes(id)
    }

    /// Whether a token is a control token (a turn's border, the end of text) rather than text.
    ///
    /// # Panics
    /// `id` is not below `n_vocab`.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_special(id)
    }

    /// The tokens that end a completion, ascending.
    pub fn end_ids(&self) -> &[u32] {
        &self.ends.end_ids
    }

    /// blake3 (hex) of everything that ids depend on; part of the fingerprint.
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// What work gives; where the crate panics, which it does on some damaged files, an error.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| bail!("the tokenizers library failed: the file is damaged"))
}

/// A running hash of texts and numbers. Each text goes in with its length: two tokenizers never feed the same bytes.
#[derive(Default)]
struct Hash(blake3::Hasher);

impl Hash {
    fn text(&mut self, text: &str) {
        self.0.update(&(text.len() as u64).to_le_bytes());
        self.0.update(text.as_bytes());
    }

    fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use families::Family;
    use proptest::prelude::*;
    use std::sync::LazyLock;
    use tokenizers::models::bpe::{BPE, Vocab};

    /// Bytes as tokens, a few merges, one token that is found as a whole.
    fn tokenizer(family: Family) -> Tokenizer {
        let mut tokens: Vec<String> = Alphabet::chars().iter().map(char::to_string).collect();
        let merges = [("a", "b"), ("\u{120}", "a"), ("1", "2"), ("\u{10a}", "\u{10a}")];
        let merges: Vec<(String, String)> = merges.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
        let ids: Vocab = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
        let end = tokens.len() as u32;
        let parts = Parts {
            model: BPE::builder().vocab_and_merges(ids, merges).build().unwrap().into(),
            normalizer: None,
            splitter: family.splitter(),
            added: vec![(end, AddedToken::from("<|end|>", true))],
            vocabulary: Vocabulary::default(),
            ends: Ends::default(),
            leading_blank: LeadingBlank::Keep,
            hash: String::new(),
        };
        Tokenizer::new(parts).unwrap()
    }

    static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
        let names = ["gpt-2", "smollm", "llama-bpe", "qwen2", "starcoder", "gpt-4o"];
        names.iter().map(|name| tokenizer(Family::named(name).unwrap())).collect()
    });

    proptest! {
        /// The crate's own pipeline is the slow, obviously right way.
        #[test]
        fn encoding_is_what_the_crate_encodes(
            parts in prop::collection::vec(prop_oneof![
                any::<String>(),
                "[ab 12\r\n\t'sS\u{660}\u{301}e\u{2003}.]{0,12}",
                Just("<|end|>".to_owned()),
            ], 0..6),
        ) {
            let text = parts.concat();
            for tokenizer in &*TOKENIZERS {
                prop_assert!(tokenizer.chars.is_some());
                let slow = tokenizer.encoder.encode_fast(text.as_str(), false).unwrap();
                prop_assert_eq!(tokenizer.encode(&text), slow.get_ids(), "{:?}", text);
            }
        }
    }
}
