//! The device as a test sees it: memory and launches.

use crate::block::{Block, Count, Parts, source};
use crate::fault::{Fault, FaultKind, Wrong};
use crate::memory::Global;
use crate::module::{Kernel, Module, VarSpace};
use crate::{Counters, Line};
use std::collections::HashMap;

/// A grid's or a block's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dim3 {
    /// The dimension that varies fastest.
    pub x: u32,
    /// The next.
    pub y: u32,
    /// The last.
    pub z: u32,
}

impl From<u32> for Dim3 {
    fn from(x: u32) -> Self {
        Self { x, y: 1, z: 1 }
    }
}

impl From<(u32, u32)> for Dim3 {
    fn from((x, y): (u32, u32)) -> Self {
        Self { x, y, z: 1 }
    }
}

impl From<(u32, u32, u32)> for Dim3 {
    fn from((x, y, z): (u32, u32, u32)) -> Self {
        Self { x, y, z }
    }
}

/// An argument of a kernel. Its size must be the parameter's.
#[derive(Debug, Clone, PartialEq)]
pub enum Arg {
    /// A pointer or a 64-bit integer.
    U64(u64),
    /// An unsigned integer.
    U32(u32),
    /// A signed integer.
    I32(i32),
    /// A float.
    F32(f32),
    /// A structure, as it lies in memory.
    Bytes(Vec<u8>),
}

impl Arg {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::U64(x) => x.to_le_bytes().to_vec(),
            Self::U32(x) => x.to_le_bytes().to_vec(),
            Self::I32(x) => x.to_le_bytes().to_vec(),
            Self::F32(x) => x.to_le_bytes().to_vec(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// How kernels are executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What the order is drawn from in which blocks, and warps in a block, take turns.
    pub seed: u64,
    /// Accesses that nothing orders are faults.
    pub races: bool,
    /// So are those between lanes of a warp, in shared memory, without `__syncwarp`.
    pub lanes: bool,
    /// Instructions of a warp, beyond which it is taken to have no end.
    pub max_steps: u64,
    /// What memory holds that nobody wrote: 0xFF makes it NaN.
    pub poison: u8,
    /// Where its memory begins, so that devices' addresses differ: a multiple of 2^56 below 2^60.
    pub place: u64,
    /// Counters tell each instruction's, too (`Counters::lines`): for a small launch that takes as long as all else.
    pub lines: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, races: true, lanes: true, max_steps: 100_000_000, poison: 0xFF, place: 0, lines: true }
    }
}

/// A device: memory and whatever modules have in it.
#[derive(Debug)]
pub struct Gpu {
    options: Options,
    global: Global,
    parts: Parts,
    random: Random,
    /// By module: addresses of its variables.
    variables: HashMap<u64, Vec<u64>>,
    n_blocks: u32,
}

/// What all blocks of a launch have in common.
pub(crate) struct Launch<'l> {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) params: Vec<u8>,
    pub(crate) variables: &'l [u64],
    /// Bytes of shared memory: where the dynamic part begins, its size, and the whole.
    pub(crate) static_shared: usize,
    pub(crate) dynamic: usize,
    pub(crate) shared: usize,
    pub(crate) first_block: u32,
    pub(crate) races: bool,
    pub(crate) max_steps: u64,
    pub(crate) poison: u8,
}

impl Launch<'_> {
    pub(crate) fn threads(&self) -> u32 {
        self.block.iter().product()
    }
}

/// The largest shared memory of a block on any device so far, and the most threads.
const MAX_SHARED: usize = 227 * 1024;
const MAX_THREADS: u64 = 1024;

impl Gpu {
    /// A device with nothing in its memory.
    pub fn new(options: Options) -> Self {
        let mut parts = Parts::default();
        (parts.shared.races, parts.shared.lanes) = (options.races, options.races && options.lanes);
        let random = Random(options.seed);
        Self {
            global: Global::new(options.place, options.poison),
            options,
            parts,
            random,
            variables: HashMap::new(),
            n_blocks: 1,
        }
    }

