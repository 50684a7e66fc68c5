//! Arithmetic of f16 and bf16, alone and in pairs: exact results of f32 or f64, rounded once.
#![expect(clippy::float_cmp, reason = "whether a conversion was exact")]

use super::arithmetic::{one, three, two};
use super::{Decoded, Mods, Ty};
use crate::body::Body;
use crate::float::{fma_odd, from_bf16, from_f16, to_bf16, to_f16};
use crate::lanes::{bin, tri, un};
use crate::operand::Operand;

/// f64 that was rounded to odd, to f32 in the same way: the second rounding, to 16 bits, is then the only one that shows.
fn narrow_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let exact = f64::from(nearest) == x || !nearest.is_finite() || x.is_nan();
    if exact || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    if (f64::from(nearest) < x) == (x > 0.0) {
        f32::from_bits(nearest.to_bits() + 1)
    } else {
        f32::from_bits(nearest.to_bits() - 1)
    }
}

/// For both formats, alone and in pairs: a match over the type.
macro_rules! half {
    ($kind:ident, $ty:expr, |$($x:ident),+| $e:expr) => {
        match $ty {
            Ty::F16 => Some($kind!(|$($x),+| { $(let $x = from_f16($x as u16);)+ u64::from(to_f16($e)) })),
            Ty::Bf16 => Some($kind!(|$($x),+| { $(let $x = from_bf16($x as u16);)+ u64::from(to_bf16($e)) })),
            Ty::F16x2 => Some($kind!(|$($x),+| {
                let low = { $(let $x = from_f16($x as u16);)+ u64::from(to_f16($e)) };
                let high = { $(let $x = from_f16(($x >> 16) as u16);)+ u64::from(to_f16($e)) };
                low | high << 16
            })),
            Ty::Bf16x2 => Some($kind!(|$($x),+| {
                let low = { $(let $x = from_bf16($x as u16);)+ u64::from(to_bf16($e)) };
                let high = { $(let $x = from_bf16(($x >> 16) as u16);)+ u64::from(to_bf16($e)) };
                low | high << 16
            })),
            _ => None,
        }
    };
}

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let nearest = m.flag("rn");
    let Some(ty) = m.ty().filter(|ty| matches!(ty, Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2)) else { return Ok(None) };
    let bits = ty.bits();
    match (base, o.len()) {
        ("neg", 2) if !nearest => one(body, half!(un, ty, |a| -a), o, bits),
        ("abs", 2) if !nearest => one(body, half!(un, ty, |a| a.abs()), o, bits),
        // Sums of two numbers with 11 bits may need more than f32 has: rounded to odd, they do not.
        ("add", 3) => two(body, half!(bin, ty, |a, b| narrow_odd(fma_odd(a, 1.0, b))), o, [bits; 2]),
        ("sub", 3) => two(body, half!(bin, ty, |a, b| narrow_odd(fma_odd(b, -1.0, a))), o, [bits; 2]),
        ("mul", 3) => two(body, half!(bin, ty, |a, b| a * b), o, [bits; 2]),
        ("min", 3) if !nearest => two(body, half!(bin, ty, |a, b| a.min(b)), o, [bits; 2]),
        ("max", 3) if !nearest => two(body, half!(bin, ty, |a, b| a.max(b)), o, [bits; 2]),
        ("fma", 4) if nearest => {
            let f = half!(tri, ty, |a, b, c| narrow_odd(fma_odd(a, b, c)));
            f.map_or(Ok(None), |f| three(body, f, o, [bits; 3]))
        }
        _ => Ok(None),
    }
}
