//! Products of warpgroups: `wgmma`.

use super::{Decoded, Mods, vector};
use crate::body::Body;
use crate::inst::{Cond, Factor, Op, P, Product};
use crate::operand::Operand;

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    if base != "wgmma" {
        return Ok(None);
    }
    let what = m.next();
    if !m.flag("sync") || !m.flag("aligned") {
        return Ok(None);
    }
    match (what, o) {
        (Some("fence"), []) => Ok(Some(vec![Op::ProductFence])),
        (Some("commit_group"), []) => Ok(Some(vec![Op::ProductCommit])),
        (Some("wait_group"), [Operand::Number(keep)]) => Ok(Some(vec![Op::ProductWait { keep: *keep as u32 }])),
        (Some("mma_async"), _) => product(body, m, o),
        _ => Ok(None),
    }
}

/// `wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16 d, a, b-descriptor, adds, 1, 1{, 0}, b by columns`: without negations, and
/// with a by rows.
fn product(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let shape = m.next().and_then(|word| word.strip_prefix("m64n")?.strip_suffix("k16")?.parse::<usize>().ok());
    let Some(n) = shape.filter(|n| n.is_multiple_of(8) && (8..=256).contains(n)) else { return Ok(None) };
    if m.left != ["f32", "bf16", "bf16"] {
        return Ok(None);
    }
    m.left.clear();
    let [d, a, b, adds, rest @ ..] = o else { return Ok(None) };
    let numbers: Vec<u64> = rest.iter().filter_map(|o| if let Operand::Number(n) = o { Some(*n) } else { None }).collect();
    let in_registers = matches!(a, Operand::Vector(_));
    let b_by_columns = match (in_registers, &numbers[..]) {
        (true, [1, 1, by @ (0 | 1)]) | (false, [1, 1, 0, by @ (0 | 1)]) if rest.len() == numbers.len() => *by == 1,
        _ => return Ok(None),
    };
    let adds = match adds {
        Operand::Number(1) => None,
        // Predicate 0 is nobody's, and false.
        Operand::Number(0) => Some(Cond { p: P::default(), negate: false }),
        other => Some(body.cond(other)?),
    };
    let d = body.registers_of(d)?;
    let a = if in_registers {
        let Ok(registers) = <[usize; 4]>::try_from(body.sources(a, 32)?) else { return Ok(None) };
        Factor::Registers(registers)
    } else {
        Factor::Shared(body.src(a, 64)?)
    };
    if d.len() != n / 2 || vector(o.first().unwrap_or(b)).len() != d.len() {
        return Ok(None);
    }
    let factors = if let Factor::Registers(a) = &a { a.to_vec() } else { Vec::new() };
    let (sums, b) = (d.clone(), body.src(b, 64)?);
    Ok(Some(vec![Op::Product(Box::new(Product { n, d, a, b, b_by_columns, adds, sums, factors, unfenced: false }))]))
}
