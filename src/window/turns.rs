//! Whose turn it is, of several owners that wait for the same thing. Pure; knows nothing of who they are or what they wait for.
//! Start-time fair queueing (Goyal, Vin and Cheng, 1996): of owners that wait all the time, each gets turns in proportion to its
//! weight, whatever the others have waiting; who had nothing waiting has saved no turns.

/// Whose something that waits is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Its number: a small one.
    pub owner: u32,
    /// Turns that it gets for each of an owner with weight 1; at least 1.
    pub weight: u32,
}

impl Default for Share {
    /// Of nobody in particular.
    fn default() -> Self {
        Self { owner: 0, weight: 1 }
    }
}

impl Share {
    /// What so many turns take of its time.
    fn of(self, n_turns: usize) -> u64 {
        (TURN / u64::from(self.weight.max(1))).saturating_mul(n_turns as u64)
    }
}

/// What a turn takes of an owner's time, if its weight is 1.
const TURN: u64 = 1 << 24;

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Turns {
    /// The time of the last turn that was had: it passes by turns alone.
    now: u64,
    /// By owner.
    ends: Vec<End>,
}

/// Times at which an owner's turns end.
#[derive(Debug, Clone, Copy, Default)]
struct End {
    /// Of all that it took.
    taken: u64,
    /// Of those that it had.
    had: u64,
}

impl Turns {
    /// The time of its next turn, if it waits: of several, the one whose time is least is next.
    pub fn next(&self, share: Share) -> u64 {
        self.ends.get(share.owner as usize).map_or(self.now, |end| end.taken.max(self.now))
    }

    /// It takes so many turns, one after the other: the time of the first.
    pub fn take(&mut self, share: Share, n_turns: usize) -> u64 {
        let at = self.next(share);
        self.end(share).taken = at.saturating_add(share.of(n_turns));
        at
    }

    /// It did not have the last ones that it took.
    pub fn give_back(&mut self, share: Share, n_turns: usize) {
        let end = self.end(share);
        end.taken = end.taken.saturating_sub(share.of(n_turns));
    }

    /// Of those that it took and has not had, the one of that time is the last; none, if it is not said.
    pub fn keep_until(&mut self, share: Share, last: Option<u64>) {
        let end = self.end(share);
        end.taken = last.map_or(0, |last| last.saturating_add(share.of(1))).max(end.had);
    }

    /// It has its turn of that time.
    pub fn pass(&mut self, share: Share, at: u64) {
        self.now = self.now.max(at);
        let end = self.end(share);
        end.had = end.had.max(at.saturating_add(share.of(1)));
    }

    fn end(&mut self, share: Share) -> &mut End {
        let owner = share.owner as usize;
        if self.ends.len() <= owner {
            self.ends.resize(owner + 1, End::default());
        }
        &mut self.ends[owner]
    }
}
