//! Comparisons: `setp`.
#![expect(clippy::float_cmp, reason = "comparisons are what the instruction is")]

use super::{Decoded, Mods, Ty, pair};
use crate::body::Body;
use crate::inst::{Compare, Op};
use crate::lanes::{cmp2, test};
use crate::operand::Operand;

#[derive(Clone, Copy)]
enum How {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// The same, or true where an operand is NaN.
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    if base != "setp" || !(3..=4).contains(&o.len()) {
        return Ok(None);
    }
    let how = m.choose(&[
        ("eq", How::Eq),
        ("ne", How::Ne),
        ("lt", How::Lt),
        ("le", How::Le),
        ("gt", How::Gt),
        ("ge", How::Ge),
        ("lo", How::Lt),
        ("ls", How::Le),
        ("hi", How::Gt),
        ("hs", How::Ge),
        ("equ", How::Equ),
        ("neu", How::Neu),
        ("ltu", How::Ltu),
        ("leu", How::Leu),
        ("gtu", How::Gtu),
        ("geu", How::Geu),
        ("num", How::Num),
        ("nan", How::Nan),
    ]);
    let with = m.choose::<fn(u32, u32) -> u32>(&[("and", |a, b| a & b), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)]);
    let ftz = m.flag("ftz");
    let (Some(how), Some(ty)) = (how, m.ty()) else { return Ok(None) };
    if with.is_some() != (o.len() == 4) || ftz && ty != Ty::F32 {
        return Ok(None);
    }
    let f = match ty {
        Ty::F32 if ftz => flushed(how),
        Ty::F32 => single(how),
        Ty::F64 => double(how),
        _ => integer(how, ty),
    };
    let Some(f) = f else { return Ok(None) };
    let (p, q) = pair(&o[0]);
    let (p, q) = (body.pred(p)?, q.map(|q| body.pred(q)).transpose()?);
    let (a, b) = (body.src(&o[1], ty.bits())?, body.src(&o[2], ty.bits())?);
    let with = with.map(|with| body.cond(&o[3]).map(|cond| (with, cond))).transpose()?;
    Ok(Some(vec![Op::Setp { f, p, q, a, b, with }]))
}

fn integer(how: How, ty: Ty) -> Option<Compare> {
    match how {
        How::Eq => cmp2!(ty, |a, b| a == b),
        How::Ne => cmp2!(ty, |a, b| a != b),
        How::Lt => cmp2!(ty, |a, b| a < b),
        How::Le => cmp2!(ty, |a, b| a <= b),
        How::Gt => cmp2!(ty, |a, b| a > b),
        How::Ge => cmp2!(ty, |a, b| a >= b),
        _ => None,
    }
}

/// The fourteen comparisons of a float type.
macro_rules! floats {
    ($name:ident, $get:expr) => {
        fn $name(how: How) -> Option<Compare> {
            Some(match how {
                How::Eq => test!(|a, b| $get(a) == $get(b)),
                How::Ne => test!(|a, b| $get(a) < $get(b) || $get(a) > $get(b)),
                How::Lt => test!(|a, b| $get(a) < $get(b)),
                How::Le => test!(|a, b| $get(a) <= $get(b)),
                How::Gt => test!(|a, b| $get(a) > $get(b)),
                How::Ge => test!(|a, b| $get(a) >= $get(b)),
                How::Equ => test!(|a, b| $get(a) == $get(b) || $get(a).is_nan() || $get(b).is_nan()),
                How::Neu => test!(|a, b| $get(a) != $get(b)),
                How::Ltu => test!(|a, b| $get(a) < $get(b) || $get(a).is_nan() || $get(b).is_nan()),
                How::Leu => test!(|a, b| $get(a) <= $get(b) || $get(a).is_nan() || $get(b).is_nan()),
                How::Gtu => test!(|a, b| $get(a) > $get(b) || $get(a).is_nan() || $get(b).is_nan()),
                How::Geu => test!(|a, b| $get(a) >= $get(b) || $get(a).is_nan() || $get(b).is_nan()),
                How::Num => test!(|a, b| !$get(a).is_nan() && !$get(b).is_nan()),
                How::Nan => test!(|a, b| $get(a).is_nan() || $get(b).is_nan()),
            })
        }
    };
}

fn bits32(a: u64) -> f32 {
    f32::from_bits(a as u32)
}

fn bits32_flushed(a: u64) -> f32 {
    crate::float::flush(bits32(a))
}

floats!(single, bits32);
floats!(flushed, bits32_flushed);
floats!(double, f64::from_bits);
