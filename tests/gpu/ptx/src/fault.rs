//! What can be wrong: with a text, and with what a kernel does.

use std::fmt;

/// A PTX text that is not known in whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// Line of the text, from 1.
    pub line: u32,
    /// What is not known or not allowed there.
    pub message: String,
}

impl ParseError {
    pub(crate) fn new(line: u32, message: impl Into<String>) -> Self {
        Self { line, message: message.into() }
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for ParseError {}

/// The class of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The launch itself: no such kernel, wrong arguments, too many threads or too much shared memory.
    Launch,
    /// Two accesses of the same memory, one of them a write, that nothing orders.
    Race,
    /// Memory that is not there.
    Bounds,
    /// An address that is no multiple of the access's size.
    Misaligned,
    /// Shared memory that is read before it is written.
    Uninitialised,
    /// Memory of an asynchronous copy that was not waited for.
    InFlight,
    /// Registers or shared memory that a unit works on beside the threads, without the fence between that it needs.
    Unfenced,
    /// A barrier or a collective operation that some of the lanes that it needs don't reach together.
    Divergence,
    /// A lane's value is read that takes no part.
    InactiveLane,
    /// An mbarrier that is not initialised, is counted beyond its end, or is touched by other instructions.
    Barrier,
    /// Every warp waits for something that nobody will do.
    Deadlock,
    /// More instructions than `Options::max_steps`.
    Endless,
    /// A `trap` instruction, a failed assertion.
    Trap,
    /// A form or a value that this interpreter does not execute.
    Unsupported,
}

/// What a kernel did wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Its class.
    pub kind: FaultKind,
    /// What happened, in words.
    pub message: Box<str>,
    /// The kernel's name.
    pub kernel: Box<str>,
    /// The instruction's line of the PTX text; 0: no instruction.
    pub ptx_line: u32,
    /// The instruction's opcode with its modifiers.
    pub opcode: Box<str>,
    /// File and line of the source, if the text has them (`-lineinfo`).
    pub source: Option<(String, u32)>,
    /// `blockIdx`.
    pub block: [u32; 3],
    /// `threadIdx`, where it is one thread that is at fault.
    pub thread: Option<[u32; 3]>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {}: {}", self.kind, self.kernel, self.message)?;
        if self.ptx_line > 0 {
            write!(f, "; PTX line {} ({})", self.ptx_line, self.opcode)?;
        }
        if let Some((file, line)) = &self.source {
            write!(f, ", {file}:{line}")?;
        }
        write!(f, "; block {:?}", self.block)?;
        self.thread.map_or(Ok(()), |thread| write!(f, ", thread {thread:?}"))
    }
}

impl std::error::Error for Fault {}

/// A fault before the place is known: kind, lane, words.
#[derive(Debug)]
pub(crate) struct Wrong {
    pub(crate) kind: FaultKind,
    pub(crate) lane: Option<usize>,
    pub(crate) message: String,
}

pub(crate) fn wrong<T>(kind: FaultKind, lane: impl Into<Option<usize>>, message: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong { kind, lane: lane.into(), message: message.into() })
}
