//! How byte-level BPE tokenizers cut text, by the names that GGUF files give them (`tokenizer.ggml.pre`). A name stands
//! for what the tokenizer.json of the family says; the names are llama.cpp's.

use super::split::{Splitter, Step, Words};
use anyhow::{Context, Result};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Family {
    cuts: &'static [Cut],
    /// Whether text is brought to Unicode's form C first.
    pub(super) nfc: bool,
    /// `model.ignore_merges` of the tokenizer.json: a word that is a token becomes it, merges or not.
    pub(super) takes_whole_words: bool,
    /// Whether a prompt begins with the begin token where the file does not say.
    pub(super) adds_bos: bool,
}

/// One cut of a text, or the step from characters to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Words(&'static str),
    EachDigit,
    Digits,
    Punctuation,
    Bytes,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const BLOOM: &str = r" ?[^(\s|[.,!?…。，、।۔،])]+";
/// Letters that have a case, as the family's tokenizer.json lists them.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}",
    r"ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻",
    r"𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
);

/// Cuts and nothing else.
const fn plain(cuts: &'static [Cut]) -> Family {
    Family { cuts, nfc: false, takes_whole_words: false, adds_bos: false }
}

/// Names and what they stand for.
const FAMILIES: &[(&[&str], Family)] = &[
    (&["gpt-2", "phi-2"], plain(&[Cut::Words(GPT2), Cut::Bytes])),
    (&["olmo", "mpt"], Family { nfc: true, ..plain(&[Cut::Words(GPT2), Cut::Bytes]) }),
    (&["smollm", "starcoder", "refact"], plain(&[Cut::EachDigit, Cut::Words(GPT2), Cut::Bytes])),
    (&["command-r"], Family { nfc: true, ..plain(&[Cut::EachDigit, Cut::Words(GPT2), Cut::Bytes]) }),
    (
        &["llama-bpe", "llama3", "llama-v3"],
        Family { takes_whole_words: true, adds_bos: true, ..plain(&[Cut::Words(LLAMA3), Cut::Bytes]) },
    ),
    (&["dbrx", "smaug-bpe"], plain(&[Cut::Words(LLAMA3), Cut::Bytes])),
    (&["qwen2", "stablelm2", "deepseek-r1-qwen"], Family { nfc: true, ..plain(&[Cut::Words(QWEN2), Cut::Bytes]) }),
    (&["tekken"], Family { takes_whole_words: true, adds_bos: true, ..plain(&[Cut::Words(TEKKEN), Cut::Bytes]) }),
    (&["gpt-4o", "llama4"], Family { takes_whole_words: true, ..plain(&[Cut::Words(GPT4O), Cut::Bytes]) }),
    (
        &["deepseek-llm"],
        plain(&[
            Cut::Words(r"[\r\n]"),
            Cut::Words(DEEPSEEK_LETTERS),
            Cut::Words(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            Cut::Words(r"\s+$"),
            Cut::Words("[一-龥ࠀ-一가-퟿]+"),
            Cut::EachDigit,
            Cut::Bytes,
        ]),
    ),
    (
        &["deepseek-coder"],
        plain(&[
            Cut::Words(r"[\r\n]"),
            Cut::Words(r"\s?\p{L}+"),
            Cut::Words(r"\s?\p{P}+"),
            Cut::Words("[一-龥ࠀ-一가-퟿]+"),
            Cut::EachDigit,
            Cut::Bytes,
        ]),
    ),
    (&["deepseek-v3"], plain(&[Cut::Words(r"\p{N}{1,3}"), Cut::Words("[一-龥぀-ゟ゠-ヿ]+"), Cut::Words(DEEPSEEK_V3), Cut::Bytes])),
    // Digits are looked for after the step to bytes: some bytes look like digits then.
    (&["falcon"], plain(&[Cut::Punctuation, Cut::Words(GPT2), Cut::Bytes, Cut::Digits, Cut::Words("[0-9][0-9][0-9]")])),
    (&["bloom", "gpt3-finnish"], plain(&[Cut::Words(BLOOM), Cut::Bytes])),
    // What a converter writes that does not know the tokenizer; the cuts are llama.cpp's, and may not be the model's own.
    (
        &["default"],
        plain(&[
            Cut::Words(r"[\p{P}\$\+<=>\^~\|]+"),
            Cut::Words(GPT2),
            Cut::Words(r"\p{N}+"),
            Cut::Words("[0-9][0-9][0-9]"),
            Cut::Bytes,
        ]),
    ),
];

impl Family {
    /// # Errors
    /// An unknown name: a guess would give other tokens than the model was trained on.
    pub(super) fn named(name: &str) -> Result<Self> {
        let found = FAMILIES.iter().find(|(names, _)| names.contains(&name));
        let (_, family) = found.with_context(|| {
            let names: Vec<_> = FAMILIES.iter().flat_map(|(names, _)| *names).copied().collect();
            format!("{name:?} is not supported (supported: {})", names.join(", "))
        })?;
        Ok(*family)
    }

    pub(super) fn splitter(self) -> Splitter {
        let steps = self.cuts.iter().map(|cut| match *cut {
            Cut::Words(pattern) => Step::Words(Words::new(pattern).expect("the patterns are constants and valid")),
            Cut::EachDigit => Step::Crate(PreTokenizerWrapper::Digits(Digits::new(true))),
            Cut::Digits => Step::Crate(PreTokenizerWrapper::Digits(Digits::new(false))),
            Cut::Punctuation => {
                Step::Crate(PreTokenizerWrapper::Punctuation(Punctuation::new(SplitDelimiterBehavior::Contiguous)))
            }
            Cut::Bytes => bytes(),
        });
        Splitter(steps.collect())
    }
}

/// The step from characters to bytes in GPT-2's alphabet.
pub(super) fn bytes() -> Step {
    Step::Crate(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)))
}

/// What a byte-level pre-tokenizer cuts by where no other has cut before it.
pub(super) fn gpt2_words() -> Step {
    Step::Words(Words::new(GPT2).expect("the pattern is a constant and valid"))
}
