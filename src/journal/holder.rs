//! Which process this is, and whether another one on this machine has ended. Knows nothing of leases beyond the name of their
//! holder. Invariant: a process that lives is never said to be dead; of other machines nothing is known.

use std::hash::{BuildHasher as _, RandomState};

use super::lease::Holder;

/// This process, under a name of its own for each call.
pub(super) fn this() -> Holder {
    // Two hashers are seeded apart by the system's randomness.
    let [high, low] = [(); 2].map(|()| RandomState::new().hash_one(std::process::id()));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let pid = std::process::id();
    let process = machine().zip(start_of(pid)).map(|(machine, start)| format!("{machine} {start}")).unwrap_or_default();
    Holder { token: format!("{high:016x}{low:016x}"), host, pid, process }
}

/// Whether a process was one of this machine and is gone.
pub(super) fn is_dead(holder: &Holder) -> bool {
    let (Some(machine), Some((its, start))) = (machine(), holder.process.rsplit_once(' ')) else { return false };
    its == machine && start_of(holder.pid).is_none_or(|now| now != start)
}

/// What no other machine has, nor this one after a restart, nor another container on it.
fn machine() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let numbers = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), numbers.display()))
}

/// When a process of this machine began, in the kernel's ticks; `None` if there is none, or it has ended and nobody has
/// asked how.
fn start_of(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then(|| fields.nth(18).map(str::to_owned))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_gone_is_dead() {
        let me = this();
        assert!(!is_dead(&me) && me.pid > 0 && me.token != this().token);
        assert!(is_dead(&Holder { process: format!("{} 1", machine().unwrap()), ..me.clone() }), "its number was given again");
        assert!(!is_dead(&Holder { process: "elsewhere pid:[1] 1".into(), ..me.clone() }));
        assert!(!is_dead(&Holder { process: String::new(), ..me }));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let start = start_of(child.id()).unwrap();
        let other = Holder { pid: child.id(), process: format!("{} {start}", machine().unwrap()), ..this() };
        assert!(!is_dead(&other));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_dead(&other));
    }
}
