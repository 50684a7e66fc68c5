//! The driver's rules, each broken on purpose.

use crate::common::{Gpu, Kernels, TEXT, alloc, alone, code, launch, pinned, sync};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUfunction_attribute};

#[test]
fn pageable_memory_is_read_at_the_call_and_pinned_memory_later() {
    alone(&[], || {
        let gpu = Gpu::new();
        let at = alloc(16).unwrap();
        let mut pageable = vec![1f32; 4];
        gpu.write(at, &pageable).unwrap();
        pageable.fill(9.0);
        assert_eq!(gpu.read::<f32>(at, 4).unwrap(), [1.0; 4]);
        let input = pinned(4).unwrap();
        input.fill(2.0);
        gpu.write(at, input).unwrap();
        // Too early: what is copied is what is there when it is copied.
        input.fill(3.0);
        assert_eq!(gpu.read::<f32>(at, 4).unwrap(), [3.0; 4]);
        let output = pinned(4).unwrap();
        output.fill(0.0);
        gpu.read_to(at, output).unwrap();
        assert_eq!(*output, [0.0; 4], "nobody has waited");
        gpu.sync().unwrap();
        assert_eq!(*output, [3.0; 4]);
    });
}

/// A copy without a stream returns when it has read pageable memory; a stream that does not block sees it when somebody has waited.
#[test]
fn a_copy_without_a_stream_is_not_before_one_that_does_not_block() {
    alone(&[], || {
        let gpu = Gpu::new();
        let at = gpu.floats(&[1.0; 4]);
        gpu.sync().unwrap();
        // SAFETY: there is room for as many.
        unsafe { result::memcpy_htod_sync(at, &[2f32; 4]) }.unwrap();
        assert_eq!(gpu.read::<f32>(at, 4).unwrap(), [1.0; 4]);
        result::ctx::synchronize().unwrap();
        assert_eq!(gpu.read::<f32>(at, 4).unwrap(), [2.0; 4]);
    });
}

type Forbidden<'a> = Box<dyn FnMut() -> u32 + 'a>;

/// What is not allowed during a capture ends it.
#[test]
fn a_capture_is_lost_by_what_it_forbids() {
    let said = alone(&[], || {
        let gpu = Gpu::new();
        let at = alloc(16).unwrap();
        let scale = Kernels::load().get("scale");
        let mut pageable = [0f32; 4];
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
        let forbidden: [Forbidden; 9] = [
            // SAFETY: the event exists.
            Box::new(|| code(unsafe { result::event::query(event) })),
            Box::new(|| code(gpu.sync())),
            Box::new(|| code(result::ctx::synchronize())),
            Box::new(|| code(alloc(16))),
            Box::new(|| code(pinned(16))),
            Box::new(|| code(gpu.write(at, &[0f32; 4]))),
            Box::new(|| code(gpu.read_to(at, &mut pageable))),
            // SAFETY: it is not freed, for it is refused.
            Box::new(|| code(unsafe { result::free_sync(at) })),
            // SAFETY: nothing is copied, for it is refused.
            Box::new(|| code(unsafe { result::memcpy_htod_sync(at, &[0f32; 4]) })),
        ];
        for (i, mut call) in forbidden.into_iter().enumerate() {
            gpu.capture();
            gpu.launch(scale, 1, 32, &[at, 4]).unwrap();
            assert_eq!(call(), 900, "call {i}");
            assert_eq!(code(gpu.launch(scale, 1, 32, &[at, 4])), 901, "call {i}");
            assert_eq!(code(gpu.end_capture()), 901, "call {i}");
            gpu.sync().unwrap();
        }
        // Not one of them ran anything; and the next capture is none the worse.
        gpu.write(at, &[1f32; 4]).unwrap();
        gpu.capture();
        gpu.launch(scale, 1, 32, &[at, 4]).unwrap();
        gpu.replay(gpu.end_capture().unwrap()).unwrap();
        assert_eq!(gpu.read::<f32>(at, 4).unwrap(), [2.0; 4]);
        assert_eq!(code(gpu.end_capture()), 903);
    });
    assert!(said.is_none_or(|said| said.contains("pageable")));
}

#[test]
fn dynamic_shared_memory_is_asked_for() {
    alone(&[], || {
        let gpu = Gpu::new();
        let through = Kernels::load().get("through");
        let at = gpu.floats(&[2.5, 0.0]);
        let run = |bytes: u32| code(launch(gpu.stream, through, (1, 1, 1), (1, 1, 1), bytes, &[at, u64::from(bytes)]));
        let ask = |bytes: i32| {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function exists.
            code(unsafe { result::function::set_function_attribute(through, attribute, bytes) })
        };
        assert_eq!(run(48 << 10), 0);
        assert_eq!(run((48 << 10) + 4), 1);
        assert_eq!(ask(164 << 10), 1, "more than a block may have");
        assert_eq!(ask(163 << 10), 0);
        assert_eq!(run(163 << 10), 0);
        assert_eq!(run((163 << 10) + 4), 1);
        assert_eq!(gpu.read::<f32>(at, 2).unwrap(), [2.5, 2.5]);
    });
}

