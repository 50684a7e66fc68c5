//! Budgets of the inner loops of the CPU's kernels, read from the program's machine code: the instructions that do the work are
//! there, few others beside them, and registers are not spilled to the stack. Times are too noisy to be kept by tests; these
//! counts are the same on every machine that has the compiler.

#![expect(clippy::print_stdout, reason = "tests print what they measured")]

use crate::common::root;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a function's inner loops must be.
struct Budget {
    /// The function's name ends so.
    function: &'static str,
    /// The instructions that do the work begin so.
    work: &'static str,
    /// A loop with fewer of them is not looked at.
    least: usize,
    /// Most instructions of a loop for each that does the work.
    length: f64,
    /// Most stores of vectors to the stack for each that does the work.
    spills: f64,
}

/// The kernels that take the time, as release builds have them and a little more: what needs more has become slower. (On AVX2
/// kernels of two rows spill.)
const BUDGETS: [Budget; 16] = [
    of("gemm::q40::avx512", "vpdpbusd", 16, 5.3, 0.03),
    of("gemm::q41::avx512", "vpdpbusd", 16, 5.7, 0.03),
    of("gemm::q80::avx512", "vpdpbusd", 16, 4.2, 0.03),
    of("gemm::spread::avx512", "vpdpbusd", 16, 4.0, 0.03),
    of("gemm::spread_min::avx512", "vpdpbusd", 16, 4.3, 0.03),
    of("gemm::bf16::avx512", "tdpbf16ps", 2, 12.0, 0.0),
    of("gemm::floats::avx512", "vfmadd", 8, 2.8, 0.0),
    of("dots_x86::dots", "vdpbf16ps", 8, 2.8, 0.0),
    of("attention::run_item::avx512", "vfmadd", 24, 9.0, 0.16),
    of("attention::run_item::avx512", "tdpbf16ps", 2, 6.0, 0.0),
    of("gemm::q40::avx2", "vpmaddubsw", 12, 6.5, 0.7),
    of("gemm::q41::avx2", "vpmaddubsw", 12, 6.3, 0.6),
    of("gemm::q80::avx2", "vpmaddubsw", 12, 8.5, 1.1),
    of("gemm::spread::avx2", "vpmaddubsw", 12, 8.5, 1.1),
    of("gemm::floats::avx2", "vfmadd", 8, 8.5, 0.17),
    of("attention::run_item::avx2", "vfmadd", 24, 7.0, 0.09),
];

const fn of(function: &'static str, work: &'static str, least: usize, length: f64, spills: f64) -> Budget {
    Budget { function, work, least, length, spills }
}

/// An instruction: address and text.
type Instruction = (u64, String);

/// What a program says, if there is such a program.
fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where functions begin and end, by name. Generic ones may be there several times.
fn functions(program: &Path) -> Option<HashMap<String, Vec<(u64, u64)>>> {
    let list = said(Command::new("nm").args(["--demangle", "--defined-only", "--numeric-sort"]).arg(program))?;
    let symbols: Vec<(u64, &str)> = list
        .lines()
        .filter_map(|line| {
            let (address, rest) = line.split_once(' ')?;
            let (kind, name) = rest.split_once(' ')?;
            matches!(kind, "t" | "T").then_some((u64::from_str_radix(address, 16).ok()?, name))
        })
        .collect();
    let mut found: HashMap<String, Vec<(u64, u64)>> = HashMap::new();
    for (i, &(start, name)) in symbols.iter().enumerate() {
        let end = symbols[i..].iter().map(|symbol| symbol.0).find(|&next| next > start);
        if BUDGETS.iter().any(|budget| name.ends_with(budget.function)) {
            found.entry(name.to_owned()).or_default().push((start, end?));
        }
    }
    (!found.is_empty()).then_some(found) // one without names has nothing to look at
}

fn instructions(program: &Path, (start, end): (u64, u64)) -> Option<Vec<Instruction>> {
    let range = [format!("--start-address={start}"), format!("--stop-address={end}")];
    let text = said(Command::new("objdump").args(["-d", "--no-show-raw-insn"]).args(range).arg(program))?;
    let lines = text.lines().filter_map(|line| {
        let (address, text) = line.trim_start().split_once(":\t")?;
        Some((u64::from_str_radix(address, 16).ok()?, text.split('<').next()?.trim().to_owned()))
    });
    Some(lines.collect())
}

