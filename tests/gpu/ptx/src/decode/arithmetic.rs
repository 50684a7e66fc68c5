//! Integer arithmetic.

use super::{Decoded, Mods, Ty};
use crate::body::Body;
use crate::inst::{F1, F2, F3, Op};
use crate::lanes::{bin, int1, int2, tri, un};
use crate::operand::Operand;

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    match (base, o.len()) {
        ("abs" | "neg", 2) => unary(body, base, m, o),
        ("mul" | "mad", _) => multiply(body, base, m, o),
        ("add" | "sub" | "div" | "rem" | "min" | "max", 3) => binary(body, base, m, o),
        ("sad", 4) => {
            let Some(ty) = m.ty() else { return Ok(None) };
            let f = match ty {
                Ty::S32 => tri!(|a, b, c| u64::from((a as i32).abs_diff(b as i32).wrapping_add(c as u32))),
                Ty::U32 => tri!(|a, b, c| u64::from((a as u32).abs_diff(b as u32).wrapping_add(c as u32))),
                _ => return Ok(None),
            };
            three(body, f, o, [32; 3])
        }
        ("dp4a", 4) => dot(body, m, o),
        _ => Ok(None),
    }
}

pub(super) fn one(body: &mut Body, f: Option<F1>, o: &[Operand], bits: u32) -> Decoded {
    let Some(f) = f else { return Ok(None) };
    Ok(Some(vec![Op::Un { f, g: None, d: body.dst(&o[0])?, a: body.src(&o[1], bits)? }]))
}

pub(super) fn two(body: &mut Body, f: Option<F2>, o: &[Operand], bits: [u32; 2]) -> Decoded {
    let Some(f) = f else { return Ok(None) };
    let (a, b) = (body.src(&o[1], bits[0])?, body.src(&o[2], bits[1])?);
    Ok(Some(vec![Op::Bin { f, d: body.dst(&o[0])?, a, b }]))
}

pub(super) fn three(body: &mut Body, f: F3, o: &[Operand], bits: [u32; 3]) -> Decoded {
    let (a, b, c) = (body.src(&o[1], bits[0])?, body.src(&o[2], bits[1])?, body.src(&o[3], bits[2])?);
    Ok(Some(vec![Op::Tri { f, d: body.dst(&o[0])?, a, b, c }]))
}

fn unary(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let Some(ty) = m.ty().filter(|ty| ty.signed()) else { return Ok(None) };
    let f = if base == "neg" {
        int1!(ty, |a| a.wrapping_neg())
    } else {
        match ty {
            Ty::S16 => Some(un!(|a| u64::from((a as i16).wrapping_abs() as u16))),
            Ty::S32 => Some(un!(|a| u64::from((a as i32).wrapping_abs() as u32))),
            Ty::S64 => Some(un!(|a| (a as i64).wrapping_abs() as u64)),
            _ => None,
        }
    };
    one(body, f, o, ty.bits())
}

fn binary(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let saturate = m.flag("sat");
    let Some(ty) = m.ty() else { return Ok(None) };
    // Division by zero gives a value that the ISA leaves open: all ones, as hardware does.
    let f = match (base, saturate) {
        ("add", true) if ty == Ty::S32 => int2!(ty, |a, b| a.saturating_add(b)),
        ("sub", true) if ty == Ty::S32 => int2!(ty, |a, b| a.saturating_sub(b)),
        ("add", false) => int2!(ty, |a, b| a.wrapping_add(b)),
        ("sub", false) => int2!(ty, |a, b| a.wrapping_sub(b)),
        ("div", false) => int2!(ty, |a, b| if b == 0 { !0 } else { a.wrapping_div(b) }),
        ("rem", false) => int2!(ty, |a, b| if b == 0 { !0 } else { a.wrapping_rem(b) }),
        ("min", false) => int2!(ty, |a, b| a.min(b)),
        ("max", false) => int2!(ty, |a, b| a.max(b)),
        _ => None,
    };
    two(body, f, o, [ty.bits(); 2])
}

#[derive(Clone, Copy, PartialEq)]
enum Half {
    Low,
    High,
    Wide,
}

fn multiply(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let half = m.choose(&[("lo", Half::Low), ("hi", Half::High), ("wide", Half::Wide)]);
    let (Some(half), Some(ty)) = (half, m.ty()) else { return Ok(None) };
    let bits = ty.bits();
    match (base, o.len()) {
        ("mul", 3) => two(body, product(half, ty), o, [bits; 2]),
        ("mad", 4) => {
            let Some(f) = sum_of_product(half, ty) else { return Ok(None) };
            three(body, f, o, [bits, bits, if half == Half::Wide { 2 * bits } else { bits }])
        }
        _ => Ok(None),
    }
}

