//! Steps of one form, captured once and launched as one. Which are kept is decided here, by numbers alone: no GPU.
//!
//! Invariant: two steps of one form make the same launches, with the same arguments: they differ in what the words say that kernels
//! read (`staging`). So what was captured in one is right in all.

use super::work::{Attended, Work};
use crate::device::batch::Batch;

/// Graphs, and forms that came once, that are kept.
const MOST_FORMS: usize = 64;
/// Of the GPU's memory, what graphs may take: a part of so many.
const MEMORY_SHARE: u64 = 64;
/// No graph is made where less than this is free, bytes.
const LEAST_FREE: u64 = 64 << 20;

/// What the launches of a step depend on in which each sequence has one token and draws the next. Numbers are rounded up, so that
/// there are few forms: rows that are too many are stored nowhere and read by nobody, items that are too many have no rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    /// Tokens, and head rows.
    pub(super) rows: usize,
    /// Items of attention of each window, by kernel.
    pub(super) prefill: usize,
    pub(super) decode: usize,
    /// Whether there are parts to merge.
    pub(super) merges: bool,
}

/// So many rows or a few more, at most a quarter: one of four numbers between two powers of two, and at most `most`.
fn rounded(n: usize, most: usize) -> usize {
    let step = (n.next_power_of_two() / 8).max(1);
    n.next_multiple_of(step).min(most.max(n))
}

/// The smallest `unit` · 2^i that is enough.
fn doubled(n: usize, unit: usize) -> usize {
    if n == 0 { 0 } else { unit * n.div_ceil(unit).next_power_of_two() }
}

impl Form {
    /// The form of a step, where it can have one.
    pub(super) fn of(batch: &Batch, works: &[(Attended, Work)], max_rows: usize) -> Option<Self> {
        let n_rows = batch.tokens.len();
        let draws_all = (0..).zip(&batch.heads).all(|(i, head)| head.token_idx == i);
        let is_plain = batch.seqs.len() == n_rows && batch.heads.len() == n_rows && draws_all && batch.copies.is_empty();
        if !is_plain || n_rows == 0 {
            return None;
        }
        let rows = rounded(n_rows, max_rows);
        let most = |n: fn(&Work) -> usize| works.iter().map(|(_, work)| n(work)).max().unwrap_or(0);
        let n_kv_heads = works.iter().map(|(attended, _)| attended.n_kv_heads as usize).max().unwrap_or(1);
        Some(Self {
            rows,
            prefill: doubled(most(|work| work.prefill.len()), n_kv_heads),
            decode: doubled(most(|work| work.decode.len()), n_kv_heads * rows),
            merges: works.iter().any(|(_, work)| work.merges),
        })
    }
}

/// Whether a graph may be made where so many bytes of the GPU are free.
pub(super) fn has_room(free_bytes: u64) -> bool {
    free_bytes >= LEAST_FREE
}

/// What is to be done with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Its operations are launched.
    Launch,
    /// They are captured, and then launched as one.
    Capture(Form),
    /// What was captured is launched.
    Replay(Form),
}

/// The graphs that are kept, and what came once.
pub(super) struct Graphs<G> {
    kept: Vec<Kept<G>>,
    most_bytes: u64,
    clock: u64,
}

struct Kept<G> {
    form: Form,
    /// With the memory that it takes.
    graph: Option<(G, u64)>,
    /// When it was used last.
    used: u64,
}

impl<G> Graphs<G> {
    /// None yet, on a GPU with so much memory.
    pub(super) fn new(memory_bytes: u64) -> Self {
        Self { kept: Vec::with_capacity(MOST_FORMS), most_bytes: memory_bytes / MEMORY_SHARE, clock: 0 }
    }

    /// What to do with a step of that form. The first one is launched as any other: what a library loads at its first use, it
    /// has loaded when the second one is captured.
    pub(super) fn turn(&mut self, form: Form) -> Turn {
        self.clock += 1;
        if let Some(kept) = self.kept.iter_mut().find(|kept| kept.form == form) {
            kept.used = self.clock;
            return if kept.graph.is_some() { Turn::Replay(form) } else { Turn::Capture(form) };
        }
        if self.kept.len() == MOST_FORMS {
            self.forget_one(|_| true);
        }
        self.kept.push(Kept { form, graph: None, used: self.clock });
        Turn::Launch
    }

