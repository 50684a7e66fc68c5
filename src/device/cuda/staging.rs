//! A step as flat words: everything that its kernels read besides weights and activations, in one piece that is copied to the GPU
//! at once. Pure: no GPU.
//!
//! Invariants: what a kernel is given begins at a multiple of 16 bytes; nothing is allocated but what was reserved. Where pieces begin
//! depends on a step's form alone, if it has one (`graphs`): what is as long as it likes, the tables, comes last.

use super::graphs::Form;
use super::work::{Attended, ITEM_WORDS, UNMAPPED, Work};
use crate::device::batch::{Batch, Draw, HeadOut, HeadRow, Want, mask_words};
use crate::device::{BLOCK_TOKENS, StepSizes};
use crate::request::MAX_TOP_LOGPROBS;
use std::iter::repeat_n;
use std::ops::Range;

/// Head rows whose logits are computed at once: bounds the memory for logits.
pub(super) const HEAD_ROWS: usize = 64;
/// Edits of a group of head rows, at least: as many as a vocabulary, for then any one row fits.
const MIN_EDITS: usize = 1 << 16;
/// Masks of a group of head rows.
const MAX_MASKS: usize = 256;
/// Words of struct Want, of struct Drawn, of struct Edit (`kernels/sample.cu`), and of a copy (`kernels/copy.cu`).
pub(super) const WANT_WORDS: usize = 14;
pub(super) const DRAWN_WORDS: usize = 3 + 2 * MAX_TOP_LOGPROBS;
const EDIT_WORDS: usize = 3;
const COPY_WORDS: usize = 3;
/// An id that is none, but the token of that head row of the step before (`kernels/embed.cu`).
const IS_DRAWN: u32 = 1 << 31;
/// Pieces begin at multiples of so many words.
const PIECE: usize = 4;

/// Where a step's pieces begin, in words.
#[derive(Debug, Default)]
pub(super) struct Staged {
    /// Tokens and head rows that are launched: as many as the step has, or as its form has.
    pub(super) n_rows: usize,
    pub(super) n_heads: usize,
    /// `[T]` each.
    pub(super) ids: usize,
    pub(super) positions: usize,
    pub(super) slots: usize,
    /// Of all sequences.
    pub(super) tables: usize,
    /// `[n]{src, dst, n_slots}`
    pub(super) copies: usize,
    /// `[rows]`: which token.
    pub(super) head_rows: usize,
    /// `[rows]`
    pub(super) wants: usize,
    /// Per window: where its work is.
    pub(super) work: Vec<StagedWork>,
    /// Head rows, in pieces.
    pub(super) groups: Vec<HeadGroup>,
    /// All words.
    pub(super) n_words: usize,
}

/// Where the work for one window begins, in words.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct StagedWork {
    pub(super) part_starts: usize,
    pub(super) prefill: usize,
    pub(super) decode: usize,
}

/// Head rows whose edits and masks are on the GPU at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HeadGroup {
    /// Of `Batch::heads`.
    pub(super) rows: Range<usize>,
    /// Of `Batch::edits`.
    pub(super) edits: Range<usize>,
    /// Rows with a mask.
    pub(super) n_masks: usize,
}

/// Edits that a group may have.
fn max_edits(n_vocab: usize) -> usize {
    MIN_EDITS.max(n_vocab)
}

/// Words of the masks, then the edits, of a group.
pub(super) fn shaping_words(n_vocab: usize) -> usize {
    edits_at(n_vocab) + max_edits(n_vocab) * EDIT_WORDS
}

/// Where the edits begin, in words.
pub(super) fn edits_at(n_vocab: usize) -> usize {
    (MAX_MASKS * mask_words(n_vocab)).next_multiple_of(PIECE)
}

/// f32 that a group's edits need to keep what was there.
pub(super) fn kept_words(n_vocab: usize) -> usize {
    max_edits(n_vocab)
}

/// Most words of a step.
pub(super) fn max_words(sizes: &StepSizes<'_>, attended: &[Attended]) -> usize {
    let (tokens, seqs) = (sizes.max_tokens, sizes.max_seqs);
    let tables = seqs * sizes.max_context.div_ceil(BLOCK_TOKENS);
    // A sequence, and what the next ones share with it, begin with at most one partly shared block each.
    let plain = 3 * tokens + tables + 2 * COPY_WORDS * (seqs + 1) + (1 + WANT_WORDS) * seqs;
    let work = attended.iter().map(|attended| {
        let (prefill, decode) = attended.max_items(tokens, seqs);
        tokens + (prefill + decode) * ITEM_WORDS
    });
    plain + work.sum::<usize>() + PIECE * (8 + 3 * attended.len())
}

