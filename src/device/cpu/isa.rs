//! Which instructions the kernels are compiled for, chosen at run time. Knows nothing of what a kernel computes.
//! Invariant: an [`Isa`] other than portable exists only on a machine that has its instructions, so holding one is the
//! proof that a kernel may be entered.

use super::tile::Unit;
#[cfg(target_arch = "x86_64")]
use super::tile::amx;

/// An instruction-set path of the kernels. All paths give the same bits; they differ in speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Path);

/// The paths themselves; private, so that [`Isa`] can only be made by asking the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// AVX-512 as below, and tiles of bfloat16 (AMX).
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
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
                paths.push(Self(Path::Avx512Vnni));
            }
            if avx2 {
                paths.push(Self(Path::Avx2));
            }
        }
        paths.push(Self::PORTABLE);
        paths
    }

    /// A path by its [`Isa::name`], if this machine can run it.
    pub fn named(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|isa| isa.name() == name)
    }

    /// `amx`, `avx512-vnni`, `avx2` or `portable`.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Path::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => "avx2",
            Path::Portable => "portable",
        }
    }

    /// Whether it has a unit for tiles of bfloat16.
    pub fn has_tiles(self) -> bool {
        self.unit() != Unit::Vector
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
            match isa.path() {
                // SAFETY: an `Isa` of this path is made only where the machine has these instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::isa::Path::Avx512Vnni | $crate::device::cpu::isa::Path::Amx => unsafe {
                    // Every machine with tiles of bfloat16 has AVX-512 BF16 (Sapphire Rapids on).
                    avx512(isa.has_tiles(), $($arg),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::isa::Path::Avx2 => unsafe { avx2($($arg),*) },
                $crate::device::cpu::isa::Path::Portable => $body($crate::device::cpu::simd::Portable, $($arg),*),
            }
        }
    };
}
pub(super) use per_isa;
