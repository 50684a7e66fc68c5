//! Which processors the threads of a team use, and over which nodes of memory its data lie, from what the system tells of the
//! machine. Knows nothing of tiles. Invariant: a plan is a function of the machine, of what the process may use of it, and of
//! the number of threads.
//!
//! A thread a core: two on one core share its units, which products fill alone. A team of as many threads as there are cores is
//! placed, each thread on a core, in the order of nodes. So neighbouring threads, which take neighbouring panels of a weight
//! and each other's last tiles, are on one node, and a weight's pages are where they are used: whoever packs a panel is the
//! first to touch it, and multiplies by it. A smaller team is not placed, for another process may have taken the same cores;
//! its weights' pages go round the nodes. Those of keys and values always do: which thread reads a block changes with every step.

use std::sync::OnceLock;

/// The cores that the process may use, in the order of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Machine {
    cores: Vec<Core>,
}

/// A core, or what of it the process may use.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Core {
    /// Its node of memory.
    node: usize,
    /// Its processors: more than one where it runs several threads at a time (SMT).
    processors: Vec<usize>,
}

/// Where a team and its data are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// For each thread but the leader, which is left where it is, the processors that it stays on; empty where the system chooses.
    pub(super) places: Vec<Vec<usize>>,
    /// Nodes that pages of weights go round; none where they lie well as they are.
    pub(super) weight_nodes: Vec<usize>,
    /// Nodes that pages of keys and values go round; none where there is but one.
    pub(super) cache_nodes: Vec<usize>,
}

/// Up to so many cores a team has a thread for every processor: on a machine that small, which is one core or two of a larger
/// one, what a thread leaves of its core is more than what two take from each other. (Not measured, as everything here.)
const FEW_CORES: usize = 2;

/// Threads that use what this process may have of the machine: as many as cores (as processors, if cores are few), or as the
/// time that a container's quota allows.
pub fn default_threads() -> usize {
    // Of affinity and quota; but two threads of a core count twice.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = this_machine().cores.len();
    if cores <= FEW_CORES { processors } else { processors.min(cores) }
}

/// The plan of a team on this machine.
pub(super) fn plan(n_threads: usize) -> Plan {
    this_machine().plan(n_threads)
}

/// Read once: processors that come or go later change nothing.
fn this_machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let file = |path: &str| std::fs::read_to_string(format!("/sys/devices/system/{path}")).ok();
        Machine::read(&file, allowed())
    })
}

impl Machine {
    /// From the files under `/sys/devices/system` and the processors that the process may run on, if that is known. What is
    /// not told is taken to be simple: one node, a core a processor.
    fn read(file: &dyn Fn(&str) -> Option<String>, allowed: Option<Vec<usize>>) -> Self {
        let numbers = |path: &str| file(path).and_then(|text| list(&text));
        let online = numbers("cpu/online");
        let mut usable = allowed.or_else(|| online.clone()).unwrap_or_else(|| {
            let n = std::thread::available_parallelism().map_or(1, usize::from);
            (0..n).collect()
        });
        if let Some(online) = &online {
            // Some emulated systems tell of others than the process runs on.
            if usable.iter().any(|cpu| online.contains(cpu)) {
                usable.retain(|cpu| online.contains(cpu));
            }
        }
        let nodes: Vec<(usize, Vec<usize>)> = numbers("node/online")
            .unwrap_or_default()
            .into_iter()
            .filter_map(|node| Some((node, numbers(&format!("node/node{node}/cpulist"))?)))
            .collect();
        let mut cores: Vec<Core> = Vec::new();
        let mut seen = Vec::new();
        for &cpu in &usable {
            if seen.contains(&cpu) {
                continue;
            }
            // Older kernels have the second name only.
            let siblings = ["core_cpus_list", "thread_siblings_list"]
                .iter()
                .find_map(|name| numbers(&format!("cpu/cpu{cpu}/topology/{name}")))
                .filter(|siblings| siblings.contains(&cpu))
                .unwrap_or_else(|| vec![cpu]);
            let processors: Vec<usize> =
                siblings.into_iter().filter(|sibling| usable.contains(sibling) && !seen.contains(sibling)).collect();
            seen.extend(&processors);
            let node = nodes.iter().find(|(_, cpus)| cpus.contains(&cpu)).map_or(0, |(node, _)| *node);
            cores.push(Core { node, processors });
        }
        cores.sort_by_key(|core| (core.node, core.processors[0]));
        Self { cores }
    }

