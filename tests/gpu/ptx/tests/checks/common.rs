//! Kernels around a few instructions.

use ptx::{Arg, Counters, Fault, FaultKind, Gpu, Module, Options};
use std::fmt::Write;

/// The text of a kernel `k` with the parameters `in` and `out` (pointers) and `n`, registers of all kinds, and this body.
/// `%tid` is the thread's index, `%i` and `%o` its places in `in` and `out`, 8 bytes each.
pub(crate) fn kernel(declared: &str, body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_90\n.address_size 64\n{declared}\n\
         .visible .entry k(.param .u64 in, .param .u64 out, .param .u32 n)\n{{\n\
         .reg .b16 %h<16>; .reg .b32 %r<40>; .reg .b64 %d<16>; .reg .f32 %f<40>; .reg .f64 %g<8>; .reg .pred %p<8>;\n\
         .reg .b32 %tid; .reg .b32 %n; .reg .b64 %in; .reg .b64 %out; .reg .b64 %i; .reg .b64 %o;\n\
         ld.param.u64 %in, [in];\n ld.param.u64 %out, [out];\n ld.param.u32 %n, [n];\n\
         mov.u32 %tid, %tid.x;\n mul.wide.u32 %i, %tid, 8;\n add.s64 %o, %out, %i;\n add.s64 %i, %in, %i;\n\
         {body}\n}}\n"
    )
}

/// What a launch of a body's kernel leaves in `out`, and its counters.
pub(crate) struct Done {
    pub(crate) out: Vec<u64>,
    pub(crate) counters: Counters,
}

pub(crate) struct Case<'a> {
    pub(crate) declared: &'a str,
    pub(crate) input: Vec<u64>,
    pub(crate) outputs: usize,
    pub(crate) grid: u32,
    pub(crate) block: u32,
    pub(crate) dynamic: usize,
    pub(crate) seed: u64,
}

impl Default for Case<'_> {
    fn default() -> Self {
        Self { declared: "", input: vec![0; 64], outputs: 64, grid: 1, block: 32, dynamic: 0, seed: 1 }
    }
}

impl Case<'_> {
    pub(crate) fn run(&self, body: &str) -> Result<Done, Fault> {
        let module = Module::parse(&kernel(self.declared, body)).unwrap();
        let mut gpu = Gpu::new(Options { seed: self.seed, max_steps: 100_000, ..Options::default() });
        let (input, out) = (gpu.alloc(self.input.len() * 8), gpu.alloc(self.outputs * 8));
        gpu.write(input, &self.input.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
        let args = [Arg::U64(input), Arg::U64(out), Arg::U32(u32::try_from(self.input.len()).unwrap())];
        let counters = gpu.launch(&module, "k", self.grid, self.block, self.dynamic, &args)?;
        let bytes = gpu.read(out, self.outputs * 8).unwrap();
        let out = bytes.chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect();
        Ok(Done { out, counters })
    }

    pub(crate) fn out(&self, body: &str) -> Vec<u64> {
        self.run(body).unwrap_or_else(|fault| panic!("{fault}\n{body}")).out
    }

    /// The bug is found, in whatever order warps and blocks run; its twin passes in each.
    pub(crate) fn planted(&self, kind: FaultKind, bug: &str, twin: &str) {
        for seed in 0..8 {
            let case = Case { input: self.input.clone(), seed, ..*self };
            match case.run(bug) {
                Ok(_) => panic!("seed {seed}: not found: {kind:?}\n{bug}"),
                Err(fault) => assert_eq!(fault.kind, kind, "seed {seed}: {fault}"),
            }
            if let Err(fault) = case.run(twin) {
                panic!("seed {seed}: the twin: {fault}\n{twin}");
            }
        }
    }
}

/// One instruction of `(a, b, c) -> d`, whose operands have these widths, on each row of cases: a, b, c, and what is right.
/// `widths`: those of d and of the operands that there are.
pub(crate) fn check(opcode: &str, widths: &[u32], cases: &[[u64; 4]]) {
    let register = |i: usize, bits: u32| match bits {
        16 => format!("%h{i}"),
        32 => format!("%r{i}"),
        _ => format!("%d{i}"),
    };
    let mut body = "mad.wide.u32 %i, %tid, 24, %in;\n".to_owned();
    for (i, bits) in widths.iter().enumerate().skip(1) {
        writeln!(body, "ld.global.u{bits} {}, [%i+{}];", register(i, *bits), (i - 1) * 8).unwrap();
    }
    let operands: Vec<String> = widths.iter().enumerate().map(|(i, bits)| register(i, *bits)).collect();
    writeln!(body, "{opcode} {};", operands.join(", ")).unwrap();
    body += "mov.u64 %d9, 0;\n st.global.u64 [%o], %d9;\n";
    writeln!(body, "st.global.u{} [%o], {};\nret;", widths[0], operands[0]).unwrap();
    let input = cases.iter().flat_map(|case| case[..3].to_vec()).collect();
    let block = u32::try_from(cases.len()).unwrap();
    let out = Case { input, block, ..Case::default() }.out(&body);
    for (case, got) in cases.iter().zip(out) {
        let [a, b, c, right] = case;
        assert_eq!(got, *right, "{opcode} of {a:#x}, {b:#x}, {c:#x} is {got:#x}, not {right:#x}");
    }
}

pub(crate) fn f(x: f32) -> u64 {
    u64::from(x.to_bits())
}

pub(crate) fn s(x: i32) -> u64 {
    u64::from(x.cast_unsigned())
}
