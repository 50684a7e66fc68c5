//! Cuts text into words, which a tokenizer's model then takes each for itself. Knows nothing of tokens. Invariant: the
//! words are those that the pre-tokenizers of a tokenizer.json make, and regular expressions run in linear time.

use regex::Regex;
use tokenizers::pattern::Pattern;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{Offsets, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

/// What cuts, one after the other.
pub(super) struct Splitter(pub(super) Vec<Step>);

/// One cut.
pub(super) enum Step {
    /// By words; what is between two is a word too.
    Words(Words),
    /// As the crate does it.
    Crate(PreTokenizerWrapper),
}

impl Splitter {
    /// Whether [`Splitter::for_each_word`] knows all cuts, and words then go to the model with their bytes as characters.
    pub(super) fn is_byte_level(&self) -> bool {
        let Some((last, cuts)) = self.0.split_last() else { return false };
        let is_bytes =
            |step: &Step| matches!(step, Step::Crate(PreTokenizerWrapper::ByteLevel(b)) if !b.add_prefix_space && !b.use_regex);
        is_bytes(last) && cuts.iter().all(|step| matches!(step, Step::Words(_)) || cuts_each_digit(step))
    }

    /// The words of a piece, in order; the same as [`PreTokenizer::pre_tokenize`] makes.
    pub(super) fn for_each_word(&self, piece: &str, each: &mut dyn FnMut(&str)) {
        cut(&self.0[..self.0.len() - 1], piece, each);
    }
}

fn cuts_each_digit(step: &Step) -> bool {
    matches!(step, Step::Crate(PreTokenizerWrapper::Digits(digits)) if digits.individual_digits)
}

fn cut(steps: &[Step], piece: &str, each: &mut dyn FnMut(&str)) {
    let Some((step, later)) = steps.split_first() else { return each(piece) };
    let mut take = |part: &str| {
        if !part.is_empty() {
            cut(later, part, each);
        }
    };
    if let Step::Words(words) = step {
        for ((start, end), _) in words.find_matches(piece).expect("finding words can't fail") {
            take(&piece[start..end]);
        }
        return;
    }
    let mut rest = piece;
    while let Some((start, digit)) = rest.char_indices().find(|(_, c)| c.is_numeric()) {
        let end = start + digit.len_utf8();
        take(&rest[..start]);
        take(&rest[start..end]);
        rest = &rest[end..];
    }
    take(rest);
}

impl PreTokenizer for Splitter {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        for step in &self.0 {
            match step {
                Step::Words(words) => text.split(|_, piece| piece.split(words, SplitDelimiterBehavior::Isolated))?,
                Step::Crate(pre_tokenizer) => pre_tokenizer.pre_tokenize(text)?,
            }
        }
        Ok(())
    }
}

/// A regular expression for words. In place of the crate's splitters because their regular expressions look ahead by
/// backtracking: past a million blanks they give up and silently leave the rest uncut.
pub(super) struct Words {
    regex: Regex,
    /// Whether a run of blanks leaves its last one to the word that follows: what `\s+(?!\S)` is for.
    leaves_blank: bool,
    /// Whether blanks up to a line's end are a word of their own (`\s*[\r\n]+`), from which nothing is taken.
    keeps_line_ends: bool,
}

/// Blanks that no word follows: in tokenizers the only use of looking ahead that is common.
const BLANKS_BEFORE_BLANK: &str = r"\s+(?!\S)";

impl Words {
    /// Compiles an expression. `None` if it needs backtracking: looks ahead other than after blanks, looks behind, or
    /// has quantifiers that give nothing back.
    pub(super) fn new(pattern: &str) -> Option<Self> {
        if has_possessive(pattern) {
            return None;
        }
        // Some files have the characters themselves in their expressions.
        let pattern = &pattern.replace('\r', r"\r").replace('\n', r"\n");
        // Alternatives that the replaced one makes needless: it matches all that they match, and is tried before.
        let plain = pattern.replace(r"\s+(?!\S)|\s+", r"\s+").replace(BLANKS_BEFORE_BLANK, r"\s+");
        let regex = Regex::new(&plain).ok()?;
        Some(Self { regex, leaves_blank: pattern.contains(BLANKS_BEFORE_BLANK), keeps_line_ends: pattern.contains(r"\s*[\r\n]") })
    }

    /// Where the match that begins the match `found` of the plain expression ends.
    fn end(&self, text: &str, found: &regex::Match<'_>) -> usize {
        // A run of blanks leaves its last one to the word that follows, if it has another and a word follows. Only the
        // alternative `\s+` ends in a blank, but for the lines' ends.
        let last = found.as_str().chars().next_back().filter(|&c| self.leaves_blank && c.is_whitespace());
        match last.filter(|&c| !(self.keeps_line_ends && matches!(c, '\r' | '\n'))) {
            Some(blank) if found.end() < text.len() && found.len() > blank.len_utf8() => found.end() - blank.len_utf8(),
            _ => found.end(),
        }
    }
}

impl Pattern for &Words {
    /// The words of `text`, in order, and what is between them.
    fn find_matches(&self, text: &str) -> tokenizers::Result<Vec<(Offsets, bool)>> {
        let mut words = Vec::with_capacity(text.len() / 4 + 1);
        let (mut start, mut from) = (0, 0);
        while let Some(found) = self.regex.find_at(text, from) {
            if found.is_empty() {
                // Nothing is no word; the character after it may be part of one.
                let Some(next) = text[found.end()..].chars().next() else { break };
                from = found.end() + next.len_utf8();
                continue;
            }
            if found.start() > start {
                words.push(((start, found.start()), false));
            }
            start = self.end(text, &found);
            from = start;
            words.push(((found.start(), start), true));
        }
        if start < text.len() || words.is_empty() {
            words.push(((start, text.len()), false));
        }
        Ok(words)
    }
}

/// Whether an expression has quantifiers that give nothing back (`?+`, `*+`, `++`, `{1,3}+`), which the `regex` crate
/// would read as two quantifiers.
fn has_possessive(pattern: &str) -> bool {
    let (mut in_class, mut is_escaped) = (0u32, false);
    // The last character if it may end a quantifier.
    let (mut before, mut last) = (' ', ' ');
    for c in pattern.chars() {
        if is_escaped {
            (is_escaped, last) = (false, ' ');
            continue;
        }
        let ends_quantifier = matches!(last, '?' | '*' | '+') || (last == '}' && (before.is_ascii_digit() || before == ','));
        if c == '+' && in_class == 0 && ends_quantifier {
            return true;
        }
        match c {
            '\\' => is_escaped = true,
            '[' => in_class += 1,
            ']' => in_class = in_class.saturating_sub(1),
            _ => {}
        }
        (before, last) = (last, if in_class == 0 { c } else { ' ' });
    }
    false
}
