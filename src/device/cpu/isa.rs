//! Which instructions the kernels are compiled for, chosen at run time. Knows nothing of what a kernel computes.
//! Invariant: an [`Isa`] other than portable exists only on a machine that has its instructions, so holding one is the
//! proof that a kernel may be entered.

#[cfg(target_arch = "x86_64")]
use super::dots_x86 as dots;
use super::tile::Unit;
#[cfg(target_arch = "x86_64")]
use super::tile::amx;
#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;

/// An instruction-set path of the kernels. All paths give the same bits, unless a device's fingerprint says
/// otherwise; they differ in speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Path);

/// The paths themselves; private, so that [`Isa`] can only be made by asking the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// AVX-512 as below, and tiles of bfloat16 (AMX).
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 as below, and dot products of bfloat16 (AVX-512 BF16).
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// NEON as below, and dot products of unsigned and signed bytes (`FEAT_I8MM`).
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
    /// NEON as below, and dot products of signed bytes (`FEAT_DotProd`).
    #[cfg(target_arch = "aarch64")]
    NeonDotprod,
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// Whatever the compiler was told the machine has.
    Portable,
}

impl Isa {
    /// The path without special instructions: slow, there on every machine.
    pub const PORTABLE: Self = Self(Path::Portable);

    /// The fastest path of this machine.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// All paths this machine can run, the fastest first.
    pub fn available() -> Vec<Self> {
        let mut paths = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                if amx::is_there() {
                    paths.push(Self(Path::Amx));
                }
                if dots::rounds_as_documented() {
                    paths.push(Self(Path::Avx512Bf16));
                }
                paths.push(Self(Path::Avx512Vnni));
            }
            if avx2 {
                paths.push(Self(Path::Avx2));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if is_aarch64_feature_detected!("neon") {
            if is_aarch64_feature_detected!("i8mm") {
                paths.push(Self(Path::NeonI8mm));
            }
            if is_aarch64_feature_detected!("dotprod") {
                paths.push(Self(Path::NeonDotprod));
            }
            paths.push(Self(Path::Neon));
        }
        paths.push(Self::PORTABLE);
        paths
    }

    /// A path by its [`Isa::name`], if this machine can run it.
    pub fn named(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|isa| isa.name() == name)
    }

    /// `amx`, `avx512-bf16`, `avx512-vnni`, `avx2`, `neon-i8mm`, `neon-dotprod`, `neon` or `portable`.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Path::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Path::NeonI8mm => "neon-i8mm",
            #[cfg(target_arch = "aarch64")]
            Path::NeonDotprod => "neon-dotprod",
            #[cfg(target_arch = "aarch64")]
            Path::Neon => "neon",
            Path::Portable => "portable",
        }
    }

    /// Whether it has a unit for tiles of bfloat16.
    pub fn has_tiles(self) -> bool {
        self.unit() != Unit::Vector
    }

    /// Whether its dot products of bfloat16 outdo its multiplications of f32. Known by who made the processor: AMD's start
    /// as many of the one as of the other, with twice the work in each; Intel's start a quarter as many.
    pub fn has_fast_dots(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            self.0 == Path::Avx512Bf16 && dots::is_amd()
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            false
        }
    }

    /// What the fingerprint says of dot products of bfloat16: empty where they give the bits of every other path.
    pub(super) fn own_dots(self) -> &'static str {
        #[cfg(target_arch = "x86_64")]
        if self.has_bf16() {
            return dots::own();
        }
        ""
    }

    /// Whether AVX-512 BF16 may be used.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_bf16(self) -> bool {
        match self.0 {
            // Every processor with tiles of bfloat16 has it (Sapphire Rapids on), but what a virtual machine shows of one may not.
            Path::Amx => dots::rounds_as_documented(),
            Path::Avx512Bf16 => true,
            _ => false,
        }
    }

    /// What multiplies tiles.
    pub(super) fn unit(self) -> Unit {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Path::Amx => Unit::Amx,
            _ => Unit::Vector,
        }
    }

    /// The path, for [`per_isa`].
    pub(super) fn path(self) -> Path {
        self.0
    }
}

/// Compiles `body::<S>(s, args)` once per instruction set and gives `name(isa, args)`, which enters the right one.
/// The body must be `#[inline(always)]`, so that it is compiled inside the function that enables the instructions.
macro_rules! per_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path;) => {
        $(#[$doc])*
        $vis fn $name(isa: $crate::device::cpu::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn avx512(bf16: bool, $($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function enables what the token stands for.
                $body(unsafe { $crate::device::cpu::simd_x86::Avx512::new(bf16) }, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function enables what the token stands for.
                $body(unsafe { $crate::device::cpu::simd_x86::Avx2::new() }, $($arg),*)
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon,i8mm")]
            fn neon_i8mm($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function enables what the token stands for.
                $body(unsafe { $crate::device::cpu::simd_neon::Neon::<{ $crate::device::cpu::simd_neon::I8MM }>::new() }, $($arg),*)
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon,dotprod")]
            fn neon_dotprod($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function enables what the token stands for.
                $body(unsafe { $crate::device::cpu::simd_neon::Neon::<{ $crate::device::cpu::simd_neon::DOTPROD }>::new() }, $($arg),*)
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon")]
            fn neon($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function enables what the token stands for.
                $body(unsafe { $crate::device::cpu::simd_neon::Neon::<{ $crate::device::cpu::simd_neon::PLAIN }>::new() }, $($arg),*)
            }
            match isa.path() {
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::isa::Path::Amx
                | $crate::device::cpu::isa::Path::Avx512Bf16
                | $crate::device::cpu::isa::Path::Avx512Vnni => {
                    // SAFETY: an `Isa` of this path is made only where the machine has these instructions.
                    unsafe { avx512(isa.has_bf16(), $($arg),*) }
                }
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::isa::Path::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "aarch64")]
                $crate::device::cpu::isa::Path::NeonI8mm => unsafe { neon_i8mm($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "aarch64")]
                $crate::device::cpu::isa::Path::NeonDotprod => unsafe { neon_dotprod($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "aarch64")]
                $crate::device::cpu::isa::Path::Neon => unsafe { neon($($arg),*) },
                $crate::device::cpu::isa::Path::Portable => $body($crate::device::cpu::simd::Portable, $($arg),*),
            }
        }
    };
}
pub(super) use per_isa;
