//! How models write down what they think before they answer: `<think>…</think>`, and then the answer. Found out from the chat
//! template, and read back from completions as they come. Knows nothing of the wire. Invariant: however a completion comes in
//! pieces, its thoughts and its answer are the same.

const OPEN: &str = "<think>";
const CLOSE: &str = ThinkFormat::CLOSE;

/// How a completion begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThinkFormat {
    /// With thoughts, if it begins with their mark.
    Marked,
    /// Within thoughts: the prompt has opened them.
    Opened,
}

impl ThinkFormat {
    /// What stands after thoughts.
    pub const CLOSE: &str = "</think>";

    /// Whether a chat template knows thoughts.
    pub fn is_taught(source: &str) -> bool {
        source.contains(CLOSE)
    }

    /// Of what follows a prompt that ends so. `begun`: the answer's own beginning, if that is gone on with.
    pub fn after(prompt_end: &str, begun: Option<&str>) -> Self {
        let is_open = match begun {
            Some(begun) => begun.rfind(OPEN).is_some_and(|start| !begun[start..].contains(CLOSE)),
            None => prompt_end.trim_end().ends_with(OPEN),
        };
        if is_open { Self::Opened } else { Self::Marked }
    }

    /// The thoughts of a whole completion, if there are any or at least their marks, and its answer.
    pub fn parse(self, text: &str) -> (Option<String>, String) {
        let mut splitter = Splitter::new(self);
        let mut split = splitter.push(text);
        let rest = splitter.end();
        split.thought.push_str(&rest.thought);
        split.answer.push_str(&rest.answer);
        (splitter.has_thought.then_some(split.thought), split.answer)
    }
}

/// How many of a completion's tokens are thoughts and their marks, given the tokens' bytes: all, if the thoughts do not end.
pub fn n_thought<'t>(tokens: impl Iterator<Item = &'t [u8]>) -> usize {
    let mut counted = Counted::default();
    tokens.take_while(|bytes| counted.push(bytes)).for_each(drop);
    counted.n_tokens
}

/// As [`n_thought`], of a completion that comes token by token.
#[derive(Debug, Clone, Default)]
pub struct Counted {
    /// So many by now.
    pub n_tokens: usize,
    tail: Vec<u8>,
    has_ended: bool,
}

impl Counted {
    /// One more token, by its bytes; whether the next one may be of a thought, too.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        if !self.has_ended {
            self.n_tokens += 1;
            self.tail.extend_from_slice(bytes);
            self.has_ended = self.tail.windows(CLOSE.len()).any(|window| window == CLOSE.as_bytes());
            let n_old = self.tail.len().saturating_sub(CLOSE.len() - 1);
            self.tail.drain(..n_old);
        }
        !self.has_ended
    }
}

/// Text of both kinds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Split {
    /// Without its marks and the blanks around it.
    pub thought: String,
    /// What comes after it, without the blanks before it.
    pub answer: String,
}

/// Takes a completion apart as it comes.
#[derive(Debug, Clone)]
pub struct Splitter {
    format: ThinkFormat,
    part: Part,
    /// What may be a mark or the blanks before one.
    held: String,
    /// Whether blanks that come now are left out.
    at_start: bool,
    has_thought: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// It is not known yet how it begins.
    Start,
    Thought,
    Answer,
}

impl Splitter {
    /// Of a completion in that form.
    pub fn new(format: ThinkFormat) -> Self {
        Self { format, part: Part::Start, held: String::new(), at_start: false, has_thought: false }
    }

    /// Whether the answer has begun, or its place.
    pub fn is_answering(&self) -> bool {
        self.part == Part::Answer
    }

    /// Whether there are thoughts before it, or at least their marks.
    pub fn has_thought(&self) -> bool {
        self.has_thought
    }

    /// Takes in more text; gives what is sure by now.
    pub fn push(&mut self, more: &str) -> Split {
        self.held.push_str(more);
        let mut split = Split::default();
        if self.part == Part::Start {
            self.begin(false);
        }
        if self.part == Part::Thought {
            self.skip_blanks();
            if let Some(start) = self.held.find(CLOSE) {
                self.held[..start].trim_end().clone_into(&mut split.thought);
                self.held.drain(..start + CLOSE.len());
                (self.part, self.at_start) = (Part::Answer, true);
            } else {
                let begun = (1..CLOSE.len()).rev().find(|&n| self.held.ends_with(&CLOSE[..n])).unwrap_or(0);
                let n_sure = self.held[..self.held.len() - begun].trim_end().len();
                split.thought = self.held.drain(..n_sure).collect();
            }
        }
        if self.part == Part::Answer {
            self.skip_blanks();
            split.answer = std::mem::take(&mut self.held);
        }
        split
    }

    /// What was held back, when no more comes.
    pub fn end(&mut self) -> Split {
        self.begin(true);
        let held = std::mem::take(&mut self.held);
        match self.part {
            Part::Thought => Split { thought: held.trim_end().to_owned(), answer: String::new() },
            _ => Split { thought: String::new(), answer: held },
        }
    }

    /// Finds out how it begins, if that can be told.
    fn begin(&mut self, is_end: bool) {
        if self.part != Part::Start {
            return;
        }
        let text = self.held.trim_start();
        if let Some(rest) = text.strip_prefix(OPEN) {
            self.held = rest.to_owned();
            (self.part, self.at_start) = (Part::Thought, true);
        } else if is_end || !OPEN.starts_with(text) {
            (self.part, self.at_start) = match self.format {
                ThinkFormat::Marked => (Part::Answer, false),
                ThinkFormat::Opened => (Part::Thought, true),
            };
            if self.part == Part::Thought {
                self.held = text.to_owned();
            }
        }
        self.has_thought = self.part == Part::Thought;
    }

