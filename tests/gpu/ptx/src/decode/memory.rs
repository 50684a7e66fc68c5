//! Loads, stores, atomics, fences.

use super::convert::loaded;
use super::{Decoded, Mods, Ty, vector};
use crate::body::{Body, Named};
use crate::inst::{Const, F1, Op, Order, Space, Update};
use crate::lanes::un;
use crate::operand::Operand;

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    match (base, o.len()) {
        ("ld" | "ldu", 2 | 3) => load(body, m, o),
        ("st", 2 | 3) => store(body, m, o),
        ("atom", 3 | 4) | ("red", 2) => atomic(body, base, m, o),
        ("membar", 0) => {
            let gpu = m.choose(&[("gl", true), ("sys", true), ("cta", false)]);
            Ok(gpu.map(|gpu| vec![Op::Fence { gpu }]))
        }
        ("fence", 0) => {
            let init = m.flag("mbarrier_init");
            if init || m.left.starts_with(&["proxy", "async"]) {
                // Of global memory alone: nothing here works on it beside the threads.
                let done = init || !m.flag("global");
                let known = ["proxy", "async", "release", "acquire", "cluster", "shared::cta", "shared::cluster"];
                m.left.retain(|word| !known.contains(word));
                return Ok(Some(vec![if done { Op::FenceAsync { barriers_only: init } } else { Op::Nop }]));
            }
            if m.flag("proxy") {
                let known = ["async::generic", "alias", "release", "acquire", "cluster", "global", "shared::cta"];
                m.left.retain(|word| !known.contains(word) && !word.starts_with("async."));
                return Ok(Some(vec![Op::Nop]));
            }
            let order = m.flag("sc") || m.flag("acq_rel");
            let gpu = m.choose(&[("gpu", true), ("sys", true), ("cluster", true), ("cta", false)]);
            Ok(gpu.filter(|_| order).map(|gpu| vec![Op::Fence { gpu }]))
        }
        // Hints: nothing depends on them.
        ("prefetch" | "prefetchu" | "discard" | "applypriority", _) => {
            m.left.clear();
            Ok(Some(vec![Op::Nop]))
        }
        ("createpolicy", _) => {
            m.left.clear();
            let zero = body.constant(Const::Value(0));
            Ok(Some(vec![Op::Un { f: un!(|a| a), g: None, d: body.dst(&o[0])?, a: zero }]))
        }
        _ => Ok(None),
    }
}

fn order(m: &mut Mods) -> Order {
    let order = m.choose(&[
        ("weak", Order::Weak),
        ("volatile", Order::Strong),
        ("relaxed", Order::Strong),
        ("acquire", Order::Acquire),
        ("release", Order::Release),
        ("acq_rel", Order::AcqRel),
    ]);
    for scope in ["cta", "cluster", "gpu", "sys"] {
        m.flag(scope);
    }
    order.unwrap_or(Order::Weak)
}

pub(super) fn space(m: &mut Mods) -> Space {
    m.choose(&[
        ("global", Space::Global),
        ("const", Space::Const),
        ("shared", Space::Shared),
        ("shared::cta", Space::Shared),
        ("local", Space::Local),
        ("param", Space::Param),
        ("param::entry", Space::Param),
        ("param::func", Space::Param),
    ])
    .unwrap_or(Space::Generic)
}

/// Where data should stay in caches: of no consequence here.
fn cache_hints(m: &mut Mods) {
    m.left.retain(|word| {
        !word.starts_with("L1::") && !word.starts_with("L2::") && !["ca", "cg", "cs", "lu", "cv", "wb", "wt"].contains(word)
    });
}

/// Elements of a vector.
fn lanes(m: &mut Mods) -> usize {
    m.choose(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1)
}

fn load(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let (order, space) = (order(m), space(m));
    cache_hints(m);
    let order = if m.flag("nc") { Order::Constant } else { order };
    let n = lanes(m);
    let Some(ty) = m.ty() else { return Ok(None) };
    let bytes = ty.bits() as usize / 8;
    let parts = vector(&o[0]);
    if parts.len() != n || ty == Ty::Pred || !m.left.is_empty() {
        return Ok(None);
    }
    let d = body.targets(&o[0])?;
    let extend = loaded(ty, body.width(&parts[0]));
    if space == Space::Param
        && let Operand::Memory(base, offset) = &o[1]
        && let Operand::Name(name) = &**base
        && let Some(named) = body.find(name).cloned()
    {
        let mut moves = Vec::new();
        for (i, d) in d.iter().enumerate() {
            let at = offset + (i * bytes).cast_signed() as i64;
            let a = match named {
                Named::Call(call) => body.call_slot(call, at, false)?,
                Named::KernelParam(start) => {
                    let at = start + usize::try_from(at).unwrap_or(usize::MAX / 2);
                    if !body.in_params(at + bytes - 1) {
                        return Err(body.error("beyond the parameters"));
                    }
                    body.constant(Const::Param(at, bytes))
                }
                _ => continue,
            };
            moves.extend(d.map(|d| Op::Un { f: extend, g: None, d, a }));
        }
        if !moves.is_empty() {
            return Ok(Some(moves));
        }
    }
    Ok(Some(vec![Op::Load { at: body.address(&o[1], space)?, d, bytes, extend, order }]))
}

