//! The order in which a window of rows is run. Pure: token ids and predicted lengths in, an order out.
//!
//! The prompts form a tree over token ids (a trie with its unbranched runs joined). Visited depth first, every row
//! shares with any earlier row only what it shares with the row just before it, so a cache that keeps one path has
//! perfect hits and knows exactly when a prefix was used for the last time. Among the children of a node the one with
//! the most work in a single row goes first, so that long rows are not left for the tail.

pub mod estimate;

/// A row to be ordered.
#[derive(Debug, Clone, Copy)]
pub struct PlanRow<'a> {
    /// The prompt's token ids, at least one.
    pub tokens: &'a [u32],
    /// Predicted number of tokens that the row will hold at its end (prompt and completion).
    pub predicted_tokens: u32,
}

/// The order of a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Indices of the rows, in running order.
    pub order: Vec<u32>,
    /// For each place in `order`: leading tokens shared with the row before it (0 for the first).
    pub shared_tokens: Vec<u32>,
    /// Leading tokens that all rows share.
    pub common_tokens: u32,
    /// Distinct nodes of the token trie: the fewest tokens that any engine must prefill for these prompts.
    pub trie_tokens: u64,
}

/// A node of the prefix tree: rows `start..end` of the sorted order share their first `depth` tokens.
struct Node {
    depth: u32,
    start: usize,
    end: usize,
    children: Vec<usize>,
}

