//! The CUDA sources, and how they are compiled. Knows nothing of who compiles them.
//!
//! Invariant: two compilations that could differ have different hashes.

/// A file of kernels, compiled on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program {
    /// What it is called: its file without the ending.
    pub name: &'static str,
    /// Its text.
    pub source: &'static str,
}

/// A program by its name.
macro_rules! program {
    ($name:literal) => {
        Program { name: $name, source: include_str!(concat!("../../../kernels/", $name, ".cu")) }
    };
}

/// All programs.
pub const PROGRAMS: &[Program] = &[
    program!("embed"),
    program!("norm"),
    program!("qkv"),
    program!("gate"),
    program!("copy"),
    program!("cast"),
    program!("scale"),
    program!("decode"),
    program!("prefill"),
    program!("prefill_sm90"),
    program!("merge"),
    program!("sample"),
    program!("linear_q"),
    program!("experts"),
    program!("linear_experts"),
];

/// What programs include, by the names that they use.
pub(super) const HEADERS: &[(&str, &str)] = &[
    ("prims.cuh", include_str!("../../../kernels/prims.cuh")),
    ("exact.cuh", include_str!("../../../kernels/exact.cuh")),
    ("linear_q.cuh", include_str!("../../../kernels/linear_q.cuh")),
    ("attention.cuh", include_str!("../../../kernels/attention.cuh")),
    ("rows.cuh", include_str!("../../../kernels/rows.cuh")),
];

/// The architectures that kernels are written and checked for, as NVRTC names them.
pub const ARCHS: &[&str] = &["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120"];

/// How programs are compiled, besides the architecture. Products and sums are fused where the source says so, nowhere else:
/// kernels that must agree in their bits could be fused differently. The assembler's figures go to the log.
pub(super) const OPTIONS: &[&str] = &["--std=c++17", "-fmad=false", "-lineinfo", "--ptxas-options=-v"];

/// Whether this can be the name of an architecture: `sm_90a` (machine code), `compute_80` (PTX).
pub(super) fn is_arch(name: &str) -> bool {
    let number = name.strip_prefix("sm_").or_else(|| name.strip_prefix("compute_"));
    number.is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()) && n.chars().all(|c| c.is_ascii_alphanumeric()))
}

/// A hash of everything that an image depends on: the program, what it may include, options, architecture and compiler.
pub(super) fn hash(program: &Program, arch: &str, compiler: (i32, i32)) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add("valar kernels 1");
    add(&format!("NVRTC {}.{}", compiler.0, compiler.1));
    add(arch);
    for option in OPTIONS {
        add(option);
    }
    for (name, text) in HEADERS {
        add(name);
        add(text);
    }
    add(program.name);
    add(program.source);
    hasher.finalize().to_hex()[..32].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_tells_everything_apart() {
        let program = PROGRAMS[0];
        let other = Program { source: "", ..program };
        let hashes = [
            hash(&program, "sm_80", (12, 9)),
            hash(&program, "sm_86", (12, 9)),
            hash(&program, "sm_80", (12, 8)),
            hash(&other, "sm_80", (12, 9)),
            hash(&PROGRAMS[1], "sm_80", (12, 9)),
        ];
        for (i, a) in hashes.iter().enumerate() {
            assert_eq!(hashes.iter().filter(|b| a == *b).count(), 1, "hash {i}");
        }
        assert_eq!(hashes[0], hash(&program, "sm_80", (12, 9)));
    }

    #[test]
    fn names_of_architectures() {
        assert!(ARCHS.iter().chain(&["compute_80", "sm_103f"]).all(|arch| is_arch(arch)));
        assert!(["", "80", "sm_", "sm_a", "sm_80,sm_86", "sm_80 ", "../sm_80", "sm_8/0"].iter().all(|arch| !is_arch(arch)));
    }
}
