//! Moves, logic, shifts and bit fields.

use super::arithmetic::{one, three, two};
use super::{Decoded, Mods, Ty};
use crate::body::{Body, Named};
use crate::inst::{F1, F2, F3, Op};
use crate::lanes::{bin, int1, tri, un};
use crate::operand::Operand;

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    match (base, o.len()) {
        ("mov", 2) => mov(body, m, o),
        ("and" | "or" | "xor", 3) | ("not", 2) => logic(body, base, m, o),
        ("cnot" | "popc" | "clz" | "brev" | "bfind", 2) => count(body, base, m, o),
        ("shl" | "shr", 3) => shift(body, base, m, o),
        ("shf", 4) => funnel(body, m, o),
        ("lop3", 5) if m.ty() == Some(Ty::B32) => {
            let Operand::Number(table) = o[4] else { return Ok(None) };
            let (a, b, c) = (body.src(&o[1], 32)?, body.src(&o[2], 32)?, body.src(&o[3], 32)?);
            Ok(Some(vec![Op::Lop3 { table: table as u8, d: body.dst(&o[0])?, a, b, c }]))
        }
        ("prmt", 4) if m.flag("b32") => three(body, tri!(permute), o, [32; 3]),
        ("bfe", 4) => {
            let ty = m.ty();
            extract(ty).map_or(Ok(None), |f| three(body, f, o, [ty.map_or(0, Ty::bits), 32, 32]))
        }
        ("bfi", 5) => insert(body, m, o),
        ("selp", 4) => {
            let Some(ty) = m.ty() else { return Ok(None) };
            let (a, b, cond) = (body.src(&o[1], ty.bits())?, body.src(&o[2], ty.bits())?, body.cond(&o[3])?);
            Ok(Some(vec![Op::Select { d: body.dst(&o[0])?, a, b, cond }]))
        }
        _ => Ok(None),
    }
}

const COPY: F1 = |d, a| *d = *a;

fn mov(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let Some(ty) = m.ty() else { return Ok(None) };
    if ty == Ty::Pred {
        let d = body.pred(&o[0])?;
        return Ok(Some(vec![match &o[1] {
            Operand::Number(value) => Op::SetPred { d, value: *value != 0 },
            other => Op::Logic { f: |a, _| a, d, a: body.cond(other)?, b: body.cond(other)? },
        }]));
    }
    let part = |n: usize| ty.bits() / u32::try_from(n.max(1)).unwrap_or(1);
    match (&o[0], &o[1]) {
        (Operand::Vector(parts), a) => {
            let bits = part(parts.len());
            let parts = body.targets(&o[0])?;
            Ok(Some(vec![Op::Unpack { parts, a: body.src(a, ty.bits())?, bits }]))
        }
        (d, Operand::Vector(parts)) => {
            let bits = part(parts.len());
            Ok(Some(vec![Op::Pack { d: body.dst(d)?, parts: body.sources(&o[1], bits)?, bits }]))
        }
        (_, Operand::Name(name)) if matches!(body.find(name), Some(Named::Call(_))) => {
            Err(body.error("the address of a call's parameter is not known"))
        }
        _ => one(body, Some(COPY), o, ty.bits()),
    }
}

fn logic(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let Some(ty) = m.ty() else { return Ok(None) };
    if ty == Ty::Pred {
        let f: fn(u32, u32) -> u32 = match base {
            "and" => |a, b| a & b,
            "or" => |a, b| a | b,
            "xor" => |a, b| a ^ b,
            _ => |a, _| !a,
        };
        let (a, b) = (body.cond(&o[1])?, body.cond(&o[o.len() - 1])?);
        return Ok(Some(vec![Op::Logic { f, d: body.pred(&o[0])?, a, b }]));
    }
    if !matches!(ty, Ty::B16 | Ty::B32 | Ty::B64) {
        return Ok(None);
    }
    match base {
        "not" => one(body, int1!(ty, |a| !a), o, ty.bits()),
        "and" => two(body, Some(bin!(|a, b| a & b)), o, [ty.bits(); 2]),
        "or" => two(body, Some(bin!(|a, b| a | b)), o, [ty.bits(); 2]),
        _ => two(body, Some(bin!(|a, b| a ^ b)), o, [ty.bits(); 2]),
    }
}

