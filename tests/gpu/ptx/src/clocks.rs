//! What happened before what in a block: vector clocks of its warps, and of the unit that does bulk copies. Who works on shared
//! memory on its own (bulk copies, products of warpgroups) sees what others wrote there only behind a `fence.proxy.async`: what
//! is known to be behind one is told on as all else is.

/// Each agent's knowledge of all agents' times. An access is stamped with its agent's own time, which a release advances;
/// who knows of that time has been told of the access.
#[derive(Debug, Default)]
pub(crate) struct Clocks {
    n: usize,
    /// Row by row: what an agent knows, and what of it is behind such a fence.
    times: Vec<u32>,
}

impl Clocks {
    /// For a new block. Its times are later than all before, so that older stamps count as known.
    pub(crate) fn reset(&mut self, n: usize) {
        let start = self.times.iter().max().copied().unwrap_or(0) + 1;
        self.n = n;
        self.times.clear();
        self.times.resize(2 * n * n, start);
        for agent in 0..n {
            self.times[2 * agent * n + agent] = start + 1;
        }
    }

    pub(crate) fn known(&self, agent: usize) -> &[u32] {
        &self.times[2 * agent * self.n..][..self.n]
    }

    pub(crate) fn fenced(&self, agent: usize) -> &[u32] {
        &self.times[(2 * agent + 1) * self.n..][..self.n]
    }

    pub(crate) fn own(&self, agent: usize) -> u32 {
        self.times[2 * agent * self.n + agent]
    }

    /// All that the agent knows is behind a fence; what it does from here on is not.
    pub(crate) fn fence(&mut self, agent: usize) {
        let (known, fenced) = self.times[2 * agent * self.n..][..2 * self.n].split_at_mut(self.n);
        for (fenced, known) in fenced.iter_mut().zip(known.iter()) {
            *fenced = (*fenced).max(*known);
        }
        known[agent] += 1;
    }

    /// What the agent knows is put with what is there; what it does from here on is not.
    pub(crate) fn release(&mut self, agent: usize, into: &mut Vec<u32>) {
        into.resize(2 * self.n, 0);
        for (into, time) in into.iter_mut().zip(&self.times[2 * agent * self.n..]) {
            *into = (*into).max(*time);
        }
        self.times[2 * agent * self.n + agent] += 1;
    }

    pub(crate) fn acquire(&mut self, agent: usize, from: &[u32]) {
        for (time, from) in self.times[2 * agent * self.n..][..2 * self.n].iter_mut().zip(from) {
            *time = (*time).max(*from);
        }
    }
}