    /// Where a team of so many threads and its data are. On a machine of one node and one thread a core nothing is gained by
    /// holding threads anywhere, or pages.
    fn plan(&self, n_threads: usize) -> Plan {
        let mut nodes: Vec<usize> = self.cores.iter().map(|core| core.node).collect();
        nodes.dedup();
        if nodes.len() < 2 {
            nodes.clear();
        }
        let has_siblings = self.cores.iter().any(|core| core.processors.len() > 1);
        let is_placed = n_threads == self.cores.len() && n_threads > 1 && (has_siblings || !nodes.is_empty());
        Plan {
            places: if is_placed { self.cores[1..].iter().map(|core| core.processors.clone()).collect() } else { Vec::new() },
            weight_nodes: if is_placed { Vec::new() } else { nodes.clone() },
            cache_nodes: nodes,
        }
    }
}

/// The numbers of a list such as `0-3,8,10-11`, ascending; none if it is no such list or empty.
fn list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last - first.min(last) > 1 << 16 {
            return None;
        }
        numbers.extend(first..=last);
    }
    numbers.sort_unstable();
    numbers.dedup();
    (!numbers.is_empty()).then_some(numbers)
}

/// The processors that this thread may run on, where the system tells.
pub(super) fn allowed() -> Option<Vec<usize>> {
    #[cfg(target_os = "linux")]
    {
        let set = rustix::thread::sched_getaffinity(None).ok()?;
        let cpus: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect();
        (!cpus.is_empty()).then_some(cpus)
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Keeps the calling thread on some processors; where the system refuses, it stays wherever it is.
pub(super) fn stay_on(processors: &[usize]) {
    #[cfg(target_os = "linux")]
    {
        use rustix::thread::CpuSet;
        let mut set = CpuSet::new();
        processors.iter().filter(|&&cpu| cpu < CpuSet::MAX_CPU).for_each(|&cpu| set.set(cpu));
        if set.count() > 0 {
            rustix::thread::sched_setaffinity(None, &set).ok();
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = processors;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fmt::Write as _;

    /// The files of a made-up machine: processors of each core, and of each node.
    fn files(cores: &[Vec<usize>], nodes: &[(usize, &str)]) -> BTreeMap<String, String> {
        let text = |cpus: &[usize]| cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",") + "\n";
        let mut files = BTreeMap::from([("cpu/online".to_owned(), text(&cores.concat()))]);
        for core in cores {
            files.extend(core.iter().map(|cpu| (format!("cpu/cpu{cpu}/topology/core_cpus_list"), text(core))));
        }
        let mut online = String::new();
        for (node, cpus) in nodes {
            write!(online, "{}{node}", if online.is_empty() { "" } else { "," }).unwrap();
            files.insert(format!("node/node{node}/cpulist"), format!("{cpus}\n"));
        }
        if !nodes.is_empty() {
            files.insert("node/online".to_owned(), online + "\n");
        }
        files
    }

    fn made_up(files: &BTreeMap<String, String>, allowed: Option<Vec<usize>>) -> Machine {
        Machine::read(&|path| files.get(path).cloned(), allowed)
    }

    /// What holds of every plan: each core's processors for one thread, all of them allowed, none for two threads; the leader has no place.
    fn check(machine: &Machine, allowed: &[usize]) {
        let mut all: Vec<usize> = machine.cores.iter().flat_map(|core| core.processors.clone()).collect();
        all.sort_unstable();
        assert_eq!(all, allowed);
        for n_threads in 0..=2 * machine.cores.len() {
            let plan = machine.plan(n_threads);
            assert!(plan.places.is_empty() || plan.places.len() + 1 == n_threads);
            assert!(plan.weight_nodes.is_empty() || plan.places.is_empty());
        }
    }

    #[test]
    fn a_core_has_one_thread_and_its_siblings_stay_free() {
        // Siblings as most systems number them, and side by side.
        for sibling in [(|core| vec![core, core + 32]) as fn(usize) -> Vec<usize>, |core| vec![2 * core, 2 * core + 1]] {
            let cores: Vec<Vec<usize>> = (0..32).map(sibling).collect();
            let machine = made_up(&files(&cores, &[(0, "0-63")]), None);
            check(&machine, &(0..64).collect::<Vec<_>>());
            let plan = machine.plan(32);
            assert_eq!(plan, Plan { places: cores[1..].to_vec(), ..Plan::default() });
            // Fewer: another process may have the others. More: no core is anybody's.
            for n in [1, 16, 31, 33, 64] {
                assert_eq!(machine.plan(n), Plan::default(), "{n} threads");
            }
        }
    }

    #[test]
    fn threads_lie_side_by_side_on_a_node() {
        let cores: Vec<Vec<usize>> = (0..96).map(|core| vec![core, core + 96]).collect();
        let machine = made_up(&files(&cores, &[(0, "0-47,96-143"), (1, "48-95,144-191")]), None);
        check(&machine, &(0..192).collect::<Vec<_>>());
        assert_eq!(machine.plan(96), Plan { places: cores[1..].to_vec(), weight_nodes: vec![], cache_nodes: vec![0, 1] });
        assert_eq!(machine.plan(40), Plan { places: vec![], weight_nodes: vec![0, 1], cache_nodes: vec![0, 1] });
    }

    #[test]
    fn nodes_whose_processors_alternate_are_put_in_order() {
        let cores: Vec<Vec<usize>> = (0..16).map(|core| vec![core]).collect();
        let nodes = [(0, "0,4,8,12"), (1, "1,5,9,13"), (2, "2,6,10,14"), (3, "3,7,11,15")];
        let machine = made_up(&files(&cores, &nodes), None);
        let plan = machine.plan(16);
        assert_eq!(plan.places.concat(), [4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]);
        assert_eq!(plan.cache_nodes, [0, 1, 2, 3]);
    }

    #[test]
    fn holes_and_nodes_without_processors_are_passed_over() {
        // Processors 2 and 5 are switched off, node 1 is memory alone, and nothing tells of node 3's.
        let cores: Vec<Vec<usize>> = [0, 1, 3, 4, 6, 7].map(|cpu| vec![cpu]).into();
        let mut files = files(&cores, &[(0, "0-1,3"), (1, ""), (2, "4,6-7"), (3, "")]);
        files.remove("node/node3/cpulist");
        let machine = made_up(&files, Some((0..8).collect()));
        check(&machine, &[0, 1, 3, 4, 6, 7]);
        let plan = machine.plan(6);
        assert_eq!((plan.places.concat(), plan.cache_nodes), (vec![1, 3, 4, 6, 7], vec![0, 2]));
    }

    #[test]
    fn a_container_uses_what_it_may() {
        let cores: Vec<Vec<usize>> = (0..32).map(|core| vec![core, core + 32]).collect();
        let files = files(&cores, &[(0, "0-15,32-47"), (1, "16-31,48-63")]);
        // One core whole, one in part; all of one node.
        let machine = made_up(&files, Some(vec![3, 7, 35]));
        check(&machine, &[3, 7, 35]);
        assert_eq!(machine.plan(2), Plan { places: vec![vec![7]], ..Plan::default() });
        let confined = made_up(&files, Some(vec![3, 20]));
        assert_eq!(confined.plan(2), Plan { places: vec![vec![20]], weight_nodes: vec![], cache_nodes: vec![0, 1] });
    }

    #[test]
    fn a_system_that_tells_nothing_has_a_core_a_processor() {
        let machine = made_up(&BTreeMap::new(), Some(vec![0, 1, 5]));
        check(&machine, &[0, 1, 5]);
        assert_eq!(machine.plan(3), Plan::default());
        assert!(!made_up(&BTreeMap::new(), None).cores.is_empty());
        // Or nonsense.
        let mut files = files(&[vec![0], vec![1]], &[(0, "0-1")]);
        for text in files.values_mut() {
            "3-1,x".clone_into(text);
        }
        check(&made_up(&files, Some(vec![0, 1])), &[0, 1]);
    }

    #[test]
    fn lists_are_read() {
        assert_eq!(list("0-3,8,10-11\n").unwrap(), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(list("5").unwrap(), [5]);
        for none in ["", "\n", "a", "1-", "1,,2", "-3", "0-99999999999"] {
            assert_eq!(list(none), None, "{none:?}");
        }
    }

    /// On this machine: the plan is one that the system takes.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_stays_where_it_is_put() {
        let machine = this_machine();
        let processors: usize = machine.cores.iter().map(|core| core.processors.len()).sum();
        assert!((1..=processors).contains(&default_threads()));
        for core in &machine.cores {
            let processors = core.processors.clone();
            let there = std::thread::spawn(move || {
                stay_on(&processors);
                allowed().unwrap()
            });
            assert_eq!(there.join().unwrap(), core.processors);
        }
    }
}
