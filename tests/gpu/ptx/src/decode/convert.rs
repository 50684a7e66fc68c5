//! Conversions (`cvt`) and addresses of state spaces (`cvta`).

use super::arithmetic::two;
use super::{Decoded, Mods, Ty};
use crate::body::Body;
use crate::float::{E4M3, E5M2, Mode, flush, from_bf16, from_f16, to_bf16, to_f16, to_f32};
use crate::inst::{F1, F2, Op};
use crate::lanes::{bin, un};
use crate::memory::{LOCAL_BASE, PARAM_BASE, SHARED_BASE};
use crate::operand::Operand;

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    match (base, o.len()) {
        ("cvta", 2) => address(body, m, o),
        ("cvt", 2) => single(body, m, o),
        ("cvt", 3) => packed(body, m, o),
        _ => Ok(None),
    }
}

/// Generic addresses are global ones, or ones in windows for shared and local memory and parameters.
fn address(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let to = m.flag("to");
    let space = m.next();
    if m.ty() != Some(Ty::U64) {
        return Ok(None);
    }
    let f = match (space, to) {
        (Some("global" | "const"), _) => un!(|a| a),
        (Some("shared" | "shared::cta"), false) => un!(|a| a.wrapping_add(SHARED_BASE)),
        (Some("shared" | "shared::cta"), true) => un!(|a| a.wrapping_sub(SHARED_BASE)),
        (Some("local"), false) => un!(|a| a.wrapping_add(LOCAL_BASE)),
        (Some("local"), true) => un!(|a| a.wrapping_sub(LOCAL_BASE)),
        (Some("param"), false) => un!(|a| a.wrapping_add(PARAM_BASE)),
        (Some("param"), true) => un!(|a| a.wrapping_sub(PARAM_BASE)),
        _ => return Ok(None),
    };
    Ok(Some(vec![Op::Un { f, g: None, d: body.dst(&o[0])?, a: body.src(&o[1], 64)? }]))
}

/// `.rni` and so on, or `.rn` and so on: (direction, to an integer).
fn rounding(m: &mut Mods) -> Option<(Mode, bool)> {
    m.choose(&[
        ("rni", (Mode::Nearest, true)),
        ("rzi", (Mode::Zero, true)),
        ("rmi", (Mode::Down, true)),
        ("rpi", (Mode::Up, true)),
        ("rn", (Mode::Nearest, false)),
        ("rz", (Mode::Zero, false)),
        ("rm", (Mode::Down, false)),
        ("rp", (Mode::Up, false)),
    ])
}

fn single(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let round = rounding(m);
    let away = m.flag("rna");
    let (ftz, sat) = (m.flag("ftz"), m.flag("sat"));
    let (Some(to), Some(from)) = (m.ty(), m.ty()) else { return Ok(None) };
    let (d, a) = (body.dst(&o[0])?, body.src(&o[1], from.bits())?);
    let width = body.width(&o[0]);
    if width < to.bits() {
        return Ok(None);
    }
    let steps = match (from.integer(), to.integer()) {
        _ if away => (from == Ty::F32 && to == Ty::Tf32 && round.is_none() && !ftz && !sat)
            .then_some((un!(|a| a.wrapping_add(0x1000) & 0xFFFF_E000), None)),
        (true, true) if round.is_none() && !ftz => integers(from, to, width, sat),
        (true, false) if !sat && !ftz => from_integer(from, to, round),
        (false, true) => to_integer(from, to, round, ftz, width),
        (false, false) => floats(from, to, round, ftz, sat),
        _ => None,
    };
    Ok(steps.map(|(f, g)| vec![Op::Un { f, g, d, a }]))
}

/// The value as 64 bits, with its sign.
fn widened(from: Ty) -> F1 {
    match from {
        Ty::S8 => un!(|a| i64::from(a as i8) as u64),
        Ty::S16 => un!(|a| i64::from(a as i16) as u64),
        Ty::S32 => un!(|a| i64::from(a as i32) as u64),
        Ty::U8 | Ty::B8 => un!(|a| a & 0xFF),
        Ty::U16 | Ty::B16 => un!(|a| a & 0xFFFF),
        Ty::U32 | Ty::B32 => un!(|a| a & 0xFFFF_FFFF),
        _ => un!(|a| a),
    }
}