/// Loops without a loop in them: from where a jump leads back to, to the jump.
fn inner_loops(code: &[Instruction]) -> Vec<&[Instruction]> {
    let mut loops: Vec<(usize, usize)> = Vec::new();
    for (i, (address, text)) in code.iter().enumerate() {
        let target = text.strip_prefix('j').and_then(|jump| u64::from_str_radix(jump.split_whitespace().nth(1)?, 16).ok());
        if let Some(target) = target.filter(|target| target <= address) {
            loops.extend(code.binary_search_by_key(&target, |(address, _)| *address).map(|start| (start, i)));
        }
    }
    let holds = |outer: &(usize, usize), inner: &(usize, usize)| outer != inner && outer.0 <= inner.0 && inner.1 <= outer.1;
    let innermost = loops.iter().filter(|one| !loops.iter().any(|other| holds(one, other)));
    innermost.map(|&(start, end)| &code[start..=end]).collect()
}

/// Whether a vector is stored to the stack.
fn spills(text: &str) -> bool {
    let Some((mnemonic, operands)) = text.split_once(char::is_whitespace) else { return false };
    let operands = operands.trim();
    mnemonic.starts_with('v') && operands.starts_with('%') && (operands.ends_with("(%rsp)") || operands.ends_with("(%rbp)"))
}

/// What is wrong with a program's kernels; `None` if there are no tools to see it, or no names.
fn faults(program: &Path) -> Option<Vec<String>> {
    let functions = functions(program)?;
    let mut faults = Vec::new();
    for budget in &BUDGETS {
        let places = functions.iter().filter(|(name, _)| name.ends_with(budget.function)).flat_map(|(_, places)| places);
        let (mut n_loops, mut worst) = (0, (0.0f64, 0.0f64));
        for &place in places {
            let code = instructions(program, place)?;
            for body in inner_loops(&code) {
                let work = body.iter().filter(|(_, text)| text.starts_with(budget.work)).count();
                if work < budget.least {
                    continue;
                }
                n_loops += 1;
                let spilled = body.iter().filter(|(_, text)| spills(text)).count();
                worst.0 = worst.0.max(body.len() as f64 / work as f64);
                worst.1 = worst.1.max(spilled as f64 / work as f64);
            }
        }
        let Budget { function, work, length, spills, .. } = budget;
        println!("{function}: {n_loops} loops of {work}, at most {:.2} instructions and {:.3} spills for each", worst.0, worst.1);
        if n_loops == 0 {
            faults.push(format!("{function} has no loop of {work}"));
        } else if worst.0 > *length || worst.1 > *spills {
            faults.push(format!(
                "{function}: {:.2} instructions (at most {length}) and {:.3} spills (at most {spills}) for each {work}",
                worst.0, worst.1
            ));
        }
    }
    Some(faults)
}

/// The last release build, if the kernels have not changed since. (Builds for tests are optimised less.)
fn program() -> Option<PathBuf> {
    let release = root().join("target/release/valar");
    let changed = |path: &Path| fs::metadata(path).and_then(|about| about.modified()).ok();
    let folders = ["src/device/cpu", "src/device/cpu/attention"].map(|folder| root().join(folder));
    let sources = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap().flatten());
    let last = sources.filter_map(|entry| changed(&entry.path())).max();
    (changed(&release) > last).then_some(release)
}

#[test]
fn inner_loops_keep_their_budgets() {
    if !cfg!(target_arch = "x86_64") {
        return println!("skipped: budgets are of x86-64");
    }
    let Some(program) = program() else {
        return println!("skipped: no release build of these kernels (cargo build --release)");
    };
    match faults(&program) {
        None => println!("skipped: nm and objdump are not here"),
        Some(faults) => assert!(faults.is_empty(), "{}:\n{}", program.display(), faults.join("\n")),
    }
}

/// The reading itself: a loop in a loop, a spill in it, and what looks like either and is not.
#[test]
fn loops_and_spills_are_found() {
    let text = [
        "mov    %rsp,%rbp",
        "vpdpbusd (%rax),%zmm1,%zmm2",
        "vmovups %zmm2,0x40(%rsp)",
        "vmovups 0x40(%rsp),%zmm3",
        "vmovups %zmm2,(%rdi)",
        "jne    1",
        "jb     0",
        "jmp    8",
        "ret",
    ];
    let code: Vec<Instruction> = (0..).zip(text.map(str::to_owned)).collect();
    let loops = inner_loops(&code);
    assert_eq!(loops.iter().map(|body| (body[0].0, body.len())).collect::<Vec<_>>(), [(1, 5)]);
    assert_eq!(code.iter().filter(|(_, text)| spills(text)).map(|(i, _)| *i).collect::<Vec<_>>(), [2]);
}
