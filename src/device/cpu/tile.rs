//! Products of tiles of bfloat16: 16 rows by 32 elements of k times 32 elements of k by 16 columns. Knows nothing of
//! weights, keys or values.
//!
//! Invariant: an output is, over the k-tiles in order, acc += (Σ even k) + (Σ odd k), both sums an fma chain from 0 over
//! the tile's 16 pairs. That is what `TDPBF16PS` does (Intel SDM, volume 2), and what [`Unit::Vector`] does where there
//! is no such unit; results under 2^-126 aside, which the unit takes for 0.

use super::simd::{LANES, Simd};

/// Rows of a tile of activations, columns of a tile of weights.
pub(super) const TILE: usize = 16;
/// Elements of k of a tile.
pub(super) const TILE_K: usize = 32;
/// Elements of a tile that lies in one piece.
pub(super) const TILE_CELLS: usize = TILE * TILE_K;

/// What multiplies tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// The tile registers of AMX; exists only where the process may use them.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// Sixteen lanes.
    Vector,
}

/// `N` neighbours among the tiles of an operand, and how they go on over k. Left operands have rows of 32 elements of k,
/// right operands rows of 16 columns' pairs of elements, `[k / 2][column][2]`.
#[derive(Clone, Copy)]
pub(super) struct Tiles<const N: usize> {
    /// The first elements.
    pub(super) start: [*const u16; N],
    /// Bytes from row to row.
    pub(super) stride: usize,
    /// Bytes from one k-tile to the next.
    pub(super) step: usize,
}

#[cfg(target_arch = "x86_64")]
impl<const N: usize> Tiles<N> {
    /// Goes on to the next k-tile.
    #[inline(always)]
    fn advance(&mut self) {
        for start in &mut self.start {
            *start = start.wrapping_byte_add(self.step);
        }
    }
}

/// Where M by N tiles of results go: row after row of f32, the tiles of a row side by side.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) start: *mut f32,
    /// Elements from row to row.
    pub(super) stride: usize,
    /// Rows that are wanted; the others may be written or not.
    pub(super) n_rows: usize,
    /// Whether results are added to what is there.
    pub(super) add: bool,
}

impl Unit {
    /// Makes the unit ready on this thread; to be called before [`multiply`], once per piece of work.
    pub(super) fn prepare(self) {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Amx {
            // SAFETY: the unit exists only where the process may use it.
            unsafe { amx::configure() };
        }
    }
}

/// What the lanes do while a unit of its own multiplies.
pub(super) trait Meanwhile {
    /// Called once per k-tile: some of the work, which must not touch the unit.
    fn some(&mut self);
}

/// Nothing.
impl Meanwhile for () {
    #[inline(always)]
    fn some(&mut self) {}
}

/// M (1 or 2) by 2 tiles of results over `n_k` k-tiles. With `PASSING`, left tiles should not take the L1 cache from right ones,
/// which will be read again sooner.
///
/// # Safety
/// The pointers must be valid for all tiles: 16 rows of 64 bytes each, and M · 16 rows of 32 f32 of the target.
#[inline(always)]
pub(super) unsafe fn multiply<S: Simd, const M: usize, const PASSING: bool>(
    s: S,
    unit: Unit,
    (a, b): (&Tiles<M>, &Tiles<2>),
    n_k: usize,
    target: Target,
    meanwhile: &mut impl Meanwhile,
) {
    // SAFETY: passed on.
    unsafe {
        match unit {
            #[cfg(target_arch = "x86_64")]
            Unit::Amx => amx::multiply::<M, PASSING>(*a, *b, n_k, target, meanwhile),
            Unit::Vector => {
                vector(s, a, b, n_k, target);
                (0..n_k).for_each(|_| meanwhile.some());
            }
        }
    }
}

