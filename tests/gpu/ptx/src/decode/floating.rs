//! Arithmetic of f32 and f64.
#![expect(clippy::float_cmp, reason = "equal zeros differ in their signs")]

use super::arithmetic::{one, three, two};
use super::{Decoded, Mods, Ty};
use crate::body::Body;
use crate::float::{Mode, add_odd, flush, fma_odd, to_f32};
use crate::inst::{F1, F2, F3};
use crate::lanes::{bin, tri, un};
use crate::operand::Operand;

/// Bits of a result: NaN is the canonical one, subnormals are flushed and values are clamped to 0..1 if asked for.
fn out<const FTZ: bool, const SAT: bool>(x: f32) -> u64 {
    let x = if FTZ { flush(x) } else { x };
    if x.is_nan() {
        return if SAT { 0 } else { 0x7FFF_FFFF };
    }
    let x = if SAT { x.clamp(0.0, 1.0) + 0.0 } else { x };
    u64::from(x.to_bits())
}

fn get<const FTZ: bool>(x: u64) -> f32 {
    let x = f32::from_bits(x as u32);
    if FTZ { flush(x) } else { x }
}

/// The lane function of an expression over f32, for each `.ftz` and `.sat`.
macro_rules! float {
    ($kind:ident, $how:expr, |$($x:ident),+| $e:expr) => {
        Some(match $how {
            (false, false) => $kind!(|$($x),+| { $(let $x = get::<false>($x);)+ out::<false, false>($e) }),
            (true, false) => $kind!(|$($x),+| { $(let $x = get::<true>($x);)+ out::<true, false>($e) }),
            (false, true) => $kind!(|$($x),+| { $(let $x = get::<false>($x);)+ out::<false, true>($e) }),
            (true, true) => $kind!(|$($x),+| { $(let $x = get::<true>($x);)+ out::<true, true>($e) }),
        })
    };
}
/// The same for f64, which has neither.
macro_rules! double {
    ($kind:ident, |$($x:ident),+| $e:expr) => {
        Some($kind!(|$($x),+| { $(let $x = f64::from_bits($x);)+ ($e).to_bits() }))
    };
}

/// How an operation is done: rounding; `.ftz`, `.sat`; `.approx`, `.full`.
struct How {
    mode: Option<Mode>,
    plain: (bool, bool),
    approximate: bool,
}

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let mode = m.choose(&[("rn", Mode::Nearest), ("rz", Mode::Zero), ("rm", Mode::Down), ("rp", Mode::Up)]);
    let how = How { mode, plain: (m.flag("ftz"), m.flag("sat")), approximate: m.flag("approx") || m.flag("full") };
    let nan = m.flag("NaN");
    let Some(ty) = m.ty().filter(|ty| matches!(ty, Ty::F32 | Ty::F64)) else { return Ok(None) };
    let single = ty == Ty::F32;
    if nan && (!single || !matches!(base, "min" | "max")) || !single && (how.plain != (false, false) || how.approximate) {
        return Ok(None);
    }
    match o.len() {
        2 => one(body, if single { unary(base, &how) } else { unary_double(base, &how) }, o, ty.bits()),
        3 => {
            let f = match (single, nan) {
                (true, false) => binary(base, &how),
                (true, true) => extreme_nan(base, &how),
                _ => binary_double(base, &how),
            };
            two(body, f, o, [ty.bits(); 2])
        }
        4 if matches!(base, "fma" | "mad") => {
            let f = if single { fused(&how) } else { fused_double(&how) };
            f.map_or(Ok(None), |f| three(body, f, o, [ty.bits(); 3]))
        }
        _ => Ok(None),
    }
}

fn unary(base: &str, how: &How) -> Option<F1> {
    let ftz = how.plain.0;
    match (base, how.mode, how.approximate) {
        // These two are of signs, not of numbers: NaN keeps its bits.
        ("neg", None, false) if !ftz => Some(un!(|a| u64::from(a as u32 ^ 0x8000_0000))),
        ("abs", None, false) if !ftz => Some(un!(|a| a & 0x7FFF_FFFF)),
        ("neg", None, false) => float!(un, how.plain, |a| -a),
        ("abs", None, false) => float!(un, how.plain, |a| a.abs()),
        ("rcp", Some(Mode::Nearest), false) | ("rcp", None, true) => float!(un, how.plain, |a| 1.0 / a),
        ("sqrt", Some(Mode::Nearest), false) | ("sqrt", None, true) => float!(un, how.plain, |a| a.sqrt()),
        ("rsqrt", None, true) => float!(un, how.plain, |a| (1.0 / f64::from(a).sqrt()) as f32),
        ("sin", None, true) => float!(un, how.plain, |a| a.sin()),
        ("cos", None, true) => float!(un, how.plain, |a| a.cos()),
        ("lg2", None, true) => float!(un, how.plain, |a| a.log2()),
        ("ex2", None, true) => float!(un, how.plain, |a| a.exp2()),
        ("tanh", None, true) if !ftz => float!(un, how.plain, |a| a.tanh()),
        _ => None,
    }
}

