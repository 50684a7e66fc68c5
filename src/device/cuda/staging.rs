//! A step as flat words: everything that its kernels read besides weights and activations, in one piece that is copied to the GPU
//! at once. Pure: no GPU.
//!
//! Invariant: what a kernel is given begins at a multiple of 16 bytes; nothing is allocated but what was reserved.

use super::work::{Attended, ITEM_WORDS, UNMAPPED, Work};
use crate::device::batch::{Batch, Draw, HeadOut, HeadRow, Want, mask_words};
use crate::device::{BLOCK_TOKENS, StepSizes};
use crate::request::MAX_TOP_LOGPROBS;
use std::ops::Range;

/// Head rows whose logits are computed at once: bounds the memory for logits.
pub(super) const HEAD_ROWS: usize = 64;
/// Edits of the rows of a chunk, at least: as many as a vocabulary, for then any one row fits.
const MIN_EDITS: usize = 1 << 16;
/// Words of struct Want, of struct Drawn, of struct Edit (`kernels/sample.cu`), and of a copy (`kernels/copy.cu`).
pub(super) const WANT_WORDS: usize = 14;
pub(super) const DRAWN_WORDS: usize = 3 + 2 * MAX_TOP_LOGPROBS;
const EDIT_WORDS: usize = 3;
const COPY_WORDS: usize = 3;
/// Pieces begin at multiples of so many words.
const PIECE: usize = 4;

/// Where a step's pieces begin, in words.
#[derive(Debug, Default)]
pub(super) struct Staged {
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
    pub(super) chunks: Vec<HeadChunk>,
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

/// Head rows that are computed at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HeadChunk {
    /// Of `Batch::heads`.
    pub(super) rows: Range<usize>,
    /// Of `Batch::edits`.
    pub(super) edits: Range<usize>,
    /// Rows with a mask.
    pub(super) n_masks: usize,
}

/// Edits that a chunk may have.
fn max_edits(n_vocab: usize) -> usize {
    MIN_EDITS.max(n_vocab)
}

/// Words of the edits, then the masks, of a chunk.
pub(super) fn shaping_words(n_vocab: usize) -> usize {
    (max_edits(n_vocab) * EDIT_WORDS).next_multiple_of(PIECE) + HEAD_ROWS * mask_words(n_vocab)
}

/// f32 that a chunk's edits need to keep what was there.
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
    /// Writes a step down.
    ///
    /// # Panics
    /// A step that is larger than what was reserved for.
    pub(super) fn fill(&mut self, batch: &Batch, works: &mut [(Attended, Work)], n_vocab: usize, to: &mut [u32]) {
        let mut writer = Writer { to, at: 0 };
        let one = |value: &u32| [*value];
        self.ids = writer.put(batch.tokens.iter().map(one));
        self.positions = writer.put(batch.positions.iter().map(one));
        let slots = batch.seqs.iter().flat_map(|seq| {
            let table = batch.block_table(seq);
            (seq.first_position..seq.first_position + seq.n_tokens).map(|position| {
                let (block, slot) = (position / BLOCK_TOKENS as u32, position % BLOCK_TOKENS as u32);
                [table[block as usize] * BLOCK_TOKENS as u32 + slot]
            })
        });
        self.slots = writer.put(slots);
        self.tables = writer.put(batch.block_tables.iter().map(one));
        self.copies = writer.put(batch.copies.iter().map(|copy| [copy.src, copy.dst, copy.n_slots]));
        self.head_rows = writer.put(batch.heads.iter().map(|row| [row.token_idx]));
        self.cut_heads(batch, n_vocab);
        let wants = self.chunks.iter().flat_map(|chunk| {
            let mut n_masks = 0;
            batch.heads[chunk.rows.clone()].iter().map(move |row| {
                let mask = row.mask.map_or(UNMAPPED, |_| n_masks);
                n_masks += u32::from(row.mask.is_some());
                want(row, chunk.edits.start as u32, mask)
            })
        });
        self.wants = writer.put(wants);
        self.work.clear();
        for (attended, work) in works {
            work.plan(attended, batch);
            self.work.push(StagedWork {
                part_starts: writer.put(work.part_starts.iter().map(one)),
                prefill: writer.put(work.prefill.iter().map(super::work::Item::words)),
                decode: writer.put(work.decode.iter().map(super::work::Item::words)),
            });
        }
        self.n_words = writer.at;
    }

    /// Cuts the head rows into pieces of which logits, edits and masks have room.
    fn cut_heads(&mut self, batch: &Batch, n_vocab: usize) {
        self.chunks.clear();
        let mut start = 0;
        while start < batch.heads.len() {
            let mut chunk = HeadChunk { rows: start..start, edits: 0..0, n_masks: 0 };
            for row in batch.heads[start..].iter().take(HEAD_ROWS) {
                let (first, n) = (row.edits_start as usize, row.n_edits as usize);
                // Edits stand in the order of rows; those without may say any place.
                let edits = match (n, chunk.edits.is_empty()) {
                    (0, _) => chunk.edits.clone(),
                    (_, true) => first..first + n,
                    (_, false) => chunk.edits.start..first + n,
                };
                if edits.len() > max_edits(n_vocab) {
                    break;
                }
                chunk.edits = edits;
                chunk.rows.end += 1;
                chunk.n_masks += usize::from(row.mask.is_some());
            }
            assert!(!chunk.rows.is_empty(), "a row has at most one edit per token");
            start = chunk.rows.end;
            self.chunks.push(chunk);
        }
    }
}