/// Words in the making.
struct Writer<'a> {
    to: &'a mut [u32],
    at: usize,
}

impl Writer<'_> {
    /// Adds a piece; where it begins.
    fn put<const N: usize>(&mut self, values: impl Iterator<Item = [u32; N]>) -> usize {
        let start = self.at;
        for value in values {
            self.to[self.at..self.at + N].copy_from_slice(&value);
            self.at += N;
        }
        self.at = self.at.next_multiple_of(PIECE);
        start
    }
}

impl Staged {
    /// Cuts the head rows into groups of which edits and masks have room.
    pub(super) fn cut_heads(&mut self, batch: &Batch, n_vocab: usize) {
        self.groups.clear();
        let mut start = 0;
        while start < batch.heads.len() {
            let mut group = HeadGroup { rows: start..start, edits: 0..0, n_masks: 0 };
            for row in &batch.heads[start..] {
                let (first, n) = (row.edits_start as usize, row.n_edits as usize);
                // Edits stand in the order of rows; those without may say any place.
                let edits = match (n, group.edits.is_empty()) {
                    (0, _) => group.edits.clone(),
                    (_, true) => first..first + n,
                    (_, false) => group.edits.start..first + n,
                };
                let n_masks = group.n_masks + usize::from(row.mask.is_some());
                if edits.len() > max_edits(n_vocab) || n_masks > MAX_MASKS {
                    break;
                }
                group = HeadGroup { rows: start..group.rows.end + 1, edits, n_masks };
            }
            assert!(!group.rows.is_empty(), "a row has at most one edit per token");
            start = group.rows.end;
            self.groups.push(group);
        }
    }

    /// Writes a step down, whose head rows were cut and whose works are planned: with a form, filled up to it.
    ///
    /// # Panics
    /// A step that is larger than what was reserved for.
    pub(super) fn fill(&mut self, batch: &Batch, works: &mut [(Attended, Work)], form: Option<&Form>, to: &mut [u32]) {
        self.n_rows = form.map_or(batch.tokens.len(), |form| form.rows);
        self.n_heads = form.map_or(batch.heads.len(), |form| form.rows);
        let (more_rows, more_heads) = (self.n_rows - batch.tokens.len(), self.n_heads - batch.heads.len());
        let mut writer = Writer { to, at: 0 };
        let one = |value: &u32| [*value];
        // The first token at the first position, kept nowhere, and drawn from at its largest logit.
        self.ids = writer.put(batch.tokens.iter().map(one).chain(repeat_n([0], more_rows)));
        for drawn in &batch.drawn {
            writer.to[self.ids + drawn.token_idx as usize] = IS_DRAWN | drawn.head_idx;
        }
        self.positions = writer.put(batch.positions.iter().map(one).chain(repeat_n([0], more_rows)));
        let slots = batch.seqs.iter().flat_map(|seq| {
            let table = batch.block_table(seq);
            (seq.first_position..seq.first_position + seq.n_tokens).map(|position| {
                let (block, slot) = (position / BLOCK_TOKENS as u32, position % BLOCK_TOKENS as u32);
                [table[block as usize] * BLOCK_TOKENS as u32 + slot]
            })
        });
        self.slots = writer.put(slots.chain(repeat_n([UNMAPPED], more_rows)));
        self.head_rows = writer.put(batch.heads.iter().map(|row| [row.token_idx]).chain(repeat_n([0], more_heads)));
        let wants = self.groups.iter().flat_map(|group| {
            let mut n_masks = 0;
            batch.heads[group.rows.clone()].iter().map(move |row| {
                let mask = row.mask.map_or(UNMAPPED, |_| n_masks);
                n_masks += u32::from(row.mask.is_some());
                want(row, group.edits.start as u32, mask)
            })
        });
        let nothing = want(&HeadRow::new(0, Want::Draw(Draw { logprob: false, ..GREEDY }), 0), 0, UNMAPPED);
        self.wants = writer.put(wants.chain(repeat_n(nothing, more_heads)));
        self.work.clear();
        for (_, work) in works {
            if let Some(form) = form {
                work.fill_up(form);
            }
            self.work.push(StagedWork {
                part_starts: writer.put(work.part_starts.iter().map(one)),
                prefill: writer.put(work.prefill.iter().map(super::work::Item::words)),
                decode: writer.put(work.decode.iter().map(super::work::Item::words)),
            });
        }
        self.copies = writer.put(batch.copies.iter().map(|copy| [copy.src, copy.dst, copy.n_slots]));
        self.tables = writer.put(batch.block_tables.iter().map(one));
        self.n_words = writer.at;
    }
}

