//! What happened before what in a block: vector clocks of its warps, and of the unit that does bulk copies.

/// Each agent's knowledge of all agents' times. An access is stamped with its agent's own time, which a release advances;
/// who knows of that time has been told of the access.
#[derive(Debug, Default)]
pub(crate) struct Clocks {
    n: usize,
    /// Row by row: what an agent knows.
    times: Vec<u32>,
}

impl Clocks {
    /// For a new block. Its times are later than all before, so that older stamps count as known.
    pub(crate) fn reset(&mut self, n: usize) {
        let start = self.times.iter().max().copied().unwrap_or(0) + 1;
        self.n = n;
        self.times.clear();
        self.times.resize(n * n, start);
        for agent in 0..n {
            self.times[agent * n + agent] = start + 1;
        }
    }

    pub(crate) fn known(&self, agent: usize) -> &[u32] {
        &self.times[agent * self.n..][..self.n]
    }

    pub(crate) fn own(&self, agent: usize) -> u32 {
        self.times[agent * self.n + agent]
    }

    /// What the agent knows is put with what is there; what it does from here on is not.
    pub(crate) fn release(&mut self, agent: usize, into: &mut Vec<u32>) {
        into.resize(self.n, 0);
        for (into, time) in into.iter_mut().zip(self.known(agent)) {
            *into = (*into).max(*time);
        }
        self.times[agent * self.n + agent] += 1;
    }

    pub(crate) fn acquire(&mut self, agent: usize, from: &[u32]) {
        for (time, from) in self.times[agent * self.n..][..self.n].iter_mut().zip(from) {
            *time = (*time).max(*from);
        }
    }
}