#[test]
fn limits_of_grids_and_blocks() {
    alone(&[], || {
        let gpu = Gpu::new();
        let kernels = Kernels::load();
        let at = gpu.floats(&[1.0]);
        let run = |name: &str, grid, block| code(launch(gpu.stream, kernels.get(name), grid, block, 0, &[at, 0]));
        assert_eq!(run("scale", (1, 1, 1), (1024, 1, 1)), 0);
        assert_eq!(run("scale", (1, 1, 1), (1025, 1, 1)), 1);
        assert_eq!(run("scale", (1, 1, 1), (1, 1, 65)), 1);
        assert_eq!(run("scale", (1, 1, 1), (0, 1, 1)), 1);
        assert_eq!(run("scale", (0, 1, 1), (1, 1, 1)), 1);
        assert_eq!(run("scale", (1, 65536, 1), (1, 1, 1)), 1);
        assert_eq!(run("scale", (1, 1, 65536), (1, 1, 1)), 1);
        assert_eq!(run("small", (1, 1, 1), (64, 1, 1)), 0);
        assert_eq!(run("small", (1, 1, 1), (65, 1, 1)), 1);
        gpu.sync().unwrap();
    });
}

#[test]
fn images_that_are_not_for_this_device() {
    alone(&[], || {
        let _gpu = Gpu::new();
        assert_eq!(code(Kernels::of(b"\x7fELF\x02\x01\x01")), 209);
        assert_eq!(code(Kernels::of(b"\x50\xed\x55\xba\x01")), 209);
        assert_eq!(code(Kernels::of(b"nonsense")), 218);
        assert_eq!(code(Kernels::of(TEXT.replace("sm_80", "sm_86").as_bytes())), 218);
        assert_eq!(code(Kernels::of(TEXT.replace("sm_80", "sm_90a").as_bytes())), 218);
        assert_eq!(code(Kernels::of(TEXT.replace(".version 8.0", ".version 9.0").as_bytes())), 222);
        assert_eq!(code(Kernels::of(TEXT.replace("mul.f32", "mul.f32.new").as_bytes())), 218);
        assert_eq!(code(Kernels::load().find("nothing")), 500);
    });
    alone(&[("STANDIN_CC", "9.0"), ("STANDIN_DRIVER", "13000")], || {
        let _gpu = Gpu::new();
        Kernels::load();
        Kernels::of(TEXT.replace("sm_80", "sm_90a").replace(".version 8.0", ".version 9.0").as_bytes()).unwrap();
        assert_eq!(code(Kernels::of(TEXT.replace("sm_80", "sm_80a").as_bytes())), 218);
    });
}

#[test]
fn copies_beyond_an_allocation_and_to_none() {
    alone(&[], || {
        let gpu = Gpu::new();
        let at = alloc(16).unwrap();
        assert_eq!(code(gpu.write(at + 4, &[0f32; 4])), 1);
        assert_eq!(code(gpu.read::<f32>(at, 5)), 1);
        assert_eq!(code(gpu.write(1 << 50, &[0f32; 4])), 1);
        assert_eq!(code(alloc(0)), 1);
        // SAFETY: addresses that were not given are known as such.
        unsafe {
            assert_eq!(code(result::free_sync(at + 8)), 1);
            assert_eq!(code(result::free_sync(at)), 0);
            assert_eq!(code(result::free_sync(at)), 1);
        }
        assert_eq!(code(gpu.write(at, &[0f32; 4])), 1);
    });
}

#[test]
fn what_is_gone_is_known_as_such() {
    alone(&[], || {
        let gpu = Gpu::new();
        let kernels = Kernels::load();
        let scale = kernels.get("scale");
        let at = gpu.floats(&[1.0]);
        // SAFETY: that all this is gone is what is tested.
        unsafe {
            result::module::unload(kernels.0).unwrap();
            assert_eq!(code(gpu.launch(scale, 1, 1, &[at, 1])), 400);
            assert_eq!(code(result::module::unload(kernels.0)), 400);
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
            result::event::destroy(event).unwrap();
            assert_eq!(code(result::event::record(event, gpu.stream)), 400);
            // Its work is still done.
            gpu.write(at, &[7f32]).unwrap();
            result::stream::destroy(gpu.stream).unwrap();
            assert_eq!(code(gpu.sync()), 400);
            result::ctx::synchronize().unwrap();
            let mut got = [0u32];
            result::memcpy_dtoh_sync(&mut got, at).unwrap();
            assert_eq!(got, [7f32.to_bits()]);
            assert_eq!(code(sync(std::ptr::without_provenance_mut(12345))), 400);
        }
    });
}

/// Pinned memory that is freed while a copy still needs it.
#[test]
fn pinned_memory_is_freed_too_early() {
    let said = alone(&[], || {
        let gpu = Gpu::new();
        let at = alloc(16).unwrap();
        let input = pinned(4).unwrap();
        gpu.write(at, input).unwrap();
        // SAFETY: nobody uses the slice after this; that the copy does is what is found.
        unsafe { result::free_host(input.as_mut_ptr().cast()).unwrap() };
        assert_ne!(code(gpu.sync()), 0);
    });
    assert!(said.is_none_or(|said| said.contains("pinned memory that was freed")));
}

#[test]
fn threads_without_a_context() {
    alone(&[], || {
        // SAFETY: takes nothing.
        assert_eq!(code(unsafe { result::malloc_sync(16) }), 3, "before cuInit");
        let _gpu = Gpu::new();
        alloc(16).unwrap();
        std::thread::spawn(|| assert_eq!(code(alloc(16)), 201)).join().unwrap();
    });
}
