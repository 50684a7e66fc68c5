//! The CUDA kernels as machine code, without a GPU: `valar kernels build` compiles them for every architecture, and what the
//! assembler made of each (registers, spills, shared memory, instructions) is held against `tests/gpu/resources.txt`.
//!
//! The compiler and the disassembler are installed at the first use (`tests/gpu/requirements.txt`); a machine that cannot
//! install them fails.

use crate::common::{Sandbox, root};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use valar::device::cuda::{ARCHS, PROGRAMS};

/// Instructions that are counted: by how they start.
const COUNTED: &[&str] = &["HMMA", "LDSM", "LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128", "HGMMA", "UTMALDG"];

/// Where the tools are.
pub(crate) struct Tools {
    pub(crate) nvrtc: PathBuf,
    cuobjdump: PathBuf,
}

/// The tools with the versions of `tests/gpu/requirements.txt`.
pub(crate) fn tools() -> Tools {
    // Tests of one process install them once.
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _installing = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    let requirements = root().join("tests/gpu/requirements.txt");
    let wanted = fs::read_to_string(&requirements).unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-tools");
    let made_for = folder.join("made-for.txt");
    if !fs::read_to_string(&made_for).is_ok_and(|found| found == wanted) {
        let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
        let mut pip = Command::new(folder.join("bin/python"));
        run(pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--requirement"]).arg(&requirements));
        fs::write(made_for, wanted).unwrap();
    }
    let find = |name| found(&folder, name).unwrap_or_else(|| panic!("the packages have no {name}"));
    Tools { nvrtc: find("libnvrtc.so.12"), cuobjdump: find("cuobjdump") }
}

/// The file of that name in a folder or below it.
fn found(folder: &Path, name: &str) -> Option<PathBuf> {
    let (folders, files): (Vec<_>, Vec<_>) =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).partition(|path| path.is_dir() && !path.is_symlink());
    let file = files.into_iter().find(|path| path.file_name().unwrap() == name);
    file.or_else(|| folders.iter().find_map(|folder| found(folder, name)))
}

/// What a kernel became on an architecture.
#[derive(Default)]
struct Resources {
    registers: u32,
    /// Bytes of the stack and of local memory: spilled registers.
    spilled: u32,
    /// Bytes of shared memory that the kernel declares, without what the driver keeps for itself.
    shared: u32,
    /// Loads and stores of spilled registers.
    n_spills: usize,
    /// Of each of `COUNTED`.
    counts: [usize; COUNTED.len()],
}