fn count(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let shift = m.flag("shiftamt");
    let Some(ty) = m.ty() else { return Ok(None) };
    let f = match (base, ty, shift) {
        ("cnot", Ty::B16 | Ty::B32 | Ty::B64, false) => Some(un!(|a| u64::from(a == 0))),
        ("popc", Ty::B32 | Ty::B64, false) => Some(un!(|a| u64::from(a.count_ones()))),
        ("clz", Ty::B32, false) => Some(un!(|a| u64::from((a as u32).leading_zeros()))),
        ("clz", Ty::B64, false) => Some(un!(|a| u64::from(a.leading_zeros()))),
        ("brev", Ty::B32, false) => Some(un!(|a| u64::from((a as u32).reverse_bits()))),
        ("brev", Ty::B64, false) => Some(un!(u64::reverse_bits)),
        ("bfind", ..) => find(ty, shift),
        _ => None,
    };
    one(body, f, o, ty.bits())
}

/// Position of the highest bit that is not the sign's, all ones if there is none; `shiftamt`: how far to shift it up.
fn find(ty: Ty, shift: bool) -> Option<F1> {
    fn position(zeros: u32, bits: u32, shift: bool) -> u64 {
        match (zeros == bits, shift) {
            (true, _) => 0xFFFF_FFFF,
            (false, true) => u64::from(zeros),
            (false, false) => u64::from(bits - 1 - zeros),
        }
    }
    fn narrow(a: i32) -> u32 {
        (if a < 0 { !a } else { a }).leading_zeros()
    }
    fn wide(a: i64) -> u32 {
        (if a < 0 { !a } else { a }).leading_zeros()
    }
    Some(match (ty, shift) {
        (Ty::U32, false) => un!(|a| position((a as u32).leading_zeros(), 32, false)),
        (Ty::U32, true) => un!(|a| position((a as u32).leading_zeros(), 32, true)),
        (Ty::S32, false) => un!(|a| position(narrow(a as i32), 32, false)),
        (Ty::S32, true) => un!(|a| position(narrow(a as i32), 32, true)),
        (Ty::U64, false) => un!(|a| position(a.leading_zeros(), 64, false)),
        (Ty::U64, true) => un!(|a| position(a.leading_zeros(), 64, true)),
        (Ty::S64, false) => un!(|a| position(wide(a as i64), 64, false)),
        (Ty::S64, true) => un!(|a| position(wide(a as i64), 64, true)),
        _ => return None,
    })
}

/// Amounts are 32 bits wide and clamped to the width.
fn shift(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let Some(ty) = m.ty() else { return Ok(None) };
    let f: Option<F2> = match (base, ty) {
        ("shl", Ty::B16) => Some(bin!(|a, n| u64::from((a as u16).checked_shl(n as u32).unwrap_or(0)))),
        ("shl", Ty::B32) => Some(bin!(|a, n| u64::from((a as u32).checked_shl(n as u32).unwrap_or(0)))),
        ("shl", Ty::B64) => Some(bin!(|a, n| a.checked_shl(n as u32).unwrap_or(0))),
        ("shr", Ty::U16 | Ty::B16) => Some(bin!(|a, n| u64::from((a as u16).checked_shr(n as u32).unwrap_or(0)))),
        ("shr", Ty::U32 | Ty::B32) => Some(bin!(|a, n| u64::from((a as u32).checked_shr(n as u32).unwrap_or(0)))),
        ("shr", Ty::U64 | Ty::B64) => Some(bin!(|a, n| a.checked_shr(n as u32).unwrap_or(0))),
        ("shr", Ty::S16) => Some(bin!(|a, n| u64::from(((a as i16) >> (n as u32).min(15)) as u16))),
        ("shr", Ty::S32) => Some(bin!(|a, n| u64::from(((a as i32) >> (n as u32).min(31)) as u32))),
        ("shr", Ty::S64) => Some(bin!(|a, n| ((a as i64) >> (n as u32).min(63)) as u64)),
        _ => None,
    };
    two(body, f, o, [ty.bits(), 32])
}

