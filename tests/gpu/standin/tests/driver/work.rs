//! What works: memory, copies, kernels, streams, events, graphs.

use crate::common::{Gpu, Kernels, alloc, alone, code, launch, pinned, sync};
use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::{CudaContext, sys};
use std::ffi::{CString, c_void};

fn count(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32).collect()
}

fn times(factor: f32, n: usize) -> Vec<f32> {
    count(n).iter().map(|x| x * factor).collect()
}

#[test]
fn a_kernel_between_copies() {
    alone(&[], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let at = gpu.floats(&count(1000));
        gpu.launch(scale, 8, 128, &[at, 999]).unwrap();
        let mut right = times(2.0, 1000);
        right[999] = 999.0;
        assert_eq!(gpu.read::<f32>(at, 1000).unwrap(), right);
        // A part, by its address; filled, and copied on the device.
        let other = alloc(4000).unwrap();
        // SAFETY: both are 4000 bytes.
        unsafe {
            result::memset_d8_async(other, 0, 4000, gpu.stream).unwrap();
            result::memcpy_dtod_async(other + 40, at + 80, 8, gpu.stream).unwrap();
        }
        let got = gpu.read::<f32>(other, 13).unwrap();
        assert_eq!(got[9..], [0.0, 40.0, 42.0, 0.0]);
        // What nobody wrote is no number.
        assert!(gpu.read::<f32>(alloc(8).unwrap(), 2).unwrap().iter().all(|x| x.is_nan()));
    });
}

#[test]
fn cudarcs_own_types() {
    alone(&[], || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let slice = stream.clone_htod(&count(300)).unwrap();
        let twice = stream.clone_dtod(&slice).unwrap();
        drop(slice);
        assert_eq!(stream.clone_dtoh(&twice).unwrap(), count(300));
        let (free, total) = context.mem_get_info().unwrap();
        drop(twice);
        context.synchronize().unwrap();
        let (after, _) = context.mem_get_info().unwrap();
        assert!(after > free && total > after, "{free} {after} {total}");
        assert!(context.name().unwrap().contains("8.0"));
    });
}

#[test]
fn a_graph_is_replayed_with_the_data_of_then() {
    alone(&[], || {
        let gpu = Gpu::new();
        let kernels = Kernels::load();
        let (scale, increase) = (kernels.get("scale"), kernels.get("increase"));
        let at = gpu.floats(&count(100));
        gpu.sync().unwrap();
        gpu.capture();
        gpu.launch(scale, 1, 128, &[at, 100]).unwrap();
        gpu.launch(increase, 1, 128, &[at, 100]).unwrap();
        let graph = gpu.end_capture().unwrap();
        // Capturing runs nothing.
        assert_eq!(gpu.read::<f32>(at, 100).unwrap(), count(100));
        gpu.replay(graph).unwrap();
        gpu.replay(graph).unwrap();
        let right: Vec<f32> = count(100).iter().map(|x| (x * 2.0 + 1.0) * 2.0 + 1.0).collect();
        assert_eq!(gpu.read::<f32>(at, 100).unwrap(), right);
        gpu.write(at, &[-1.0f32; 100]).unwrap();
        gpu.replay(graph).unwrap();
        assert_eq!(gpu.read::<f32>(at, 100).unwrap(), [-1.0; 100]);
    });
}

#[test]
fn a_graph_copies_through_pinned_memory() {
    alone(&[], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let (input, output) = (pinned(4).unwrap(), pinned(4).unwrap());
        let at = alloc(16).unwrap();
        gpu.capture();
        gpu.write(at, input).unwrap();
        gpu.launch(scale, 1, 32, &[at, 4]).unwrap();
        gpu.read_to(at, output).unwrap();
        let graph = gpu.end_capture().unwrap();
        for x in [1.0, 5.0] {
            input.copy_from_slice(&[x; 4]);
            gpu.replay(graph).unwrap();
            gpu.sync().unwrap();
            assert_eq!(*output, [2.0 * x; 4]);
        }
    });
}

/// With late work it is certain that a stream that waits for nothing overtakes; with an event it does not, in any order.
#[test]
fn events_order_streams() {
    for seed in ["0", "1", "2", "3"] {
        alone(&[("STANDIN_SEED", seed)], || {
            let gpu = Gpu::new();
            let scale = Kernels::load().get("scale");
            let other = result::stream::create(StreamKind::NonBlocking).unwrap();
            let late = std::env::var("STANDIN_SEED").unwrap() == "0";
            for ordered in [true, false] {
                let at = gpu.floats(&[3.0]);
                gpu.sync().unwrap();
                let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap();
                gpu.launch(scale, 1, 32, &[at, 1]).unwrap();
                // SAFETY: event and streams exist.
                unsafe {
                    result::event::record(event, gpu.stream).unwrap();
                    if ordered {
                        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                        result::stream::wait_event(other, event, flags).unwrap();
                    }
                }
                launch(other, Kernels::load().get("increase"), (1, 1, 1), (32, 1, 1), 0, &[at, 1]).unwrap();
                sync(other).unwrap();
                let got = Gpu { stream: other, device: 0 }.read::<f32>(at, 1).unwrap();
                if ordered {
                    assert_eq!(got, [7.0]);
                } else if late {
                    assert_eq!(got, [4.0]);
                }
                gpu.sync().unwrap();
            }
        });
    }
}

