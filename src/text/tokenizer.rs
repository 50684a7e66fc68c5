//! Text to token ids and back: byte-level BPE, built from GGUF metadata. Knows nothing of chat templates, rows or
//! sequences. Invariant: ids are those that `transformers` gives with the model's own tokenizer.json (golden files in
//! `tests/golden`), and depend on nothing but the text and what [`Tokenizer::hash`] covers.

use crate::gguf::Gguf;
use anyhow::{Context, Result, anyhow, bail, ensure};
use regex::Regex;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pattern::Pattern;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Offsets, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior, TokenizerImpl};

/// The crate's pipeline: normalizer, cut into words, merges. The last two parts are never set.
type Encoder = TokenizerImpl<BPE, NFC, Splitter, ByteLevel, ByteLevel>;

/// A model's tokenizer. One for all threads: encoding takes no lock (the crate's cache of words is each thread's own).
pub struct Tokenizer {
    encoder: Encoder,
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Token `id` is `bytes[starts[id]..starts[id + 1]]`; `n_vocab + 1` entries.
    starts: Vec<u32>,
    is_special: Vec<bool>, // [n_vocab]
    end_ids: Vec<u32>,
    hash: String,
}

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    ///
    /// # Errors
    /// The file has no tokenizer, one of another kind than byte-level BPE, or one whose way of splitting text
    /// (`tokenizer.ggml.pre`) is not known: a guess would give other tokens than the model was trained on.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Self::from_vocabulary(&Vocabulary::read(gguf)?).with_context(|| format!("tokenizer of {}", gguf.path().display()))
    }

    /// The ids of a text. Special tokens written in the text are recognised, none is added. A byte that the vocabulary
    /// has no token for (`SmolLM2` lacks a few control characters) vanishes, as it does in `transformers`.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let encoding = self.encoder.encode_fast(text, false).expect("byte-level BPE without unknown tokens encodes any text");
        encoding.get_ids().to_vec()
    }

    /// The text of `ids`, special tokens included; what is not UTF-8 becomes U+FFFD.
    ///
    /// # Panics
    /// An id is not below `n_vocab`.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The number of tokens; ids are `0..n_vocab`.
    pub fn n_vocab(&self) -> usize {
        self.is_special.len()
    }

    /// The bytes a token stands for; a special token's are its text's.
    ///
    /// # Panics
    /// `id` is not below `n_vocab`.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        &self.bytes[self.starts[id] as usize..self.starts[id + 1] as usize]
    }

    /// Whether a token is a control token (a turn's border, the end of text) rather than text.
    ///
    /// # Panics
    /// `id` is not below `n_vocab`.
    pub fn is_special(&self, id: u32) -> bool {
        self.is_special[id as usize]
    }

    /// The tokens that end a completion, ascending.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// blake3 (hex) of everything that ids depend on; part of the fingerprint.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    fn from_vocabulary(vocabulary: &Vocabulary<'_>) -> Result<Self> {
        let (bytes, starts) = vocabulary.token_bytes();
        Ok(Self {
            encoder: vocabulary.encoder()?,
            bytes,
            starts,
            is_special: vocabulary.kinds.iter().map(|&kind| kind == Kind::Control).collect(),
            end_ids: vocabulary.end_ids.clone(),
            hash: vocabulary.hash(),
        })
    }
}

/// A token's kind: the numbers of `tokenizer.ggml.token_type` (llama.cpp's `llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Text, made by merges.
    Normal,
    /// Recognised in a text as a whole; not shown to readers.
    Control,
    /// Recognised in a text as a whole; text like any other.
    UserDefined,
    /// A hole in the vocabulary.
    Unused,
}

/// How text is cut before merging: `tokenizer.ggml.pre`, which stands for the `pre_tokenizer` of a tokenizer.json.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pre {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

