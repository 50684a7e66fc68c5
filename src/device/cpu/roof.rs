//! What this machine can do at most: instructions on registers, and reading memory. Knows nothing of kernels; the shares
//! that these reach are `valar bench kernels`.
//!
//! Every loop runs on all threads at once, since they share caches, memory and, on some machines, units.

use super::buffer::Aligned;
use super::isa::{Isa, per_isa};
use super::simd::{LANES, Simd};
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// One measured limit, of all threads together.
#[derive(Debug, Clone, PartialEq)]
pub struct Peak {
    /// What was measured.
    pub name: &'static str,
    /// Operations (a multiplication and an addition are two) or bytes per second.
    pub per_second: f64,
    /// Instructions per cycle and thread, where instructions were counted.
    pub per_cycle: Option<f64>,
}

impl Peak {
    /// `ops/s` or `B/s`.
    pub fn unit(&self) -> &'static str {
        if self.per_cycle.is_some() { "ops/s" } else { "B/s" }
    }
}

/// Seconds that one loop runs for, at least; the best of three counts.
const SECONDS: f64 = 0.1;
/// Sizes of the buffers that are read, bytes; the last one by all threads together.
const BUFFERS: [(&str, usize); 3] = [("read 256 KiB", 256 << 10), ("read 8 MiB", 8 << 20), ("read memory", 512 << 20)];

/// Measures all of them.
pub fn peaks(isa: Isa, n_threads: usize) -> Vec<Peak> {
    let clock = cycles_per_second(n_threads);
    let mut peaks = Vec::new();
    for Loop { name, ops, instructions, run } in loops(isa) {
        let calls = best_rate(n_threads, || move || run());
        let per_cycle = Some(calls * instructions / clock / n_threads as f64);
        peaks.push(Peak { name, per_second: calls * instructions * ops, per_cycle });
    }
    for (i, (name, bytes)) in BUFFERS.into_iter().enumerate() {
        let bytes = if i + 1 == BUFFERS.len() { (bytes / n_threads).max(BUFFERS[0].1) } else { bytes };
        let calls = best_rate(n_threads, || {
            let mut buffer = Aligned::<f32>::zeroed(bytes / size_of::<f32>());
            buffer.fill(1.0);
            move || {
                black_box(largest(isa, &buffer));
            }
        });
        peaks.push(Peak { name, per_second: calls * bytes as f64, per_cycle: None });
    }
    peaks
}

per_isa! {
    /// Reads everything: the largest value.
    fn largest(buffer: &[f32]) -> f32 = largest_body;
}

#[inline(always)]
fn largest_body<S: Simd>(s: S, buffer: &[f32]) -> f32 {
    // Several, so that one load does not wait for the comparison of another.
    let mut largest = [s.splat(0.0); 8];
    for chunk in buffer.chunks_exact(8 * LANES) {
        for (i, largest) in largest.iter_mut().enumerate() {
            // SAFETY: a chunk is eight vectors.
            *largest = s.max(*largest, unsafe { s.load(chunk.as_ptr().add(i * LANES)) });
        }
    }
    let mut most = 0.0f32;
    for v in largest {
        most = most.max(s.largest(v));
    }
    most
}

/// Calls per second of all threads together: the best of three rounds.
fn best_rate<F: FnMut()>(n_threads: usize, make: impl Fn() -> F + Sync) -> f64 {
    (0..3).map(|_| rate(n_threads, &make)).fold(0.0, f64::max)
}

fn rate<F: FnMut()>(n_threads: usize, make: &(impl Fn() -> F + Sync)) -> f64 {
    let barrier = Barrier::new(n_threads);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut call = make();
                    call();
                    barrier.wait();
                    let (start, mut n_calls) = (Instant::now(), 0u32);
                    while start.elapsed().as_secs_f64() < SECONDS {
                        call();
                        n_calls += 1;
                    }
                    f64::from(n_calls) / start.elapsed().as_secs_f64()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("the loops do not panic")).sum()
    })
}

