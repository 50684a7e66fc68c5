//! What attention reads next, asked for piece by piece. Knows nothing of scores.

use super::super::buffer::LINE;
use super::super::cache::Cache;
use super::super::tile::Meanwhile;
use std::ops::Range;

/// A tile that is to be folded later.
#[derive(Clone, Copy, Default)]
pub(super) struct Next<'a> {
    pub(super) blocks: &'a [u32],
    pub(super) kv_head: u32,
}

/// The lines of such a tile's keys and values. A decoding row reads each but once, from far away; were all asked for at once,
/// what is needed now would wait behind them.
pub(super) struct Ahead<'a> {
    cache: &'a Cache,
    next: Next<'a>,
    /// Those not yet asked for, counted over all blocks.
    lines: Range<usize>,
    /// As many as a piece has.
    at_once: usize,
}

impl<'a> Ahead<'a> {
    /// Of a tile, in so many pieces.
    #[inline(always)]
    pub(super) fn new(cache: &'a Cache, next: Next<'a>, n_pieces: usize) -> Self {
        let n_lines = next.blocks.len() * n_lines(cache);
        Self { cache, next, lines: 0..n_lines, at_once: n_lines.div_ceil(n_pieces) }
    }

    /// Asks for some lines.
    #[inline(always)]
    fn lines(&mut self, n: usize) {
        if self.lines.is_empty() {
            return;
        }
        let of_block = n_lines(self.cache);
        let mut lines = self.lines.start..self.lines.end.min(self.lines.start + n);
        self.lines.start = lines.end;
        while !lines.is_empty() {
            let (block, first) = (lines.start / of_block, lines.start % of_block);
            let n = lines.len().min(of_block - first);
            self.cache.prefetch(self.next.blocks[block], self.next.kv_head as usize, first * LINE..(first + n) * LINE);
            lines.start += n;
        }
    }

    /// Asks for the next piece.
    #[inline(always)]
    pub(super) fn piece(&mut self) {
        self.lines(self.at_once);
    }

    /// Asks for what is left.
    #[inline(always)]
    pub(super) fn rest(&mut self) {
        self.lines(self.lines.len());
    }
}

impl Meanwhile for Ahead<'_> {
    #[inline(always)]
    fn some(&mut self) {
        self.piece();
    }
}

/// Lines of a head's keys and values in a block.
#[inline(always)]
fn n_lines(cache: &Cache) -> usize {
    cache.layout.head_bytes().div_ceil(LINE)
}
