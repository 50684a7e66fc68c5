//! What the lanes of a warp and the warps of a block do together, and the end of threads.

use super::{Decoded, Mods, Ty, pair};
use crate::body::Body;
use crate::inst::{Cond, Op, Reduction, Shuffle, Vote};
use crate::operand::Operand;

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    match (base, o.len()) {
        ("ret" | "exit", 0) => {
            m.flag("uni");
            Ok(Some(vec![Op::Exit]))
        }
        ("trap", 0) => Ok(Some(vec![Op::Trap])),
        // Hints: nothing depends on them.
        ("nanosleep", 1) if m.flag("u32") => Ok(Some(vec![Op::Nop])),
        ("setmaxnreg", 1) => {
            m.left.clear();
            Ok(Some(vec![Op::Nop]))
        }
        ("griddepcontrol", 0) if m.flag("launch_dependents") || m.flag("wait") => Ok(Some(vec![Op::Nop])),
        ("activemask", 1) if m.flag("b32") => Ok(Some(vec![Op::ActiveMask { d: body.dst(&o[0])? }])),
        ("shfl", 5) if m.flag("sync") => shuffle(body, m, o),
        ("vote", 3) if m.flag("sync") => vote(body, m, o),
        ("match", 3) if m.flag("sync") => {
            let all = m.choose(&[("all", true), ("any", false)]);
            let (Some(all), Some(ty)) = (all, m.ty()) else { return Ok(None) };
            let (d, p) = pair(&o[0]);
            let (d, p) = (body.dst(d)?, p.map(|p| body.pred(p)).transpose()?);
            Ok(Some(vec![Op::Match { d, p, a: body.src(&o[1], ty.bits())?, members: body.src(&o[2], 32)?, all }]))
        }
        ("redux", 3) if m.flag("sync") => redux(body, m, o),
        ("elect", 2) if m.flag("sync") => {
            let (d, p) = pair(&o[0]);
            let (d, p) = (body.dst(d)?, p.map_or(Ok(0), |p| body.pred(p))?);
            Ok(Some(vec![Op::Elect { d, p, members: body.src(&o[1], 32)? }]))
        }
        ("bar", 1) if m.left == ["warp", "sync"] => {
            m.left.clear();
            Ok(Some(vec![Op::WarpSync { members: body.src(&o[0], 32)? }]))
        }
        ("bar" | "barrier", _) => barrier(body, m, o),
        _ => Ok(None),
    }
}

fn shuffle(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let mode = m.choose(&[("up", Shuffle::Up), ("down", Shuffle::Down), ("bfly", Shuffle::Butterfly), ("idx", Shuffle::Index)]);
    let Some(mode) = mode.filter(|_| m.flag("b32")) else { return Ok(None) };
    let (d, p) = pair(&o[0]);
    let (d, p) = (body.dst(d)?, p.map(|p| body.pred(p)).transpose()?);
    let (a, b, c) = (body.src(&o[1], 32)?, body.src(&o[2], 32)?, body.src(&o[3], 32)?);
    Ok(Some(vec![Op::Shuffle { mode, d, p, a, b, c, members: body.src(&o[4], 32)? }]))
}

fn vote(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let mode = m.choose(&[("all", Vote::All), ("any", Vote::Any), ("uni", Vote::Uniform), ("ballot", Vote::Ballot)]);
    let (Some(mode), ty) = (mode, m.ty()) else { return Ok(None) };
    let (cond, members) = (body.cond(&o[1])?, body.src(&o[2], 32)?);
    let (d, p) = match (mode, ty) {
        (Vote::Ballot, Some(Ty::B32)) => (body.dst(&o[0])?, 0),
        (Vote::All | Vote::Any | Vote::Uniform, Some(Ty::Pred)) => (0, body.pred(&o[0])?),
        _ => return Ok(None),
    };
    Ok(Some(vec![Op::Vote { mode, d, p, cond, members }]))
}

fn redux(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let Some(name) = m.next() else { return Ok(None) };
    let f: fn(u64, u64) -> u64 = match (name, m.ty()) {
        ("add", Some(Ty::U32 | Ty::S32)) => |a, b| u64::from((a as u32).wrapping_add(b as u32)),
        ("min", Some(Ty::U32)) => u64::min,
        ("max", Some(Ty::U32)) => u64::max,
        ("min", Some(Ty::S32)) => |a, b| u64::from((a as i32).min(b as i32) as u32),
        ("max", Some(Ty::S32)) => |a, b| u64::from((a as i32).max(b as i32) as u32),
        ("and", Some(Ty::B32)) => |a, b| a & b,
        ("or", Some(Ty::B32)) => |a, b| a | b,
        ("xor", Some(Ty::B32)) => |a, b| a ^ b,
        _ => return Ok(None),
    };
    Ok(Some(vec![Op::Redux { f, d: body.dst(&o[0])?, a: body.src(&o[1], 32)?, members: body.src(&o[2], 32)? }]))
}

/// `bar.sync a{, b}`, `bar.arrive a, b`, `bar.red.op d, a{, b}, c`, and `barrier`, which are the same without the promise
/// that whole warps come: those that do not are refused when they are executed.
fn barrier(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    m.flag("cta");
    m.flag("aligned");
    let waits = m.choose(&[("sync", true), ("arrive", false)]);
    let reduce = m.flag("red");
    if reduce {
        return barrier_reduction(body, m, o);
    }
    let Some(waits) = waits.filter(|waits| o.len() == 2 || o.len() == 1 && *waits) else { return Ok(None) };
    let threads = o.get(1).map(|n| body.src(n, 32)).transpose()?;
    Ok(Some(vec![Op::Bar { id: body.src(&o[0], 32)?, threads, waits, reduce: None }]))
}

fn barrier_reduction(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    let how = m.choose(&[("and", Reduction::And), ("or", Reduction::Or), ("popc", Reduction::Popc)]);
    let (Some(how), Some(ty)) = (how, m.ty()) else { return Ok(None) };
    if !(3..=4).contains(&o.len()) || (how == Reduction::Popc) != (ty == Ty::U32) {
        return Ok(None);
    }
    let d = if ty == Ty::Pred { body.pred(&o[0])? } else { body.dst(&o[0])? };
    let cond: Cond = body.cond(&o[o.len() - 1])?;
    let threads = if o.len() == 4 { Some(body.src(&o[2], 32)?) } else { None };
    Ok(Some(vec![Op::Bar { id: body.src(&o[1], 32)?, threads, waits: true, reduce: Some((how, cond, d)) }]))
}