/// Cut to a type's width, then extended to the register's.
fn narrowed(to: Ty, width: u32) -> F1 {
    match (to, width) {
        (Ty::S8, 16) => un!(|a| u64::from(i16::from(a as i8) as u16)),
        (Ty::S8, 32) => un!(|a| u64::from(i32::from(a as i8) as u32)),
        (Ty::S16, 32) => un!(|a| u64::from(i32::from(a as i16) as u32)),
        (Ty::S8 | Ty::S16 | Ty::S32, 64) => widened(to),
        _ => match to.bits() {
            8 => un!(|a| a & 0xFF),
            16 => un!(|a| a & 0xFFFF),
            32 => un!(|a| a & 0xFFFF_FFFF),
            _ => un!(|a| a),
        },
    }
}

/// The lane function for loads: what was read, extended as the type says to the register's width.
pub(super) fn loaded(ty: Ty, width: u32) -> F1 {
    narrowed(ty, width)
}

fn integers(from: Ty, to: Ty, width: u32, sat: bool) -> Option<(F1, Option<F1>)> {
    if !sat {
        return Some((widened(from), Some(narrowed(to, width))));
    }
    if from == Ty::U64 || width != to.bits().max(16) {
        return None;
    }
    let clamp = match to {
        Ty::U8 => un!(|a| (a as i64).clamp(0, 255) as u64),
        Ty::U16 => un!(|a| (a as i64).clamp(0, 65535) as u64),
        Ty::U32 => un!(|a| (a as i64).clamp(0, 0xFFFF_FFFF) as u64),
        Ty::S8 => un!(|a| (a as i64).clamp(-128, 127) as u64 & 0xFFFF),
        Ty::S16 => un!(|a| (a as i64).clamp(-32768, 32767) as u64 & 0xFFFF),
        Ty::S32 => un!(|a| (a as i64).clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u64 & 0xFFFF_FFFF),
        _ => return None,
    };
    Some((widened(from), Some(clamp)))
}

fn from_integer(from: Ty, to: Ty, round: Option<(Mode, bool)>) -> Option<(F1, Option<F1>)> {
    let f = match (to, from.signed(), round?) {
        (Ty::F32, true, (Mode::Nearest, false)) => un!(|a| u64::from((a as i64 as f32).to_bits())),
        (Ty::F32, false, (Mode::Nearest, false)) => un!(|a| u64::from((a as f32).to_bits())),
        (Ty::F64, true, (Mode::Nearest, false)) => un!(|a| (a as i64 as f64).to_bits()),
        (Ty::F64, false, (Mode::Nearest, false)) => un!(|a| (a as f64).to_bits()),
        // Integers of at most 32 bits are exact in f64.
        (Ty::F32, true, (Mode::Zero, false)) if from.bits() <= 32 => {
            un!(|a| u64::from(to_f32(a as i64 as f64, Mode::Zero).to_bits()))
        }
        (Ty::F32, false, (Mode::Zero, false)) if from.bits() <= 32 => un!(|a| u64::from(to_f32(a as f64, Mode::Zero).to_bits())),
        (Ty::F16, true, (Mode::Nearest, false)) if from.bits() <= 16 => un!(|a| u64::from(to_f16(a as i64 as f32))),
        (Ty::F16, false, (Mode::Nearest, false)) if from.bits() <= 16 => un!(|a| u64::from(to_f16(a as f32))),
        _ => return None,
    };
    Some((widened(from), Some(f)))
}