/// What is done where nothing but a token's log-probability is asked for.
const GREEDY: Draw = Draw { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0, choice: 0, position: 0, logprob: true };

/// struct Want
fn want(row: &HeadRow, first_edit: u32, mask: u32) -> [u32; WANT_WORDS] {
    let (draw, score) = match row.want {
        Want::Draw(draw) => (draw, UNMAPPED),
        Want::Score { token } => (GREEDY, token),
    };
    [
        draw.temperature.to_bits(),
        draw.top_p.to_bits(),
        draw.min_p.to_bits(),
        draw.top_k,
        draw.seed as u32,
        (draw.seed >> 32) as u32,
        draw.choice,
        draw.position,
        score,
        u32::from(draw.logprob),
        row.n_top.into(),
        // Rows without edits may say anything.
        row.edits_start.saturating_sub(first_edit),
        row.n_edits,
        mask,
    ]
}

/// Writes down what a group does to its logits: masks from the beginning, edits from `edits_at`. How many words each has.
pub(super) fn shaping(batch: &Batch, group: &HeadGroup, n_vocab: usize, to: &mut [u32]) -> (usize, usize) {
    let (n_words, mut at) = (mask_words(n_vocab), 0);
    for mask in batch.heads[group.rows.clone()].iter().filter_map(|row| row.mask) {
        to[at..at + n_words].copy_from_slice(&batch.masks[mask as usize * n_words..][..n_words]);
        at += n_words;
    }
    let mut writer = Writer { to: &mut to[edits_at(n_vocab)..], at: 0 };
    let edits = batch.edits[group.edits.clone()].iter();
    writer.put(edits.map(|edit| [edit.token, edit.penalty.to_bits(), edit.bias.to_bits()]));
    (at, group.edits.len() * EDIT_WORDS)
}

