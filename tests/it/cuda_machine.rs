//! A CUDA program of ours in the PTX interpreter, and memory for it.

use crate::cuda::tools;
use half::bf16;
use ptx::{Arg, Counters, Gpu, Module, Options};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use valar::device::cuda::{Nvrtc, PROGRAMS, build};

/// A table entry or slot that maps to nothing.
pub(crate) const UNMAPPED: u32 = u32::MAX;

/// A machine.
pub(crate) struct Machine {
    gpu: Gpu,
    /// Of the last launch.
    pub(crate) counters: Counters,
}

/// The PTX of a program, read once by the tests of a process.
pub(crate) fn module(name: &str) -> Arc<Module> {
    module_for(name, "compute_80")
}

/// The same for an architecture.
pub(crate) fn module_for(name: &str, arch: &str) -> Arc<Module> {
    static READ: Mutex<BTreeMap<String, Arc<Module>>> = Mutex::new(BTreeMap::new());
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    read.entry(format!("{name} {arch}")).or_insert_with(|| Arc::new(parsed(name, arch))).clone()
}

fn parsed(name: &str, arch: &str) -> Module {
    let nvrtc = Nvrtc::open(Some(&tools().nvrtc)).unwrap();
    let program = PROGRAMS.iter().find(|program| program.name == name).unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-ptx");
    let path = build(&nvrtc, program, arch, &folder).unwrap().path;
    Module::parse(&fs::read_to_string(path).unwrap()).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The bytes of numbers, as the device has them.
pub(crate) fn bytes<const N: usize>(values: impl IntoIterator<Item = [u8; N]>) -> Vec<u8> {
    values.into_iter().flatten().collect()
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self::seeded(0)
    }

    /// One whose blocks and warps take turns in the order that is drawn from this number.
    pub(crate) fn seeded(seed: u64) -> Self {
        Self { gpu: Gpu::new(Options { seed, ..Options::default() }), counters: Counters::default() }
    }

    /// Memory that holds these bytes, and at least 16.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.gpu.alloc(bytes.len().max(16));
        self.gpu.write(at, bytes).unwrap();
        at
    }

    pub(crate) fn u32s(&mut self, values: &[u32]) -> u64 {
        self.put(&bytes(values.iter().map(|v| v.to_le_bytes())))
    }

    pub(crate) fn f32s(&mut self, values: &[f32]) -> u64 {
        self.put(&bytes(values.iter().map(|v| v.to_le_bytes())))
    }

    pub(crate) fn bf16s(&mut self, values: &[bf16]) -> u64 {
        self.put(&bytes(values.iter().map(|v| v.to_le_bytes())))
    }

    /// Memory that nothing was written to.
    pub(crate) fn room(&mut self, n_bytes: usize) -> u64 {
        self.gpu.alloc(n_bytes.max(16))
    }

    pub(crate) fn read(&mut self, at: u64, n_bytes: usize) -> Vec<u8> {
        self.gpu.read(at, n_bytes).unwrap()
    }

    pub(crate) fn read_bf16s(&mut self, at: u64, n: usize) -> Vec<bf16> {
        self.read(at, 2 * n).chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect()
    }

    pub(crate) fn read_f32s(&mut self, at: u64, n: usize) -> Vec<f32> {
        self.read(at, 4 * n).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// Runs a kernel; a fault of any kind fails the test.
    pub(crate) fn run(&mut self, module: &Module, kernel: &str, (grid, block, shared): Launch, args: &[Arg]) {
        match self.gpu.launch(module, kernel, grid, block, shared, args) {
            Ok(counters) => self.counters = counters,
            Err(fault) => panic!("{kernel}: {fault}"),
        }
    }
}

/// Blocks, threads of a block, dynamic shared memory in bytes.
pub(crate) type Launch = ((u32, u32), u32, usize);

/// Numbers from -1 to 1 that look random.
pub(crate) struct Noise(pub(crate) u32);

impl Noise {
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as f32 / 8_388_608.0 - 1.0
    }

    pub(crate) fn f32s(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }

    pub(crate) fn bf16s(&mut self, n: usize) -> Vec<bf16> {
        (0..n).map(|_| bf16::from_f32(self.next())).collect()
    }
}

/// Asserts that every value is near what is wanted: NaN is not.
pub(crate) fn assert_near(got: impl IntoIterator<Item = f64>, want: &[f64], relative: f64, absolute: f64, what: &str) {
    let got: Vec<f64> = got.into_iter().collect();
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= relative * want.abs() + absolute, "{what}: value {i} is {got}, not {want}");
    }
}