/// `shf.l`/`shf.r`: of the 64 bits (b, a), shifted by c, the high or the low half.
fn funnel(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let left = m.choose(&[("l", true), ("r", false)]);
    let clamp = m.choose(&[("clamp", true), ("wrap", false)]);
    if !m.flag("b32") {
        return Ok(None);
    }
    let f = match (left, clamp) {
        (Some(true), Some(true)) => tri!(|a, b, c| ((b << 32 | a) << (c as u32).min(32)) >> 32),
        (Some(true), Some(false)) => tri!(|a, b, c| ((b << 32 | a) << (c as u32 & 31)) >> 32),
        (Some(false), Some(true)) => tri!(|a, b, c| ((b << 32 | a) >> (c as u32).min(32)) & 0xFFFF_FFFF),
        (Some(false), Some(false)) => tri!(|a, b, c| ((b << 32 | a) >> (c as u32 & 31)) & 0xFFFF_FFFF),
        _ => return Ok(None),
    };
    three(body, f, o, [32; 3])
}

/// `prmt`: each byte of the result is one of the eight of (b, a), or that one's sign eight times.
fn permute(a: u64, b: u64, selector: u64) -> u64 {
    let bytes = b << 32 | a;
    (0..4).fold(0, |result, i| {
        let choice = selector >> (4 * i) & 15;
        let byte = bytes >> (8 * (choice & 7)) & 0xFF;
        let byte = if choice & 8 == 0 { byte } else { 0xFF * (byte >> 7) };
        result | byte << (8 * i)
    })
}

/// Length `c`, position `b`: both are bytes; bits beyond the top are the sign's, or zero.
fn extract(ty: Option<Ty>) -> Option<F3> {
    fn field(a: u64, at: u64, len: u64) -> u64 {
        let ones = 1u64.checked_shl((len & 0xFF) as u32).unwrap_or(0).wrapping_sub(1);
        a.checked_shr((at & 0xFF) as u32).unwrap_or(0) & ones
    }
    /// Signed fields are extended from their top bit.
    fn signed(a: u64, at: u64, len: u64, bits: u32) -> u64 {
        let (at, len) = ((at & 0xFF) as u32, (len & 0xFF) as u32);
        if len == 0 {
            return 0;
        }
        let bit = |i: u32| a >> i.min(bits - 1) & 1;
        let sign = bit(at.saturating_add(len - 1));
        let value = (0..bits).fold(0, |value, i| value | (if i < len && at + i < bits { bit(at + i) } else { sign }) << i);
        value & (u64::MAX >> (64 - bits))
    }
    Some(match ty? {
        Ty::U32 | Ty::U64 => tri!(field),
        Ty::S32 => tri!(|a, b, c| signed(a, b, c, 32)),
        Ty::S64 => tri!(|a, b, c| signed(a, b, c, 64)),
        _ => return None,
    })
}

/// `bfi f, a, b, c, d`: b with `d` bits from position `c` replaced by those of a; four operations of lanes.
fn insert(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let Some(ty) = m.ty().filter(|ty| matches!(ty, Ty::B32 | Ty::B64)) else { return Ok(None) };
    let bits = ty.bits();
    let (a, b, c, len) = (body.src(&o[1], bits)?, body.src(&o[2], bits)?, body.src(&o[3], 32)?, body.src(&o[4], 32)?);
    let (mask, moved, kept, d) = (body.new_register(), body.new_register(), body.new_register(), body.dst(&o[0])?);
    let ones = if bits == 32 {
        bin!(|at, len| {
            let ones = (1u64 << (len & 0xFF).min(32)) - 1;
            ones.checked_shl((at & 0xFF) as u32).unwrap_or(0) & 0xFFFF_FFFF
        })
    } else {
        bin!(|at, len| {
            let ones = 1u64.checked_shl((len & 0xFF) as u32).unwrap_or(0).wrapping_sub(1);
            ones.checked_shl((at & 0xFF) as u32).unwrap_or(0)
        })
    };
    Ok(Some(vec![
        Op::Bin { f: ones, d: mask, a: c, b: len },
        Op::Bin { f: bin!(|a, at| a.checked_shl((at & 0xFF) as u32).unwrap_or(0)), d: moved, a, b: c },
        Op::Bin { f: bin!(|b, mask| b & !mask), d: kept, a: b, b: mask },
        Op::Tri { f: tri!(|kept, moved, mask| kept | moved & mask), d, a: kept, b: moved, c: mask },
    ]))
}