/// [`multiply`] in 16 lanes.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "read without alignment")]
unsafe fn vector<S: Simd, const M: usize>(s: S, a: &Tiles<M>, b: &Tiles<2>, n_k: usize, target: Target) {
    for row in 0..target.n_rows.min(M * TILE) {
        for column in 0..2 {
            // SAFETY: rows are under 16·M, columns under 2 and k-tiles under n_k: the caller's promise covers them.
            unsafe {
                let out = target.start.add(row * target.stride + column * LANES);
                let mut acc = if target.add { s.load(out) } else { s.splat(0.0) };
                for k in 0..n_k {
                    let a = a.start[row / TILE].byte_add(row % TILE * a.stride + k * a.step).cast::<u32>();
                    let w = b.start[column].byte_add(k * b.step);
                    let (mut even, mut odd) = (s.splat(0.0), s.splat(0.0));
                    for pair in 0..TILE_K / 2 {
                        let x = a.add(pair).read_unaligned();
                        let (w_even, w_odd) = s.load_bf16_pairs(w.byte_add(pair * b.stride));
                        even = s.fma(s.splat(f32::from_bits(x << 16)), w_even, even);
                        odd = s.fma(s.splat(f32::from_bits(x & 0xffff_0000)), w_odd, odd);
                    }
                    acc = s.add(acc, s.add(even, odd));
                }
                s.store(out, acc);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod amx {
    //! The tile registers: four for results, two for each operand.

    use super::{Meanwhile, TILE, Target, Tiles};
    use std::arch::asm;
    use std::sync::OnceLock;

    /// What `LDTILECFG` reads: palette 1, eight registers of 16 rows by 64 bytes.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIG: Config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// Whether the machine has tiles of bfloat16 and the system lets this process use them.
    pub(in super::super) fn is_there() -> bool {
        static THERE: OnceLock<bool> = OnceLock::new();
        *THERE.get_or_init(|| {
            // Leaf 7: AMX-BF16 and AMX-TILE are bits 22 and 24 of edx; there are leaves up to 7 where there is AVX-512.
            let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
            edx >> 22 & 1 == 1 && edx >> 24 & 1 == 1 && may_be_used()
        })
    }

    /// Asks Linux for the tile data state (`ARCH_REQ_XCOMP_PERM`, feature 18), for all threads of the process.
    fn may_be_used() -> bool {
        if !cfg!(target_os = "linux") {
            return false;
        }
        let (arch_prctl, request, tile_data) = (158u64, 0x1023u64, 18u64);
        let result: u64;
        // SAFETY: this system call changes nothing but what the process may use.
        unsafe {
            asm!("syscall", inlateout("rax") arch_prctl => result, in("rdi") request, in("rsi") tile_data,
                lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        result == 0
    }

    /// Gives this thread's tile registers their shape.
    ///
    /// # Safety
    /// [`is_there`] must hold.
    pub(super) unsafe fn configure() {
        // SAFETY: the configuration is valid; the caller's promise.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, preserves_flags)) };
    }

    /// A k-tile for a tile of rows, loaded by that instruction.
    macro_rules! one_row {
        ($load:literal, $a:ident, $b:ident) => {
            asm!(
                concat!($load, " tmm4, [{a0} + {sa}]"),
                "tileloadd tmm6, [{b0} + {sb}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {sb}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                a0 = in(reg) $a.start[0],
                b0 = in(reg) $b.start[0], b1 = in(reg) $b.start[1],
                sa = in(reg) $a.stride, sb = in(reg) $b.stride, options(nostack, preserves_flags, readonly),
            )
        };
    }

    /// The same k-tile for the second one.
    macro_rules! second_row {
        ($load:literal, $a:ident) => {
            asm!(
                concat!($load, " tmm5, [{a1} + {sa}]"),
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                a1 = in(reg) $a.start[M - 1], sa = in(reg) $a.stride, options(nostack, preserves_flags, readonly),
            )
        };
    }

    /// See [`super::multiply`].
    ///
    /// # Safety
    /// As there, on a thread that has called [`configure`].
    #[inline(always)]
    pub(super) unsafe fn multiply<const M: usize, const PASSING: bool>(
        mut a: Tiles<M>,
        mut b: Tiles<2>,
        n_k: usize,
        target: Target,
        meanwhile: &mut impl Meanwhile,
    ) {
        assert!(n_k > 0 && (M == 1 || M == 2));
        let c = target.start;
        let c_stride = target.stride * size_of::<f32>();
        // SAFETY: the caller's promise covers every address; only registers that hold no values of the compiler's, and the
        // target, are written.
        unsafe {
            let c1 = c.byte_add(if M == 2 { TILE * c_stride } else { 0 });
            if target.add {
                asm!("tileloadd tmm0, [{c} + {s}]", c = in(reg) c, s = in(reg) c_stride, options(nostack, preserves_flags));
                asm!("tileloadd tmm1, [{c} + {s} + 64]", c = in(reg) c, s = in(reg) c_stride, options(nostack, preserves_flags));
                if M == 2 {
                    asm!("tileloadd tmm2, [{c} + {s}]", c = in(reg) c1, s = in(reg) c_stride, options(nostack, preserves_flags));
                    asm!("tileloadd tmm3, [{c} + {s} + 64]", c = in(reg) c1, s = in(reg) c_stride, options(nostack, preserves_flags));
                }
            } else {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, preserves_flags, nomem)
                );
            }
            // The tile registers keep their values between pieces of assembly, since nothing else uses them.
            for _ in 0..n_k {
                if PASSING {
                    one_row!("tileloaddt1", a, b);
                    if M == 2 {
                        second_row!("tileloaddt1", a);
                    }
                } else {
                    one_row!("tileloadd", a, b);
                    if M == 2 {
                        second_row!("tileloadd", a);
                    }
                }
                a.advance();
                b.advance();
                meanwhile.some();
            }
            asm!("tilestored [{c} + {s}], tmm0", c = in(reg) c, s = in(reg) c_stride, options(nostack, preserves_flags));
            asm!("tilestored [{c} + {s} + 64], tmm1", c = in(reg) c, s = in(reg) c_stride, options(nostack, preserves_flags));
            if M == 2 {
                asm!("tilestored [{c} + {s}], tmm2", c = in(reg) c1, s = in(reg) c_stride, options(nostack, preserves_flags));
                asm!("tilestored [{c} + {s} + 64], tmm3", c = in(reg) c1, s = in(reg) c_stride, options(nostack, preserves_flags));
            }
        }
    }
}