/// What cuobjdump says of an image, by kernel.
fn resources(tools: &Tools, cubin: &Path, arch: &str) -> BTreeMap<String, Resources> {
    let say = |option: &str| {
        let output = Command::new(&tools.cuobjdump).arg(option).arg(cubin).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let mut found: BTreeMap<String, Resources> = BTreeMap::new();
    let mut name = String::new();
    for line in say("-res-usage").lines().map(str::trim) {
        if let Some(kernel) = line.strip_prefix("Function ") {
            kernel.trim_end_matches(':').clone_into(&mut name);
        } else if line.starts_with("REG:") {
            let value = |key: &str| {
                let field =
                    line.split(' ').find_map(|field| field.strip_prefix(key)).unwrap_or_else(|| panic!("{key} in {line}"));
                field.parse::<u32>().unwrap()
            };
            // From compute capability 9.0 on the figure counts 1 KiB that the driver keeps.
            let kept = if ["sm_80", "sm_86", "sm_89"].contains(&arch) { 0 } else { 1024 };
            let entry = found.entry(name.clone()).or_default();
            entry.registers = value("REG:");
            entry.spilled = value("STACK:") + value("LOCAL:");
            entry.shared = value("SHARED:").saturating_sub(kept);
        }
    }
    for line in say("-sass").lines().map(str::trim) {
        if let Some(kernel) = line.strip_prefix("Function : ") {
            kernel.clone_into(&mut name);
        }
        let Some((_, code)) = line.split_once("*/").filter(|_| line.starts_with("/*") && line.contains(';')) else { continue };
        let opcode = code.split_whitespace().find(|word| !word.starts_with('@')).unwrap_or("").replace(".NA.", ".");
        let entry = found.get_mut(&name).unwrap_or_else(|| panic!("-res-usage does not know {name}"));
        entry.n_spills += usize::from(opcode.starts_with("LDL") || opcode.starts_with("STL"));
        for (count, start) in entry.counts.iter_mut().zip(COUNTED) {
            *count += usize::from(opcode.starts_with(start));
        }
    }
    found
}

/// Threads of a block, and dynamic shared memory, of a kernel: as its head comment says.
fn launch(kernel: &str) -> (u32, u32) {
    let (family, last) = kernel.rsplit_once('_').unwrap_or((kernel, ""));
    let row = last.parse::<u32>().map_or(0, |dim| 2 * dim + 16);
    match family {
        // Queries, two stages of keys and values, mbarriers.
        "prefill_sm90" => {
            let dim: u32 = last.parse().unwrap();
            (256, 2 * dim * (if dim == 256 { 64 } else { 128 } + 4 * 64) + 32)
        }
        "prefill" => (256, if last == "256" { 3 * 64 * row } else { 2 * 64 * row }),
        "decode" => (128, 2 * 64 * row + 16 * row + 16 * 72 * 4),
        "sample" => (512, 0),
        "embed" | "gather" | "finish" | "merge" | "choose" | "add" => (128, 0),
        _ if family.starts_with("linear") => (128, 0),
        _ => (256, 0),
    }
}

/// Of a multiprocessor: shared memory (of one block at most 1 KiB less), threads. CUDA C++ Programming Guide, "Technical
/// specifications per compute capability".
fn limits(arch: &str) -> (u32, u32) {
    match arch {
        "sm_80" => (164 << 10, 2048),
        "sm_86" | "sm_89" | "sm_120" => (100 << 10, 1536),
        "sm_90a" | "sm_100a" => (228 << 10, 2048),
        _ => panic!("no limits for {arch}"),
    }
}

/// Blocks that a multiprocessor holds at once: 64 Ki registers, given to warps by 256; shared memory by 1 KiB.
fn blocks_at_once(kernel: &str, arch: &str, resources: &Resources) -> u32 {
    let ((threads, dynamic), (shared, most_threads)) = (launch(kernel), limits(arch));
    let of_warp = (resources.registers * 32).next_multiple_of(256);
    let of_block = (resources.shared + dynamic + 1024).next_multiple_of(1024);
    assert!(of_block <= shared, "{kernel} on {arch} needs {of_block} bytes of shared memory");
    (65536 / of_warp / (threads / 32)).min(shared / of_block).min(most_threads / threads)
}

/// The table as it is now: a line per kernel and architecture.
fn table(tools: &Tools, folder: &Path) -> String {
    let mut table = format!("# kernel arch registers shared blocks/SM {}\n", COUNTED.join(" "));
    for program in PROGRAMS {
        let mut kernels = BTreeMap::new();
        for arch in ARCHS {
            let start = format!("{}.{arch}.", program.name);
            let mut images = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
            let image = images.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&start));
            for (kernel, resources) in resources(tools, &image.unwrap_or_else(|| panic!("no image {start}")), arch) {
                assert_eq!((resources.spilled, resources.n_spills), (0, 0), "{kernel} spills registers on {arch}");
                needs(&kernel, arch, &resources);
                kernels.entry(kernel).or_insert_with(Vec::new).push((arch, resources));
            }
        }
        for (kernel, rows) in kernels {
            for (arch, resources) in rows {
                let counts: Vec<String> = resources.counts.iter().map(ToString::to_string).collect();
                let shared = resources.shared + launch(&kernel).1;
                let blocks = blocks_at_once(&kernel, arch, &resources);
                let Resources { registers, .. } = resources;
                writeln!(table, "{kernel} {arch} {registers} {shared} {blocks} {}", counts.join(" ")).unwrap();
            }
        }
    }
    table
}