    /// The address of so many bytes, a multiple of 256; they hold `Options::poison`.
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.global.reserve(bytes)
    }

    /// Gives memory back; what is there of it from then on is a fault. False if nothing was allocated there.
    pub fn free(&mut self, address: u64) -> bool {
        self.global.remove(address)
    }

    /// Copies to the device. A fault if the bytes are not all in one allocation.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let (allocation, at) = self.global.find(address, bytes.len(), None).map_err(|w| outside("write", w))?;
        allocation.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Copies from the device. A fault if the bytes are not all in one allocation.
    pub fn read(&mut self, address: u64, len: usize) -> Result<Vec<u8>, Fault> {
        let (allocation, at) = self.global.find(address, len, None).map_err(|w| outside("read", w))?;
        Ok(allocation.bytes[at..at + len].to_vec())
    }

    /// Runs a kernel to its end: all blocks, one after the other, in an order drawn from the seed.
    #[expect(clippy::too_many_arguments, reason = "what a launch is made of, in CUDA's order")]
    pub fn launch(
        &mut self,
        module: &Module,
        kernel: &str,
        grid: impl Into<Dim3>,
        block: impl Into<Dim3>,
        dynamic_shared: usize,
        args: &[Arg],
    ) -> Result<Counters, Fault> {
        let refused = |message: String| outside(kernel, Wrong { kind: FaultKind::Launch, lane: None, message });
        let Some(found) = module.kernels.get(kernel).cloned() else {
            return Err(refused("the module has no such kernel".to_owned()));
        };
        let (grid, block): (Dim3, Dim3) = (grid.into(), block.into());
        let (grid, block) = ([grid.x, grid.y, grid.z], [block.x, block.y, block.z]);
        let params = parameters(&found, args).map_err(refused)?;
        let static_shared =
            if dynamic_shared > 0 { found.static_shared.next_multiple_of(found.dynamic_align) } else { found.static_shared };
        sizes(&found, grid, block, static_shared + dynamic_shared).map_err(refused)?;
        self.place_variables(module);
        let launch = Launch {
            grid,
            block,
            params,
            variables: &self.variables[&module.id],
            static_shared,
            dynamic: dynamic_shared,
            shared: static_shared + dynamic_shared,
            first_block: self.n_blocks,
            races: self.options.races,
            max_steps: self.options.max_steps,
            poison: self.options.poison,
        };
        self.parts.counts = vec![Count::default(); found.code.len()];
        self.parts.totals = Counters::default();
        self.parts.between.new_launch();
        let n_blocks: u32 = grid.iter().product();
        let mut order: Vec<u32> = (0..n_blocks).collect();
        self.random.shuffle(&mut order);
        for index in order {
            // Counted even if it fails: no launch after it begins with the same number.
            let serial = self.n_blocks;
            self.n_blocks += 1;
            Block {
                launch: &launch,
                kernel: &found,
                global: &mut self.global,
                parts: &mut self.parts,
                random: &mut self.random,
                at: [index % grid[0], index / grid[0] % grid[1], index / (grid[0] * grid[1])],
                serial,
                barriers: Vec::new(),
                mbarriers: Vec::new(),
                later: Vec::new(),
                products: Vec::new(),
                events: 0,
                arrivals: false,
                blame: 0,
            }
            .run()?;
        }
        Ok(self.counters(&found))
    }

    /// Address and size of a module's variable, which is on the device from here on.
    pub fn variable(&mut self, module: &Module, name: &str) -> Option<(u64, usize)> {
        self.place_variables(module);
        let index = module.variables.iter().position(|v| v.name == name)?;
        let address = self.variables[&module.id][index];
        (address > 0).then(|| (address, module.variables[index].bytes.len()))
    }

    /// Takes a module's variables off the device.
    pub fn unload(&mut self, module: &Module) {
        for address in self.variables.remove(&module.id).into_iter().flatten().filter(|&address| address > 0) {
            self.global.remove(address);
        }
    }

    /// A module's variables live on the device from its first launch, or until it is unloaded.
    fn place_variables(&mut self, module: &Module) {
        if self.variables.contains_key(&module.id) {
            return;
        }
        let place = |variable: &crate::module::Variable| match variable.space {
            VarSpace::Global => self.global.add(variable.bytes.clone(), false),
            VarSpace::Const => self.global.add(variable.bytes.clone(), true),
            VarSpace::Shared | VarSpace::Local => 0,
        };
        let addresses = module.variables.iter().map(place).collect();
        self.variables.insert(module.id, addresses);
    }

    fn counters(&mut self, kernel: &Kernel) -> Counters {
        let mut counters = std::mem::take(&mut self.parts.totals);
        let mut by_opcode = vec![0; kernel.opcodes.len()];
        for (inst, count) in kernel.code.iter().zip(&self.parts.counts).filter(|(_, count)| count.executed > 0) {
            by_opcode[inst.opcode] += count.executed;
            if self.options.lines {
                counters.lines.push(Line {
                    ptx_line: inst.line,
                    source: source(kernel, inst),
                    opcode: kernel.opcodes[inst.opcode].clone(),
                    executed: count.executed,
                    sectors: count.sectors,
                    conflicts: count.conflicts,
                });
            }
        }
        let executed = kernel.opcodes.iter().cloned().zip(by_opcode).filter(|(_, n)| *n > 0);
        counters.instructions = executed.collect();
        counters
    }
}

fn parameters(kernel: &Kernel, args: &[Arg]) -> Result<Vec<u8>, String> {
    if args.len() != kernel.params.len() {
        return Err(format!("{} arguments for {} parameters", args.len(), kernel.params.len()));
    }
    let mut bytes = Vec::new();
    for (i, (arg, &(at, size))) in args.iter().zip(&kernel.params).enumerate() {
        let arg = arg.bytes();
        if arg.len() != size {
            return Err(format!("argument {i} has {} bytes, the parameter {size}", arg.len()));
        }
        bytes.resize(at, 0);
        bytes.extend(arg);
    }
    Ok(bytes)
}

fn sizes(kernel: &Kernel, grid: [u32; 3], block: [u32; 3], shared: usize) -> Result<(), String> {
    let threads: u64 = block.iter().map(|&n| u64::from(n)).product();
    let blocks = grid.iter().try_fold(1u32, |n, &m| n.checked_mul(m)).unwrap_or(0);
    let most = kernel.max_threads.map_or(MAX_THREADS, u64::from).min(MAX_THREADS);
    if threads == 0 || threads > most || block[2] > 64 {
        return Err(format!("blocks of {threads} threads; {most} are allowed"));
    }
    if blocks == 0 || grid[1] > 65535 || grid[2] > 65535 {
        return Err(format!("a grid of {grid:?}"));
    }
    if shared > MAX_SHARED {
        return Err(format!("{shared} bytes of shared memory; {MAX_SHARED} are there"));
    }
    Ok(())
}

/// A fault outside of any instruction.
fn outside(what: &str, wrong: Wrong) -> Fault {
    Fault {
        kind: wrong.kind,
        message: wrong.message.into(),
        kernel: what.into(),
        ptx_line: 0,
        opcode: Box::default(),
        source: None,
        block: [0; 3],
        thread: None,
    }
}

/// Splitmix64.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn shuffle(&mut self, items: &mut [u32]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i + 1);
            items.swap(i, j);
        }
    }
}