/// A float's value as f64 bits: exact.
fn as_double(from: Ty, ftz: bool) -> Option<F1> {
    Some(match (from, ftz) {
        (Ty::F32, false) => un!(|a| f64::from(f32::from_bits(a as u32)).to_bits()),
        (Ty::F32, true) => un!(|a| f64::from(flush(f32::from_bits(a as u32))).to_bits()),
        (Ty::F16, false) => un!(|a| f64::from(from_f16(a as u16)).to_bits()),
        (Ty::F64, false) => un!(|a| a),
        _ => return None,
    })
}

/// Integers are clamped to the type's range. NaN is 0, or 2^63 where one of the types has 64 bits.
fn to_integer(from: Ty, to: Ty, round: Option<(Mode, bool)>, ftz: bool, width: u32) -> Option<(F1, Option<F1>)> {
    macro_rules! convert {
        ($mode:expr, $to:ty, $bits:ty) => {
            match $mode {
                Mode::Nearest => un!(|a| u64::from(f64::from_bits(a).round_ties_even() as $to as $bits)),
                Mode::Zero => un!(|a| u64::from(f64::from_bits(a).trunc() as $to as $bits)),
                Mode::Down => un!(|a| u64::from(f64::from_bits(a).floor() as $to as $bits)),
                Mode::Up => un!(|a| u64::from(f64::from_bits(a).ceil() as $to as $bits)),
            }
        };
    }
    let (mode, true) = round? else { return None };
    if width != to.bits() {
        return None;
    }
    let wide = from == Ty::F64 || to.bits() == 64;
    let f = match to {
        Ty::S32 if !wide => convert!(mode, i32, u32),
        Ty::U32 if !wide => convert!(mode, u32, u32),
        Ty::S16 if !wide => convert!(mode, i16, u16),
        Ty::U16 if !wide => convert!(mode, u16, u16),
        Ty::S64 if mode == Mode::Zero => {
            un!(|a| if f64::from_bits(a).is_nan() { 1 << 63 } else { f64::from_bits(a).trunc() as i64 as u64 })
        }
        Ty::U64 if mode == Mode::Zero => {
            un!(|a| if f64::from_bits(a).is_nan() { 1 << 63 } else { f64::from_bits(a).trunc() as u64 })
        }
        Ty::S32 if mode == Mode::Zero => {
            un!(|a| if f64::from_bits(a).is_nan() { 1 << 31 } else { u64::from(f64::from_bits(a).trunc() as i32 as u32) })
        }
        Ty::U32 if mode == Mode::Zero => {
            un!(|a| if f64::from_bits(a).is_nan() { 1 << 31 } else { u64::from(f64::from_bits(a).trunc() as u32) })
        }
        _ => return None,
    };
    Some((as_double(from, ftz)?, Some(f)))
}

fn floats(from: Ty, to: Ty, round: Option<(Mode, bool)>, ftz: bool, sat: bool) -> Option<(F1, Option<F1>)> {
    const NEAREST: Option<(Mode, bool)> = Some((Mode::Nearest, false));
    let f = match (from, to, round, ftz, sat) {
        (Ty::F32, Ty::F32, None, true, false) => un!(|a| u64::from(flush(f32::from_bits(a as u32)).to_bits())),
        (Ty::F32, Ty::F32, None, _, true) => un!(|a| {
            let a = f32::from_bits(a as u32);
            if a.is_nan() { 0 } else { u64::from((a.clamp(0.0, 1.0) + 0.0).to_bits()) }
        }),
        (Ty::F32, Ty::F32, Some((mode, true)), _, false) => return Some(whole(mode, ftz)),
        (Ty::F64, Ty::F64, Some((Mode::Nearest, true)), false, false) => un!(|a| f64::from_bits(a).round_ties_even().to_bits()),
        (Ty::F64, Ty::F64, Some((Mode::Zero, true)), false, false) => un!(|a| f64::from_bits(a).trunc().to_bits()),
        (Ty::F64, Ty::F64, Some((Mode::Down, true)), false, false) => un!(|a| f64::from_bits(a).floor().to_bits()),
        (Ty::F64, Ty::F64, Some((Mode::Up, true)), false, false) => un!(|a| f64::from_bits(a).ceil().to_bits()),
        (Ty::F32, Ty::F64, None, false, false) => un!(|a| f64::from(f32::from_bits(a as u32)).to_bits()),
        (Ty::F64, Ty::F32, NEAREST, false, false) => un!(|a| u64::from((f64::from_bits(a) as f32).to_bits())),
        (Ty::F16, Ty::F32, None, _, false) => un!(|a| u64::from(from_f16(a as u16).to_bits())),
        (Ty::Bf16, Ty::F32, None, false, false) => un!(|a| u64::from(from_bf16(a as u16).to_bits())),
        (Ty::F32, Ty::F16, NEAREST, false, false) => un!(|a| u64::from(to_f16(f32::from_bits(a as u32)))),
        (Ty::F32, Ty::Bf16, NEAREST, false, false) => un!(|a| u64::from(to_bf16(f32::from_bits(a as u32)))),
        (Ty::E4m3x2, Ty::F16x2, NEAREST, false, false) => un!(|a| unpacked(a, |byte| E4M3.decode(byte))),
        (Ty::E5m2x2, Ty::F16x2, NEAREST, false, false) => un!(|a| unpacked(a, |byte| E5M2.decode(byte))),
        _ => return None,
    };
    Some((f, None))
}