/// A row's result as the kernel wrote it (struct Drawn).
pub(super) fn drawn(words: &[u32]) -> HeadOut {
    let n_top = words[2].min(MAX_TOP_LOGPROBS as u32);
    let (tokens, logprobs) = words[3..DRAWN_WORDS].split_at(MAX_TOP_LOGPROBS);
    let mut out = HeadOut { token: words[0], logprob: f32::from_bits(words[1]), n_top: n_top as u8, ..HeadOut::BROKEN };
    for i in 0..n_top as usize {
        out.top[i] = (tokens[i], f32::from_bits(logprobs[i]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::batch::{BatchSeq, LogitEdit};

    const N_VOCAB: usize = 100;

    /// As many tokens as head rows, each of a sequence of its own, with so many edits each, every third with a mask.
    fn batch(n_edits: &[u32]) -> Batch {
        let mut batch = Batch::default();
        for (i, &n_edits) in (0..).zip(n_edits) {
            batch.tokens.push(i);
            batch.positions.push(17);
            batch.seqs.push(BatchSeq { token_start: i, n_tokens: 1, first_position: 17, table_start: 2 * i, n_blocks: 2 });
            batch.block_tables.extend([2 * i, 2 * i + 1]);
            let mask = i.is_multiple_of(3).then(|| (batch.masks.len() / mask_words(N_VOCAB)) as u32);
            batch.masks.extend(mask.into_iter().flat_map(|_| [i; mask_words(N_VOCAB)]));
            let row = HeadRow::new(i, Want::Score { token: i }, 0);
            batch.heads.push(HeadRow { edits_start: batch.edits.len() as u32, n_edits, mask, ..row });
            batch.edits.extend((0..n_edits).map(|token| LogitEdit { token, penalty: 1.0, bias: i as f32 }));
        }
        batch
    }

    #[test]
    fn head_rows_are_cut_where_there_is_no_more_room() {
        let ranges = |n_edits: &[u32]| {
            let mut staged = Staged::default();
            staged.cut_heads(&batch(n_edits), N_VOCAB);
            staged.groups.into_iter().map(|group| (group.rows, group.edits, group.n_masks)).collect::<Vec<_>>()
        };
        assert_eq!(ranges(&[0; 65]), [(0..65, 0..0, 22)]);
        // Every third has a mask.
        let masked = 3 * MAX_MASKS;
        assert_eq!(ranges(&vec![0; masked + 2]), [(0..masked, 0..0, MAX_MASKS), (masked..masked + 2, 0..0, 1)]);
        let half = MIN_EDITS as u32 / 2;
        assert_eq!(ranges(&[0, half, half, 0, 1]), [(0..4, 0..MIN_EDITS, 2), (4..5, MIN_EDITS..MIN_EDITS + 1, 0)]);
    }

    const ATTENDED: Attended = Attended { group: 1, n_kv_heads: 1, prefill_rows: 128, window: 0, max_parts: 0 };

    /// A step written down, and its words.
    fn written(batch: &Batch, has_form: bool) -> (Staged, Vec<u32>, Option<Form>) {
        let (mut staged, mut words, mut work) = (Staged::default(), vec![9; 1 << 14], Work::default());
        work.reserve(&ATTENDED, 1000, 1000);
        work.plan(&ATTENDED, batch);
        let mut works = [(ATTENDED, work)];
        let form = if has_form { Form::of(batch, &works, 1000) } else { None };
        staged.cut_heads(batch, N_VOCAB);
        staged.fill(batch, &mut works, form.as_ref(), &mut words);
        (staged, words, form)
    }

    /// What kernels find where they are told to look.
    #[test]
    fn a_step_is_written_down() {
        let n_edits: Vec<u32> = (0..70).map(|i| i % 4).collect();
        let batch = batch(&n_edits);
        for has_form in [false, true] {
            let (staged, words, form) = written(&batch, has_form);
            assert_eq!((staged.n_rows, staged.n_heads), if has_form { (80, 80) } else { (70, 70) });
            assert_eq!(form.map(|form| form.rows), has_form.then_some(80));
            assert_eq!(words[staged.ids + 69], 69);
            assert_eq!((words[staged.slots], words[staged.slots + 5]), (17, 16 * 11 + 1));
            assert_eq!(words[staged.tables + 139], 139);
            for row in 70..staged.n_rows {
                assert_eq!((words[staged.ids + row], words[staged.slots + row]), (0, UNMAPPED), "it is stored nowhere");
                assert_eq!(words[staged.work[0].part_starts + row], UNMAPPED);
                let want = &words[staged.wants + row * WANT_WORDS..][..WANT_WORDS];
                assert_eq!((want[8], want[10], want[12], want[13]), (UNMAPPED, 0, 0, UNMAPPED), "nothing is done for it");
                // n_rows of an item.
                assert_eq!(words[staged.work[0].decode + row * ITEM_WORDS + 3], 0);
            }
            assert_eq!(words[staged.work[0].decode + 69 * ITEM_WORDS + 3], 1);
            for group in &staged.groups {
                let mut shaping_of_group = vec![9; shaping_words(N_VOCAB)];
                let (n_mask_words, n_edit_words) = shaping(&batch, group, N_VOCAB, &mut shaping_of_group);
                assert_eq!((n_mask_words, n_edit_words), (24 * mask_words(N_VOCAB), batch.edits.len() * EDIT_WORDS));
                for row in group.rows.clone() {
                    let want = &words[staged.wants + row * WANT_WORDS..][..WANT_WORDS];
                    assert_eq!((want[8], want[12]), (row as u32, n_edits[row]), "what is scored, and edits");
                    for edit in 0..want[12] {
                        let at = edits_at(N_VOCAB) + (want[11] + edit) as usize * EDIT_WORDS;
                        assert_eq!((shaping_of_group[at], f32::from_bits(shaping_of_group[at + 2])), (edit, row as f32));
                    }
                    assert_eq!(want[13] != UNMAPPED, row % 3 == 0);
                    if want[13] != UNMAPPED {
                        assert_eq!(shaping_of_group[want[13] as usize * mask_words(N_VOCAB)], row as u32);
                    }
                }
            }
        }
    }

    /// Steps of one form differ in no address.
    #[test]
    fn where_things_are_depends_on_the_form() {
        let (few, many) = (batch(&[1; 17]), batch(&(0..20).collect::<Vec<_>>()));
        let ((a, _, of_few), (b, _, of_many)) = (written(&few, true), written(&many, true));
        assert!(of_few.is_some() && of_few == of_many, "{of_few:?} {of_many:?}");
        let places = |s: &Staged| (s.ids, s.positions, s.slots, s.head_rows, s.wants, s.tables, s.n_rows, s.n_heads);
        assert_eq!(places(&a), places(&b));
        assert_eq!(format!("{:?}", a.work), format!("{:?}", b.work));
        // Whoever has a copy to do, or more than a token, or nothing to draw, has none.
        let mut copies = few.clone();
        copies.copies.push(crate::device::batch::BlockCopy { src: 0, dst: 1, n_slots: 1 });
        let mut silent = few.clone();
        silent.heads.pop();
        let mut longer = few;
        let last = longer.seqs.pop().unwrap();
        longer.seqs.last_mut().unwrap().n_tokens += last.n_tokens;
        for other in [copies, silent, longer, Batch::default()] {
            assert_eq!(Form::of(&other, &[], 1000), None);
        }
    }
}