#[test]
fn an_event_is_asked_until_it_has_happened() {
    alone(&[], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let at = gpu.floats(&[3.0]);
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
        gpu.launch(scale, 1, 32, &[at, 1]).unwrap();
        // SAFETY: events and stream exist.
        unsafe {
            assert_eq!(code(result::event::query(event)), 0, "never recorded");
            result::event::record(event, gpu.stream).unwrap();
            let mut asked = 0;
            while code(result::event::query(event)) == 600 {
                asked += 1;
            }
            // The copy, the kernel and the record.
            assert_eq!(asked, 3);
            let end = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
            result::event::record(end, gpu.stream).unwrap();
            assert_eq!(code(result::event::elapsed(event, end)), 600);
            result::event::synchronize(end).unwrap();
            assert!(result::event::elapsed(event, end).unwrap() >= 0.0);
        }
    });
}

/// The legacy stream and those made without `CU_STREAM_NON_BLOCKING` take turns.
#[test]
fn blocking_streams_take_turns_with_the_legacy_one() {
    alone(&[], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let blocking = result::stream::create(StreamKind::Default).unwrap();
        let at = gpu.floats(&[1.0]);
        gpu.sync().unwrap();
        launch(blocking, scale, (1, 1, 1), (32, 1, 1), 0, &[at, 1]).unwrap();
        let read = || {
            let mut got = [0f32];
            // SAFETY: there is room for one.
            unsafe { result::memcpy_dtoh_sync(&mut got, at).unwrap() };
            got[0]
        };
        assert!((read() - 2.0).abs() < 1e-9);
        gpu.launch(scale, 1, 32, &[at, 1]).unwrap();
        assert!((read() - 2.0).abs() < 1e-9, "a stream that does not block has not been waited for");
        gpu.sync().unwrap();
        assert!((read() - 4.0).abs() < 1e-9);
    });
}

extern "C" fn note(data: *mut c_void) {
    let mut version = 0;
    // SAFETY: `data` is the test's number; the call's result goes to a local one.
    unsafe {
        let asked = sys::cuDriverGetVersion(&raw mut version) as u32;
        *data.cast::<u32>() += 1000 + asked;
    }
}

#[test]
fn host_functions_have_their_turn_and_may_call_nothing() {
    alone(&[], || {
        let gpu = Gpu::new();
        let seen = Box::leak(Box::new(1u32));
        // SAFETY: the number lives on.
        unsafe { result::stream::launch_host_function(gpu.stream, note, std::ptr::from_mut(seen).cast()).unwrap() };
        // SAFETY: as above; the function may write it only while a call waits.
        let now = || unsafe { std::ptr::from_ref(&*seen).read_volatile() };
        assert_eq!(now(), 1);
        gpu.sync().unwrap();
        assert_eq!(now(), 1801);
    });
}

#[test]
fn variables_of_a_module() {
    alone(&[], || {
        let gpu = Gpu::new();
        let kernels = Kernels::load();
        let global = |name: &str| {
            // SAFETY: the module exists.
            unsafe { result::module::get_global(kernels.0, CString::new(name).unwrap()) }
        };
        let (counted, bytes) = global("counted").unwrap();
        assert_eq!((gpu.read::<u32>(counted, 2).unwrap(), bytes), (vec![5, 7], 8));
        let at = gpu.floats(&[2.5, 0.0]);
        launch(gpu.stream, kernels.get("through"), (1, 1, 1), (1, 1, 1), 64, &[at, 64]).unwrap();
        assert_eq!(gpu.read::<f32>(at, 2).unwrap(), [2.5, 2.5]);
        assert_eq!(gpu.read::<u32>(counted, 2).unwrap(), [6, 7]);
        let (factor, _) = global("factor").unwrap();
        gpu.write(factor, &[10f32]).unwrap();
        gpu.launch(kernels.get("scale"), 1, 32, &[at, 1]).unwrap();
        assert_eq!(gpu.read::<f32>(at, 1).unwrap(), [25.0]);
        assert_eq!(code(global("nothing")), 500);
    });
}

/// Freeing without a stream waits for what may still use the memory.
#[test]
fn memory_that_is_freed_while_a_kernel_is_queued() {
    alone(&[], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let at = gpu.floats(&[1.0; 32]);
        gpu.launch(scale, 1, 32, &[at, 32]).unwrap();
        // SAFETY: nothing uses it after this.
        unsafe { result::free_sync(at).unwrap() };
        gpu.sync().unwrap();
    });
}

#[test]
fn memory_that_is_freed_in_the_streams_order() {
    alone(&[("STANDIN_MEMORY", "64K")], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        for round in 0..10 {
            // SAFETY: each is freed once, after its last use.
            unsafe {
                let at = result::malloc_async(gpu.stream, 40 << 10).unwrap();
                gpu.write(at, &[2f32; 32]).unwrap();
                gpu.launch(scale, 1, 32, &[at, 32]).unwrap();
                assert_eq!(gpu.read::<f32>(at, 32).unwrap(), [4.0; 32], "round {round}");
                result::free_async(at, gpu.stream).unwrap();
            }
        }
    });
}