/// A loop over registers.
struct Loop {
    name: &'static str,
    /// Operations of one instruction.
    ops: f64,
    /// Instructions of one call.
    instructions: f64,
    run: fn(),
}

/// Rounds of a loop per call.
#[cfg(target_arch = "x86_64")]
const ROUNDS: u64 = 10_000;

/// Cycles per second of a thread while all run, by a chain of multiplications of three cycles each (every x86-64 since
/// Nehalem and Zen).
#[cfg(target_arch = "x86_64")]
fn cycles_per_second(n_threads: usize) -> f64 {
    let calls = best_rate(n_threads, || {
        || {
            // SAFETY: changes only what it says.
            unsafe {
                std::arch::asm!("2:", "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}", "dec {n}", "jnz 2b",
                    x = inout(reg) 3u64 => _, n = inout(reg) ROUNDS => _, options(nomem, nostack));
            }
        }
    });
    calls * ROUNDS as f64 * 12.0 / n_threads as f64
}

#[cfg(not(target_arch = "x86_64"))]
fn cycles_per_second(_: usize) -> f64 {
    f64::NAN
}

/// A function that runs twelve independent instructions, many times; `$op` is the mnemonic, registers follow.
#[cfg(target_arch = "x86_64")]
macro_rules! twelve_of {
    ($name:ident, $op:literal, $register:literal) => {
        fn $name() {
            macro_rules! on {
                ($target:literal) => {
                    concat!($op, " ", $register, $target, ", ", $register, "15, ", $register, "15")
                };
            }
            // SAFETY: called only where the instruction exists; the registers are named as changed.
            unsafe {
                std::arch::asm!("2:", on!("0"), on!("1"), on!("2"), on!("3"), on!("4"), on!("5"), on!("6"), on!("7"), on!("8"),
                    on!("9"), on!("10"), on!("11"), "dec {n}", "jnz 2b", n = inout(reg) ROUNDS => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                    out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, options(nomem, nostack));
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
twelve_of!(fma_512, "vfmadd231ps", "zmm");
#[cfg(target_arch = "x86_64")]
twelve_of!(fma_256, "vfmadd231ps", "ymm");
#[cfg(target_arch = "x86_64")]
twelve_of!(int8_512, "vpdpbusd", "zmm");
#[cfg(target_arch = "x86_64")]
twelve_of!(bf16_512, "vdpbf16ps", "zmm");

#[cfg(target_arch = "x86_64")]
fn tiles() {
    super::tile::Unit::Amx.prepare();
    // SAFETY: called only where the unit exists; its registers hold nothing of anybody's.
    unsafe {
        std::arch::asm!("2:", "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7", "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7", "dec {n}", "jnz 2b", n = inout(reg) ROUNDS => _, options(nomem, nostack));
    }
}

/// What the machine has.
#[cfg(target_arch = "x86_64")]
fn loops(isa: Isa) -> Vec<Loop> {
    let twelve = 12.0 * ROUNDS as f64;
    let mut loops = Vec::new();
    let wide = matches!(isa.name(), "amx" | "avx512-bf16" | "avx512-vnni");
    if wide {
        loops.push(Loop { name: "f32 fma, 512 bits", ops: 32.0, instructions: twelve, run: fma_512 });
        loops.push(Loop { name: "int8 dot (VNNI), 512 bits", ops: 128.0, instructions: twelve, run: int8_512 });
    }
    if wide && is_x86_feature_detected!("avx512bf16") {
        loops.push(Loop { name: "bf16 dot, 512 bits", ops: 64.0, instructions: twelve, run: bf16_512 });
    }
    if isa.has_tiles() {
        let ops = 2.0 * 16.0 * 16.0 * 32.0;
        loops.push(Loop { name: "bf16 tiles (AMX)", ops, instructions: 4.0 * ROUNDS as f64, run: tiles });
    }
    if isa.name() == "avx2" {
        loops.push(Loop { name: "f32 fma, 256 bits", ops: 16.0, instructions: twelve, run: fma_256 });
    }
    loops
}

#[cfg(not(target_arch = "x86_64"))]
fn loops(_: Isa) -> Vec<Loop> {
    Vec::new()
}