/// struct Want
fn want(row: &HeadRow, first_edit: u32, mask: u32) -> [u32; WANT_WORDS] {
    let greedy = Draw { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0, choice: 0, position: 0, logprob: true };
    let (draw, score) = match row.want {
        Want::Draw(draw) => (draw, UNMAPPED),
        Want::Score { token } => (greedy, token),
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

/// Writes down what a chunk does to its logits: edits, then masks. Where the masks begin, and how many words there are.
pub(super) fn shaping(batch: &Batch, chunk: &HeadChunk, n_vocab: usize, to: &mut [u32]) -> (usize, usize) {
    let mut writer = Writer { to, at: 0 };
    let edits = batch.edits[chunk.edits.clone()].iter();
    writer.put(edits.map(|edit| [edit.token, edit.penalty.to_bits(), edit.bias.to_bits()]));
    let masks = writer.at;
    let n_words = mask_words(n_vocab);
    for mask in batch.heads[chunk.rows.clone()].iter().filter_map(|row| row.mask) {
        writer.to[writer.at..writer.at + n_words].copy_from_slice(&batch.masks[mask as usize * n_words..][..n_words]);
        writer.at += n_words;
    }
    (masks, writer.at)
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
            staged.chunks.into_iter().map(|chunk| (chunk.rows, chunk.edits)).collect::<Vec<_>>()
        };
        assert_eq!(ranges(&[0; 65]), [(0..64, 0..0), (64..65, 0..0)]);
        let half = MIN_EDITS as u32 / 2;
        assert_eq!(ranges(&[0, half, half, 0, 1]), [(0..4, 0..MIN_EDITS), (4..5, MIN_EDITS..MIN_EDITS + 1)]);
    }

    /// What kernels find where they are told to look.
    #[test]
    fn a_step_is_written_down() {
        let n_edits: Vec<u32> = (0..70).map(|i| i % 4).collect();
        let batch = batch(&n_edits);
        let attended = Attended { group: 1, n_kv_heads: 1, prefill_rows: 128, window: 0, max_parts: 0 };
        let (mut staged, mut words) = (Staged::default(), vec![9; 1 << 14]);
        staged.fill(&batch, &mut [(attended, Work::default())], N_VOCAB, &mut words);
        assert_eq!(words[staged.ids + 69], 69);
        assert_eq!((words[staged.slots], words[staged.slots + 5]), (17, 16 * 11 + 1));
        assert_eq!(words[staged.tables + 139], 139);
        for chunk in &staged.chunks {
            let mut shaping_of_chunk = vec![9; shaping_words(N_VOCAB)];
            let (masks, n_words) = shaping(&batch, chunk, N_VOCAB, &mut shaping_of_chunk);
            assert!(n_words <= shaping_of_chunk.len());
            for row in chunk.rows.clone() {
                let want = &words[staged.wants + row * WANT_WORDS..][..WANT_WORDS];
                assert_eq!((want[8], want[12]), (row as u32, n_edits[row]), "what is scored, and edits");
                for edit in 0..want[12] {
                    let at = (want[11] + edit) as usize * EDIT_WORDS;
                    assert_eq!((shaping_of_chunk[at], f32::from_bits(shaping_of_chunk[at + 2])), (edit, row as f32));
                }
                assert_eq!(want[13] != UNMAPPED, row % 3 == 0);
                if want[13] != UNMAPPED {
                    assert_eq!(shaping_of_chunk[masks + want[13] as usize * mask_words(N_VOCAB)], row as u32);
                }
            }
        }
    }
}
