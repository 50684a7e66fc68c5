//! Shared memory of a block, and who wrote and read each word of it.

use crate::fault::{FaultKind, Wrong, wrong};
use crate::memory::SHARED_START;
use crate::shadow::Access;

/// A word of four bytes. What is noted belongs to a block; in the next one it is forgotten.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    block: u32,
    write_clock: u32,
    /// The writing warp's count of `bar.warp.sync`: what orders its lanes.
    write_epoch: u32,
    read_epoch: u32,
    write_agent: u8,
    write_lane: u8,
    read_agent: u8,
    read_lane: u8,
    /// Bytes of the last write, bytes that were ever written.
    write_mask: u8,
    written: u8,
    state: State,
    atomic: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Plain,
    /// The target of a copy that was not waited for.
    InFlight,
    /// Part of an mbarrier.
    Barrier,
}

/// Several lanes have read the word.
const SEVERAL: u8 = 255;

#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) bytes: Vec<u8>,
    cells: Vec<Cell>,
    /// By word and agent: the time of the agent's last read.
    reads: Vec<u32>,
    agents: usize,
    block: u32,
    pub(crate) races: bool,
    pub(crate) lanes: bool,
}

/// Who touches shared memory.
#[derive(Clone, Copy)]
pub(crate) struct By<'a> {
    pub(crate) agent: usize,
    pub(crate) lane: usize,
    pub(crate) epoch: u32,
    pub(crate) clock: u32,
    pub(crate) known: &'a [u32],
}

impl Shared {
    /// For a new block.
    pub(crate) fn reset(&mut self, bytes: usize, agents: usize, poison: u8) {
        let words = bytes.div_ceil(4);
        self.bytes.clear();
        self.bytes.resize(words * 4, poison);
        self.cells.resize(words, Cell::default());
        if self.agents != agents || self.reads.len() != words * agents {
            self.reads.clear();
            self.reads.resize(words * agents, 0);
        }
        (self.agents, self.block) = (agents, self.block + 1);
    }

    /// Index of a byte. Misaligned addresses and ones beyond the end are faults.
    pub(crate) fn locate(&self, address: u64, len: usize, lane: impl Into<Option<usize>>) -> Result<usize, Wrong> {
        if !address.is_multiple_of(len as u64) {
            return wrong(FaultKind::Misaligned, lane, format!("{len} bytes at shared address {address:#x}"));
        }
        let at = address.wrapping_sub(SHARED_START) as usize;
        if at.checked_add(len).is_none_or(|end| end > self.bytes.len()) {
            let (size, at) = (self.bytes.len(), at as i64);
            return wrong(FaultKind::Bounds, lane, format!("{len} bytes, {at} bytes into shared memory of {size}"));
        }
        Ok(at)
    }

    fn cell(&mut self, word: usize) -> &mut Cell {
        let cell = &mut self.cells[word];
        if cell.block != self.block {
            *cell = Cell { block: self.block, ..Cell::default() };
        }
        cell
    }

    /// Words that hold these bytes, each with the mask of its bytes that are among them.
    fn words(at: usize, len: usize) -> impl Iterator<Item = (usize, u8)> {
        (at / 4..(at + len).div_ceil(4)).map(move |word| {
            let (start, end) = (at.max(word * 4), (at + len).min(word * 4 + 4));
            (word, (((1u16 << (end - start)) - 1) << (start % 4)) as u8)
        })
    }

    pub(crate) fn read(&mut self, at: usize, len: usize, by: &By) -> Result<(), Wrong> {
        for (word, mask) in Self::words(at, len) {
            let (races, lanes) = (self.races, self.lanes);
            let cell = self.cell(word);
            cell.plain(by)?;
            if cell.written & mask != mask {
                return wrong(
                    FaultKind::Uninitialised,
                    by.lane,
                    format!("shared memory that nobody wrote, at byte {}", word * 4),
                );
            }
            if !races {
                continue;
            }
            if cell.write_mask & mask != 0 {
                cell.against_write(by, "read", lanes)?;
            }
            let (agent, lane) = (by.agent as u8, by.lane as u8);
            if cell.read_agent == agent && cell.read_epoch == by.epoch && cell.read_lane != lane {
                cell.read_lane = SEVERAL;
            } else {
                (cell.read_agent, cell.read_lane, cell.read_epoch) = (agent, lane, by.epoch);
            }
            self.reads[word * self.agents + by.agent] = by.clock;
        }
        Ok(())
    }

    /// What works on these bytes beside the threads must see what they wrote there: all of it must be behind a fence. `fenced`: the
    /// times up to which that is known of each agent. Bulk copies need none.
    pub(crate) fn behind_fence(&mut self, at: usize, len: usize, fenced: &[u32], lane: usize) -> Result<(), Wrong> {
        if !self.races {
            return Ok(());
        }
        let copies = self.agents - 1;
        for (word, mask) in Self::words(at, len) {
            let cell = *self.cell(word);
            let writer = usize::from(cell.write_agent);
            if cell.write_mask & mask != 0 && writer != copies && cell.write_clock > fenced[writer] {
                let message = format!("shared memory: written by warp {writer}, without fence.proxy.async between");
                return wrong(FaultKind::Unfenced, lane, message);
            }
        }
        Ok(())
    }

