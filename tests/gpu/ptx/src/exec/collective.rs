//! What the lanes of a warp do together: `shfl`, `vote`, `match`, `redux`, `elect`, `bar.warp.sync`.

use crate::fault::{FaultKind, Wrong, wrong};
use crate::inst::{Op, R, Shuffle, Vote};
use crate::warp::{Warp, lanes};

/// The lanes that take part: those that execute, which must be all that the operand names.
fn members(warp: &Warp, members: R, mask: u32) -> Result<u32, Wrong> {
    for lane in lanes(mask) {
        let named = warp.regs[members][lane] as u32;
        if named >> lane & 1 == 0 {
            return wrong(FaultKind::Divergence, lane, format!("the lane is not in its own mask of members, {named:#010x}"));
        }
        let missing = named & warp.live & !mask;
        if missing != 0 {
            return wrong(FaultKind::Divergence, lane, format!("lanes {missing:#010x} are named as members and are not here"));
        }
    }
    Ok(mask)
}

pub(super) fn step(warp: &mut Warp, op: &Op, mask: u32) -> Result<(), Wrong> {
    match op {
        Op::Shuffle { mode, d, p, a, b, c, members: named } => {
            members(warp, *named, mask)?;
            shuffle(warp, *mode, (*d, *p, *a, *b, *c), mask)?;
        }
        Op::Vote { mode, d, p, cond, members: named } => {
            let here = members(warp, *named, mask)?;
            let holds = warp.cond(*cond) & here;
            let all = |yes: bool| if yes { u32::MAX } else { 0 };
            match mode {
                Vote::Ballot => warp.set(*d, &[u64::from(holds); 32], mask),
                Vote::All => warp.set_pred(*p, all(holds == here), mask),
                Vote::Any => warp.set_pred(*p, all(holds != 0), mask),
                Vote::Uniform => warp.set_pred(*p, all(holds == here || holds == 0), mask),
            }
        }
        Op::Match { d, p, a, members: named, all } => {
            let here = members(warp, *named, mask)?;
            let values = warp.regs[*a];
            let same = |lane: usize| lanes(here).filter(|&i| values[i] == values[lane]).fold(0u32, |m, i| m | 1 << i);
            let everybody = lanes(here).all(|lane| same(lane) == here);
            let value = std::array::from_fn(|lane| match (all, everybody) {
                (true, true) => u64::from(here),
                (true, false) => 0,
                (false, _) => u64::from(same(lane)),
            });
            warp.set(*d, &value, mask);
            if let Some(p) = p {
                warp.set_pred(*p, if everybody { u32::MAX } else { 0 }, mask);
            }
        }
        Op::Redux { f, d, a, members: named } => {
            let here = members(warp, *named, mask)?;
            let value = lanes(here).map(|lane| warp.regs[*a][lane]).reduce(f).unwrap_or(0);
            warp.set(*d, &[value; 32], mask);
        }
        Op::ActiveMask { d } => warp.set(*d, &[u64::from(mask); 32], mask),
        Op::Elect { d, p, members: named } => {
            let here = members(warp, *named, mask)?;
            let leader = here.trailing_zeros();
            warp.set(*d, &[u64::from(leader); 32], mask);
            warp.set_pred(*p, 1 << leader, mask);
        }
        Op::WarpSync { members: named } => {
            members(warp, *named, mask)?;
            warp.epoch += 1;
        }
        _ => return wrong(FaultKind::Unsupported, None, "no operation of a warp's lanes"),
    }
    Ok(())
}

/// Each lane takes another's value; out of its segment, its own. The segment and its limit are in the operand c.
fn shuffle(warp: &mut Warp, mode: Shuffle, (d, p, a, b, c): (R, Option<usize>, R, R, R), mask: u32) -> Result<(), Wrong> {
    let mut value = warp.regs[a];
    let mut in_range = 0;
    for lane in lanes(mask) {
        let (by, clamp) = (warp.regs[b][lane] as usize & 31, warp.regs[c][lane] as usize & 31);
        let segment = warp.regs[c][lane] as usize >> 8 & 31;
        let (last, first) = (lane & segment | clamp & !segment, lane & segment);
        let (from, valid) = match mode {
            Shuffle::Up => (lane.wrapping_sub(by), lane.wrapping_sub(by).cast_signed() >= last.cast_signed()),
            Shuffle::Down => (lane + by, lane + by <= last),
            Shuffle::Butterfly => (lane ^ by, (lane ^ by) <= last),
            Shuffle::Index => (first | by & !segment, (first | by & !segment) <= last),
        };
        let from = if valid { from } else { lane };
        if mask >> from & 1 == 0 {
            return wrong(FaultKind::InactiveLane, lane, format!("takes the value of lane {from}, which takes no part"));
        }
        value[lane] = warp.regs[a][from];
        in_range |= u32::from(valid) << lane;
    }
    warp.set(d, &value, mask);
    if let Some(p) = p {
        warp.set_pred(p, in_range, mask);
    }
    Ok(())
}