/// What a GGUF file says about tokens, checked.
struct Vocabulary<'a> {
    pre: Pre,
    tokens: Vec<&'a str>, // [n_vocab]; bytes in the GPT-2 alphabet where the kind is `Normal`, else plain text
    kinds: Vec<Kind>,     // [n_vocab]
    merges: Vec<(&'a str, &'a str)>,
    end_ids: Vec<u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self> {
        let path = gguf.path().display();
        match gguf.str("tokenizer.ggml.model") {
            Some("gpt2") => {}
            Some(other) => bail!("{path}: tokenizer.ggml.model is {other:?}; only byte-level BPE (\"gpt2\") is supported"),
            None => bail!("{path}: tokenizer.ggml.model is missing: the file has no tokenizer"),
        }
        let pre = gguf.str("tokenizer.ggml.pre").with_context(|| {
            format!("{path}: tokenizer.ggml.pre is missing: how the model's texts are split is unknown (an old conversion?)")
        })?;
        let pre = Pre::parse(pre).with_context(|| format!("{path}: tokenizer.ggml.pre"))?;
        let list = |key: &str| gguf.str_array(key).with_context(|| format!("{path}: {key} is missing or no list of strings"));
        let tokens = list("tokenizer.ggml.tokens")?;
        let kinds = match gguf.i32_array("tokenizer.ggml.token_type") {
            Some(types) => types.into_iter().map(Kind::parse).collect(),
            None => vec![Kind::Normal; tokens.len()],
        };
        ensure!(
            kinds.len() == tokens.len(),
            "{path}: {} tokens, but tokenizer.ggml.token_type has {} entries",
            tokens.len(),
            kinds.len()
        );
        let merges = list("tokenizer.ggml.merges")?
            .into_iter()
            .map(|merge| merge.split_once(' ').with_context(|| format!("{path}: merge {merge:?} is not two tokens")))
            .collect::<Result<_>>()?;
        let mut end_ids = Vec::new();
        for name in ["eos", "eot", "eom"] {
            let key = format!("tokenizer.ggml.{name}_token_id");
            if let Some(id) = gguf.u64(&key) {
                ensure!(id < tokens.len() as u64, "{path}: {key} is {id}, but there are {} tokens", tokens.len());
                end_ids.push(id as u32);
            }
        }
        end_ids.sort_unstable();
        end_ids.dedup();
        Ok(Self { pre, tokens, kinds, merges, end_ids })
    }

    fn encoder(&self) -> Result<Encoder> {
        // Holes stay out: no text may become one. Their ids are kept free.
        let used = (0u32..).zip(self.tokens.iter().zip(&self.kinds)).filter(|(_, (_, kind))| **kind != Kind::Unused);
        let vocab: Vocab = used.map(|(id, (token, _))| ((*token).to_owned(), id)).collect();
        let merges = self.merges.iter().map(|&(a, b)| (a.to_owned(), b.to_owned())).collect();
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(self.pre.takes_whole_words())
            .build()
            .map_err(|error| anyhow!("merges: {error}"))?;
        let mut encoder = TokenizerImpl::new(bpe);
        encoder.with_normalizer(self.pre.normalizer()).map_err(|error| anyhow!("normalizer: {error}"))?;
        encoder.with_pre_tokenizer(Some(Splitter::new(self.pre)));
        let whole = self.tokens.iter().zip(&self.kinds).filter_map(|(token, kind)| match kind {
            Kind::Control => Some(AddedToken::from(*token, true)),
            Kind::UserDefined => Some(AddedToken::from(*token, false).normalized(false)),
            Kind::Normal | Kind::Unused => None,
        });
        encoder.add_tokens(whole).map_err(|error| anyhow!("special tokens: {error}"))?;
        Ok(encoder)
    }

    /// The bytes of all tokens and where each begins (see [`Tokenizer`]).
    fn token_bytes(&self) -> (Vec<u8>, Vec<u32>) {
        let alphabet = Alphabet::new();
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for (token, kind) in self.tokens.iter().zip(&self.kinds) {
            let n_before = bytes.len();
            if *kind != Kind::Normal || !alphabet.push_bytes(token, &mut bytes) {
                bytes.truncate(n_before);
                bytes.extend_from_slice(token.as_bytes());
            }
            starts.push(bytes.len() as u32);
        }
        (bytes, starts)
    }

    fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        // Each text goes in with its length, each list with its count: two vocabularies never feed the same bytes.
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        text(&format!("bpe 1 {:?} {} {} {:?}", self.pre, self.tokens.len(), self.merges.len(), self.end_ids));
        for (token, kind) in self.tokens.iter().zip(&self.kinds) {
            text(token);
            text(&format!("{kind:?}"));
        }
        for (left, right) in &self.merges {
            text(left);
            text(right);
        }
        hasher.finalize().to_hex().to_string()
    }
}

impl Kind {
    fn parse(number: i32) -> Self {
        match number {
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            // 1 normal, 2 unknown, 6 byte: a byte-level vocabulary has no token of the last two kinds.
            _ => Self::Normal,
        }
    }
}