/// What a kernel cannot do without: tensor cores fed from shared memory, which copies fill 16 bytes at a time; or wide loads
/// and stores.
fn needs(kernel: &str, arch: &str, resources: &Resources) {
    let wanted: &[usize] = match kernel {
        "merge_parts" | "sample" | "choose_experts" | "list_uses" => &[],
        _ if kernel.starts_with("prefill_sm90") => &[2, 4, 5, 6],
        _ if kernel.starts_with("prefill") => &[0, 1, 2, 4],
        _ if kernel.starts_with("decode") => &[0, 1, 2],
        _ if kernel.starts_with("quant_rows") => &[],
        _ if kernel.starts_with("linear_experts_bf16") => &[0, 2, 3],
        _ if kernel.starts_with("linear_q") || kernel.starts_with("linear_experts") => &[0, 1, 2, 3],
        _ if kernel.starts_with("add_norm") => &[3, 4],
        "embed_bf16" => &[4],
        "add_experts" | "finish_qkv" | "copy_blocks" | "gather_rows" | "gate_silu" | "gate_gelu" | "bf16_to_f16"
        | "f16_to_bf16" => &[3, 4],
        _ => &[3],
    };
    for &i in wanted {
        assert!(resources.counts[i] > 0, "{kernel} on {arch} has no {}", COUNTED[i]);
    }
}

#[test]
fn kernels_keep_to_their_table_on_every_architecture() {
    let tools = tools();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let build = &|archs: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_valar"));
        command.args(["kernels", "build", "--arch", &archs.join(","), "--out"]).arg(folder.path());
        let output = command.arg("--nvrtc").arg(&tools.nvrtc).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    std::thread::scope(|scope| {
        let half = ARCHS.len() / 2;
        scope.spawn(move || build(&ARCHS[..half]));
        build(&ARCHS[half..]);
    });
    // What is there is not compiled again.
    let again = build(ARCHS);
    assert_eq!(again.lines().count(), ARCHS.len() * PROGRAMS.len());
    assert!(again.lines().all(|line| line.ends_with("was there)")), "{again}");

    let now = table(&tools, folder.path());
    let known = fs::read_to_string(root().join("tests/gpu/resources.txt")).unwrap_or_default();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("resources.txt");
    fs::write(&path, &now).unwrap();
    let differ: Vec<&str> = now.lines().filter(|line| !known.lines().any(|known| known == *line)).collect();
    assert!(now == known, "tests/gpu/resources.txt says otherwise; the table now is {}:\n{}", path.display(), differ.join("\n"));
}

#[test]
fn without_a_compiler_it_is_said_where_it_was_looked_for() {
    let sandbox = Sandbox::new();
    let build = |arch: &str, nvrtc: &str| {
        let output =
            sandbox.command(&["kernels", "build", "--arch", arch, "--out", "kernels", "--nvrtc", nvrtc]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, words) = build("sm_80", "no/libnvrtc.so.12");
    assert!(code == Some(1) && words.contains("no/libnvrtc.so.12") && words.contains("VALAR_NVRTC"), "{words}");
    // A library, but another one.
    let (code, words) = build("sm_80", "libc.so.6");
    assert!(code == Some(1) && words.contains("libc.so.6") && words.contains("nvrtc"), "{words}");
    let (code, words) = build("sm_80,../x", "no/libnvrtc.so.12");
    assert!(code == Some(2) && words.contains("../x"), "{words}");
    assert!(!sandbox.path("kernels").exists());
}

#[test]
fn a_source_that_is_wrong_is_told_by_its_line() {
    let nvrtc = valar::device::cuda::Nvrtc::open(Some(&tools().nvrtc)).unwrap();
    assert_eq!(nvrtc.version(), (12, 9));
    let wrong = "extern \"C\" __global__ void k(float* x) {\n    *x = y;\n}\n";
    let error = nvrtc.compile(("wrong", wrong), &[], "sm_80", &[]).unwrap_err();
    assert!(format!("{error:#}").contains("wrong.cu(2)"), "{error:#}");
    let error = nvrtc.compile(("wrong", "\0"), &[], "sm_80", &[]).unwrap_err();
    assert!(format!("{error:#}").contains("nul byte"), "{error:#}");
    assert!(nvrtc.compile(("right", "__device__ int x;"), &[], "sm_1", &[]).is_err());
}
