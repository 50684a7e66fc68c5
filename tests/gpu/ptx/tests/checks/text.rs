//! What is refused when a text is parsed or a kernel launched; where faults are.

use crate::common::kernel;
use ptx::{Arg, FaultKind, Gpu, Module, Options};

#[test]
fn what_is_not_known_is_refused_with_its_line() {
    for unknown in [
        "vadd.u32.u32.u32 %r1, %r2, %r3, %r4;",
        "add.rn.s32 %r1, %r2, %r3;",
        "add.s32.wide %r1, %r2, %r3;",
        "ld.global.v3.u32 {%r1,%r2,%r3}, [%in];",
        "mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {%f0,%f1,%f2,%f3}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%f0,%f1,%f2,%f3};",
        "shfl.bfly.b32 %r1, %r2, 1, 31;",
        "mov.u32 %r1, %clock;",
        "mov.u32 %r1, %nowhere;",
        "add.u64 %d1, %d2, %r1;",
        "bra NOWHERE;",
        "call unknown, ();",
        "tex.1d.v4.f32.s32 {%f0,%f1,%f2,%f3}, [t, {%r0}];",
    ] {
        let text = kernel("", &format!("mov.u32 %r1, 0;\n{unknown}\nret;"));
        let error = Module::parse(&text).err().unwrap_or_else(|| panic!("not refused: {unknown}"));
        let line = text.lines().position(|line| line == unknown).unwrap() + 1;
        assert_eq!(error.line as usize, line, "{unknown}: {error}");
    }
    assert!(Module::parse(&kernel("", "ret;")).is_ok());
}

#[test]
fn a_launch_must_fit() {
    let module = Module::parse(&kernel("", "ret;")).unwrap();
    let mut gpu = Gpu::new(Options::default());
    let p = gpu.alloc(8);
    let args = [Arg::U64(p), Arg::U64(p), Arg::U32(0)];
    let mut refused = |name: &str, block: u32, shared: usize, args: &[Arg]| {
        gpu.launch(&module, name, 1, block, shared, args).err().map(|fault| fault.kind)
    };
    assert_eq!(refused("k", 1024, 0, &args), None);
    assert_eq!(refused("other", 32, 0, &args), Some(FaultKind::Launch));
    assert_eq!(refused("k", 1025, 0, &args), Some(FaultKind::Launch));
    assert_eq!(refused("k", 0, 0, &args), Some(FaultKind::Launch));
    assert_eq!(refused("k", 32, 300_000, &args), Some(FaultKind::Launch));
    assert_eq!(refused("k", 32, 0, &args[..2]), Some(FaultKind::Launch));
    assert_eq!(refused("k", 32, 0, &[Arg::U64(p), Arg::U32(0), Arg::U32(0)]), Some(FaultKind::Launch));
}

#[test]
fn a_fault_says_where() {
    let text = kernel(
        "",
        ".loc 1 42 7\n setp.eq.u32 %p1, %tid, 9;\n .loc 1 43 0, function_name $x, inlined_at 1 3 4\n @%p1 st.global.u32 [%out+4096], %n;\n ret;",
    );
    let text = text.replace(".address_size 64", ".address_size 64\n.file 1 \"kernel.cu\"");
    let module = Module::parse(&text).unwrap();
    let mut gpu = Gpu::new(Options::default());
    let p = gpu.alloc(8);
    let fault = gpu.launch(&module, "k", 1, (4, 8), 0, &[Arg::U64(p), Arg::U64(p), Arg::U32(0)]);
    // Threads (1, 2) to (1, 7) are none with that x.
    assert!(fault.is_ok());
    let fault = gpu.launch(&module, "k", 1, 16, 0, &[Arg::U64(p), Arg::U64(p), Arg::U32(0)]).unwrap_err();
    assert_eq!((fault.kind, fault.thread, fault.block), (FaultKind::Bounds, Some([9, 0, 0]), [0; 3]));
    assert_eq!(fault.source, Some(("kernel.cu".to_owned(), 43)));
    assert_eq!(text.lines().nth(fault.ptx_line as usize - 1).unwrap().trim(), "@%p1 st.global.u32 [%out+4096], %n;");
    assert!(fault.to_string().contains("kernel.cu:43"), "{fault}");
}