    /// A write of a value, or an atomic operation that leaves it.
    pub(crate) fn write(&mut self, at: usize, value: &[u8], access: Access, by: &By) -> Result<(), Wrong> {
        let changes = self.bytes[at..at + value.len()] != *value;
        self.may_write(at, value.len(), access, by, changes)?;
        self.bytes[at..at + value.len()].copy_from_slice(value);
        self.wrote(at, value.len(), access, by);
        Ok(())
    }

    fn may_write(&mut self, at: usize, len: usize, access: Access, by: &By, changes: bool) -> Result<(), Wrong> {
        let agents = self.agents;
        for (word, mask) in Self::words(at, len) {
            let (races, lanes) = (self.races, self.lanes);
            let cell = self.cell(word);
            cell.plain(by)?;
            if access == Access::Atomic && cell.written & mask != mask {
                return wrong(FaultKind::Uninitialised, by.lane, "an atomic operation on shared memory that nobody wrote");
            }
            if !races || cell.atomic && access == Access::Atomic {
                continue;
            }
            if cell.write_mask & mask != 0 {
                // Lanes of a warp may write the same value.
                cell.against_write(by, "written", lanes && changes)?;
            }
            let own = usize::from(cell.read_agent) == by.agent && cell.read_epoch == by.epoch && cell.read_epoch > 0;
            if lanes && own && cell.read_lane != by.lane as u8 && changes && self.reads[word * agents + by.agent] > 0 {
                return wrong(
                    FaultKind::Race,
                    by.lane,
                    "shared memory: read by another lane of the warp, written without __syncwarp between",
                );
            }
            for (agent, &time) in self.reads[word * agents..][..agents].iter().enumerate() {
                if agent != by.agent && time > by.known[agent] {
                    return wrong(
                        FaultKind::Race,
                        by.lane,
                        format!(
                            "shared memory: read by {}, written by {} without a barrier between",
                            name(agent, agents),
                            name(by.agent, agents)
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    fn wrote(&mut self, at: usize, len: usize, access: Access, by: &By) {
        for (word, mask) in Self::words(at, len) {
            let cell = self.cell(word);
            let same = (cell.write_agent, cell.write_lane, cell.write_clock) == (by.agent as u8, by.lane as u8, by.clock);
            cell.write_mask = if same { cell.write_mask | mask } else { mask };
            cell.written |= mask;
            (cell.write_agent, cell.write_lane) = (by.agent as u8, by.lane as u8);
            (cell.write_clock, cell.write_epoch) = (by.clock, by.epoch);
            cell.atomic = access == Access::Atomic;
            cell.state = State::Plain;
        }
    }

    /// The target of a copy that begins: poisoned, and nobody's until it has ended.
    pub(crate) fn begin_copy(&mut self, at: usize, len: usize, by: &By) -> Result<(), Wrong> {
        self.may_write(at, len, Access::Write, by, true)?;
        for (word, mask) in Self::words(at, len) {
            let cell = self.cell(word);
            cell.state = State::InFlight;
            cell.written |= mask;
        }
        self.bytes[at..at + len].fill(0xFF);
        Ok(())
    }

    pub(crate) fn end_copy(&mut self, at: usize, value: &[u8], by: &By) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
        self.wrote(at, value.len(), Access::Write, by);
    }

    /// Makes the eight bytes an mbarrier's, or gives them back.
    pub(crate) fn set_barrier(&mut self, at: usize, on: bool) {
        for word in [at / 4, at / 4 + 1] {
            let block = self.block;
            self.cells[word] = Cell { block, state: if on { State::Barrier } else { State::Plain }, ..Cell::default() };
        }
    }
}

fn name(agent: usize, agents: usize) -> String {
    if agent + 1 == agents { "a bulk copy".to_owned() } else { format!("warp {agent}") }
}

impl Cell {
    fn plain(&self, by: &By) -> Result<(), Wrong> {
        match self.state {
            State::Plain => Ok(()),
            State::InFlight => wrong(FaultKind::InFlight, by.lane, "shared memory of an asynchronous copy still in flight"),
            State::Barrier => wrong(FaultKind::Barrier, by.lane, "shared memory that is part of an mbarrier"),
        }
    }

    fn against_write(&self, by: &By, verb: &str, lanes: bool) -> Result<(), Wrong> {
        let writer = usize::from(self.write_agent);
        if writer != by.agent {
            if self.write_clock > by.known[writer] {
                let agents = by.known.len();
                return wrong(
                    FaultKind::Race,
                    by.lane,
                    format!(
                        "shared memory: written by {}, {verb} by {} without a barrier between",
                        name(writer, agents),
                        name(by.agent, agents)
                    ),
                );
            }
        } else if lanes && self.write_lane != by.lane as u8 && self.write_epoch == by.epoch {
            return wrong(
                FaultKind::Race,
                by.lane,
                format!(
                    "shared memory: written by lane {} of the warp, {verb} by another without __syncwarp between",
                    self.write_lane
                ),
            );
        }
        Ok(())
    }
}