fn store(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    const COPY: F1 = |d, a| *d = *a;
    let (order, space) = (order(m), space(m));
    cache_hints(m);
    let n = lanes(m);
    let Some(ty) = m.ty() else { return Ok(None) };
    let bytes = ty.bits() as usize / 8;
    if vector(&o[1]).len() != n || ty == Ty::Pred {
        return Ok(None);
    }
    let a = body.sources(&o[1], ty.bits())?;
    if space == Space::Param {
        let Operand::Memory(base, offset) = &o[0] else { return Ok(None) };
        let Operand::Name(name) = &**base else { return Ok(None) };
        let Some(Named::Call(call)) = body.find(name).cloned() else { return Ok(None) };
        let mut moves = Vec::new();
        for (i, a) in a.into_iter().enumerate() {
            let d = body.call_slot(call, offset + (i * bytes).cast_signed() as i64, true)?;
            moves.push(Op::Un { f: COPY, g: None, d, a });
        }
        return Ok(Some(moves));
    }
    Ok(Some(vec![Op::Store { at: body.address(&o[0], space)?, a, bytes, order }]))
}

/// `atom`, and `red`, which returns nothing.
fn atomic(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    let order = match order(m) {
        Order::Weak => Order::Strong,
        order => order,
    };
    let space = space(m);
    cache_hints(m);
    m.flag("noftz");
    let Some(name) = m.next() else { return Ok(None) };
    let Some(ty) = m.ty() else { return Ok(None) };
    let (d, rest) = if base == "atom" { (body.targets(&o[0])?[0], &o[1..]) } else { (None, o) };
    if rest.len() != if name == "cas" { 3 } else { 2 } || (base == "red" && matches!(name, "cas" | "exch")) {
        return Ok(None);
    }
    let Some(f) = update(name, ty) else { return Ok(None) };
    let at = body.address(&rest[0], space)?;
    let a = body.src(&rest[1], ty.bits())?;
    let b = if rest.len() == 3 { body.src(&rest[2], ty.bits())? } else { a };
    Ok(Some(vec![Op::Atomic { at, d, a, b, bytes: ty.bits() as usize / 8, f, order }]))
}

fn update(name: &str, ty: Ty) -> Option<Update> {
    fn single(x: u64) -> f32 {
        f32::from_bits(x as u32)
    }
    Some(match (name, ty) {
        ("add", Ty::U32 | Ty::S32) => |old, a, _| u64::from((old as u32).wrapping_add(a as u32)),
        ("add", Ty::U64) => |old, a, _| old.wrapping_add(a),
        ("add", Ty::F32) => |old, a, _| u64::from((single(old) + single(a)).to_bits()),
        ("add", Ty::F64) => |old, a, _| (f64::from_bits(old) + f64::from_bits(a)).to_bits(),
        ("min", Ty::U32 | Ty::U64) => |old, a, _| old.min(a),
        ("max", Ty::U32 | Ty::U64) => |old, a, _| old.max(a),
        ("min", Ty::S32) => |old, a, _| u64::from((old as i32).min(a as i32) as u32),
        ("max", Ty::S32) => |old, a, _| u64::from((old as i32).max(a as i32) as u32),
        ("min", Ty::S64) => |old, a, _| (old as i64).min(a as i64) as u64,
        ("max", Ty::S64) => |old, a, _| (old as i64).max(a as i64) as u64,
        ("and", Ty::B32 | Ty::B64) => |old, a, _| old & a,
        ("or", Ty::B32 | Ty::B64) => |old, a, _| old | a,
        ("xor", Ty::B32 | Ty::B64) => |old, a, _| old ^ a,
        ("exch", Ty::B32 | Ty::B64) => |_, a, _| a,
        ("cas", Ty::B16 | Ty::B32 | Ty::B64) => |old, a, b| if old == a { b } else { old },
        ("inc", Ty::U32) => |old, a, _| if old >= a { 0 } else { old + 1 },
        ("dec", Ty::U32) => |old, a, _| if old == 0 || old > a { a } else { old - 1 },
        _ => return None,
    })
}
