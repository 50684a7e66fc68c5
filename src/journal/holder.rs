//! Which process this is, and whether another one on this machine has ended. Knows nothing of leases beyond the name of their
//! holder. Invariant: a process that lives is never said to be dead; of other machines nothing is known.

use std::hash::{BuildHasher as _, RandomState};

use super::lease::Holder;

/// This process, under a name of its own for each call.
pub(super) fn this() -> Holder {
    // Two hashers are seeded apart by the system's randomness.
    let [high, low] = [(); 2].map(|()| RandomState::new().hash_one(std::process::id()));
    let host = host();
    let pid = std::process::id();
    let process = machine().zip(start_of(pid)).map(|(machine, start)| format!("{machine} {start}")).unwrap_or_default();
    Holder { token: format!("{high:016x}{low:016x}"), host, pid, process }
}

/// Whether a process was one of this machine and is gone.
pub(super) fn is_dead(holder: &Holder) -> bool {
    let (Some(machine), Some((its, start))) = (machine(), holder.process.rsplit_once(' ')) else { return false };
    // Machines that go on from one snapshot have all of that in common; their names, as a rule, not.
    if its != machine || holder.host != host() {
        return false;
    }
    match start_of(holder.pid) {
        Some(now) => now != start,
        None => !hides_processes(&std::fs::read_to_string("/proc/self/mounts").unwrap_or_default()),
    }
}

/// This machine's name.
fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// Whether, by the list of what is mounted, processes of other users can't be seen.
fn hides_processes(mounts: &str) -> bool {
    let mut options = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        (words.next()? == "/proc" && words.next()? == "proc").then(|| words.next())?
    });
    // Without any such line nothing is known.
    options.next_back().is_none_or(|options| {
        options.split(',').filter_map(|option| option.strip_prefix("hidepid=")).any(|hides| hides != "0" && hides != "off")
    })
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
    fn processes_may_be_hidden() {
        let mounts = |options: &str| {
            format!("tmpfs /tmp tmpfs rw 0 0\nproc /proc proc {options} 0 0\nproc /other proc rw,hidepid=2 0 0\n")
        };
        for (options, hides) in
            [("rw,nosuid", false), ("rw,hidepid=0", false), ("rw,hidepid=2,gid=4", true), ("rw,hidepid=invisible", true)]
        {
            assert_eq!(hides_processes(&mounts(options)), hides, "{options}");
        }
        assert!(hides_processes(""));
    }

    #[test]
    fn only_what_is_gone_is_dead() {
        let me = this();
        assert!(!is_dead(&me) && me.pid > 0 && me.token != this().token);
        assert!(is_dead(&Holder { process: format!("{} 1", machine().unwrap()), ..me.clone() }), "its number was given again");
        assert!(!is_dead(&Holder { process: "elsewhere pid:[1] 1".into(), ..me.clone() }));
        assert!(!is_dead(&Holder { process: String::new(), ..me.clone() }));
        assert!(!is_dead(&Holder { process: format!("{} 1", machine().unwrap()), host: "its-twin".into(), ..me }));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let start = start_of(child.id()).unwrap();
        let other = Holder { pid: child.id(), process: format!("{} {start}", machine().unwrap()), ..this() };
        assert!(!is_dead(&other));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_dead(&other));
    }
}