/// Orders a window of rows; O(n log n) comparisons of prompts. Ties keep the input's order, so the plan is a function
/// of the rows alone.
pub fn plan(rows: &[PlanRow<'_>]) -> Plan {
    // Most comparisons are decided by what stands beside the index, without a look at the prompts.
    let leading: Vec<u64> = rows.iter().map(|row| leading(row.tokens)).collect();
    let mut keyed: Vec<(u64, u32)> = leading.iter().copied().zip(0..).collect();
    keyed.sort_unstable_by(|&(x, a), &(y, b)| {
        x.cmp(&y).then_with(|| rows[a as usize].tokens.cmp(rows[b as usize].tokens)).then(a.cmp(&b))
    });
    let sorted: Vec<u32> = keyed.into_iter().map(|(_, i)| i).collect();
    let shared_sorted = shared_with_previous(rows, &leading, &sorted);
    let trie_tokens =
        sorted.iter().zip(&shared_sorted).map(|(&i, &shared)| rows[i as usize].tokens.len() as u64 - u64::from(shared)).sum();
    let common_tokens = match sorted.as_slice() {
        [] => 0,
        [first, .., last] => common_prefix(rows[*first as usize].tokens, rows[*last as usize].tokens),
        [only] => rows[*only as usize].tokens.len() as u32,
    };
    let order = longest_first(rows, &sorted, &shared_sorted);
    let shared_tokens = shared_with_previous(rows, &leading, &order);
    Plan { order, shared_tokens, common_tokens, trie_tokens }
}

/// The first two tokens as a number that orders prompts as their tokens do, as far as it goes.
fn leading(tokens: &[u32]) -> u64 {
    let token = |i: usize| tokens.get(i).map_or(0, |&token| u64::from(token));
    token(0) << 32 | token(1)
}

/// Length of the longest common prefix, in tokens.
pub fn common_prefix(a: &[u32], b: &[u32]) -> u32 {
    a.iter().zip(b).take_while(|(x, y)| x == y).count() as u32
}

/// Of each row of an order, the leading tokens that it shares with the one before it; `leading` is that of each row.
fn shared_with_previous(rows: &[PlanRow<'_>], leading: &[u64], order: &[u32]) -> Vec<u32> {
    let shared = |a: u32, b: u32| {
        let (a, b) = (a as usize, b as usize);
        match leading[a] ^ leading[b] {
            0 => common_prefix(rows[a].tokens, rows[b].tokens),
            // The second tokens differ, or one prompt has none.
            different if different >> 32 == 0 => 1,
            _ => 0,
        }
    };
    order.iter().take(1).map(|_| 0).chain(order.windows(2).map(|pair| shared(pair[0], pair[1]))).collect()
}

/// Depth-first order of the prefix tree, at each node the child with the largest row first.
fn longest_first(rows: &[PlanRow<'_>], sorted: &[u32], shared: &[u32]) -> Vec<u32> {
    let nodes = prefix_tree(sorted.len(), shared);
    let predicted = |place: usize| rows[sorted[place] as usize].predicted_tokens;
    // Children are made before their parents, so one pass in order of creation sees every child's maximum.
    let mut largest: Vec<u32> = Vec::with_capacity(nodes.len());
    for node in &nodes {
        let of_rows = if node.children.is_empty() { (node.start..node.end).map(predicted).max() } else { None };
        let of_children = node.children.iter().map(|&c| largest[c]).max();
        largest.push(of_rows.max(of_children).unwrap_or(0));
    }
    let mut order = Vec::with_capacity(sorted.len());
    let mut stack: Vec<usize> = nodes.len().checked_sub(1).into_iter().collect();
    let mut children: Vec<usize> = Vec::new();
    while let Some(i) = stack.pop() {
        let node = &nodes[i];
        if node.children.is_empty() {
            order.extend_from_slice(&sorted[node.start..node.end]);
            continue;
        }
        children.clone_from(&node.children);
        children.sort_unstable_by_key(|&c| (std::cmp::Reverse(largest[c]), nodes[c].start));
        stack.extend(children.drain(..).rev());
    }
    order
}

/// The prefix tree of sorted rows, from how much each shares with the one before; the root is last. Leaves are single
/// rows. (The interval tree of a longest-common-prefix array, built with a stack: Abouelhoda, Kurtz, Ohlebusch 2004.)
fn prefix_tree(n_rows: usize, shared: &[u32]) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::with_capacity(2 * n_rows);
    let mut open: Vec<Node> = Vec::new();
    for place in 0..n_rows {
        nodes.push(Node { depth: u32::MAX, start: place, end: place + 1, children: Vec::new() });
        let mut child = nodes.len() - 1;
        let next_shared = shared.get(place + 1).copied();
        // Close every node that is deeper than what the next row shares.
        while let Some(top) = open.last_mut() {
            if next_shared.is_some_and(|depth| top.depth <= depth) {
                break;
            }
            top.children.push(child);
            top.end = place + 1;
            nodes.extend(open.pop());
            child = nodes.len() - 1;
        }
        let Some(depth) = next_shared else { break };
        match open.last_mut() {
            Some(top) if top.depth == depth => top.children.push(child),
            _ => open.push(Node { depth, start: nodes[child].start, end: place + 1, children: vec![child] }),
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn rows(prompts: &[Vec<u32>]) -> Vec<PlanRow<'_>> {
        prompts
            .iter()
            .map(|tokens| PlanRow { tokens, predicted_tokens: tokens.len() as u32 + tokens.iter().sum::<u32>() })
            .collect()
    }

    proptest! {
        /// The order is a permutation; what it does not share is exactly the trie; the plan ignores the input's order.
        #[test]
        fn the_order_prefills_each_trie_node_once(prompts in prop::collection::vec(prop::collection::vec(0u32..3, 1..12), 1..60)) {
            let rows = rows(&prompts);
            let plan = plan(&rows);
            let mut seen: Vec<u32> = plan.order.clone();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..prompts.len() as u32).collect::<Vec<_>>());
            let trie: HashSet<&[u32]> = prompts.iter().flat_map(|p| (1..=p.len()).map(move |n| &p[..n])).collect();
            prop_assert_eq!(plan.trie_tokens, trie.len() as u64);
            let prefilled: usize = plan.order.iter().zip(&plan.shared_tokens).map(|(&i, &s)| prompts[i as usize].len() - s as usize).sum();
            prop_assert_eq!(prefilled, trie.len(), "a row shares something with a row that is not just before it");
        }

        /// Of two rows that share nothing with each other, the one with more work comes first.
        #[test]
        fn longer_rows_first(lengths in prop::collection::vec(1u32..1000, 2..40)) {
            let prompts: Vec<Vec<u32>> = (0..lengths.len() as u32).map(|i| vec![i]).collect();
            let rows: Vec<_> = prompts.iter().zip(&lengths).map(|(tokens, &predicted_tokens)| PlanRow { tokens, predicted_tokens }).collect();
            let order = plan(&rows).order;
            prop_assert!(order.windows(2).all(|w| lengths[w[0] as usize] >= lengths[w[1] as usize]));
        }
    }

    #[test]
    fn nothing_to_plan() {
        assert_eq!(plan(&[]), Plan { order: vec![], shared_tokens: vec![], common_tokens: 0, trie_tokens: 0 });
    }
}