    /// Leaves out blanks at the beginning of a part.
    fn skip_blanks(&mut self) {
        if self.at_start {
            let n_blanks = self.held.len() - self.held.trim_start().len();
            self.held.drain(..n_blanks);
            self.at_start = self.held.is_empty();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(format: ThinkFormat, text: &str, thought: &str, answer: &str) {
        let (found, rest) = format.parse(text);
        assert_eq!((found.as_deref().unwrap_or_default(), rest.as_str()), (thought, answer), "{text:?}");
        assert!(found.is_some() || format == ThinkFormat::Marked, "what was opened is there: {text:?}");
    }

    #[test]
    fn thoughts_come_before_the_answer() {
        use ThinkFormat::{Marked, Opened};
        check(Marked, "<think>\nIs it 4? \n</think>\n\n It is 4.\n", "Is it 4?", "It is 4.\n");
        check(Opened, "\nIs it 4?\n</think>\n\nIt is 4.", "Is it 4?", "It is 4.");
        // Some open again what is open.
        check(Opened, " <think>Hm.</think>Yes </think>", "Hm.", "Yes </think>");
        check(Marked, "<think>\n\n</think>\n\nYes.", "", "Yes.");
        // Cut off.
        check(Marked, "<think>a < b, so </thi", "a < b, so </thi", "");
        check(Opened, "Hm", "Hm", "");
        check(Opened, " <thi", "<thi", "");
        check(Marked, "\n<thi", "", "\n<thi");
        check(Marked, "", "", "");
        // Marks elsewhere are text.
        check(Marked, " It says <think>x</think>.", "", " It says <think>x</think>.");
        check(Marked, "</think>Yes", "", "</think>Yes");
        check(Opened, "a <think> b </ think></think>\n<think>c", "a <think> b </ think>", "<think>c");
    }

    #[test]
    fn what_the_prompt_opened_is_open() {
        for (prompt_end, begun, is_open) in [
            ("<|assistant|>\n<think>\n", None, true),
            ("<|assistant|>\n<think>\n\n</think>\n\n", None, false),
            ("What does <think> mean?<|assistant|>\n", None, false),
            ("<think>", Some("Well"), false),
            ("Hm", Some("<think>Hm"), true),
            ("<think>", Some("<think>a</think><think>"), true),
            ("Yes", Some("<think>Hm</think>Yes"), false),
        ] {
            assert_eq!(ThinkFormat::after(prompt_end, begun) == ThinkFormat::Opened, is_open, "{prompt_end:?} {begun:?}");
        }
    }

    #[test]
    fn tokens_of_thoughts_are_counted_with_their_marks() {
        let count = |tokens: &[&str]| n_thought(tokens.iter().map(|token| token.as_bytes()));
        assert_eq!(count(&["<think>", "Hm", "</think>", "\n", "Yes"]), 3);
        assert_eq!(count(&["Hm", " </", "th", "ink", ">\nYes", "."]), 5);
        assert_eq!(count(&["Hm", "</th", "</think>", "a"]), 3);
        assert_eq!(count(&["Hm", "."]), 2);
        assert_eq!(count(&[]), 0);
    }

    proptest! {
        /// However it comes in pieces: the same in the end, and nothing is taken back.
        #[test]
        fn any_pieces_give_the_same(
            parts in prop::collection::vec(prop::sample::select(vec!["<think>", "</think>", "<", "</", "thi", "nk>", " ", "\n", "a", "ü", "🙂", "yes. "]), 0..12),
            sizes in prop::collection::vec(1..6usize, 1..12),
            opened in any::<bool>(),
        ) {
            let (text, format) = (parts.concat(), if opened { ThinkFormat::Opened } else { ThinkFormat::Marked });
            let (thought, answer) = format.parse(&text);
            let whole = Split { thought: thought.clone().unwrap_or_default(), answer };
            let (mut splitter, mut joined) = (Splitter::new(format), Split::default());
            let chars: Vec<char> = text.chars().collect();
            let (mut rest, mut sizes) = (&chars[..], sizes.iter().cycle());
            while !rest.is_empty() {
                let (piece, left) = rest.split_at((*sizes.next().unwrap_or(&1)).min(rest.len()));
                let more = splitter.push(&piece.iter().collect::<String>());
                // Thoughts end before the answer begins.
                prop_assert!(more.thought.is_empty() || joined.answer.is_empty());
                joined.thought += &more.thought;
                joined.answer += &more.answer;
                rest = left;
            }
            let more = splitter.end();
            joined.thought += &more.thought;
            joined.answer += &more.answer;
            prop_assert_eq!(&joined, &whole);
            prop_assert_eq!(splitter.has_thought(), thought.is_some());
            // By another road: the first mark that closes is the end of what was opened.
            let opens = text.trim_start().strip_prefix(OPEN);
            let inside = opens.or(opened.then_some(text.as_str()));
            let wanted = match inside.map(|inside| inside.split_once(CLOSE).unwrap_or((inside, ""))) {
                Some((thought, answer)) => (thought.trim(), answer.trim_start()),
                None => ("", text.as_str()),
            };
            prop_assert_eq!((whole.thought.as_str(), whole.answer.as_str()), wanted);
            prop_assert_eq!(thought.is_some(), inside.is_some());
        }
    }
}
