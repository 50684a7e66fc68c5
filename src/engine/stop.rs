//! A sequence's text, grown token by token: UTF-8 that is never broken, and the search for stop strings across token
//! borders. Knows nothing of tokens, only of their bytes. Invariant: the text, and where it stops, do not depend on how
//! the bytes were split into pushes.

/// The text of one completion so far.
#[derive(Debug, Default, Clone)]
pub struct StopText {
    text: String,
    /// Bytes at the end that may become a character with the next push (at most 3 between pushes).
    tail: Vec<u8>,
}

impl StopText {
    /// Appends bytes; invalid ones become U+FFFD just as `String::from_utf8_lossy` of the whole would have it.
    ///
    /// Returns true if one of the `stop` strings is now complete; the text then ends before it and nothing may be
    /// pushed any more. Of several, the one that was complete first counts, and of those that end together, the
    /// longest.
    pub fn push(&mut self, bytes: &[u8], stop: &[String]) -> bool {
        let old_len = self.text.len();
        self.tail.extend_from_slice(bytes);
        self.take_characters();
        self.cut_at_stop(old_len, stop)
    }

    /// Ends the text: a character that never became complete is U+FFFD.
    pub fn finish(&mut self) {
        if !self.tail.is_empty() {
            self.text.push(char::REPLACEMENT_CHARACTER);
            self.tail.clear();
        }
    }

    /// The complete characters so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// How many of its bytes no later push can take away: what may be the beginning of a stop string can still go.
    pub fn stable_len(&self, stop: &[String]) -> usize {
        let text = self.text.as_bytes();
        let begun = |s: &String| {
            (1..s.len().min(text.len() + 1)).rev().find(|&n| s.is_char_boundary(n) && text.ends_with(&s.as_bytes()[..n]))
        };
        self.text.len() - stop.iter().filter_map(begun).max().unwrap_or(0)
    }

    /// An empty text with room for so many bytes.
    pub(super) fn with_capacity(n_bytes: usize) -> Self {
        Self { text: String::with_capacity(n_bytes), tail: Vec::with_capacity(64) }
    }

    /// The complete characters so far, taken away.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.text)
    }

    /// Moves what is complete (or can't become valid) from the tail to the text.
    fn take_characters(&mut self) {
        let mut rest = self.tail.as_slice();
        loop {
            let (valid, bad_len) = match std::str::from_utf8(rest) {
                Ok(all) => (all, Some(0)),
                Err(e) => {
                    let valid = std::str::from_utf8(&rest[..e.valid_up_to()]).expect("valid up to there");
                    (valid, e.error_len())
                }
            };
            self.text.push_str(valid);
            rest = &rest[valid.len()..];
            match bad_len {
                Some(0) | None => break, // all taken, or the rest may still become a character
                Some(n) => {
                    self.text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[n..];
                }
            }
        }
        let taken = self.tail.len() - rest.len();
        self.tail.drain(..taken);
    }

    /// Looks for matches that end in the text after `old_len`; cuts the text before the first one.
    fn cut_at_stop(&mut self, old_len: usize, stop: &[String]) -> bool {
        let first = stop.iter().filter(|s| !s.is_empty()).filter_map(|s| {
            let from = self.text.floor_char_boundary(old_len.saturating_sub(s.len() - 1));
            let start = from + self.text[from..].find(s.as_str())?;
            Some((start + s.len(), start))
        });
        let Some((_, start)) = first.min() else { return false };
        self.text.truncate(start);
        self.tail.clear();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::StopText;
    use proptest::prelude::*;

    /// The text and whether it stopped, by definition: byte by byte over the whole.
    fn naive(bytes: &[u8], stop: &[String]) -> (String, bool) {
        let whole = String::from_utf8_lossy(bytes).into_owned();
        for end in (0..=whole.len()).filter(|&e| whole.is_char_boundary(e)) {
            let longest = stop.iter().filter(|s| !s.is_empty() && whole[..end].ends_with(s.as_str())).map(String::len).max();
            if let Some(n) = longest {
                return (whole[..end - n].to_owned(), true);
            }
        }
        (whole, false)
    }

    /// Bytes in pieces: text of few letters, so that stop strings occur, with broken characters between.
    fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let byte = prop_oneof![4 => prop::sample::select(b"aab\n".to_vec()), 2 => prop::sample::select("é漢🙂".as_bytes().to_vec()), 1 => any::<u8>()];
        prop::collection::vec(prop::collection::vec(byte, 0..6), 0..12)
    }

    proptest! {
        #[test]
        fn any_split_gives_the_text_of_the_whole(
            pieces in pieces(),
            stop in prop::collection::vec("[ab\né\u{fffd}]{0,4}", 0..3),
        ) {
            let mut text = StopText::default();
            let mut seen = Vec::new();
            let mut stopped = false;
            let mut told = String::new();
            for piece in &pieces {
                seen.extend_from_slice(piece);
                stopped = text.push(piece, &stop);
                prop_assert!(text.text().starts_with(&told), "{:?} was told, and then taken back", told);
                if !stopped {
                    text.text()[..text.stable_len(&stop)].clone_into(&mut told);
                }
                if stopped { break }
            }
            if !stopped { text.finish(); }
            let (expected, stops) = naive(&seen, &stop);
            // A character left incomplete becomes U+FFFD at the end only: it can't complete a stop string any more.
            if stops && !stopped {
                prop_assert!(text.text().ends_with(char::REPLACEMENT_CHARACTER));
            } else {
                prop_assert_eq!(text.text(), expected);
                prop_assert_eq!(stopped, stops);
            }
        }
    }

    #[test]
    fn the_stop_completed_first_counts() {
        let stop = ["abcd", "bc"].map(String::from);
        for pieces in [vec!["xabcd"], vec!["xab", "cd"], vec!["x", "a", "b", "c"]] {
            let mut text = StopText::default();
            assert!(pieces.iter().any(|p| text.push(p.as_bytes(), &stop)));
            assert_eq!(text.text(), "xa");
        }
    }
}
