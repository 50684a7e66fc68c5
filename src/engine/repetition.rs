//! Completions that go round in circles. Knows nothing of text. Invariant: whether one does depends on its tokens alone.

use crate::request::Repetition;

/// Whether the tokens end in a pattern that stands there as often as the rule says.
pub(super) fn ends_in_circles(tokens: &[u32], rule: Repetition) -> bool {
    (rule.min_pattern..=rule.max_pattern).any(|n_pattern| {
        let n_pattern = n_pattern as usize;
        let n_tokens = n_pattern * rule.min_count as usize;
        let Some(tail) = tokens.len().checked_sub(n_tokens).map(|start| &tokens[start..]) else { return false };
        // From the end: most patterns are found not to repeat at the first look.
        tail[n_pattern..].iter().rev().eq(tail[..n_tokens - n_pattern].iter().rev())
    })
}

/// Most often that a pattern of at most `max_pattern` tokens stands anywhere, one directly after the other; 1 where none does
/// more than once.
pub fn most_repeats(tokens: &[u32], max_pattern: usize) -> usize {
    let mut most = 1;
    for n_pattern in 1..=max_pattern.min(tokens.len() / 2) {
        let mut n_same = 0;
        for (token, before) in tokens[n_pattern..].iter().zip(tokens) {
            n_same = if token == before { n_same + 1 } else { 0 };
            most = most.max(n_same / n_pattern + 1);
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How often the last `n_pattern` tokens stand at the end, by looking.
    fn repeats_at_end(tokens: &[u32], n_pattern: usize) -> usize {
        let pattern = &tokens[tokens.len() - n_pattern..];
        tokens.rchunks_exact(n_pattern).take_while(|chunk| *chunk == pattern).count()
    }

    proptest! {
        #[test]
        fn both_find_what_is_there(tokens in prop::collection::vec(0..3_u32, 0..40), min in 1..4_u32, more in 0..4_u32, count in 2..6_u32) {
            let rule = Repetition { min_pattern: min, max_pattern: min + more, min_count: count };
            let patterns = |n: usize| (1..=n.min(tokens.len())).collect::<Vec<_>>();
            let ends = (min as usize..=(min + more) as usize)
                .any(|n| n <= tokens.len() && repeats_at_end(&tokens, n) >= count as usize);
            prop_assert_eq!(ends_in_circles(&tokens, rule), ends);
            let most = (1..=tokens.len())
                .flat_map(|end| patterns(end.min(7)).into_iter().map(move |n| (end, n)))
                .map(|(end, n)| repeats_at_end(&tokens[..end], n));
            prop_assert_eq!(most_repeats(&tokens, 7), most.max().unwrap_or(1));
        }
    }
}
