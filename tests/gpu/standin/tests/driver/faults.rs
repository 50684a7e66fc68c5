//! Kernels that are wrong: what is said, what error it is, and that the context is lost.

use crate::common::{Gpu, Kernels, alloc, alone, code, sync};
use cudarc::driver::result;

/// After a launch that is wrong: the error, and no more work in this context.
fn lost(gpu: &Gpu, expected: u32, at: u64) {
    assert_eq!(code(gpu.sync()), expected);
    assert_eq!(code(gpu.sync()), expected);
    assert_eq!(code(alloc(16)), expected);
    assert_eq!(code(gpu.read::<f32>(at, 1)), expected);
    assert_eq!(code(result::ctx::synchronize()), expected);
    assert_eq!(code(sync(std::ptr::null_mut())), expected);
}

fn wrong(kernel: &str, n: u64, grid: u32, expected: u32, words: &[&str]) {
    let said = alone(&[], || {
        let gpu = Gpu::new();
        let f = Kernels::load().get(kernel);
        let at = gpu.floats(&[1.0; 4]);
        gpu.sync().unwrap();
        // The launch itself is none the wiser.
        gpu.launch(f, grid, 1, &[at, n]).unwrap();
        lost(&gpu, expected, at);
    });
    for word in words {
        assert!(said.as_ref().is_none_or(|said| said.contains(word)), "{word}: {said:?}");
    }
}

#[test]
fn an_address_beyond_memory() {
    wrong("anywhere", 16, 1, 700, &["Bounds in anywhere", "kernels.cu:34", "16 bytes into an allocation of 16"]);
}

#[test]
fn a_misaligned_address() {
    wrong("anywhere", 2, 1, 716, &["Misaligned in anywhere", "kernels.cu:34"]);
}

#[test]
fn a_race() {
    wrong("race", 0, 2, 719, &["Race in race", "kernels.cu:41"]);
}

#[test]
fn a_trap() {
    wrong("trap", 0, 1, 719, &["Trap in trap"]);
}

/// Memory is freed in a stream's order: what comes after can't use it.
#[test]
fn memory_is_used_after_it_was_freed() {
    let said = alone(&[], || {
        let gpu = Gpu::new();
        let f = Kernels::load().get("scale");
        // SAFETY: that it is used later is what is found.
        let at = unsafe {
            let at = result::malloc_async(gpu.stream, 64).unwrap();
            result::free_async(at, gpu.stream).unwrap();
            at
        };
        gpu.launch(f, 1, 1, &[at, 1]).unwrap();
        assert_eq!(code(gpu.sync()), 700);
    });
    assert!(said.is_none_or(|said| said.contains("kernels.cu:12") && said.contains("nothing is allocated")));
}

/// A graph that fails when it is replayed.
#[test]
fn a_kernel_in_a_graph_is_wrong() {
    alone(&[], || {
        let gpu = Gpu::new();
        let f = Kernels::load().get("anywhere");
        let at = gpu.floats(&[1.0; 4]);
        gpu.sync().unwrap();
        gpu.capture();
        gpu.launch(f, 1, 1, &[at, 64]).unwrap();
        let graph = gpu.end_capture().unwrap();
        gpu.replay(graph).unwrap();
        lost(&gpu, 700, at);
    });
}
