//! Copies that are done later, and mbarriers.

use super::{Decoded, Mods};
use crate::body::Body;
use crate::inst::{Address, Op, Phase, Space};
use crate::operand::Operand;

pub(super) fn decode(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    if base != "cp" || !m.flag("async") {
        return Ok(None);
    }
    if m.flag("bulk") {
        return bulk(body, m, o);
    }
    if m.flag("commit_group") && o.is_empty() {
        return Ok(Some(vec![Op::CopyCommit]));
    }
    if m.flag("wait_all") && o.is_empty() {
        return Ok(Some(vec![Op::CopyWait { keep: None }]));
    }
    if m.flag("wait_group") {
        let [Operand::Number(keep)] = o else { return Ok(None) };
        return Ok(Some(vec![Op::CopyWait { keep: Some(*keep as u32) }]));
    }
    if m.flag("mbarrier") {
        let counted = !m.flag("noinc");
        shared(m);
        if !m.flag("arrive") || !m.flag("b64") || o.len() != 1 {
            return Ok(None);
        }
        return Ok(Some(vec![Op::CopyArrive { bar: body.address(&o[0], Space::Shared)?, counted }]));
    }
    let all_levels = m.choose(&[("ca", true), ("cg", false)]);
    m.left.retain(|word| !word.starts_with("L2::"));
    let to_shared = shared(m);
    let (Some(all_levels), true, true) = (all_levels, to_shared, m.flag("global")) else { return Ok(None) };
    let [to, from, Operand::Number(bytes), rest @ ..] = o else { return Ok(None) };
    let bytes = *bytes as usize;
    if !(bytes == 16 || all_levels && matches!(bytes, 4 | 8)) || rest.len() > 1 {
        return Ok(None);
    }
    // The third is either how many bytes are read, the rest being zeros, or a predicate that says that none is.
    let (read, ignore) = match rest {
        [] => (None, None),
        [one] => match body.cond(one) {
            Ok(cond) => (None, Some(cond)),
            Err(_) => (Some(body.src(one, 32)?), None),
        },
        _ => return Ok(None),
    };
    let (to, from) = (body.address(to, Space::Shared)?, body.address(from, Space::Global)?);
    Ok(Some(vec![Op::Copy { to, from, bytes, read, ignore }]))
}

/// Addresses of the cluster's shared memory are those of the block's own, in clusters of one block.
fn shared(m: &mut Mods) -> bool {
    m.flag("shared") || m.flag("shared::cta") || m.flag("shared::cluster")
}

fn bulk(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    if m.flag("commit_group") && o.is_empty() {
        return Ok(Some(vec![Op::BulkCommit]));
    }
    if m.flag("wait_group") {
        m.flag("read");
        let [Operand::Number(keep)] = o else { return Ok(None) };
        return Ok(Some(vec![Op::BulkWait { keep: *keep as u32 }]));
    }
    if m.flag("tensor") {
        return tensor(body, m, o);
    }
    m.left.retain(|word| !word.starts_with("L2::"));
    let to_shared = m.left.first().is_some_and(|word| word.starts_with("shared"));
    if !shared(m) || !m.flag("global") {
        return Ok(None);
    }
    let (to, from) = if to_shared { (Space::Shared, Space::Global) } else { (Space::Global, Space::Shared) };
    let (by_barrier, by_group) = (m.flag("mbarrier::complete_tx::bytes"), m.flag("bulk_group"));
    let bar = match (to_shared, by_barrier, by_group, o.len()) {
        (true, true, false, 4) => Some(body.address(&o[3], Space::Shared)?),
        (false, false, true, 3) => None,
        _ => return Ok(None),
    };
    let (to, from) = (body.address(&o[0], to)?, body.address(&o[1], from)?);
    Ok(Some(vec![Op::Bulk { to, from, bytes: body.src(&o[2], 32)?, bar }]))
}

/// Boxes of tensors of two dimensions, to shared memory.
fn tensor(body: &mut Body, m: &mut Mods, o: &[Operand]) -> Decoded {
    m.flag("tile");
    let known = m.flag("2d") && shared(m) && m.flag("global") && m.flag("mbarrier::complete_tx::bytes");
    let [to, Operand::Place(map, place), bar] = o else { return Ok(None) };
    let ([x, y], true) = (&place[..], known) else { return Ok(None) };
    let map = Address { space: Space::Generic, base: body.src(map, 64)?, offset: 0 };
    let (to, bar) = (body.address(to, Space::Shared)?, body.address(bar, Space::Shared)?);
    Ok(Some(vec![Op::BulkBox { to, map, place: [body.src(x, 32)?, body.src(y, 32)?], bar }]))
}

/// `mbarrier.*`. Orders and scopes other than the block's acquire and release are not told apart.
pub(super) fn decode_barriers(body: &mut Body, base: &str, m: &mut Mods, o: &[Operand]) -> Decoded {
    if base != "mbarrier" {
        return Ok(None);
    }
    let what = m.next();
    for word in ["release", "acquire", "relaxed", "cta", "cluster"] {
        m.flag(word);
    }
    let expects = m.flag("expect_tx");
    let no_complete = m.flag("noComplete");
    shared(m);
    if no_complete || !m.flag("b64") && !matches!(what, Some("try_wait" | "test_wait" | "expect_tx")) {
        return Ok(None);
    }
    match (what, o) {
        (Some("init"), [bar, count]) => {
            Ok(Some(vec![Op::BarInit { bar: body.address(bar, Space::Shared)?, count: body.src(count, 32)? }]))
        }
        (Some("inval"), [bar]) => Ok(Some(vec![Op::BarInvalidate { bar: body.address(bar, Space::Shared)? }])),
        (Some("expect_tx"), [bar, bytes]) => {
            let (bar, expect) = (body.address(bar, Space::Shared)?, Some(body.src(bytes, 32)?));
            m.flag("b64");
            Ok(Some(vec![Op::BarArrive { bar, state: None, count: None, expect, arrive: false, drop: false }]))
        }
        (Some(arrive @ ("arrive" | "arrive_drop")), [state, bar, rest @ ..]) if rest.len() <= 1 => {
            let state = body.targets(state)?[0];
            let bar = body.address(bar, Space::Shared)?;
            let number = rest.first().map(|n| body.src(n, 32)).transpose()?;
            let (count, expect) = if expects { (None, number) } else { (number, None) };
            if expects && expect.is_none() {
                return Ok(None);
            }
            Ok(Some(vec![Op::BarArrive { bar, state, count, expect, arrive: true, drop: arrive == "arrive_drop" }]))
        }
        (Some(test @ ("try_wait" | "test_wait")), [p, bar, by, ..]) if o.len() == 3 || test == "try_wait" && o.len() == 4 => {
            let by_parity = m.flag("parity");
            m.flag("b64");
            let by = if by_parity { Phase::Parity(body.src(by, 32)?) } else { Phase::State(body.src(by, 64)?) };
            let (p, bar) = (body.pred(p)?, body.address(bar, Space::Shared)?);
            Ok(Some(vec![Op::BarTest { bar, p, by, blocking: test == "try_wait" }]))
        }
        _ => Ok(None),
    }
}
