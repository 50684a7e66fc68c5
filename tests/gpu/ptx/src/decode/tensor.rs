//! Matrices in the registers of a warp: `ldmatrix`, `stmatrix`, `movmatrix`, `mma.sync`.

use super::memory::space;
use super::{Decoded, Mods, vector};
use crate::body::Body;
use crate::inst::{Element, Mma, Op};
use crate::operand::Operand;

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    if !matches!((base, o.len()), ("ldmatrix" | "stmatrix" | "movmatrix", 2) | ("mma", 4))
        || !m.flag("sync")
        || !m.flag("aligned")
    {
        return Ok(None);
    }
    if base == "mma" {
        return mma(body, m, o);
    }
    if !m.flag("m8n8") {
        return Ok(None);
    }
    let n = m.choose(&[("x1", 1), ("x2", 2), ("x4", 4)]);
    let transpose = m.flag("trans");
    if base == "movmatrix" {
        let known = transpose && m.flag("b16") && n.is_none();
        return if known { Ok(Some(vec![Op::MoveMatrix { d: body.dst(&o[0])?, a: body.src(&o[1], 32)? }])) } else { Ok(None) };
    }
    let space = space(m);
    let (memory, registers) = if base == "ldmatrix" { (&o[1], &o[0]) } else { (&o[0], &o[1]) };
    if !m.flag("b16") || n != Some(vector(registers).len()) {
        return Ok(None);
    }
    let at = body.address(memory, space)?;
    Ok(Some(vec![if base == "ldmatrix" {
        Op::LoadMatrix { at, d: body.registers_of(registers)?, transpose }
    } else {
        Op::StoreMatrix { at, a: body.sources(registers, 32)?, transpose }
    }]))
}

/// Products of 16 rows and 8 columns: bf16 and f16 with k 8 and 16, tf32 with 4 and 8, 8-bit floats and integers with 16, 32.
fn mma(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let k = m.choose(&[("m16n8k4", 4), ("m16n8k8", 8), ("m16n8k16", 16), ("m16n8k32", 32)]);
    let (true, true, Some(k)) = (m.flag("row"), m.flag("col"), k) else { return Ok(None) };
    // What is left is the types of d, a, b and c.
    if m.left.len() != 4 {
        return Ok(None);
    }
    let types: Vec<&str> = std::mem::take(&mut m.left);
    let element = |name: &str| match name {
        "bf16" => Some(Element::Bf16),
        "f16" => Some(Element::F16),
        "tf32" => Some(Element::Tf32),
        "e4m3" => Some(Element::E4m3),
        "e5m2" => Some(Element::E5m2),
        "s8" => Some(Element::S8),
        "u8" => Some(Element::U8),
        _ => None,
    };
    let (Some(a_type), Some(b_type)) = (element(types[1]), element(types[2])) else { return Ok(None) };
    let integer = |e: Element| matches!(e, Element::S8 | Element::U8);
    let eight = |e: Element| matches!(e, Element::E4m3 | Element::E5m2);
    let half_sums = types[0] == "f16";
    let fits = match (a_type, b_type, types[0]) {
        (Element::F16, Element::F16, "f16" | "f32") | (Element::Bf16, Element::Bf16, "f32") => matches!(k, 8 | 16),
        (Element::Tf32, Element::Tf32, "f32") => matches!(k, 4 | 8),
        (a, b, "s32") if integer(a) && integer(b) => matches!(k, 16 | 32),
        (a, b, "f32") if eight(a) && eight(b) => k == 32,
        _ => false,
    };
    if !fits || types[0] != types[3] {
        return Ok(None);
    }
    let per_register = match a_type {
        Element::Tf32 => 1,
        Element::F16 | Element::Bf16 => 2,
        _ => 4,
    };
    let mma = Mma {
        k,
        a_type,
        b_type,
        half_sums,
        d: body.registers_of(&o[0])?,
        a: body.sources(&o[1], 32)?,
        b: body.sources(&o[2], 32)?,
        c: body.sources(&o[3], 32)?,
    };
    let sums = if half_sums { 2 } else { 4 };
    let lengths = (mma.d.len(), mma.a.len(), mma.b.len(), mma.c.len());
    if lengths != (sums, 16 * k / 32 / per_register, 8 * k / 32 / per_register, sums) {
        return Ok(None);
    }
    Ok(Some(vec![Op::Mma(Box::new(mma))]))
}