    /// Keeps what was captured of a form that `turn` was asked for, which takes so much memory; what was not used for longest goes
    /// if all take too much.
    pub(super) fn keep(&mut self, form: Form, graph: G, n_bytes: u64) {
        while self.n_bytes() + n_bytes > self.most_bytes && self.forget_one(|kept| kept.graph.is_some() && kept.form != form) {}
        if let Some(kept) = self.kept.iter_mut().find(|kept| kept.form == form) {
            kept.graph = Some((graph, n_bytes));
        }
    }

    /// The graph of a form.
    pub(super) fn get(&self, form: Form) -> Option<&G> {
        self.kept.iter().find(|kept| kept.form == form)?.graph.as_ref().map(|(graph, _)| graph)
    }

    fn n_bytes(&self) -> u64 {
        self.kept.iter().filter_map(|kept| kept.graph.as_ref()).map(|(_, n_bytes)| n_bytes).sum()
    }

    /// Drops what was not used for longest of those; false if there are none.
    fn forget_one(&mut self, which: impl Fn(&Kept<G>) -> bool) -> bool {
        let oldest = (0..self.kept.len()).filter(|&i| which(&self.kept[i])).min_by_key(|&i| self.kept[i].used);
        oldest.is_some_and(|i| {
            self.kept.swap_remove(i);
            true
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(rows: usize) -> Form {
        Form { rows, prefill: 0, decode: rows, merges: false }
    }

    #[test]
    fn there_are_few_numbers_of_rows() {
        let numbers: Vec<usize> = (1..=100).map(|n| rounded(n, 1000)).collect();
        for (n, &rows) in (1..).zip(&numbers) {
            assert!(rows >= n && 4 * rows <= 5 * n + 3, "{n} rows become {rows}");
        }
        let mut few = numbers;
        few.dedup();
        assert_eq!(few, [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112]);
        assert_eq!((rounded(97, 99), rounded(99, 99)), (99, 99), "there is memory for no more");
        assert_eq!([0, 1, 6, 7, 13].map(|n| doubled(n, 6)), [0, 6, 6, 12, 24]);
    }

    #[test]
    fn a_form_is_captured_when_it_comes_again() {
        let mut graphs = Graphs::new(1 << 30);
        assert_eq!(graphs.turn(form(1)), Turn::Launch);
        assert_eq!(graphs.turn(form(2)), Turn::Launch);
        assert_eq!(graphs.turn(form(1)), Turn::Capture(form(1)));
        // It was not.
        assert_eq!(graphs.turn(form(1)), Turn::Capture(form(1)));
        graphs.keep(form(1), "one", 5);
        assert_eq!((graphs.turn(form(1)), graphs.get(form(1)), graphs.get(form(2))), (Turn::Replay(form(1)), Some(&"one"), None));
    }

    #[test]
    fn graphs_that_were_not_used_for_longest_go() {
        let mut graphs = Graphs::new(100 * MEMORY_SHARE);
        for rows in 1..=3 {
            graphs.turn(form(rows));
            graphs.keep(form(rows), rows, 40);
        }
        assert_eq!([1, 2, 3].map(|rows| graphs.get(form(rows))), [None, Some(&2), Some(&3)], "all three take too much");
        // One alone that takes too much is kept: it is there.
        graphs.turn(form(4));
        graphs.keep(form(4), 4, 1000);
        assert_eq!([2, 3, 4].map(|rows| graphs.get(form(rows))), [None, None, Some(&4)]);
        let mut graphs = Graphs::new(1 << 30);
        for rows in 1..=2 * MOST_FORMS {
            graphs.turn(form(rows));
            graphs.keep(form(rows), rows, 1);
            assert_eq!(graphs.turn(form(1)), Turn::Replay(form(1)), "it is used again and again");
            assert!(graphs.kept.len() <= MOST_FORMS && graphs.kept.capacity() == MOST_FORMS);
        }
    }
}