fn product(half: Half, ty: Ty) -> Option<F2> {
    match (half, ty) {
        (Half::Low, _) => int2!(ty, |a, b| a.wrapping_mul(b)),
        (Half::Wide, Ty::U16) => Some(bin!(|a, b| u64::from(a as u16) * u64::from(b as u16))),
        (Half::Wide, Ty::S16) => Some(bin!(|a, b| u64::from((i32::from(a as i16) * i32::from(b as i16)) as u32))),
        (Half::Wide, Ty::U32) => Some(bin!(|a, b| u64::from(a as u32) * u64::from(b as u32))),
        (Half::Wide, Ty::S32) => Some(bin!(|a, b| (i64::from(a as i32) * i64::from(b as i32)) as u64)),
        (Half::High, Ty::U16) => Some(bin!(|a, b| (u64::from(a as u16) * u64::from(b as u16)) >> 16)),
        (Half::High, Ty::S16) => Some(bin!(|a, b| u64::from(((i32::from(a as i16) * i32::from(b as i16)) >> 16) as u16))),
        (Half::High, Ty::U32) => Some(bin!(|a, b| (u64::from(a as u32) * u64::from(b as u32)) >> 32)),
        (Half::High, Ty::S32) => Some(bin!(|a, b| u64::from(((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32))),
        (Half::High, Ty::U64) => Some(bin!(|a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64)),
        (Half::High, Ty::S64) => Some(bin!(|a, b| ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64)),
        _ => None,
    }
}

fn sum_of_product(half: Half, ty: Ty) -> Option<F3> {
    match (half, ty) {
        (Half::Low, Ty::U16 | Ty::S16) => {
            Some(tri!(|a, b, c| u64::from((a as u16).wrapping_mul(b as u16).wrapping_add(c as u16))))
        }
        (Half::Low, Ty::U32 | Ty::S32) => {
            Some(tri!(|a, b, c| u64::from((a as u32).wrapping_mul(b as u32).wrapping_add(c as u32))))
        }
        (Half::Low, Ty::U64 | Ty::S64) => Some(tri!(|a, b, c| a.wrapping_mul(b).wrapping_add(c))),
        (Half::Wide, Ty::U16) => {
            Some(tri!(|a, b, c| u64::from((u32::from(a as u16) * u32::from(b as u16)).wrapping_add(c as u32))))
        }
        (Half::Wide, Ty::S16) => {
            Some(tri!(|a, b, c| u64::from(((i32::from(a as i16) * i32::from(b as i16)) as u32).wrapping_add(c as u32))))
        }
        (Half::Wide, Ty::U32) => Some(tri!(|a, b, c| (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(c))),
        (Half::Wide, Ty::S32) => Some(tri!(|a, b, c| ((i64::from(a as i32) * i64::from(b as i32)) as u64).wrapping_add(c))),
        (Half::High, Ty::U32) => {
            Some(tri!(|a, b, c| u64::from((((u64::from(a as u32) * u64::from(b as u32)) >> 32) as u32).wrapping_add(c as u32))))
        }
        (Half::High, Ty::S32) => Some(tri!(|a, b, c| {
            u64::from((((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32).wrapping_add(c as u32))
        })),
        (Half::High, Ty::U64) => Some(tri!(|a, b, c| (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c))),
        (Half::High, Ty::S64) => {
            Some(tri!(|a, b, c| (((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64).wrapping_add(c)))
        }
        _ => None,
    }
}

/// `dp4a.atype.btype`: four products of bytes, added to c.
fn dot(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    fn sum(a: u64, b: u64, c: u64, signed: (bool, bool)) -> u64 {
        let byte = |x: u64, i: u32, signed: bool| {
            let byte = (x >> (8 * i)) as u8;
            if signed { i32::from(byte as i8) } else { i32::from(byte) }
        };
        let sum = (0..4).fold(c as i32, |sum, i| sum.wrapping_add(byte(a, i, signed.0) * byte(b, i, signed.1)));
        u64::from(sum as u32)
    }
    let f = match (m.ty(), m.ty()) {
        (Some(Ty::S32), Some(Ty::S32)) => tri!(|a, b, c| sum(a, b, c, (true, true))),
        (Some(Ty::U32), Some(Ty::U32)) => tri!(|a, b, c| sum(a, b, c, (false, false))),
        (Some(Ty::S32), Some(Ty::U32)) => tri!(|a, b, c| sum(a, b, c, (true, false))),
        (Some(Ty::U32), Some(Ty::S32)) => tri!(|a, b, c| sum(a, b, c, (false, true))),
        _ => return Ok(None),
    };
    three(body, f, o, [32; 3])
}
