//! What a launch did, counted.

use std::collections::BTreeMap;

/// Counts of a launch. Instructions are counted once a warp; bytes are those of all lanes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Warp instructions by opcode with its modifiers.
    pub instructions: BTreeMap<String, u64>,
    /// Bytes that lanes read from global memory, asynchronous copies among them.
    pub global_read_bytes: u64,
    /// Bytes that lanes wrote to global memory.
    pub global_written_bytes: u64,
    /// Sectors of 32 bytes that warps' reads touched, each counted once an instruction.
    pub global_read_sectors: u64,
    /// The same for writes.
    pub global_written_sectors: u64,
    /// Passes over the banks that accesses of shared memory would take without conflicts.
    pub shared_phases: u64,
    /// Passes beyond those: different words in one bank.
    pub shared_conflicts: u64,
    /// Multiplications and additions of `mma`.
    pub tensor_flops: u64,
    /// The same for each instruction that was executed, in the order of the text.
    pub lines: Vec<Line>,
}

/// Counts of one instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its line of the PTX text.
    pub ptx_line: u32,
    /// File and line of the source, if the text has them.
    pub source: Option<(String, u32)>,
    /// Its opcode with its modifiers.
    pub opcode: String,
    /// How often warps executed it.
    pub executed: u64,
    /// Sectors of global memory.
    pub sectors: u64,
    /// Passes over the banks of shared memory beyond those without conflicts.
    pub conflicts: u64,
}

impl Counters {
    /// Warp instructions of all opcodes.
    pub fn total_instructions(&self) -> u64 {
        self.instructions.values().sum()
    }
}

/// Sectors that the accesses of a warp touch.
pub(crate) fn sectors(addresses: &[u64], len: usize) -> u64 {
    let mut found: [u64; 32] = [0; 32];
    let mut n = 0;
    let mut extra = 0;
    for &address in addresses {
        let (first, last) = (address / 32, (address + len as u64 - 1) / 32);
        extra += last - first;
        if n == 0 || found[n - 1] != first {
            found[n] = first;
            n += 1;
        }
    }
    let found = &mut found[..n];
    if !found.is_sorted() {
        found.sort_unstable();
    }
    let distinct = found.windows(2).filter(|pair| pair[0] != pair[1]).count() as u64 + u64::from(n > 0);
    distinct + extra
}

/// Passes over 32 banks of four bytes for accesses of a warp: (without conflicts, beyond those). Wide accesses are done for
/// a half or a quarter of the warp at a time.
pub(crate) fn bank_phases(accesses: &[(usize, u64)], len: usize) -> (u64, u64) {
    let group = if len <= 4 { 32 } else { 128 / len };
    let (mut phases, mut conflicts) = (0, 0);
    let mut rest = accesses;
    while let Some(&(first, _)) = rest.first() {
        let n = rest.iter().take_while(|(lane, _)| lane / group == first / group).count();
        let ways = bank_ways(&rest[..n], len);
        phases += 1;
        conflicts += ways - 1;
        rest = &rest[n..];
    }
    (phases, conflicts)
}

/// The most different words that one bank has to give.
fn bank_ways(accesses: &[(usize, u64)], len: usize) -> u64 {
    let mut first = [u64::MAX; 32];
    let mut more: Vec<u64> = Vec::new();
    for &(_, address) in accesses {
        for word in address / 4..=(address + len as u64 - 1) / 4 {
            let seen = &mut first[(word % 32) as usize];
            if *seen == u64::MAX {
                *seen = word;
            } else if *seen != word && !more.contains(&word) {
                more.push(word);
            }
        }
    }
    let mut ways = [1u64; 32];
    for word in more {
        ways[(word % 32) as usize] += 1;
    }
    ways.into_iter().max().unwrap_or(1)
}