fn unary_double(base: &str, how: &How) -> Option<F1> {
    match (base, how.mode) {
        ("neg", None) => Some(un!(|a| a ^ 1 << 63)),
        ("abs", None) => Some(un!(|a| a & !(1 << 63))),
        ("rcp", Some(Mode::Nearest)) => double!(un, |a| 1.0 / a),
        ("sqrt", Some(Mode::Nearest)) => double!(un, |a| a.sqrt()),
        _ => None,
    }
}

/// The smaller of two numbers; a NaN gives way to the other; -0 is less than +0.
fn min(a: f32, b: f32) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ if a == b => f32::from_bits(a.to_bits() | b.to_bits()),
        _ => {
            if a < b {
                a
            } else {
                b
            }
        }
    }
}

fn max(a: f32, b: f32) -> f32 {
    -min(-a, -b)
}

fn binary(base: &str, how: &How) -> Option<F2> {
    let mode = how.mode.unwrap_or(Mode::Nearest);
    match (base, mode, how.approximate) {
        ("add", Mode::Nearest, false) => float!(bin, how.plain, |a, b| a + b),
        ("add", Mode::Zero, false) => float!(bin, how.plain, |a, b| to_f32(add_odd(a.into(), b.into()), Mode::Zero)),
        ("add", Mode::Down, false) => float!(bin, how.plain, |a, b| to_f32(add_odd(a.into(), b.into()), Mode::Down)),
        ("add", Mode::Up, false) => float!(bin, how.plain, |a, b| to_f32(add_odd(a.into(), b.into()), Mode::Up)),
        ("sub", Mode::Nearest, false) => float!(bin, how.plain, |a, b| a - b),
        ("mul", Mode::Nearest, false) => float!(bin, how.plain, |a, b| a * b),
        ("mul", Mode::Zero, false) => float!(bin, how.plain, |a, b| to_f32(f64::from(a) * f64::from(b), Mode::Zero)),
        ("mul", Mode::Down, false) => float!(bin, how.plain, |a, b| to_f32(f64::from(a) * f64::from(b), Mode::Down)),
        ("mul", Mode::Up, false) => float!(bin, how.plain, |a, b| to_f32(f64::from(a) * f64::from(b), Mode::Up)),
        ("div", Mode::Nearest, _) if how.mode.is_some() != how.approximate => float!(bin, how.plain, |a, b| a / b),
        ("min", _, false) if how.mode.is_none() => float!(bin, how.plain, |a, b| min(a, b)),
        ("max", _, false) if how.mode.is_none() => float!(bin, how.plain, |a, b| max(a, b)),
        ("copysign", _, false) if how.mode.is_none() && how.plain == (false, false) => {
            Some(bin!(|a, b| b & 0x7FFF_FFFF | a & 0x8000_0000))
        }
        _ => None,
    }
}

/// `min.NaN`, `max.NaN`: NaN if one of them is.
fn extreme_nan(base: &str, how: &How) -> Option<F2> {
    match base {
        _ if how.mode.is_some() || how.approximate => None,
        "min" => float!(bin, how.plain, |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { min(a, b) }),
        _ => float!(bin, how.plain, |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { max(a, b) }),
    }
}

fn binary_double(base: &str, how: &How) -> Option<F2> {
    match (base, how.mode) {
        ("add", Some(Mode::Nearest) | None) => double!(bin, |a, b| a + b),
        ("sub", Some(Mode::Nearest) | None) => double!(bin, |a, b| a - b),
        ("mul", Some(Mode::Nearest) | None) => double!(bin, |a, b| a * b),
        ("div", Some(Mode::Nearest)) => double!(bin, |a, b| a / b),
        ("min", None) => double!(bin, |a, b| a.min(b)),
        ("max", None) => double!(bin, |a, b| a.max(b)),
        _ => None,
    }
}

fn fused(how: &How) -> Option<F3> {
    match how.mode {
        _ if how.approximate => None,
        Some(Mode::Nearest) => float!(tri, how.plain, |a, b, c| fma_odd(a, b, c) as f32),
        Some(Mode::Zero) => float!(tri, how.plain, |a, b, c| to_f32(fma_odd(a, b, c), Mode::Zero)),
        Some(Mode::Down) => float!(tri, how.plain, |a, b, c| to_f32(fma_odd(a, b, c), Mode::Down)),
        Some(Mode::Up) => float!(tri, how.plain, |a, b, c| to_f32(fma_odd(a, b, c), Mode::Up)),
        None => None,
    }
}

fn fused_double(how: &How) -> Option<F3> {
    if how.mode == Some(Mode::Nearest) { double!(tri, |a, b, c| a.mul_add(b, c)) } else { None }
}
