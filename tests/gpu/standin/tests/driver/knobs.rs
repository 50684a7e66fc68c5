//! Each knob, in a process of its own.

use crate::common::{Gpu, Kernels, alloc, alone, code, pinned};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

#[test]
fn the_compute_capability_and_what_goes_with_it() {
    for (capability, major, minor, shared) in [
        ("7.5", 7, 5, 64),
        ("8.0", 8, 0, 163),
        ("8.6", 8, 6, 99),
        ("8.9", 8, 9, 99),
        ("9.0", 9, 0, 227),
        ("10.0", 10, 0, 227),
        ("12.0", 12, 0, 99),
    ] {
        alone(&[("STANDIN_CC", capability)], || {
            let gpu = Gpu::new();
            assert_eq!(gpu.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR), major);
            assert_eq!(gpu.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR), minor);
            assert_eq!(gpu.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN), shared << 10);
        });
    }
}

#[test]
fn few_multiprocessors() {
    for (knobs, right) in [(&[][..], 108), (&[("STANDIN_MULTIPROCESSORS", "3")], 3)] {
        alone(knobs, || {
            assert_eq!(Gpu::new().attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT), right);
        });
    }
}

#[test]
fn little_memory() {
    alone(&[("STANDIN_MEMORY", "64M")], || {
        let _gpu = Gpu::new();
        let (free, total) = result::mem_get_info().unwrap();
        assert_eq!((free, total), (63 << 20, 64 << 20));
        assert_eq!(code(alloc(free + 1)), 2);
        let at = alloc(free).unwrap();
        assert_eq!(result::mem_get_info().unwrap().0, 0);
        assert_eq!(code(alloc(1)), 2);
        // SAFETY: it was allocated.
        unsafe { result::free_sync(at).unwrap() };
        alloc(1).unwrap();
    });
}

#[test]
fn the_third_allocation_fails() {
    alone(&[("STANDIN_FAIL", "alloc:3:2")], || {
        let gpu = Gpu::new();
        alloc(16).unwrap();
        pinned(4).unwrap();
        assert_eq!(code(alloc(16)), 2);
        // Nothing else is lost.
        gpu.floats(&[1.0]);
        gpu.sync().unwrap();
    });
}

#[test]
fn the_second_launch_fails() {
    let said = alone(&[("STANDIN_FAIL", "launch:2:719")], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let at = gpu.floats(&[1.0]);
        gpu.launch(scale, 1, 1, &[at, 1]).unwrap();
        gpu.sync().unwrap();
        gpu.launch(scale, 1, 1, &[at, 1]).unwrap();
        assert_eq!(code(gpu.sync()), 719);
        assert_eq!(code(gpu.launch(scale, 1, 1, &[at, 1])), 719);
    });
    assert!(said.is_none_or(|said| said.contains("scale fails with 719 as it was told to")));
}

#[test]
fn an_entry_point_fails() {
    alone(&[("STANDIN_FAIL", "cuLaunchKernel:2:701,cuStreamCreate:2:2,cuModuleLoadData:1:209")], || {
        let gpu = Gpu::new();
        assert_eq!(code(Kernels::of(crate::common::TEXT.as_bytes())), 209);
        let scale = Kernels::load().get("scale");
        let at = gpu.floats(&[1.0]);
        let run = || code(gpu.launch(scale, 1, 1, &[at, 1]));
        assert_eq!([run(), run(), run()], [0, 701, 0]);
        assert_eq!(code(result::stream::create(result::stream::StreamKind::NonBlocking)), 2);
        assert_eq!(gpu.read::<f32>(at, 1).unwrap(), [4.0]);
    });
}

#[test]
fn no_device_and_several() {
    alone(&[("STANDIN_DEVICES", "0")], || assert_eq!(code(result::init()), 100));
    alone(&[("STANDIN_DEVICES", "2")], || {
        let first = Gpu::of(0);
        let on_first = first.floats(&[1.0, 2.0]);
        first.sync().unwrap();
        let second = Gpu::of(1);
        let scale = Kernels::load().get("scale");
        let on_second = second.floats(&[5.0, 6.0]);
        assert_eq!(result::device::get_count().unwrap(), 2);
        assert_eq!(code(result::device::get(2)), 101);
        // From one to the other.
        // SAFETY: both are 8 bytes; contexts are told by the addresses.
        unsafe {
            let none = std::ptr::null_mut();
            result::memcpy_peer_async(none, on_second, none, on_first, 8, second.stream).unwrap();
        }
        second.launch(scale, 1, 32, &[on_second, 2]).unwrap();
        assert_eq!(second.read::<f32>(on_second, 2).unwrap(), [2.0, 4.0]);
        // A kernel has only its own device's memory.
        second.launch(scale, 1, 32, &[on_first, 2]).unwrap();
        assert_eq!(code(second.sync()), 700);
        assert_eq!(code(first.sync()), 700, "the current context is still the second's");
        let _first = Gpu::of(0);
    });
}

#[test]
fn an_old_driver() {
    alone(&[("STANDIN_DRIVER", "11080")], || {
        let mut version = 0;
        // SAFETY: there is a place for the result.
        unsafe { sys::cuDriverGetVersion(&raw mut version).result().unwrap() };
        assert_eq!(version, 11080);
        let _gpu = Gpu::new();
        assert_eq!(code(Kernels::of(crate::common::TEXT.as_bytes())), 222);
    });
}

