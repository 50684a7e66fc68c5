//! Who wrote and who read global memory, to find accesses that nothing orders.

use crate::fault::{FaultKind, Wrong, wrong};
use std::collections::HashMap;

/// Words of a page; pages are made when they are touched.
const PAGE: usize = 256;

/// What is known of a word of four bytes. Blocks have numbers that are never used again; those of earlier launches are past.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    write_block: u32,
    write_clock: u32,
    /// The block's count of fences when it wrote.
    write_tick: u32,
    read_block: u32,
    read_clock: u32,
    write_warp: u8,
    read_warp: u8,
    /// Which of the four bytes.
    write_mask: u8,
    read_mask: u8,
    write_atomic: bool,
    /// Blocks other than the last reader's have read, too.
    several: bool,
}

#[derive(Debug)]
pub(crate) struct Shadow {
    pages: Vec<Option<Box<[Cell; PAGE]>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Atomic,
}

/// Who touches memory, and what it has been told of.
pub(crate) struct Toucher<'a> {
    pub(crate) block: u32,
    /// The first block of this launch.
    pub(crate) first_block: u32,
    pub(crate) tick: u32,
    pub(crate) warp: usize,
    pub(crate) clock: u32,
    pub(crate) known: &'a [u32],
    /// Of other blocks: how many of their fences this one knows of.
    pub(crate) acquired: &'a HashMap<u32, u32>,
}

impl Shadow {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { pages: vec![None; bytes.div_ceil(4 * PAGE)] }
    }

    /// Notes an access of these bytes of the allocation, and finds another that it is not ordered with.
    pub(crate) fn touch(&mut self, at: usize, len: usize, access: Access, by: &Toucher, lane: usize) -> Result<(), Wrong> {
        let mut byte = at;
        while byte < at + len {
            let end = (at + len).min(byte / 4 * 4 + 4);
            let mask = ((1u8 << (end - byte)) - 1) << (byte % 4);
            let word = byte / 4;
            let page = self.pages[word / PAGE].get_or_insert_with(|| Box::new([Cell::default(); PAGE]));
            if let Some(other) = page[word % PAGE].note(mask, access, by) {
                return wrong(FaultKind::Race, lane, format!("global memory: {other}, and nothing orders the two"));
            }
            byte = end;
        }
        Ok(())
    }
}

impl Shadow {
    /// Whether this launch has written any of these bytes' words.
    pub(crate) fn written(&self, at: usize, len: usize, first_block: u32) -> bool {
        let cell = |word: usize| self.pages[word / PAGE].as_ref().map(|page| page[word % PAGE]);
        (at / 4..(at + len).div_ceil(4)).filter_map(cell).any(|cell| cell.write_block >= first_block)
    }

    /// Finds a plain write that a strong read of these bytes is not ordered with. Strong reads are not noted: they race with
    /// nothing that comes later and is strong, too.
    pub(crate) fn peek(&mut self, at: usize, len: usize, by: &Toucher, lane: usize) -> Result<(), Wrong> {
        for word in at / 4..(at + len).div_ceil(4) {
            if let Some(page) = &mut self.pages[word / PAGE]
                && !page[word % PAGE].write_atomic
                && let Some(other) = page[word % PAGE].conflict(15, Access::Read, by)
            {
                return wrong(FaultKind::Race, lane, format!("global memory: {other}, and nothing orders the two"));
            }
        }
        Ok(())
    }
}

impl Cell {
    fn note(&mut self, mask: u8, access: Access, by: &Toucher) -> Option<String> {
        if let Some(other) = self.conflict(mask, access, by) {
            return Some(other);
        }
        if access == Access::Read {
            self.several |= self.read_block != by.block && self.read_block >= by.first_block;
            (self.read_block, self.read_warp, self.read_clock) = (by.block, by.warp as u8, by.clock);
            self.read_mask = mask;
            return None;
        }
        let same = (self.write_block, self.write_warp, self.write_clock) == (by.block, by.warp as u8, by.clock);
        self.write_mask = if same { self.write_mask | mask } else { mask };
        (self.write_block, self.write_warp, self.write_clock) = (by.block, by.warp as u8, by.clock);
        self.write_tick = by.tick;
        self.write_atomic = access == Access::Atomic;
        None
    }

    fn conflict(&mut self, mask: u8, access: Access, by: &Toucher) -> Option<String> {
        let both_atomic = self.write_atomic && access == Access::Atomic;
        if self.write_block >= by.first_block && self.write_mask & mask != 0 && !both_atomic {
            let verb = if access == Access::Read { "read" } else { "written" };
            if self.write_block != by.block {
                if by.acquired.get(&self.write_block).is_none_or(|&tick| tick < self.write_tick) {
                    return Some(format!(
                        "written by block {} of the order of execution, {verb} by another",
                        self.write_block - by.first_block
                    ));
                }
            } else if usize::from(self.write_warp) != by.warp && self.write_clock > by.known[usize::from(self.write_warp)] {
                return Some(format!("written by warp {}, {verb} by warp {}", self.write_warp, by.warp));
            }
        }
        if self.read_block < by.first_block {
            self.several = false;
            return None;
        }
        if access == Access::Read || self.read_mask & mask == 0 && !self.several {
            return None;
        }
        let others = self.several || self.read_block != by.block;
        if others && by.acquired.is_empty() {
            return Some("read by one block, written by another".to_owned());
        }
        let known = by.known[usize::from(self.read_warp)];
        if self.read_block == by.block && usize::from(self.read_warp) != by.warp && self.read_clock > known {
            return Some(format!("read by warp {}, written by warp {}", self.read_warp, by.warp));
        }
        None
    }
}

/// Which writes of other blocks a block has been told of: through atomics with fences on both sides.
#[derive(Debug, Default)]
pub(crate) struct Between {
    /// By address: (block, how many of its fences) that were released there.
    released: HashMap<u64, HashMap<u32, u32>>,
    pub(crate) acquired: HashMap<u32, u32>,
    pub(crate) tick: u32,
}

impl Between {
    pub(crate) fn new_launch(&mut self) {
        self.released.clear();
    }

    pub(crate) fn new_block(&mut self) {
        self.acquired.clear();
        self.tick = 1;
    }

    /// A fence: what the block wrote so far can be released. Returns the mark to release by.
    pub(crate) fn fence(&mut self, seen: &mut Vec<u64>) -> u32 {
        for address in seen.drain(..) {
            for (&block, &tick) in self.released.get(&address).into_iter().flatten() {
                let known = self.acquired.entry(block).or_default();
                *known = tick.max(*known);
            }
        }
        self.tick += 1;
        self.tick - 1
    }

    /// A write that others may see, after a fence with this mark.
    pub(crate) fn release(&mut self, address: u64, block: u32, mark: u32) {
        if mark == 0 {
            return;
        }
        let there = self.released.entry(address).or_default();
        for (&other, &tick) in self.acquired.iter().chain([(&block, &mark)]) {
            let known = there.entry(other).or_default();
            *known = tick.max(*known);
        }
    }
}