fn unpacked(a: u64, value: impl Fn(u8) -> f32) -> u64 {
    u64::from(to_f16(value(a as u8))) | u64::from(to_f16(value((a >> 8) as u8))) << 16
}

fn whole(mode: Mode, ftz: bool) -> (F1, Option<F1>) {
    let f = match mode {
        Mode::Nearest => un!(|a| u64::from(f32::from_bits(a as u32).round_ties_even().to_bits())),
        Mode::Zero => un!(|a| u64::from(f32::from_bits(a as u32).trunc().to_bits())),
        Mode::Down => un!(|a| u64::from(f32::from_bits(a as u32).floor().to_bits())),
        Mode::Up => un!(|a| u64::from(f32::from_bits(a as u32).ceil().to_bits())),
    };
    if ftz { (un!(|a| u64::from(flush(f32::from_bits(a as u32)).to_bits())), Some(f)) } else { (f, None) }
}

fn pair(a: u64, b: u64, bits: u32, f: impl Fn(f32) -> u64) -> u64 {
    f(f32::from_bits(a as u32)) << bits | f(f32::from_bits(b as u32))
}

/// Negative values and their zero become zero; NaN stays.
fn positive(x: f32) -> f32 {
    if x <= 0.0 { 0.0 } else { x }
}

/// Two f32 into the halves of a result: the first is the upper one.
fn packed(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let round = rounding(m);
    let (relu, finite) = (m.flag("relu"), m.flag("satfinite"));
    let (to, from) = (m.ty(), m.ty());
    if round != Some((Mode::Nearest, false)) || from != Some(Ty::F32) {
        return Ok(None);
    }
    let f: F2 = match (to, relu, finite) {
        (Some(Ty::Bf16x2), false, false) => bin!(|a, b| pair(a, b, 16, |x| u64::from(to_bf16(x)))),
        (Some(Ty::Bf16x2), true, false) => bin!(|a, b| pair(a, b, 16, |x| u64::from(to_bf16(positive(x))))),
        (Some(Ty::F16x2), false, false) => bin!(|a, b| pair(a, b, 16, |x| u64::from(to_f16(x)))),
        (Some(Ty::F16x2), true, false) => bin!(|a, b| pair(a, b, 16, |x| u64::from(to_f16(positive(x))))),
        (Some(Ty::E4m3x2), false, true) => bin!(|a, b| pair(a, b, 8, |x| u64::from(E4M3.encode(x)))),
        (Some(Ty::E5m2x2), false, true) => bin!(|a, b| pair(a, b, 8, |x| u64::from(E5M2.encode(x)))),
        _ => return Ok(None),
    };
    two(body, Some(f), o, [32; 2])
}