#[test]
fn a_slow_stream() {
    alone(&[("STANDIN_SLOW", "2000")], || {
        let gpu = Gpu::new();
        let at = gpu.floats(&[1.0]);
        let [start, end] = [(); 2].map(|()| result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap());
        // SAFETY: events and stream exist.
        let milliseconds = unsafe {
            result::event::record(start, gpu.stream).unwrap();
            gpu.write(at, &[2f32]).unwrap();
            result::event::record(end, gpu.stream).unwrap();
            result::event::synchronize(end).unwrap();
            result::event::elapsed(start, end).unwrap()
        };
        // No sleep is shorter than it was asked to be.
        assert!(milliseconds >= 4.0, "{milliseconds}");
    });
}

#[test]
fn races_are_not_looked_for() {
    alone(&[("STANDIN_RACES", "0")], || {
        let gpu = Gpu::new();
        let race = Kernels::load().get("race");
        let at = gpu.floats(&[1.0]);
        gpu.launch(race, 4, 1, &[at, 0]).unwrap();
        assert!(gpu.read::<u32>(at, 1).unwrap()[0] < 4);
    });
}

/// The order of blocks is drawn from the seed: who comes last differs.
#[test]
fn seeds_make_other_orders() {
    let folder = tempfile::tempdir().unwrap();
    let mut last = std::collections::BTreeSet::new();
    for seed in 0..8 {
        let file = folder.path().join(seed.to_string());
        let knobs = [("STANDIN_RACES", "0"), ("STANDIN_SEED", &seed.to_string()), ("RESULT", file.to_str().unwrap())];
        let said = alone(&knobs, || {
            let gpu = Gpu::new();
            let race = Kernels::load().get("race");
            let at = gpu.floats(&[1.0]);
            gpu.launch(race, 16, 1, &[at, 0]).unwrap();
            let got = gpu.read::<u32>(at, 1).unwrap()[0];
            std::fs::write(std::env::var("RESULT").unwrap(), got.to_string()).unwrap();
        });
        if said.is_some() {
            last.insert(std::fs::read_to_string(file).unwrap());
        }
    }
    assert!(std::env::var_os("STANDIN_TEST").is_some() || last.len() > 1, "{last:?}");
}

#[test]
fn what_was_done_is_counted() {
    let [file, order] = std::array::from_fn(|_| tempfile::NamedTempFile::new().unwrap());
    let paths = [&file, &order].map(|file| file.path().to_str().unwrap());
    let said = alone(&[("STANDIN_COUNTERS", paths[0]), ("STANDIN_ORDER", paths[1])], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let at = gpu.floats(&[1.0; 256]);
        gpu.sync().unwrap();
        gpu.capture();
        gpu.launch(scale, 2, 128, &[at, 256]).unwrap();
        let graph = gpu.end_capture().unwrap();
        for _ in 0..3 {
            gpu.replay(graph).unwrap();
        }
        gpu.read::<f32>(at, 256).unwrap();
    });
    if said.is_none() {
        return;
    }
    let text = std::fs::read_to_string(file.path()).unwrap();
    let right = [
        "\"scale\": {\"launches\": 3, ",
        "\"read_bytes\": 3072, \"written_bytes\": 3072, \"read_sectors\": 96, \"written_sectors\": 96, ",
        "\"cuGraphLaunch\": 3",
        "\"cuLaunchKernel\": 1",
        "\"bytes to the device\": 1024",
        "\"launch in a graph\": 3",
        // The graph's operation, too.
        "\"memory\": {\"used\": 5120, \"most_used\": 5120}",
    ];
    for part in right {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    let order = std::fs::read_to_string(order.path()).unwrap();
    // What was launched is executed when somebody waits.
    assert!(order.contains("cuGraphLaunch\ncuGraphLaunch\ncuGraphLaunch\n"), "{order}");
    assert!(order.split("cuGraphLaunch\n").nth(3).is_some_and(|rest| rest.contains("\nlaunch\n")), "{order}");
}

/// A graph takes memory from when it is instantiated until it is destroyed.
#[test]
fn a_graph_that_there_is_no_memory_for() {
    alone(&[("STANDIN_MEMORY", "16K")], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let at = gpu.floats(&[1.0; 256]);
        gpu.sync().unwrap();
        let graph = || {
            gpu.capture();
            gpu.launch(scale, 2, 128, &[at, 256]).unwrap();
            gpu.launch(scale, 2, 128, &[at, 256]).unwrap();
            gpu.end_capture()
        };
        let first = graph().unwrap();
        assert_eq!(code(graph()), 2);
        // SAFETY: it was made just now, and is not used after this.
        unsafe { result::graph::exec_destroy(first) }.unwrap();
        gpu.replay(graph().unwrap()).unwrap();
        gpu.sync().unwrap();
    });
}

#[test]
fn knobs_that_are_not_understood() {
    for (name, value) in [
        ("STANDIN_CC", "8.1"),
        ("STANDIN_MEMORY", "much"),
        ("STANDIN_FAIL", "alloc:1"),
        ("STANDIN_SLOW", "x"),
        ("STANDIN_DEVICES", "99"),
    ] {
        let said = alone(&[(name, value)], || assert_eq!(code(result::init()), 999));
        assert!(said.is_none_or(|said| said.contains(name)), "{name}");
    }
}