impl Pre {
    /// The names are llama.cpp's. "default" is not among them: a converter writes it where it does not know the
    /// tokenizer, so it names no way of splitting.
    fn parse(name: &str) -> Result<Self> {
        match name {
            "gpt-2" => Ok(Self::Gpt2),
            "smollm" => Ok(Self::SmolLm),
            "llama-bpe" => Ok(Self::Llama3),
            "qwen2" => Ok(Self::Qwen2),
            _ => bail!("{name:?} is not supported (supported: gpt-2, smollm, llama-bpe, qwen2)"),
        }
    }

    /// `model.ignore_merges` of the tokenizer.json: a word that is a token becomes it, merges or not.
    fn takes_whole_words(self) -> bool {
        self == Self::Llama3
    }

    fn normalizer(self) -> Option<NFC> {
        (self == Self::Qwen2).then_some(NFC)
    }

    /// The words, as the tokenizer.json's regular expression has them but for its last two alternatives
    /// `\s+(?!\S)|\s+`, which are one here: [`Splitter`] does the looking ahead.
    fn words(self) -> &'static str {
        match self {
            Self::Gpt2 | Self::SmolLm => r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
            Self::Llama3 => {
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
            }
            Self::Qwen2 => {
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
            }
        }
    }

    /// Whether blanks up to a line's end are a word of their own (`\s*[\r\n]+`), from which nothing is taken.
    fn keeps_line_ends(self) -> bool {
        matches!(self, Self::Llama3 | Self::Qwen2)
    }
}

/// Cuts text into words, which are then merged each for itself. In place of the crate's splitters because their regular
/// expressions look ahead by backtracking: past a million blanks they give up and silently leave the rest uncut.
struct Splitter {
    words: Regex,
    keeps_line_ends: bool,
    /// `SmolLM` cuts out each digit before anything else.
    cuts_digits: bool,
}

impl Splitter {
    fn new(pre: Pre) -> Self {
        let words = Regex::new(pre.words()).expect("the patterns are constants and valid");
        Self { words, keeps_line_ends: pre.keeps_line_ends(), cuts_digits: pre == Pre::SmolLm }
    }
}

impl PreTokenizer for Splitter {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        if self.cuts_digits {
            text.split(|_, piece| piece.split(char::is_numeric, SplitDelimiterBehavior::Isolated))?;
        }
        text.split(|_, piece| piece.split(self, SplitDelimiterBehavior::Isolated))?;
        ByteLevel::new(false, true, false).pre_tokenize(text)
    }
}

impl Pattern for &Splitter {
    /// The words of `text`, in order and without gaps.
    fn find_matches(&self, text: &str) -> tokenizers::Result<Vec<(Offsets, bool)>> {
        let mut words = Vec::with_capacity(text.len() / 4 + 1);
        let mut start = 0;
        while let Some(found) = self.words.find_at(text, start) {
            let mut end = found.end();
            // A run of blanks leaves its last one to the word that follows, if it has another and a word follows. Only
            // the alternative `\s+` ends in a blank, but for the lines' ends.
            let last = found.as_str().chars().next_back().filter(|&c| c.is_whitespace());
            if let Some(blank) = last.filter(|&c| !(self.keeps_line_ends && matches!(c, '\r' | '\n')))
                && end < text.len()
                && found.len() > blank.len_utf8()
            {
                end -= blank.len_utf8();
            }
            words.push(((start, end), true));
            start = end;
        }
        assert_eq!(start, text.len(), "every character is in some word");
        Ok(words)
    }
}

/// GPT-2's way to write bytes as printable characters: printable Latin-1 stands for itself, the other 68 bytes, in
/// order, for the characters from U+0100 (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>).
struct Alphabet {
    /// The byte of each character below U+0144.
    bytes: [Option<u8>; 0x144],
}

impl Alphabet {
    fn new() -> Self {
        let mut bytes = [None; 0x144];
        let mut next = 0x100;
        for byte in 0..=u8::MAX {
            if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..) {
                bytes[usize::from(byte)] = Some(byte);
            } else {
                bytes[next] = Some(byte);
                next += 1;
            }
        }
        Self { bytes }
    }

    /// Appends the bytes of a token; `false` (and something appended) if it is not written in this alphabet.
    fn push_bytes(&self, token: &str, bytes: &mut Vec<u8>) -> bool {
        token.chars().all(|c| {
            let byte = self.bytes.get(c as usize).copied().flatten();
            bytes.extend(byte);
            byte.is_some()
        })
    }
}
